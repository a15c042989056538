"""The compiled engine: explicit derivatives, traced once, compiled, and held against the eager ones."""
