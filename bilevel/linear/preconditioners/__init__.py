"""Maps near the inverse of an operator, for CG and MINRES."""
