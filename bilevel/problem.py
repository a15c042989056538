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
        tasks: set by `TaskMean`: number of tasks, when the inner variable has a leading task dimension. None for an
            ordinary problem.

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
    tasks: int | None = None

    def __post_init__(self) -> None:
        for name, optional in (("inner_loss", False), ("outer_loss", False), ("init", True), ("features", True)):
            value = getattr(self, name)
            if not callable(value) and not (optional and value is None):
                raise TypeError(f"Problem was given {name}={value!r}; a function was needed")

    def inner(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """G at a batch as it comes from `Batches` (summed over tasks)."""
        return self.inner_on(inner, outer, self.embed(outer, batch))

    def outer(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """F at a batch as it comes from `Batches` (summed over tasks)."""
        return self._evaluate("outer_loss", inner, outer, self.embed(outer, batch))

    def inner_on(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """G at the result of `embed`."""
        return self._evaluate("inner_loss", inner, outer, embedded)

    def embed(self, outer: Tree, batch: Any) -> Any:
        """What the losses receive in place of the batch: `features(outer, batch)`, or the batch itself."""
        if self.features is None:
            return batch
        return self.features(outer, batch) if self.tasks is None else over_tasks(self.features, None, 0)(outer, batch)

    def start(self, outer: Tree, batch: Any) -> Tree:
        """`init`, for all tasks at once where there are tasks."""
        assert self.init is not None
        start = self.init(outer, batch) if self.tasks is None else over_tasks(self.init, None, 0)(outer, batch)
        like = tree.tensors(outer)[0]
        leaves = tree.flatten(start)[0]
        for leaf in leaves or [None]:
            if not isinstance(leaf, Tensor) or leaf.dtype != like.dtype or leaf.device != like.device:
                given = (
                    f"{leaf.dtype} on {leaf.device}"
                    if isinstance(leaf, Tensor)
                    else "nothing"
                    if leaf is None
                    else f"a {type(leaf).__name__}"
                )
                raise TypeError(
                    f"Problem.init returned {given}; a pytree of tensors of the dtype and device of outer "
                    f"({like.dtype} on {like.device}) was needed"
                )
        return start

    def _evaluate(self, name: str, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        function: Loss = getattr(self, name)
        watched = {
            "inner variable": tree.tensors(inner),
            "outer variable": tree.tensors(outer),
            "batch": tree.tensors(batch),
        }
        versions = [[leaf._version for leaf in leaves] for leaves in watched.values()]
        try:
            loss = (
                function(inner, outer, batch)
                if self.tasks is None
                else over_tasks(function, 0, None, 0)(inner, outer, batch)
            )
        except RuntimeError as error:
            if "in-place operation" in str(error):
                raise ValueError(_in_place_message(name, _mutated(function, inner, outer, batch))) from error
            raise
        for role, leaves, before in zip(watched, watched.values(), versions, strict=True):
            if before != [leaf._version for leaf in leaves]:
                raise ValueError(_in_place_message(name, role))
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{name} returned {'None' if loss is None else type(loss).__name__}; a 0-dim tensor was needed. Does "
                f"it end in a return of the loss, without .item()?"
            )
        shape = () if self.tasks is None else (self.tasks,)
        if loss.shape != shape or not loss.is_floating_point():
            each = "" if self.tasks is None else " for one task"
            raise ValueError(
                f"{name} returned a tensor of shape {tuple(loss.shape[len(shape) :])} and dtype {loss.dtype}{each}; a "
                f"floating 0-dim tensor was needed. Reduce it with .mean() or .sum()."
            )
        return loss if self.tasks is None else loss.sum()


def _mutated(function: Loss, inner: Tree, outer: Tree, batch: Any) -> str:
    """Which argument a loss changes in place, found on copies after autograd refused the change."""
    roles = {"inner variable": inner, "outer variable": outer, "batch": batch}
    copies = [
        tree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
        for value in roles.values()
    ]
    with torch.no_grad():
        function(*copies)
    return next(
        (role for role, copy in zip(roles, copies, strict=True) if any(leaf._version for leaf in tree.tensors(copy))),
        "inner variable",
    )


def _in_place_message(name: str, role: str) -> str:
    return (
        f"{name} changed the {role} in place. It must leave its arguments as they are: write y = y + d instead of y += "
        f"d or y.add_(d), and clone a tensor before assigning into it."
    )


def over_tasks(function: Callable[..., Any], *dims: int | None) -> Callable[..., Any]:
    """`function` mapped over the leading task dimension of the arguments whose entry in `dims` is 0."""

    def mapped(*arguments: Any) -> Any:
        in_dims = tuple(
            None if dim is None else tree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, argument)
            for dim, argument in zip(dims, arguments, strict=True)
        )
        # "different": tasks draw their own dropout masks, as they would one after another.
        return torch.func.vmap(function, in_dims=in_dims, randomness="different")(*arguments)

    return mapped


def proximal(problem: Problem, strength: float) -> Problem:
    """Add strength/2 |y - init(x)|^2 to the inner loss: the inner problem of iMAML and of 2409.03682.

    It makes an initialization visible to implicit and corrected estimators, for which the start of the inner loop does
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
        >>> maml = bl.Problem(lambda y, x, b: (y - b).pow(2).sum(), lambda y, x, b: (y - b).pow(2).sum(), init=lambda x, b: x)
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
    if problem.features is not None:
        raise ValueError(
            "proximal() was given a problem with features; init would receive features in place of the batch. Leave "
            "one of them out"
        )
    inner_loss, init = problem.inner_loss, problem.init

    def pulled(inner: Tree, outer: Tree, batch: Any) -> Tensor:
        # On one flat vector: leaf by leaf, the many small operators of a conv net's parameters take a tenth of its
        # gradient. And before the loss, so that the copies are gone when its activations come.
        moved, start = (
            torch.cat([leaf.reshape(-1) for leaf in tree.tensors(value)]) for value in (inner, init(outer, batch))
        )
        distance = moved - start
        del moved, start
        pull = 0.5 * strength * torch.dot(distance, distance)
        return inner_loss(inner, outer, batch) + pull

    return dataclasses.replace(problem, inner_loss=pulled)
