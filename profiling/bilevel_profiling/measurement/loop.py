"""The outer loop, measured one outer iteration at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.baselines.counting import uncounted
from bilevel_profiling.cases.case import Case, Posed, leaves_of, seeded
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.measurement import engines
from bilevel_profiling.measurement.running import Running, status_of
from bilevel_profiling.measurement.surroundings import without_warnings
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.records.record import Iteration, Loop

_METERED = 2
"""Outer iterations whose live bytes are counted: the first makes the outer optimizer's state, the second is like all
later ones."""


def outer_loop(case: Case, definition: Definition, steps: int, before: Mapping[str, float] | None = None) -> Loop:
    """Take `steps` outer steps with `bl.iterate`, from a fresh `setup`.

    A hypergradient that must not be used ends the loop; its iteration says so, and the metrics are those of the last
    sound step.

    The metrics before the loop depend on `setup` and the seed alone: with `before` those of another estimator's loop
    are taken over.

    Live tensor bytes slow a step down, so the first iterations are made twice: once metered, in a loop of their own,
        and once timed.

    An engine that traces and compiles does so before, in hypergradients that are not counted, and all loops then share
    one `setup`, whose problem has its functions.
    """
    with without_warnings(), uncounted():
        return _looped(case, definition, steps, before)


def _looped(case: Case, definition: Definition, steps: int, before: Mapping[str, float] | None) -> Loop:
    metered: list[Iteration] = []
    shared = None if engines.sees_operators(case.engine) else _warmed_up(case)
    if torch.device(case.device).type != "cuda":
        metered = list(_iterations(case, definition, *_started(case, shared), min(steps, _METERED), tensors=True))
    posed, outer = _started(case, shared)
    before = _evaluated(definition, outer, case) if before is None else before
    iterations = list(_iterations(case, definition, posed, outer, steps, tensors=False))
    iterations[: len(metered)] = [_with_peaks(*both) for both in zip(iterations, metered, strict=False)]
    return Loop(tuple(iterations), before, _evaluated(definition, outer, case))


def _warmed_up(case: Case) -> Posed:
    """The problem, with what its engine has made for it."""
    trial = Trial(case)
    for _ in range(engines.WARM_UP):
        trial.hypergradient()
        trial.tidy()
    return trial.posed


def _started(case: Case, shared: Posed | None) -> tuple[Posed, Any]:
    posed = case.pose() if shared is None else shared
    torch.manual_seed(case.seed)
    return posed, leaves_of(posed.outer)


def _iterations(
    case: Case, definition: Definition, posed: Posed, outer: Any, steps: int, *, tensors: bool
) -> Iterator[Iteration]:
    """What each outer step costs, up to one whose hypergradient must not be used. Its batch is made beforehand: loading
    data is not what is measured.
    """
    waiting: list[bl.Batches] = []
    loop = bl.iterate(
        posed.problem,
        outer,
        posed.inner,
        iter(waiting.pop, None),
        solver=case.solver,
        estimator=case.at_work,
        optimizer=case.outer_optimizer(tree.tensors(outer)),
        engine=case.engine,
    )
    for index in range(steps):
        made = definition.batches
        fresh = posed.batches if made is None else case.part(seeded(made, index, case.device, seed=case.seed))
        waiting.append(fresh)
        running = Running(index, torch.device(case.device), tensors, seen=engines.sees_operators(case.engine))
        try:
            step = next(loop)
        except bl.BilevelError as error:
            yield running.stop(status_of(error))
            return
        finally:
            running.end()
        running.look_at(step)
        del step
        yield running.stop()


def _with_peaks(iteration: Iteration, metered: Iteration) -> Iteration:
    """The iteration with the live bytes of the same one when they were counted."""
    phases = {
        name: dataclasses.replace(phase, peak_tensor_bytes=metered.phases[name].peak_tensor_bytes)
        for name, phase in iteration.phases.items()
        if name in metered.phases
    }
    return dataclasses.replace(
        iteration, peak_tensor_bytes=metered.peak_tensor_bytes, phases={**iteration.phases, **phases}
    )


def _evaluated(definition: Definition, outer: Any, case: Case) -> dict[str, float]:
    if definition.evaluate is None:
        return {}
    found = seeded(definition.evaluate, tree.detach(outer), case.device, seed=case.seed)
    return {str(name): float(value) for name, value in found.items()}
