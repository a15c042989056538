"""How the hypergradient is estimated: one estimator a file."""

from bilevel.estimators.base import Estimate as Estimate
from bilevel.estimators.base import Estimator as Estimator
from bilevel.estimators.base import Instance as Instance
from bilevel.estimators.first_order import FirstOrder as FirstOrder
from bilevel.estimators.first_order_corrected import FirstOrderCorrected as FirstOrderCorrected
from bilevel.estimators.implicit import Implicit as Implicit
from bilevel.estimators.memory_reduced import MemoryReduced as MemoryReduced
from bilevel.estimators.unrolled import Unrolled as Unrolled
