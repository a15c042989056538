"""Proximal operators: the non-smooth part of an inner problem, and sets that its variable must stay in."""

from bilevel.inner.proximal.base import Prox as Prox
from bilevel.inner.proximal.box import Box as Box
from bilevel.inner.proximal.group_lasso import GroupLasso as GroupLasso
from bilevel.inner.proximal.l1 import L1 as L1
from bilevel.inner.proximal.non_negative import NonNegative as NonNegative
from bilevel.inner.proximal.simplex import Simplex as Simplex
