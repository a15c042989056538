"""Sphinx: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import re
import sys
from pathlib import Path

import bilevel

sys.path.insert(0, str(Path(__file__).parent))
import estimator_pages

project, author, copyright = "bilevel", "The bilevel developers", "2026, the bilevel developers"
version = release = bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "papers/made", "coming_from/made"]  # tables that pages include
default_role = "code"
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"bilevel {release}"
html_static_path = ["_static"]
html_css_files = ["bilevel.css"]
html_show_sphinx = False
html_math_renderer = "drawn"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_admonition_for_examples = False


def plain(app, what, name, obj, options, lines):
    """Docstrings are prose with formulas, not markup: keep |a|, y_ and y* from being read as reStructuredText."""
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(`+[^`]*`+)", line)
            parts[::2] = [re.sub(r"(\||\*|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[number] = "".join(parts)
    # An empty first line keeps napoleon from taking the words before a colon for a type.
    for number, line in reversed(list(enumerate(lines))):
        if line.strip() in ("Returns:", "Yields:"):
            indent = len(line) - len(line.lstrip()) + 4
            lines.insert(number + 1, " " * indent + "\\ ")


def setup(app):
    estimator_pages.write()
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.add_html_math_renderer(
        "drawn", inline_renderers=(inline_formula, None), block_renderers=(displayed_formula, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Formulas become inline SVG, drawn by matplotlib: the built pages load nothing from anywhere.


def formula(tex, size):
    """The picture of a formula, in the color of the text, and how far it reaches below the line, in points."""
    import io

    import matplotlib
    from matplotlib import mathtext

    picture = io.StringIO()
    with matplotlib.rc_context({"mathtext.fontset": "stix", "svg.hashsalt": tex}):
        # An asterisk alone would be set as an operator, with space around it.
        font = matplotlib.font_manager.FontProperties(size=size)
        depth = mathtext.math_to_image(
            f"${tex.replace('^*', '^{*}')}$", picture, format="svg", color="#123456", prop=font
        )
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :].strip().replace("#123456", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"<g id=\"patch_\d+\">.*?</g>", "", svg, count=1, flags=re.DOTALL), depth


def inline_formula(self, node):
    from docutils import nodes

    svg, depth = formula(node.astext(), 12)
    self.body.append(
        f'<span class="formula" role="img" aria-label="{self.attval(node.astext())}" '
        f'style="vertical-align: -{depth}pt">{svg}</span>'
    )
    raise nodes.SkipNode


def displayed_formula(self, node):
    from docutils import nodes

    lines = [line.strip() for line in node.astext().split("\\\\")]
    pictures = "".join(f"<div>{formula(' '.join(line.split()), 14)[0]}</div>" for line in lines)
    self.body.append(f'<div class="formulas" role="img" aria-label="{self.attval(node.astext())}">{pictures}</div>')
    raise nodes.SkipNode
