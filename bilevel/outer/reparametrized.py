"""Constraints by another variable: x = map(u), u free.

    Softplus: log(1 + e^u) > 0    Exp: e^u > 0    Sigmoid: between low and high    Softmax: a point of the simplex

    dF/du = (dx/du)' dF/dx: the map stands inside every function of the problem, so that the estimator goes through it,
    whichever way x acts.

Wins: any outer optimizer, no projection, and steps of a size that suits the set (Exp: relative ones).
Fails: a bound itself is out of reach (u -> inf), and near it dx/du vanishes, so that x comes away from it slowly. Where
solutions lie on the boundary (a sparse simplex), use `Projected`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree

P = TypeVar("P")


class Map(Protocol):
    """A differentiable map from all numbers onto an open set, and its inverse."""

    def __call__(self, free: Tensor) -> Tensor:
        """x, of u."""

    def inverse(self, x: Tensor) -> Tensor:
        """u, of x; not finite where x is not in the set."""


@dataclasses.dataclass(frozen=True)
class Exp:
    """x = e^u > 0: steps in u are relative steps in x.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Exp().inverse(torch.tensor(1.0))
        tensor(0.)
    """

    def __call__(self, free: Tensor) -> Tensor:
        """x, of u."""
        return free.exp()

    def inverse(self, x: Tensor) -> Tensor:
        """u, of x."""
        return x.log()


@dataclasses.dataclass(frozen=True)
class Softplus:
    """x = low + log(1 + e^u) > low: like u where u is large.

    Args:
        low: the bound.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Softplus()(bl.outer.Softplus().inverse(torch.tensor(2.0)))
        tensor(2.)
    """

    low: float = 0.0

    def __call__(self, free: Tensor) -> Tensor:
        """x, of u."""
        return self.low + torch.nn.functional.softplus(free, threshold=60.0)

    def inverse(self, x: Tensor) -> Tensor:
        """u, of x."""
        above = x - self.low
        return above + (-torch.expm1(-above)).log()


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """x = low + (high - low) / (1 + e^-u), between low and high.

    Args:
        low: the lower bound.
        high: the upper one.

    Raises:
        ValueError: the interval is empty.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Sigmoid(-1.0, 1.0)(torch.tensor(0.0))
        tensor(0.)
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"Sigmoid was given low={self.low!r}, high={self.high!r}; low < high was needed")

    def __call__(self, free: Tensor) -> Tensor:
        """x, of u."""
        return self.low + (self.high - self.low) * free.sigmoid()

    def inverse(self, x: Tensor) -> Tensor:
        """u, of x."""
        return ((x - self.low) / (self.high - self.low)).logit()


