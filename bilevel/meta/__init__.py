"""Meta-learning: what adapts, from where, how, how the outer gradient is estimated, and how x moves."""

from bilevel.meta.evaluation import Evaluation as Evaluation
from bilevel.meta.evaluation import accuracy as accuracy
from bilevel.meta.few_iteration import FewIteration as FewIteration
from bilevel.meta.head import Head as Head
from bilevel.meta.learner import Learner as Learner
from bilevel.meta.patterns import Choice as Choice
from bilevel.meta.patterns import Pattern as Pattern
from bilevel.meta.rates import Rates as Rates
from bilevel.meta.reptile import Reptile as Reptile
from bilevel.meta.similarity import Reuse as Reuse
from bilevel.meta.similarity import reuse as reuse
from bilevel.meta.start import Fixed as Fixed
from bilevel.meta.start import Shared as Shared
from bilevel.meta.start import Start as Start
