"""Glyphs: a many-class character data set, drawn from the DejaVu fonts that matplotlib ships. Nothing is downloaded.

A class is a character, its images are 28 x 28 and grey (ink 255). The first image of a class is its plain render in the
regular style; the others go round the DejaVu styles that have the character (up to 14: sans, serif and mono, bold,
oblique, display), each slightly rotated, sheared, scaled and shifted, until there are `per_class` different ones.
Characters are centred by their ink, so that "." and "·" are the same picture. Such look-alikes are left out, or one
class would leak into another split:

- a character whose regular-style image equals or nearly equals (relative distance below 0.1) that of a character with a
  smaller code point (Latin A, Cyrillic А, Greek Α),
- a character that looks like an earlier one in any style, to the pixel,
- another size or style of a character by Unicode's own tables (superscript 2, mathematical bold A),
- blanks, control and private characters, combining marks, and the box that a font draws for what it lacks.

Drawing all of them takes some ten seconds on one core, once: the result (about 80 MB) is kept in $BILEVEL_CACHE, else
$XDG_CACHE_HOME/bilevel, else ~/.cache/bilevel. The same versions of matplotlib, Pillow and Python's Unicode tables give
the same bytes.

Source of the fonts: DejaVu 2.37, https://dejavu-fonts.github.io (free licence).
"""

import collections
import importlib.metadata
import pathlib
import random
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bilevel.data import _cache
from bilevel.data._optional import optional
from bilevel.data.imageset import ImageSet

FORMAT = 1
"""Raised whenever the same parameters would give other bytes; old cache files are then left alone."""

SIDE = 28
STYLES = (
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSansDisplay", "DejaVuSerifDisplay"),
)
"""Font files, regular first: the first one that has a character is its regular style."""

_OVERSAMPLING = 2
_EM = 22 * _OVERSAMPLING  # capitals come out 16 pixels high, and all but few wide symbols fit without shrinking
_FIT = 24 * _OVERSAMPLING
_LOOK_ALIKE = 0.1
_ATTEMPTS = 200
_VARIANTS = ("<font>", "<super>", "<sub>", "<small>", "<wide>", "<narrow>")


def load(characters: str | None = None, *, per_class: int = 20, cache: str | pathlib.Path | None = None) -> ImageSet:
    """The glyph data set, from the cache or drawn afresh.

    Args:
        characters: the candidates, as one string; None means every character of the fonts (some 4900 classes remain).
            Unusable ones and look-alikes among them are left out.
        per_class: different images of each class; 20, as Omniglot has.
        cache: folder of the cache file; None means the environment's (see the head of this file).

    Returns:
        Classes in the order of their code points, named by the character.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: `per_class` is smaller than 1, or no usable character was given.

    Example:
        >>> letters = load("ABCAБ ", cache=getfixture("tmp_path"))  # the fourth letter is Cyrillic
        >>> letters.names, tuple(letters.images.shape)
        (('A', 'B', 'C', 'Б'), (80, 1, 28, 28))
    """
    if per_class < 1:
        raise ValueError(f"glyphs.load() was given per_class={per_class}; at least 1 was needed")
    wanted = None if characters is None else sorted(set(characters))
    key = {
        "format": FORMAT,
        "matplotlib": _version("matplotlib"),
        "pillow": _version("pillow"),
        "unicode": unicodedata.unidata_version,
        "per_class": per_class,
        "characters": None if wanted is None else "".join(wanted),
    }
    names, payload = _cache.fetch("glyphs", key, lambda: _draw(wanted, per_class), cache)
    # A copy through torch.tensor, and no view of the buffer, because it also works inside FakeTensorMode.
    values = torch.tensor(optional("numpy").frombuffer(payload, dtype="uint8"))
    return ImageSet(values.reshape(-1, 1, SIDE, SIDE), (per_class,) * len(names), tuple(names))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        optional("PIL" if distribution == "pillow" else distribution)  # raises the error that says what to install
        return "unknown"


