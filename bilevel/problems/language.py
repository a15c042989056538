"""Data reweighting for a language model: one weight for each training sequence, learned on clean text, so that
corrupted sequences lose theirs.

    g(y, x) = sum_i w_i CE(net_y(a_i)) / sum_i w_i + l2/2 |y|^2,  w_i = sigmoid(x_i)        f(y) = mean_j CE(net_y(v_j))

CE is the mean over the bytes of a sequence. The sum of the weights (of a batch) is divided by, so that only which
sequences weigh more can be learned: otherwise, after few steps, it is mostly the size of all of them, which is a step
size.

Net: `transformer`, on bytes. Its sizes are arguments, so that the same problem is a tenth of a second's work or a model
of a billion parameters. Data: the source of Python's standard library, half of the training sequences noise
(`data.library`).

References: Ren et al. 2018, Learning to Reweight Examples for Robust Deep Learning, arXiv 1803.09050; Grangier et al.
2023, Adaptive Training Distributions with Scalable Online Bilevel Optimization, arXiv 2311.11973; Franceschi et al.
2017, arXiv 1703.01785 (hyper-cleaning).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.data.library import MODULES as MODULES
from bilevel.data.library import Text as Text
from bilevel.data.library import load as load
from bilevel.data.library import source as source
from bilevel.data.minibatches import rows
from bilevel.problems._nets import Params
from bilevel.problems._reweighting import auc, fit, rivals, squares
from bilevel.problems.transformer import transformer

Indexed = tuple[Tensor, Tensor]
"""Sequences [B, context + 1], and which training sequences they are [B]."""

INNER_LR, INNER_STEPS, OUTER_LR, OUTER_STEPS = 0.05, 10, 0.3, 20
"""For SGD without momentum, and Adam on the logits. From an inner lr of 0.2 on, the loss is beyond the edge of
stability: it jumps, and unrolled and corrected weights follow the jumps instead of the text (AUC down to 0.01); at 0.1
and below every estimator tried stays above 0.9, K from 2 to 10."""


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    examples: int = 64,
    batch: int | None = None,
    validation: int = 64,
    corruption: float = 0.5,
    steps: int = 50,
    l2: float = 0.0,
    dtype: torch.dtype = torch.float32,
    data: Text | None = None,
) -> tuple[bl.Problem, dict[str, Tensor], dict[str, Tensor], bl.Batches]:
    """`(problem, outer, inner, batches)`: outer {"logits": [n]} of zeros (every weight 1/2), inner the transformer.

    `Batches.outer` is the validation set, `Batches.inner` the whole training set or minibatches of it.

    Args:
        device: of all tensors.
        seed: of the data, the minibatches and the initialization.
        layers: of the transformer.
        width: of the transformer; a multiple of `heads`.
        heads: of the transformer.
        context: bytes that it sees.
        examples: training sequences.
        batch: sequences that an inner step sees, without repetition until all had their turn (more than `examples` are
            then repeated within a batch). None: every step sees all of them.
        validation: validation sequences.
        corruption: see `load`.
        steps: how many minibatches are drawn, at least the inner steps to be made; means nothing without `batch`.
        l2: of the inner loss.
        dtype: of all floating tensors. bfloat16 halves them; the library's caveats on precision then hold twice.
        data: data to use in place of `load(seed, ...)`; with its sizes, not those given here.

    Raises:
        FileNotFoundError: see `source`.
        ValueError: see `load` and `Transformer`; `batch` or `steps` is smaller than 1.

    Example:
        >>> problem, outer, inner, batches = setup(layers=1, width=16, context=16, batch=8)
        >>> hg = bl.hypergradient(problem, outer, inner, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled())
        >>> hg.grad["logits"].shape, int((hg.grad["logits"] != 0).sum())
        (torch.Size([64]), 24)
    """
    if batch is not None and batch < 1:
        raise ValueError(f"setup() was given batch={batch}; at least 1 was needed, or None for all sequences")
    if data is None:
        data = load(seed, corruption, device, context=context, examples=examples, validation=validation, test=1)
    call, inner = transformer(
        context=data.train.shape[1] - 1, layers=layers, width=width, heads=heads, seed=seed, dtype=dtype, device=device
    )

    def inner_loss(inner: Params, outer: Params, batch: Indexed) -> Tensor:
        sequences, index = batch
        weights = torch.sigmoid(outer["logits"][index])
        loss = torch.dot(weights, _losses(call, inner, sequences)) / weights.sum()
        return loss if l2 == 0 else loss + 0.5 * l2 * squares(inner)

    def outer_loss(inner: Params, outer: Params, batch: Tensor) -> Tensor:
        return _losses(call, inner, batch).mean()

    count = len(data.train)
    outer = {"logits": torch.zeros(count, dtype=dtype, device=device, requires_grad=True)}
    seen: bl.PerStep | Indexed = (data.train, torch.arange(count, device=device))
    if batch is not None:
        drawn = rows(count, batch, steps, seed)
        seen = bl.PerStep([(data.train[chosen], torch.tensor(chosen, device=device)) for chosen in drawn])
    return bl.Problem(inner_loss, outer_loss), outer, inner, bl.Batches(inner=seen, outer=data.valid)


def evaluate(
    outer: Params,
    data: Text | None = None,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    corruption: float = 0.5,
    steps: int = 100,
    lr: float = 3e-3,
) -> dict[str, float]:
    """What learned weights are worth: a fresh transformer is trained on all sequences with them, and compared.

    The baseline trains in the same way with equal weights. The ideal trains on the clean sequences only. Weights are
    divided by their mean.

    Args:
        outer: {"logits": [examples]}.
        data: what they were learned on; None for `load(seed, corruption)` with as many sequences as there are logits,
            on their device.
        seed: of the data (if they are not given); the transformer starts from another initialization than
            `setup(seed=seed)` does.
        layers: as in `setup`.
        width: as in `setup`.
        heads: as in `setup`.
        context: as in `setup`.
        corruption: as in `setup`.
        steps: steps of full-batch Adam; 0 for the AUC alone.
        lr: of Adam.

    Returns:
        `corruption_auc`: the probability that a corrupted sequence weighs less than a clean one (0.5 for equal weights;
        NaN without corruption). If there are steps, `test_loss`, in nats a byte on text not seen before, and the same
        with the prefixes `baseline_` and `ideal_`.

    Raises:
        FileNotFoundError: see `source`.
        ValueError: the number of logits is not the number of training sequences.

    Example:
        >>> data = load(context=8, examples=10)
        >>> evaluate({"logits": torch.where(data.corrupted, -1.0, 1.0)}, data, steps=0)
        {'corruption_auc': 1.0}
    """
    logits = outer["logits"].detach()
    data = load(seed, corruption, logits.device, context=context, examples=len(logits)) if data is None else data
    weighted = rivals(logits, data.corrupted)
    scores = {"corruption_auc": auc(logits, data.corrupted)}
    call, start = transformer(
        context=data.train.shape[1] - 1,
        layers=layers,
        width=width,
        heads=heads,
        seed=seed + 1,
        dtype=logits.dtype,
        device=logits.device,
    )

    def loss(params: Params, weights: Tensor) -> Tensor:
        return (weights / weights.mean() * _losses(call, params, data.train)).mean()

    for prefix, weights in weighted.items() if steps else ():
        params = fit(start, functools.partial(loss, weights=weights), steps=steps, lr=lr)
        scores[f"{prefix}test_loss"] = _losses(call, params, data.test).mean().item()
    return scores


def _losses(call: Callable[..., Tensor], params: Params, sequences: Tensor) -> Tensor:
    """Cross-entropy of each sequence, nats a byte: [B]."""
    read, told = sequences[:, :-1], sequences[:, 1:]
    losses = nn.functional.cross_entropy(call(params, read).flatten(0, 1), told.flatten(), reduction="none")
    return losses.unflatten(0, told.shape).mean(1)
