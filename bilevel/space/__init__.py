"""Tensors as one vector: trees of them, and the inner product on them."""
