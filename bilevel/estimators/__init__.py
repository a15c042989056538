"""How the hypergradient is estimated: one estimator a file."""

from bilevel.estimators import stochastic as stochastic
from bilevel.estimators.base import Estimate as Estimate
from bilevel.estimators.base import Estimator as Estimator
from bilevel.estimators.base import Instance as Instance
from bilevel.estimators.base import Path as Path
from bilevel.estimators.bootstrapped.base import Ahead as Ahead
from bilevel.estimators.bootstrapped.base import Aimed as Aimed
from bilevel.estimators.bootstrapped.base import Matching as Matching
from bilevel.estimators.bootstrapped.base import Target as Target
from bilevel.estimators.bootstrapped.bootstrapped import Bootstrapped as Bootstrapped
from bilevel.estimators.bootstrapped.matchings import KL as KL
from bilevel.estimators.bootstrapped.matchings import Bregman as Bregman
from bilevel.estimators.bootstrapped.matchings import SquaredDistance as SquaredDistance
from bilevel.estimators.bootstrapped.targets import FurtherSteps as FurtherSteps
from bilevel.estimators.bootstrapped.targets import OneStep as OneStep
from bilevel.estimators.implicit.implicit import Implicit as Implicit
from bilevel.estimators.implicit.memory_reduced import MemoryReduced as MemoryReduced
from bilevel.estimators.penalty.first_order_corrected import FirstOrderCorrected as FirstOrderCorrected
from bilevel.estimators.penalty.perturbation import best_nu as best_nu
from bilevel.estimators.penalty.perturbation import calibrated_nu as calibrated_nu
from bilevel.estimators.reverse.first_order import FirstOrder as FirstOrder
from bilevel.estimators.reverse.revolve import Revolve as Revolve
from bilevel.estimators.reverse.unrolled import Unrolled as Unrolled
from bilevel.estimators.state import State as State
from bilevel.estimators.state import per_task as per_task