def _draw(wanted: list[str] | None, per_class: int) -> tuple[list[str], bytes]:
    pen = _Pen()
    candidates = [c for c in (sorted(pen.styles) if wanted is None else wanted) if _wanted(c) and c in pen.styles]
    inks = {c: found for c in _progress(candidates, "comparing characters") if (found := pen.inks(c))}
    names = _distinct(inks, {c: pen.place(found[:1])[0] for c, found in inks.items()})
    if not names:
        raise ValueError(
            "glyphs.load() was given no usable character: none is in the DejaVu fonts, or all are blanks, controls or "
            "combining marks"
        )
    drawn: dict[str, list[bytes]] = {}
    for name in _progress(names, "drawing glyphs"):
        images = pen.images(name, inks[name], per_class)
        if len(images) == per_class:
            drawn[name] = images
    return list(drawn), b"".join(image for images in drawn.values() for image in images)


def _wanted(character: str) -> bool:
    # C: control, format, private, unassigned; M: combining marks; Z: blanks. U+FFFD is the picture of a missing
    # character.
    plain = unicodedata.category(character)[0] not in "CMZ" and character != "\ufffd"
    return plain and not unicodedata.decomposition(character).startswith(_VARIANTS)


class _Pen:
    """Draws characters in the styles that have them."""

    def __init__(self) -> None:
        self._image, self._pencil, truetype = (
            optional("PIL.Image"),
            optional("PIL.ImageDraw"),
            optional("PIL.ImageFont"),
        )
        matplotlib, ft2font = optional("matplotlib"), optional("matplotlib.ft2font")
        folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        paths = [folder / f"{style}.ttf" for style in STYLES]
        # BASIC: the layout engine that every build of Pillow has.
        self._fonts = [truetype.truetype(str(path), _EM, layout_engine=truetype.Layout.BASIC) for path in paths]
        self.styles: dict[str, list[int]] = collections.defaultdict(list)
        for index, path in enumerate(paths):
            for code, glyph in ft2font.FT2Font(str(path)).get_charmap().items():
                if glyph != 0:  # glyph 0 is the box for a missing character
                    self.styles[chr(code)].append(index)
        self._boxes = [self._ink("\uffff", index) for index in range(len(paths))]

    def inks(self, character: str) -> list[Any]:
        """The character in each style that has it, regular first, cropped to the ink; empty for a character without
        ink.
        """
        found = [(self._ink(character, index), index) for index in self.styles[character]]
        return [ink for ink, index in found if ink is not None and not _same(ink, self._boxes[index])]

    def images(self, character: str, inks: list[Any], count: int) -> list[bytes]:
        """The plain regular image and jittered ones of all styles, `count` different ones in all where that many can be
        found.
        """
        # A text seed goes through SHA-512, the same on every platform and in every version of Python.
        jitter = random.Random(f"glyphs {ord(character)}")
        images = dict.fromkeys(
            self.place([inks[0]]) + self.place([inks[index % len(inks)] for index in range(1, count)], jitter)
        )
        for attempt in range(_ATTEMPTS):
            if len(images) == count:
                break
            images[self.place([inks[attempt % len(inks)]], jitter)[0]] = None
        return list(images)

    def place(self, inks: list[Any], jitter: random.Random | None = None) -> list[bytes]:
        """Each ink as a 28 x 28 image, by way of one sheet: Pillow's cost is by the call."""
        side = SIDE * _OVERSAMPLING
        sheet = self._image.new("L", (side, side * max(len(inks), 1)))
        for index, ink in enumerate(inks):
            sheet.paste(
                ink.transform(
                    (side, side), self._image.Transform.AFFINE, _affine(ink, jitter), self._image.Resampling.BILINEAR
                ),
                (0, side * index),
            )
        pixels = sheet.reduce(_OVERSAMPLING).tobytes()
        return [pixels[start : start + SIDE**2] for start in range(0, len(inks) * SIDE**2, SIDE**2)]

    def _ink(self, character: str, style: int) -> Any:
        """The character at _EM pixels, cropped to its ink; None where there is none."""
        font = self._fonts[style]
        left, top, right, bottom = font.getbbox(character)
        canvas = self._image.new("L", (max(right - left, 1) + 4, max(bottom - top, 1) + 4))
        self._pencil.Draw(canvas).text((2 - left, 2 - top), character, font=font, fill=255)
        box = canvas.getbbox()
        return None if box is None else canvas.crop(box)


