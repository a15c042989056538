"""What a figure is to the views that show it."""

import dataclasses

from ..markup import Markup


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure: its drawing (SVG), the heading above and the note below; `panels` are small drawings under one heading, each named."""

    key: str
    title: str
    note: str
    drawing: Markup | None = None
    panels: tuple[tuple[str, Markup], ...] = ()
