"""What is solved: min over x of f(y*(x), x) with y*(x) = argmin over y of g(y, x).

x is the outer variable, y the inner one; both are pytrees of tensors. A `Problem` holds the two losses, `Batches` the data of one
hypergradient. Letters for sizes: P inner, Q outer, K inner steps, T tasks, B batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._tree import Tree

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
        features: the part of both losses that does not involve y, called as `features(outer, batch)`; the losses then receive its result in
            place of the batch. Declared so that estimators that keep no trajectory run it once instead of once a step (y a head on a
            feature extractor x). None: the losses receive the batch itself.
        tasks: set by `TaskMean`: number of tasks, when the inner variable has a leading task dimension. None for an ordinary problem.

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
        like = _tree.tensors(outer)[0]
        leaves = _tree.flatten(start)[0]
        for leaf in leaves or [None]:
            if not isinstance(leaf, Tensor) or leaf.dtype != like.dtype or leaf.device != like.device:
                given = f"{leaf.dtype} on {leaf.device}" if isinstance(leaf, Tensor) else "nothing" if leaf is None else f"a {type(leaf).__name__}"
                raise TypeError(
                    f"Problem.init returned {given}; a pytree of tensors of the dtype and device of outer ({like.dtype} on {like.device}) was needed"
                )
        return start

    def _evaluate(self, name: str, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        function: Loss = getattr(self, name)
        watched = {"inner variable": _tree.tensors(inner), "outer variable": _tree.tensors(outer), "batch": _tree.tensors(batch)}
        versions = [[leaf._version for leaf in leaves] for leaves in watched.values()]
        try:
            loss = function(inner, outer, batch) if self.tasks is None else over_tasks(function, 0, None, 0)(inner, outer, batch)
        except RuntimeError as error:
            if "in-place operation" in str(error):
                raise ValueError(_in_place_message(name, _mutated(function, inner, outer, batch))) from error
            raise
        for role, leaves, before in zip(watched, watched.values(), versions, strict=True):
            if before != [leaf._version for leaf in leaves]:
                raise ValueError(_in_place_message(name, role))
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{name} returned {'None' if loss is None else type(loss).__name__}; a 0-dim tensor was needed. Does it end in a return "
                f"of the loss, without .item()?"
            )
        shape = () if self.tasks is None else (self.tasks,)
        if loss.shape != shape or not loss.is_floating_point():
            each = "" if self.tasks is None else " for one task"
            raise ValueError(
                f"{name} returned a tensor of shape {tuple(loss.shape[len(shape) :])} and dtype {loss.dtype}{each}; a floating 0-dim tensor "
                f"was needed. Reduce it with .mean() or .sum()."
            )
        return loss if self.tasks is None else loss.sum()


def _mutated(function: Loss, inner: Tree, outer: Tree, batch: Any) -> str:
    """Which argument a loss changes in place, found on copies after autograd refused the change."""
    roles = {"inner variable": inner, "outer variable": outer, "batch": batch}
    copies = [_tree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree) for tree in roles.values()]
    with torch.no_grad():
        function(*copies)
    return next((role for role, copy in zip(roles, copies, strict=True) if any(leaf._version for leaf in _tree.tensors(copy))), "inner variable")


def _in_place_message(name: str, role: str) -> str:
    return (
        f"{name} changed the {role} in place. It must leave its arguments as they are: write y = y + d instead of y += d or "
        f"y.add_(d), and clone a tensor before assigning into it."
    )


def over_tasks(function: Callable[..., Any], *dims: int | None) -> Callable[..., Any]:
    """`function` mapped over the leading task dimension of the arguments whose entry in `dims` is 0."""

    def mapped(*arguments: Any) -> Any:
        in_dims = tuple(
            None if dim is None else _tree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, argument)
            for dim, argument in zip(dims, arguments, strict=True)
        )
        # "different": tasks draw their own dropout masks, as they would one after another.
        return torch.func.vmap(function, in_dims=in_dims, randomness="different")(*arguments)

    return mapped


class PerStep:
    """One inner batch a step: step k sees `batches[k]`.

    Args:
        batches: indexable and replayable (a list, or any object with `__getitem__` and `__len__`), because estimators that recompute
            visit it again. Not a one-shot iterator.
        ragged: allow batches whose tensor shapes differ. By default they must agree, because a shorter last batch silently changes the
            weight of its examples.

    Raises:
        TypeError: `batches` is an iterator or cannot be indexed.
        ValueError: shapes differ between batches and `ragged` is False.

    Example:
        >>> import torch, bilevel as bl
        >>> len(bl.PerStep(torch.arange(12.0).reshape(6, 2).split(2)))
        3
    """

    def __init__(self, batches: Sequence[Any], *, ragged: bool = False) -> None:
        if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
            raise TypeError(
                f"PerStep was given a {type(batches).__name__}, which can be read only once or has no length; estimators that recompute "
                f"visit batches again. Write PerStep(list(itertools.islice(loader, K)))."
            )
        self._batches = batches
        if not ragged and isinstance(batches, (list, tuple)):
            self._check_shapes(batches)

    @staticmethod
    def _check_shapes(batches: Sequence[Any]) -> None:
        shapes = [[tuple(leaf.shape) for leaf in _tree.tensors(batch)] for batch in batches]
        for step, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"shapes differ between inner steps: batch {step} of PerStep has tensors of shapes {shape}, batch 0 has {shapes[0]}. "
                    f"Drop the short batch (drop_last=True in a DataLoader), or pass PerStep(..., ragged=True) if it is meant."
                )

    def __getitem__(self, step: int) -> Any:
        return self._batches[step]

    def __len__(self) -> int:
        return len(self._batches)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The data of one hypergradient.

    Args:
        inner: one batch that every inner step sees (any object: a DataLoader's list `[x, y]` is one batch), or `PerStep(batches)`.
        outer: the batch of the outer loss.
        curvature: the inner batch at which implicit and corrected estimators take derivatives of g at the solution. None: `inner` itself,
            or the last batch of `PerStep`, which the solution has seen least of.

    Example:
        >>> import bilevel as bl
        >>> bl.Batches(inner=bl.PerStep([1, 2, 3]), outer=4).inner_at(2)
        3
    """

    inner: Any
    outer: Any
    curvature: Any = None

    def inner_at(self, step: int) -> Any:
        """The inner batch of a step."""
        return self.inner[step] if isinstance(self.inner, PerStep) else self.inner

    def at_solution(self, steps: int) -> Any:
        """The inner batch for derivatives at the solution found after `steps` steps."""
        return self.curvature if self.curvature is not None else self.inner_at(max(steps - 1, 0))


