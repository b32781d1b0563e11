"""The losses, and the modules whose forward pass returns them."""
