"""Inner dynamics that are no gradient step, with an inner loss, a number of steps and what they hold."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from right_or_refused import NONE, D

import bilevel as bl
from bilevel.inner import proximal, root

G = torch.Generator().manual_seed(0)
A = torch.randn(8, 4, generator=G, dtype=D)
GOAL = torch.randn(8, generator=G, dtype=D)
TASKS = torch.randn(3, 8, generator=G, dtype=D)
X = {"s": torch.tensor(0.3, dtype=D), "t": torch.tensor([0.5, -0.4], dtype=D)}
START = {"w": torch.full((4,), 0.2, dtype=D), "c": torch.zeros(2, dtype=D)}


def residuals(y, x, goal):
    return torch.cat([A.to(goal) @ y["w"] - goal * x["s"].exp(), y["c"] - x["t"]])


def quadratic(y, x, goal):
    return bl.inner.half_square(residuals)(y, x, goal)


def smooth(y, x, goal):
    bend = 0.3 * y["w"].pow(4).sum() + 0.1 * (y["c"] * y["w"][:2]).square().sum()
    return quadratic(y, x, goal) + bend


def penalized(y, x, goal):
    return quadratic(y, x, goal) + x["s"].exp() * y["w"].square().sum() / 2 + y["c"].square().sum()


def layer(y, x, goal):
    return {
        "w": torch.tanh(0.3 * A[:4].to(goal) @ y["w"] + x["s"] * goal[:4]),
        "c": 0.5 * torch.cos(y["c"] + x["t"]) + 0.1 * y["w"][:2],
    }


def equation(y, x, goal):
    moved = layer(y, x, goal)
    return {name: (y[name] - moved[name]) + 0.1 * (y[name] - moved[name]) ** 3 for name in y}


def outer_loss(y, x, batch):
    return (y["w"] - 1).square().sum() + (y["c"] * x["t"]).sum().sin() + y["c"].square().sum()


@functools.cache
def posed(loss):
    """One problem for each loss: it remembers how x acts."""
    return bl.Problem(loss, outer_loss)


@dataclasses.dataclass(frozen=True)
class Case:
    """`symmetric`: whether conjugate gradients will do; `third`: whether unrolling takes third derivatives."""

    loss: Callable[..., Any]
    dynamics: bl.inner.Dynamics
    steps: int
    symmetric: bool = True
    third: bool = False

    @property
    def problem(self) -> bl.Problem:
        return posed(self.loss)


def prox(operator: proximal.Prox, *, accelerated: bool = False) -> Case:
    return Case(quadratic, bl.inner.ProximalGradient(operator, 0.05, accelerated), 8, symmetric=False)


def lam(x):
    return 0.5 * x["s"].exp()


CASES = {
    "LBFGS": Case(smooth, bl.inner.LBFGS(memory=3, lr=0.7), 6),
    "LBFGS, learned lr": Case(smooth, bl.inner.LBFGS(memory=2, lr=lambda x: x["s"]), 4),
    "LBFGS with Armijo": Case(smooth, bl.inner.LBFGS(memory=3, search=bl.inner.Armijo()), 6),
    "LBFGS with Wolfe": Case(smooth, bl.inner.LBFGS(memory=3, search=bl.inner.Wolfe()), 6),
    "Newton-CG": Case(smooth, bl.inner.Newton(bl.CG(8, 1e-12)), 2, third=True),
    "Newton-CG, inexact": Case(smooth, bl.inner.Newton(bl.CG(2, 1e-12)), 3, third=True),
    "plain Newton": Case(smooth, bl.inner.Newton(bl.Dense(), search=None), 2, third=True),
    "LeastSquares": Case(quadratic, bl.inner.LeastSquares(residuals), 1),
    "Ridge": Case(penalized, bl.inner.Ridge(residuals, lambda x: {"w": x["s"].exp(), "c": 2.0}), 1),
    "L1": prox(proximal.L1(lam)),
    "accelerated L1": prox(proximal.L1(lam), accelerated=True),
    "GroupLasso": prox(proximal.GroupLasso(lam)),
    "Box": prox(proximal.Box(-0.2, lambda x: x["s"])),
    "Simplex": prox(proximal.Simplex(lambda x: x["s"] + 1)),
    "FixedPoint": Case(quadratic, bl.inner.FixedPoint(layer, root.Plain()), 6, symmetric=False),
    "FixedPoint, Anderson": Case(quadratic, bl.inner.FixedPoint(layer, root.Anderson(3)), 5, symmetric=False),
    "FixedPoint, Broyden": Case(quadratic, bl.inner.FixedPoint(layer, root.Broyden(3)), 7, symmetric=False),
    "Root, Newton": Case(quadratic, bl.inner.Root(equation, root.NewtonRoot(bl.Dense(), rate=0.5)), 2, symmetric=False),
    "Root, Broyden": Case(quadratic, bl.inner.Root(equation, root.Broyden(4, 0.7)), 4, symmetric=False),
}
BATCHES = bl.Batches(GOAL, None)


def slope(value: Callable[[Any], torch.Tensor], x: Any, along: Any, step: float = 1e-5) -> torch.Tensor:
    """The derivative of a function of a tree of tensors along a direction, by central differences."""
    ends = [value({name: x[name] + sign * step * along[name] for name in x}) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


__all__ = ["BATCHES", "CASES", "NONE", "START", "TASKS", "Case", "slope"]
