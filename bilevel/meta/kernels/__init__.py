"""Kernels for adaptation in function space, one per file."""

from bilevel.meta.kernels.base import ExplicitKernel as ExplicitKernel
from bilevel.meta.kernels.base import FeatureKernel as FeatureKernel
from bilevel.meta.kernels.base import Kernel as Kernel
from bilevel.meta.kernels.cosine import Cosine as Cosine
from bilevel.meta.kernels.linear import Linear as Linear
from bilevel.meta.kernels.ntk import NTK as NTK
from bilevel.meta.kernels.rbf import RBF as RBF
from bilevel.meta.kernels.weighted_sum import Sum as Sum
