"""Bootstrapped hypergradients: towards a target that lies ahead of the inner loop."""
