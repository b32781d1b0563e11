"""Curate images, train DINOv2 vision transformers on them, distil them, and measure the features."""
