"""The pages of the estimators, made from what their modules say and from what the catalogue promises and tests hold.

Run by Sphinx (docs/conf.py), or: python docs/estimator_pages.py. Writes docs/estimators/made/, which is not committed.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import bilevel as bl
from bilevel.testing.catalogue import ENTRIES, FAMILIES, Entry, Need

FOLDER = Path(__file__).parent / "estimators" / "made"
_PROBES = tuple((steps, products) for steps in (40, 41, 47, 50, 60) for products in (3, 5))
_SHORT = {"inner_gradient": "inner", "outer_gradient": "outer", "hvp": "HVP", "mixed": "mixed"}


def affine(count: Callable[[int, int], int], *, products: str) -> str:
    """A count as a formula of K and the products of a linear solver, such as "2 K + m"; its value at K = 32 where it
    is not affine.

    Example:
        >>> affine(lambda K, m: 2 * K + m + 1, products="m")
        '2 K + m + 1'
    """
    (low, some), (high, _), (_, more) = (0 + 40, 3), (50, 3), (40, 5)
    per_step = (count(high, some) - count(low, some)) / (high - low)
    per_product = (count(low, more) - count(low, some)) / (more - some)
    rest = count(low, some) - per_step * low - per_product * some
    if any(abs(per_step * K + per_product * m + rest - count(K, m)) > 1e-9 for K, m in _PROBES):
        return f"{count(32, 3)} at K = 32"
    terms = [(per_step, " K"), (per_product, f" {products}"), (rest, "")]
    text = ""
    for factor, unit in terms:
        if not factor:
            continue
        number = f"{abs(factor):g}"
        body = unit.strip() if number == "1" and unit else number + unit
        text += f" {'-' if factor < 0 else '+'} {body}" if text else ("-" if factor < 0 else "") + body
    return text or "0"


def calls(entry: Entry) -> str:
    """The oracle calls of an entry, those that it makes none of left out."""
    products = "P" if entry.quadratic_in_inner else "m"
    found = {
        name: affine(lambda K, m, name=name: entry.calls(K, m).get(name, 0), products=products)
        for name in entry.calls(1, 1)
    }
    return ", ".join(f"{_SHORT.get(name, name)} {text}" for name, text in found.items() if text != "0")


def memory(entry: Entry) -> str:
    """How its peak grows with K."""
    law = {"constant": "flat in K", "sqrt": "like $\\sqrt{K}$", "linear": "like K"}[entry.memory]
    return law + (", P²" if entry.quadratic_in_inner else "")


def bias(entry: Entry) -> str:
    """What separates it from its target."""
    order = "none" if entry.bias is None else entry.bias.replace("|", "\\|")
    drawn = "" if entry.variance is None else "; random"
    late = "" if entry.settles == 1 else f"; after rounds ({entry.settles} in the test)"
    return order + drawn + late


def rows(entries: Sequence[Entry]) -> Iterator[str]:
    """The table of some entries."""
    yield "| variant | target | bias | calls | memory |"
    yield "| --- | --- | --- | --- | --- |"
    for entry in entries:
        cells = (entry.label, entry.target, bias(entry), calls(entry), memory(entry))
        yield "| " + " | ".join(cells) + " |"


def needs() -> Iterator[str]:
    """Which estimator needs what; variants that need the same are one row."""
    yield "| estimator | " + " | ".join(need.value for need in Need) + " | memory | bias |"
    yield "| --- " * (len(Need) + 3) + "|"
    seen = set()
    for entry in sorted(ENTRIES, key=lambda entry: (len(entry.needs), entry.bias is not None)):
        key = (type(entry.estimator), entry.needs, entry.memory, entry.bias is None)
        if key not in seen:
            seen.add(key)
            marks = ["yes" if need in entry.needs else "" for need in Need]
            yield "| " + " | ".join([entry.label, *marks, memory(entry), bias(entry)]) + " |"


def escaped(docstring: str) -> str:
    """A docstring as Markdown: outside of indented formulas and backquotes, stars and angle brackets are characters."""
    lines = []
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.startswith("    "):
            parts = re.split(r"(`+[^`]*`+)", line)
            parts[::2] = [re.sub(r"([*<>$])", r"\\\1", part) for part in parts[::2]]
            line = "".join(parts)
        for word in ("Wins:", "Fails:", "Reference:", "References:", "Differences from peers:"):
            if line.startswith(word):
                line = f"\n**{word}**{line[len(word) :]}"
        lines.append(line)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Page:
    """One estimator: its class and its entries."""

    family: str
    kind: type[bl.Estimator]
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """As it is written."""
        top = getattr(bl, self.kind.__name__, None) is self.kind
        return f"bilevel.{self.kind.__name__}" if top else f"bilevel.estimators.{self.kind.__name__}"

    def text(self) -> str:
        """The page."""
        module = inspect.getmodule(self.kind)
        assert module is not None
        assert module.__doc__ is not None, f"{module.__name__} says nothing"
        written = self.name.replace("bilevel.", "bl.", 1)
        return "\n".join(
            [
                f"# `{written}`",
                "",
                escaped(module.__doc__),
                "",
                "## Promised, and held by tests",
                "",
                *rows(self.entries),
                "",
                f"It sees {', '.join(path.value for path in bl.Path if path in self.entries[0].sees)}.",
                "",
                "## Use",
                "",
                "```{eval-rst}",
                f".. autoclass:: {self.name}",
                "   :no-index:",
                "```",
                "",
            ]
        )


def pages() -> list[Page]:
    """One for each class of estimator in the catalogue, by family."""
    found: dict[type[bl.Estimator], tuple[str, list[Entry]]] = {}
    for family, entries in FAMILIES.items():
        for entry in entries:
            found.setdefault(type(entry.estimator), (family, []))[1].append(entry)
    return [Page(family, kind, tuple(entries)) for kind, (family, entries) in found.items()]


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the pages and the table of all entries; leaves what is already there as it should be untouched."""
    made = pages()
    table: list[str] = []
    for family in FAMILIES:
        of_family = [page for page in made if page.family == family]
        if of_family:
            links = ", ".join(
                f"{{doc}}`{page.kind.__name__} </estimators/made/{page.kind.__name__}>`" for page in of_family
            )
            table += [f"## {family.capitalize()}", "", links, ""]
            table += [*rows([entry for page in of_family for entry in page.entries]), ""]
    texts = {f"{page.kind.__name__}.md": page.text() for page in made} | {
        "table.inc": "\n".join(table),
        "needs.inc": "\n".join(needs()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    sys.stdout.write("\n".join(map(str, write())) + "\n")
