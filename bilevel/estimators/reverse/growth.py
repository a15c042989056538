"""How much cotangents grow on their way back through the inner loop: what rounding errors grow by, too.

A perturbation of y_k reaches y_K through the product of the steps' Jacobians, a cotangent travels back through its
transpose. Where that product grows, so do rounding errors: of the digits of the dtype, log10 of the growth are lost.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.outcome import Status, code_if, worst
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Tree

_LOOKS = 8
"""Cotangents looked at in a sweep, spread evenly: a norm each."""
_UNSTABLE = 100.0
"""A stable loop forgets, so its cotangents shrink on their way back; a momentum may first let them grow tenfold."""
_FORGOTTEN = 1e-2
"""A solver that stops by itself must forget its start to this."""


class Growth:
    """Norms of cotangents, relative to what has entered so far (the sum of the norms), per task.

    Steps are counted from the first that is followed.

    Args:
        space: how norms are taken.
        steps: how many steps a cotangent travels at most.
    """

    def __init__(self, space: Space, steps: int) -> None:
        self._space, self._every, self._eps = space, interval(steps), 0.0
        self._entered: list[tuple[int, Tensor]] = []
        self._largest: Tensor | None = None
        self._left: Tensor | None = None

    def _norm(self, cotangent: list[Tensor | None] | list[Tensor]) -> Tensor:
        return self._space.norm([leaf for leaf in cotangent if leaf is not None])

    def enter(self, step: int, cotangent: list[Tensor | None]) -> None:
        """A cotangent enters at y of a step; the latest step first."""
        norm = self._norm(cotangent)
        if not self._entered:
            self._eps = torch.finfo(next(leaf.dtype for leaf in cotangent if leaf is not None)).eps
            self._largest = self._left = torch.where(norm > 0, 1.0, 0.0).to(norm.dtype)
        self._entered.append((step, norm + self._entered[-1][1] if self._entered else norm))

    def wanted(self, step: int) -> bool:
        """Whether the cotangent of y at a step is to be looked at."""
        return step % self._every == 0

    def look(self, step: int, cotangent: list[Tensor | None]) -> None:
        """Take the norm of a cotangent further back."""
        if any(leaf is not None for leaf in cotangent):
            self._compare(step, self._norm(cotangent))

    def look_at_all(self, watch: "Watch") -> None:
        """The same for norms that hooks took in one backward."""
        for step, squared in watch.squares.items():
            self._compare(step, squared.sqrt())

    def _compare(self, step: int, norm: Tensor) -> None:
        entered = next((total for at, total in reversed(self._entered) if at >= step), None)
        if entered is None:  # past the last term
            return
        self._left = norm / torch.where(entered > 0, entered, 1.0)
        self._largest = self._left if self._largest is None else torch.maximum(self._largest, self._left)

    def figures(self) -> dict[str, Tensor]:
        """`cotangent_growth`, `cotangent_left` and `digits`, of the worst task."""
        assert self._largest is not None, "no cotangent entered"
        assert self._left is not None
        growth, left = self._largest.max(), self._left.max()
        return {
            "cotangent_growth": growth,
            "cotangent_left": left,
            "digits": -torch.log10(self._eps * growth.clamp_min(1.0)).clamp_max(0.0),
        }

    def code(self, *, forgets: Tensor | int | None) -> Tensor:
        """INNER_UNSTABLE; and STOPPED_EARLY for a solver that stopped by itself, solved where its code is 0.

        Args:
            forgets: the code of a solver that must have forgotten its start; None for others.
        """
        figures = self.figures()
        unstable = code_if(figures["cotangent_growth"] > _UNSTABLE, Status.INNER_UNSTABLE)
        if forgets is None:
            return unstable
        solved = torch.as_tensor(forgets, device=unstable.device) == 0
        return worst(unstable, code_if((figures["cotangent_left"] > _FORGOTTEN) & solved, Status.STOPPED_EARLY))


def interval(steps: int) -> int:
    """Steps between two looks."""
    return max(1, -(-steps // _LOOKS))


class Watch:
    """Takes the norms of the cotangents of some iterates as one backward passes them.

    Args:
        space: how norms are taken.
        every: steps between two looks.
    """

    def __init__(self, space: Space, every: int) -> None:
        self._space, self._every = space, every
        self.squares: dict[int, Tensor] = {}

    def iterate(self, step: int, inner: Tree) -> None:
        """Watch y at a step, if it is one of those to be looked at."""
        if step % self._every:
            return
        for leaf in tree.tensors(inner):
            # At the node, not at the tensor: a hook of a tensor would keep its numbers until the backward.
            if leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(functools.partial(self._add, step, leaf.output_nr))

    def _add(self, step: int, output: int, cotangents: Sequence[Tensor | None]) -> None:
        cotangent = cotangents[output]
        if cotangent is None:
            return
        cotangent = cotangent if cotangent.layout is torch.strided else cotangent.to_dense()
        squared = self._space.norm([cotangent]).square()
        self.squares[step] = self.squares[step] + squared if step in self.squares else squared
