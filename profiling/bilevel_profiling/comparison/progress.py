"""What a long comparison says while it works: a bar on a terminal, plain lines elsewhere. All of it goes to standard
error.

Of the package's own modules only this one imports rich, and only when it is used.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import noted, unfinished
from bilevel_profiling.records.record import Record

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work; `weight` is a guess at how long it takes against the others."""

    case: str
    text: str
    weight: float


class Progress:
    """Told what is to be done, what is begun and how it went. This one says nothing."""

    def start(self, tasks: Sequence[Task]) -> None:
        """All the work, in order."""

    def say(self, text: str) -> None:
        """What the user should know before the work begins."""

    def begin(self, task: Task) -> None:
        """A piece of it begins."""

    def finish(self, task: Task, said: str) -> None:
        """It ended, with a few words on how."""

    def stop(self) -> None:
        """Nothing more will be done."""


class Lines(Progress):
    """One plain line for each finished piece, with the time it all took so far and an estimate of what remains.

    Args:
        stream: where to; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._pieces, self._total = 0, 0.0

    def start(self, tasks: Sequence[Task]) -> None:
        self._pieces, self._total = len(tasks), sum(task.weight for task in tasks)
        self._finished, self._weight, self._started = 0, 0.0, time.monotonic()

    def say(self, text: str) -> None:
        print(f"bilevel: {one_line(text)}", file=self._stream, flush=True)

    def finish(self, task: Task, said: str) -> None:
        self._finished += 1
        self._weight += task.weight
        print(f"{self._pace()}  {one_line(f'{task.case}: {task.text}: {said}')}", file=self._stream, flush=True)

    def _pace(self) -> str:
        """How far the work is. The first pieces wait for torch to load, and say nothing about the rest."""
        spent = time.monotonic() - self._started
        told = self._weight >= 0.05 * self._total
        left = f", about {_clock(spent * (self._total / self._weight - 1))} left" if told and self._weight else ""
        return f"[{self._finished}/{self._pieces}, {_clock(spent)}{left}]"


class Bar(Progress):
    """A live bar under the lines of what is finished.

    Args:
        console: where to; standard error by default.
    """

    def __init__(self, console: "Console | None" = None) -> None:
        from rich import progress

        self._console = console or terminal()
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[finished]}/{task.fields[count]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            speed_estimate_period=3600.0,  # the pieces are few and long
        )
        self._all: Any = None
        self._finished = 0

    def start(self, tasks: Sequence[Task]) -> None:
        self._all = self._bar.add_task("", total=sum(task.weight for task in tasks), finished=0, count=len(tasks))
        self._bar.start()

    def say(self, text: str) -> None:
        self._console.print(f"bilevel: {_escaped(text)}", highlight=False)

    def begin(self, task: Task) -> None:
        self._bar.update(self._all, description=_escaped(f"{task.case}: {task.text}"))

    def finish(self, task: Task, said: str) -> None:
        self._finished += 1
        self._bar.update(self._all, advance=task.weight, finished=self._finished)
        self._console.print(
            f"[dim]{_escaped(task.case)}[/dim]  {_escaped(task.text)}: {_escaped(said)}", highlight=False
        )

    def stop(self) -> None:
        self._bar.stop()


def chosen(stream: TextIO | None = None) -> Progress:
    """The bar on a terminal that has rich, else lines."""
    if (stream or sys.stderr).isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines(stream)


def terminal(*, stderr: bool = True) -> "Console":
    """A rich console on standard error (or output), at least wide enough for the tables when it is no terminal.

    Raises:
        ImportError: rich is missing.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=160)


def row_text(record: Record) -> str:
    """A record in a few words."""
    if unfinished(record):
        return f"{record.status}: {record.reason}"
    memory = record.peak_tensor_bytes if record.device == "cpu" else record.cuda_allocated_bytes
    parts = [] if memory is None else [units.size(memory)]
    parts += [] if record.wall_seconds is None else [units.duration(record.wall_seconds)]
    parts += (
        [] if record.program_relative_error is None else [f"error {units.significant(record.program_relative_error)}"]
    )
    return ", ".join([*parts, *([record.status] if noted(record) else [])])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(one_line(text))


def one_line(text: str) -> str:
    """A label may hold anything; what it would do to a terminal is shown instead."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
