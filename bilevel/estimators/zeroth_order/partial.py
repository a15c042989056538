"""Partial zeroth order: the response of y to x by differences of inner runs, the outer loss by its gradient.

    delta_j = (y_K(x + mu u_j) - y_K(x)) / mu,    dF/dx ~ df/dx + 1/N sum_j <delta_j, df/dy> u_j,    u_j ~ N(0, I)

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| PZOBO(directions=N) | (N + 1) K | 1 | 0 | 3 P + 3 Q, independent of K and N |

Wins: the inner solver is a black box, f is not; a batch of directions costs no memory.
Fails: x is large: the variance of the indirect part is (Q + 1) / N of its square where y_K is linear in x.
Reference: Sow, Ji and Liang 2022, On the Convergence Theory for Hessian-Free Bilevel Algorithms (PZOBO; its code is
called ESJ), arXiv 2110.07004. Differences from peers: its code draws u_j uniform on a sphere for each tensor and
multiplies by P; here, as in benchopt's, they are Gaussian. HOZOG takes differences of f itself: see
EvolutionStrategies. All runs see the same batches and random numbers.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.zeroth_order.base import (
    Digits,
    added,
    check_count,
    check_width,
    directions,
    narrowed,
    run_at,
    shifted,
    wide,
)
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class PZOBO(Estimator):
    """Hessian-free: y's response to x by forward differences of the inner loop.

    Bias: O(mu) of the curvature of y_K in x, and rounding over mu; none where y_K is linear in x.
        stats["digits"] says what rounding leaves, and below one digit the status (DIGITS_LOST).

    Args:
        mu: the length of a step in x, in its units; None for eps^(1/3) of its dtype: 6e-6 in float64, 5e-3 in float32.
        directions: N.

    With tasks, those of one chunk share their directions.

    Memory: independent of K and N: y and its optimizer's state, y_K, df/dy, x, a direction and the sum; linear in T.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> seed = torch.manual_seed(0)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.estimators.PZOBO(mu=1.0, directions=500))
        >>> round(hg.grad.item(), 1)  # 0.2197
        0.2
    """

    mu: float | None = None
    directions: int = 1

    def __post_init__(self) -> None:
        if self.mu is not None:
            check_width("PZOBO", "mu", self.mu)
        check_count("PZOBO", "directions", self.directions)

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(mu) from the K-step program in the mean; random, of variance about Q / N"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        generators = instance.oracles.generators
        drawn = generators.peek()
        here = run_at(instance)
        with spans.span(spans.HYPERGRADIENT):
            loss, gradient, direct = instance.oracles.outer_gradient(here.inner)
        after = generators.peek()
        total: list[Tensor | None] = [None] * len(tree.tensors(instance.outer))
        codes, digits = [here.code], Digits(instance)
        mu = default_mu(instance) if self.mu is None else self.mu
        for _ in range(self.directions):
            generators.set(after)
            (direction,) = directions(instance, 1)
            after = generators.peek()
            digits.moved(mu, direction)
            there = run_at(shifted(instance, mu, direction), draws=drawn)
            moved = [
                wide(a) - wide(b) for a, b in zip(tree.tensors(there.inner), tree.tensors(here.inner), strict=True)
            ]
            response = instance.oracles.space.dot(moved, [wide(leaf) for leaf in gradient])
            added(total, response / (mu * self.directions), direction)
            codes.append(there.code)
            ys = tree.tensors(here.inner)
            digits.differed(moved, ys, max(torch.finfo(leaf.dtype).eps for leaf in ys))
        generators.set(after)
        grad = tree.accumulate(direct, narrowed(total, instance))
        left, rounded = digits.left(still=True)
        return instance.finish(here.found, grad, loss, codes=[*codes, rounded], stats={"digits": left})


def default_mu(instance: Instance) -> float:
    """The cube root of the rounding of x's coarsest dtype."""
    return float(max(torch.finfo(leaf.dtype).eps for leaf in tree.tensors(instance.outer)) ** (1 / 3))
