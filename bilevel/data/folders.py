"""Image data sets from folders on the user's disk, as the same ImageSet that the glyphs come as.

Any: a folder for each class, with images in it.
Omniglot: the folders images_background/ and images_evaluation/ of https://github.com/brendenlake/omniglot
(python/*.zip), unpacked side by side; 1623 characters with 20 drawings each.
CIFAR-FS: the folder that cifar-fs.zip of https://github.com/bertinetto/r2d2 unpacks to; 100 classes with 600 images
each.

References: Lake et al. 2015, Science 350:1332; Bertinetto et al. 2019, Meta-learning with differentiable closed-form
solvers, arXiv 1805.08136.
"""

import collections
import itertools
import os
import pathlib

import torch
from torch import Tensor

from bilevel.data._checks import whole
from bilevel.data._files import PICTURES, entries, folder_at, folders_in, images_in, read, together
from bilevel.data.classes import ROTATION, listed
from bilevel.data.imageset import ImageSet

_OMNIGLOT = {
    "background": ("images_background",),
    "evaluation": ("images_evaluation",),
    "all": ("images_background", "images_evaluation"),
}
_CIFAR_FS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}


def image_folder(root: str | os.PathLike[str], *, side: int, mode: str = "RGB") -> ImageSet:
    """Images in a folder for each class, of any size and usual format, shape [M, channels, side, side].

    Args:
        root: holds class/**/*.png, *.jpg, *.jpeg, *.bmp, *.gif, *.webp, *.ppm, *.pgm or *.tif, as torchvision's
            ImageFolder does. Hidden files and folders, and files of other kinds, are passed over.
        side: height and width; images of other sizes are squeezed to it, not cropped.
        mode: "RGB", or "L" for one grey channel (255 is white).

    Returns:
        Classes sorted and named by folder; images sorted by path.

    Raises:
        FileNotFoundError: the folder is missing, has no folders in it, or a class has no images; the message names it.
        ValueError: a file is not an image, `side` is smaller than 1, or `mode` is unknown.
    """
    whole("image_folder()", "side", side)
    if mode not in ("RGB", "L"):
        raise ValueError(f"image_folder() was given mode={mode!r}; 'RGB' or 'L' was needed")
    top = folder_at(pathlib.Path(root), "image_folder", "a folder of images for each class")
    classes = folders_in(top, "image_folder", "of images, one for each class,")
    files = [_images_below(each) for each in classes]
    for each, found in zip(classes, files, strict=True):
        if not found:
            kinds = ", ".join(f"*{suffix}" for suffix in PICTURES)
            raise FileNotFoundError(f"image_folder() found no images in {each}; {kinds} were expected there")
    groups = [torch.stack([read(path, mode, side, photo=True) for path in found]) for found in files]
    return together(groups, [each.name for each in classes])


def omniglot(
    root: str | os.PathLike[str], part: str = "background", *, rotations: bool = False, side: int = 28
) -> ImageSet:
    """Omniglot: one class a character, ink 255 on 0, shape [M, 1, side, side].

    Args:
        root: the folder that holds images_background/ and images_evaluation/, each as alphabet/character/*.png.
        part: "background" (964 classes), "evaluation" (659), or "all", for splits across the two: the lists of
            Vinyals et al. by `by_list`, or 1200/423 characters at random by `.split((1200 / 1623, 0, 423 / 1623))`.
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
        folder = folder_at(
            pathlib.Path(root) / name,
            "omniglot",
            "images_background/ and images_evaluation/ with alphabet/character/*.png",
        )
        for alphabet in folders_in(folder, "omniglot", "alphabet/character/ with *.png files"):
            for character in folders_in(alphabet, "omniglot", "character/ with *.png files"):
                names.append(f"{alphabet.name}/{character.name}")
                groups.append(255 - torch.stack([read(path, "L", side) for path in images_in(character, "omniglot")]))
    data = together(groups, names)
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
    folder = folder_at(
        pathlib.Path(root) / "data", "cifar_fs", "data/<class>/*.png and splits/bertinetto/{train,val,test}.txt"
    )
    listing = pathlib.Path(root) / "splits" / "bertinetto" / _CIFAR_FS[split]
    if not listing.is_file():
        raise FileNotFoundError(f"cifar_fs() expected the list of classes {listing}, which does not exist")
    names = _names_in(listing, "cifar_fs")
    groups = []
    for name in names:
        images = images_in(folder_at(folder / name, "cifar_fs", f"a folder for each class in {listing}"), "cifar_fs")
        groups.append(torch.stack([read(path, "RGB", 32, resize=False) for path in images]))
    return together(groups, names)


def by_list(data: ImageSet, path: str | os.PathLike[str]) -> ImageSet:
    """The classes that a text file names, one on each line, in its order.

    So the lists of Vinyals et al. for Omniglot, as the prototypical networks of Snell et al. keep them
    (data/omniglot/splits/vinyals/{train,val,test}.txt, lines such as Hebrew/character01/rot090), split
    `omniglot(root, "all")`.

    Args:
        data: all classes.
        path: of the file. A line may end in /rot000, /rot090, /rot180 or /rot270, for a class that is turned so much.

    Raises:
        FileNotFoundError: there is no such file, or it is empty.
        ValueError: it names a class that is not in `data`, or one twice; or images that are turned are not square.
    """
    names = _names_in(pathlib.Path(path), "by_list")
    if set(names) <= set(data.names):
        return data.named(names)
    where = dict(zip(data.names, data.starts(), strict=True))
    count = dict(zip(data.names, data.counts, strict=True))
    groups = []
    for name in names:
        base = ROTATION.sub("", name)
        quarter, rest = (0, 0) if base == name else divmod(int(name[-3:]), 90)
        if base not in where or rest or quarter > 3:
            raise ValueError(
                f"{path} names {name!r}, which is no class here, nor one turned by 0, 90, 180 or 270 degrees; there "
                f"are {listed(data.names)}"
            )
        images = data.images[where[base] : where[base] + count[base]]
        if quarter % 2 and images.shape[2] != images.shape[3]:
            raise ValueError(f"{path} turns {base!r}, whose images are not square")
        groups.append(torch.rot90(images, quarter, (2, 3)))
    return together(groups, names)


def _names_in(listing: pathlib.Path, caller: str) -> list[str]:
    """The lines of a list of classes."""
    if not listing.is_file():
        raise FileNotFoundError(f"{caller}() expected the list of classes {listing}, which does not exist")
    names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise FileNotFoundError(f"{caller}() found no class names in {listing}")
    if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
        raise ValueError(
            f"{listing} names {', '.join(twice)} more than once; as two classes they could not be told apart"
        )
    return names


def _images_below(path: pathlib.Path) -> list[pathlib.Path]:
    """The images in a folder and the folders in it."""
    found = [[entry] if not entry.is_dir() else _images_below(entry) for entry in entries(path)]
    return [entry for entry in itertools.chain.from_iterable(found) if entry.suffix.lower() in PICTURES]