@dataclasses.dataclass(frozen=True)
class Softmax:
    """x = e^u / sum e^u along a dimension: positive, with a sum of 1. Adding a number to all u changes nothing.

    Args:
        dim: along which x sums up to 1.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Softmax()(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    dim: int = -1

    def __call__(self, free: Tensor) -> Tensor:
        """x, of u."""
        return free.softmax(self.dim)

    def inverse(self, x: Tensor) -> Tensor:
        """The u of x whose mean is 0."""
        logs = x.log()
        return logs - logs.mean(self.dim, keepdim=True)


Maps = Map | Mapping[Any, Map]
"""One map for every tensor, or a dict of maps for some entries of an outer variable that is a dict."""


def constrained(free: Tree, maps: Maps) -> Tree:
    """The outer variable x of the unconstrained one.

    Args:
        free: u, a tree like x.
        maps: as for `reparametrized`.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.constrained({"lr": torch.tensor(0.0), "bias": torch.tensor(3.0)}, {"lr": bl.outer.Exp()})
        {'lr': tensor(1.), 'bias': tensor(3.)}
    """
    return _mapped(free, maps, lambda each: each)


def reparametrized(problem: P, outer: Tree, maps: Maps) -> tuple[P, Tree]:
    """The same problem in an unconstrained variable u, and the u where x = outer.

    Args:
        problem: a `Problem`, in x.
        outer: where x starts, in the open set of its map.
        maps: one map for every tensor of x, such as Softplus(), or a dict of maps for some entries of an x that is a
            dict; the others stay as they are. Any object with __call__(free) and inverse(x) that are differentiable.

    Returns:
        the problem, whose losses, init and features take u, and the start: fresh leaves that require grad, for an
        outer optimizer. `constrained(u, maps)` is x. Hyper-parameters of the inner optimizer that are functions of
        outer are given u as well: write SGD(lr=lambda u: bl.outer.constrained(u, maps)["lr"]).

    Raises:
        TypeError: a map has no inverse, or maps is a dict and outer is none.
        ValueError: a key is not in outer, or outer is not in the set of its map.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y + 1) ** 2)
        >>> positive, u = bl.outer.reparametrized(problem, torch.tensor(1.0), bl.outer.Exp())
        >>> bl.hypergradient(positive, u, torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Unrolled()).grad  # e^u 2 (e^u + 1)
        tensor(4.)
    """
    for each in maps.values() if isinstance(maps, Mapping) else [maps]:
        if not callable(each) or not callable(getattr(each, "inverse", None)):
            raise TypeError(
                f"reparametrized() was given the map {each!r}; an object with __call__(free) and inverse(x) was "
                f"needed, such as bilevel.outer.Softplus()"
            )
    with torch.no_grad():
        free = _mapped(tree.detach(outer), maps, lambda each: each.inverse)
        back = constrained(free, maps)
    for name, x, u, again in zip(
        tree.names(outer), tree.tensors(outer), tree.tensors(free), tree.tensors(back), strict=True
    ):
        digits = 64 * torch.finfo(x.dtype).eps
        close = torch.allclose(again.double(), x.detach().double(), rtol=digits, atol=digits)
        if not bool(u.isfinite().all()) or not close:
            raise ValueError(
                f"reparametrized() was given an outer variable whose {name} is not in the (open) set of its map; start "
                f"inside, away from the bounds"
            )
    fields = {
        name: _wrapped(getattr(problem, name), maps, place)
        for name, place in (("inner_loss", 1), ("outer_loss", 1), ("init", 0), ("features", 0))
    }
    start = tree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), free)
    return dataclasses.replace(problem, **fields), start  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class _Through:
    """A function of the problem with u in the place of x, which is argument number `place`."""

    function: Callable[..., Any]
    maps: Maps
    place: int

    def __call__(self, *arguments: Any) -> Any:
        """The function at x."""
        place = self.place
        return self.function(*arguments[:place], constrained(arguments[place], self.maps), *arguments[place + 1 :])


def _wrapped(function: Any, maps: Maps, place: int) -> Any:
    if function is None:
        return None
    if (
        dataclasses.is_dataclass(function)
        and not isinstance(function, type)
        and hasattr(function, "inner_loss")
        and hasattr(function, "init")
    ):
        # What `proximal` made of an inner loss: the oracles know it, and evaluate its start themselves.
        parts = {"inner_loss": _Through(function.inner_loss, maps, 1), "init": _Through(function.init, maps, 0)}
        return dataclasses.replace(function, **parts)
    return _Through(function, maps, place)


def _mapped(value: Tree, maps: Maps, take: Callable[[Any], Callable[[Tensor], Tensor]]) -> Tree:
    if not isinstance(maps, Mapping):
        return tree.tree_map(take(maps), value)
    if not isinstance(value, dict):
        raise TypeError(
            f"a dict of maps was given for an outer variable that is a {type(value).__name__}; one map for all of its "
            f"tensors was needed, or a dict as the outer variable"
        )
    unknown = [key for key in maps if key not in value]
    if unknown:
        raise ValueError(f"maps were given for {unknown}, and the outer variable has {list(value)}")
    return {key: tree.tree_map(take(maps[key]), each) if key in maps else each for key, each in value.items()}