def proximal(problem: Problem, strength: float) -> Problem:
    """Add strength/2 |y - init(x)|^2 to the inner loss: the inner problem of iMAML and of 2409.03682.

    It makes an initialization visible to implicit and corrected estimators, for which the start of the inner loop does not matter.

    Args:
        problem: one with `init`.
        strength: positive; at least the largest negative curvature of g, for the inner problem to be strongly convex.

    Raises:
        ValueError: the problem has no `init`, or strength is not positive.

    References:
        Rajeswaran et al. 2019, Meta-Learning with Implicit Gradients, arXiv 1909.04630; Chayti and Jaggi 2024, arXiv 2409.03682.

    Example:
        >>> import torch, bilevel as bl
        >>> maml = bl.Problem(lambda y, x, b: (y - b).pow(2).sum(), lambda y, x, b: (y - b).pow(2).sum(), init=lambda x, b: x)
        >>> bl.proximal(maml, 2.0).inner(torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor(1.)
    """
    if problem.init is None:
        raise ValueError("proximal() was given a problem without init; it pulls y towards init(x). Write Problem(..., init=lambda x, batch: x)")
    if not strength > 0:
        raise ValueError(f"proximal() was given strength={strength}; a positive number was needed")
    if problem.features is not None:
        raise ValueError("proximal() was given a problem with features; init would receive features in place of the batch. Leave one of them out")
    inner_loss, init = problem.inner_loss, problem.init

    def pulled(inner: Tree, outer: Tree, batch: Any) -> Tensor:
        # On one flat vector: leaf by leaf, the many small operators of a conv net's parameters take a tenth of its gradient. And before the loss,
        # so that the copies are gone when its activations come.
        moved, start = (torch.cat([leaf.reshape(-1) for leaf in _tree.tensors(tree)]) for tree in (inner, init(outer, batch)))
        distance = moved - start
        del moved, start
        pull = 0.5 * strength * torch.dot(distance, distance)
        return inner_loss(inner, outer, batch) + pull

    return dataclasses.replace(problem, inner_loss=pulled)
