"""What the oracles refuse: a loss without y, a step that changes shapes, a dynamics that does not say its rest."""

from typing import Any

from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.gradient import GradientDynamics
from bilevel.optim.adam import Adam, AdamW
from bilevel.optim.sgd import SGD
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


def used(gradient: PartialLeaves) -> PartialLeaves:
    """A gradient of the inner loss, which must have a path to some tensor of y."""
    if all(leaf is None for leaf in gradient):
        raise ValueError(
            "inner_loss does not depend on the inner variable: its gradient has no path there. Compute it from the "
            "`inner` argument, without .detach(), .item() or torch.no_grad()"
        )
    return gradient


_OURS = (SGD, Adam, AdamW)
"""Optimizers whose steps are known to be pure."""


def step_of(dynamics: Dynamics, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
    """One step of a dynamics, which must leave what it is given as it is, and answer with a pair.

    Raises:
        TypeError: it did not.
        ValueError: it changed a tensor in place.
    """
    if type(dynamics) is GradientDynamics and type(dynamics.optimizer) in _OURS:
        return dynamics.step(inner, state, outer, at)
    name = type(dynamics.update or dynamics).__name__
    impure = (
        f"{name}.step() changed the inner variable or its state in place. Steps are pure: write y = y - d instead of "
        f"y.sub_(d), state = {{'t': state['t'] + 1}} instead of state['t'] += 1 on a tensor, and return the new tensors"
    )
    leaves = [leaf for leaf in (*tree.flatten(inner)[0], *tree.flatten(state)[0]) if isinstance(leaf, Tensor)]
    versions = [leaf._version for leaf in leaves]
    try:
        found = dynamics.step(inner, state, outer, at)
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        raise ValueError(impure) from error
    if versions != [leaf._version for leaf in leaves]:
        raise ValueError(impure)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        given = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
        raise TypeError(
            f"{name}.step() returned {given}; a pair, the new inner variable and the new state, was needed: end it in "
            f"`return moved, state`"
        )
    return found[0], found[1]


def check_step(dynamics: Dynamics, inner: Tree, moved: Tree) -> Tree:
    """`moved` in the order of `inner`.

    Raises:
        ValueError: the step changed the structure, a shape or a dtype.
    """
    if type(dynamics) is GradientDynamics and type(dynamics.optimizer) is SGD and dynamics.optimizer.plain_rate:
        return moved  # y - c g, of the shapes of y
    moved = tree.ordered(moved, inner)
    for before, after in zip(tree.tensors(inner), tree.tensors(moved), strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"an inner step changed a tensor of shape {tuple(before.shape)} and dtype {before.dtype} into "
                f"{tuple(after.shape)} and {after.dtype}. A hyper-parameter of "
                f"{type(dynamics.update or dynamics).__name__} has a shape that broadcasts against y; give a 0-dim "
                f"tensor or a tree like inner"
            )
    return moved


def restless(dynamics: Dynamics, who: str) -> str:
    """Why a dynamics without a stationarity condition is refused."""
    name = type(dynamics.update or dynamics).__name__
    return (
        f"{who} needs to know where the inner loop comes to rest, and {name} does not say. Its stationarity() returns "
        f"None: with decoupled weight decay (AdamW) that point depends on the moments, not on the losses alone; the "
        f"optimizers of a Scheduled must agree on it (one weight decay); a clipped gradient balances a weight decay "
        f"elsewhere than the gradient does. Use Unrolled(), or an optimizer that says: SGD and Adam with weight_decay, "
        f"or AdamW(weight_decay=0) with the decay written into inner_loss; an optimizer of your own defines "
        f"stationarity(grad, inner, outer)"
    )


THIRD = (
    "a step by second derivatives of the inner loss is to be differentiated, which takes third ones, and a compiled "
    "gradient has no more than two. Take engine=bilevel.Eager(), or Implicit with a linear solver, which "
    "differentiates the solution"
)
