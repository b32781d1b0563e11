"""`dinov2 report`: what runs, manifests and scores show, as one page."""
