"""Two coordinates an image, and the page that shows them."""
