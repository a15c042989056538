"""An inner step as a map of (y, s), and the optimizer's part of it as a function of the gradient.

| | cost | memory |
| --- | --- | --- |
| linearized_step | 1 gradient of g | its graph, kept while the object lives |
| its products | 1 product each | (y, s) |
| through_update | the optimizer's elementwise algebra, twice | 4 P, freed |
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.engine.embedding import Embedding
from bilevel.engine.linearization import Linearization
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.refusals import step_of
from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import Leaves, Tree


class StepMap(NamedTuple):
    """The condition z - T(z, x) = 0 at one z = (y, s)."""

    at: Linearization
    """d(z - T)/dz and its mixed product, on leaves of z: those of y first."""
    z: Leaves
    motion: Tensor
    """|T(y) - y|, per task."""


def linearized_step(oracles: Oracles, inner: Tree, state: Any, steps: int) -> StepMap:
    """The step map at y and s, reached after `steps` steps.

    The tensors of s that are like a tensor of y (momenta, moments) belong to z; others, such as counts, are constants.
    A tensor that the step hands on as it is has no equation of its own; in its place stands z - constant = 0.

    Raises:
        ValueError: the step hands on a tensor of y that the inner loss uses.
    """
    step = max(steps - 1, 0)
    apart = oracles.batches.curvature is not None
    embedding = Embedding(oracles.source, oracles.batches.curvature_at(step)) if apart else oracles.embedding(step)
    ys = tree.tensors(inner)
    shapes, (leaves, structure) = {y.shape for y in ys}, tree.flatten(state)
    picked = [i for i, leaf in enumerate(leaves) if _like(leaf, shapes)]
    z = (*ys, *(leaves[i] for i in picked))
    motion: list[Tensor] = []

    def condition(at_z: Any, x: Tree, batch: Any) -> tuple[Tensor | None, Tree]:
        y, s = tree.like(inner, at_z[: len(ys)]), list(leaves)
        for i, leaf in zip(picked, at_z[len(ys) :], strict=True):
            s[i] = leaf
        at = oracles.differentiable_point(step, batch)
        moved, after = step_of(oracles.dynamics, y, tree.unflatten(s, structure), x, at)
        _check_moved(oracles, y, moved, at)
        rest = tree.flatten(after)[0]
        images = [*tree.tensors(tree.ordered(moved, y)), *(rest[i] for i in picked)]
        values = tuple(_rest(leaf, image) for leaf, image in zip(at_z, images, strict=True))
        motion.append(oracles.space.norm([value.detach() for value in values[: len(ys)]]))
        return at.loss, values

    with_graph = oracles.engine.linearize(condition, z, oracles.attached, embedding.value, embedding.leaves)
    return StepMap(Linearization(with_graph, embedding, z, symmetric=False), z, motion[0])


def _check_moved(oracles: Oracles, inner: Tree, moved: Tree, at: At) -> None:
    """Raise if an optimizer leaves a tensor where it is although it has a gradient: as one that accumulates does."""
    update = oracles.dynamics.update
    if update is None:
        return
    slope = tree.flatten(at.gradient(inner))[0]
    pairs = zip(tree.tensors(inner), tree.tensors(tree.ordered(moved, inner)), slope, strict=True)
    if any(after is before and g is not None for before, after, g in pairs):
        raise ValueError(
            f"the fixed point of a step of {type(update).__name__} was asked for, and the step that would come next "
            f"leaves a tensor of y where it is although the inner loss uses it: it accumulates gradients. Take a "
            f"number of inner steps after which the next one moves y, or use Implicit"
        )


def _like(leaf: Any, shapes: set[torch.Size]) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape in shapes


def _rest(leaf: Tensor, image: Any) -> Tensor:
    return leaf - leaf.detach() if image is leaf or not isinstance(image, Tensor) else leaf - image


def through_update(
    optimizer: Optimizer, gradient: Tree, state: Any, inner: Tree, outer: Tree, weights: Leaves
) -> tuple[Leaves, Tree]:
    """-(dy'/dg)' w for y' = step(g, s, y, x), and y'; of 16-bit numbers in float32."""
    y, s, g = (tree.tree_map(_wide, each) for each in (inner, state, gradient))
    y, s = tree.detach(y), tree.detach(s)
    gs = [None if leaf is None else leaf.detach().requires_grad_() for leaf in tree.flatten(g)[0]]
    with torch.enable_grad():
        stepped, _ = optimizer.step(tree.like(y, gs), s, y, outer)
    moved = tree.ordered(stepped, y)
    given = [leaf for leaf in gs if leaf is not None]
    outputs = tree.tensors(moved)
    found = iter(
        autodiff.grad(outputs, given, [_wide(w).to(out.dtype) for w, out in zip(weights, outputs, strict=True)])
    )
    pulled = [None if leaf is None else next(found) for leaf in gs]
    filled = autodiff.filled(tuple(pulled), tree.tensors(y))
    return tuple(-leaf for leaf in filled), tree.detach(moved)


def _wide(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in NARROW else leaf
