"""Data hyper-cleaning: one weight for each training example, learned on a clean validation set, so that corrupted
labels lose theirs.

    g(y, x) = mean_i sigmoid(x_i) CE(net_y(a_i), b_i) + l2/2 |y|^2        f(y) = mean_j CE(net_y(v_j), u_j)

Data: scikit-learn's digits (1797 images, 8 x 8); 40 % of the training labels are changed to another class. The outer
    variable has as many numbers
as there are examples, so only reverse-mode hypergradients are practical. Net: a perceptron 64-256-10.

What estimators reach with the constants below, on three seeds: benchmarks/README.md, made by `python
    benchmarks/problems.py`.

References: Franceschi et al. 2017, Forward and Reverse Gradient-Based Hyperparameter Optimization, arXiv 1703.01785;
    Shaban et al. 2019,
Truncated Back-propagation for Bilevel Optimization, arXiv 1810.10667.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bilevel.batches import Batches, PerStep
from bilevel.functional import functional
from bilevel.problem import Problem
from bilevel.problems._optional import optional

Params = Mapping[str, Tensor]
Indexed = tuple[Tensor, Tensor, Tensor]
"""Images [B, 64], labels [B], and which training examples they are [B]."""

INNER_LR, INNER_STEPS, OUTER_LR, OUTER_STEPS, L2 = 0.5, 30, 0.3, 50, 1e-3
"""For SGD without momentum carried from outer step to outer step (`iterate`'s default), and Adam on the logits. Also
tried: inner lr 1.0 (implicit estimators lose 0.1 of AUC: the inner problem is at the edge of stability), momentum 0.9
    and a restart each time (AUC 0.94), 20 inner and 40 outer
steps (0.98 unrolled, test accuracy 0.04 lower for implicit ones), l2 = 5e-4 and 2e-3 (the same AUC)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """The digits, split by seed into stratified parts. Images are [n, 64] in [0, 1], labels long [n].

    Attributes:
        train_x, train_y: with corrupted labels.
        clean_y: the true training labels.
        corrupted: which training labels are wrong, bool.
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
        raise ValueError(f"hypercleaning.load() was given corruption={corruption}; a share in [0, 1] was needed")
    bundle = optional("sklearn.datasets").load_digits()
    images, labels = bundle.data / 16, bundle.target
    if min(train, valid, len(labels) - train - valid) < 10:
        raise ValueError(
            f"hypercleaning.load() was given train={train} and valid={valid} of {len(labels)} examples; each part, "
            f"test too, needs at least 10"
        )
    divide = optional("sklearn.model_selection").train_test_split
    kept, test_rows = divide(range(len(labels)), train_size=train + valid, stratify=labels, random_state=seed)
    train_rows, valid_rows = divide(kept, train_size=train, stratify=labels[kept], random_state=seed)
    rng = random.Random(seed)
    noisy = labels[train_rows].copy()
    wrong = rng.sample(range(train), round(corruption * train))
    for row in wrong:
        noisy[row] = (noisy[row] + rng.randint(1, 9)) % 10
    mask = [False] * train
    for row in wrong:
        mask[row] = True

    def pixels(rows: list[int]) -> Tensor:
        return torch.tensor(images[rows], dtype=dtype, device=device)

    def classes(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Digits(
        train_x=pixels(train_rows),
        train_y=classes(noisy),
        clean_y=classes(labels[train_rows]),
        corrupted=torch.tensor(mask, device=device),
        valid_x=pixels(valid_rows),
        valid_y=classes(labels[valid_rows]),
        test_x=pixels(test_rows),
        test_y=classes(labels[test_rows]),
    )


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    corruption: float = 0.4,
    l2: float = L2,
    hidden: int = 256,
    dtype: torch.dtype = torch.float32,
    data: Digits | None = None,
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor], Batches]:
    """`(problem, outer, inner, batches)`: outer {"logits": [n]} of zeros (every weight 1/2), inner the perceptron's
    parameters.

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
        >>> import bilevel as bl
        >>> problem, outer, inner, batches = setup(hidden=16)
        >>> hg = bl.hypergradient(problem, outer, inner, batches, solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled())
        >>> hg.grad["logits"].shape
        torch.Size([1000])
    """
    data = load(seed, corruption, dtype, device) if data is None else data
    call, inner = _perceptron(hidden, seed, dtype, device)

    def inner_loss(inner: Params, outer: Params, batch: Indexed) -> Tensor:
        images, labels, index = batch
        losses = nn.functional.cross_entropy(call(inner, images), labels, reduction="none")
        return (torch.sigmoid(outer["logits"][index]) * losses).mean() + 0.5 * l2 * _squares(inner)

    def outer_loss(inner: Params, outer: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(call(inner, images), labels)

    count = len(data.train_y)
    outer = {"logits": torch.zeros(count, dtype=dtype, device=device, requires_grad=True)}
    everything = (data.train_x, data.train_y, torch.arange(count, device=device))
    return Problem(inner_loss, outer_loss), outer, inner, Batches(inner=everything, outer=(data.valid_x, data.valid_y))


def minibatches(batch: Indexed, size: int, steps: int, seed: int = 0) -> PerStep:
    """`steps` inner batches of `size` examples, drawn without replacement from `Batches.inner`, reshuffled when it is
    used up.

    Raises:
        ValueError: `size` is not between 1 and the number of examples.

    Example:
        >>> problem, outer, inner, batches = setup(hidden=16)
        >>> images, labels, index = minibatches(batches.inner, size=100, steps=20)[19]
        >>> tuple(images.shape), len(set(index.tolist()))
        ((100, 64), 100)
    """
    count = len(batch[2])
    if not 1 <= size <= count:
        raise ValueError(f"minibatches() was given size={size}; between 1 and the {count} examples was needed")
    rng, rows, chosen = random.Random(seed), list[int](), list[list[int]]()
    for _ in range(steps):
        if len(rows) < size:
            rows = rng.sample(range(count), count)
        chosen.append(rows[:size])
        rows = rows[size:]
    return PerStep([tuple(part[index] for part in batch) for index in chosen])


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
    if logits.shape != data.train_y.shape:
        raise ValueError(
            f"evaluate() was given logits of shape {tuple(logits.shape)}; one for each of the {len(data.train_y)} "
            f"examples was needed"
        )
    weights = torch.sigmoid(logits)
    found: dict[str, float] = {}
    for prefix, chosen in {
        "": weights,
        "baseline_": weights.mean().expand_as(weights),
        "ideal_": (~data.corrupted).to(weights),
    }.items():
        call, start = _perceptron(hidden, seed + 1, logits.dtype, logits.device)
        params = {name: tensor.requires_grad_() for name, tensor in start.items()}
        optimizer = torch.optim.Adam(params.values(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(call(params, data.train_x), data.train_y, reduction="none")
            ((chosen * losses).mean() + 0.5 * l2 * _squares(params)).backward()
            optimizer.step()
        with torch.no_grad():
            for part, images, labels in (
                ("validation", data.valid_x, data.valid_y),
                ("test", data.test_x, data.test_y),
            ):
                found[f"{prefix}{part}_accuracy"] = (call(params, images).argmax(1) == labels).float().mean().item()
    mixed = bool(data.corrupted.any()) and not bool(data.corrupted.all())
    auc = optional("sklearn.metrics").roc_auc_score
    found["corruption_auc"] = float(auc(data.corrupted.cpu().numpy(), -logits.cpu().numpy())) if mixed else float("nan")
    return found


def _perceptron(
    hidden: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    # Drawn on the CPU, so that every device starts alike; not torch.manual_seed, which would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    call, params = functional(module)
    # The tensors are moved, not the module: under fake tensors Module.to fails.
    return call, {name: tensor.to(device=device, dtype=dtype) for name, tensor in params.items()}


def _squares(params: Params) -> Tensor:
    return torch.stack([tensor.pow(2).sum() for tensor in params.values()]).sum()
