"""The diabetes study: 442 patients, 10 features, and the progress of the disease a year later.

Source: bundled with scikit-learn; Efron et al. 2004, Least Angle Regression, Annals of Statistics 32:407.
"""

import dataclasses
import random

import torch
from torch import Tensor

from bilevel.data._optional import optional

Labelled = tuple[Tensor, Tensor]
"""Features [n, 10] and responses [n]."""

SIZES = (222, 110, 110)
"""Patients for training, validation and test: a half and two quarters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Diabetes:
    """The three parts of the data, standardised by the training part's mean and deviation.

    Attributes:
        train, valid, test: features [n, 10] and responses [n].
        features: what the features are called.
    """

    train: Labelled
    valid: Labelled
    test: Labelled
    features: tuple[str, ...]


def load(seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Diabetes:
    """Load and split the diabetes data.

    Args:
        seed: of the random split; the same one gives the same split.
        dtype: of the tensors.
        device: of the tensors.

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> data = load()
        >>> tuple(data.train[0].shape), tuple(data.valid[1].shape), data.features[:3]
        ((222, 10), (110,), ('age', 'sex', 'bmi'))
    """
    bundle = optional("sklearn.datasets").load_diabetes(scaled=False)
    order = list(range(sum(SIZES)))
    random.Random(seed).shuffle(order)
    train, valid, test = order[: SIZES[0]], order[SIZES[0] : -SIZES[2]], order[-SIZES[2] :]

    def part(rows: list[int]) -> Labelled:
        features, responses = (
            torch.tensor((values[rows] - values[train].mean(0)) / values[train].std(0), dtype=dtype, device=device)
            for values in (bundle.data, bundle.target)
        )
        return features, responses

    return Diabetes(train=part(train), valid=part(valid), test=part(test), features=tuple(bundle.feature_names))
