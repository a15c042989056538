"""Hypergradients of others, as rows beside ours: one file a library, and what a case's own function becomes."""
