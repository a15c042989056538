"""Reader: where a loop is in its data, and how it gets there again.

A loader with `state_dict` and `load_state_dict` says where it is. Any other is read again from the beginning of its
pass, with the generators as they were then, and the last batch that is read so must be the one that was used last.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from bilevel.loop.identity import digest
from bilevel.loop.moving import finished_first
from bilevel.loop.randomness import Drawn, Randomness, parts_of


@dataclasses.dataclass(frozen=True)
class _Read:
    """A batch, with the generators before and after it was read."""

    batches: Any
    before: Drawn
    after: Drawn


@dataclasses.dataclass(frozen=True)
class _Last:
    """The last batch that was used: the generators before it was read, and what it was."""

    before: Drawn
    digest: str


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place in a pass: after `count` batches."""

    count: int
    state: Any = None
    began: Drawn | None = None
    last: _Last | None = None


class Reader:
    """Reads a loader, pass after pass. Batches are taken, and then either settled or put back.

    Args:
        loader: any iterable.
        epochs: passes; None for no end.
        random: what a place depends on, and brings back.
    """

    def __init__(self, loader: Any, epochs: int | None, random: Randomness) -> None:
        self.loader, self.epochs, self.random = loader, epochs, random
        self.epoch, self.count = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._began: Drawn | None = None
        self._ahead: collections.deque[_Read] = collections.deque()
        self._taken: list[_Read] = []
        self._used: _Read | _Last | None = None
        self._state: Any = None
        self._ended = self._broken = False
        self._now: Drawn | None = None
        self._read = 0  # of a loader that can be read only once, in all

    @property
    def over(self) -> bool:
        """Whether all passes were made."""
        return self.epochs is not None and self.epoch >= self.epochs

    @property
    def _once(self) -> bool:
        return hasattr(self.loader, "__next__")

    def mark(self) -> Drawn:
        """Where the generators stand, before batches are taken."""
        self._now = self.random.peek()
        return self._now

    def take(self) -> Any:
        """The next batch of this pass.

        Raises:
            StopIteration: there is none.
            RuntimeError: the loader raised before, and cannot be read again.
        """
        if self._ahead:
            self._now = None
            with finished_first():
                read = self._ahead.popleft()
                self._taken.append(read)
            self.random.set(read.after)
            return read.batches
        if self._ended:
            raise StopIteration
        if self._broken:
            self._reopen()
        kept = len(self._taken)
        try:
            if self._iterator is None:
                self._open()
                self._now = None
            assert self._iterator is not None, "it was opened"
            before = self._now or self.random.peek()
            self._now = None
            batches = next(self._iterator)
            read = _Read(batches, before, self.random.peek())
            with finished_first():
                self._read += 1
                self._taken.append(read)
        except StopIteration:
            self._ended = True
            raise
        except BaseException:
            self._broken = len(self._taken) == kept  # also where it was interrupted just after it
            raise
        return batches

    def settle(self) -> None:
        """What was taken is used."""
        if self._taken:
            self.count += len(self._taken)
            self._used, self._taken = self._taken[-1], []
            self._state = None if self._state is None else _state_of(self.loader)

    def put_back(self) -> None:
        """What was taken is the next to be taken again."""
        self._ahead.extendleft(reversed(self._taken))
        self._taken = []

    def turn(self) -> None:
        """End this pass; the next batch is the first of the next one.

        Raises:
            ValueError: there was no batch in it, and it is one of several.
        """
        if self.count == 0 and self.epochs != 1:
            raise ValueError(
                f"OuterLoop's loader, a {type(self.loader).__name__}, gave no batch in pass {self.epoch}; passes "
                f"without steps would have no end. A loader that can be read only once has one pass: leave epochs out"
            )
        self.epoch, self.count, self._ended = self.epoch + 1, 0, False
        self._iterator = self._began = self._used = self._state = None

    def _open(self) -> None:
        self._began = self.random.peek()
        self._iterator = iter(self.loader)
        self._state = _state_of(self.loader)

    def _reopen(self) -> None:
        """After the loader raised: where it was before, if it can be got there."""
        if self._once:
            raise RuntimeError(
                f"OuterLoop's loader, a {type(self.loader).__name__}, raised while a batch was read, and can be read "
                f"only once, so the loop cannot go on with it. Save the loop, make it anew with a new loader, and load"
            )
        self._iterator, now = None, self.random.peek()
        if self._began is not None:
            place = _Place(self.count, self._state, self._began, self._last())
            iterator = self._reached(place, self.epoch, begun=bool(self.count or self._taken))
            for read in self._taken:
                assert iterator is not None, "batches of this pass are taken"
                self._skip(iterator, _Place(1, last=_Last(read.before, digest(read.batches))))
            self._iterator = iterator
            self.random.set(now)
        self._broken = False

    def state_dict(self) -> dict[str, Any]:
        """The place after what was settled."""
        last = self._last()
        return {
            "over": self.over,
            "epoch": self.epoch,
            "count": self.count,
            "ended": self._ended and not self._ahead,
            "loader": copy.deepcopy(self._state),
            "began": None if self._began is None else self._began.to_dict(),
            "last": None if last is None else {"before": last.before.to_dict(), "digest": last.digest},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go to a place. Where the generators stand afterwards is for the caller to say.

        Raises:
            ValueError: the loader cannot be got there, or does not give the batches that it gave.
        """
        began, last = saved["began"], saved["last"]
        place = _Place(
            saved["count"],
            copy.deepcopy(saved["loader"]),
            None if began is None else Drawn.from_dict(began),
            None if last is None else _Last(Drawn.from_dict(last["before"]), last["digest"]),
        )
        over = self.epochs is not None and saved["epoch"] >= self.epochs
        further = self._once and self._read > 0 and not over
        try:
            iterator = self._further(place) if further else self._reached(place, saved["epoch"], begun=place.count > 0)
        except BaseException:
            self._broken = True  # whatever was read of it
            raise
        self.epoch, self.count, self._ended, self._broken = saved["epoch"], place.count, saved["ended"], False
        self._iterator, self._began, self._state, self._used = iterator, place.began, place.state, place.last
        self._taken, self._ahead = [], collections.deque()

    def _last(self) -> _Last | None:
        if isinstance(self._used, _Read):
            self._used = _Last(self._used.before, digest(self._used.batches))
        return self._used

    def _reached(self, place: _Place, epoch: int, *, begun: bool) -> Iterator[Any] | None:
        """A new iterator, at that place of its pass; None where no batch was used: to open it draws numbers again."""
        if place.state is not None:
            if _state_of(self.loader) is None:
                raise ValueError(
                    f"OuterLoop was saved with a loader that says where it is (state_dict), and now has a "
                    f"{type(self.loader).__name__}, which does not; the loader of that time was needed"
                )
            self.loader.load_state_dict(copy.deepcopy(place.state))
            return iter(self.loader) if begun else None
        _with_workers(self.loader, epoch)
        if not begun:
            return None
        if place.began is not None:
            self.random.set(place.began)
        iterator = iter(self.loader)
        self._skip(iterator, place)
        return iterator

    def _further(self, place: _Place) -> Iterator[Any]:
        """The iterator of a loader that can be read only once, and was begun: it goes on, never back."""
        if self._iterator is None or place.count < self._read:
            raise ValueError(
                f"OuterLoop has read {self._read} batches of a {type(self.loader).__name__}, which can be read only "
                f"once, and was to go back to batch {place.count}. Make the loop anew with a new loader, and load "
                f"then; or give a list, a DataLoader, or an object with __iter__"
            )
        self._skip(self._iterator, dataclasses.replace(place, count=place.count - self._read))
        return self._iterator

    def _skip(self, iterator: Iterator[Any], place: _Place) -> None:
        """Read as many batches; the last of them must be the one that was used last."""
        batches = None
        for number in range(place.count):
            if number == place.count - 1 and place.last is not None:
                self.random.set(place.last.before)
            try:
                batches = next(iterator)
            except StopIteration:
                raise ValueError(
                    f"OuterLoop was saved after {place.count} batches of a pass, and its loader, a "
                    f"{type(self.loader).__name__}, now gives {number}; the loader of that time was needed"
                ) from None
            self._read += 1
        if place.count and place.last is not None and digest(batches) != place.last.digest:
            raise ValueError(
                f"OuterLoop's loader, a {type(self.loader).__name__}, does not give the batches that it gave: number "
                f"{place.count - 1} of this pass is another one, so the run would not go on as it was. Its data "
                f"differ, or it draws from a generator that the loop does not know: hand that over "
                f"(OuterLoop(generators=[...])), seed it, or give the loader state_dict and load_state_dict"
            )


def _with_workers(loader: Any, epoch: int) -> None:
    """DataLoaders that keep their workers draw a number when they start them, in their first pass and no other."""
    for part in parts_of(loader):
        if isinstance(part, DataLoader) and part.persistent_workers:
            if epoch == 0:
                part._iterator = None
            elif part._iterator is None:
                iter(part)


def _state_of(loader: Any) -> Any:
    """A copy of what the loader says of where it is; None if it does not."""
    if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
        return None
    try:
        return copy.deepcopy(loader.state_dict())
    except TypeError:  # Prefetched, of a loader without one
        return None
