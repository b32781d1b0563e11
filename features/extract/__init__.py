"""A model run over many images."""
