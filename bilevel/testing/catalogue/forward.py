"""Forward mode through the steps that were taken."""

import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing.catalogue.entry import EVERYWHERE, Entry, counts
from bilevel.testing.catalogue.quadratic import Quadratic


def _indirect(q: Quadratic) -> Tensor:
    """(dy_K/dx)' (y_K - t)."""
    return q.program() - q.d


def _drawn(label: str, estimator: bl.estimators.ForwardGradient, excess: int) -> Entry:
    """The entry of a variant of ForwardGradient, whose relative variance is (Q + excess) / directions."""
    count = estimator.directions
    return Entry(
        label,
        estimator,
        target="program",
        # One product more a step follows a perturbation of the start.
        calls=lambda steps, products: counts(steps, 1, steps * (count + 1), 0),
        memory="constant",
        sees=EVERYWHERE,
        variance=lambda q: (len(q.x) + excess) / count * _indirect(q).square().sum(),
    )


def _decayed(q: Quadratic, gamma: float) -> Tensor:
    """d + a sum_{k<K} gamma^(K-1-k) C' (y_K - t)."""
    weight = q.rate * sum(gamma**k for k in range(q.steps))
    return q.d + weight * q.C.T @ (q.last - q.t)


def _running(q: Quadratic, gamma: float) -> Tensor:
    """The same with y_{k+1} in the place of y_K."""
    total, y = torch.zeros_like(q.x), q.start
    for _ in range(q.steps):
        y = q.A @ y + q.rate * q.C @ q.x
        total = gamma * total + q.rate * q.C.T @ (y - q.t)
    return q.d + total


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "forward",
        bl.estimators.Forward(),
        few_outer=True,
        target="program",
        calls=lambda steps, outer: counts(steps, 1, steps * (outer + 1), 0),
        memory="constant",
        sees=EVERYWHERE,
    ),
    _drawn("forward gradient", bl.estimators.ForwardGradient(2), -1),
    _drawn("forward gradient, normal", bl.estimators.ForwardGradient(2, normal=True), +1),
    Entry(
        "gamma decay",
        bl.estimators.GammaDecay(0.6),
        target="program",
        calls=lambda steps, products: counts(max(3 * steps - 1, 0), 1, steps, 0),
        memory="constant",
        sees=EVERYWHERE,
        bias="gamma^k for the Jacobian of k steps",
        on_quadratic=lambda q: _decayed(q, 0.6),
    ),
    Entry(
        "gamma decay, running",
        bl.estimators.GammaDecay(0.6, running=True),
        target="program",
        calls=lambda steps, products: counts(2 * steps, steps + 1, steps, 0),
        memory="constant",
        sees=EVERYWHERE,
        bias="gamma^k for the Jacobian of k steps, and df/dy on the way",
        on_quadratic=lambda q: _running(q, 0.6),
    ),
)
