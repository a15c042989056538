"""Neighbours that users come from: each is an optional package, imported only inside functions."""
