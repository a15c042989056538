"""Data hyper-cleaning: one weight for each training example, learned on a clean validation set, so that corrupted
labels lose theirs.

    g(y, x) = mean_i sigmoid(x_i) CE(net_y(a_i), b_i) + l2/2 |y|^2        f(y) = mean_j CE(net_y(v_j), u_j)

Data: 1797 digits; 40 % of the training labels are changed to another class. The outer variable has as many numbers as
there are examples, so only reverse-mode hypergradients are practical. Net: a perceptron 64-256-10.

What estimators reach with the constants below, on three seeds: benchmarks/README.md, made by
`python benchmarks/problems.py`.

References: Franceschi et al. 2017, Forward and Reverse Gradient-Based Hyperparameter Optimization, arXiv 1703.01785;
Shaban et al. 2019, Truncated Back-propagation for Bilevel Optimization, arXiv 1810.10667.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.data.digits import Digits as Digits
from bilevel.data.digits import load as load
from bilevel.data.minibatches import rows
from bilevel.problems._nets import Params, placed, seeded
from bilevel.problems._reweighting import auc, fit, rivals, squares

Indexed = tuple[Tensor, Tensor, Tensor]
"""Images [B, 64], labels [B], and which training examples they are [B]."""

INNER_LR, INNER_STEPS, OUTER_LR, OUTER_STEPS, L2 = 0.5, 30, 0.3, 50, 1e-3
"""For SGD without momentum carried from outer step to outer step (`iterate`'s default), and Adam on the logits. Also
tried: inner lr 1.0 (implicit estimators lose 0.1 of AUC: the inner problem is at the edge of stability), momentum 0.9
and a restart each time (AUC 0.94), 20 inner and 40 outer steps (0.98 unrolled, test accuracy 0.04 lower for implicit
ones), l2 = 5e-4 and 2e-3 (the same AUC)."""


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    corruption: float = 0.4,
    l2: float = L2,
    hidden: int = 256,
    dtype: torch.dtype = torch.float32,
    data: Digits | None = None,
) -> tuple[bl.Problem, dict[str, Tensor], dict[str, Tensor], bl.Batches]:
    """`(problem, outer, inner, batches)`: outer {"logits": [n]} of zeros (every weight 1/2), inner the perceptron.

    `Batches.inner` is the whole training set with its indices, `Batches.outer` the validation set; `minibatches` gives
    smaller inner ones.

    Args:
        device: of all tensors.
        seed: of the data and of the initialization.
        corruption: see `load`.
        l2: of the inner loss. From 5e-3 on, it alone resists most of the noise and weights have little left to gain.
        hidden: width of the perceptron.
        dtype: of all floating tensors.
        data: data to use in place of `load(seed, corruption, dtype, device)`.

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> problem, outer, inner, batches = setup(hidden=16)
        >>> hg = bl.hypergradient(problem, outer, inner, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled())
        >>> hg.grad["logits"].shape
        torch.Size([1000])
    """
    data = load(seed, corruption, dtype, device) if data is None else data
    call, inner = _perceptron(hidden, seed, dtype, device)

    def inner_loss(inner: Params, outer: Params, batch: Indexed) -> Tensor:
        images, labels, index = batch
        losses = nn.functional.cross_entropy(call(inner, images), labels, reduction="none")
        return (torch.sigmoid(outer["logits"][index]) * losses).mean() + 0.5 * l2 * squares(inner)

    def outer_loss(inner: Params, outer: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(call(inner, images), labels)

    count = len(data.train_y)
    outer = {"logits": torch.zeros(count, dtype=dtype, device=device, requires_grad=True)}
    everything = (data.train_x, data.train_y, torch.arange(count, device=device))
    batches = bl.Batches(inner=everything, outer=(data.valid_x, data.valid_y))
    return bl.Problem(inner_loss, outer_loss), outer, inner, batches


def minibatches(batch: Indexed, size: int, steps: int, seed: int = 0) -> bl.PerStep:
    """`steps` inner batches of `size` examples from `Batches.inner`, drawn as `data.minibatches` says.

    Raises:
        ValueError: `size` is not between 1 and the number of examples, or `steps` is smaller than 1.

    Example:
        >>> problem, outer, inner, batches = setup(hidden=16)
        >>> images, labels, index = minibatches(batches.inner, size=100, steps=20)[19]
        >>> tuple(images.shape), len(set(index.tolist()))
        ((100, 64), 100)
    """
    count = len(batch[2])
    if size > count:
        raise ValueError(f"minibatches() was given size={size}; there are {count} examples")
    return bl.PerStep([tuple(part[index] for part in batch) for index in rows(count, size, steps, seed)])


def evaluate(
    outer: Params,
    data: Digits | None = None,
    *,
    seed: int = 0,
    steps: int = 300,
    lr: float = 1e-2,
    l2: float = L2,
    hidden: int = 256,
) -> dict[str, float]:
    """What learned weights are worth: a fresh perceptron is trained on the corrupted labels with them, and compared.

    The baseline trains in the same way with equal weights, as large as the learned ones are on average, so that only
    the differences between weights count and not their size against the penalty. The ideal trains on the uncorrupted
    examples only.

    Args:
        outer: {"logits": [n]}.
        data: what they were learned on; None for `load(seed)` in their dtype and on their device.
        seed: of the data (if they are not given); the perceptron starts from another initialization than
            `setup(seed=seed)` does.
        steps: steps of full-batch Adam, until the loss is flat.
        lr: of Adam.
        l2: as in `setup`.
        hidden: as in `setup`.

    Returns:
        `validation_accuracy`, `test_accuracy`, the same with the prefixes `baseline_` and `ideal_`, and
        `corruption_auc`: the probability that a corrupted example weighs less than a clean one (0.5 for equal weights;
        NaN without corruption). Validation examples trained the weights: judge by the test set.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: the number of logits is not the number of training examples.
    """
    logits = outer["logits"].detach()
    data = load(seed, dtype=logits.dtype, device=logits.device) if data is None else data
    call, start = _perceptron(hidden, seed + 1, logits.dtype, logits.device)

    def loss(params: Params, weights: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(call(params, data.train_x), data.train_y, reduction="none")
        return (weights * losses).mean() + 0.5 * l2 * squares(params)

    def accuracy(params: Params, images: Tensor, labels: Tensor) -> float:
        return (call(params, images).argmax(1) == labels).float().mean().item()

    scores: dict[str, float] = {}
    for prefix, weights in rivals(logits, data.corrupted).items():
        params = fit(start, functools.partial(loss, weights=weights), steps=steps, lr=lr)
        scores[f"{prefix}validation_accuracy"] = accuracy(params, data.valid_x, data.valid_y)
        scores[f"{prefix}test_accuracy"] = accuracy(params, data.test_x, data.test_y)
    return {**scores, "corruption_auc": auc(logits, data.corrupted)}


def _perceptron(
    hidden: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    with seeded(seed):
        module = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return placed(module, dtype, device)
