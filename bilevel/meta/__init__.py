"""Meta-learning: what adapts, from where, how, how the outer gradient is estimated, and how x moves."""

from bilevel.meta.evaluation import Evaluation as Evaluation
from bilevel.meta.evaluation import accuracy as accuracy
from bilevel.meta.gradient_flow import GradientFlow as GradientFlow
from bilevel.meta.gradient_penalty import gradient_penalty as gradient_penalty
from bilevel.meta.head import Embedded as Embedded
from bilevel.meta.head import Head as Head
from bilevel.meta.kernel_ridge import KernelRidge as KernelRidge
from bilevel.meta.kernels import NTK as NTK
from bilevel.meta.kernels import RBF as RBF
from bilevel.meta.kernels import Cosine as Cosine
from bilevel.meta.kernels import FeatureKernel as FeatureKernel
from bilevel.meta.kernels import Kernel as Kernel
from bilevel.meta.kernels import Linear as Linear
from bilevel.meta.kernels import Sum as Sum
from bilevel.meta.learner import Learner as Learner
from bilevel.meta.rates import Rates as Rates
from bilevel.meta.reptile import Reptile as Reptile
from bilevel.meta.start import Fixed as Fixed
from bilevel.meta.start import Shared as Shared
from bilevel.meta.start import Start as Start
from bilevel.meta.update_rule import RuleStep as RuleStep
from bilevel.meta.update_rule import Seen as Seen
from bilevel.meta.update_rule import last_gradient as last_gradient
from bilevel.meta.update_rule import learned_updates as learned_updates
