"""The pool images nearest to query images."""
