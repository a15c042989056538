"""OuterLoop: hypergradient, outer step, repeat, as an object that can stop, be saved, and go on to the bit."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.inner.base import InnerSolver
from bilevel.loop import checks, files, snapshot
from bilevel.loop.early_stopping import EarlyStopping
from bilevel.loop.mixed_precision import MixedPrecision
from bilevel.loop.moving import finished_first
from bilevel.loop.precision_check import PrecisionCheck
from bilevel.loop.randomness import Randomness, owned_by
from bilevel.loop.reader import Reader
from bilevel.loop.step import Step
from bilevel.loop.stepping import Carried, Stepping
from bilevel.outcome import Status
from bilevel.problem import Problem
from bilevel.space.tree import Tree


class OuterLoop:
    """Hypergradient, outer step, repeat: an iterator of steps that can be left, saved, and gone on with.

    It makes the steps that `iterate` makes. What a step depends on is its own: `save` writes all of it, and a loop that
    is made anew in the same way and loads the file goes on as if it had never stopped, to the bit.

    A loop that was left (break, an exception in the body, Ctrl-C, a hypergradient that failed) goes on where it is with
    the next `for step in loop`. A step that was not finished has not happened: x, generators and the place in the data
    are those before it, and its batches come again; `skip()` leaves them out. Ctrl-C waits while x is moved.

    Args:
        problem, outer, inner, loader, solver, estimator, optimizer, carry, state, tolerate, engine: as for `iterate`.
            `loader` must not fill one batch again and again: batches are kept until their step is made.
        epochs: passes over `loader`, which is then read anew each time; None for no end.
        scheduler: a learning rate scheduler of `optimizer`, or a list of them; each takes a step after each outer step
            (ReduceLROnPlateau with the outer loss).
        accumulate: batches of a step: it is made with the mean of their hypergradients. Each begins with the y and the
            estimator's state that the one before left. What a pass leaves over makes a step with fewer.
        clip: what the norm of the hypergradient is clipped to, over all outer tensors; or a function that is called
            with the list of outer tensors once their `.grad` is set, and changes it. Of a mean it is the mean that is
            clipped; the step's hypergradient is the one before.
        precision: runs the losses in reduced precision. Of float16 a hypergradient that overflows is skipped, with its
            batches; the step says so.
        check: computes hypergradients once more in full precision now and then, and warns where they differ.
        stop: ends the loop when the outer loss gets no better. It and `precision` are saved and loaded along.
        generators: those that losses or the loader draw from besides the global ones: `torch.Generator`,
            `random.Random`, numpy's. Those that the loader, and DataLoaders, samplers and data sets that it has as
            attributes, have as attributes are found.
        also: objects with `state_dict` and `load_state_dict` to save and load along, by name.

    Attributes:
        index: how many steps were made: the index of the next one.
        epoch: how many passes were finished.
        inner, state: where y is, and what the estimator carries.

    Raises:
        TypeError, ValueError: as `iterate`; an argument is of the wrong kind or out of range.

    Memory: that of `iterate`, and a batch; saving copies all tensors once.

    Cost: reading the generators, 0.3 ms a step. Loading reads the batches of the pass again, and looks whether the last
        is the one that it was, unless the loader has a `state_dict` (`bilevel.data.Episodes`, torchdata's
        StatefulDataLoader), which is taken at its word: what is random in the worker processes of a
        StatefulDataLoader is not in it, and so not to the bit.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y - b) ** 2)
        >>> def made():
        ...     x = torch.tensor(1.0, requires_grad=True)
        ...     return bl.OuterLoop(problem, x, torch.tensor(0.0), [bl.Batches(None, float(b)) for b in range(6)],
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=5), estimator=bl.Implicit(bl.CG(1)),
        ...         optimizer=torch.optim.Adam([x], lr=0.25))
        >>> loop = made()
        >>> for step in loop:
        ...     if step.index == 3:
        ...         saved = loop.save(getfixture("tmp_path"), keep=2)
        >>> again = made()
        >>> _ = again.load(saved)
        >>> [step.index for step in again], torch.equal(again.outer, loop.outer)
        ([4, 5], True)
    """

    def __init__(
        self,
        problem: Problem,
        outer: Tree,
        inner: Tree | None,
        loader: Iterable[Batches],
        *,
        solver: InnerSolver,
        estimator: Estimator,
        optimizer: Optimizer,
        carry: bool = True,
        state: Any = None,
        tolerate: Collection[Status] = (Status.NEGATIVE_CURVATURE,),
        engine: Engine | None = None,
        epochs: int | None = 1,
        scheduler: LRScheduler | Sequence[LRScheduler] = (),
        accumulate: int = 1,
        clip: float | Callable[[list[Tensor]], Any] | None = None,
        precision: MixedPrecision | None = None,
        check: PrecisionCheck | None = None,
        stop: EarlyStopping | None = None,
        generators: Sequence[Any] = (),
        also: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_optimizer("OuterLoop", outer, optimizer)
        checks.check_options("OuterLoop", loader, epochs, accumulate, clip, also)
        checks.check_objects("OuterLoop", precision, check, stop)
        schedulers = checks.schedulers("OuterLoop", scheduler, optimizer)
        parts = (problem, outer, solver, estimator, optimizer, carry, frozenset(tolerate), engine)
        random = Randomness([*generators, *owned_by(loader)])
        stepping = Stepping("OuterLoop", *parts, schedulers, accumulate, clip, frames=5)
        stepping.stop, stepping.precision, stepping.check, stepping.random = stop, precision, check, random
        reader, made_with = Reader(loader, epochs, random), snapshot.settings(stepping, loader)
        own = {"(precision)": precision, "(stop)": stop}
        saved = {**(also or {}), **{name: value for name, value in own.items() if value is not None}}
        self._parts = snapshot.Parts(stepping, reader, random, saved, made_with)
        self._carried = Carried(inner, state)
        self._index = 0
        self._torn = ""
        self._busy = False
        self._done = 0  # steps, and whatever else is not undone

    @property
    def index(self) -> int:
        """How many steps were made: the index of the next one."""
        return self._index

    @property
    def outer(self) -> Tree:
        """x."""
        return self._parts.stepping.outer

    @property
    def inner(self) -> Tree | None:
        """Where the next step's inner loop begins; None where the problem says."""
        return self._carried.inner

    @property
    def state(self) -> Any:
        """What the estimator carries to the next step."""
        return self._carried.state

    @property
    def epoch(self) -> int:
        """How many passes over the loader were finished."""
        return self._parts.reader.epoch

    @property
    def total(self) -> int | None:
        """How many steps there are in all, from the first on; None where the loader has no length or the passes no
        end. Early stopping and `skip` make fewer.
        """
        reader = self._parts.reader
        if reader.epochs is None or not hasattr(reader.loader, "__len__"):
            return None
        return reader.epochs * -(-len(reader.loader) // self._parts.stepping.accumulate)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        """Make one step.

        Raises:
            StopIteration: the data have ended.
            BilevelError: the hypergradient failed, as in `iterate`; the step has not happened.
            RuntimeError: a step is being made already, or x was left half moved.
        """
        with self._alone("go on"):
            return self._step()

    def _step(self) -> Step:
        parts = self._parts
        begun, lr = time.perf_counter(), parts.stepping.rates()
        while not parts.reader.over and not parts.stepping.stopped:
            with self._undone():
                made = parts.stepping.group(parts.reader.take, self._carried, self._index)
                if made is not None and not made.skipped:
                    parts.stepping.show(made.hypergradient)
                with finished_first():
                    if made is not None:
                        self._torn = f"outer step {self._index} was cut off while x was being moved"
                        parts.stepping.move(made)
                        self._carried, self._index, self._torn = made.left, self._index + 1, ""
                        parts.reader.settle()
                    else:
                        parts.reader.turn()
                    self._done += 1
            if made is not None:
                seconds = time.perf_counter() - begun
                return Step(self._index - 1, made.hypergradient, lr, seconds, made.precision, made.skipped)
        if not parts.reader.over:
            parts.stepping.leave()
        raise StopIteration

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """What raises in this block, before it was done, leaves generators and data as they were before it."""
        before, done = self._parts.reader.mark(), self._done
        try:
            yield
        except BaseException:
            if self._done == done:
                with finished_first():
                    self._parts.reader.put_back()
                    self._parts.random.set(before)
            raise

    def skip(self) -> None:
        """Leave out the batches of the next step, such as those at which it failed; its index goes to those after.

        Raises:
            RuntimeError: a step is being made, or x was left half moved.
        """
        reader = self._parts.reader
        with self._alone("skip batches"), self._undone():
            with contextlib.suppress(StopIteration):
                for _ in range(self._parts.stepping.accumulate):
                    reader.take()
            with finished_first():
                reader.settle()
                self._done += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as it is after the last one: copies, so that later steps do not
        change them. Tensors stay on their devices.

        Raises:
            RuntimeError: a step is being made, or x was left half moved.
            TypeError: something in it is no tensor, number, string, or dict, list or tuple of these.
        """
        with self._alone("say what its state is"):
            return self._parts.state_dict(self._carried, self._index)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, to the bit; everything is copied, to the devices of what is at hand.

        Random numbers that are drawn between this call and the next step move the generators, as everywhere.

        Args:
            state: of a loop that was made in the same way.

        Raises:
            TypeError: it is no state of a loop.
            ValueError: it does not fit this loop, or the loader cannot be got there; the message says what differs.
                Nothing was loaded.
            RuntimeError: a step is being made.

        Warns:
            UserWarning: settings differ, so that the run will not go on as it would have. Of functions, their names and
                what they close over are compared: numbers, fixed tensors, layers; not what they do, nor globals.
        """
        self._parts.check(state, self._carried.inner)
        with self._alone("load a state", torn=True):
            self._parts.go_to(state)
            with finished_first():
                self._torn = "loading was cut off"
                self._carried = self._parts.take_over(state, self._carried.inner)
                self._index, self._torn = state["index"], ""

    def save(self, folder: str | os.PathLike[str], *, keep: int | None = 3) -> pathlib.Path:
        """Write `state_dict()` to a new file in a folder, whole or not at all, and delete the oldest files there.

        A process that is killed at any moment leaves whole files behind, and so does a computer that loses its power.
        Of several processes each needs a folder of its own.

        Args:
            folder: is made if it is not there.
            keep: how many files stay; None for all of them.

        Returns:
            The file, such as `folder/000007-step-700.pt`: the seventh, after 700 steps.

        Raises:
            ValueError: keep is smaller than 1, or the folder has the name of a file.
            OSError: it could not be written, as on a full disk; the files of before stay, and the loop can go on.
            RuntimeError, TypeError: as `state_dict`.
        """
        checks.check_saving(folder, keep)
        return files.write(pathlib.Path(folder), self._index, self.state_dict(), keep)

    def load(
        self, path: str | os.PathLike[str], *, older: bool = False, missing_ok: bool = False
    ) -> pathlib.Path | None:
        """Load a file of `save`, as `load_state_dict` does.

        Args:
            path: the file, or the folder, of which the newest is taken.
            older: take the newest whole file of the folder where newer ones are damaged, with a warning.
            missing_ok: do nothing where the folder has no files yet, so that one script begins and goes on.

        Returns:
            The file; None where there is none.

        Raises:
            FileNotFoundError: there is none.
            bilevel.loop.DamagedFileError: it is empty, cut short, altered, cannot be read, or was written by something
                else; the message names the newest whole one before it.
            TypeError, ValueError, RuntimeError: as `load_state_dict`.
        """
        chosen = files.chosen(pathlib.Path(path), older=older, missing_ok=missing_ok)
        if chosen is None:
            return None
        found, state = chosen
        self.load_state_dict(state)
        return found

    @contextlib.contextmanager
    def _alone(self, what: str, *, torn: bool = False) -> Iterator[None]:
        """Nothing else is done with the loop in this block, by what it calls or by another thread."""
        if self._busy:
            raise RuntimeError(
                f"OuterLoop cannot {what}: a step is being made, or its state is read. Do it between steps, in the "
                f"loop's body"
            )
        if self._torn and not torn:
            raise RuntimeError(
                f"OuterLoop cannot {what}: {self._torn}, so that it is at no step. Load the last file, or a "
                f"state_dict() of before"
            )
        try:
            self._busy = True
            yield
        finally:
            self._busy = False
