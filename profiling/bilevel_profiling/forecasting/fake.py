"""forecast(): the record of a run, without the run.

The same code runs as in `measure`, under torch's FakeTensorMode: tensors have shapes, dtypes and sized storages, but no
data. The live bytes of every operation are therefore those of the real run, to the byte; times and errors are not
there, since nothing is computed.
"""

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.engine import offload, spans
from bilevel.space import tree
from bilevel_profiling.cases.case import Case, name_of
from bilevel_profiling.forecasting import kernels
from bilevel_profiling.forecasting.margin import workspace_bytes
from bilevel_profiling.forecasting.optimizers import put_back
from bilevel_profiling.forecasting.shapes import Shapes
from bilevel_profiling.forecasting.unreadable import ForecastError as ForecastError
from bilevel_profiling.forecasting.unreadable import explained
from bilevel_profiling.forecasting.world import Aside, world
from bilevel_profiling.measurement import engines
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.passes import Figures, described, ranks_here
from bilevel_profiling.measurement.surroundings import frozen_heap, own_random_state, without_warnings
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.collectives import Collectives
from bilevel_profiling.meters.devices import DEVICES, Device
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.storages import in_blocks
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.meters.work import Work
from bilevel_profiling.records import sizes
from bilevel_profiling.records.note import Note
from bilevel_profiling.records.record import Record

NOT_SEEN = (
    "A forecast counts tensors. On top of them come what cuBLAS and cuDNN take as workspaces, and what the allocator's "
    "cache loses to fragmentation (reserved memory)."
)
LEFT_OVER = (
    "{} of tensors without data outlive the function: it put them into an optimizer's state, a module or a list of "
    "yours, where they are of no use. Make everything inside the function, or make these objects anew before you go on."
)
OTHER_KERNELS = (
    "No CUDA device here: the forecast follows the CPU's operators, and a GPU may run others for a few of them."
)


def forecast(
    what: Case | Callable[[], object],
    *,
    name: str = "",
    on: Device | str | None = None,
    ranks: int | None = None,
    command: str = "",
) -> Record:
    """Say what something would cost, without running it.

    The figures are those of `measure`: peak and kept tensor bytes, by phase, with a timeline and what is alive at the
    peak; FLOPs; oracle calls. For a case on "cuda" also what the allocator would be asked for: requested (exact), and
    allocated (each tensor in blocks of 512 bytes). What such a case offloads (`Unrolled("iterates", offload=True)`)
    is on the host then, and not counted; of a case on "cpu" it stays where it is, and is.

    Cost: about 0.1 ms an operation, whatever the sizes; a few KiB of memory for each tensor that the run would hold.

    Args:
        what: a `Case`, whose `setup` is called under fake tensors too; or any function without arguments. Tensors that
            exist already can be used.
        name: of a function in the record.
        on: a `Device`, or the name of one in `bilevel_profiling.meters.devices.DEVICES`, for a lower bound on its time
            (`roofline_seconds`).
        ranks: N, for what the first of so many processes would hold and send, without starting any: of a case its
            part, as its `parallel` says. N only changes what is split, so that 512 take no longer than 2.
        command: kept in the record's environment.

    Returns:
        A record with source="forecast". Its notes say what could not be seen: a solver that stops on a tolerance is
        forecast at its step limit.

    Raises:
        ForecastError: the code reads a tensor's value (`.item()`, `if tensor:`, a boolean mask); it names the line and
            the remedy.
        ValueError: there is no such device; or a case was given ranks and does not say how it is split.
        RuntimeError: ranks are asked for in a process that is in a group of torch.distributed.
        Exception: whatever `setup`, a loss or the function raises.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import quadratic
        >>> case = Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), steps=5), estimator=bl.Unrolled())
        >>> found = forecast(case)
        >>> found.source, found.calls["hvp"], found.wall_seconds
        ('forecast', 5, None)
        >>> from bilevel_profiling import measure
        >>> found.peak_tensor_bytes == measure(case, errors=False).peak_tensor_bytes
        True
    """
    if not isinstance(what, Case) and not callable(what):
        raise TypeError(
            f"forecast() was given a {type(what).__name__}; a Case or a function without arguments was needed"
        )
    device = on if isinstance(on, Device) or on is None else _device(on)
    if ranks is not None:
        with world(ranks):
            mine = dataclasses.replace(what, ranks=Ranks()) if isinstance(what, Case) else what
            return dataclasses.replace(forecast(mine, name=name, on=on, command=command), processes=ranks)
    with own_random_state(), frozen_heap(), without_warnings():
        return _of_case(what, device, command) if isinstance(what, Case) else _of_call(what, name, device, command)


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise ValueError(
            f"there is no device {name!r}; write one of {', '.join(DEVICES)}, or give a "
            f"bilevel_profiling.meters.devices.Device"
        )
    return DEVICES[name]


