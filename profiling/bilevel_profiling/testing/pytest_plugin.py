"""A pytest plugin: memory contracts of tests, with the mark and the fixture `peak_memory`.

    @pytest.mark.peak_memory(max_bytes="10 MiB")
    def test_a_step_fits(): ...

    @pytest.mark.peak_memory(flat_in="inner_steps")
    @pytest.mark.parametrize("inner_steps", [5, 50])
    def test_memory_does_not_grow(inner_steps): ...

What is measured are the tensor bytes that the test function makes and that are alive at once
(`bilevel_profiling.meters.Tensors`): the same on every machine. Whether a peak depends on a parameter is known when all
tests have run. A contract broken across tests is then reported as one failed test more, by the process that collects
the reports, so that it works the same under pytest-xdist.

torch is imported by the first test that has the mark or uses the fixture, not by the plugin.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pytest

from bilevel_profiling.records import sizes
from bilevel_profiling.testing.contract import Contract, Growth, above, contract

if TYPE_CHECKING:
    from bilevel_profiling.meters.tensors import Tensors

MARK = "peak_memory"
_CONTRACT = pytest.StashKey[Contract]()
_PEAK = pytest.StashKey[int]()
_WRONG = pytest.StashKey[str]()
_ENTRY = pytest.StashKey[list[dict[str, Any]]]()
_SENT = "bilevel_peak_memory"
_HIDDEN = (
    "the peak is not known: an engine that compiles or captures was at work, whose tensors are not seen. Test with "
    "engine=bilevel.Eager(), or test bilevel_profiling.measure(Case(..., engine=...)).peak_tensor_bytes"
)
"""Attribute of a report: pytest-xdist sends those that are plain data."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(max_bytes=..., flat_in=..., tolerance=..., max_slope=...): limits the tensor bytes that are alive at "
        f"once in the test, or how they grow with a parameter of it (bilevel_profiling)",
    )
    if not hasattr(config, "workerinput"):  # of pytest-xdist: its workers send their reports here
        config.pluginmanager.register(Judge(config), "bilevel_profiling_judge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Read the marks, so that a mistake in one is told before any test runs."""
    names = Names()
    for item in items:
        marks = list(item.iter_markers(MARK))
        if marks:
            try:
                item.stash[_CONTRACT] = stated = _stated(item, marks)
            except ValueError as error:
                said = f"{item.nodeid}: the mark {MARK} {error}"
                if not hasattr(item.config, "workerinput"):
                    raise pytest.UsageError(said) from None
                item.stash[_WRONG] = said  # pytest-xdist does not pass usage errors on: there the test fails
                continue
            assert isinstance(item, pytest.Function)
            item.stash[_ENTRY] = [_entry(item, growth, names) for growth in stated.growths]


def _stated(item: pytest.Item, marks: list[pytest.Mark]) -> Contract:
    import unittest

    if not isinstance(item, pytest.Function) or (
        isinstance(item.cls, type) and issubclass(item.cls, unittest.TestCase)
    ):
        raise ValueError(
            "works on test functions and methods of plain classes, not on unittest.TestCase or other items; write a "
            "test function"
        )
    positional = [value for mark in marks for value in mark.args]
    # The nearest mark comes first, and its arguments hold.
    arguments = {name: value for mark in reversed(marks) for name, value in mark.kwargs.items()}
    return contract(positional, arguments, _parameters(item))


def _parameters(item: pytest.Function) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def _entry(item: pytest.Function, growth: Growth, names: "Names") -> dict[str, Any]:
    """What the judge needs to know of a test, in types that can be sent between processes."""
    parameters = _parameters(item)
    test = f"{item.parent.nodeid}::{item.originalname}" if item.parent is not None else item.originalname
    said = {name: names.of(test, name, value) for name, value in sorted(parameters.items())}
    value = parameters[growth.parameter]
    others = [f"{name}={told}" for name, (told, _) in said.items() if name != growth.parameter]
    suffix = ", ".join([growth.argument, *others])
    path, line, _ = item.location
    return {
        "key": [test, growth.argument, [number for name, (_, number) in said.items() if name != growth.parameter]],
        "name": f"{test}[{suffix}]",
        "location": [path, line, f"{item.originalname}[{suffix}]"],
        "growth": dataclasses.asdict(growth),
        "test": item.nodeid,
        "value": value
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else said[growth.parameter][0],
    }


class Names:
    """Names for the values of parameters that are the same in every process, which repr and id are not."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[Any]] = {}

    def of(self, test: str, parameter: str, value: Any) -> tuple[str, int]:
        """How a value is told, and which of the values of its parameter it is."""
        seen = self._seen.setdefault((test, parameter), [])
        plain = isinstance(value, (bool, int, float, str, bytes, type(None)))
        number = next(
            (
                n
                for n, other in enumerate(seen)
                if other is value or (plain and type(other) is type(value) and other == value)
            ),
            len(seen),
        )
        if number == len(seen):
            seen.append(value)
        told = str(getattr(value, "__name__", value))
        return (f"{parameter}{number}" if " at 0x" in told else told), number


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose mark is wrong."""
    if _WRONG in item.stash:
        pytest.fail(item.stash[_WRONG], pytrace=False)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Measure the test function; what its fixtures made before does not count."""
    stated = pyfuncitem.stash.get(_CONTRACT, None)
    if stated is None:
        return (yield)
    with _metered() as meter:
        result = yield
    pyfuncitem.stash[_PEAK] = meter.peak_bytes
    pyfuncitem.user_properties.append(("peak_tensor_bytes", meter.peak_bytes))
    _check(meter, stated.max_bytes, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the peak into the report, which travels to where the reports are collected."""
    report = yield
    if report.when == "call" and report.passed and _PEAK in item.stash:
        report.__dict__[_SENT] = [{**entry, "peak": item.stash[_PEAK]} for entry in item.stash[_ENTRY]]
    return report


@dataclasses.dataclass
class Group:
    """Tests that differ in one parameter alone: by test, the value and the peak it had."""

    name: str
    location: tuple[str, int | None, str]
    growth: Growth
    peaks: dict[str, tuple[int | float | str, int]] = dataclasses.field(default_factory=dict)
    judged: bool = False


class Judge:
    """Listens to the reports of all tests, those of other processes included, and judges what they say together."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._groups: dict[str, Group] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in the peaks of a test; of one that ran again, the last."""
        for entry in getattr(report, _SENT, ()):
            group = Group(entry["name"], tuple(entry["location"]), Growth(**entry["growth"]))
            self._groups.setdefault(repr(entry["key"]), group).peaks[entry["test"]] = (entry["value"], entry["peak"])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """After the last test, report the contracts that are broken as failed tests."""
        result = yield
        for group in self._groups.values():
            if len(group.peaks) > 1:
                group.judged = True
                broken = group.growth.broken_by(list(group.peaks.values()))
                session.testscollected += bool(broken)  # one more than was announced, or the progress would pass 100 %
                self._report(group, broken)
        return result

    def _report(self, group: Group, broken: str) -> None:
        outcome: Literal["passed", "failed"] = "failed" if broken else "passed"
        report = pytest.TestReport(group.name, group.location, {}, outcome, broken or None, "call")
        if broken:
            self._config.hook.pytest_runtest_logreport(report=report)
        elif (last_failed := self._config.pluginmanager.get_plugin("lfplugin")) is not None:
            last_failed.pytest_runtest_logreport(
                report=report
            )  # a contract that is kept is no test to count, but --lf is to forget that it failed

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Name the contracts that could not be judged: silence would read as success."""
        found = [group for group in self._groups.values() if not group.judged]
        if not found:
            return
        terminalreporter.section("peak memory: not judged", yellow=True)
        for group in found:
            measured = ", ".join(
                f"{group.growth.parameter}={value} ({sizes.text(peak)})" for value, peak in group.peaks.values()
            )
            why = (
                "two values are needed: run the test with all of them"
                if len(group.peaks) < 2
                else "the run was stopped before the last test"
            )
            terminalreporter.line(f"{group.name}: only {measured} was measured; {why}")


class PeakMemory:
    """What the fixture `peak_memory` gives: measuring a part of a test.

    Example:
        >>> import torch
        >>> peak_memory = PeakMemory()
        >>> with peak_memory(max_bytes="1 KiB") as meter:
        ...     _ = torch.ones(256)
        >>> meter.peak_bytes
        1024
        >>> peak_memory.of(lambda: torch.ones(256) + 1)
        2048
    """

    def __call__(self, *, max_bytes: int | str | None = None) -> contextlib.AbstractContextManager["Tensors"]:
        """A context manager that yields the meter; its `peak_bytes` counts what the block makes.

        Args:
            max_bytes: the test fails when the peak is above; bytes, or a size such as "10 MiB".

        Raises:
            ValueError: `max_bytes` is no size.
        """
        return _limited(None if max_bytes is None else sizes.parse(max_bytes))

    def of(self, call: Callable[[], object]) -> int:
        """Peak tensor bytes of one call of a function without arguments."""
        with self() as meter:
            call()
        return meter.peak_bytes


@pytest.fixture
def peak_memory() -> PeakMemory:
    """Measure parts of a test: a context manager with a limit, and `of` for the number of bytes that a function
    needs.
    """
    return PeakMemory()


@contextlib.contextmanager
def _limited(limit: int | None) -> Iterator["Tensors"]:
    """A part of a test, which fails when its peak is above the limit; a block that raises is not judged."""
    __tracebackhide__ = True
    with _metered() as meter:
        yield meter
    _check(meter, limit, pytrace=True)


def _metered() -> "Tensors":
    from bilevel_profiling.meters.tensors import Tensors

    gc.collect()  # so that nothing that was made before is freed during the measurement
    return Tensors()


def _check(meter: "Tensors", limit: int | None, pytrace: bool) -> None:
    __tracebackhide__ = True
    if meter.hidden:
        pytest.fail(_HIDDEN, pytrace=pytrace)
    if limit is not None and meter.peak_bytes > limit:
        pytest.fail(above(meter.peak_bytes, limit, meter.alive()), pytrace=pytrace)
