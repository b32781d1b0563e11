"""What is around the road: the catalog."""
