"""Estimators that perturb or penalize the inner loss, with first derivatives alone."""

from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing.catalogue.entry import AT_SOLUTION, GRADIENTS, Entry, Slope, counts
from bilevel.testing.catalogue.quadratic import Quadratic

_SLOPE = (40.0, 80.0, 160.0)


def _penalized(q: Quadratic, curvature: Tensor, weight: float) -> Tensor:
    """The implicit hypergradient at the y that minimizes f + weight (y - y*)' curvature (y - y*) / 2."""
    eye = torch.eye(len(q.H), dtype=q.H.dtype)
    return q.implicit(torch.linalg.solve(eye + weight * curvature, q.t + weight * curvature @ q.solution))


def _envelope(q: Quadratic, gamma: float) -> Tensor:
    """The curvature of g less that of its Moreau envelope: gamma H^2 / (1 + gamma H)."""
    return q.mapped(lambda h: gamma * h**2 / (1 + gamma * h))


def _barrier(q: Quadratic, eta: float) -> Tensor:
    """The first direction of BOME."""
    q_y, q_x = q.H @ (q.start - q.solution), -q.C.T @ (q.start - q.last)
    square = q_y @ q_y + q_x @ q_x
    return q.d + (eta - ((q.start - q.t) @ q_y + q.d @ q_x) / square).clamp_min(0) * q_x


def _square(y: Any) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(y)]).sum()


def _far(y: Any, x: Any, batch: Any) -> Tensor:
    """A ball that no solution comes near."""
    return _square(y) - 1e8


def _onto_far(y: Any, x: Any, batch: Any) -> Any:
    scale = (1e8 / _square(y).clamp_min(1.0)).clamp_max(1.0).sqrt()
    return torch.utils._pytree.tree_map(lambda leaf: scale * leaf, y)


ENTRIES = (
    Entry(
        "corrected",
        bl.FirstOrderCorrected(),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu^2",
        slope=Slope("nu", 2, bl.FirstOrderCorrected, (0.1, 0.05, 0.025)),
    ),
    Entry(
        "corrected forward",
        bl.FirstOrderCorrected(scheme="forward"),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu",
        slope=Slope("nu", 1, lambda nu: bl.FirstOrderCorrected(nu, scheme="forward"), (0.1, 0.05, 0.025)),
    ),
    Entry(
        "corrected, 4 points",
        bl.FirstOrderCorrected(scheme=4),
        target="solution",
        calls=lambda steps, products: counts(4 * steps + 4, 4 * steps + 4, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 4 * steps,
        bias="nu^4",
        slope=Slope("nu", 4, lambda nu: bl.FirstOrderCorrected(nu, scheme=4), (0.06, 0.03, 0.015)),
    ),
    Entry(
        "corrected, warm",
        bl.FirstOrderCorrected(warm_sides=True),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu^2",
    ),
    Entry(
        "f2sa",
        bl.estimators.F2SA(10.0),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, steps + 1, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="1 / multiplier",
        on_quadratic=lambda q: _penalized(q, q.H, 10.0),
        slope=Slope("multiplier", -1, bl.estimators.F2SA, _SLOPE),
        solves=lambda steps: 2 * steps,
    ),
    Entry(
        "bome",
        bl.estimators.BOME(5.0, rate=0.12),
        target="solution",
        calls=lambda steps, products: counts(steps + 2, 1, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="1 / eta",
        # Of one call: where y rests stands in tests/bilevel/test_penalty.py.
        on_quadratic=lambda q: _barrier(q, 5.0),
    ),
    Entry(
        "pbgd",
        bl.estimators.PBGD(10.0, rate=0.74),
        target="solution",
        calls=lambda steps, products: counts(steps + 2, 1, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="1 / gamma",
        on_quadratic=lambda q: _penalized(q, q.H, 10.0),
        slope=Slope("gamma", -1, lambda gamma: bl.estimators.PBGD(gamma, rate=0.74), _SLOPE[1:]),
        settles=43,
    ),
    Entry(
        "pbgd, gradient norm",
        bl.estimators.GradientNormPBGD(10.0, rate=0.22),
        target="solution",
        # A gradient for its value, one for its graph, and one sweep for both products, at each move.
        calls=lambda steps, products: counts(2 * max(steps, 1), max(steps, 1), 0, max(steps, 1)),
        memory="constant",
        sees=AT_SOLUTION,
        bias="1 / gamma",
        on_quadratic=lambda q: _penalized(q, 2 * q.H @ q.H, 10.0),
        slope=Slope("gamma", -1, lambda gamma: bl.estimators.GradientNormPBGD(gamma, rate=0.13), _SLOPE[1:]),
        settles=20,
        solves=lambda steps: 0,  # all steps are its own
    ),
    Entry(
        "meha",
        bl.estimators.MEHA(10.0, gamma=10.0, rate=0.79),
        target="solution",
        calls=lambda steps, products: counts(steps + 2, 1, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="1 / c",
        on_quadratic=lambda q: _penalized(q, _envelope(q, 10.0), 10.0),
        slope=Slope("c", -1, lambda c: bl.estimators.MEHA(c, gamma=10.0, rate=0.79), _SLOPE[1:]),
        settles=46,
    ),
    Entry(
        "lv-hba",
        bl.estimators.LVHBA(_far, _onto_far, 10.0, gamma=10.0, rate=0.79),
        target="solution",
        calls=lambda steps, products: counts(steps + 2, 1, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="1 / c",
        on_quadratic=lambda q: _penalized(q, _envelope(q, 10.0), 10.0),
        settles=46,
        solves=lambda steps: steps,  # it refuses a solver that stops by itself
    ),
)
