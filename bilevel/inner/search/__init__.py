"""Line searches: how far a step goes along its direction."""

from bilevel.inner.search.armijo import Armijo as Armijo
from bilevel.inner.search.base import LineSearch as LineSearch
from bilevel.inner.search.wolfe import Wolfe as Wolfe
