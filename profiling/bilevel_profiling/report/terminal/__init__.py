"""Records as tables in the terminal, by rich."""
