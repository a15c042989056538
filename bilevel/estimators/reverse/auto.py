"""keep="auto": of the ways to keep the trajectory, the one with the least compute whose forecast fits a budget.

| way | compute of a step, in inner gradients |
| --- | --- |
| graph | 2 |
| iterates | 3 |
| iterates, offload (where variables can leave their device) | 3, and 2 copies of an iterate |
| segments | 4 |
| ..., blocks (where the losses have rematerialized ones) | a third more |

The compute is that of the tables, not measured; of two ways with as much, the one with the lower peak is taken. The
peaks are a forecast's: the estimate runs on tensors without data, once for each way, when a problem is first met with
these shapes, this solver and these settings (training or not, autocast); they are remembered with the problem. A
forecast costs about 0.1 ms an operator, whatever the sizes.

The forecast is the profiler's, and the library does without it elsewhere: it is imported when a budget is asked for.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.captures import reachable
from bilevel.engine.offload import lane_of
from bilevel.engine.rematerialize import switched
from bilevel.engine.split import split_over
from bilevel.estimators.base import Estimate, Estimator, Instance
from bilevel.space import tree
from bilevel.space.ranks import without_data

BLOCKS = ", blocks"
"""In the name of a way that runs rematerialized blocks as such."""
_BLOCKS_COST = 4 / 3
_REMEMBERED = 32
"""Signatures of a problem."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to keep the trajectory: its compute, in inner gradients a step, and the estimator that goes it."""

    cost: float
    estimator: Estimator


def within(ways: Mapping[str, Way], budget: int, instance: Instance) -> Estimate:
    """The estimate by the cheapest way that fits, with `keep` and `keep_peaks` in its stats.

    Raises:
        ValueError: none does.
        ImportError: the forecast is not installed.
    """
    ranks, peaks = split_over(instance.problem), _peaks(ways, instance)
    if ranks is not None and not without_data(tree.tensors(instance.outer)[0]):
        # (Ranks of more rows need more, and all must go the same way.)
        every = ranks.gathered(peaks)
        peaks = {name: max(each[name] for each in every) for name in peaks}
    blocks = any(name.endswith(BLOCKS) for name in peaks)

    def cost(name: str) -> tuple[float, int]:
        plain = name.removesuffix(BLOCKS)
        return ways[plain].cost * (_BLOCKS_COST if name != plain else 1), peaks[name]

    fitting = [name for name, peak in peaks.items() if peak <= budget]
    if not fitting:
        needs = "; ".join(f"{name} {peak:,}" for name, peak in sorted(peaks.items(), key=lambda item: item[1]))
        remedy = "" if blocks else ", bilevel.functional(module, rematerialize=Block)"
        raise ValueError(
            f'Unrolled("auto") was given a budget of {budget:,} bytes, and by forecast no way to keep the trajectory '
            f"fits. Bytes needed: {needs}. Raise the budget, or take fewer steps, last=..., smaller batches, "
            f"TaskMean(..., chunk=1){remedy} or Implicit()"
        )
    name = min(fitting, key=cost)
    with switched(on=name.endswith(BLOCKS)) if blocks else contextlib.nullcontext():
        found = ways[name.removesuffix(BLOCKS)].estimator.estimate(instance, None)
    return dataclasses.replace(found, stats={**found.stats, "keep": name, "keep_peaks": dict(peaks)})


def parsed(budget: str | int) -> int:
    """Bytes of a budget.

    Raises:
        ValueError: it is no size.
    """
    size: int = _profiler().records.sizes.parse(budget)
    return size


def can_leave(instance: Instance) -> bool:
    """Whether the variables can be offloaded from where they are."""
    return lane_of(tree.tensors(instance.outer)[0]) is not None


def _profiler() -> Any:
    """The one place where the library asks the profiler; it listens else."""
    try:
        import bilevel_profiling
        import bilevel_profiling.forecasting.fake
        import bilevel_profiling.meters.tensors
        import bilevel_profiling.records.sizes
    except ImportError as error:
        raise ImportError(
            'Unrolled("auto") asks bilevel_profiling for a forecast, and it cannot be imported. Install it, or choose: '
            'Unrolled("graph"), Unrolled("iterates") or Unrolled("segments")'
        ) from error
    return bilevel_profiling


def _peaks(ways: Mapping[str, Way], instance: Instance) -> dict[str, int]:
    """The forecast peaks of all ways, remembered with the problem."""
    remembered = instance.problem.memo.setdefault("keep", {})
    key = tuple(ways), _hashable([way.estimator for way in ways.values()]), _signature(instance)
    known: dict[str, int] | None = remembered.get(key)
    if known is not None:
        return known
    rehearsal, peaks, met = _rehearsal(instance), dict[str, int](), False
    for name, way in ways.items():
        peak, met = _peak(way.estimator, rehearsal, blocks=True)
        peaks[name + BLOCKS if met else name] = peak
        if met:
            peaks[name] = _peak(way.estimator, rehearsal, blocks=False)[0]
    while len(remembered) >= _REMEMBERED:
        remembered.pop(next(iter(remembered)))
    remembered[key] = peaks
    return peaks


