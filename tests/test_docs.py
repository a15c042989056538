"""The documentation runs: every Python block of every page, in order, with the output it shows.

A ```python block is executed in its page's namespace. A ```text block right after it is what it prints ("..." stands
for anything). A block with `<!-- needs: higher -->` on the line before it is another library's: the page runs without
those blocks, and once more with all of them, where the library is installed.
"""

import contextlib
import doctest
import importlib.util
import io
import itertools
import pathlib
import re
import sys

import bilevel_profiling
import pytest
import torch

import bilevel as bl

ROOT = pathlib.Path(__file__).resolve().parent.parent
MADE = {"_build", "made"}  # what sphinx and scripts write
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if MADE.isdisjoint(path.parts)]
BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n)?```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = {  # what a block may need, and how one gets it
    "betty": 'pip install --ignore-requires-python ".[betty]"',
    "higher": 'pip install ".[peers]"',
    "torchopt": 'pip install ".[peers]"',
    "learn2learn": "its sdist does not build on Python 3.11; docs/coming_from/learn2learn.md says what does",
}


def blocks(page):
    """(line number, code, the output shown after it or None, the library it needs or None) of each Python block."""
    text = page.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in itertools.zip_longest(found, found[1:]):
        if block[2] == "python":
            shown = after[3] if after and after[2] == "text" and not text[block.end() : after.start()].strip() else None
            yield text[: block.start(3)].count("\n"), block[3], shown, block[1]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=name)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    execute(page, [block for block in blocks(page) if block[3] is None], tmp_path, monkeypatch)


@pytest.mark.filterwarnings(
    # torch's own import of torch.distributed.optim, which Betty asks for
    "ignore:.torch.jit.(script|interface). is deprecated:DeprecationWarning",
    # custom_root of TorchOpt
    "ignore:We've integrated functorch into PyTorch:FutureWarning",
    # higher, compiled at its first import where its installation did not
    "ignore:invalid escape sequence:DeprecationWarning",
    "ignore:.is. with .* literal:SyntaxWarning",
)
@pytest.mark.parametrize("page", [page for page in PAGES if any(block[3] for block in blocks(page))], ids=name)
def test_a_page_runs_with_the_other_library(page, tmp_path, monkeypatch):
    for library in sorted({block[3] for block in blocks(page)} - {None}):
        if importlib.util.find_spec(library) is None:
            lines = [str(block[0]) for block in blocks(page) if block[3] == library]
            pytest.skip(f"{library} is not installed, which lines {', '.join(lines)} need: {OTHERS[library]}")
    execute(page, blocks(page), tmp_path, monkeypatch)


def execute(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)  # pages draw random data; what they print does not depend on the draw
    namespace = {"__name__": "page"}
    for line, code, shown, _ in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # As many newlines as come before it, so that a traceback has the page's line numbers.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if shown is not None:
            same = doctest.OutputChecker().check_output(shown, printed.getvalue(), doctest.ELLIPSIS)
            assert same, f"{name(page)}, line {line} prints\n{printed.getvalue()}and shows\n{shown}"


def test_every_public_name_is_in_the_api_page():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    ours = [
        key
        for key, value in vars(bl).items()
        if not key.startswith("_") and getattr(value, "__module__", "").startswith("bilevel.")
    ]
    theirs = bilevel_profiling.__all__
    wanted = [f"bilevel.{key}" for key in ours] + [f"bilevel_profiling.{key}" for key in theirs]
    assert [key for key in wanted if not re.search(rf":: {re.escape(key)}$", text, re.MULTILINE)] == []


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES if path != ROOT / "README.md"]
    assert [page for page in pages if page != "index" and not re.search(rf"^{page}$", index, re.MULTILINE)] == []


def test_a_block_needs_a_library_that_is_known():
    needs = [block[3] for page in PAGES for block in blocks(page) if block[3]]
    assert set(needs) <= set(OTHERS)
    assert len(needs) == sum(page.read_text(encoding="utf-8").count("<!-- needs:") for page in PAGES)


def test_every_estimator_has_a_page_that_says_when_it_wins_and_fails():
    spec = importlib.util.spec_from_file_location("estimator_pages", ROOT / "docs" / "estimator_pages.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["estimator_pages"] = made
    spec.loader.exec_module(made)
    kinds = {value for value in vars(bl.estimators).values() if isinstance(value, type)}
    public = {kind for kind in kinds if issubclass(kind, bl.Estimator) and kind is not bl.Estimator}
    pages = made.pages()
    assert {page.kind for page in pages} == public, "the catalogue, and the namespace bl.estimators"
    for page in pages:
        text = page.text()
        for part in ("**Wins:**", "**Fails:**", "**Reference", "| inner gradients |", "| variant | target |"):
            assert part in text, f"{page.name}: no {part} in the docstring of its module"
        assert re.search(r"^    \S", text, re.MULTILINE), f"{page.name}: no equation"
        assert ">>> " in page.kind.__doc__, f"{page.name}: no example"


def test_every_status_is_explained():
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for status in bl.Status:
        assert f"| `{status.name}` | {'yes' if status.failed else 'no'} |" in text


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {bl.__version__}\n" in citation
