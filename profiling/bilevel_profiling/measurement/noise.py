"""The same random numbers in another precision: a float64 run that draws what a float32 run drew.

A generator gives other numbers for `torch.randn_like(y)` when y is float64, so a run cast to float64 would be of
another loss. Here each draw is made in the dtype that a first run made it in, and its result is cast.
"""

import pickle
import random
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree

from bilevel_profiling.meters.operators import Operators

Draw = tuple[str, tuple[int, ...], torch.dtype | None]
"""(operator, shape, the floating dtype it was made in)."""


class Draws:
    """Notes each draw of random numbers inside a `with` block.

    Args:
        like: the draws of another run, whose dtypes are used for these; None leaves them as they are.

    Attributes:
        log: the draws, in order.
        elsewhere: whether numbers came from where they cannot be had again: a generator of the user's own, Python's,
            or numpy's.

    Example:
        >>> import torch
        >>> y = torch.zeros(3)
        >>> _ = torch.manual_seed(0)
        >>> with Draws() as run:
        ...     noise = torch.randn_like(y)
        >>> _ = torch.manual_seed(0)
        >>> with Draws(like=run) as again:
        ...     same = torch.randn_like(y.double())
        >>> same.dtype, torch.equal(same, noise.double()), again.same_as(run)
        (torch.float64, True, True)
    """

    def __init__(self, like: "Draws | None" = None) -> None:
        self.log: list[Draw] = []
        self.elsewhere = False
        self._like = None if like is None else like.log
        self._mode = Operators(self._run)

    def __enter__(self) -> Self:
        self._others = _other_generators()
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, traceback)
        self._eager.__exit__(kind, error, traceback)
        self._end = _states()
        self.elsewhere |= self._others != _other_generators()

    def same_as(self, other: "Draws") -> bool:
        """Whether both drew the same: operator by operator, and as much from torch's generators."""
        return self.log == other.log and all(map(torch.equal, self._end, other._end))

    def _run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
            return operator(*args, **kwargs)
        self.elsewhere |= kwargs.get("generator") is not None
        number = len(self.log)
        dtype = self._like[number][2] if self._like is not None and number < len(self._like) else None
        casts: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the copy: it, and what it was made from
        given = (args, kwargs) if dtype is None else _cast((args, kwargs), dtype, casts)
        before = _states()
        output = operator(*given[0], **given[1])
        if all(map(torch.equal, before, _states())):  # such as attention without dropout
            return operator(*args, **kwargs) if casts else output
        leaves = [leaf for leaf in _pytree.tree_leaves((output, given)) if isinstance(leaf, Tensor)]
        found = next((leaf.dtype for leaf in leaves if leaf.is_floating_point()), None)
        self.log.append((str(operator), tuple(leaves[0].shape), found))
        if dtype in (None, torch.float64):
            return output
        if operator._schema.is_mutable:
            for copy, original in casts.values():
                original.copy_(copy)

        def back(leaf: Any) -> Any:
            if id(leaf) in casts:
                return casts[id(leaf)][1]
            return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == dtype and wide else leaf

        wide = bool(casts) or kwargs.get("dtype") is torch.float64
        return _pytree.tree_map(back, output)


def _cast(given: Any, dtype: torch.dtype, casts: dict[int, tuple[Tensor, Tensor]]) -> Any:
    def cast(leaf: Any) -> Any:
        if leaf is torch.float64:
            return dtype
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float64 or dtype == torch.float64:
            return leaf
        copy = leaf.to(dtype)
        casts[id(copy)] = copy, leaf
        return copy

    return _pytree.tree_map(cast, given)


def _states() -> Sequence[Tensor]:
    devices = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if devices else ())]


def _other_generators() -> Any:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else pickle.dumps(numpy.random.get_state())
