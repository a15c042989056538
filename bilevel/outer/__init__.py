"""Optimizers of the outer variable that torch.optim does not have, and constraints on it."""

from bilevel.outer.clipped import ClippedSGD as ClippedSGD
from bilevel.outer.dual_averaging import DualAveraging as DualAveraging
from bilevel.outer.normalized import NormalizedSGD as NormalizedSGD
from bilevel.outer.optimistic import OptimisticSGD as OptimisticSGD
from bilevel.outer.projected import Projected as Projected
from bilevel.outer.projections import Ball as Ball
from bilevel.outer.projections import Box as Box
from bilevel.outer.projections import NonNegative as NonNegative
from bilevel.outer.projections import Simplex as Simplex
from bilevel.outer.reparametrized import Exp as Exp
from bilevel.outer.reparametrized import Map as Map
from bilevel.outer.reparametrized import Sigmoid as Sigmoid
from bilevel.outer.reparametrized import Softmax as Softmax
from bilevel.outer.reparametrized import Softplus as Softplus
from bilevel.outer.reparametrized import constrained as constrained
from bilevel.outer.reparametrized import reparametrized as reparametrized
