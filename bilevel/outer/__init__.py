"""Optimizers of the outer variable that torch.optim does not have."""

from bilevel.outer.clipped import ClippedSGD as ClippedSGD
from bilevel.outer.dual_averaging import DualAveraging as DualAveraging
from bilevel.outer.normalized import NormalizedSGD as NormalizedSGD
from bilevel.outer.optimistic import OptimisticSGD as OptimisticSGD
