"""Engines by name: those that `bilevel compare --engine` takes, and those that a case file adds."""

import difflib
from collections.abc import Iterable, Mapping

import bilevel as bl

_NAMES = {"eager": "Eager", "compiled": "Compiled", "captured": "Captured"}


def known() -> dict[str, bl.Engine]:
    """The library's own, with their defaults.

    Example:
        >>> known()["compiled"]
        Compiled(backend='inductor', check=True)
    """
    return {name: getattr(bl, kind)() for name, kind in _NAMES.items() if hasattr(bl, kind)}


def named(names: Iterable[str], own: Mapping[str, bl.Engine]) -> dict[str, bl.Engine]:
    """The engines of these names: those of a case come first.

    Raises:
        ValueError: a name is none of them.

    Example:
        >>> import bilevel as bl
        >>> named(["eager", "traced"], {"traced": bl.Compiled(backend="graph")})
        {'eager': Eager(), 'traced': Compiled(backend='graph', check=True)}
    """
    there = {**known(), **own}
    found: dict[str, bl.Engine] = {}
    for name in names:
        if name not in there:
            close = difflib.get_close_matches(str(name), there, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"there is no engine {name!r}; there are {', '.join(there)}.{hint}")
        found[name] = there[name]
    return found
