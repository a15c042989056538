"""Update rules that are learned while they run, in the convex setting: dual averaging on their parameters, with hints.

    x_t = phi(xbar_{t-1}, w_t)
    xbar_t = (1 - alpha_t / alpha_{1:t}) xbar_{t-1} + (alpha_t / alpha_{1:t}) x_t
    g_t = D_w phi(xbar_{t-1}, w_t)' grad f(xbar_t)
    w_{t+1} = argmin over w in W of sum_{s<=t} alpha_s <g_s, w> + alpha_{t+1} <hint_{t+1}, w> + |w - w_1|^2 / (2 beta_t)

alpha_{1:t} is the sum of the weights. Without a hint this is meta-learning as plain online-to-batch conversion; with
the last gradient as a guess of the next one, hint_{t+1} = D_w phi(xbar_t, w_t)' grad f(xbar_t), it is its optimistic
form: for phi(x, w) = w on an L-smooth convex f the error falls like 1/T (alpha = 1, beta = 1/L) and like 1/T^2 (hint,
alpha = t, beta_t = (t - 1) / (2 t L)). The hint enters w_{t+1} and is gone when the true gradient is in.

| | gradients of f | evaluations of phi | products with D_w phi | memory, P of x, Q of w |
| --- | --- | --- | --- | --- |
| a step | 1 | 1 | 1 | 3 P + 2 Q + one graph of f and one of phi |
| with last_gradient | 1 | 2 | 2 | one Q more |
| adaptive | - | - | - | one Q more |

Reference: Flennerhag et al. 2023, Optimistic Meta-Gradients, arXiv 2301.03236. The text was not at hand: the structure
is as remembered, the rates were derived again and measured (docs/papers/optimistic.md). The step-by-step form that
practice uses, x_t = x_{t-1} + phi(x_{t-1}, w_t) without averages, is `iterate` with K = 1 and `OptimisticSGD`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.outcome import BilevelError, Status
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree

Schedule = float | Callable[[int], float]
"""A number, or a function of the step t = 1, 2, ..."""


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What a hint may look at after step t.

    Attributes:
        average: xbar_t, a tree like x.
        gradient: grad f(xbar_t), a tree like x.
        w: w_t, the parameters that the step was made with.
        batch: of the step.
        rule: phi.
    """

    average: Tree
    gradient: Tree
    w: Tree
    batch: Any
    rule: Callable[[Tree, Tree, Any], Tree]

    def pull(self, vector: Tree) -> Tree:
        """D_w phi(xbar_t, w_t)' vector: what a guess of the next grad f, a tree like x, says about w.

        Raises:
            ValueError: the vector is not like x.
        """
        fitting = _fitting("seen.pull was given", vector, self.average, "x")
        return tree.like(self.w, _Applied(self.rule, self.average, self.w, self.batch).pull(fitting))


Hint = Callable[[Seen], Tree]


def last_gradient(seen: Seen) -> Tree:
    """The default hint: the next gradient will be the last one, seen from where the average is now."""
    return seen.pull(seen.gradient)


@dataclasses.dataclass(frozen=True, eq=False)
class RuleStep:
    """One step, after w was moved.

    Attributes:
        index: t - 1, from 0.
        x: x_t, what the rule answered.
        average: xbar_t, the answer so far.
        loss: f(xbar_t), 0-dim.
        w: w_{t+1}.
    """

    index: int
    x: Tree
    average: Tree
    loss: Tensor
    w: Tree


