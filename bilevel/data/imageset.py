"""ImageSet: images grouped by class, the type that few-shot data sets of images come as."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.data.classes import SPLITS as SPLITS
from bilevel.data.classes import Classes
from bilevel.data.classes import one_split as one_split


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet(Classes):
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

    def take(self, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Images as floats in [0, 1], by default float32.

        Raises:
            ValueError: `dtype` is not floating.
        """
        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"an ImageSet was asked for dtype={dtype}; images in [0, 1] need a floating one")
        return self.images[[int(row) for row in rows]].to(dtype) / 255

    def select(self, classes: Sequence[int]) -> "ImageSet":
        """The given classes, in the given order. The images are copied.

        Raises:
            IndexError: there is no class of that number.
        """
        return ImageSet(
            self.images[self._rows_of(classes)],
            tuple(self.counts[index] for index in classes),
            tuple(self.names[index] for index in classes),
        )

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
