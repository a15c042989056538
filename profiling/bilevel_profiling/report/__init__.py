"""Records as something to read: terminal tables, report.md, one self-contained index.html, and a PNG for a README.

Everything here is a function of records alone; nothing imports torch, and rich and matplotlib are imported only when
they are needed.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bilevel_profiling.records.record import Record
from bilevel_profiling.report import markdown
from bilevel_profiling.report.content.groups import estimators, group
from bilevel_profiling.report.figures import case_figures, standalone, styles
from bilevel_profiling.report.figures.png import write_png
from bilevel_profiling.report.html import page as html
from bilevel_profiling.report.terminal.alive import print_alive
from bilevel_profiling.report.terminal.table import print_table

__all__ = ["print_alive", "print_table", "write", "write_png"]


def write(records: Iterable[Record], out: Path, command: str = "") -> Path:
    """Write `out`/index.html (self-contained), `out`/report.md and the figures it shows, `out`/figures/*.svg.

    Each file is replaced as a whole: a reader never sees half of one.

    Args:
        records: what was measured; any number, of any cases, failures included.
        out: a folder; made if missing.
        command: the command line that made the records.

    Returns:
        The path of index.html.

    Raises:
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> from bilevel_profiling.records.record import Record
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write([Record(case="toy", estimator="unrolled", inner_steps=5)], Path(folder)).name
        'index.html'
    """
    records, out = list(records), Path(out)
    groups = group(records)
    looks = styles(estimators(groups))
    shown: dict[str, list[tuple[str, str]]] = {}
    for each, key in zip(groups, html.unique_keys(groups), strict=True):
        for figure in case_figures(each, looks, key):
            if figure.drawing and figure.main:
                _replace(out / "figures" / f"{figure.key}.svg", standalone(figure.drawing))
                shown.setdefault(each.title, []).append((figure.title, f"figures/{figure.key}.svg"))
    _replace(out / "report.md", markdown.render(records, command=command, figures=shown))
    page = out / "index.html"
    _replace(page, html.render(records, command=command))
    return page


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
