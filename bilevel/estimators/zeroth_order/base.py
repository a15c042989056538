"""What the zeroth-order estimators share: directions in x, and the inner program run at a shifted x."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.engine.replay import State as Generator
from bilevel.estimators.base import Instance
from bilevel.outcome import Solution, Status, code_if, worst
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Run:
    """An inner program at some x: the solution, f there per task, the rounding of that, and the status of both."""

    found: Solution
    outer_loss: Tensor
    eps: float
    code: Tensor

    @property
    def inner(self) -> Tree:
        """y at the end."""
        return self.found.inner


def directions(instance: Instance, count: int) -> list[Tree]:
    """Standard normal trees like x, in no less than float32."""

    def normal(leaf: Tensor) -> Tensor:
        return torch.randn_like(leaf, dtype=torch.float32 if leaf.dtype in NARROW else leaf.dtype)

    return [tree.tree_map(normal, instance.outer) for _ in range(count)]


def shifted(instance: Instance, by: float, direction: Tree) -> Instance:
    """The instance at x + by * direction."""
    x = tree.tree_map(lambda leaf, d: (leaf + by * d).to(leaf.dtype), instance.outer, direction)
    return dataclasses.replace(instance, outer=x)


def run_at(instance: Instance, start: Tree | None = None, *, draws: Generator | None = None) -> Run:
    """Run the inner loop, from `start` where one is given, and evaluate f: no derivative in x.

    With `draws`, the losses draw what they draw from that state of the generators on, as at every other x.
    """
    if draws is not None:
        instance.oracles.generators.set(draws)
    found = instance.solve(start)
    with spans.span(spans.HYPERGRADIENT):
        loss = instance.oracles.outer_loss(found.inner)
        broken = code_if(~torch.isfinite(loss) & tree.finite(found.inner), Status.NONFINITE)
        code = worst(found.code, instance.health(found, found.inner, found.last_loss), broken)
    return Run(found, wide(loss), torch.finfo(loss.dtype).eps, code)


class Digits:
    """What rounding leaves of the moves of x and of the differences that they make: the fewest digits of both."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        nothing = torch.zeros((), device=tree.tensors(instance.outer)[0].device)
        self._move, self._apart, self._terms = nothing + float("inf"), nothing, nothing

    def moved(self, by: float, direction: Tree) -> None:
        """x was moved by `by * direction`, and rounded: the tensor that keeps the fewest digits counts."""
        for x, d in zip(tree.tensors(self._instance.outer), tree.tensors(direction), strict=True):
            if x.numel() > 0:
                move = by * d
                error = ((x.detach() + move).to(x.dtype) - x.detach()).to(move.dtype) - move
                lost = torch.linalg.vector_norm(error) / torch.linalg.vector_norm(move)
                self._move = torch.minimum(self._move, -torch.log10(lost).float())

    def differed(self, apart: Sequence[Tensor], here: Sequence[Tensor], eps: float) -> None:
        """A move changed tensors like `here`, of which rounding takes the share eps, by `apart`."""
        self._terms = eps * _length(here)
        self._apart = torch.maximum(self._apart, _length(apart).to(self._apart))

    def left(self, *, still: bool) -> tuple[Tensor, Tensor]:
        """The digits, 0-dim, and DIGITS_LOST below one; `still` says that what never moved may well rest."""
        # (A difference of nothing, of sides that are something, may be all that rounding has left.)
        counted = (self._terms > 0) & ((self._apart > 0) | (not still))
        digits = torch.where(counted, torch.log10(self._apart / self._terms), float("inf"))
        digits = torch.minimum(self._move, digits.to(self._move)).clamp_min(0.0)
        return digits, code_if(digits < 1, Status.DIGITS_LOST)


def _length(leaves: Sequence[Tensor]) -> Tensor:
    kept = [torch.linalg.vector_norm(wide(leaf.detach())) for leaf in leaves]
    return torch.linalg.vector_norm(torch.stack(kept))


def wide(leaf: Tensor) -> Tensor:
    """A tensor whose differences keep their digits."""
    return leaf.float() if leaf.dtype in NARROW else leaf


def added(total: list[Tensor | None], weight: Tensor, direction: Tree, *, tasks: bool = False) -> None:
    """Add sum over tasks of weight * direction; with `tasks`, each task has a direction of its own."""
    weight = weight.detach()
    for i, leaf in enumerate(tree.tensors(direction)):
        part = torch.tensordot(weight.to(leaf.dtype), leaf, 1) if tasks else weight.sum().to(leaf.dtype) * leaf
        known = total[i]
        total[i] = part if known is None else known + part


def narrowed(total: list[Tensor | None], instance: Instance) -> PartialLeaves:
    """A total in the dtypes of x."""
    xs = tree.tensors(instance.outer)
    return tuple(None if leaf is None else leaf.to(x.dtype) for leaf, x in zip(total, xs, strict=True))


def check_count(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner} was given {name}={value!r}; an integer of at least 1 was needed")


def check_width(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{owner} was given {name}={value!r}; a positive number was needed, in the units of x")
