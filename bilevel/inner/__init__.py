"""How the inner problem is solved: a dynamics that moves it, under a rule that says when to stop."""

from bilevel.inner.aggregated import Aggregated as Aggregated
from bilevel.inner.averaged import Averaged as Averaged
from bilevel.inner.base import InnerSolver as InnerSolver
from bilevel.inner.converge import Converge as Converge
from bilevel.inner.descent import Descent as Descent
from bilevel.inner.dynamics import Dynamics as Dynamics
from bilevel.inner.dynamics import Point as Point
from bilevel.inner.gradient import GradientDynamics as GradientDynamics
from bilevel.inner.langevin import Langevin as Langevin
from bilevel.inner.steepest_descent import SteepestDescent as SteepestDescent
from bilevel.inner.steepest_descent import half_square as half_square
