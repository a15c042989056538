"""A line that says how far a loop is."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from bilevel.loop.step import Step

Item = TypeVar("Item", bound=Step)


def progress(
    steps: Iterable[Item], *, total: int | None = None, stream: TextIO | None = None, seconds: float = 0.5
) -> Iterator[Item]:
    """Yield the steps of a loop, and write where it is: on a terminal, one line that changes; elsewhere nothing.

    The line has the step, the outer loss, steps a second (of this process, since it began) and, where it is known how
    many there are, the time that is left. Reading the loss waits for the GPU, once a line.

    Args:
        steps: an `OuterLoop`, or what `iterate` returned.
        total: how many steps the loop has in all, those before a resume included; None takes `OuterLoop.total`.
        stream: a terminal; sys.stderr by default.
        seconds: a line is written no more often than that.

    Yields:
        The steps, as they are.

    Example:
        >>> import itertools, torch, bilevel as bl
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y - 3) ** 2)
        >>> loop = bl.iterate(problem, x, torch.tensor(0.0), itertools.repeat(bl.Batches(None, None), 3),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=5), estimator=bl.Implicit(bl.CG(1)),
        ...     optimizer=torch.optim.SGD([x], lr=0.25))
        >>> [step.index for step in bl.loop.progress(loop)]
        [0, 1, 2]
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield from steps
        return
    total = getattr(steps, "total", None) if total is None else total
    begun = time.monotonic()
    shown, count, width = -float("inf"), 0, 0
    step: Item | None = None
    try:
        for step in steps:
            count += 1
            now = time.monotonic()
            if now - shown >= seconds:
                width = _write(stream, line(step, count, now - begun, total), width)
                shown = now
            yield step
    finally:
        if step is not None:
            _write(stream, line(step, count, time.monotonic() - begun, total), width)
            stream.write("\n")
            stream.flush()


def line(step: Step, count: int, seconds: float, total: int | None) -> str:
    """What is written after a step, the `count`-th of this process."""
    rate = count / seconds if seconds > 0 else float("inf")
    done = step.index + 1
    parts = [f"step {done}" + (f"/{total}" if total is not None else ""), f"outer loss {float(step.outer_loss):.4g}"]
    parts.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
    if total is not None:
        parts.append(f"{_clock(max(total - done, 0) / rate)} left")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _write(stream: TextIO, text: str, width: int) -> int:
    # The rest of a longer line is overwritten with blanks.
    stream.write("\r" + text.ljust(width))
    stream.flush()
    return len(text)
