"""When to stop: no better value for a while."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree


class EarlyStopping:
    """Says to stop when the last `patience` values were no better than the best one before; lower is better.

    Given to `OuterLoop(stop=)` it sees each step's outer loss before x is moved, which is where that loss was taken,
    and the loop ends by itself. For another value, call `see` in the loop's body with a value of x as it then is, and
    hand the object to the loop as one of `also=` to have it saved; of an accuracy give the negative. Do not give `see`
    the step's outer loss in the body: it belongs to x before the step.

    Args:
        patience: how many values in a row may be no better, at least 1.
        least: what a better value is lower by, at least 0. NaN is never better.
        best_of: the outer variable, of which a copy is kept where the value was best (as many bytes as x); None keeps
            none.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> stop = bl.loop.EarlyStopping(patience=2, best_of=x)
        >>> for value in (3.0, 1.0, 2.0, 1.5, 0.0):
        ...     if stop.see(value): break
        ...     _ = x.data.add_(1)
        >>> value, stop.best, stop.best_index
        (1.5, 1.0, 1)
        >>> stop.restore(); x.data
        tensor(1.)
    """

    def __init__(self, patience: int, *, least: float = 0.0, best_of: Tree | None = None) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(
                f"EarlyStopping() was given patience={patience!r}; a whole number of at least 1 was needed"
            )
        if not 0 <= least < math.inf:
            raise ValueError(f"EarlyStopping() was given least={least!r}; a number of at least 0 was needed")
        self.patience, self.least = patience, float(least)
        self._outer = best_of
        self._kept: list[Tensor] | None = None
        self.best, self.best_index = math.inf, -1
        self._seen = 0

    @property
    def stopped(self) -> bool:
        """Whether the last `patience` values were no better."""
        return self._seen - 1 - max(self.best_index, 0) >= self.patience

    def see(self, value: Tensor | float) -> bool:
        """Take one more value, of x as it is now.

        Args:
            value: a number, or a tensor with one element, which is waited for.

        Returns:
            Whether to stop.
        """
        number = float(value)
        # (The first is better than none, whatever it is, unless it is NaN.)
        if number < self.best - self.least or (self.best_index < 0 and number == math.inf):
            self.best, self.best_index = number, self._seen
            if self._outer is not None:
                self._kept = [leaf.detach().clone() for leaf in tree.tensors(self._outer)]
        self._seen += 1
        return self.stopped

    def restore(self) -> None:
        """Put the best x back into the outer variable, in place.

        Raises:
            RuntimeError: no x was kept.
        """
        if self._kept is None:
            raise RuntimeError(
                "EarlyStopping.restore() was called, and no x was kept; write EarlyStopping(patience, best_of=outer), "
                "and see a number first"
            )
        with torch.no_grad():
            for leaf, kept in zip(tree.tensors(self._outer), self._kept, strict=True):
                leaf.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The best value, where it was, how many were seen, and the x that was kept."""
        kept = None if self._kept is None else [leaf.clone() for leaf in self._kept]
        return {"best": self.best, "best_index": self.best_index, "seen": self._seen, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is that of something else, or of another x.
        """
        if set(state) != {"best", "best_index", "seen", "kept"}:
            raise ValueError(
                f"EarlyStopping was given a state with the entries {sorted(map(str, state))}; what its state_dict() "
                f"returned was needed"
            )
        kept = state["kept"]
        if kept is not None and self._outer is not None:
            shapes, wanted = [leaf.shape for leaf in kept], [leaf.shape for leaf in tree.tensors(self._outer)]
            if shapes != wanted:
                raise ValueError(
                    f"EarlyStopping was given a state whose x has the shapes {[tuple(s) for s in shapes]}, where "
                    f"{[tuple(s) for s in wanted]} were needed; it is that of another problem"
                )
        self.best, self.best_index, self._seen = float(state["best"]), state["best_index"], state["seen"]
        if kept is not None and self._outer is not None:
            self._kept = [leaf.to(x.device) for leaf, x in zip(kept, tree.tensors(self._outer), strict=True)]
        else:
            self._kept = None
