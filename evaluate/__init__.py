"""Runs and manifests in, scores and pictures out."""
