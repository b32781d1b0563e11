"""What lies on disk: manifests, vectors, images, the catalog."""
