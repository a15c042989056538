"""One color, marker and dash for each estimator, the same in every figure of a report.

Eight colors told apart by color-blind readers (Okabe and Ito, darkened for white paper, lightened for black), eight
markers and four dashes; where the colors come round again, the marker does not.
"""

import dataclasses
from collections.abc import Sequence

from bilevel_profiling.report.figures.markup import decimal

LIGHT = ("#0a66b0", "#c2410c", "#00795c", "#a03a86", "#8f6a00", "#2f8fc4", "#4b5159", "#7a4a2b")
DARK = ("#6cb2f5", "#ff9466", "#45cfa4", "#e88fcf", "#e0b83e", "#7fd4f2", "#b4bbc4", "#cfa17f")

DOTS = "1 4"
"""The dash of forecasts."""

_FORECAST = " (forecast)"
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3")
_SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "plus", "hexagon", "bar")


@dataclasses.dataclass(frozen=True)
class Style:
    """How one estimator looks. `color` is a place in LIGHT and DARK."""

    place: int
    color: int
    shape: str
    dash: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label, by its place; a forecast looks like what was measured under the same name, dotted."""
    twins = {label: name for label in labels if (name := label.removesuffix(_FORECAST)) != label and name in labels}
    size, found = len(LIGHT), {}
    for place, label in enumerate(label for label in labels if label not in twins):
        shifted = place + place // size
        found[label] = Style(place, place % size, _SHAPES[shifted % len(_SHAPES)], _DASHES[shifted % len(_DASHES)])
    for place, (label, name) in enumerate(twins.items(), start=len(found)):
        found[label] = dataclasses.replace(found[name], place=place, dash=DOTS)
    return found


def outline(shape: str, x: float, y: float, r: float) -> str:
    """Path data of a marker around (x, y); `r` is the radius of the circle of the same visual weight."""
    if shape == "circle":
        return f"M{decimal(x - r)} {decimal(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    t, h = 0.42 * r, 1.2 * r
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.25), (1.15, 0.8), (-1.15, 0.8)),
        "wedge": ((0, 1.25), (1.15, -0.8), (-1.15, -0.8)),
        "diamond": ((0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)),
        "hexagon": ((-0.6, -1.05), (0.6, -1.05), (1.2, 0), (0.6, 1.05), (-0.6, 1.05), (-1.2, 0)),
        "bar": ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    }
    if shape in corners:
        points = [(x + r * dx, y + r * dy) for dx, dy in corners[shape]]
    else:
        cross = (
            (-t, -h),
            (t, -h),
            (t, -t),
            (h, -t),
            (h, t),
            (t, t),
            (t, h),
            (-t, h),
            (-t, t),
            (-h, t),
            (-h, -t),
            (-t, -t),
        )
        points = [(x + dx, y + dy) for dx, dy in cross]
    return "M" + "L".join(f"{decimal(px)} {decimal(py)}" for px, py in points) + "z"
