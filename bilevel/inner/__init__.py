"""How the inner problem is solved: a dynamics that moves it, under a rule that says when to stop."""

from bilevel.inner import proximal as proximal
from bilevel.inner import root as root
from bilevel.inner.aggregated import Aggregated as Aggregated
from bilevel.inner.averaged import Averaged as Averaged
from bilevel.inner.base import InnerSolver as InnerSolver
from bilevel.inner.closed_form import ClosedForm as ClosedForm
from bilevel.inner.closed_form import KernelRidge as KernelRidge
from bilevel.inner.closed_form import LeastSquares as LeastSquares
from bilevel.inner.closed_form import Ridge as Ridge
from bilevel.inner.converge import Converge as Converge
from bilevel.inner.descent import Descent as Descent
from bilevel.inner.dynamics import Dynamics as Dynamics
from bilevel.inner.dynamics import Point as Point
from bilevel.inner.gradient import GradientDynamics as GradientDynamics
from bilevel.inner.langevin import Langevin as Langevin
from bilevel.inner.lbfgs import LBFGS as LBFGS
from bilevel.inner.newton import Newton as Newton
from bilevel.inner.proximal_gradient import ProximalGradient as ProximalGradient
from bilevel.inner.root import DeepEquilibrium as DeepEquilibrium
from bilevel.inner.root import FixedPoint as FixedPoint
from bilevel.inner.root import Root as Root
from bilevel.inner.search import Armijo as Armijo
from bilevel.inner.search import LineSearch as LineSearch
from bilevel.inner.search import Wolfe as Wolfe
from bilevel.inner.steepest_descent import SteepestDescent as SteepestDescent
from bilevel.inner.steepest_descent import half_square as half_square
