"""Images in, smaller and better manifests out."""
