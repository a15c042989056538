"""The implicit function theorem at one point.

    (H + damping I)' v = df/dy,    dF/dx = df/dx - M v

with H = d c/dy and M v = d/dx <c, v> for the stationarity condition c (dg/dy, and what weight decay adds), both at
(y, x) and on one batch.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.engine.linearization import Linearization
from bilevel.engine.oracles import Oracles
from bilevel.estimators.implicit.base import minus
from bilevel.linear.base import LinearSolver
from bilevel.outcome import LinearSolution, Status, code_if, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """The implicit hypergradient (None where x enters neither the condition nor f), its linear solve, the losses."""

    grad: PartialLeaves
    linear: LinearSolution
    outer_loss: Tensor
    inner_loss: Tensor | None


def adjoint(oracles: Oracles, inner: Tree, steps: int, linear: LinearSolver, start: Leaves | None = None) -> Adjoint:
    """Solve the adjoint system at `inner`, found after `steps` inner steps.

    Costs 1 outer gradient, 1 inner gradient, the solver's products, and 1 mixed product. Where the solver is not sure
    of its residual, the mixed product yields H v as well, and from that the true one.
    """
    outer_loss, b, direct = oracles.outer_gradient(inner)
    return solved(oracles, oracles.linearize(inner, steps), (outer_loss, b, direct), linear, start)


def solved(
    oracles: Oracles,
    at: Linearization,
    outer: tuple[Tensor, Leaves, PartialLeaves],
    linear: LinearSolver,
    start: Leaves | None = None,
) -> Adjoint:
    """Solve A' v = b and take the mixed product, for a condition at one point and for (f, b, df/dx)."""
    outer_loss, b, direct = outer
    found = linear.prepare(at, oracles.space).found(b, start)
    if found.sure:
        unmet = code_if(~linear.met(found.residual, b), Status.MAX_STEPS)
        found = dataclasses.replace(found, code=worst(found.code, unmet))
        return Adjoint(minus(direct, at.mixed_alone(found.value)), found, outer_loss, at.loss)
    image, mixed = at.mixed(found.value)
    relative = linear.true_residual(found.value, image, b, oracles.space, found.damping)
    del image
    # Where the true residual refuses v (v = 0 comes in its place), what was computed from it goes too.
    accepted = linear.accepted(relative, b).all()
    found = linear.judged(found, relative, b, oracles.space)
    sign = torch.where(accepted, -1.0, 0.0).to(b[0].dtype)
    indirect = tuple(None if leaf is None else leaf * sign for leaf in mixed)
    return Adjoint(tree.accumulate(direct, indirect), found, outer_loss, at.loss)


def linear_stats(found: LinearSolution) -> dict[str, Any]:
    """What a linear solve says of itself, for `hg.stats`."""
    chosen = {} if found.damping is None else {"linear_damping": found.damping}
    return {"linear_residual": found.residual, "linear_steps": found.steps, **chosen}
