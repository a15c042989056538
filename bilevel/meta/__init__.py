"""Meta-learning: what adapts, from where, how, how the outer gradient is estimated, and how x moves."""

from bilevel.meta.evaluation import Evaluation as Evaluation
from bilevel.meta.evaluation import accuracy as accuracy
from bilevel.meta.head import Head as Head
from bilevel.meta.learner import Learner as Learner
from bilevel.meta.multi_step import MultiStep as MultiStep
from bilevel.meta.multi_step import StartNorms as StartNorms
from bilevel.meta.multi_step import smoothness as smoothness
from bilevel.meta.multi_step import start_norms as start_norms
from bilevel.meta.rates import Rates as Rates
from bilevel.meta.reptile import Reptile as Reptile
from bilevel.meta.start import Fixed as Fixed
from bilevel.meta.start import Shared as Shared
from bilevel.meta.start import Start as Start
