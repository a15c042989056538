"""Differentiate through an optimization: min over x of f(y*(x), x) with y*(x) = argmin over y of g(y, x).

The problem is written once, every estimator of the hypergradient is one argument. See `hypergradient`.
"""

from bilevel import distributed as distributed
from bilevel.adapt import adapt as adapt
from bilevel.batches import Batches as Batches
from bilevel.batches import PerStep as PerStep
from bilevel.engine.base import Engine as Engine
from bilevel.engine.compiled.captured import Captured as Captured
from bilevel.engine.compiled.engine import Compiled as Compiled
from bilevel.engine.eager import Eager as Eager
from bilevel.estimators import Bootstrapped as Bootstrapped
from bilevel.estimators import Estimator as Estimator
from bilevel.estimators import FirstOrder as FirstOrder
from bilevel.estimators import FirstOrderCorrected as FirstOrderCorrected
from bilevel.estimators import Implicit as Implicit
from bilevel.estimators import MemoryReduced as MemoryReduced
from bilevel.estimators import Path as Path
from bilevel.estimators import Unrolled as Unrolled
from bilevel.estimators import best_nu as best_nu
from bilevel.estimators import calibrated_nu as calibrated_nu
from bilevel.functional import functional as functional
from bilevel.hypergradient import hypergradient as hypergradient
from bilevel.hypergradient import set_grad as set_grad
from bilevel.inner import Converge as Converge
from bilevel.inner import Descent as Descent
from bilevel.inner import InnerSolver as InnerSolver
from bilevel.iterate import iterate as iterate
from bilevel.linear import CG as CG
from bilevel.linear import Dense as Dense
from bilevel.linear import LinearSolver as LinearSolver
from bilevel.linear import Neumann as Neumann
from bilevel.loop import OuterLoop as OuterLoop
from bilevel.loop import Step as Step
from bilevel.meta import Learner as Learner
from bilevel.optim import SGD as SGD
from bilevel.optim import Adam as Adam
from bilevel.optim import AdamW as AdamW
from bilevel.optim import Optimizer as Optimizer
from bilevel.optim import Scheduled as Scheduled
from bilevel.outcome import Adapted as Adapted
from bilevel.outcome import BilevelError as BilevelError
from bilevel.outcome import EngineMismatchError as EngineMismatchError
from bilevel.outcome import Hypergradient as Hypergradient
from bilevel.outcome import LinearSolution as LinearSolution
from bilevel.outcome import NotTraceableError as NotTraceableError
from bilevel.outcome import NotTwiceDifferentiableError as NotTwiceDifferentiableError
from bilevel.outcome import Solution as Solution
from bilevel.outcome import Status as Status
from bilevel.outer import ClippedSGD as ClippedSGD
from bilevel.outer import DualAveraging as DualAveraging
from bilevel.outer import NormalizedSGD as NormalizedSGD
from bilevel.outer import OptimisticSGD as OptimisticSGD
from bilevel.problem import Problem as Problem
from bilevel.problem import proximal as proximal
from bilevel.rematerialize import rematerialize as rematerialize
from bilevel.solution import solution as solution
from bilevel.space.ranks import RankError as RankError
from bilevel.tasks import GivenWeights as GivenWeights
from bilevel.tasks import GradientSimilarity as GradientSimilarity
from bilevel.tasks import TaskMean as TaskMean
from bilevel.tasks import TaskWeights as TaskWeights

__version__ = "0.1.0"
