"""What the estimators of this folder share: the mixed product without a second derivative, and the inner step size.

    M v ~ [dg/dx(y + e v) - dg/dx(y - e v)] / (2 e),    e = radius / |v|

| | inner gradients | memory |
| --- | --- | --- |
| central_difference | 2 | P + 2 Q + one graph, freed; v |

Both sides draw the same random numbers and see the same batch. By default y is moved by eps^(1/3) (|y| + |y - y_0|), 1
in the place of zero: that balances the error of the quotient, of order radius^2, and rounding, of order eps / radius,
where the losses change over distances such as those. It is 6e-6 of them in float64, 5e-3 in float32, 0.1 in float16 and
0.2 in bfloat16, whose quotient is good to a few percent. The sum over tasks is weighted, because each has its own e.
"""

from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.oracles import Oracles
from bilevel.estimators.base import Estimator, Instance
from bilevel.optim.base import off, spread, value_of
from bilevel.optim.sgd import SGD
from bilevel.outcome import Status, code_if
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import Leaves, PartialLeaves, Tree


def central_difference(
    oracles: Oracles, inner: Tree, steps: int, v: Leaves, radius: float | None
) -> tuple[PartialLeaves, Tensor, Tensor]:
    """M v by two gradients at a solution found after `steps` steps, and the digits that their difference has.

    Args:
        oracles: of the instance.
        inner: y.
        steps: which say on which batch; where there are batches for curvature, on those.
        v: like y, of any length; may be wider than y.
        radius: how far y is moved; None for the default.

    Returns:
        M v, None where x does not enter g; how many digits of it rounding leaves, 0-dim (inf where v is zero);
        DIGITS_LOST where that is less than one.
    """
    space, ys = oracles.space, tuple(tree.tensors(inner))
    size = space.norm(v)
    length = _radius(oracles, ys) if radius is None else torch.full_like(size, radius)
    weights = size / (2 * length)
    most = weights.max()
    share = weights / torch.where(most > 0, most, 1.0)
    # (No unit vector is made, which would be one more like y.)
    factor = length / torch.where(size > _LEAST * torch.finfo(size.dtype).tiny, size, float("inf"))
    before = oracles.generators.peek()
    ahead = _in_outer(oracles, tree.like(inner, _moved(oracles, ys, factor, v)), steps, share)
    oracles.generators.set(before)
    behind = _in_outer(oracles, tree.like(inner, _moved(oracles, ys, -factor, v)), steps, share)
    apart = tuple(None if a is None or b is None else a - b for a, b in zip(ahead, behind, strict=True))
    found = tuple(None if a is None else (_wide(a) * most.to(_wide(a).dtype)).to(a.dtype) for a in apart)
    digits = _digits(ahead, behind, apart, most > 0)
    return found, digits, code_if(digits < 1, Status.DIGITS_LOST)


def _in_outer(oracles: Oracles, inner: Tree, steps: int, weights: Tensor) -> PartialLeaves:
    """d sum(weights g)/dx at a fixed y."""
    step = max(steps - 1, 0)
    with spans.span(spans.INNER_GRADIENT):
        if oracles.batches.curvature is None:
            batch = oracles.differentiable_embedding(step)
        else:
            batch = oracles.evaluation.embed(oracles.attached, oracles.batches.curvature_at(step))
        value = oracles.inner(tree.detach(inner), oracles.attached, batch)
        return autodiff.grad([value], tree.tensors(oracles.attached), [weights.to(value.dtype)])


def _moved(oracles: Oracles, ys: Leaves, factor: Tensor, v: Leaves) -> Leaves:
    """y + factor v, rounded once."""
    wide = oracles.space.axpy(factor, tuple(_wide(leaf) for leaf in v), tuple(_wide(leaf) for leaf in ys))
    return tuple(leaf.to(y.dtype) for leaf, y in zip(wide, ys, strict=True))


_LEAST = 1e4
"""A vector shorter than so many of the smallest normal numbers is none."""


def _radius(oracles: Oracles, ys: Leaves) -> Tensor:
    """Of the size of y and of the way that it came, per task."""
    space, eps = oracles.space, torch.finfo(_precision(ys[0])).eps
    size = space.norm(ys) + space.norm([a - b for a, b in zip(ys, tree.tensors(oracles.start()), strict=True)])
    return eps ** (1 / 3) * torch.where(size > 0, size, 1.0)


def _precision(leaf: Tensor) -> torch.dtype:
    """The dtype that losses are computed in: that of an open autocast, or the variables' own."""
    kind = leaf.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if reduced else leaf.dtype


def _wide(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in NARROW else leaf


def _digits(ahead: PartialLeaves, behind: PartialLeaves, apart: PartialLeaves, moved: Tensor) -> Tensor:
    """Digits that are left of a difference: of eps times its terms, against itself."""
    kept = [
        (torch.linalg.vector_norm(_wide(a)) + torch.linalg.vector_norm(_wide(b)), torch.linalg.vector_norm(_wide(d)), a)
        for a, b, d in zip(ahead, behind, apart, strict=True)
        if a is not None and b is not None and d is not None
    ]
    if not kept:
        return torch.tensor(float("inf"))
    terms, difference = (torch.stack([each[i].double() for each in kept]).sum() for i in (0, 1))
    rounding = torch.finfo(_precision(kept[0][2])).eps * terms
    # (A difference of nothing, of sides that are something, may be all that rounding has left.)
    return torch.where(moved & (terms > 0), torch.log10(difference / rounding).clamp_min(0.0), float("inf"))


def step_sizes(estimator: Estimator, instance: Instance, name: str) -> list[Any]:
    """The step size of an inner SGD, one per tensor of y.

    Raises:
        ValueError: the inner loop is not plain gradient descent, so that none of its numbers is one.
    """
    update, inner = instance.solver.dynamics.update, instance.oracles.start()
    if update is not None and update.plain_rate is not None:
        return spread(update.plain_rate, inner, "lr")
    if type(update) is SGD and off(update.momentum):
        return spread(value_of(update.lr, instance.oracles.x), inner, "lr")
    raise ValueError(
        f"{type(estimator).__name__}({name}=None) takes the step size of the inner gradient descent, and the inner "
        f"loop is one of {type(update or instance.solver.dynamics).__name__}, which has no such number (a momentum, "
        f"moments or a schedule change it). Write {type(estimator).__name__}({name}=0.1) with a number of your own"
    )


def times(rates: list[Any], leaves: PartialLeaves) -> PartialLeaves:
    """Each leaf times its rate."""
    return tuple(
        None if leaf is None else (rate * leaf).to(leaf.dtype) for rate, leaf in zip(rates, leaves, strict=True)
    )


def minus(direct: PartialLeaves, indirect: PartialLeaves) -> PartialLeaves:
    """The difference, where None is zero."""
    return tuple(a if b is None else -b if a is None else a - b for a, b in zip(direct, indirect, strict=True))


def check_scale(owner: str, name: str, value: object, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is None or a positive finite number (or, where `zero`, 0)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (number and 0 <= value < float("inf") and (zero or value != 0)):  # type: ignore[operator]
        return
    raise ValueError(
        f"{owner} was given {name}={value!r}; None or a {'number of at least 0' if zero else 'positive number'} was "
        f"needed"
    )
