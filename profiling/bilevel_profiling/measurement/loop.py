"""The outer loop, measured one outer iteration at a time."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.cases.case import Case, Posed, leaves_of, seeded
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.measurement.passes import STEPPED_THROUGH, Figures
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.records.record import Iteration, Phase

_METERED = 2
"""Outer iterations whose live bytes are counted: the first makes the outer optimizer's state, the second is like all
later ones."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """What an outer loop did."""

    iterations: tuple[Iteration, ...]
    metrics_before: Mapping[str, float]
    metrics: Mapping[str, float]


def outer_loop(case: Case, definition: Definition, steps: int, before: Mapping[str, float] | None = None) -> Loop:
    """Take `steps` outer steps with `bl.iterate`, from a fresh `setup`.

    A hypergradient that must not be used ends the loop; its iteration says so, and the metrics are those of the last
    sound step.

    The metrics before the loop depend on `setup` and the seed alone: with `before` those of another estimator's loop
    are taken over.

    Live tensor bytes slow a step down, so the first iterations are made twice: once metered, in a loop of their own,
        and once timed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=STEPPED_THROUGH)  # the iteration's status says it
        return _looped(case, definition, steps, before)


def _looped(case: Case, definition: Definition, steps: int, before: Mapping[str, float] | None) -> Loop:
    metered = [] if torch.device(case.device).type == "cuda" else _peaks(case, definition, min(steps, _METERED))
    posed, outer = _started(case)
    before = _evaluated(definition, outer, case) if before is None else before
    iterations = []
    for index, take in enumerate(_steps(case, definition, posed, outer, steps)):
        iteration = _iteration(index, take, case.device)
        if index < len(metered):
            iteration = _with_peaks(iteration, metered[index])
        iterations.append(iteration)
        if iteration.outer_loss is None:  # refused
            break
    return Loop(tuple(iterations), before, _evaluated(definition, outer, case))


Take = Callable[[], bl.Step | bl.Status]
"""Takes the next outer step; a Status instead of it when the hypergradient must not be used."""


def _steps(case: Case, definition: Definition, posed: Posed, outer: Any, steps: int) -> Iterator[Take]:
    """One function an outer step, to be called before the next is asked for. Its batch is made beforehand: loading data
    is not what is measured.
    """
    waiting: list[bl.Batches] = []

    def loader() -> Iterator[bl.Batches]:
        while True:
            yield waiting.pop()

    loop = bl.iterate(
        posed.problem,
        outer,
        posed.inner,
        loader(),
        solver=case.solver,
        estimator=case.estimator,
        optimizer=case.outer_optimizer(tree.tensors(outer)),
    )

    def take() -> bl.Step | bl.Status:
        try:
            return next(loop)
        except bl.BilevelError as error:
            return next((status for status in bl.Status if f": {status.name}: " in str(error)), bl.Status.NONFINITE)

    for step in range(steps):
        waiting.append(
            posed.batches
            if definition.batches is None
            else seeded(definition.batches, step, case.device, seed=case.seed)
        )
        yield take


def _started(case: Case) -> tuple[Posed, Any]:
    posed = case.pose()
    torch.manual_seed(case.seed)
    return posed, leaves_of(posed.outer)


def _iteration(index: int, take: Take, device: str) -> Iteration:
    figures = Figures()
    clock, oracles, cuda = Clock(device), Oracles(), Cuda(device)
    with figures.of(clock), figures.of(oracles), figures.of(cuda), clock, oracles, cuda:
        step = take()
    phases = {name: Phase(**fields) for name, fields in figures.phases.items()}
    found = Iteration(
        index=index,
        wall_seconds=figures.fields["wall_seconds"],
        cuda_allocated_bytes=figures.fields["cuda_allocated_bytes"],
        calls=figures.fields["calls"],
        phases=phases,
    )
    if isinstance(step, bl.Status):
        return dataclasses.replace(found, status=step.name)
    hg = step.hypergradient
    squares = [leaf.detach().double().square().sum() for leaf in tree.tensors(hg.grad)]
    return dataclasses.replace(
        found,
        outer_loss=hg.outer_loss.item(),
        inner_loss=hg.inner_loss.item(),
        gradient_norm=torch.stack(squares).sum().sqrt().item(),
        status=hg.status.name,
    )


def _peaks(case: Case, definition: Definition, steps: int) -> list[Tensors]:
    """The meters of the first iterations."""
    posed, outer = _started(case)
    meters = []
    for take in _steps(case, definition, posed, outer, steps):
        meter = Tensors()
        with meter:
            step = take()
        meters.append(meter)
        if isinstance(step, bl.Status):
            break
        del step
    return meters


def _with_peaks(iteration: Iteration, meter: Tensors) -> Iteration:
    found = meter.phases()
    phases = {name: dataclasses.replace(phase, **found.get(name, {})) for name, phase in iteration.phases.items()}
    return dataclasses.replace(iteration, peak_tensor_bytes=meter.peak_bytes, phases=phases)


def _evaluated(definition: Definition, outer: Any, case: Case) -> dict[str, float]:
    if definition.evaluate is None:
        return {}
    found = seeded(definition.evaluate, tree.detach(outer), case.device, seed=case.seed)
    return {str(name): float(value) for name, value in found.items()}