def _of_call(call: Callable[[], object], name: str, device: Device | None, command: str) -> Record:
    record = Record(
        case="functions", estimator=name or name_of(call), source="forecast", environment=environment(command)
    )
    with without_data() as shapes:
        figures, notes, _ = _metered(call, device, shapes)
    if figures.fields["kept_tensor_bytes"]:
        notes.append(LEFT_OVER.format(sizes.text(figures.fields["kept_tensor_bytes"])))
        warnings.warn(notes[-1], stacklevel=3)
    return dataclasses.replace(figures.record(record), notes=tuple(map(Note, notes)))


def _of_case(case: Case, device: Device | None, command: str) -> Record:
    cuda, known = torch.device(case.device).type == "cuda", here(case)
    record = dataclasses.replace(
        described(case, command), source="forecast", reference_note="none: a forecast computes nothing."
    )
    with without_data() as shapes, contextlib.nullcontext() if known is case else offload.on_a_device():
        trial = Trial(known)
        trial.prime()
        base = trial.base_sizes()
        if not engines.sees_operators(case.engine):  # tracing is no part of the call
            trial.hypergradient()
            trial.tidy()
        if any(hasattr(leaf, "device_mesh") for leaf in tree.tensors((trial.posed.outer, trial.posed.inner))):
            trial()  # DTensor thinks about each operator once, on tensors without data of its own
            trial.tidy()
        figures, notes, blocks = _metered(trial, device, shapes)
        facts: dict[str, Any] = {"dtype": str(trial.posed.dtype).removeprefix("torch."), "base_tensor_bytes": sum(base)}
        del trial
    if cuda:
        facts |= {
            "cuda_requested_bytes": sum(base) + figures.fields["peak_tensor_bytes"],
            "cuda_allocated_bytes": sum(map(in_blocks, base)) + blocks,
        }
        notes += [NOT_SEEN]
        if known is not case:
            notes += [OTHER_KERNELS]
        else:
            facts["cuda_workspace_bytes"] = workspace_bytes(case.device)
            notes += [
                f"Of these, cuBLAS keeps {sizes.text(facts['cuda_workspace_bytes'])} on this GPU, as measured now."
            ]
    return dataclasses.replace(figures.record(record), **facts, notes=tuple(map(Note, notes)))


def here(case: Case) -> Case:
    """The case on a device that is there: the CPU in place of a GPU that is not."""
    missing = torch.device(case.device).type == "cuda" and not torch.cuda.is_available()
    return dataclasses.replace(case, device="cpu") if missing else case


def _metered(call: Callable[[], Any], device: Device | None, shapes: Shapes) -> tuple[Figures, list[str], int]:
    """One call under all meters: its figures, what must be said of them, and its peak in the CUDA allocator's
    blocks.
    """
    figures, unread, tensors = Figures(), _Unread(), Tensors(shapes.stand_in)
    meters: list[Meter] = [Oracles(), Work(device), tensors]  # the last is asked first, and sees what the code calls
    if ranks_here():
        meters.insert(0, Collectives(clocked=False))
    traced: list[str] = []
    gc.collect()
    with contextlib.ExitStack() as around:
        around.enter_context(_few_full_collections())
        around.enter_context(unread)
        around.enter_context(put_back())
        for meter in meters:
            around.enter_context(meter)
        result = call()
    if isinstance(result, bl.Hypergradient):
        figures.fields |= {
            "inner_size": tree.size(result.inner),
            "outer_size": tree.size(result.grad),
            "tasks": result.stats.get("tasks"),
            "functions": engines.functions(result.stats, timed=False),
        }
        traced = [engines.forecast_note(result.stats)] if engines.hidden(result) else []
    del result
    if isinstance(call, Trial):
        call.tidy()
    shapes.restore()
    gc.collect()
    for meter in meters:
        with figures.of(meter):
            pass
    notes = [*unread.notes(), *traced]
    notes += [kernels.note(shapes.unseen)] if shapes.unseen else []
    return figures, notes, tensors.peak_block_bytes


@contextlib.contextmanager
def _few_full_collections() -> Iterator[None]:
    """Young garbage is collected as ever; walking all fake tensors of a long loop again and again takes a third of its
    time and finds nothing.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], 10**6)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def without_data() -> Iterator[Shapes]:
    """Run the block on fake tensors, and explain an error that comes from there.

    Raises:
        ForecastError: see `forecast`.
    """
    with explained(), Shapes() as shapes, Aside(shapes):
        try:
            yield shapes
        finally:
            shapes.restore()


class _Unread:
    """Counts the tests for convergence that could not be made."""

    def __init__(self) -> None:
        self._count = 0

    def __enter__(self) -> Self:
        self._listening = spans.listen(self)
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)

    def enter(self, name: str, count: int) -> None:
        self._count += name == spans.UNREAD

    def exit(self, name: str) -> None: ...

    def notes(self) -> list[str]:
        if not self._count:
            return []
        return [
            "A solver that stops on a tolerance is forecast at its step limit: its compute is an upper bound, and its "
            "memory that of the limit."
        ]
