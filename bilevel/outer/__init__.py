"""Optimizers of the outer variable that torch.optim does not have."""

from bilevel.outer.clipped import ClippedSGD as ClippedSGD
from bilevel.outer.normalized import NormalizedSGD as NormalizedSGD
