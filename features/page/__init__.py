"""Pages for people: one HTML file each, with everything in it and nothing asked of a network."""
