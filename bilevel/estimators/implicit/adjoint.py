"""The implicit function theorem at one point.

    (H + damping I) v = df/dy,    dF/dx = df/dx - M v

with H = d2g/dy2 and M v = d/dx <dg/dy, v>, both at (y, x) and on one batch.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.engine import oracles
from bilevel.linear.base import LinearSolver
from bilevel.outcome import LinearSolution
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """The implicit hypergradient (None where x enters neither f nor g), the solve behind it, and the losses at the
    point.
    """

    grad: PartialLeaves
    linear: LinearSolution
    outer_loss: Tensor
    inner_loss: Tensor


def adjoint(
    problem: Problem,
    inner: Tree,
    outer: Tree,
    batches: Batches,
    steps: int,
    linear: LinearSolver,
    start: Leaves | None = None,
) -> Adjoint:
    """Solve the adjoint system at `inner`, found after `steps` inner steps.

    Costs 1 outer gradient, 1 inner gradient, the solver's products, and 1 mixed product, which yields H v as well: the
    true residual is free.
    """
    outer_loss, b, direct = oracles.outer_gradient(problem, inner, outer, batches.outer)
    at = oracles.Linearization(problem, inner, outer, batches.at_solution(steps))
    space = Space(problem.tasks)
    found = linear.prepare(at.hvp, space).iterate(b, start)
    image, mixed = at.mixed(found.value)
    # Where the true residual refuses v (put v = 0 in its place), what was computed from it goes too.
    used = linear.accepted(linear.true_residual(found.value, image, b, space), b).all()
    found = linear.checked(found, image, b, space)
    mixed = tuple(None if leaf is None else torch.where(used, leaf, torch.zeros_like(leaf)) for leaf in mixed)
    grad = tree.accumulate(direct, tuple(None if leaf is None else -leaf for leaf in mixed))
    return Adjoint(grad, found, outer_loss, at.loss)
