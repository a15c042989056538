"""A homogeneous bilevel problem through long loops: its logarithm, with the trajectory rescaled at every step.

    v_{i+1} = step(v_i) / s_i,   s_i = |step(v_i)| as a constant,   G = (log f(v_K) + degree sum log s_i) / K

F = f(y_K) of hundreds of steps leaves the range of float32, and log F with it: its gradient is then NaN, or 0 without a
word. Where g is homogeneous of degree 2 in y (a quadratic around 0) the step of SGD is linear in y and its momentum, so
that y_i = v_i prod s_j; where f is homogeneous too, log F needs no more than v_K and the sum. The s_i may be any
constants, so no derivative passes through them.

Reference: Wang, Yuan, Wu and Ge 2021, arXiv 2006.16495, for the logarithm and for step sizes; the rescaling is ours.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree
from bilevel.space.tree import Tree

Scaled = dict[str, Any]
"""`point`, a tree, and `log_scale`, 0-dim or one for each task: they stand for exp(log_scale) point."""


@dataclasses.dataclass(frozen=True)
class Rescaling(bl.inner.Dynamics):
    """Steps of SGD on a scaled point, brought to length one after each.

    Args:
        optimizer: SGD, with momentum or without; its numbers may be functions of outer.

    Raises:
        TypeError: it is another optimizer, whose step is not linear in y.
    """

    optimizer: bl.SGD

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, bl.SGD):
            raise TypeError(
                f"a trajectory is rescaled for steps that are linear in y, those of bilevel.SGD on a quadratic; "
                f"{type(self.optimizer).__name__} was given"
            )

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.optimizer.init(inner["point"])

    def step(self, inner: Tree, state: Any, outer: Tree, at: Any) -> tuple[Tree, Any]:
        point, state = self.optimizer.step(at.gradient(inner)["point"], state, inner["point"], outer)
        length = at.space.norm([leaf.detach() for leaf in tree.tensors(point)])
        scale = torch.where(length > 0, length, 1.0)  # what has arrived stays there

        def shorter(leaf: Any) -> Any:
            return leaf / at.space.per_task(scale, leaf).to(leaf.dtype) if isinstance(leaf, Tensor) else leaf

        log = inner["log_scale"] + scale.log().to(inner["log_scale"].dtype)
        return {"point": tree.tree_map(shorter, point), "log_scale": log}, tree.tree_map(shorter, state)


def logarithmic(
    problem: bl.Problem,
    outer: Tree,
    inner: Tree,
    batches: bl.Batches,
    solver: bl.Descent,
    *,
    degree: float = 2.0,
) -> tuple[bl.Problem, Scaled, bl.Descent]:
    """The problem of log F / K, its start and its solver, to be given to `bilevel.hypergradient` in place of the old.

    Args:
        problem: g homogeneous of degree 2 in y; f homogeneous of `degree` and positive. Both are checked on their
            batches, g on that of each step, at y_0 brought to size one, twice that and half.
        outer: as for `hypergradient`.
        inner: y_0, not 0; no task dimension.
        batches: as for `hypergradient`.
        solver: Descent of SGD with at least one step.
        degree: of f.

    Returns:
        `(problem, inner, solver)`. The outer loss is (log f(y_K)) / K; `restored(hg.inner)` is y_K, where it fits.

    Raises:
        TypeError: the solver is no Descent of SGD.
        ValueError: a loss is not homogeneous or f not positive, or the problem has init or features.

    Example:
        >>> import torch, bilevel as bl
        >>> h = torch.tensor([2.0, 0.5])
        >>> problem = bl.Problem(*2 * [lambda y, x, b: 0.5 * (h * y * y).sum()])
        >>> solver = bl.Descent(bl.SGD(lr=lambda x: x), steps=400)
        >>> arguments = torch.tensor(0.8), torch.ones(2), bl.Batches(None, None)
        >>> bl.hypergradient(problem, *arguments, solver=solver, estimator=bl.Unrolled()).outer_loss  # 1e-178
        tensor(0.)
        >>> log, start, steps = logarithmic(problem, *arguments, solver)
        >>> hg = bl.hypergradient(log, arguments[0], start, arguments[2], solver=steps, estimator=bl.Unrolled())
        >>> round(hg.grad.item(), 3), round(hg.outer_loss.item(), 4)
        (5.0, -1.0211)
    """
    optimizer = solver.dynamics.update if isinstance(solver, bl.Descent) else None
    if not isinstance(optimizer, bl.SGD) or solver.max_steps < 1:
        raise TypeError(
            f"logarithmic() was given {solver!r}; Descent(SGD(...), steps) with at least one step was needed, whose "
            f"steps are linear in y"
        )
    if problem.init is not None or problem.features is not None:
        raise ValueError(
            "logarithmic() was given a problem with init or features; write them into the losses and inner"
        )
    size = _size(inner)
    point = tree.tree_map(lambda leaf: leaf.detach() / size.to(leaf.dtype), inner)
    for step in range(solver.max_steps if isinstance(batches.inner, bl.PerStep) else 1):
        _check_homogeneous("inner_loss", problem.inner_loss, outer, point, batches.inner_at(step), 2.0)
    _check_homogeneous("outer_loss", problem.outer_loss, outer, point, batches.outer, degree, positive=True)
    outer_loss, steps = problem.outer_loss, solver.max_steps

    def scaled(y: Any, x: Any, batch: Any) -> Tensor:
        return (outer_loss(y["point"], x, batch).log() + degree * y["log_scale"]) / steps

    start = {"point": point, "log_scale": size.log().to(tree.tensors(inner)[0].dtype)}
    inner_loss = problem.inner_loss
    made = bl.Problem(lambda y, x, batch: inner_loss(y["point"], x, batch), scaled)
    return made, start, bl.Descent(Rescaling(optimizer), steps)


def restored(inner: Scaled) -> Tree:
    """exp(log_scale) point: y itself, as far as its dtype reaches."""
    half = (inner["log_scale"] / 2).exp()  # in range where the whole is not

    def longer(leaf: Tensor) -> Tensor:
        by = half.reshape(half.shape + (1,) * (leaf.dim() - half.dim()))
        return torch.where(leaf == 0, leaf, leaf * by * by)

    return tree.tree_map(longer, inner["point"])


def _size(inner: Tree) -> Tensor:
    """The largest number of y_0, which is in range where its square is not; ValueError where y_0 has no length."""
    leaves = [leaf.detach().abs().amax().double() for leaf in tree.tensors(inner) if leaf.numel() > 0]
    size = torch.stack(leaves).amax() if leaves else torch.zeros((), dtype=torch.double)
    if not 0 < float(size) < math.inf:
        raise ValueError(
            f"logarithmic() was given a y_0 whose largest number is {float(size):g}; one of finite length was needed: "
            f"a start of 0 shows nothing"
        )
    return size


def _check_homogeneous(
    name: str, loss: Any, outer: Tree, point: Tree, batch: Any, degree: float, *, positive: bool = False
) -> None:
    with torch.no_grad():
        found = [loss(tree.tree_map(lambda leaf, c=c: c * leaf, point), outer, batch).double() for c in (1.0, 2.0, 0.5)]
    tolerance = 100 * torch.finfo(tree.tensors(point)[0].dtype).eps
    for factor, value in zip((2.0, 0.5), found[1:], strict=True):
        expected = factor**degree * found[0]
        if not bool((value - expected).abs() <= tolerance * expected.abs()) or not bool(found[0] != 0):
            raise ValueError(
                f"logarithmic() was given a problem whose {name} is not homogeneous of degree {degree:g} in y: it is "
                f"{float(found[0]):.6g} at v, y_0 brought to size one, and {float(value):.6g} at {factor:g} v, where "
                f"{float(expected):.6g} was needed. Quadratics around 0 are of degree 2; a loss of 0 shows nothing"
            )
    if positive and not bool(found[0] > 0):
        raise ValueError(
            f"logarithmic() was given a problem whose {name} is {float(found[0]):.6g} at y_0 brought to size one; a "
            f"positive one was needed, which has a logarithm"
        )
