"""Losses and features whose batch is split over ranks: each rank calls them on its rows, and all have the mean.

    L(y, x) = sum_r n_r L_r(vary(y), vary(x)) / sum_r n_r          n_r the examples of rank r

This is the one seam: every derivative that anybody takes of L is the mean's, with the same bits on every rank. With the
loss go, in one all-reduce, the number of examples, whether a rank failed, and whether it drew random numbers.

What else is handed the batch (a start, a dynamics' own function) would see the rows of one rank: it gets `Withheld`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.engine.collectives import tied, total
from bilevel.engine.replay import Generators
from bilevel.problem import Loss, Problem, Pulled
from bilevel.space import bits, tree
from bilevel.space.ranks import Ranks, without_data
from bilevel.space.tree import Tree

NEEDS_GRAPH = "does not require grad"
"""What torch says when a function takes a gradient inside, of an argument that was passed without a graph."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of losses, by what ranks say of them."""
_LOOSE = 1e3
"""Roundings by which the mean of two halves may differ from the whole."""
_LOOSEST = 0.05


class Embedded(NamedTuple):
    """What features make of a rank's rows.

    Attributes:
        value: as the losses receive it.
        examples: how many rows, int64.
        tie: a number that depends on x for autograd.
    """

    value: Any
    examples: Tensor
    tie: Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """A function of a rank's rows.

    Args:
        function: the user's.
        name: "inner_loss", "outer_loss" or "features".
        ranks: the processes.
        count: how many examples are in a rank's batch; None for the leading dimension of its tensors.
        check: whether the function is held against its values on two halves.
        known: what the first calls showed.
    """

    function: Callable[..., Any]
    name: str
    ranks: Ranks
    count: Callable[[Any], int] | None
    check: bool
    known: dict[str, bool] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def called(self, like: Tensor, call: Callable[[], Any]) -> tuple[Any, bool, Exception | None]:
        """What a rank's call returned, whether it drew random numbers, and what it raised.

        A call that draws does so from a stream of the rank's own, which begins at the state of the common one. That
        one is where it was: `settled` moves it.
        """
        try:
            if without_data(like) or self.ranks.size == 1:
                return call(), False, None
            generators = Generators(like.device)
            before = generators.peek()
            try:
                if self.known.get("random"):
                    self._own_stream(generators)
                value = call()
                if not self.known.get("random") and not generators.same(before, generators.peek()):
                    self.known["random"] = True
                    generators.set(before)
                    self._own_stream(generators)
                    value = call()
            finally:
                generators.set(before)
            return value, self.known.get("random", False), None
        except Exception as error:  # (told to the others, and raised by `settled`)
            return None, False, error

    def _own_stream(self, generators: Generators) -> None:
        with _disable_current_modes():
            seed = sum(int(bits.of(number)) for number in generators.peek().numbers)
            generators.seed((seed + 0x9E3779B97F4A7C15 * (self.ranks.rank + 1)) % (1 << 63))

    def settled(self, like: Tensor, failed: float, drew: float, error: Exception | None) -> None:
        """After the all-reduce: raise on every rank if one failed; move the common stream if one drew."""
        if error is not None and (without_data(like) or self.ranks.size == 1):
            raise error
        if failed > 0:
            self.ranks.agree(error, self.name)
        if drew > 0:
            with _disable_current_modes():
                Generators(like.device).advance()

    def examples(self, batch: Any) -> int:
        found = examples(batch, self.name) if self.count is None else self.count(batch)
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise TypeError(
                f"data_parallel() was given a count that returned {found!r}; a number of examples was needed"
            )
        return found


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """A loss as the mean over ranks."""

    rows: Rows

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The mean over all examples, on every rank.

        Raises:
            RankError: another rank's loss failed.
        """
        (y, tie_y), (x, tie_x) = tied(self.rows.ranks, inner), tied(self.rows.ranks, outer)
        like, ties = tree.tensors(inner)[0], [tie for tie in (tie_y, tie_x) if tie is not None]
        embedded = isinstance(batch, Embedded)
        ties += [batch.tie] if embedded else []
        found, drew, error = self.rows.called(like, lambda: self._own(y, x, batch))
        loss, here = (None, 0) if found is None else found
        # (Not every rank knows the dtype of the loss: one without rows does not call it.)
        dtype, wide = (
            (like if loss is None else loss).dtype,
            torch.float32 if like.device.type == "mps" else torch.float64,
        )
        if loss is None:
            loss = like.reshape(-1)[:1].sum().detach() * 0
        # (A finite number times 0, whatever y and x are.)
        tie = 0 * functools.reduce(torch.mul, [torch.tanh(each.to(wide)) for each in ties])
        weighed = (here * loss.to(wide) if here else torch.zeros_like(loss, dtype=wide)) + tie
        said = [here, error is not None, drew, here > 0, (here > 0) * _DTYPES.index(dtype)]
        summed, numbers = total(self.rows.ranks, weighed, torch.tensor(said, dtype=wide, device=like.device))
        if without_data(like):
            self.rows.settled(like, 0, 0, error)
            return (summed / max(here, 1)).to(dtype)
        count, failed, draws, full, kinds = _physical(numbers.detach()).tolist()
        self.rows.settled(like, failed, draws, error)
        if not count:
            raise ValueError(
                f"{self.rows.name} was given a batch without an example on any rank; at least one was needed"
            )
        return (summed / count).to(_DTYPES[round(kinds / full)])

    def _own(self, y: Tree, x: Tree, batch: Any) -> tuple[Tensor | None, int]:
        """The loss of this rank's rows, and how many they are; None where there are none."""
        embedded = isinstance(batch, Embedded)
        rows = batch.value if embedded else batch
        here = int(_number(batch.examples)) if embedded else self.rows.examples(batch)
        if not here:
            return None, 0
        given = tree.tensors([y, x, rows])
        versions = [leaf._version for leaf in given]
        loss = self.rows.function(y, x, rows)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{self.rows.name} returned {'None' if loss is None else type(loss).__name__}; a 0-dim tensor was "
                f"needed. Does it end in a return of the loss, without .item()?"
            )
        if loss.dim() or not loss.is_floating_point():
            raise ValueError(
                f"{self.rows.name} returned a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}; a floating "
                f"0-dim tensor was needed. Reduce it with .mean()"
            )
        halves = (
            None if self.rows.known.get("mean") or not self.rows.check or without_data(loss) else _halved(rows, here)
        )
        # (One that changed its arguments in place is refused by who called.)
        kept = versions == [leaf._version for leaf in given]
        if halves is not None and kept and not self.rows.known.get("random"):
            before = Generators(loss.device)
            state = before.peek()
            with torch.no_grad():
                parts = _without_a_graph(self.rows.function, y, x, [half for half, _ in halves])
            if before.same(state, before.peek()):
                self.rows.known["mean"] = self._is_mean(loss, parts, [size / here for _, size in halves])
        return loss, here

    def _is_mean(self, loss: Tensor, parts: list[Tensor], shares: list[float]) -> bool:
        with torch.no_grad():
            whole, *own = (_physical(each).detach().double() for each in (loss, *parts))
            mean = torch.stack([share * part for share, part in zip(shares, own, strict=True)]).sum(0)
            size = torch.stack([whole.abs(), *(part.abs() for part in own)]).amax(0)
            if not bool(whole.isfinite().all()):
                return False
            off = (mean - whole).abs() > min(_LOOSE * torch.finfo(loss.dtype).eps, _LOOSEST) * size
        if bool(off.any()):
            raise ValueError(
                f"{self.rows.name} is no mean over the examples of its batch: on this rank's rows it is "
                f"{float(whole.reshape(-1)[0]):.6g}, and the mean of its values on two halves of them is "
                f"{float(mean.reshape(-1)[0]):.6g}. Data in parallel needs a mean: write .mean() for .sum(); look up "
                f"what belongs to an example by an index in the batch, not by its place; take GroupNorm for BatchNorm. "
                f"(If it is one, and this is rounding: data_parallel(..., check=False).)"
            )
        return True


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Features of a rank's rows, whose cotangents in x are summed over ranks."""

    rows: Rows

    def __call__(self, outer: Tree, batch: Any) -> Embedded:
        """The embedding of this rank's rows.

        Raises:
            RankError: another rank's features failed.
        """
        x, tie = tied(self.rows.ranks, outer)
        like = tree.tensors(outer)[0]
        found, drew, error = self.rows.called(like, lambda: self._own(x, batch))
        assert tie is not None, "outer holds floating tensors"
        flags = torch.tensor([float(error is not None), float(drew)], device=like.device)
        failed, draws = (0.0, 0.0) if without_data(like) else self.rows.ranks.sum([flags])[0].tolist()
        self.rows.settled(like, failed, draws, error)
        value, here = found
        return Embedded(value, torch.full((), here, dtype=torch.int64, device=like.device), tie)

    def _own(self, x: Tree, batch: Any) -> tuple[Any, int]:
        here = self.rows.examples(batch)
        if not here:
            # (Of the rows that there are not: no loss looks at it.)
            return tree.tensors(x)[0].detach().reshape(-1)[:0], 0
        value = self.rows.function(x, batch)
        halves = None if self.rows.known.get("rows") or not self.rows.check else _halved(batch, here)
        leaves = tree.tensors(value)
        if halves is not None and not any(without_data(leaf) for leaf in leaves) and not self.rows.known.get("random"):
            part, size = halves[0]
            for whole, half in zip(leaves, tree.tensors(self.rows.function(x, part)), strict=True):
                self._check_row(whole, half, here, size)
            self.rows.known["rows"] = True
        return value, here

    def _check_row(self, whole: Tensor, half: Tensor, here: int, size: int) -> None:
        if not whole.is_floating_point() or not whole.dim() or len(whole) != here or len(half) != size:
            return
        with torch.no_grad():
            one, other = _physical(whole[:size]).double(), _physical(half).double()
            bound = min(_LOOSE * torch.finfo(whole.dtype).eps, _LOOSEST) * (1e-30 + one.abs().max())
        if one.shape == other.shape and float((one - other).abs().max()) > float(bound):
            raise ValueError(
                "features mix the examples of a batch: the rows of one half are not what they are in the whole. Data "
                "in parallel needs each row by itself: take GroupNorm for BatchNorm. (If this is rounding: "
                "data_parallel(..., check=False).)"
            )


