"""`python -m dinov2_toolkit`: the same as `dinov2`, and what `features.launch` starts."""

from .cli import main

main()
