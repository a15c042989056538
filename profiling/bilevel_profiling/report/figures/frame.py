"""What a figure is to the views that show it."""

import dataclasses

from bilevel_profiling.report.figures.markup import Markup


@dataclasses.dataclass(frozen=True)
class Panel:
    """A small drawing that a script can read out point by point; without one, the readout tells its peak."""

    name: str
    drawing: Markup
    value: str
    place: str
    where: str
    data: str
    """JSON, see page.js."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure: its drawing (SVG), the heading above and the note below; `panels` are small drawings under one
    heading.
    """

    key: str
    title: str
    note: str
    drawing: Markup | None = None
    panels: tuple[Panel, ...] = ()
    legend: tuple[str, ...] = ()
    """The phases that the colors of the panels stand for."""
    main: bool = False
    """Whether report.md shows it too."""