@dataclasses.dataclass(frozen=True)
class SplitStart:
    """A start that is the same on every rank: one that does without the batch."""

    init: Callable[[Tree, Any], Tree]

    def __call__(self, outer: Tree, batch: Any) -> Tree:
        """init(outer, nothing to look at)."""
        return self.init(outer, Withheld("Problem.init"))


class Withheld:
    """In the place of a batch of which a rank has a part, for functions that a mean over ranks does not make whole."""

    def __init__(self, who: str) -> None:
        vars(self)["who"] = who

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{vars(self)['who']} looks at the batch, of which a rank has its own rows alone; only the two losses and "
            f"Problem.features are averaged over ranks. Put what it needs into outer, or take solvers and estimators "
            f"that look at data through the losses: Descent, Converge, Newton; Unrolled, Implicit(bilevel.CG(10))"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = [each for each in tree.flatten((args, kwargs or {}))[0] if isinstance(each, Withheld)]
        found[0]._refuse()


def split_over(problem: Problem) -> Ranks | None:
    """The ranks that a problem's data are split over; None where they are not."""
    if not isinstance(problem, Problem):
        return None  # (which is refused where arguments are checked)
    inner = problem.inner_loss.inner_loss if isinstance(problem.inner_loss, Pulled) else problem.inner_loss
    split = [each for each in (inner, problem.outer_loss) if isinstance(each, SplitLoss)]
    return split[0].rows.ranks if split else None


