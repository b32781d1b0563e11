"""Nearest neighbours and pairs above a similarity, exact or by an inverted file."""
