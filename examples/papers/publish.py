"""Where a paper's script leaves its figure and its table: in the docs, with the command that made them.

Small runs (BILEVEL_EXAMPLE_SMALL=1, the smoke test of `make examples`) leave them in a temporary folder.
"""

import datetime
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"
DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "papers" / "made"


def publish(name: str, figure: Figure, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write NAME.png and NAME.md (a Markdown table, the command and the machine), and print the table.

    Args:
        name: of both files; by custom that of the script.
        figure: drawn and finished.
        header: a title for each column, with its unit.
        rows: one sequence of cells a row; numbers are written to three digits.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bilevel-")) if SMALL else DOCS
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    table = "\n".join(
        "| " + " | ".join(cells) + " |"
        for cells in (list(header), ["---"] * len(header), *([_written(cell) for cell in row] for row in rows))
    )
    script = pathlib.Path(sys.argv[0]).name
    made = (
        f"Made by `python examples/papers/{script}` on {datetime.date.today()}: torch {torch.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, CPU."
    )
    (folder / f"{name}.md").write_text(f"{table}\n\n{made}\n", encoding="utf-8")
    print(table, made, f"in {folder}", sep="\n\n")


def _written(cell: Any) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