def _affine(ink: Any, jitter: random.Random | None) -> tuple[float, ...]:
    """The map from the square back to the ink that centres it, shrunk where it does not fit; with `jitter`, somewhat
    distorted.
    """
    width, height = ink.size
    scale = max(1.0, width / _FIT, height / _FIT)
    a, b, c, d, shift_x, shift_y = 1.0, 0.0, 0.0, 1.0, 0.0, 0.0
    if jitter is not None:
        # Rotation up to 17 degrees, shear and scale up to 20 %, shift up to 3 pixels, about what handwriting varies by.
        # With half of it, a network fresh from its initialization learns 5-way 5-shot tasks to 98 % in ten steps, and
        # leaves nothing to meta-learn.
        turn, shear, zoom = jitter.uniform(-0.3, 0.3), jitter.uniform(-0.2, 0.2), jitter.uniform(0.8, 1.2)
        a, b, c, d = 1 / zoom, (turn + shear) / zoom, -turn / zoom, 1 / zoom
        shift_x, shift_y = jitter.uniform(-3, 3) * _OVERSAMPLING, jitter.uniform(-3, 3) * _OVERSAMPLING
    half = SIDE * _OVERSAMPLING / 2
    u, v = half + shift_x, half + shift_y  # where the centre of the ink goes
    a, b, c, d = scale * a, scale * b, scale * c, scale * d
    return a, b, width / 2 - a * u - b * v, c, d, height / 2 - c * u - d * v


def _same(ink: Any, other: Any) -> bool:
    return other is not None and ink.size == other.size and ink.tobytes() == other.tobytes()


def _distinct(inks: dict[str, list[Any]], plain: dict[str, bytes]) -> list[str]:
    """The characters that remain when each look-alike of an earlier one is left out."""
    numpy = optional("numpy")
    names = list(plain)
    if not names:
        return []
    pixels = numpy.frombuffer(b"".join(plain.values()), dtype=numpy.uint8).reshape(len(names), -1)
    # 16 grey levels: dot products stay below 2^24, so float32 sums are exact and the outcome does not depend on their
    # order.
    levels = (pixels >> 4).astype(numpy.float32)
    squares = (levels * levels).sum(1)
    near: dict[int, list[int]] = collections.defaultdict(list)
    block = 1024
    for start in range(0, len(names), block):
        rows = slice(start, start + block)
        seen = slice(0, min(start + block, len(names)))
        distances = squares[rows, None] + squares[None, seen] - 2 * (levels[rows] @ levels[seen].T)
        limits = _LOOK_ALIKE**2 * numpy.maximum(squares[rows, None], squares[None, seen])
        for row, column in zip(*numpy.nonzero(distances <= limits), strict=True):
            if column < row + start:
                near[int(row) + start].append(int(column))
    kept: list[str] = []
    dropped: set[int] = set()
    seen_inks: set[tuple[tuple[int, int], bytes]] = set()
    for index, name in enumerate(names):
        pictures = {(ink.size, ink.tobytes()) for ink in inks[name]}
        if any(other not in dropped for other in near[index]) or not seen_inks.isdisjoint(pictures):
            dropped.add(index)
        else:
            kept.append(name)
            seen_inks |= pictures
    return kept


def _progress(names: Sequence[str], what: str, every: float = 3.0) -> Iterator[str]:
    """Pass the names on, with a line on stderr every few seconds."""
    last = time.monotonic()
    for index, name in enumerate(names):
        if time.monotonic() - last > every:
            last = time.monotonic()
            print(f"bilevel: {what}, {index} of {len(names)} (once; kept in the cache)", file=sys.stderr, flush=True)
        yield name
