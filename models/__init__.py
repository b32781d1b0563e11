"""The vision transformer, its heads, and every format its weights come in."""
