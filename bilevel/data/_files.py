"""Images and folders on the user's disk: found in order, read as a viewer shows them, named in every error."""

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.data._optional import optional
from bilevel.data.imageset import ImageSet

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def together(groups: Sequence[Tensor], names: Sequence[str]) -> ImageSet:
    """The images of each class, as one set."""
    return ImageSet(torch.cat(list(groups)), tuple(len(group) for group in groups), tuple(names))


def folder_at(path: pathlib.Path, caller: str, layout: str) -> pathlib.Path:
    """The folder, if it is there."""
    if not path.is_dir():
        raise FileNotFoundError(f"{caller}() expected the folder {path}, which does not exist; root must hold {layout}")
    return path


def entries(path: pathlib.Path) -> list[pathlib.Path]:
    """What lies in a folder, in order."""
    # Hidden ones are leftovers of other programs (.DS_Store, ._0001.png, .ipynb_checkpoints).
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def folders_in(path: pathlib.Path, caller: str, layout: str) -> list[pathlib.Path]:
    """The folders in a folder, at least one."""
    folders = [entry for entry in entries(path) if entry.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{caller}() found no classes in {path}; folders {layout} were expected there")
    return folders


def images_in(path: pathlib.Path, caller: str) -> list[pathlib.Path]:
    """The PNG images that lie in a folder."""
    images = [entry for entry in entries(path) if entry.suffix.lower() == ".png"]
    if not images:
        raise FileNotFoundError(f"{caller}() found no *.png files in {path}")
    return images


def read(path: pathlib.Path, mode: str, side: int, *, resize: bool = True, photo: bool = False) -> Tensor:
    """One file as uint8, shape [channels, side, side]; squeezed to a square where it is none."""
    pillow, numpy = optional("PIL.Image"), optional("numpy")
    try:
        with pillow.open(path) as file:
            if file.mode == "F":
                raise ValueError("its pixels are floating numbers, of which white is unknown; save it with 8 bits")
            image = _plain(file).convert(mode)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} could not be read as an image: {error}") from error
    if image.size != (side, side):
        if not resize:
            raise ValueError(
                f"{path} is an image of {image.width} x {image.height} pixels; {side} x {side} were expected"
            )
        # BOX averages: strokes two pixels wide survive the reduction to a quarter as grey, where nearest or bilinear
        # sampling breaks them. Photographs stay sharper with LANCZOS.
        image = image.resize((side, side), pillow.Resampling.LANCZOS if photo else pillow.Resampling.BOX)
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
