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
from bilevel.engine.means import (
    Mean,
    Trial,
    Verdict,
    across,
    agreed,
    examples,
    halves,
    moved,
    no_part,
    physical,
    roundings,
    row_count,
    wrapped,
)
from bilevel.engine.replay import Generators
from bilevel.engine.together import check_seen
from bilevel.problem import Loss, Problem, Pulled
from bilevel.space import bits, tree
from bilevel.space.ranks import Ranks, without_data
from bilevel.space.tree import Tree

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of losses, by what ranks say of them."""


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


class Tried(NamedTuple):
    """The same with what the features make at another x of these rows and of halves: the losses are held against it."""

    value: Any
    examples: Tensor
    tie: Tensor
    trial: Trial


@dataclasses.dataclass(frozen=True)
class Rows:
    """A function of a rank's rows.

    Args:
        function: the user's.
        name: "inner_loss", "outer_loss" or "features".
        ranks: the processes.
        count: how many examples are in a rank's batch; None for the leading dimension of its tensors.
        check: whether the function is held against its values on parts of the batch.
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
            ValueError: the call that is under way cannot see that its data are split.
        """
        check_seen()
        (y, tie_y), (x, tie_x) = tied(self.rows.ranks, inner), tied(self.rows.ranks, outer)
        like, ties = tree.tensors(inner)[0], [tie for tie in (tie_y, tie_x) if tie is not None]
        embedded = isinstance(batch, Embedded | Tried)
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
        rows = batch.value if embedded else batch
        asks = self._asks(rows, like, here, embedded)
        said = [here, error is not None, drew, here > 0, (here > 0) * _DTYPES.index(dtype), asks]
        summed, numbers = total(self.rows.ranks, weighed, torch.tensor(said, dtype=wide, device=like.device))
        if without_data(like):
            self.rows.settled(like, 0, 0, error)
            return (summed / max(here, 1)).to(dtype)
        count, failed, draws, full, kinds, asked = physical(numbers.detach()).tolist()
        self.rows.settled(like, failed, draws, error)
        if not count:
            raise ValueError(
                f"{self.rows.name} was given a batch without an example on any rank; at least one was needed"
            )
        dtype = _DTYPES[round(kinds / full)]
        if asked > 0:
            self._compare_ranks(y, x, rows, here, dtype)
        return (summed / count).to(dtype)

    def _own(self, y: Tree, x: Tree, batch: Any) -> tuple[Tensor | None, int]:
        """The loss of this rank's rows, and how many they are; None where there are none."""
        embedded = isinstance(batch, Embedded | Tried)
        rows = batch.value if embedded else batch
        here = int(physical(batch.examples.detach()).reshape(-1)[0]) if embedded else self.rows.examples(batch)
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
        if versions != [leaf._version for leaf in given]:
            self.rows.known["changed"] = True  # (It changed its arguments in place, and is refused by who called.)
        elif not without_data(loss) and self._unknown("mean"):
            trial = batch.trial if isinstance(batch, Tried) else None
            if trial is None and not (embedded and (self.rows.count or row_count(rows) != here)):
                trial = halves(rows, self.rows.count)
            if trial is not None:
                before = Generators(loss.device)
                state = before.peek()
                verdict = self._verdict(y, x, trial, loss.dtype)
                if before.same(state, before.peek()):  # (Else it draws, and is another loss at each call.)
                    self.rows.known["mean"] = agreed(
                        verdict, self.rows.name, "some of this rank's rows", "parts of them"
                    )
        return loss, here

    def _unknown(self, what: str) -> bool:
        return self.rows.check and not any(self.rows.known.get(each) for each in (what, "random", "changed"))

    def _asks(self, rows: Any, like: Tensor, here: int, embedded: bool) -> bool:
        """Whether this rank wants to see how the loss is on rows of two ranks."""
        if not here or self.rows.ranks.size == 1 or not self._unknown("across") or wrapped((like, rows)):
            return False
        return row_count(rows) == here if self.rows.count is None else not embedded and row_count(rows) is not None

    def _compare_ranks(self, y: Tree, x: Tree, rows: Any, here: int, dtype: torch.dtype) -> None:
        """Hold the loss on some rows of this rank and of the next one that has any against its values on each.

        Raises:
            ValueError: it is no mean.
            RankError: another rank found so.
        """
        error = None
        trial = across(rows if here else None, self.rows.ranks, self.rows.count)
        try:
            if trial is not None:
                verdict = self._verdict(y, x, trial, dtype)
                agreed(verdict, self.rows.name, "rows of this rank and of another one", "those of either")
        except Exception as raised:
            error = raised
        self.rows.ranks.agree(error, self.rows.name)
        self.rows.known["across"] = True

    def _verdict(self, y: Tree, x: Tree, trial: Trial, dtype: torch.dtype) -> Verdict | None:
        with _disable_current_modes():  # (Made once, and no part of a step's memory.)
            return Mean(self.rows.function, self.rows.name, trial, dtype).verdict(y, x)


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Features of a rank's rows, whose cotangents in x are summed over ranks.

    Args:
        rows: the function.
        losses: those that receive what it makes.
    """

    rows: Rows
    losses: tuple[Rows, ...]

    def __call__(self, outer: Tree, batch: Any) -> Embedded | Tried:
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
        value, here, trial = found
        number = torch.full((), here, dtype=torch.int64, device=like.device)
        return Embedded(value, number, tie) if trial is None else Tried(value, number, tie, trial)

    def _own(self, x: Tree, batch: Any) -> tuple[Any, int, Trial | None]:
        here = self.rows.examples(batch)
        if not here:
            # (Of the rows that there are not: no loss looks at it.)
            return tree.tensors(x)[0].detach().reshape(-1)[:0], 0, None
        value = self.rows.function(x, batch)
        known = [each.known for each in (self.rows, *self.losses)]
        random = self.rows.known.get("random") or any(without_data(leaf) for leaf in tree.tensors(value))
        # (torch.func.vmap returns tensors alone.)
        if (
            not self.rows.check
            or random
            or wrapped((value, batch))
            or all(each.get("mean") or each.get("random") for each in known)
        ):
            return value, here, None
        given = halves(batch, self.rows.count)
        trial = None if given is None else self._tried(moved(x), given) or self._tried(x, given, told=True)
        if trial is not None and given is not None:
            size = row_count(given.parts[0]) or 0
            for whole, half in zip(tree.tensors(trial.whole), tree.tensors(trial.parts[0]), strict=True):
                self._check_row(whole, half, row_count(given.whole) or 0, size)
            self.rows.known["mean"] = True
        return value, here, trial

    def _tried(self, x: Tree, given: Trial, told: bool = False) -> Trial | None:
        try:
            with torch.no_grad():
                parts = tuple(self.rows.function(x, part) for part in given.parts)
                return Trial(self.rows.function(x, given.whole), parts, given.shares)
        except Exception as error:  # (Not everything can be called everywhere.)
            if told:
                raise no_part(self.rows.name, error) from error
            return None

    def _check_row(self, whole: Tensor, half: Tensor, here: int, size: int) -> None:
        if not whole.is_floating_point() or not whole.dim() or len(whole) != here or len(half) != size:
            return
        with torch.no_grad():
            one, other = physical(whole[:size]).double(), physical(half[:size]).double()
            bound = roundings(whole.dtype) * (1e-30 + one.abs().max())
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
    split = [each for each in map(_behind, (inner, problem.outer_loss)) if isinstance(each, SplitLoss)]
    return split[0].rows.ranks if split else None


def _behind(loss: Any) -> Any:
    """A loss behind what runs it in another precision, which names it as its `function`."""
    while not isinstance(loss, SplitLoss) and callable(getattr(loss, "function", None)):
        loss = loss.function
    return loss


def over(problem: Problem, ranks: Ranks, count: Callable[[Any], int] | None, *, check: bool) -> Problem:
    """A problem whose losses are means over ranks."""

    def made(loss: Loss, name: str) -> SplitLoss:
        return SplitLoss(Rows(loss, name, ranks, count, check))

    loss, init = problem.inner_loss, None if problem.init is None else SplitStart(problem.init)
    inner = made(loss.inner_loss if isinstance(loss, Pulled) else loss, "inner_loss")
    whole: Loss = inner
    if isinstance(loss, Pulled):
        assert init is not None, "a pull is to a start"
        whole = Pulled(inner, init, loss.strength)
    outer, features = made(problem.outer_loss, "outer_loss"), problem.features
    if features is not None:
        features = SplitFeatures(Rows(features, "features", ranks, count, check), (inner.rows, outer.rows))
    return dataclasses.replace(problem, inner_loss=whole, outer_loss=outer, init=init, features=features)
