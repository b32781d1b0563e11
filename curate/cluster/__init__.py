"""Hierarchical k-means with resampling, and balanced samples."""
