"""Parts that all figures are made of: the frame with its axes, lines, markers, and labels that do not collide."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from bilevel_profiling.report.content.text import shorten
from bilevel_profiling.report.figures.markup import Markup, decimal, tag
from bilevel_profiling.report.figures.palette import Style, outline
from bilevel_profiling.report.figures.scales import Scale

WIDTH = 460.0
CHARACTER = 6.9
"""Generous width of a letter of a label, in the figure's units, at the size that phones get."""
LINE = 15.0


@dataclasses.dataclass(frozen=True)
class Frame:
    """The area that data occupies inside a figure."""

    left: float
    right: float
    top: float
    bottom: float


def figure(key: str, title: str, description: str, height: float, *parts: object, width: float = WIDTH) -> Markup:
    """A whole figure, with a title and a description for those who do not see it."""
    return tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", description, id=f"{key}-d"),
        *parts,
        class_="fig",
        viewBox=f"0 0 {decimal(width)} {decimal(height)}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def axes(frame: Frame, x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    """Horizontal grid lines with the values of y, ticks of x, and what both mean (the meaning of y stands above the
    axis).
    """
    parts: list[Markup] = [text(0.0, frame.top - 14, y_label, "ax-name")]
    for value, label in y.ticks:
        place = y(value)
        parts.append(tag("path", d=f"M{decimal(frame.left)} {decimal(place)}H{decimal(frame.right)}", class_="grid"))
        parts.append(text(frame.left - 7, place + 4, label, "tick", "end"))
    parts.append(tag("path", d=f"M{decimal(frame.left)} {decimal(frame.bottom)}H{decimal(frame.right)}", class_="axis"))
    for value, label in x.ticks:
        place = x(value)
        parts.append(tag("path", d=f"M{decimal(place)} {decimal(frame.bottom)}v4", class_="axis"))
        parts.append(text(place, frame.bottom + 17, label, "tick", "middle"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 35, x_label, "ax-name", "middle"))
    return tag("g", *parts, class_="axes")


def text(x: float, y: float, content: str, class_: str, anchor: str | None = None) -> Markup:
    """A line of text."""
    return tag("text", content, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def series(style: Style, *parts: object) -> Markup:
    """Everything that belongs to one estimator, in its color."""
    return tag("g", *parts, class_=f"s{style.color}", data_s=style.place)


def line(points: Sequence[tuple[float, float] | None], style: Style) -> Markup:
    """A line in the style of an estimator; None breaks it."""
    pieces, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{decimal(point[0])} {decimal(point[1])}")
        pen = "L"
    return tag("path", d=Markup("".join(pieces)), class_="line", stroke_dasharray=style.dash or None)


def marker(style: Style, x: float, y: float, tip: str, radius: float = 4.0, class_: str = "mark") -> Markup:
    """The estimator's marker, with a tooltip."""
    return tag("path", tag("title", tip), d=Markup(outline(style.shape, x, y, radius)), class_=class_)


def cross(x: float, y: float, tip: str) -> Markup:
    """A failed run."""
    path = f"M{decimal(x - 4)} {decimal(y - 4)}l8 8m0 -8l-8 8"
    return tag("path", tag("title", tip), d=Markup(path), class_="cross")


def clip(label: str) -> str:
    """A label short enough to stand beside a line."""
    return shorten(label, 26)


def label_room(labels: Iterable[str]) -> float:
    """Width to leave for labels beside the lines."""
    return 26 + CHARACTER * max((len(clip(label)) for label in labels), default=0)


def end_labels(frame: Frame, ends: Sequence[tuple[str, Style, float, float]]) -> Markup:
    """Labels to the right of the frame, each tied to the end (x, y) of its line, moved apart where they would
    overlap.
    """
    lowest = frame.bottom + 4
    places = spread(
        [y for _, _, _, y in ends], min(LINE, (lowest - frame.top + 8) / max(1, len(ends))), frame.top - 4, lowest
    )
    parts = []
    for (label, style, x, y), place in zip(ends, places, strict=True):
        tie = [(x + 6, y), (frame.right + 6, y), (frame.right + 14, place)]
        leader = tag("path", d=Markup("M" + "L".join(f"{decimal(a)} {decimal(b)}" for a, b in tie)), class_="leader")
        parts.append(series(style, leader, text(frame.right + 18, place + 4, clip(label), "label")))
    return tag("g", *parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least `gap` apart and inside [low, high] if there is room for all."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed: list[float] = []
    for n in order:
        placed.append(max(wanted[n], low, placed[-1] + gap if placed else -math.inf))
    limit = high
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], limit)
        limit = placed[n] - gap
    found = [0.0] * len(wanted)
    for n, place in zip(order, placed, strict=True):
        found[n] = place
    return found


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def point_labels(
    frame: Frame, points: Sequence[tuple[str, float, float]], lines: Sequence[Box] = (), limit: float = WIDTH
) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of a label for each point: of several places around it, a near one that covers no point and no
    other label.

    Labels end before `limit`. Covering one of `lines` is not forbidden but costs as much as standing a line of text
    further away. Labels are placed one by one, then each is placed anew a few times, as the others now stand.
    """
    marks = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in points]
    placed: dict[int, tuple[tuple[float, float, str], Box]] = {}
    for _ in range(4):
        for number, (label, x, y) in enumerate(points):
            others = [*marks, *(box for other, (_, box) in placed.items() if other != number)]
            options = [(x + dx, y + dy, anchor) for dx, dy, anchor in _PLACES]
            boxes = [_box(*option, CHARACTER * 1.08 * len(clip(label))) for option in options]
            costs = [place + _cost(box, frame, limit, others, lines) for place, box in enumerate(boxes)]
            best = costs.index(min(costs))
            placed[number] = options[best], boxes[best]
    return [placed[number][0] for number in range(len(points))]


def _cost(box: Box, frame: Frame, limit: float, others: Sequence[Box], lines: Sequence[Box]) -> float:
    outside = box[0] < frame.left or box[2] > limit or box[1] < frame.top - 12 or box[3] > frame.bottom + 2
    return (
        1000 * outside
        + 100 * sum(_overlap(box, other) for other in others)
        + 7 * any(_overlap(box, other) for other in lines)
    )


_PLACES = [
    (dx, dy + sign * reach, anchor)
    for reach in (0.0, 13.0, 26.0, 39.0, 52.0)
    for dx, dy, anchor, sign in (
        (9.0, 4.0, "start", -1),
        (9.0, 4.0, "start", 1),
        (-9.0, 4.0, "end", -1),
        (-9.0, 4.0, "end", 1),
        (0.0, -10.0, "middle", -1),
        (0.0, 18.0, "middle", 1),
    )
]
"""Offsets and anchors of a label around its point, the preferred ones first."""


def _box(x: float, y: float, anchor: str, length: float) -> Box:
    left = x - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
    return left, y - 10, left + length, y + 3


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def described(pairs: Iterable[tuple[str, str]]) -> str:
    """Pairs as "label: value; ...", for the description of a figure."""
    return "; ".join(f"{label}: {value}" for label, value in pairs) + "."
