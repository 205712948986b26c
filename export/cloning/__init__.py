"""Plain behaviour cloning: one observation in, one action out."""
