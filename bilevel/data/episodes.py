"""Episodes: few-shot tasks drawn from an ImageSet.

A task is `way` classes, with `shot` images of each to adapt on (support) and `query` others to be judged on. Classes
are numbered 0 .. way-1 anew in each task, so that nothing is learned about a class beyond the task.

Reference: Vinyals et al. 2016, Matching Networks for One Shot Learning, arXiv 1606.04080.
"""

import random

import torch
from torch import Tensor

from bilevel.data.imageset import ImageSet

Labelled = tuple[Tensor, Tensor]
"""Images, float in [0, 1], and their labels."""


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
            images; `dtype` is not floating.

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
    if way > len(data):
        raise ValueError(
            f"episodes() was given way={way}, but the data have {len(data)} classes; ask for fewer, or take a larger "
            f"split"
        )
    poorest = min(range(len(data)), key=lambda index: data.counts[index])
    if shot + query > data.counts[poorest]:
        raise ValueError(
            f"episodes() was given shot={shot} and query={query}, {shot + query} images of each class, but class "
            f"{data.names[poorest]!r} has {data.counts[poorest]}; ask for fewer, or leave that class out with "
            f"data.select(...)"
        )
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
