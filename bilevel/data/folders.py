"""Omniglot and CIFAR-FS from folders on the user's disk, as the same ImageSet that the glyphs come as.

Omniglot: the folders images_background/ and images_evaluation/ of https://github.com/brendenlake/omniglot
(python/*.zip), unpacked side by side; 1623 characters with 20 drawings each.
CIFAR-FS: the folder that cifar-fs.zip of https://github.com/bertinetto/r2d2 unpacks to; 100 classes with 600 images
each.

References: Lake et al. 2015, Science 350:1332; Bertinetto et al. 2019, Meta-learning with differentiable closed-form
solvers, arXiv 1805.08136.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.data._optional import optional
from bilevel.data.imageset import ImageSet

_OMNIGLOT = {
    "background": ("images_background",),
    "evaluation": ("images_evaluation",),
    "all": ("images_background", "images_evaluation"),
}
_CIFAR_FS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}


def omniglot(
    root: str | os.PathLike[str], part: str = "background", *, rotations: bool = False, side: int = 28
) -> ImageSet:
    """Omniglot: one class a character, ink 255 on 0, shape [M, 1, side, side].

    Args:
        root: the folder that holds images_background/ and images_evaluation/, each as alphabet/character/*.png.
        part: "background" (964 classes), "evaluation" (659), or "all" for the random 1200/423 split of Vinyals et al.
        rotations: add each character turned by 90, 180 and 270 degrees as classes of their own. With part="all", split
            first and call `.rotated()` on each split instead, so that no character meets its own rotation in another
            split.
        side: height and width after resizing (the files have 105 x 105 pixels).

    Returns:
        Classes sorted by path and named "alphabet/character".

    Raises:
        FileNotFoundError: an expected folder is missing or has no classes or images; the message names it.
        ValueError: `part` is unknown, `side` is smaller than 1, or a file is not an image.
    """
    if part not in _OMNIGLOT:
        raise ValueError(f"omniglot() was given part={part!r}; one of {', '.join(_OMNIGLOT)} was needed")
    if side < 1:
        raise ValueError(f"omniglot() was given side={side}; at least 1 was needed")
    names: list[str] = []
    groups: list[Tensor] = []
    for name in _OMNIGLOT[part]:
        folder = _folder(
            pathlib.Path(root) / name,
            "omniglot",
            "images_background/ and images_evaluation/ with alphabet/character/*.png",
        )
        for alphabet in _folders_in(folder, "omniglot", "alphabet/character/ with *.png files"):
            for character in _folders_in(alphabet, "omniglot", "character/ with *.png files"):
                names.append(f"{alphabet.name}/{character.name}")
                groups.append(255 - torch.stack([_read(path, "L", side) for path in _images_in(character, "omniglot")]))
    data = _together(groups, names)
    return data.rotated() if rotations else data


def cifar_fs(root: str | os.PathLike[str], split: str = "train") -> ImageSet:
    """CIFAR-FS: RGB, shape [M, 3, 32, 32]; 64, 16 and 20 classes for train, validation and test.

    Args:
        root: the folder that holds data/<class>/*.png and splits/bertinetto/{train,val,test}.txt (a class name on each
            line).
        split: "train", "validation" or "test".

    Returns:
        Classes in the order of the list file.

    Raises:
        FileNotFoundError: an expected file or folder is missing or empty; the message names it.
        ValueError: `split` is unknown, the list names a class twice, or a file is not an image of 32 x 32 pixels.
    """
    if split not in _CIFAR_FS:
        raise ValueError(f"cifar_fs() was given split={split!r}; one of {', '.join(_CIFAR_FS)} was needed")
    folder = _folder(
        pathlib.Path(root) / "data", "cifar_fs", "data/<class>/*.png and splits/bertinetto/{train,val,test}.txt"
    )
    listing = pathlib.Path(root) / "splits" / "bertinetto" / _CIFAR_FS[split]
    if not listing.is_file():
        raise FileNotFoundError(f"cifar_fs() expected the list of classes {listing}, which does not exist")
    names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise FileNotFoundError(f"cifar_fs() found no class names in {listing}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{listing} names {', '.join(twice)} more than once; as two classes they could not be told apart"
        )
    groups = []
    for name in names:
        images = _images_in(_folder(folder / name, "cifar_fs", f"a folder for each class in {listing}"), "cifar_fs")
        groups.append(torch.stack([_read(path, "RGB", 32, resize=False) for path in images]))
    return _together(groups, names)


def _together(groups: Sequence[Tensor], names: Sequence[str]) -> ImageSet:
    return ImageSet(torch.cat(list(groups)), tuple(len(group) for group in groups), tuple(names))


def _folder(path: pathlib.Path, caller: str, layout: str) -> pathlib.Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{caller}() expected the folder {path}, which does not exist; root must hold {layout}")
    return path


def _entries(path: pathlib.Path) -> list[pathlib.Path]:
    # Hidden ones are leftovers of other programs (.DS_Store, ._0001.png, .ipynb_checkpoints).
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _folders_in(path: pathlib.Path, caller: str, layout: str) -> list[pathlib.Path]:
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{caller}() found no classes in {path}; folders {layout} were expected there")
    return folders


def _images_in(path: pathlib.Path, caller: str) -> list[pathlib.Path]:
    images = [entry for entry in _entries(path) if entry.suffix.lower() == ".png"]
    if not images:
        raise FileNotFoundError(f"{caller}() found no *.png files in {path}")
    return images


def _read(path: pathlib.Path, mode: str, side: int, *, resize: bool = True) -> Tensor:
    """One file as uint8, shape [channels, side, side]."""
    pillow, numpy = optional("PIL.Image"), optional("numpy")
    try:
        with pillow.open(path) as file:
            image = _plain(file).convert(mode)
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} could not be read as an image: {error}") from error
    if image.size != (side, side):
        if not resize:
            raise ValueError(
                f"{path} is an image of {image.width} x {image.height} pixels; {side} x {side} were expected"
            )
        # BOX averages: strokes two pixels wide survive the reduction to a quarter as grey, where nearest or bilinear
        # sampling breaks them.
        image = image.resize((side, side), pillow.Resampling.BOX)
    pixels = torch.tensor(numpy.asarray(image))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def _plain(image: Any) -> Any:
    """The image as a viewer shows it: 16-bit greys scaled to 8 bits, transparent pixels on white paper.

    Pillow's own conversion clips the first, so that all but the darkest greys are white, and takes the colour that
    lies beneath the second, mostly black.
    """
    pillow, numpy = optional("PIL.Image"), optional("numpy")
    if image.mode.startswith("I"):
        return pillow.fromarray((numpy.asarray(image) >> 8).astype("uint8"))
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA"}:
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image
