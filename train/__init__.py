"""Manifests in, run folders out."""
