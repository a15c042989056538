"""Sizes in bytes, as people write them on a command line."""

import re

from bilevel_profiling.records import units

_UNITS = {"": 1, "b": 1, **{f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", 1)}


def parse(text: str | int) -> int:
    """Bytes of a size: an int, or a number with a unit. 1GiB is 2^30 bytes, 1GB is 10^9.

    Raises:
        ValueError: it is no size, or not positive.

    Example:
        >>> parse("24GiB"), parse("1.5 kB"), parse(7)
        (25769803776, 1500, 7)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(text), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or isinstance(text, bool) or float(found[1]) * unit < 1:
        raise ValueError(
            f"{text!r} is no size; write bytes, or a number with KiB, MiB, GiB or TiB, such as 24GiB (kB, MB, GB are "
            f"powers of ten)"
        )
    return round(float(found[1]) * unit)


text = units.size
"""How a size is written."""
