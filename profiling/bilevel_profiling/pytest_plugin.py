"""A pytest plugin: memory contracts of tests, with the mark and the fixture `peak_memory`.

    @pytest.mark.peak_memory(max_bytes="10 MiB")
    def test_a_step_fits(): ...

    @pytest.mark.peak_memory(flat_in="inner_steps")
    @pytest.mark.parametrize("inner_steps", [5, 50])
    def test_memory_does_not_grow(inner_steps): ...

What is measured are the tensor bytes that the test function makes and that are alive at once (`bilevel_profiling.meters.Tensors`): the same on
every machine. Whether a peak depends on a parameter is known when all tests have run. A contract broken across tests is then reported as one failed
test more, by the process that collects the reports, so that it works the same under pytest-xdist.

torch is imported by the first test that has the mark or uses the fixture, not by the plugin.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from bilevel_profiling import sizes
from bilevel_profiling.contract import Contract, Growth, above, contract

if TYPE_CHECKING:
    from bilevel_profiling.meters.tensors import Tensors

MARK = "peak_memory"
_CONTRACT = pytest.StashKey[Contract]()
_PEAK = pytest.StashKey[int]()
_GROUPS = pytest.StashKey["Groups"]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(max_bytes=..., flat_in=..., tolerance=..., max_slope=...): limits the tensor bytes that are alive at once in the test, "
        f"or how they grow with a parameter of it (bilevel_profiling)",
    )
    config.stash[_GROUPS] = Groups()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Read the marks, so that a mistake in one is told before any test runs."""
    for item in items:
        marks = list(item.iter_markers(MARK))
        if marks:
            try:
                item.stash[_CONTRACT] = _stated(item, marks)
            except ValueError as error:
                raise pytest.UsageError(f"{item.nodeid}: the mark {MARK} {error}") from None


def _stated(item: pytest.Item, marks: list[pytest.Mark]) -> Contract:
    import unittest

    if not isinstance(item, pytest.Function) or (isinstance(item.cls, type) and issubclass(item.cls, unittest.TestCase)):
        raise ValueError("works on test functions and methods of plain classes, not on unittest.TestCase or other items; write a test function")
    positional = [value for mark in marks for value in mark.args]
    # The nearest mark comes first, and its arguments hold.
    arguments = {name: value for mark in reversed(marks) for name, value in mark.kwargs.items()}
    return contract(positional, arguments, _parameters(item))


def _parameters(item: pytest.Function) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Measure the test function; what its fixtures made before does not count."""
    stated = pyfuncitem.stash.get(_CONTRACT, None)
    if stated is None:
        return (yield)
    with _measured(stated.max_bytes, pytrace=False) as meter:
        result = yield
    pyfuncitem.stash[_PEAK] = meter.peak_bytes
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the peak into the report, which travels to where the reports are collected."""
    report = yield
    stated, peak = item.stash.get(_CONTRACT, None), item.stash.get(_PEAK, None)
    if call.when == "call" and isinstance(item, pytest.Function) and stated is not None and peak is not None:
        report.user_properties.append(("peak_tensor_bytes", peak))
        if report.passed:
            report.peak_memory = [_entry(item, growth, peak) for growth in stated.growths]
    return report


def _entry(item: pytest.Function, growth: Growth, peak: int) -> dict[str, Any]:
    """What the judge needs, in types that can be sent between processes."""
    parameters = _parameters(item)
    value = parameters[growth.parameter]
    others = {name: index for name, index in item.callspec.indices.items() if name != growth.parameter}
    others_said = ", ".join(f"{name}={parameters[name]}" for name in sorted(others))
    test = f"{item.parent.nodeid}::{item.originalname}" if item.parent is not None else item.originalname
    return {
        "key": [test, growth.argument, sorted(others.items())],
        "name": f"{test}[{', '.join(filter(None, (growth.argument, others_said)))}]",
        "location": list(item.location),
        "growth": dataclasses.asdict(growth),
        "value": value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value),
        "peak": peak,
    }


@dataclasses.dataclass
class Group:
    """Tests that differ in one parameter alone, and the peaks they had."""

    name: str
    location: tuple[str, int | None, str]
    growth: Growth
    peaks: dict[int | float | str, int]
    judged: bool = False


class Groups:
    """What the reports of all tests say together."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one peak; of a test that ran again, the last."""
        fresh = Group(entry["name"], tuple(entry["location"]), Growth(**entry["growth"]), {})
        self._groups.setdefault(repr(entry["key"]), fresh).peaks[entry["value"]] = entry["peak"]

    def reports(self) -> Iterator[pytest.TestReport]:
        """The verdicts on all groups of which more than one value was measured."""
        for group in self._groups.values():
            if len(group.peaks) < 2:
                continue
            group.judged = True
            broken = group.growth.broken_by(list(group.peaks.items()))
            yield pytest.TestReport(
                nodeid=group.name,
                location=group.location,
                keywords={},
                outcome="failed" if broken else "passed",
                longrepr=broken or None,
                when="call",
            )

    def open(self) -> Iterator[str]:
        """A line on each contract that was not judged."""
        for group in self._groups.values():
            if not group.judged:
                values = ", ".join(f"{group.growth.parameter}={value} ({sizes.text(peak)})" for value, peak in group.peaks.items())
                yield f"{group.name}: only {values} was measured" if len(group.peaks) == 1 else f"{group.name}: the run was stopped before the end"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the peaks, also those that come from other processes."""
    for entry in getattr(report, "peak_memory", ()):
        _current[-1].add(entry)
