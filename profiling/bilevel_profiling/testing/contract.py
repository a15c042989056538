"""Memory contracts of tests: what a mark asks for, and whether measured peaks keep it. Pure functions, no torch, no
pytest.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_profiling.records import sizes
from bilevel_profiling.records.record import Alive

_ARGUMENTS = ("max_bytes", "flat_in", "tolerance", "max_slope")
_MOST_SHOWN = 8

Peak = tuple[int | float | str, int]
"""(value of the parameter, peak bytes)."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the peak may depend on a parameter of the test.

    Attributes:
        parameter: its name.
        tolerance: bytes by which the peaks may differ; None where their slope is limited instead.
        slope: bytes by which the peak may grow for each 1 that the parameter grows.
    """

    parameter: str
    tolerance: int | None = None
    slope: int | None = None

    @property
    def argument(self) -> str:
        """How it was written in the mark."""
        return f"flat_in={self.parameter}" if self.tolerance is not None else f"max_slope={self.parameter}"

    def broken_by(self, peaks: Sequence[Peak]) -> str:
        """A sentence on how peaks of several values break it; "" when they keep it.

        Example:
            >>> Growth("inner_steps", tolerance=0).broken_by([(5, 2**20), (50, 10 * 2**20)])
            'peak memory grows with inner_steps: 5: 1.00 MiB, 50: 10.0 MiB (205 KiB per inner_steps); flat_in allows no
            difference'
            >>> Growth("inner_steps", slope=2**20).broken_by([(5, 2**20), (50, 10 * 2**20)])
            ''
        """
        numeric = [(value, peak) for value, peak in peaks if not isinstance(value, str)]
        ordered: list[Any] = sorted(numeric) if len(numeric) == len(peaks) else list(peaks)
        listed = ", ".join(
            f"{value}: {size}"
            for value, size in zip((value for value, _ in ordered), _distinct([p for _, p in ordered]), strict=True)
        )
        if self.tolerance is None:
            return self._too_steep(ordered, listed)
        found = [peak for _, peak in ordered]
        if max(found) - min(found) <= self.tolerance:
            return ""
        rising = len(numeric) == len(peaks) and found == sorted(found) and ordered[0][0] < ordered[-1][0]
        slope = (
            f" ({_signed((found[-1] - found[0]) / (ordered[-1][0] - ordered[0][0]))} per {self.parameter})"
            if rising
            else ""
        )
        allowed = f"a difference of {sizes.text(self.tolerance)}" if self.tolerance else "no difference"
        return (
            f"peak memory {'grows' if rising else 'changes'} with {self.parameter}: {listed}{slope}; "
            f"flat_in allows {allowed}"
        )

    def _too_steep(self, ordered: Sequence[Any], listed: str) -> str:
        assert self.slope is not None
        pairs = [((b[1] - a[1]) / (b[0] - a[0]), a[0], b[0]) for a, b in itertools.pairwise(ordered) if b[0] > a[0]]
        steepest, start, end = max(pairs, default=(0.0, 0, 0), key=lambda pair: pair[0])
        if steepest <= self.slope:
            return ""
        return (
            f"peak memory grows by {_signed(steepest)} per {self.parameter} between {start} and {end}: {listed}; "
            f"max_slope allows {sizes.text(self.slope)}"
        )


@dataclasses.dataclass(frozen=True)
class Contract:
    """What `peak_memory` asks of a test."""

    max_bytes: int | None = None
    growths: tuple[Growth, ...] = ()


def contract(positional: Sequence[Any], arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> Contract:
    """The contract that a mark states.

    Args:
        positional: the mark's positional arguments; there are to be none.
        arguments: its keyword arguments.
        parameters: what the test is parametrized over, with the values of this test.

    Raises:
        ValueError: an argument is wrong, or names no parameter; the message goes on after the name of the test.

    Example:
        >>> contract((), {"max_bytes": "1 KiB", "flat_in": "steps"}, {"steps": 5})
        Contract(max_bytes=1024, growths=(Growth(parameter='steps', tolerance=0, slope=None),))
    """
    unknown = sorted(set(arguments) - set(_ARGUMENTS))
    if positional or unknown:
        given = ", ".join([*map(repr, positional), *unknown])
        raise ValueError(f"was given {given}; it takes {', '.join(f'{name}=' for name in _ARGUMENTS)} by name")
    if not {"max_bytes", "flat_in", "max_slope"} & set(arguments):
        raise ValueError(
            'asks for nothing; write max_bytes="10 MiB", flat_in="name of a parameter", '
            'or max_slope={"name of a parameter": "1 MiB"}'
        )
    if "tolerance" in arguments and "flat_in" not in arguments:
        raise ValueError("was given tolerance, which belongs to flat_in; write both, or neither")
    growths = []
    if "flat_in" in arguments:
        tolerance = 0 if arguments.get("tolerance", 0) in (0, "0") else _bytes("tolerance", arguments["tolerance"])
        growths.append(Growth(_parameter("flat_in", arguments["flat_in"], parameters), tolerance=tolerance))
    slopes = arguments.get("max_slope", {})
    if not isinstance(slopes, Mapping):
        raise ValueError(
            f'was given max_slope={slopes!r}; a dict was needed, such as max_slope={{"inner_steps": "1 MiB"}}'
        )
    for name, slope in slopes.items():
        value = parameters[_parameter("max_slope", name, parameters)]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"was given max_slope for {name}, whose value here is {value!r}; numbers were needed")
        growths.append(Growth(name, slope=_bytes("max_slope", slope)))
    return Contract(_bytes("max_bytes", arguments["max_bytes"]) if "max_bytes" in arguments else None, tuple(growths))


def above(peak: int, limit: int, alive: Sequence[Alive]) -> str:
    """What to say of a peak above its limit.

    Example:
        >>> print(above(4096, 1024, [Alive(bytes=4096, count=1, operator="aten.mm", line="model.py:31")]))
        peak memory is 4.00 KiB, above max_bytes = 1.00 KiB
        alive at the peak:
          4.00 KiB  aten.mm  model.py:31
    """
    found, allowed = _distinct([peak, limit])
    lines = [f"peak memory is {found}, above max_bytes = {allowed}"]
    if alive:
        lines.append("alive at the peak:")
        sized = [(sizes.text(entry.bytes), _origin(entry)) for entry in alive[:_MOST_SHOWN]]
        rest = sum(entry.bytes for entry in alive[_MOST_SHOWN:])
        sized += [(sizes.text(rest), "the rest")] if rest else []
        width = max(len(size) for size, _ in sized)
        lines += [f"  {size:>{width}}  {origin}" for size, origin in sized]
    return "\n".join(lines)


def _origin(entry: Alive) -> str:
    if not entry.operator:
        return "the rest"
    operator = f"{entry.count} x {entry.operator}" if entry.count > 1 else entry.operator
    backward = "backward of " if entry.backward and entry.line else ""
    parts = [operator, backward + entry.line, entry.module, "/".join(filter(None, (entry.phase, entry.span)))]
    return "  ".join(filter(None, parts))


def _bytes(argument: str, value: Any) -> int:
    try:
        return sizes.parse(value)
    except ValueError as error:
        raise ValueError(f"was given {argument}={value!r}: {error}") from None


def _parameter(argument: str, name: Any, parameters: Mapping[str, Any]) -> str:
    if isinstance(name, str) and name in parameters:
        return name
    over = f"only over {', '.join(parameters)}" if parameters else "over nothing"
    raise ValueError(
        f"was given {argument}={name!r}, but the test is parametrized {over}; write "
        f"@pytest.mark.parametrize({str(name)!r}, [5, 50]) above it"
    )


def _distinct(counts: Sequence[int]) -> list[str]:
    """Sizes for reading, in bytes where they would read alike."""
    found = [sizes.text(count) for count in counts]
    alike = len(set(found)) < len(set(counts))
    return [f"{count:,} B" for count in counts] if alike else found


def _signed(size: float) -> str:
    return f"-{sizes.text(round(-size))}" if size < 0 else sizes.text(round(size))
