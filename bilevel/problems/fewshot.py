"""Few-shot classification: an initialization x from which a few steps on a new task's support images do well on its
query images (MAML).

    g_i(y) = CE(net_y, support_i)     y_0 = x     f_i(y) = CE(net_y, query_i)     F(x) = mean_i f_i(y_K,i(x))

Data: characters drawn from the DejaVu fonts (`data.glyphs`), or any other ImageSet, such as Omniglot's or CIFAR-FS's
(`data.folders`). Net: `conv4`. The losses are those of one task; every tensor in the batches has a leading task
dimension T, so the estimator is `TaskMean(...)`.

What it reaches on unseen characters: benchmarks/README.md, made by `python benchmarks/problems.py`. On a CPU a chunk of
one task is as fast as all at once, and needs less memory.

Reference: Finn, Abbeel, Levine 2017, Model-Agnostic Meta-Learning, arXiv 1703.03400.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.data import glyphs
from bilevel.data.episodes import Labelled, episodes
from bilevel.data.imageset import ImageSet, one_split
from bilevel.problems._nets import Params, placed
from bilevel.problems.conv4 import conv4

INNER_LR, INNER_STEPS, OUTER_LR = 0.1, 5, 2e-3


def load(split: str = "train", seed: int = 0) -> ImageSet:
    """One split of the glyphs, disjoint in characters from the others: 64 % train, 16 % validation, 20 % test.

    Args:
        split: "train", "validation" or "test".
        seed: of the split.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: no split has that name.
    """
    return one_split(glyphs.load(), split, seed)


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    tasks: int = 4,
    way: int = 5,
    shot: int = 5,
    query: int = 15,
    split: str = "train",
    data: ImageSet | None = None,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[bl.Problem, dict[str, Tensor], None, bl.Batches]:
    """`(problem, outer, None, batches)`: outer the network's parameters, from which every task starts.

    Args:
        device: of all tensors.
        seed: of the split, the episodes and the initialization.
        tasks: T, how many tasks.
        way: classes in each task.
        shot: support images of each class.
        query: query images of each class.
        split: which characters.
        data: an ImageSet to draw from in place of `load(split, seed)`; already the split you mean.
        width: channels of each block of the network.
        dtype: of all floating tensors.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: see `episodes`.

    Example:
        >>> letters = glyphs.load("ABCDEFGH", cache=getfixture("tmp_path"))
        >>> problem, outer, inner, batches = setup(tasks=2, shot=1, query=2, width=4, data=letters)
        >>> hg = bl.hypergradient(problem, outer, inner, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=1), estimator=bl.TaskMean(bl.Unrolled()))
        >>> hg.grad["0.weight"].shape, hg.inner["0.weight"].shape
        (torch.Size([4, 1, 3, 3]), torch.Size([2, 4, 1, 3, 3]))
    """
    data = load(split, seed) if data is None else data
    problem, _, params = _maml(data, way, width, seed, dtype, device)
    outer = {name: tensor.requires_grad_() for name, tensor in params.items()}
    support, asked = episodes(data, tasks=tasks, way=way, shot=shot, query=query, seed=seed, dtype=dtype, device=device)
    return problem, outer, None, bl.Batches(inner=support, outer=asked)


def stream(
    data: ImageSet,
    *,
    steps: int | None = None,
    tasks: int = 4,
    way: int = 5,
    shot: int = 5,
    query: int = 15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[bl.Batches]:
    """Fresh tasks for every outer step: a loader for `iterate`. One that can be resumed is `bilevel.data.Episodes`.

    Args:
        data: the split to draw from.
        steps: how many batches; None for no end.
        tasks: tasks in each batch.
        way: classes in each task.
        shot: support images of each class.
        query: query images of each class.
        seed: of the first batch's tasks; each later batch is drawn with a seed of its own.
        dtype: of the images.
        device: where the tensors go.

    Yields:
        `Batches` with support as inner and query as outer.

    Example:
        >>> letters = glyphs.load("ABCDEFGH", cache=getfixture("tmp_path"))
        >>> [batches.inner[0].shape[0] for batches in stream(letters, steps=2, tasks=3, query=5)]
        [3, 3]
    """
    for index in itertools.count() if steps is None else range(steps):
        # A large stride: the streams of seeds 0, 1, 2, ... share no batch.
        fresh = seed + 1_000_003 * index
        support, asked = episodes(
            data, tasks=tasks, way=way, shot=shot, query=query, seed=fresh, dtype=dtype, device=device
        )
        yield bl.Batches(inner=support, outer=asked)


def evaluate(
    outer: Params,
    data: ImageSet | None = None,
    *,
    seed: int = 0,
    tasks: int = 100,
    way: int = 5,
    shot: int = 5,
    query: int = 15,
    lr: float = INNER_LR,
    steps: int = 10,
    chunk: int = 10,
) -> dict[str, float]:
    """Accuracy on new tasks after plain gradient descent from x.

    Args:
        outer: the network's parameters, as `setup` returns them.
        data: the classes to be judged on; None for the glyphs' test split.
        seed: of the split and of the tasks. The same seed gives the same tasks, so that two initializations are
            compared on equal terms.
        tasks: how many.
        way: classes in each task; the network's.
        shot: support images of each class.
        query: query images of each class.
        lr: step size of the adaptation.
        steps: steps of the adaptation.
        chunk: tasks at once; more need more memory.

    Returns:
        `accuracy`: mean over the tasks of the share of query images that are classified rightly. `accuracy_interval`:
        half the width of its 95 % confidence interval, 1.96 standard deviations over tasks / sqrt(tasks).
        `unadapted_accuracy`: the same before any step.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: `tasks` is smaller than 2, so that there is no interval, or `way` is not the network's; otherwise
            see `episodes`.
    """
    if tasks < 2:
        raise ValueError(f"evaluate() was given tasks={tasks}; at least 2 were needed for an interval")
    head = list(outer.values())[-1]
    if len(head) != way:
        raise ValueError(f"evaluate() was given way={way}, but the network has {len(head)} outputs")
    data = load("test", seed) if data is None else data
    width, dtype, device = len(next(iter(outer.values()))), head.dtype, head.device
    problem, call, _ = _maml(data, way, width, seed, dtype, device)
    support, asked = episodes(data, tasks=tasks, way=way, shot=shot, query=query, seed=seed, dtype=dtype, device=device)
    adapted = bl.hypergradient(
        problem,
        dict(outer),
        None,
        bl.Batches(inner=support, outer=asked),
        solver=bl.Descent(bl.SGD(lr=lr), steps=steps),
        estimator=bl.TaskMean(bl.FirstOrder(), chunk=chunk),
    )
    with torch.no_grad():
        before = torch.stack([_accuracy(call(outer, x), y) for x, y in zip(*asked, strict=True)])
        params = [{name: tensor[task] for name, tensor in adapted.inner.items()} for task in range(tasks)]
        after = torch.stack([_accuracy(call(each, x), y) for each, x, y in zip(params, *asked, strict=True)])
    return {
        "accuracy": after.mean().item(),
        "accuracy_interval": 1.96 * after.std().item() / tasks**0.5,
        "unadapted_accuracy": before.mean().item(),
    }


def _accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(1) == labels).double().mean()


def _maml(
    data: ImageSet, way: int, width: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[bl.Problem, Callable[..., Tensor], dict[str, Tensor]]:
    channels, height, side = data.images.shape[1:]
    if height != side:
        raise ValueError(f"the images are {height} x {side}; the network, conv4, needs square ones")
    call, params = placed(conv4(way, channels=channels, side=side, width=width, seed=seed), dtype, device)

    def loss(inner: Params, outer: Params, batch: Labelled) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(call(inner, images), labels)

    return bl.Problem(loss, loss, init=lambda outer, batch: outer), call, params
