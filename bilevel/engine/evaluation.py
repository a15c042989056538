"""The functions of a problem as the oracles call them: mapped over tasks, checked, one value per task.

Only the user's functions are vmapped; derivatives are taken of the sum over tasks, which stay independent because the
loss of each touches its own slice of y. Losses are returned per task, because a sum would hide one that diverges.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.engine.lookup import Lookups
from bilevel.engine.replay import Generators
from bilevel.engine.split import NEEDS_GRAPH, Withheld, split_over
from bilevel.problem import Problem, Pulled, distance
from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.tree import Tree

_OF_VMAP = ("vmap", "Batching rule", "functorch", "storage", "transform", "register a hook")
"""What errors name where torch.func.vmap is the cause."""


class Evaluation:
    """The two losses, the start and the features of one problem.

    Args:
        problem: what is evaluated.
        tasks: number of tasks, when inner variable and batches have a leading task dimension.
        ranks: the processes of which each holds a part of y; None for one that holds all.
    """

    def __init__(self, problem: Problem, tasks: int | None, ranks: Ranks | None = None) -> None:
        self.problem, self.tasks, self.ranks = problem, tasks, ranks

    def inner(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """The inner loss at the result of `embed`, without a proximal term: 0-dim, or of shape (tasks,)."""
        return self._loss("inner_loss", inner, outer, embedded)

    def outer(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """The outer loss at the result of `embed`, likewise."""
        return self._loss("outer_loss", inner, outer, embedded)

    def embed(self, outer: Tree, batch: Any) -> Any:
        """What the losses receive in place of the batch: `features(outer, batch)`, or the batch itself."""
        if self.problem.features is None:
            return batch
        return self._run("features", self.problem.features, (None, 0), (outer, batch))

    def start(self, outer: Tree, batch: Any) -> Tree:
        """The inner start, for all tasks at once where there are tasks.

        Raises:
            TypeError: `Problem.init` returned something else than tensors like outer.
        """
        assert self.problem.init is not None
        start = self._run("init", self.problem.init, (None, 0), (outer, batch))
        like = tree.tensors(outer)[0]
        for leaf in tree.flatten(start)[0] or [None]:
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
                    f"({like.dtype} "
                    f"on {like.device}) was needed"
                )
        return start

    def mapped(self, function: Callable[..., Any], trees: tuple[Tree, ...], outer: Tree, batch: Any) -> Any:
        """function(*trees, outer, batch), for each task: a function of the dynamics' own."""
        name = getattr(function, "__name__", type(function).__name__)
        batch = (
            batch
            if split_over(self.problem) is None
            else Withheld(f"{name}, a function of the solver's or the estimator's own,")
        )
        if self.tasks is None:
            return function(*trees, outer, batch)
        return _over_tasks(name, function, (*[0] * len(trees), None, 0))(*trees, outer, batch)

    def without_graph(self, function: Callable[[Tree, Any], Tree], outer: Tree, batch: Any) -> Tree:
        """`embed` or `start` without a graph, also where they take a gradient inside."""
        with torch.no_grad():
            return tree.detach(function(tree.detach(outer), batch))

    def _loss(self, name: str, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        function = getattr(self.problem, name)
        function = function.inner_loss if isinstance(function, Pulled) else function
        watched = [*tree.tensors(inner), *tree.tensors(outer), *tree.tensors(batch)]
        versions = [leaf._version for leaf in watched]
        try:
            loss = self._run(name, function, (0, None, 0), (inner, outer, batch))
        except RuntimeError as error:
            if "in-place operation" in str(error) or "being modified inplace" in str(error):
                raise ValueError(self._in_place(name, _mutated(function, inner, outer, batch))) from error
            raise
        now = [leaf._version for leaf in watched]
        if now != versions:
            changed = next(i for i, before in enumerate(versions) if before != now[i])
            count = len(tree.tensors(inner))
            role = "inner variable" if changed < count else "outer variable"
            role = role if changed < count + len(tree.tensors(outer)) else "batch"
            raise ValueError(self._in_place(name, role))
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
        return loss

    def _in_place(self, name: str, role: str) -> str:
        once = role == "batch" and self.problem.features is not None
        return _in_place_message(name, role) + (
            " The batch is what `features` returned once for all steps: of a Learner, the output of the layers that do "
            "not adapt. Write inplace=False in the layer that follows them, or Learner(reuse_features=False)."
            if once
            else ""
        )

    def _run(self, name: str, function: Callable[..., Any], dims: tuple[int | None, ...], arguments: Any) -> Any:
        """Call a function of the user's; where it takes gradients inside, of attached arguments."""
        if self.tasks is not None:
            function = self._with_lookups(name, _over_tasks(name, function, dims))
        key = (name, torch.is_grad_enabled(), *(_has_graph(argument) for argument in arguments[:2]))
        known = self.problem.memo.get(key)
        if known == "needs a graph":
            return self._attached(function, dims, arguments)
        before = None if known == "plain" else Generators(tree.tensors(arguments[0])[0].device)
        state = None if before is None else before.peek()
        try:
            result = function(*arguments)
        except RuntimeError as error:
            if NEEDS_GRAPH not in str(error):
                raise
            if before is not None and state is not None:
                before.set(state)
            try:
                result = self._attached(function, dims, arguments)
            except RuntimeError:
                raise error from None
            self.problem.memo[key] = "needs a graph"
            return result
        self.problem.memo[key] = "plain"
        return result

    def _with_lookups(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the embeddings in it as they are without vmap.

        The mode costs time: it is left out again where the first call met none.
        """
        if self.problem.memo.get(("lookups", name)) is False:
            return function

        def corrected(*arguments: Any) -> Any:
            with Lookups() as lookups:
                result = function(*arguments)
            self.problem.memo[("lookups", name)] = lookups.met
            return result

        return corrected

    def _attached(self, function: Callable[..., Any], dims: tuple[int | None, ...], arguments: Any) -> Any:
        variables = len(dims) - 1
        with torch.enable_grad():
            return function(*(_reattach(argument) for argument in arguments[:variables]), *arguments[variables:])


@dataclasses.dataclass(frozen=True, eq=False)
class Pure:
    """A loss as a function of (inner, outer, embedded batch) that depends on nothing else of a call.

    Args:
        evaluation: how it is evaluated.
        name: "inner_loss" or "outer_loss".

    A pulled inner loss takes (embedded batch, start) in the place of the embedded batch.
    """

    evaluation: Evaluation
    name: str

    @property
    def function(self) -> Callable[..., Any]:
        """The user's function."""
        function = getattr(self.evaluation.problem, self.name)
        return function.inner_loss if isinstance(function, Pulled) else function

    @property
    def memo(self) -> dict[Any, Any]:
        """What is remembered with the problem."""
        return self.evaluation.problem.memo

    def key(self) -> tuple[Any, ...]:
        """What tells it from other losses of the same problem."""
        return self.name, self.evaluation.tasks

    def __call__(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """The loss: 0-dim, or of shape (tasks,)."""
        function = getattr(self.evaluation.problem, self.name)
        evaluate = self.evaluation.inner if self.name == "inner_loss" else self.evaluation.outer
        if not isinstance(function, Pulled):
            return evaluate(inner, outer, embedded)
        embedded, start = embedded
        # Before the loss, so that its copies are gone when the loss's activations come.
        pull = distance(function.strength, inner, start, self.evaluation.tasks)
        return evaluate(inner, outer, embedded) + pull


def _has_graph(value: Tree) -> bool:
    return any(leaf.requires_grad for leaf in tree.tensors(value))


def _reattach(value: Tree) -> Tree:
    """Leaves without a graph become graph leaves; the others stay what they are."""

    def attach(leaf: Any) -> Any:
        plain = isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.requires_grad
        return leaf.detach().requires_grad_() if plain else leaf

    return tree.tree_map(attach, value)


def _over_tasks(name: str, function: Callable[..., Any], dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """`function` mapped over the leading task dimension of the arguments whose entry in `dims` is 0."""

    def mapped(*arguments: Any) -> Any:
        in_dims = tuple(
            None if dim is None else tree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, argument)
            for dim, argument in zip(dims, arguments, strict=True)
        )
        try:
            # "different": tasks draw their own dropout masks, as they would one after another.
            return torch.func.vmap(function, in_dims=in_dims, randomness="different")(*arguments)
        except (RuntimeError, ValueError) as error:
            if not any(word in str(error) for word in _OF_VMAP):
                raise
            raise ValueError(
                f"torch.func.vmap cannot map {name} over tasks: {str(error).splitlines()[0]} "
                f"Write TaskMean(estimator, chunk=1), which takes one task after another without vmap."
            ) from error

    return mapped


def _mutated(function: Callable[..., Any], inner: Tree, outer: Tree, batch: Any) -> str:
    """Which argument a loss changes in place, found on copies after autograd refused the change."""
    roles = {"inner variable": inner, "outer variable": outer, "batch": batch}
    copies = [
        tree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
        for value in roles.values()
    ]
    with torch.no_grad():
        function(*copies)
    changed = (
        role for role, copy in zip(roles, copies, strict=True) if any(leaf._version for leaf in tree.tensors(copy))
    )
    return next(changed, "inner variable")


def _in_place_message(name: str, role: str) -> str:
    return (
        f"{name} changed the {role} in place. It must leave its arguments as they are: write y = y + d instead of y += "
        f"d or y.add_(d), and clone a tensor before assigning into it."
    )
