"""How numbers are written: MiB = 2**20 bytes, milliseconds, GFLOP; three significant digits; a dash for what was not
measured.
"""

import math
from typing import TypeGuard

MISSING = "-"
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a number to calculate with: not None, NaN, infinite, text or a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rounding(dtype: str) -> float:
    """The relative error below which a hypergradient in this dtype differs from an exact one by rounding alone.

    Some hundred units in the last place of float32 (an unroll adds them up); of the half-width types, whose units are
    large, a few.

    Example:
        >>> rounding("torch.float64"), rounding("float32")
        (1e-12, 1e-05)
    """
    return _ROUNDING.get(dtype.removeprefix("torch."), _ROUNDING["float32"])


def significant(value: float | None) -> str:
    """Three significant digits without an exponent where that is readable: 1,234, 22.1, 3.45, 0.0314, 1.2e-07 (two
    where there is an exponent).
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7 or size < 9.995e-4:
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:,.0f}"
    decimals = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4 if size >= 0.009995 else 5
    return f"{value:.{decimals}f}"


def mebibytes(count: float | None) -> str:
    """Bytes as a bare number of MiB, for columns that name the unit."""
    return significant(None if count is None else count / 2**20)


def milliseconds(seconds: float | None) -> str:
    """Seconds as a bare number of ms, for columns that name the unit."""
    return significant(None if seconds is None else seconds * 1e3)


def gigaflop(count: float | None) -> str:
    """Floating-point operations as a bare number of GFLOP."""
    return significant(None if count is None else count / 1e9)


def size(count: float | None) -> str:
    """Bytes with the unit that suits them, for sentences.

    Example:
        >>> size(512), size(3 * 2**20), size(25_000_000_000)
        ('512 B', '3.00 MiB', '23.3 GiB')
    """
    if count is None or not math.isfinite(count):
        return significant(count)
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{significant(count / factor)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds with the unit that suits them, for sentences."""
    if seconds is None or not math.isfinite(seconds):
        return significant(seconds)
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= factor:
            return f"{significant(seconds / factor)} {unit}"
    return f"{significant(seconds * 1e6)} µs"


def ratio(value: float | None) -> str:
    """A multiple: 0.22x."""
    if value is None or not math.isfinite(value):
        return significant(value)
    return f"{value:.2f}x" if 0.01 <= value < 9.995 else f"{significant(value)}x"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    if value is None or not math.isfinite(value):
        return significant(value)
    return f"{value:,.0f}" if value == int(value) else significant(value)


def cosine(value: float | None) -> str:
    """Four decimals; 1.0000 is the same direction."""
    return MISSING if value is None else f"{value:.4f}"


def tick(value: float) -> str:
    """An axis label: plain while short, a power of ten beyond."""
    if value == 0:
        return "0"
    exponent = _exponent(value)
    if not -3 <= exponent <= 4:
        return power_of_ten(value)
    return f"{value:,.{max(0, 3 - exponent)}f}".rstrip("0").rstrip(".") if exponent < 3 else f"{value:,.0f}"


def power_of_ten(value: float) -> str:
    """An axis label with an exponent, except for 1."""
    exponent = _exponent(value)
    mantissa = round(value / 10.0**exponent, 2)
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return "1" if value == 1 else power if mantissa == 1 else f"{mantissa:g}·{power}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)
