"""`python -m dinov2_toolkit`: the same as `dinov2`, and what torch's launcher starts."""

from .cli import main

main()
