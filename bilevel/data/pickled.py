"""FC100 and miniImageNet as they are passed around: pickles of arrays, or images with lists, on your disk.

Both are read into the same ImageSet that the glyphs come as. The formats are those that the loaders of learn2learn, of
MetaOptNet and of Ren et al. (few-shot-ssl) read; what was tried here are small files of the same form, not the data
sets themselves, which are not ours to pass on. Pickles are read without running them.

References: Oreshkin et al. 2018, TADAM, arXiv 1805.10123 (FC100); Vinyals et al. 2016, arXiv 1606.04080, and Ravi and
Larochelle 2017, Optimization as a Model for Few-Shot Learning, ICLR (miniImageNet and its split).
"""

import csv
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from bilevel.data import _pickles
from bilevel.data._checks import whole
from bilevel.data._files import folder_at, read, together
from bilevel.data._optional import optional
from bilevel.data.classset import grouped, tensor_of
from bilevel.data.folders import image_folder
from bilevel.data.imageset import ImageSet

_SHORT = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def fc100(root: str | os.PathLike[str], split: str = "train") -> ImageSet:
    """FC100: RGB, shape [M, 3, 32, 32]; 60, 20 and 20 classes for train, validation and test, disjoint in superclasses.

    Args:
        root: the folder that holds FC100_train.pickle, FC100_val.pickle and FC100_test.pickle (dicts of "data", uint8
            [M, 32, 32, 3], and "labels", M numbers), or folders train/, val/ and test/ with a folder of images for each
            class.
        split: "train", "validation" or "test".

    Returns:
        Classes in the order of their labels, named by them (by their folders).

    Raises:
        FileNotFoundError: neither is there, or a folder is empty; the message names it.
        ValueError: `split` is unknown; a file is damaged, asks for more than arrays, or holds something else.
    """
    short = _split_names("fc100", split)[0]
    file = pathlib.Path(root) / f"FC100_{short}.pickle"
    if file.is_file():
        content = _content(file, "data", "labels")
        images = _images(file, "data", content["data"])
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"{file} has images of {images.shape[3]} x {images.shape[2]} pixels; 32 x 32 were expected"
            )
        order, counts, names = grouped(str(file), len(images), content["labels"], None)
        return ImageSet(images[list(order)], counts, names)
    if (pathlib.Path(root) / short).is_dir():
        return image_folder(pathlib.Path(root) / short, side=32)
    raise FileNotFoundError(
        f"fc100() found neither {file} nor the folder {pathlib.Path(root) / short}; root must hold "
        f"FC100_{{train,val,test}}.pickle, or train/, val/ and test/ with a folder of images for each class"
    )


def mini_imagenet(root: str | os.PathLike[str], split: str = "train", *, side: int = 84) -> ImageSet:
    """MiniImageNet: RGB, shape [M, 3, side, side]; 64, 16 and 20 classes of 600 images (Ravi and Larochelle's split).

    Args:
        root: the folder that holds train.csv, val.csv and test.csv (lines filename,label) beside images/; or
            mini-imagenet-cache-train.pkl, -val.pkl (or -validation.pkl) and -test.pkl (dicts of "image_data", uint8
            [M, 84, 84, 3], and "class_dict", the rows of each class). Lists come before pickles where both are there.
        split: "train", "validation" or "test".
        side: height and width after resizing; with pickles, that of their images.

    Returns:
        Classes in the order of the file, named by their labels (such as n01532829). 64 classes take 0.8 GB.

    Raises:
        FileNotFoundError: an expected file or folder is missing, or a list is empty; the message names it.
        ValueError: `split` is unknown; a file is damaged, asks for more than arrays, or holds something else.
    """
    names = _split_names("mini_imagenet", split)
    whole("mini_imagenet()", "side", side)
    listing = pathlib.Path(root) / f"{names[0]}.csv"
    if listing.is_file():
        return _listed_images(listing, side)
    files = [pathlib.Path(root) / f"mini-imagenet-cache-{name}.pkl" for name in names]
    for file in files:
        if file.is_file():
            return _cached_images(file, side)
    raise FileNotFoundError(
        f"mini_imagenet() found neither {listing} nor {' nor '.join(map(str, files))}; root must hold "
        f"{{train,val,test}}.csv and images/, or mini-imagenet-cache-{{train,val,test}}.pkl"
    )


def _split_names(caller: str, split: str) -> tuple[str, ...]:
    if split not in _SHORT:
        raise ValueError(f"{caller}() was given split={split!r}; one of {', '.join(_SHORT)} was needed")
    return _SHORT[split]


def _listed_images(listing: pathlib.Path, side: int) -> ImageSet:
    folder = folder_at(listing.parent / "images", "mini_imagenet", f"images/ beside {listing.name}")
    rows: dict[str, list[str]] = {}
    with listing.open(newline="", encoding="utf-8-sig") as file:
        for number, line in enumerate(csv.reader(file)):
            cells = [cell.strip() for cell in line]
            if not any(cells) or (number == 0 and cells == ["filename", "label"]):
                continue
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"line {number + 1} of {listing} is {','.join(line)!r}; filename,label was expected")
            rows.setdefault(cells[1], []).append(cells[0])
    if not rows:
        raise FileNotFoundError(f"mini_imagenet() found no images in the list {listing}")
    files = [name for names in rows.values() for name in names]
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise ValueError(f"{listing} lists {twice} more than once; it could be in support and query at once")
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{listing} lists {name}, which is not in {folder}")
    groups = [torch.stack([read(folder / name, "RGB", side, photo=True) for name in names]) for names in rows.values()]
    return together(groups, list(rows))


def _cached_images(file: pathlib.Path, side: int) -> ImageSet:
    content = _content(file, "image_data", "class_dict")
    images, classes = _images(file, "image_data", content["image_data"]), content["class_dict"]
    if images.shape[2:] != (side, side):
        raise ValueError(
            f"{file} has images of {images.shape[3]} x {images.shape[2]} pixels, and side={side} was asked for; pass "
            f"side={images.shape[2]}, or use the lists with images/"
        )
    if not isinstance(classes, Mapping) or not classes:
        raise ValueError(f"{file} has a class_dict of type {type(classes).__name__}; a dict of rows was expected")
    rows = {str(name): [int(row) for row in values] for name, values in classes.items()}
    order = [row for values in rows.values() for row in values]
    if len(set(order)) < len(order) or min(order, default=0) < 0 or max(order, default=-1) >= len(images):
        raise ValueError(f"{file} has a class_dict whose rows are not different numbers in 0 .. {len(images) - 1}")
    if empty := [name for name, values in rows.items() if not values]:
        raise ValueError(f"{file} has no images of {', '.join(empty)}")
    return ImageSet(images[order], tuple(len(values) for values in rows.values()), tuple(rows))


def _content(file: pathlib.Path, *keys: str) -> dict[str, Any]:
    content = _pickles.load(file)
    if isinstance(content, Mapping):
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    if not isinstance(content, dict) or not set(keys) <= set(content):
        has = f"the keys {sorted(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{file} holds {has}; a dict with {' and '.join(keys)} was expected")
    return content


def _images(file: pathlib.Path, key: str, array: Any) -> torch.Tensor:
    """[M, height, width, 3] as uint8 [M, 3, height, width]."""
    array = optional("numpy").asarray(array)
    if array.dtype != "uint8" or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(
            f"{file} has {key} of dtype {array.dtype} and shape {array.shape}; uint8 [M, height, width, 3] was expected"
        )
    return tensor_of(str(file), array).permute(0, 3, 1, 2).contiguous()
