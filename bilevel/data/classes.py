"""Classes: examples grouped by class, what episodes are drawn from; and the check that splits share none.

| type | its examples |
| --- | --- |
| `ImageSet` | images kept as bytes, given out as floats in [0, 1] |
| `ClassSet` | one tensor of any shape and dtype, given out as it is |
| `DatasetClasses` | a torch Dataset, read when they are drawn |
"""

import abc
import collections
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from bilevel.data._checks import whole

SPLITS = ("train", "validation", "test")
ROTATION = re.compile(r"/rot\d{3}$")
"""How the names of rotated copies of a class end."""


class Classes(abc.ABC):
    """Examples of N classes, class after class.

    Attributes:
        counts: number of examples of each class. Python numbers, so that episodes can be drawn, and shapes be known,
            where tensors have no values (a forecast under fake tensors).
        names: what each class is called: its identity, in tasks and between splits.
    """

    counts: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.counts)

    @property
    def labels(self) -> Tensor:
        """The class of each example: long, shape [M]."""
        return torch.arange(len(self)).repeat_interleave(torch.tensor(self.counts), output_size=sum(self.counts))

    def starts(self) -> list[int]:
        """The position of the first example of each class."""
        return list(itertools.accumulate(self.counts, initial=0))[:-1]

    @abc.abstractmethod
    def take(self, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """The examples at these positions, as a network gets them.

        Args:
            rows: n positions in 0 .. M-1.
            dtype: of the result; None for the type's own choice.

        Returns:
            A tensor of shape [n, ...] on the device of the data.
        """

    @abc.abstractmethod
    def select(self, classes: Sequence[int]) -> Self:
        """The given classes, in the given order.

        Raises:
            IndexError: there is no class of that number.
        """

    def named(self, names: Sequence[str]) -> Self:
        """The classes of these names, in the order of the names.

        Raises:
            ValueError: no class has such a name, or a name stands twice.
        """
        where = {name: index for index, name in enumerate(self.names)}
        if missing := [name for name in names if name not in where]:
            raise ValueError(
                f"named() was given {listed(missing)}, which are no classes here; there are {listed(self.names)}"
            )
        if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
            raise ValueError(f"named() was given {listed(twice)} more than once")
        return self.select([where[name] for name in names])

    def split(self, fractions: Sequence[float] = (0.64, 0.16, 0.2), seed: int = 0) -> dict[str, Self]:
        """Disjoint classes for train, validation and test, drawn at random by `seed`.

        Args:
            fractions: shares of the classes; test receives what rounding leaves over. The default is the 64/16/20 of
                miniImageNet.
            seed: of the permutation.

        Returns:
            A dict with the keys "train", "validation" and "test". Within each, classes keep their order.

        Raises:
            ValueError: the fractions are not three non-negative numbers that sum to 1, or the seed is negative.
        """
        if len(fractions) != 3 or not min(fractions) >= 0 or not abs(sum(fractions) - 1) <= 1e-6:
            raise ValueError(
                f"split() was given fractions={tuple(fractions)}; three non-negative numbers that sum to 1 were needed"
            )
        parts = _partition(len(self), fractions, seed)
        return {name: self.select(classes) for name, classes in zip(SPLITS, parts, strict=True)}

    def _rows_of(self, classes: Sequence[int]) -> list[int]:
        """The positions of the examples of these classes."""
        if wrong := [index for index in classes if not -len(self) <= index < len(self)]:
            raise IndexError(f"select() was given class {wrong[0]}; there are {len(self)} classes")
        starts = self.starts()
        return [row for index in classes for row in range(starts[index], starts[index] + self.counts[index])]


Kind = TypeVar("Kind", bound=Classes)


def one_split(data: Kind, name: str, seed: int) -> Kind:
    """One part of `data.split(seed=seed)`, without copying the others.

    Raises:
        ValueError: no split is called `name`.
    """
    if name not in SPLITS:
        raise ValueError(f"split={name!r} was given; one of {', '.join(SPLITS)} was needed")
    return data.select(_partition(len(data), (0.64, 0.16, 0.2), seed)[SPLITS.index(name)])


def disjoint(*splits: Classes | Mapping[str, Classes], **named: Classes) -> None:
    """Check that splits share no class. Classes are told apart by name; a rotated copy of a class is that class.

    Args:
        splits: two or more sets of classes, or a dict of them, such as what `split()` returns.
        named: likewise, with a name for the message.

    Raises:
        ValueError: two splits share classes (the message names them), or there are fewer than two splits.
        TypeError: an argument is no set of classes.

    Example:
        >>> import torch
        >>> from bilevel.data import ClassSet
        >>> data = ClassSet.of(torch.randn(20, 3), torch.arange(20) % 10)
        >>> disjoint(data.split())
        >>> try: disjoint(train=data.select([0, 1, 2]), test=data.select([2, 3]))
        ... except ValueError as error: print(str(error)[:36])
        train and test share 1 class: '2'. W
    """
    found: list[tuple[str, Classes]] = []
    for number, entry in enumerate(splits):
        found += list(entry.items()) if isinstance(entry, Mapping) else [(f"split {number}", entry)]
    found += list(named.items())
    for name, entry in found:
        if not isinstance(entry, Classes):
            raise TypeError(
                f"disjoint() was given {name} of type {type(entry).__name__}; sets of classes were needed, such as "
                f"bilevel.data.ClassSet.of(x, y)"
            )
    if len(found) < 2:
        raise ValueError(f"disjoint() was given {len(found)} split; two or more were needed")
    bases = [(name, {ROTATION.sub("", each) for each in entry.names}) for name, entry in found]
    for (first, some), (second, others) in itertools.combinations(bases, 2):
        if shared := sorted(some & others):
            raise ValueError(
                f"{first} and {second} share {len(shared)} class{'es' * (len(shared) > 1)}: {listed(shared)}. What is "
                f"measured on one would have been seen in the other; split by class, with data.split(). If equal names "
                f"mean different classes, give them names of their own"
            )


def listed(names: Sequence[Any], most: int = 8) -> str:
    """Names for a message: the first few, and how many more."""
    rest = len(names) - most
    return ", ".join(repr(name) for name in names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_groups(caller: str, examples: int, counts: Sequence[int], names: Sequence[str], kind: str) -> None:
    """Raise ValueError unless counts are numbers of examples that sum to `examples`, with a name for each."""
    if min(counts, default=0) < 0:
        raise ValueError(f"{caller} was given counts={tuple(counts)}; numbers of {kind} were needed, none negative")
    if examples != sum(counts) or len(counts) != len(names):
        raise ValueError(
            f"{caller} was given {examples} {kind}, {len(counts)} counts that sum to {sum(counts)} and {len(names)} "
            f"names; counts that sum to the number of {kind} and a name for each count were needed"
        )


def _partition(classes: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    order = list(range(classes))
    # Python's generator takes a negative seed for its absolute value.
    random.Random(whole("split()", "seed", seed, 0)).shuffle(order)
    first = round(fractions[0] * classes)
    second = first + round(fractions[1] * classes)
    return [sorted(order[:first]), sorted(order[first:second]), sorted(order[second:])]
