"""One bilevel problem under inspection: its functions, called on copies, and the same in another dtype."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree
from bilevel.space.tree import Tree

SEED = 0
_LOOKED_AT = 20
"""Batches of a PerStep."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of `check_problem`, and how the checks evaluate them: always on copies, always under one seed."""

    problem: bl.Problem
    outer: Tree
    inner: Tree | None
    batches: bl.Batches
    solver: bl.InnerSolver

    @property
    def random(self) -> bool:
        """Whether an evaluation of a loss moves torch's generator."""
        before = torch.get_rng_state()
        self.losses(*(tree.attach(value) for value in self.variables()))
        return not torch.equal(before, torch.get_rng_state())

    def steps(self) -> range:
        """The steps whose batches are looked at."""
        if not isinstance(self.batches.inner, bl.PerStep):
            return range(1)
        return range(max(1, min(self.solver.max_steps, _LOOKED_AT)))

    def variables(self) -> tuple[Tree, Tree]:
        """Copies of (y_0, x), without a graph."""
        outer = copied(self.outer)
        if self.problem.init is None:
            return copied(self.inner), outer
        with torch.no_grad():
            return copied(self.problem.init(outer, copied(self.batches.inner_at(0)))), outer

    def inner_loss(self, inner: Tree, outer: Tree, step: int = 0) -> Tensor:
        """G at a step's batch."""
        return self.problem.inner_loss(inner, outer, self.embedded(outer, copied(self.batches.inner_at(step))))

    def outer_loss(self, inner: Tree, outer: Tree) -> Tensor:
        """The outer loss."""
        return self.problem.outer_loss(inner, outer, self.embedded(outer, copied(self.batches.outer)))

    def losses(self, inner: Tree, outer: Tree) -> list[Tensor]:
        """Both, at the first batch."""
        return [self.inner_loss(inner, outer), self.outer_loss(inner, outer)]

    def embedded(self, outer: Tree, batch: Any) -> Any:
        """What the losses receive."""
        return batch if self.problem.features is None else self.problem.features(outer, batch)

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype, as far as its arguments go; what the functions hold stays as it is."""
        batches = dataclasses.replace(
            self.batches,
            inner=_Cast(self.batches.inner, dtype)
            if isinstance(self.batches.inner, bl.PerStep)
            else cast(self.batches.inner, dtype),
            outer=cast(self.batches.outer, dtype),
            curvature=None,
        )
        return dataclasses.replace(
            self,
            outer=cast(self.outer, dtype),
            inner=None if self.inner is None else cast(self.inner, dtype),
            batches=batches,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the variables."""
        return tree.tensors(self.outer)[0].dtype


class _Cast(bl.PerStep):
    """The batches of each step in another dtype, made when asked for."""

    def __init__(self, steps: bl.PerStep, dtype: torch.dtype) -> None:
        self._steps, self._dtype = steps, dtype

    def __getitem__(self, step: int) -> Any:
        return cast(self._steps[step], self._dtype)

    def __len__(self) -> int:
        return len(self._steps)


def copied(value: Tree) -> Tree:
    """Copies of the tensors of a tree, without a graph."""
    return tree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def cast(value: Tree, dtype: torch.dtype) -> Tree:
    """The floating tensors of a tree in another dtype."""

    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().to(dtype) if floating else leaf

    return tree.tree_map(convert, value)
