"""Forward gradients: the exact derivative along a few random directions of x, unbiased, and flat in K.

    v_1, ..., v_b random in R^Q, E v v' = I;    dF/dx ~ df/dx + 1/b sum_j <df/dy(y_K), z_K(v_j)> v_j

z(v) is the tangent along v, as in bilevel.estimators.forward.forward. With u = (dy_K/dx)' df/dy and Q the outer numbers
that act through the inner loop: E|error|^2 = (Q - 1) / b |u|^2 for Rademacher numbers, (Q + 1) / b |u|^2 for normal
ones.

| | inner gradients | HVPs | mixed | memory, S = P + optimizer state |
| --- | --- | --- | --- | --- |
| ForwardGradient(b) | K | K (b + 1), each with its mixed product | - | (b + 1) S + b Q + one tape |

Wins: K is huge and Q too large for `Forward`, and the noise is averaged over many outer steps; as a second phase after
a cheap biased estimator.
Fails: large Q with few directions, where the relative error of one call is about sqrt(Q / b).
Reference: Shen et al. 2024 (FG2U, arXiv 2406.14095), and Baydin et al. 2022, arXiv 2202.08587 (forward gradients);
the formulas were recalled and derived again, the variance is measured by a test.
Differences from peers: f's direct part df/dx is exact (FG2U projects it, too); numbers of x that act in f alone take no
part, and leave the others less noise; no forward-mode operators are asked for; the directions are drawn beside the
numbers of the losses, which draw what they draw under every other estimator.
"""

import dataclasses

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.engine import spans
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.forward.base import Direction, acting, pushforward
from bilevel.estimators.state import State
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves


@dataclasses.dataclass(frozen=True)
class ForwardGradient(Estimator):
    """An unbiased estimate from random directions of x.

    Args:
        directions: b, drawn anew at each call.
        normal: whether their numbers are normal; False for Rademacher numbers, +1 or -1, which have less variance.
        chunk: directions at once: the inner loop is run b / chunk times. None for all at once.
        generator: where directions are drawn from, on the CPU. None for the global one: a seed is drawn from it at the
            end of each call, and the losses' own random numbers stay what they are.

    Stats: as of `Forward`.

    Bias: none in the mean over the directions; for its variance see bilevel.estimators.forward.forward_gradient.

    Memory: (chunk + 1) S + b Q + one tape: constant in K, linear in chunk and T.

    Raises:
        TypeError, ValueError: an argument is not what is needed; (when used) products forward and backward disagree.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: y.sum())
        >>> hg = bl.hypergradient(problem, torch.zeros(2), torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=1),
        ...     estimator=bl.estimators.ForwardGradient(2000, generator=torch.Generator().manual_seed(0)))
        >>> (hg.grad - 0.5).abs().max() < 0.05  # exact: (0.5, 0.5)
        tensor(True)
    """

    directions: int = 1
    normal: bool = False
    chunk: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("directions", "chunk"):
            value = getattr(self, name)
            if (value is not None or name == "directions") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"ForwardGradient was given {name}={value!r}; an integer of at least 1 was needed")
        if not isinstance(self.normal, bool):
            raise ValueError(f"ForwardGradient was given normal={self.normal!r}; True or False was needed")
        if self.generator is not None and (
            not isinstance(self.generator, torch.Generator) or self.generator.device.type != "cpu"
        ):
            raise TypeError(
                f"ForwardGradient was given generator={self.generator!r}; a torch.Generator on the CPU was needed, "
                f"such as torch.Generator().manual_seed(0)"
            )

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return ""

    def estimate(self, instance: Instance, state: State | None) -> Estimate:
        generators = instance.oracles.generators
        before = generators.peek()
        drawn = self.generator or torch.Generator().manual_seed(_seed())
        acts, xs = acting(instance), tree.tensors(instance.outer)
        made = [_Given(self._drawn(xs, acts, drawn)) for _ in range(self.directions)] if any(acts) else []
        generators.set(before)
        found = pushforward(instance, list[Direction](made), chunk=self.chunk)
        with spans.span(spans.HYPERGRADIENT):
            total: PartialLeaves = (None,) * len(xs)
            for direction, number in zip(made, found.numbers, strict=True):
                if number is not None:
                    scaled = [None if v is None else v * (number / self.directions).to(v) for v in direction()]
                    total = tree.accumulate(total, tuple(scaled))
            grad = tree.accumulate(found.direct, total)
            estimate = instance.finish(found.found, grad, found.loss, codes=[found.code], stats=found.stats)
        if self.generator is None:
            _seed()  # the next call's directions are others
        return estimate

    def _drawn(self, xs: list[Tensor], acts: list[bool], generator: torch.Generator) -> list[Tensor | None]:
        def number(x: Tensor) -> Tensor:
            if self.normal:
                return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            return (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)

        return [number(x) if each else None for x, each in zip(xs, acts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Given:
    """A direction that is kept."""

    leaves: list[Tensor | None]

    def __call__(self) -> list[Tensor | None]:
        return self.leaves


def _seed() -> int:
    """A number of the global generator; real also where tensors are without data."""
    with _disable_current_modes():
        return int(torch.randint(0, 2**62, ()))
