"""Handwritten digits, with a share of the training labels changed to another class.

Source: scikit-learn's digits, 1797 images of 8 x 8 pixels in 17 grey levels (Alpaydin and Kaynak 1998, Optical
Recognition of Handwritten Digits, UCI Machine Learning Repository).
"""

import dataclasses
import random

import torch
from torch import Tensor

from bilevel.data._optional import optional


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """The digits, split by seed into stratified parts. Images are [n, 64] in [0, 1], labels long [n].

    Attributes:
        train_x, train_y: with corrupted labels.
        clean_y: the true training labels.
        corrupted: which training labels are wrong, bool [n].
        valid_x, valid_y, test_x, test_y: clean.
    """

    train_x: Tensor
    train_y: Tensor
    clean_y: Tensor
    corrupted: Tensor
    valid_x: Tensor
    valid_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(
    seed: int = 0,
    corruption: float = 0.4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    train: int = 1000,
    valid: int = 300,
) -> Digits:
    """Load, split and corrupt the digits.

    Args:
        seed: of the split and the corruption; the same one gives the same data.
        corruption: share of the training labels that are changed, each to another class, all nine equally likely.
        dtype: of the images; labels are long.
        device: of all tensors.
        train: size of the training set.
        valid: size of the validation set; the rest of the 1797 is the test set.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: `corruption` is not in [0, 1], or the sizes leave a part with fewer examples than there are classes.

    Example:
        >>> data = load()
        >>> len(data.train_y), len(data.valid_y), len(data.test_y), int(data.corrupted.sum())
        (1000, 300, 497, 400)
        >>> bool(((data.train_y != data.clean_y) == data.corrupted).all())
        True
    """
    if not 0 <= corruption <= 1:
        raise ValueError(f"digits with corruption={corruption} were asked for; a share in [0, 1] was needed")
    bundle = optional("sklearn.datasets").load_digits()
    images, labels = bundle.data / 16, bundle.target
    if min(train, valid, len(labels) - train - valid) < 10:
        raise ValueError(
            f"digits with train={train} and valid={valid} of {len(labels)} examples were asked for; each part, the "
            f"rest for the test too, needs at least 10"
        )
    divide = optional("sklearn.model_selection").train_test_split
    kept, test_rows = divide(range(len(labels)), train_size=train + valid, stratify=labels, random_state=seed)
    train_rows, valid_rows = divide(kept, train_size=train, stratify=labels[kept], random_state=seed)
    rng = random.Random(seed)
    noisy = labels[train_rows].copy()
    for row in rng.sample(range(train), round(corruption * train)):
        noisy[row] = (noisy[row] + rng.randint(1, 9)) % 10

    def pixels(rows: list[int]) -> Tensor:
        return torch.tensor(images[rows], dtype=dtype, device=device)

    def classes(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Digits(
        train_x=pixels(train_rows),
        train_y=classes(noisy),
        clean_y=classes(labels[train_rows]),
        corrupted=torch.tensor(noisy != labels[train_rows], device=device),
        valid_x=pixels(valid_rows),
        valid_y=classes(labels[valid_rows]),
        test_x=pixels(test_rows),
        test_y=classes(labels[test_rows]),
    )
