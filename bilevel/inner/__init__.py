"""How the inner variable is found."""

from bilevel.inner.base import InnerSolver as InnerSolver
from bilevel.inner.converge import Converge as Converge
from bilevel.inner.descent import Descent as Descent
