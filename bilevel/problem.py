"""What is solved: min over x of f(y*(x), x) with y*(x) = argmin over y of g(y, x).

x is the outer variable, y the inner one; both are pytrees of tensors. A `Problem` holds the two losses. Letters for
sizes: P inner, Q outer, K inner steps, T tasks, B batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree

Loss = Callable[[Tree, Tree, Any], Tensor]
Init = Callable[[Tree, Any], Tree]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem, written once for every estimator.

    Args:
        inner_loss: g, called as `inner_loss(inner, outer, batch)`; returns a 0-dim floating tensor.
        outer_loss: f, called as `outer_loss(inner, outer, batch)`; likewise.
        init: the inner start as a function of x, called as `init(outer, batch)` with the (first) inner batch. MAML is
            `init=lambda outer, batch: outer`. With it, `inner=None` is passed to `hypergradient`.
        features: the part of both losses that does not involve y, called as `features(outer, batch)`; the losses then
            receive its result in place of the batch. Declared so that estimators that keep no trajectory run it once
            instead of once a step (y a head on a feature extractor x). None: the losses receive the batch itself.

    The losses may run under torch.autocast, opened inside them or around the whole call, and may take gradients of
    their own (a physics-informed net, a gradient penalty).

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(
        ...     inner_loss=lambda y, x, batch: ((y - x) ** 2).sum(),
        ...     outer_loss=lambda y, x, batch: (y**2).sum(),
        ... )
        >>> problem.inner(torch.ones(2), torch.zeros(2), None)
        tensor(2.)
    """

    inner_loss: Loss
    outer_loss: Loss
    init: Init | None = None
    features: Callable[[Tree, Any], Any] | None = None
    # What was learned about the problem in earlier calls (which paths x takes, ...): asked once, then remembered.
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, optional in (("inner_loss", False), ("outer_loss", False), ("init", True), ("features", True)):
            value = getattr(self, name)
            if not callable(value) and not (optional and value is None):
                raise TypeError(f"Problem was given {name}={value!r}; a function was needed")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memo": {}}

    def inner(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The inner loss at a batch as it comes from `Batches`."""
        return self.inner_loss(inner, outer, batch if self.features is None else self.features(outer, batch))

    def outer(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The outer loss at a batch as it comes from `Batches`."""
        return self.outer_loss(inner, outer, batch if self.features is None else self.features(outer, batch))


def proximal(problem: Problem, strength: float) -> Problem:
    """Add strength/2 |y - y_0|^2 with y_0 = init(x) to the inner loss: the inner problem of iMAML and of 2409.03682.

    y_0 is where the inner loop starts: init is called with the first inner batch, and draws its random numbers once. It
    makes an initialization visible to implicit and corrected estimators, for which the start of the inner loop does
    not matter.

    Args:
        problem: one with `init`.
        strength: positive; at least the largest negative curvature of g, for the inner problem to be strongly convex.

    Raises:
        ValueError: the problem has no `init`, or strength is not positive.

    References:
        Rajeswaran et al. 2019, Meta-Learning with Implicit Gradients, arXiv 1909.04630; Chayti and Jaggi 2024, arXiv
        2409.03682.

    Example:
        >>> import torch, bilevel as bl
        >>> loss = lambda y, x, b: (y - b).pow(2).sum()
        >>> maml = bl.Problem(loss, loss, init=lambda x, b: x)
        >>> bl.proximal(maml, 2.0).inner(torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor(1.)
    """
    if problem.init is None:
        raise ValueError(
            "proximal() was given a problem without init; it pulls y towards init(x). Write Problem(..., init=lambda "
            "x, batch: x)"
        )
    if not strength > 0:
        raise ValueError(f"proximal() was given strength={strength}; a positive number was needed")
    loss = problem.inner_loss
    pulled = (
        Pulled(loss.inner_loss, problem.init, loss.strength + strength)
        if isinstance(loss, Pulled)
        else Pulled(loss, problem.init, strength)
    )
    return dataclasses.replace(problem, inner_loss=pulled)


@dataclasses.dataclass(frozen=True)
class Pulled:
    """An inner loss and a pull to the start. The oracles know the start; by itself it takes init at the batch."""

    inner_loss: Loss
    init: Init
    strength: float

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The inner loss + strength/2 |inner - init(outer, batch)|^2."""
        return self.inner_loss(inner, outer, batch) + distance(self.strength, inner, self.init(outer, batch))


def distance(strength: float, inner: Tree, start: Tree, tasks: int | None = None) -> Tensor:
    """strength/2 |inner - start|^2, per task where there are tasks."""
    # On one flat vector: leaf by leaf, the many small operators of a conv net's parameters take a tenth of its
    # gradient.
    rows = 1 if tasks is None else tasks
    moved, begun = (
        torch.cat([leaf.reshape(rows, -1) for leaf in tree.tensors(value)], dim=1) for value in (inner, start)
    )
    away = moved - begun
    del moved, begun
    pull = 0.5 * strength * torch.linalg.vecdot(away, away)
    return pull.squeeze(0) if tasks is None else pull