def over(problem: Problem, ranks: Ranks, count: Callable[[Any], int] | None, *, check: bool) -> Problem:
    """A problem whose losses are means over ranks."""

    def made(loss: Loss, name: str) -> Loss:
        return SplitLoss(Rows(loss, name, ranks, count, check))

    loss, init = problem.inner_loss, None if problem.init is None else SplitStart(problem.init)
    inner: Loss
    if isinstance(loss, Pulled):
        assert init is not None, "a pull is to a start"
        inner = Pulled(made(loss.inner_loss, "inner_loss"), init, loss.strength)
    else:
        inner = made(loss, "inner_loss")
    features = problem.features
    return dataclasses.replace(
        problem,
        inner_loss=inner,
        outer_loss=made(problem.outer_loss, "outer_loss"),
        init=init,
        features=None if features is None else SplitFeatures(Rows(features, "features", ranks, count, check)),
    )


def examples(batch: Any, who: str) -> int:
    """The leading dimension of a batch's tensors, those without dimensions left out.

    Raises:
        ValueError: there is none, or they differ.
    """
    sizes = sorted({leaf.shape[0] for leaf in tree.tensors(batch) if leaf.dim()})
    if len(sizes) != 1:
        found = f"tensors with leading dimensions {sizes}" if sizes else "no tensor with a dimension"
        raise ValueError(
            f"{who} was given a batch with {found}, which does not say how many examples this rank has. Write "
            f"data_parallel(problem, ranks, count=lambda batch: len(batch['labels'])); count=lambda batch: 1 where "
            f"every rank's batch weighs the same"
        )
    return sizes[0]


def _halved(batch: Any, here: int) -> list[tuple[Any, int]] | None:
    """Two halves of a batch with their sizes; None where it has one row, or tensors of other leading dimensions."""
    leaves = [leaf for leaf in tree.tensors(batch) if leaf.dim()]
    if here < 2 or not leaves or any(len(leaf) != here or leaf.layout is not torch.strided for leaf in leaves):
        return None

    def part(low: int, high: int) -> Any:
        return tree.tree_map(lambda leaf: leaf[low:high] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)

    return [(part(0, here // 2), here // 2), (part(here // 2, here), here - here // 2)]


def _without_a_graph(function: Callable[..., Tensor], y: Tree, x: Tree, batches: list[Any]) -> list[Tensor]:
    try:
        return [function(y, x, batch) for batch in batches]
    except RuntimeError as error:
        if NEEDS_GRAPH not in str(error):
            raise
        with torch.enable_grad():  # (It takes a gradient of its own.)
            return [function(y, x, batch).detach() for batch in batches]


def _physical(leaf: Tensor) -> Tensor:
    """The tensor behind those of torch.func.vmap, which may be read."""
    while torch._C._functorch.is_batchedtensor(leaf):
        leaf = torch._C._functorch.get_unwrapped(leaf)
    return leaf


def _number(leaf: Tensor) -> float:
    """The number that all entries of a tensor are."""
    return float(_physical(leaf.detach()).reshape(-1)[0])