def learned_updates(
    loss: Callable[[Tree, Any], Tensor],
    rule: Callable[[Tree, Tree, Any], Tree],
    start: Tree,
    w: Tree,
    loader: Iterable[Any],
    *,
    rate: Schedule,
    weights: Schedule = 1.0,
    hint: Hint | None = last_gradient,
    project: Callable[[Tree], Tree] | None = None,
    adaptive: bool = False,
    eps: float = 1e-8,
) -> Iterator[RuleStep]:
    """Minimize f by an update rule whose parameters are learned on the way: one step for each item of `loader`.

    Args:
        loss: f, called as `loss(x, batch)`; returns a 0-dim floating tensor.
        rule: phi, called as `rule(average, w, batch)`; returns a tree like x, differentiable in w.
        start: xbar_0, a pytree of floating tensors.
        w: w_1, a pytree of floating tensors: where the rule begins, and what the regularizer pulls to (0 in the paper).
        loader: yields batches; `itertools.repeat(None, T)` for T steps on one f.
        rate: beta_t >= 0, a number or a function of t = 1, 2, ...; 1 / L for plain, (t - 1) / (2 t L) for optimistic
            learning with weights t.
        weights: alpha_t > 0 likewise: 1, or `float` for alpha_t = t.
        hint: the guess of g_{t+1}, made after step t, a tree like w; None for none.
        project: the Euclidean projection onto W, a function of a tree like w. The step after it is the exact minimizer
            over W; with `adaptive`, whose norm is another one, it is that for a box only.
        adaptive: a rate for each number of w, beta_t / sqrt(sum_s (alpha_s g_s)^2 + eps) (AdaGrad).
        eps: of the adaptive rates, positive.

    Yields:
        A `RuleStep` after each step.

    Raises:
        TypeError: x or w holds something else than floating tensors.
        ValueError: a rate or weight is out of range; the rule's answer, the hint or the projection has not the shapes
            that it needs.
        BilevelError: the loss or w is no longer finite; earlier steps stand.

    Example:
        Heavy ball, as the rule that answers its parameters:

        >>> import itertools, torch, bilevel as bl
        >>> x = torch.tensor([4.0])
        >>> for step in bl.meta.learned_updates(lambda x, b: x.square().sum(), lambda x, w, b: w, x, x,
        ...                                     itertools.repeat(None, 200), rate=0.25, weights=float): pass
        >>> step.index, round(step.average.item(), 6)
        (199, 0.0)
    """
    for name, value in (("start", start), ("w", w)):
        leaves = tree.flatten(value)[0]
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            raise TypeError(
                f"learned_updates was given {name} with the leaves {[type(leaf).__name__ for leaf in leaves]}; a pytree"
                f" of floating tensors was needed, such as {name}=torch.zeros(3)"
            )
    for name, function, optional in (
        ("loss", loss, False),
        ("rule", rule, False),
        ("hint", hint, True),
        ("project", project, True),
    ):
        if not callable(function) and not (optional and function is None):
            needed = "a function or None" if optional else "a function"
            raise TypeError(f"learned_updates was given {name}={function!r}; {needed} was needed")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"learned_updates was given eps={eps!r}; a positive number was needed")
    for name, schedule, low in (("rate", rate, 0.0), ("weights", weights, math.nextafter(0.0, 1.0))):
        if not callable(schedule):
            _at(name, schedule, 1, low)
    meta = _DualAveraging(_copied(w), rate, project, adaptive, eps)
    return _steps(loss, rule, _copied(start), meta, loader, weights, hint)


def _steps(
    loss: Callable[[Tree, Any], Tensor],
    rule: Callable[[Tree, Tree, Any], Tree],
    average: Tree,
    meta: "_DualAveraging",
    loader: Iterable[Any],
    weights: Schedule,
    hint: Hint | None,
) -> Iterator[RuleStep]:
    total, smallest = 0.0, math.nextafter(0.0, 1.0)
    for index, batch in enumerate(loader):
        t = index + 1
        alpha = _at("weights", weights, t, smallest)
        total += alpha
        applied = _Applied(rule, average, meta.w, batch)
        share = alpha / total
        average = tree.tree_map(lambda old, new, r=share: (1 - r) * old + r * new, average, applied.answer)
        value, gradient = _gradient(loss, average, batch)
        guess = None
        if hint is not None:
            seen = Seen(average, tree.like(average, gradient), meta.w, batch, rule)
            guess = tuple(leaf.detach() for leaf in _fitting("hint returned", hint(seen), meta.w))
        ahead = 0.0 if guess is None else _at("weights", weights, t + 1, smallest)
        meta.move(t, alpha, applied.pull(gradient), guess, ahead)
        if not bool(tree.finite([value, *tree.tensors(meta.w)])):
            raise BilevelError(
                f"step {index}: {Status.NONFINITE.name}: the loss or the parameters of the rule are not finite. Lower "
                f"rate (with weights t and a hint, 1 / (2 L) is the largest that is safe for an L-smooth loss), or "
                f"look at the loss first (log or square root of 0)",
                Status.NONFINITE,
            )
        yield RuleStep(index, _copied(applied.answer), _copied(average), value, _copied(meta.w))


