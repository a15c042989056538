"""Episodes: few-shot tasks drawn from data that are grouped by class.

`Episodes` is the loader of a training run; `episodes` draws one batch of images.

A task is `way` classes, with `shot` images of each to adapt on (support) and `query` others to be judged on. Classes
are numbered 0 .. way-1 anew in each task, so that nothing is learned about a class beyond the task.

Reference: Vinyals et al. 2016, Matching Networks for One Shot Learning, arXiv 1606.04080.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.data._checks import whole
from bilevel.data.classes import Classes, listed
from bilevel.data.imageset import ImageSet
from bilevel.data.stream import Drawn, TaskStream, digest

Labelled = tuple[Tensor, Tensor]
"""Images, float in [0, 1], and their labels."""


class Members(NamedTuple):
    """Which examples a task has of one of its classes.

    Attributes:
        name: the class.
        support, query: numbers of examples, counted from 0 within the class.
    """

    name: str
    support: tuple[int, ...]
    query: tuple[int, ...]


class Episodes(TaskStream):
    """A loader of few-shot tasks: `Batches` with support as inner and query as outer batch, for `iterate` or any loop.

    Inner batches are pairs (x, y) with x of shape [T, way * shot, ...] and y long of shape [T, way * shot], class after
    class; outer batches likewise, with `query` for `shot`. Classes are numbered 0 .. way-1 anew in each task.
    `task_ids` are strings that stand for the classes and examples of a task: equal for equal tasks, in every process.

    The batch at position i depends on the data, the arguments and i alone. A loop begins at position 0; after
    `load_state_dict(state)` or `seek(i)` the next one goes on there, with bit for bit the batches of a run that was not
    interrupted.

    Args:
        data: the classes to draw from; one split of them: a `ClassSet`, an `ImageSet`, a `DatasetClasses`.
        tasks: T, tasks in each batch.
        way: classes in each task, drawn without replacement.
        shot: support examples of each class.
        query: query examples of each class; none of them is in the task's support.
        seed: the same one gives the same tasks in every process and on every device.
        steps: batches of a loop; None for no end.
        pool: draw from a fixed collection of so many tasks, each once in a pass, for methods that remember tasks.
            None: each task is new.
        dtype: of x; None for float32 in [0, 1] for images, and for the data's own dtype otherwise.
        device: where the tensors go.

    Raises:
        TypeError: `data` is no set of classes, or a number is not whole.
        ValueError: a count is smaller than 1; there are fewer than `way` classes; a class has fewer than `shot + query`
            examples; two classes have one name; `dtype` does not fit images; otherwise as `TaskStream`.

    Memory: one batch at a time; the data are not copied.

    Example:
        >>> import torch
        >>> from bilevel.data import ClassSet
        >>> data = ClassSet.of(torch.arange(40.0).reshape(20, 2), torch.arange(20) % 4)
        >>> loader = Episodes(data, tasks=2, way=3, shot=1, query=2, steps=10)
        >>> batches = next(iter(loader))
        >>> (x, y), (query_x, query_y) = batches.inner, batches.outer
        >>> tuple(x.shape), y.tolist(), tuple(query_x.shape), batches.index
        ((2, 3, 2), [[0, 1, 2], [0, 1, 2]], (2, 6, 2), 0)
        >>> state = loader.state_dict()
        >>> torch.equal(loader[1].inner[0], next(iter(loader)).inner[0])  # a new loop begins at 0
        False
        >>> loader.load_state_dict(state)
        >>> torch.equal(loader[1].inner[0], next(iter(loader)).inner[0])
        True
    """

    def __init__(
        self,
        data: Classes,
        *,
        tasks: int = 4,
        way: int = 5,
        shot: int = 5,
        query: int = 15,
        seed: int = 0,
        steps: int | None = None,
        pool: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tasks=tasks, seed=seed, steps=steps, pool=pool, device=device)
        if not isinstance(data, Classes):
            raise TypeError(
                f"Episodes was given a {type(data).__name__}; examples by class were needed: ClassSet.of(x, y) for "
                f"arrays, ClassSet.of_dataset(dataset) for a torch Dataset, folders.image_folder(root) for files"
            )
        self.data = data
        self.way = whole("Episodes", "way", way)
        self.shot = whole("Episodes", "shot", shot)
        self.query = whole("Episodes", "query", query)
        _check_plenty("Episodes", data, self.way, self.shot, self.query, "examples")
        if len(set(data.names)) < len(data.names):
            twice = sorted({name for name in data.names if data.names.count(name) > 1})
            raise ValueError(
                f"Episodes was given data in which {listed(twice)} stands more than once; a task could have the same "
                f"class under two labels. Merge them, or give them different names"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"Episodes was given dtype={dtype!r}; a torch.dtype was needed, such as torch.float32")
        if dtype is not None and not dtype.is_floating_point and isinstance(data, ImageSet):
            raise ValueError(f"Episodes was given dtype={dtype}; images in [0, 1] need a floating one")
        self.dtype = dtype
        self._start = dict(zip(data.names, data.starts(), strict=True))
        self._digest = digest([list(data.names), list(data.counts)])

    def settings(self) -> dict[str, Any]:
        return {"way": self.way, "shot": self.shot, "query": self.query, "data": self._digest}

    def members(self, number: int) -> list[Members]:
        """The classes and examples of task `number`, in the order of its labels.

        Args:
            number: batch i has the tasks `numbers(i)`.
        """
        rng, found = self.generator("task", number), list[Members]()
        for index in rng.sample(range(len(self.data)), self.way):
            rows = rng.sample(range(self.data.counts[index]), self.shot + self.query)
            found.append(Members(self.data.names[index], tuple(rows[: self.shot]), tuple(rows[self.shot :])))
        return found

    def draw(self, numbers: list[int]) -> Drawn:
        chosen = [self.members(number) for number in numbers]
        support = [self._start[each.name] + row for task in chosen for each in task for row in each.support]
        query = [self._start[each.name] + row for task in chosen for each in task for row in each.query]
        return Drawn(
            self._labelled(support, len(numbers), self.shot),
            self._labelled(query, len(numbers), self.query),
            [digest(task) for task in chosen],
        )

    def _labelled(self, rows: Sequence[int], tasks: int, each: int) -> Labelled:
        x = self.data.take(rows, self.dtype)
        y = torch.arange(self.way, device="cpu").repeat_interleave(each).expand(tasks, -1).contiguous()
        return x.reshape(tasks, self.way * each, *x.shape[1:]), y


def episodes(
    data: ImageSet,
    *,
    tasks: int,
    way: int = 5,
    shot: int = 5,
    query: int = 15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Labelled, Labelled]:
    """Draw tasks.

    Args:
        data: the classes to draw from; one split of them.
        tasks: T, how many tasks.
        way: classes in each task, drawn without replacement.
        shot: support images of each class.
        query: query images of each class; none of them is in the task's support.
        seed: the same seed gives the same tasks on every device; another one gives others.
        dtype: of the images.
        device: where the tensors go.

    Returns:
        `(support, query)`, each a pair (x, y): x of shape [T, way * shot, channels, height, width] (for query way *
        query), y long of shape [T, way * shot], class after class.

    Raises:
        ValueError: a count is smaller than 1; there are fewer than `way` classes; a class has fewer than `shot + query`
            images; `dtype` is not floating; the seed is negative.

    Example:
        >>> from bilevel.data import glyphs
        >>> data = glyphs.load("ABCDEFGH", cache=getfixture("tmp_path"))
        >>> (x, y), (query_x, query_y) = episodes(data, tasks=2, way=3, shot=1, query=4)
        >>> tuple(x.shape), y.tolist(), tuple(query_x.shape)
        ((2, 3, 1, 28, 28), [[0, 1, 2], [0, 1, 2]], (2, 12, 1, 28, 28))
    """
    for name, value in {"tasks": tasks, "way": way, "shot": shot, "query": query}.items():
        if value < 1:
            raise ValueError(f"episodes() was given {name}={value}; at least 1 was needed")
    if not dtype.is_floating_point:
        raise ValueError(f"episodes() was given dtype={dtype}; images in [0, 1] need a floating one")
    if seed < 0:
        raise ValueError(
            f"episodes() was given seed={seed}; Python's generator takes it for {-seed}. Give a number from 0"
        )
    _check_plenty("episodes()", data, way, shot, query, "images")
    # Python's generator and Python's counts: shapes and choices exist even where tensors have no values (forecasts
    # under fake tensors).
    rng, starts = random.Random(seed), data.starts()
    support_rows: list[int] = []
    query_rows: list[int] = []
    for _ in range(tasks):
        for index in rng.sample(range(len(data)), way):
            chosen = [starts[index] + image for image in rng.sample(range(data.counts[index]), shot + query)]
            support_rows += chosen[:shot]
            query_rows += chosen[shot:]

    def labelled(rows: list[int], each: int) -> Labelled:
        images = data.images[rows].to(device=device, dtype=dtype) / 255
        labels = torch.arange(way, device=device).repeat_interleave(each).expand(tasks, -1).contiguous()
        return images.reshape(tasks, way * each, *data.images.shape[1:]), labels

    return labelled(support_rows, shot), labelled(query_rows, query)


def _check_plenty(caller: str, data: Classes, way: int, shot: int, query: int, kind: str) -> None:
    """Raise ValueError unless there are enough classes, and enough examples in each."""
    if way > len(data):
        raise ValueError(
            f"{caller} was given way={way}, but the data have {len(data)} classes; ask for fewer, or take a larger "
            f"split"
        )
    poorest = min(range(len(data)), key=lambda index: data.counts[index])
    if shot + query > data.counts[poorest]:
        raise ValueError(
            f"{caller} was given shot={shot} and query={query}, {shot + query} {kind} of each class, but class "
            f"{data.names[poorest]!r} has {data.counts[poorest]}; ask for fewer, or leave that class out with "
            f"data.select(...)"
        )
