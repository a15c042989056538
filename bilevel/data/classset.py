"""ClassSet: examples of any shape and dtype, grouped by class, from arrays or from a torch Dataset."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.data._optional import optional
from bilevel.data.classes import Classes, check_groups, listed


@dataclasses.dataclass(frozen=True, eq=False)
class ClassSet(Classes):
    """Examples of N classes in one tensor, class after class. `ClassSet.of(x, y)` sorts them into that order.

    Args:
        examples: shape [M, ...], any dtype; images, features, signals, tokens.
        counts: number of examples of each class, N entries that sum to M.
        names: what each class is called, N different entries.

    Raises:
        TypeError: `examples` is no tensor.
        ValueError: the sizes do not fit together, a count is negative, or a name stands twice.

    Example:
        >>> import torch
        >>> data = ClassSet.of(torch.tensor([[1.0], [2.0], [3.0]]), ["cat", "ant", "cat"])
        >>> data.names, data.counts, data.take([0, 2]).tolist()
        (('ant', 'cat'), (1, 2), [[2.0], [3.0]])
    """

    examples: Tensor
    counts: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.examples, Tensor):
            raise TypeError(
                f"ClassSet was given examples of type {type(self.examples).__name__}; a tensor was needed. "
                f"ClassSet.of(x, y) takes arrays"
            )
        object.__setattr__(self, "counts", tuple(int(count) for count in self.counts))
        object.__setattr__(self, "names", tuple(self.names))
        if self.examples.dim() == 0:
            raise ValueError("ClassSet was given examples without a first dimension; shape [M, ...] was needed")
        check_groups("ClassSet", len(self.examples), self.counts, self.names, "examples")
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"ClassSet was given {listed(twice)} more than once; each class needs a name of its own")

    @classmethod
    def of(cls, x: Any, y: Any, names: Mapping[Any, str] | Sequence[str] | None = None) -> "ClassSet":
        """Group examples by their labels.

        Args:
            x: shape [M, ...]: a tensor, an array, or a sequence of equally shaped ones.
            y: M labels: whole numbers or strings; a tensor, an array or a sequence.
            names: what each label is called: a dict, or for labels 0 .. N-1 a sequence. None for the label itself.

        Returns:
            Classes in the order of their labels; within each, examples in the order given. The examples are copied.

        Raises:
            TypeError: `x` or `y` can be read only once, or is of no such kind; labels are neither whole numbers nor
                strings.
            ValueError: there are no examples, x and y differ in length, or a label has no name.
        """
        examples = tensor_of("ClassSet.of()", x)
        if examples.dim() == 0:
            raise ValueError("ClassSet.of() was given x without a first dimension; shape [M, ...] was needed")
        order, counts, called = grouped("ClassSet.of()", len(examples), y, names)
        return cls(examples[list(order)], counts, called)

    @classmethod
    def of_dataset(
        cls, dataset: Any, labels: Any = None, names: Mapping[Any, str] | Sequence[str] | None = None
    ) -> "ClassSet":
        """Read a torch Dataset into memory; `DatasetClasses.of` leaves it where it is.

        Args:
            dataset: map-style: `dataset[i]` is a pair (x, y), and it has a length. All x have one shape.
            labels: the labels, in place of the y of the pairs.
            names: as for `of`.

        Raises:
            TypeError: it can be read only once, has no length, or gives no pairs of a tensor and a label.
            ValueError: as for `of`; or the shapes of its examples differ.
        """
        return DatasetClasses.of(dataset, labels, names).loaded()

    def take(self, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        taken = self.examples[[int(row) for row in rows]]  # (a list of tensors would be an index for each dimension)
        return taken if dtype is None else taken.to(dtype)

    def select(self, classes: Sequence[int]) -> "ClassSet":
        """The given classes, in the given order. The examples are copied.

        Raises:
            IndexError: there is no class of that number.
            ValueError: a class stands twice.
        """
        return ClassSet(
            self.examples[self._rows_of(classes)],
            tuple(self.counts[index] for index in classes),
            tuple(self.names[index] for index in classes),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetClasses(Classes):
    """A torch Dataset by class, whose items are read when they are drawn: for data larger than memory.

    An item should be the same each time it is read: with random augmentation in the dataset, a resumed run sees other
    examples than one that was not interrupted.

    Args:
        dataset: map-style, gives pairs (x, y).
        order: the rows of the dataset, class after class.
        counts: number of examples of each class.
        names: what each class is called.

    Example:
        >>> import torch
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(6.0), torch.tensor([1, 0, 1, 0, 1, 0]))
        >>> data = DatasetClasses.of(dataset)
        >>> data.names, data.counts, data.take([0, 3]).tolist()
        (('0', '1'), (3, 3), [1.0, 0.0])
    """

    dataset: Any
    order: tuple[int, ...]
    counts: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_groups("DatasetClasses", len(self.order), self.counts, self.names, "examples")

    @classmethod
    def of(
        cls, dataset: Any, labels: Any = None, names: Mapping[Any, str] | Sequence[str] | None = None
    ) -> "DatasetClasses":
        """Group the items of a torch Dataset by their labels.

        Args:
            dataset: map-style: `dataset[i]` is a pair (x, y), and it has a length.
            labels: the labels; None to read every item once for its y.
            names: as for `ClassSet.of`.

        Raises:
            TypeError: it can be read only once, has no length, or gives no pairs of a tensor and a label.
            ValueError: it is empty, `labels` has another length, or a label has no name.
        """
        check_dataset("DatasetClasses.of()", dataset)
        if labels is None:
            labels = [_pair(dataset, row)[1] for row in range(len(dataset))]
        return cls(dataset, *grouped("DatasetClasses.of()", len(dataset), labels, names))

    def take(self, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        numbers = [self.order[row] for row in rows]
        items = [_example(self.dataset, number) for number in numbers]
        for number, item in zip(numbers, items, strict=True):
            if item.shape != items[0].shape:
                raise ValueError(
                    f"item {number} of the dataset has shape {tuple(item.shape)}, item {numbers[0]} has "
                    f"{tuple(items[0].shape)}; one shape was needed. Resize them in the dataset's transform"
                )
        taken = torch.stack(items)
        return taken if dtype is None else taken.to(dtype)

    def select(self, classes: Sequence[int]) -> "DatasetClasses":
        order = tuple(self.order[row] for row in self._rows_of(classes))
        counts, names = (tuple(values[index] for index in classes) for values in (self.counts, self.names))
        return DatasetClasses(self.dataset, order, counts, names)  # type: ignore[arg-type]

    def loaded(self) -> ClassSet:
        """All examples in memory."""
        return ClassSet(self.take(range(len(self.order))), self.counts, self.names)


def check_dataset(caller: str, dataset: Any) -> None:
    """Raise unless `dataset` can be read by index, again and again."""
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise TypeError(f"{caller} was given a DataLoader, whose order may change; give its dataset, loader.dataset")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise TypeError(
            f"{caller} was given a {type(dataset).__name__}, which can be read only once or in one order; a map-style "
            f"dataset with a length was needed, such as list(...) of it"
        )
    if isinstance(dataset, (Tensor, Mapping)):
        raise TypeError(
            f"{caller} was given a {type(dataset).__name__}; a dataset of pairs (x, y) was needed. For tensors write "
            f"ClassSet.of(x, y)"
        )


def grouped(
    caller: str, examples: int, labels: Any, names: Mapping[Any, str] | Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """The order that puts examples class after class, the counts and the names of the classes."""
    values = _labels(caller, labels)
    if len(values) != examples:
        raise ValueError(f"{caller} was given {examples} examples and {len(values)} labels; one label each was needed")
    if not values:
        raise ValueError(f"{caller} was given no examples")
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(value, []).append(row)
    classes = sorted(rows)
    if names is not None and not isinstance(names, Mapping):
        names = dict(enumerate(names))
    if names is not None and (nameless := [value for value in classes if value not in names]):
        raise ValueError(f"{caller} was given names for {listed(list(names))}, but none for {listed(nameless)}")
    called = tuple(str(value if names is None else names[value]) for value in classes)
    return tuple(row for value in classes for row in rows[value]), tuple(len(rows[value]) for value in classes), called


def tensor_of(caller: str, x: Any) -> Tensor:
    """A tensor without a graph, of an array, a tensor or a sequence of either."""
    if isinstance(x, Tensor):
        if x.layout is not torch.strided:
            raise TypeError(f"{caller} was given a tensor of layout {x.layout}; write x.to_dense()")
        return x.detach()
    try:
        if hasattr(x, "__array__"):
            numpy = optional("numpy")
            if numpy.ma.is_masked(x):
                raise TypeError("it has masked entries, which a tensor would show; fill them first")
            array = numpy.asarray(x, order="C")
            array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
            return torch.as_tensor(array)
        if isinstance(x, Sequence) and not isinstance(x, (str, bytes)):
            return torch.stack([tensor_of(caller, entry) for entry in x]) if x else torch.empty(0)
        if isinstance(x, (bool, int, float, complex)):
            return torch.tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{caller} could not make one tensor of x, a {type(x).__name__}: {error}") from error
    once = ", which can be read only once" if hasattr(x, "__next__") else ""
    raise TypeError(
        f"{caller} was given x of type {type(x).__name__}{once}; a tensor, an array or a sequence of them was needed. "
        f"For a torch Dataset write ClassSet.of_dataset(dataset)"
    )


def _labels(caller: str, labels: Any) -> list[int] | list[str]:
    if not (hasattr(labels, "tolist") or isinstance(labels, Sequence)):
        raise TypeError(f"{caller} was given labels of type {type(labels).__name__}; a sequence or tensor was needed")
    shape = getattr(labels, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(
            f"{caller} was given labels of shape {tuple(shape)}; one label for each example, shape [M], was needed"
            + (". For one-hot rows write y.argmax(1)" if len(shape) == 2 and shape[1] > 1 else "")
        )
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    values = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value for value in values]
    values = [int(value) if isinstance(value, bool) else value for value in values]
    if not (all(isinstance(value, int) for value in values) or all(isinstance(value, str) for value in values)):
        kinds = sorted({type(value).__name__ for value in values})
        raise TypeError(
            f"{caller} was given labels of type {', '.join(kinds)}; whole numbers or strings were needed"
            + (": write y.long()" if "float" in kinds else "")
        )
    return values


def _pair(dataset: Any, row: int) -> tuple[Any, Any]:
    item = dataset[row]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"item {row} of the dataset is a {type(item).__name__}; a pair (x, y) of an example and its label was "
            f"needed"
        )
    return item[0], item[1]


def _example(dataset: Any, row: int) -> Tensor:
    x = _pair(dataset, row)[0]
    if not isinstance(x, (Tensor, bool, int, float)) and (hasattr(x, "convert") or not hasattr(x, "__array__")):
        raise TypeError(
            f"item {row} of the dataset has an x of type {type(x).__name__}; a tensor or an array was needed. Give the "
            f"dataset a transform, such as torchvision's ToTensor()"
        )
    return tensor_of("the dataset", x)
