"""HTML and SVG elements as functions: everything is escaped unless it was made here, so that no view can forget to."""

import html

from bilevel_profiling.report.content.text import clean

_EMPTY = {"path", "rect", "circle", "line"}
_VOID = {"meta", "br"}


class Markup(str):
    """Text that is markup already."""

    def __html__(self) -> str:
        """How templates know it."""
        return self


def escape(value: object) -> Markup:
    """`value` as text of an element or an attribute."""
    return value if isinstance(value, Markup) else Markup(html.escape(clean(str(value))))


def join(*parts: object) -> Markup:
    """Several pieces after each other; whatever is not Markup is escaped, spaces at its ends are kept."""
    return Markup("".join(_piece(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes: `class_` is class, `_` becomes `-`, None and False are left out, True stands alone,
    floats get one decimal.
    """
    opening = name + "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in _EMPTY and not children:
        return Markup(f"<{opening}/>")
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(*children)}</{name}>")


def decimal(value: float) -> str:
    """A coordinate: one decimal, without a useless zero."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _piece(part: object) -> str:
    if isinstance(part, Markup):
        return part
    return html.escape(spaced(str(part)))


def spaced(text: str) -> str:
    """`clean`, but for the spaces at its ends, which stay one each."""
    inside = clean(text)
    if not inside:
        return " " if text else ""
    return (" " if text[0].isspace() else "") + inside + (" " if text[-1].isspace() else "")


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{decimal(value) if isinstance(value, float) else escape(value)}"'