def _peak(estimator: Estimator, instance: Instance, *, blocks: bool) -> tuple[int, bool]:
    """What an estimate adds at its peak, and whether it met rematerialized blocks."""
    profiler, generators = _profiler(), instance.oracles.generators
    tensors, without_data = profiler.meters.tensors.Tensors, profiler.forecasting.fake.without_data
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    before = generators.peek()

    def call() -> None:
        # (An instance of its own, because oracles remember where they begin.)
        estimator.estimate(dataclasses.replace(instance), None)

    try:
        with spans.unheard(), _disable_current_modes(), switched(on=blocks) as switch:
            # (Inside another forecast its tensors without data are those of this one.)
            with (
                without_data() if mode is None else mode as shapes,
                tensors(getattr(shapes, "stand_in", None)) as meter,
            ):
                call()
            return meter.peak_bytes, switch.met
    except Exception as error:
        error.add_note('Unrolled("auto") asks a forecast; Unrolled("graph"), "iterates" and "segments" do not.')
        raise
    finally:
        generators.set(before)


def _rehearsal(instance: Instance) -> Instance:
    """The instance to be run without data: what it learns of the problem, and what it asks of the batches, stays there.

    The forecast is that of the eager engine.
    """
    problem = dataclasses.replace(instance.problem)
    problem.memo.update(instance.problem.memo)
    steps = {
        name: _Rehearsed(getattr(instance.batches, name))
        for name in ("inner", "curvature")
        if isinstance(getattr(instance.batches, name), PerStep)
    }
    batches = dataclasses.replace(instance.batches, **steps)
    return dataclasses.replace(instance, problem=problem, batches=batches, engine=None)


class _Rehearsed(PerStep):
    """The batches of a PerStep as a forecast needs them, each asked for once: those that lie ready are there already,
    those that are made when asked for are made in the forecast.
    """

    def __init__(self, steps: PerStep) -> None:
        self._steps, self._known = steps, dict[int, Any]()
        self._ready: bool | None = None

    def __getitem__(self, step: int) -> Any:
        with _disable_current_modes():
            if step not in self._known:
                before = torch.get_rng_state()
                batch = self._steps[step]
                if self._ready is None:
                    self._ready = _storages(batch) == _storages(self._steps[step])
                drew = not torch.equal(before, torch.get_rng_state())
                self._known[step] = (batch if self._ready else tree.tree_map(_outline, batch)), drew
            batch, drew = self._known[step]
            if drew:
                torch.rand(1)  # a generator that has moved is kept with an iterate
        return tree.tree_map(lambda leaf: leaf.made() if isinstance(leaf, _Outline) else leaf, batch)

    def __len__(self) -> int:
        return len(self._steps)


@dataclasses.dataclass(frozen=True)
class _Outline:
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _outline(leaf: Any) -> Any:
    strided = isinstance(leaf, Tensor) and leaf.layout is torch.strided
    return _Outline(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if strided else leaf


def _storages(batch: Any) -> list[Any]:
    return [leaf.untyped_storage()._cdata for leaf in tree.tensors(batch) if leaf.layout is torch.strided]


def _signature(instance: Instance) -> Any:
    """All that the peaks depend on besides the problem's functions."""
    problem, batches = instance.problem, instance.batches
    functions = (problem.inner_loss, problem.outer_loss, problem.init, problem.features)
    kinds = sorted({"cpu", tree.tensors(instance.outer)[0].device.type})
    generators = instance.oracles.generators
    before = generators.peek()
    try:
        seen = [
            _outlines(each, instance.solver.max_steps) for each in (batches.inner, batches.outer, batches.curvature)
        ]
    finally:
        generators.set(before)
    return (
        _hashable(instance.solver),
        _outlines((instance.outer, instance.inner)),
        tuple(seen),
        instance.tasks,
        tuple(layer.training for each in functions for layer in reachable(each, nn.Module)),
        tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
    )


_SIZES = (int, str, slice, type(None), range)
"""Parts of a batch that may say how large something is."""


def _outlines(value: Any, steps: int = 1) -> Any:
    """Shapes and dtypes of the tensors, the structure, and the numbers that may be sizes."""
    if isinstance(value, PerStep):
        ready = isinstance(getattr(value, "_batches", None), (list, tuple))
        count = min(len(value), max(steps, 1)) if ready else 1
        return tuple(_outlines(value[step]) for step in range(count))
    leaves, structure = tree.flatten(value)
    return str(structure), *(
        _outline(leaf) if isinstance(leaf, Tensor) else repr(leaf) if isinstance(leaf, _SIZES) else type(leaf)
        for leaf in leaves
    )


class _Same:
    """Something that has no hash, as a key: itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def _hashable(value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value