class _DualAveraging:
    """Follow the regularized leader: w from the sum of all gradients, so that a hint is gone after its step."""

    def __init__(
        self, w: Tree, rate: Schedule, project: Callable[[Tree], Tree] | None, adaptive: bool, eps: float
    ) -> None:
        self.w, self._first, self._rate, self._project = w, tree.tensors(w), rate, project
        self._total = [torch.zeros_like(leaf) for leaf in self._first]
        self._squares = [torch.zeros_like(leaf) for leaf in self._first] if adaptive else None
        self._eps = eps

    def move(self, t: int, alpha: float, gradient: Leaves, hint: Leaves | None, next_alpha: float) -> None:
        """From w_t to w_{t+1}."""
        beta = _at("rate", self._rate, t, 0.0)
        self._total = [total + alpha * g for total, g in zip(self._total, gradient, strict=True)]
        leaning = self._total
        if hint is not None:
            leaning = [total + next_alpha * h for total, h in zip(self._total, hint, strict=True)]
        if self._squares is not None:
            self._squares = [s + (alpha * g).square() for s, g in zip(self._squares, gradient, strict=True)]
            leaning = [g / (s + self._eps).sqrt() for g, s in zip(leaning, self._squares, strict=True)]
        w = tree.like(self.w, [first - beta * g for first, g in zip(self._first, leaning, strict=True)])
        self.w = (
            w if self._project is None else _copied(tree.like(w, _fitting("project returned", self._project(w), w)))
        )


class _Applied:
    """phi at one point, with its graph in w."""

    def __init__(self, rule: Callable[[Tree, Tree, Any], Tree], average: Tree, w: Tree, batch: Any) -> None:
        attached, versions = tree.attach(w), [leaf._version for leaf in tree.tensors(average)]
        with torch.enable_grad():
            self._outputs = _fitting("rule returned", rule(average, attached, batch), average, "x")
        if versions != [leaf._version for leaf in tree.tensors(average)]:
            raise ValueError("rule changed the average in place; write average + d instead of average.add_(d)")
        self._ws = tree.tensors(attached)
        self.answer = tree.like(average, [leaf.detach() for leaf in self._outputs])

    def pull(self, vector: Iterable[Tensor]) -> Leaves:
        """D_w phi' vector; zeros where phi does not use a tensor of w."""
        found = autodiff.grad(list(self._outputs), self._ws, list(vector), retain_graph=True)
        return tuple(leaf.detach() for leaf in autodiff.filled(found, self._ws))


def _gradient(loss: Callable[[Tree, Any], Tensor], x: Tree, batch: Any) -> tuple[Tensor, Leaves]:
    """f and grad f at x, without a graph."""
    attached = tree.attach(x)
    with torch.enable_grad():
        value = loss(attached, batch)
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {given}; a floating 0-dim tensor was needed. Reduce it with .mean() or .sum()")
    xs = tree.tensors(attached)
    return value.detach(), autodiff.filled(autodiff.grad([value], xs), xs)


def _fitting(said: str, value: Tree, like: Tree, of: str = "w") -> Leaves:
    """The tensors of what a user's function returned, in the order, shapes and dtypes of `like`."""
    wanted, found = tree.tensors(like), tree.aligned(value, like)
    if (
        found is None
        or len(found) != len(wanted)
        or any(a.shape != b.shape for a, b in zip(found, wanted, strict=True))
    ):
        write = "; write seen.pull(v) for a guess v of the next gradient of the loss" if said.startswith("hint") else ""
        raise ValueError(f"{said} {_shapes(value)}; a tree like {of}, {_shapes(like)}, was needed{write}")
    return tuple(a.to(b) for a, b in zip(found, wanted, strict=True))


def _copied(value: Tree) -> Tree:
    """The same numbers in memory of their own: what is yielded may be changed in place."""
    return tree.tree_map(lambda leaf: leaf.detach().clone(), value)


def _shapes(value: Tree) -> str:
    leaves = tree.flatten(value)[0]
    named = zip(tree.names(value), leaves, strict=True)
    return f"a {type(value).__name__} of " + (
        ", ".join(f"{place}: {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for place, x in named)
        or "nothing"
    )


def _at(name: str, schedule: Schedule, t: int, low: float) -> float:
    """The value of a schedule at t >= 1, checked."""
    value = schedule(t) if callable(schedule) else schedule
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < math.inf:
        needed = "a number of at least 0" if low == 0 else "a positive number"
        where = f", whose value at t = {t} is {value!r}" if callable(schedule) else ""
        raise ValueError(f"learned_updates was given {name}={schedule!r}{where}; {needed} was needed")
    return float(value)
