"""Reports are functions of records: golden text for what people read, structure and safety for the page, and no input
that breaks them.

To accept changed text: UPDATE_GOLDEN=1 python -m pytest tests/profiling/test_report.py, then read the diff.
"""

import dataclasses
import html.parser
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from bilevel_profiling import report
from bilevel_profiling.records import units
from bilevel_profiling.records.record import Alive, Iteration, Phase, Record, Target
from bilevel_profiling.report import markdown
from bilevel_profiling.report.content import columns, footnotes, groups, laws, loops, summary
from bilevel_profiling.report.content.text import shorten
from bilevel_profiling.report.figures import case_figures, loop, palette, scales, svg, timeline
from bilevel_profiling.report.html import page

HERE = Path(__file__).parent
COMMAND = "bilevel compare hypercleaning fewshot --inner-steps 10,50,200 --out report"
EVIL = '<script>alert(1)</script> | **x** `y` [z](http://evil.example/) & "q" \x1b[31m\n_u_'


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDS: list[Record] = _load(HERE / "records_factory.py").make()


def _printed(records: list[Record], width: int) -> str:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    report.print_table(records, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _golden(name: str, text: str) -> None:
    path = HERE / "golden" / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


def _evil() -> list[Record]:
    shared = {"case": EVIL, "settings": EVIL, "reason": EVIL, "reference_note": EVIL, "device": EVIL, "dtype": EVIL}
    return [
        Record(
            estimator=f"{EVIL} {number}",
            status="OK" if number else EVIL,
            inner_steps=k,
            peak_tensor_bytes=2**20 * k * (number + 1),
            wall_seconds=0.1 * k,
            program_relative_error=0.1,
            metrics={EVIL: 0.5},
            metrics_before={EVIL: 0.3},
            environment={EVIL: EVIL},
            calls={EVIL: 3},
            phases={EVIL: Phase(peak_tensor_bytes=3)},
            iterations=tuple(
                Iteration(
                    index=n,
                    outer_loss=1 / (n + 1),
                    status=EVIL if n % 9 == 0 else "OK",
                    wall_seconds=0.1,
                    peak_tensor_bytes=10**12,
                )
                for n in range(500)
            ),
            timeline=((0, 0, EVIL, EVIL, EVIL), (5, 3 * 2**20, "inner", EVIL, EVIL), (9, 0, "outer", "", "")),
            alive=tuple(
                Alive(
                    bytes=2**20,
                    count=2,
                    phase=EVIL,
                    span=EVIL,
                    operator=EVIL,
                    module=EVIL,
                    line=EVIL,
                    backward=n % 2 == 0,
                )
                for n in range(12)
            ),
            notes=(EVIL, f"{EVIL} {number}"),
            source="measured" if k == 1 else EVIL,
            memory_growth=EVIL,
            roofline_seconds=0.1,
            roofline_device=EVIL,
            **shared,
        )
        for number in range(3)
        for k in (1, 10)
    ]


def _nonfinite() -> list[Record]:
    return [
        Record(
            case="c",
            estimator=label,
            inner_steps=k,
            peak_tensor_bytes=0,
            wall_seconds=math.nan,
            wall_seconds_low=math.nan,
            wall_seconds_high=math.inf,
            program_relative_error=math.nan if label == "a" else math.inf,
            program_cosine=math.nan,
            solution_relative_error=0.0,
            iterations=(
                Iteration(index=0, outer_loss=math.nan, status="NONFINITE"),
                Iteration(index=1, outer_loss=math.inf),
            ),
            metrics={"accuracy": math.nan},
            metrics_before={"accuracy": math.inf},
            timeline=((0, 0, "inner", "", ""),),
            roofline_seconds=math.inf,
            memory_growth="constant",
        )
        for label in "ab"
        for k in (1, 2)
    ]


PARTIAL = {
    "nothing": [],
    "one record": RECORDS[:1],
    "names alone": [Record(case="toy", estimator="a")],
    "one K": [record for record in RECORDS if record.inner_steps == 200],
    "holes": [record for place, record in enumerate(RECORDS) if place % 3 != 1],
    "all failed": [Record(case="c", estimator=e, inner_steps=k, status="OUT_OF_MEMORY") for e in "ab" for k in (1, 2)],
    "not finite": _nonfinite(),
    "zeros": [
        Record(case="c", estimator=e, inner_steps=k, peak_tensor_bytes=b, wall_seconds=0.0)
        for e, b in (("a", 0), ("b", 9))
        for k in (0, 5)
    ],
    "any callable": [Record(case="f", estimator=e, peak_tensor_bytes=5000, wall_seconds=1e-5) for e in "fg"],
    "many": [
        dataclasses.replace(RECORDS[2], estimator=f"number {n}", inner_steps=k, seed=s)
        for n in range(19)
        for k in (10, 200)
        for s in (0, 1)
    ],
    "long names": [
        dataclasses.replace(
            RECORDS[2], case="y" * 300, estimator="x" * 200, metrics={f"metric {n}": 0.1 * n for n in range(30)}
        )
    ],
    "odd text": [Record(case="\ud800x", estimator="é漢字", inner_steps=3, peak_tensor_bytes=4, kept_tensor_bytes=10)],
    "two devices": [
        dataclasses.replace(r, device="cuda", cuda_allocated_bytes=r.peak_tensor_bytes, peak_tensor_bytes=None)
        for r in RECORDS[:9]
    ]
    + RECORDS[:9],
    "hostile": _evil(),
    "much memory": [
        Record(
            case="c",
            estimator="a",
            inner_steps=k,
            peak_tensor_bytes=10**12 * k,
            resident_bytes=10**13,
            memory_growth="linear",
            timeline=((0, 0, "inner", "", ""), (10**9, 10**12 * k, "inner", "hvp", "aten.mm")),
            alive=(Alive(bytes=10**12 * k, count=10**6),),
        )
        for k in (1, 10, 100)
    ],
    "nothing alive": [
        Record(
            case="c",
            estimator="a",
            inner_steps=1,
            peak_tensor_bytes=0,
            alive=(Alive(bytes=0, count=0),),
            timeline=((3, 0, "", "", ""),),
        )
    ],
    "a training run": [
        Record(
            case="run",
            estimator="",
            iterations=tuple(Iteration(index=n, metrics={"loss": 1 / (n + 1), EVIL: math.inf}) for n in range(500)),
        )
    ],
    "CUDA": [
        Record(
            case="c",
            estimator=e,
            device="cuda",
            inner_steps=k,
            cuda_allocated_bytes=2**20 * k,
            cuda_workspace_bytes=8 * 2**20,
            cuda_retries=k,
            cuda_out_of_memory_events=0,
            memory_growth="sqrt",
        )
        for e in "ab"
        for k in (1, 5, 20)
    ],
}


def test_markdown_is_the_golden_text() -> None:
    _golden(
        "report.md",
        markdown.render(
            RECORDS, COMMAND, {"fewshot": [("Peak memory against inner steps", "figures/fewshot-memory.svg")]}
        ),
    )


@pytest.mark.parametrize("width", [60, 100, 180])
def test_terminal_table_is_the_golden_text_and_as_wide_as_the_terminal(width: int) -> None:
    text = _printed(RECORDS, width)
    assert max(len(line) for line in text.splitlines()) <= width
    _golden(f"table_{width}.txt", text)


def test_page_shows_every_case_estimator_and_failure_and_needs_nothing_from_outside() -> None:
    text = page.render(RECORDS, COMMAND)
    found = Page(text)
    words = " ".join(found.text)
    for record in RECORDS:
        assert record.case in words
        assert record.estimator in words
        assert record.reason in words
    assert COMMAND in words
    assert "2.13.0+cpu" in words
    figures = [value for tag, name, value in found.attributes if tag == "svg" and name == "class" and value == "fig"]
    assert len(figures) == (2 + 4 + 3 + 2 + 8) + (2 + 2 + 3 + 1 + 8)
    assert sum(tag == "svg" and name == "aria-labelledby" for tag, name, _ in found.attributes) == len(figures)
    assert found.counts["desc"] == len(figures)
    assert len(found.ids) == len(set(found.ids))
    assert {value for _, name, value in found.attributes if name in ("src", "href")} <= {
        f"#{anchor}" for anchor in found.ids
    }
    assert not re.search(r"url\(|@import|https?:|srcset|<link|<iframe|<img", text)
    assert len(text) < 600_000


def test_page_follows_the_dark_scheme_and_scales_to_a_phone() -> None:
    text = page.render(RECORDS)
    assert text.count("prefers-color-scheme:dark") + text.count("prefers-color-scheme: dark") == 2
    assert 'name="viewport"' in text
    for n in range(len(palette.LIGHT)):
        assert text.count(f"--s{n}:") == 2, "a color in only one of the two schemes"
    assert not re.search(r'(fill|stroke)="#', text), "a color that does not follow the scheme"


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_records_make_a_report(name: str, tmp_path: Path) -> None:
    found = report.write(PARTIAL[name], tmp_path / "out", COMMAND)
    assert found == tmp_path / "out" / "index.html"
    text = found.read_text(encoding="utf-8")
    Page(text)
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', text), "a coordinate that is not finite"
    assert (tmp_path / "out" / "report.md").stat().st_size > 0
    for drawing in (tmp_path / "out").glob("figures/*.svg"):
        xml.etree.ElementTree.parse(drawing)
    for width in (20, 80):
        assert max(len(line) for line in _printed(PARTIAL[name], width).splitlines()) <= width


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    text = report.write(_evil(), tmp_path, EVIL).read_text(encoding="utf-8")
    assert Page(text).counts["script"] == 1
    assert "<script>alert" not in text
    assert "\x1b" not in text
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = re.sub(r"```.*?```|(`+).*?\1(?!`)", "", document.replace("\\`", ""), flags=re.DOTALL)
    assert "<script>" not in outside_code
    assert "](http://evil" not in outside_code.replace("\\](", "")
    for table in re.findall(r"(?:^\|.*\n)+", document, flags=re.MULTILINE):
        borders = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(borders) == 1, "a cell broke out of its column"
    assert "\x1b" not in _printed(_evil(), 100)
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 100
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
    report.print_alive(_evil()[0], console)
    assert "\x1b" not in console.file.getvalue()


def test_writing_replaces_whole_files_and_leaves_no_others(tmp_path: Path) -> None:
    report.write(RECORDS[:4], tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    report.write(RECORDS[:4], tmp_path)
    assert before == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert not [path for path in before if path.name.startswith(".")]


def test_a_report_is_a_function_of_its_records() -> None:
    again = [Record.from_json(record.to_json()) for record in RECORDS]
    assert page.render(again, COMMAND) == page.render(RECORDS, COMMAND)


def test_png_is_written_and_says_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write_png(RECORDS, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="memory measured"):
        report.write_png(PARTIAL["all failed"], tmp_path / "figure.png")


def test_report_imports_neither_torch_nor_plotting_nor_terminal_libraries() -> None:
    program = f"""
import sys, types
for name in ("torch", "rich", "matplotlib", "numpy"):
    sys.modules[name] = None
package = types.ModuleType("bilevel_profiling")
package.__path__ = [{str(HERE.parents[1] / "profiling" / "bilevel_profiling")!r}]
sys.modules["bilevel_profiling"] = package
from bilevel_profiling import report
from bilevel_profiling.records.record import Record
import pathlib, tempfile
with tempfile.TemporaryDirectory() as folder:
    record = Record(case="toy", estimator="a", inner_steps=2, peak_tensor_bytes=3)
    print(report.write([record], pathlib.Path(folder)).name)
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "index.html", done.stderr


def test_baseline_is_the_first_exact_unroll_and_ratios_are_taken_at_the_same_k() -> None:
    clean, shots = groups.group(RECORDS)
    assert clean.baseline == shots.baseline == "unrolled"
    cells = {(r.estimator, r.inner_steps): clean.ratio(r, "peak_tensor_bytes") for r in clean.rows}
    assert cells["unrolled", 50] == 1.0
    assert cells["unrolled iterates", 200] == pytest.approx((0.954 * 200 + 8) / (0.68 * 200 + 5), rel=1e-5)
    lost = {(r.estimator, r.inner_steps): shots.ratio(r, "wall_seconds") for r in shots.rows}
    assert lost["first-order", 200] is None, "the baseline ran out of memory there"


def test_an_inexact_or_truncated_unroll_is_no_baseline() -> None:
    def of(label: str, target: Target | None, error: float | None) -> Record:
        return Record(
            case="c",
            estimator=label,
            target=target,
            inner_steps=5,
            peak_tensor_bytes=9,
            program_relative_error=error,
        )

    def baseline(*records: Record) -> str | None:
        return groups.group(records)[0].baseline

    assert baseline(of("short", Target.PROGRAM, 0.3), of("implicit", Target.SOLUTION, 0.1)) is None
    assert baseline(of("unrolled, truncated", None, None), of("full", Target.PROGRAM, None)) == "full"
    assert baseline(of("implicit", Target.SOLUTION, 1e-7), of("full", Target.PROGRAM, 1e-7)) == "full"
    assert baseline(of("implicit", Target.SOLUTION, 1e-7)) == "implicit"


def test_growth_is_told_as_a_law_and_a_broken_contract_in_every_view() -> None:
    clean, shots = groups.group(RECORDS)
    header, rows = laws.table(clean)
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert found["unrolled"]["peak memory"] == "696 KiB per inner step + 5.00 MiB"
    assert found["unrolled segments"]["peak memory"] == "1.63 MiB per root of K + 6.00 MiB"
    assert found["first-order"]["peak memory"] == "constant, 5.00 MiB"
    assert {row["verdict"] for label, row in found.items() if label != "implicit"} == {"held"}
    assert laws.broken(clean) == []
    sentence = "promises no growth with K; its peak memory is 205 KiB per inner step + 44.2 MiB."
    assert laws.broken(shots) == [("first-order corrected", sentence)]
    assert f"**CONTRACT BROKEN: first-order corrected** {sentence}" in markdown.render(RECORDS)
    assert (
        f'class="alert" role="alert"><strong>Contract broken: first-order corrected</strong> {sentence}'
        in page.render(RECORDS)
    )
    for width in (40, 100):
        assert "CONTRACT BROKEN first-order corrected" in " ".join(_printed(RECORDS, width).split())


def _small() -> list[Record]:
    """One estimator at three K: few points, few tensors, few steps; every string needs escaping."""
    shared = {"case": "toy", "estimator": "a<b", "memory_growth": "constant"}
    many = [Record(inner_steps=k, peak_tensor_bytes=(k + 3) * 2**20, wall_seconds=1e-3 * k, **shared) for k in (1, 3)]
    last = Record(
        inner_steps=9,
        peak_tensor_bytes=12 * 2**20,
        wall_seconds=9e-3,
        timeline=(
            (0, 0, "", "", ""),
            (4, 12 * 2**20, "inner", "hvp", "aten.mm<float>"),
            (7, 3 * 2**20, "outer", "", "aten.add_"),
        ),
        alive=(
            Alive(
                bytes=9 * 2**20,
                count=3,
                phase="inner",
                span="hvp",
                operator="aten.mm<float>",
                module="Net.0",
                line="a&b.py:3",
                backward=True,
            ),
            Alive(bytes=3 * 2**20, count=40),
        ),
        iterations=(
            Iteration(
                index=0,
                outer_loss=1.5,
                gradient_norm=0.2,
                wall_seconds=0.02,
                peak_tensor_bytes=2**20,
                metrics={"l<r": 0.1},
            ),
            Iteration(index=1, outer_loss=math.nan, status="NON<FINITE"),
        ),
        **shared,
    )
    return [*many, last]


def _fragments() -> dict[str, str]:
    records = _small()
    group = groups.group(records)[0]
    looks = palette.styles(group.estimators)
    found = timeline.timelines(group, "toy-timeline")
    assert found is not None
    return {
        "timeline": page.fragment("panels", found),
        "alive": page.fragment("alive_table", records[-1]),
        "growth": page.fragment("growth", group),
        "iterations": page.fragment("iterations_table", records[-1]),
        "runs": "<h3>All runs</h3>" + page.fragment("runs", group, looks, "toy") + page.fragment("below", group, "toy"),
    }


@pytest.mark.parametrize("name", ["timeline", "alive", "growth", "iterations", "runs"])
def test_each_view_is_the_golden_fragment(name: str) -> None:
    fragment = _fragments()[name]
    Page(fragment)
    _golden(
        f"{name}.html",
        re.sub(r"(?=<(?:tr|svg|g|p|h4|text|div|details|ul|table|thead|tbody|figcaption)\b)", "\n", fragment).strip()
        + "\n",
    )


def test_what_was_alive_is_the_golden_text_and_as_wide_as_the_terminal() -> None:
    rich = pytest.importorskip("rich.console")
    found = ""
    for record, width in ((_small()[-1], 100), (_small()[-1], 50), (_small()[0], 100), (RECORDS[1], 100)):
        console = rich.Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
        report.print_alive(record, console)
        written = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
        assert max(len(line) for line in written.splitlines()) <= width
        found += written + "\n"
    _golden("alive.txt", found)


def test_a_timeline_carries_what_its_script_reads() -> None:
    each = groups.group(_small())[0]
    figure = timeline.timelines(each, "t")
    assert figure is not None
    data = json.loads(figure.panels[0].data)
    assert data["at"] == [0, 4, 7]
    assert data["bytes"] == [0, 12 * 2**20, 3 * 2**20]
    assert [data["names"][place] for place in data["name"]] == ["", "inner · hvp · aten.mm<float>", "outer · aten.add_"]
    assert figure.legend == ("inner", "outer", "outside of the phases")
    script = (Path(page.__file__).parent / "page.js").read_text(encoding="utf-8")
    assert "innerHTML" not in script, "text from records is set as text"
    for key in data:
        assert key in script


def test_a_plain_call_without_k_is_shown_and_is_not_called_an_estimator() -> None:
    points = tuple((n, n % 5 * 2**20, "", "", f"aten.op{n}") for n in range(600))
    record = Record(
        case="functions",
        estimator="train",
        peak_tensor_bytes=4 * 2**20,
        wall_seconds=0.01,
        timeline=points,
        alive=RECORDS[0].alive,
    )
    text = page.render([record])
    words = " ".join(Page(text).text)
    assert "Hypergradient" not in words
    assert "K-step" not in words
    assert "Memory over one call" in words
    assert "What was alive at the peak" in words
    assert len(text) < 120_000


def test_forecasts_are_never_taken_for_measurements() -> None:
    shots = groups.group(RECORDS)[1]
    assert "unrolled (forecast)" in shots.estimators
    assert all(record.source == "measured" for record in shots.records if not record.estimator.endswith("(forecast)"))
    assert [k for k, _ in shots.points("unrolled", "peak_tensor_bytes")] == [10, 50]
    assert shots.focus == 50
    looks = palette.styles(shots.estimators)
    assert looks["unrolled (forecast)"].color == looks["unrolled"].color
    assert looks["unrolled (forecast)"].dash == palette.DOTS
    assert "bound ms, H200" in [column.header for column in columns.columns(shots)]
    alone = groups.group([record for record in RECORDS if record.source == "forecast"])
    assert [each.title for each in alone] == ["fewshot: forecast"]
    assert alone[0].estimators == ("unrolled",)
    assert "from a forecast: the case was not run" in "".join(
        "".join(sentence) for sentence in summary.sentences(alone[0])
    )


def test_no_estimator_is_called_the_fastest_where_times_overlap() -> None:
    def of(label: str, low: float, middle: float, high: float) -> Record:
        times = {"wall_seconds_low": low, "wall_seconds": middle, "wall_seconds_high": high}
        return Record(
            case="c", estimator=label, inner_steps=5, peak_tensor_bytes=9, program_relative_error=0.0, **times
        )

    overlapping = groups.group([of("a", 1.0, 1.1, 1.2), of("b", 1.15, 1.3, 2.0), of("c", 3.0, 3.1, 3.2)])[0]
    text = "".join("".join(sentence) for sentence in summary.sentences(overlapping))
    assert "which is the fastest cannot be told, the times (10% to 90% quantile) of a and b overlap" in text
    assert "the fastest (" not in text
    assert [fact.detail for fact in summary.facts(overlapping) if fact.title == "Fastest exact"] == [
        "not told apart from b: their 10% to 90% quantile ranges overlap"
    ]
    apart = groups.group([of("a", 1.0, 1.1, 1.2), of("c", 3.0, 3.1, 3.2)])[0]
    assert "the fastest" in "".join("".join(sentence) for sentence in summary.sentences(apart))
    assert [footnotes.wide(record) for record in overlapping.rows] == [False, True, False]
    cells = next(column for column in columns.columns(overlapping) if column.header == "ms")
    assert [cells.cell(record) for record in overlapping.rows] == ["1,100", "~1,300", "3,100"]
    assert "10% to 90% quantile is up to 65% of the median wide" in footnotes.spread(overlapping)


def test_notes_are_said_once_and_lettered_where_they_are_not_on_every_row() -> None:
    def of(label: str, *notes: str) -> Record:
        return Record(case="c", estimator=label, inner_steps=5, peak_tensor_bytes=9, notes=notes)

    each = groups.group([of("a", "all", "some"), of("b", "all"), of("c", "all", "other", "some")])[0]
    assert footnotes.lines(each) == [("", "all"), ("a", "some"), ("b", "other")]
    assert [footnotes.marker(record, each) for record in each.rows] == ["OK (a)", "OK", "OK (a,b)"]
    assert footnotes._letter(27) == "ab"


def test_crossed_out_steps_are_those_that_did_not_end_ok_and_long_loops_are_cut_in_the_table() -> None:
    clean = groups.group(RECORDS)[0]
    drawn = {figure.key: figure for figure in case_figures(clean, palette.styles(clean.estimators), "k")}
    for key in ("k-loss", "k-steptime", "k-steppeak"):
        assert (drawn[key].drawing or "").count("MAX_STEPS") == 7
        assert "implicit (7 MAX_STEPS)" in drawn[key].note
    long = Record(case="c", estimator="a", iterations=tuple(Iteration(index=n, outer_loss=1.0) for n in range(500)))
    header, rows, hidden = loops.iterations(long)
    assert (header, len(rows), hidden) == (["step", "outer loss", "status"], 200, 300)
    assert "300 steps left out" in page.fragment("iterations_table", long)


def test_errors_stand_against_memory_and_against_time_each_with_its_front() -> None:
    clean = groups.group(RECORDS)[0]
    drawn = {figure.key: figure.drawing or "" for figure in case_figures(clean, palette.styles(clean.estimators), "k")}
    for key in ("k-program", "k-program-time", "k-solution", "k-solution-time"):
        assert drawn[key].count('class="front"') == 1
    assert 'class="whisker"' in drawn["k-program-time"]
    assert 'class="whisker"' not in drawn["k-program"]


def test_pareto_front_keeps_what_nothing_beats_and_ties() -> None:
    assert groups.pareto([(1, 9), (2, 5), (3, 6), (2, 5), (9, 1)]) == [0, 1, 3, 4]
    assert groups.pareto([]) == []


def test_summary_speaks_of_the_k_at_which_most_finished() -> None:
    shots = groups.group(RECORDS)[1]
    assert shots.focus == 50
    text = " ".join("".join(sentence) for sentence in summary.sentences(shots))
    assert text.startswith(
        "At K = 50, first-order needs the least memory: 38.4 MiB, against 233 MiB for unrolled (0.16x)"
    )
    assert "2 of 27 runs failed: OUT_OF_MEMORY (1), TIMEOUT (1)." in text


def test_a_leak_is_told() -> None:
    record = dataclasses.replace(RECORDS[0], kept_tensor_bytes=3 * 2**20)
    text = "".join(part for sentence in summary.sentences(groups.group([record])[0]) for part in sentence)
    assert "still held 3.00 MiB after its result was dropped" in text


def test_colors_belong_to_estimators_over_all_cases_and_combinations_do_not_repeat_soon() -> None:
    looks = palette.styles([str(n) for n in range(32)])
    assert len({(look.color, look.shape) for look in looks.values()}) == 32
    clean, shots = groups.group(RECORDS)
    backwards = palette.styles(groups.estimators([shots, clean]))
    drawn = [case_figures(each, backwards, key)[0].drawing or "" for each, key in ((clean, "a"), (shots, "b"))]
    place = backwards["truncated"].place
    assert all(f'data-s="{place}"' in drawing for drawing in drawn)


def test_labels_do_not_overlap() -> None:
    placed = svg.spread([5.0, 5.0, 6.0, 90.0, 100.0], 15, 0, 100)
    assert sorted(placed) == placed
    assert min(b - a for a, b in itertools.pairwise(placed)) >= 15
    assert min(placed) >= 0
    assert max(placed) <= 100
    frame = svg.Frame(40, 440, 30, 260)
    labels = svg.point_labels(frame, [("first", 200.0, 100.0), ("second", 203.0, 103.0), ("third", 206.0, 100.0)])
    assert len({(x, y) for x, y, _ in labels}) == 3


def test_thinning_keeps_peaks_and_changes_of_phase() -> None:
    level = [(n, 10 + n % 7, "inner" if n < 5000 else "hypergradient", "hvp", "aten.mm") for n in range(9000)]
    level[4321] = (4321, 10**9, "inner", "hvp", "aten.mm")
    kept = timeline.thinned(level)
    assert len(kept) <= 210
    assert level[4321] in kept
    assert {kept[0], kept[-1], level[5000]} <= set(kept)
    run = tuple(Iteration(index=n, outer_loss=math.nan if n == 700 else 99.0 if n == 333 else 1.0) for n in range(1000))
    drawn = loop.thinned(run, lambda entry: entry.outer_loss)
    assert len(drawn) <= 160
    assert (333, 99.0) in drawn


def test_scales_are_logarithmic_only_where_values_spread_and_hold_zeros() -> None:
    assert not scales.choose([3, 5, 9], 0, 100).log
    wide = scales.choose([0.0, 1e-7, 1.0], 0, 100)
    assert wide.log
    assert wide(0.0) == 0 < wide(1e-7) < wide(1.0) <= 100
    assert wide.ticks[0] == (0.0, "0")
    for values in ([], [0.0], [5.0, 5.0], [-3.0, 2.0], [1e-12], [1e300]):
        scale = scales.choose(values, 0, 100)
        assert all(math.isfinite(scale(value)) for value in values)
        assert scale.ticks


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.mebibytes(2**20), "1.00"),
        (units.mebibytes(5_000), "0.00477"),
        (units.mebibytes(0), "0"),
        (units.mebibytes(None), "-"),
        (units.milliseconds(0.0612), "61.2"),
        (units.significant(99.96), "100"),
        (units.significant(1234.5), "1,234"),
        (units.significant(1.23e-7), "1.2e-07"),
        (units.significant(math.nan), "nan"),
        (units.size(3 * 2**30), "3.00 GiB"),
        (units.size(512), "512 B"),
        (units.duration(2.5e-6), "2.50 µs"),
        (units.ratio(0.218), "0.22x"),
        (units.ratio(15.2), "15.2x"),
        (units.ratio(0.0012), "0.00120x"),
        (units.count(1234567), "1,234,567"),
        (units.cosine(0.99996), "1.0000"),
        (units.tick(2500), "2,500"),
        (units.tick(1e-5), "10⁻⁵"),
        (units.tick(0.25), "0.25"),
    ],
)
def test_units(written: str, expected: str) -> None:
    assert written == expected


def test_every_column_explains_itself() -> None:
    for each in groups.group(RECORDS):
        shown = columns.columns(each)
        assert all(column.explanation for column in shown)
        assert len({(column.section, column.header) for column in shown}) == len(shown)


@pytest.mark.parametrize(
    ("text", "length", "short"),
    [
        ("implicit CG (1 process)", 26, "implicit CG (1 process)"),
        ("first-order corrected (2 processes)", 26, "first-order…(2 processes)"),
        ("first-order corrected (2 processes)", 20, "first-order correct…"),
        ("(all of it in parentheses, and long)", 12, "(all of it…"),
    ],
)
def test_a_short_label_still_tells_processes_apart(text, length, short):
    assert shorten(text, length) == short
