"""ImageSet: images grouped by class, the one type that every few-shot data set comes as."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of N classes, kept as bytes (a quarter of float32) and sorted by class.

    Args:
        images: uint8, shape [M, channels, height, width]; 255 is ink (or full intensity). Class after class.
        counts: number of images of each class, N entries that sum to M. Python numbers, so that episodes can be drawn,
            and shapes be known, where tensors have no values (a forecast under fake tensors).
        names: what each class is called, N entries.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: the shapes do not fit together, or a count is negative.

    Example:
        >>> import torch
        >>> data = ImageSet(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), counts=(3, 2), names=("a", "b"))
        >>> len(data), data.labels.tolist(), data.select([1]).names
        (2, [0, 0, 0, 1, 1], ('b',))
    """

    images: Tensor
    counts: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise TypeError(
                f"ImageSet was given {self.images.dtype} images; uint8 was needed. Write (images * "
                f"255).round().to(torch.uint8)"
            )
        object.__setattr__(self, "counts", tuple(int(count) for count in self.counts))
        object.__setattr__(self, "names", tuple(self.names))
        if min(self.counts, default=0) < 0:
            raise ValueError(f"ImageSet was given counts={self.counts}; numbers of images were needed, none negative")
        if self.images.dim() != 4 or self.images.shape[0] != sum(self.counts) or len(self.counts) != len(self.names):
            raise ValueError(
                f"ImageSet was given images of shape {tuple(self.images.shape)}, {len(self.counts)} counts that sum to "
                f"{sum(self.counts)} and {len(self.names)} names; images [M, channels, height, width], counts that sum "
                f"to M and a name for each count were needed"
            )

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.counts)

    @property
    def labels(self) -> Tensor:
        """The class of each image: long, shape [M]."""
        return torch.arange(len(self)).repeat_interleave(torch.tensor(self.counts), output_size=sum(self.counts))

    def starts(self) -> list[int]:
        """The position of the first image of each class."""
        return list(itertools.accumulate(self.counts, initial=0))[:-1]

    def select(self, classes: Sequence[int]) -> "ImageSet":
        """The given classes, in the given order. The images are copied.

        Raises:
            IndexError: there is no class of that number.
        """
        if wrong := [index for index in classes if not -len(self) <= index < len(self)]:
            raise IndexError(f"select() was given class {wrong[0]}; there are {len(self)} classes")
        starts = self.starts()
        rows = [row for index in classes for row in range(starts[index], starts[index] + self.counts[index])]
        return ImageSet(
            self.images[rows],
            tuple(self.counts[index] for index in classes),
            tuple(self.names[index] for index in classes),
        )

    def split(self, fractions: Sequence[float] = (0.64, 0.16, 0.2), seed: int = 0) -> dict[str, "ImageSet"]:
        """Disjoint classes for train, validation and test, drawn at random by `seed`.

        Args:
            fractions: shares of the classes; test receives what rounding leaves over. The default is the 64/16/20 of
                miniImageNet.
            seed: of the permutation.

        Returns:
            A dict with the keys "train", "validation" and "test". Within each, classes keep their order.

        Raises:
            ValueError: the fractions are not three non-negative numbers that sum to 1.
        """
        if len(fractions) != 3 or not min(fractions) >= 0 or not abs(sum(fractions) - 1) <= 1e-6:
            raise ValueError(
                f"split() was given fractions={tuple(fractions)}; three non-negative numbers that sum to 1 were needed"
            )
        return {
            name: self.select(classes)
            for name, classes in zip(SPLITS, _partition(len(self), fractions, seed), strict=True)
        }

    def rotated(self) -> "ImageSet":
        """Four times the classes: each one turned by 0, 90, 180 and 270 degrees, the usual enlargement of Omniglot.

        Split first and rotate each part afterwards: otherwise a character meets its own rotation in another split.

        Raises:
            ValueError: the images are not square.
        """
        if self.images.shape[2] != self.images.shape[3]:
            raise ValueError(
                f"rotated() needs square images; these are {self.images.shape[2]} x {self.images.shape[3]}"
            )
        turned = torch.cat([torch.rot90(self.images, quarter, (2, 3)) for quarter in range(4)])
        names = tuple(f"{name}/rot{90 * quarter:03d}" for quarter in range(4) for name in self.names)
        return ImageSet(turned, self.counts * 4, names)


def one_split(data: ImageSet, name: str, seed: int) -> ImageSet:
    """One part of `data.split(seed=seed)`, without copying the others.

    Raises:
        ValueError: no split is called `name`.
    """
    if name not in SPLITS:
        raise ValueError(f"split={name!r} was given; one of {', '.join(SPLITS)} was needed")
    return data.select(_partition(len(data), (0.64, 0.16, 0.2), seed)[SPLITS.index(name)])


def _partition(classes: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    order = list(range(classes))
    random.Random(seed).shuffle(order)
    first = round(fractions[0] * classes)
    second = first + round(fractions[1] * classes)
    return [sorted(order[:first]), sorted(order[first:second]), sorted(order[second:])]
