"""Inner problems that are equations: roots, fixed points, equilibria, and the methods that find them."""

from bilevel.inner.root.anderson import Anderson as Anderson
from bilevel.inner.root.base import Method as Method
from bilevel.inner.root.broyden import Broyden as Broyden
from bilevel.inner.root.deep_equilibrium import DeepEquilibrium as DeepEquilibrium
from bilevel.inner.root.fixed_point import FixedPoint as FixedPoint
from bilevel.inner.root.newton import NewtonRoot as NewtonRoot
from bilevel.inner.root.plain import Plain as Plain
from bilevel.inner.root.root import Root as Root
