"""Langevin dynamics: descent with noise that makes y a sample instead of a minimizer.

    y_{i+1} = y_i - eps_i dg/dy(y_i) + sqrt(2 eps_i tau) z_i,    z_i ~ N(0, I)

For small eps the iterates are distributed like exp(-g / tau), up to a bias of order eps. With minibatches (PerStep)
this is stochastic gradient Langevin dynamics (SGLD). The noise does not depend on x, comes from torch's generators, and
is the same where a step is rebuilt; with tasks, each has its own.

| | inner gradients | memory |
| --- | --- | --- |
| step | 1 | P for the noise |

Reference: Welling and Teh 2011; as an inner loop: Kim and Hospedales, arXiv 2410.10417.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Langevin(Dynamics):
    """Gradient steps with Gaussian noise.

    It rests nowhere, so that estimators at the solution refuse it. `Unrolled` differentiates f at the last iterate,
    with the noise held fixed; `bilevel.estimators.stochastic` estimates the gradient of the expectation of f.

    Args:
        step_size: eps, positive; or a function of the step's number, from 0, that returns one (a schedule). Stable
            below 2 / L for a curvature of at most L.
        temperature: tau, at least 0; 0 is gradient descent, and draws nothing.

    Raises:
        ValueError: an argument is out of range; (when used) the schedule returns no positive number.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y**2).sum() / 2, lambda y, x, b: (y**2).mean())
        >>> seed = torch.manual_seed(0)
        >>> found = bl.adapt(problem, torch.ones(1), torch.zeros(100_000), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Langevin(step_size=0.1, temperature=0.5), steps=100))
        >>> round(found.outer_loss.item(), 2)  # tau / (1 - eps / 2): 0.5 up to the bias of the step size
        0.53
    """

    step_size: float | Callable[[int], float]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.step_size):
            _check_size(self.step_size, "")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"Langevin was given temperature={self.temperature!r}; a number of at least 0 was needed (0 is "
                f"gradient descent)"
            )

    def rate(self, step: int) -> float:
        """The step size of a step.

        Raises:
            ValueError: a schedule returned something else than a positive number.
        """
        if not callable(self.step_size):
            return self.step_size
        size = self.step_size(step)
        _check_size(size, f" at step {step}")
        return size

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        rate = self.rate(at.step)
        spread = math.sqrt(2 * rate * self.temperature)
        gradient = tree.flatten(at.gradient(inner))[0]
        moved = []
        for y, g in zip(tree.tensors(inner), gradient, strict=True):
            if g is None:  # a tensor that the loss does not use has no distribution
                moved.append(y)
                continue
            y = y - rate * g
            moved.append(y + spread * torch.randn_like(y) if spread else y)
        return tree.like(inner, moved), state


def _check_size(size: Any, where: str) -> None:
    if not _is_number(size) or not 0 < size < math.inf:
        raise ValueError(
            f"Langevin was given step_size={size!r}{where}; a positive number, or a function of the step's number that "
            f"returns one, was needed"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
