"""Data reweighting for a language model: one weight for each training sequence, learned on clean text, so that
corrupted sequences lose theirs.

    g(y, x) = sum_i w_i CE(net_y(a_i)) / sum_i w_i + l2/2 |y|^2,  w_i = sigmoid(x_i)        f(y) = mean_j CE(net_y(v_j))

CE is the mean over the bytes of a sequence. The sum of the weights (of a batch) is divided by, so that only which
sequences weigh more can be
learned: otherwise, after few steps, it is mostly the size of all of them, which is a step size.

Net: `transformer`, on bytes. Its sizes are arguments, so that the same problem is a tenth of a second's work or a model
    of a billion parameters.

Text: modules of the standard library of the Python that runs this, which every machine has: those of `MODULES`, in that
    order, from the folder
of `os.__file__`. The text, and so every number, is the same for the same Python version. Its last fifth is kept for
validation and test. A share of the training sequences is replaced by bytes drawn uniformly at random.

References: Ren et al. 2018, Learning to Reweight Examples for Robust Deep Learning, arXiv 1803.09050; Grangier et al.
    2023, Adaptive Training
Distributions with Scalable Online Bilevel Optimization, arXiv 2311.11973; Franceschi et al. 2017, arXiv 1703.01785
(hyper-cleaning).
"""

import dataclasses
import os
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bilevel.batches import Batches, PerStep
from bilevel.problem import Problem
from bilevel.problems.transformer import transformer

Params = Mapping[str, Tensor]
Indexed = tuple[Tensor, Tensor]
"""Sequences [B, context + 1], and which training sequences they are [B]."""

INNER_LR, INNER_STEPS, OUTER_LR, OUTER_STEPS = 0.05, 10, 0.3, 20
"""For SGD without momentum, and Adam on the logits. From an inner lr of 0.2 on, the loss is beyond the edge of
stability: it jumps, and unrolled and corrected weights follow the jumps instead of the text (AUC down to 0.01); at 0.1
    and below every estimator tried stays above 0.9, K from 2 to 10."""

# Modules that have been single files of some length from Python 3.11 on.
MODULES = (
    "argparse", "ast", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "enum", "fractions", "functools",
    "heapq", "inspect", "locale", "optparse", "pickle", "pprint", "random", "shlex", "shutil", "socket", "statistics", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "typing", "uuid", "warnings", "weakref",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Byte sequences, long [n, context + 1]: what is read and, one place on, what is to be predicted.

    Attributes:
        train: some of it corrupted.
        corrupted: which sequences of `train` are, bool [n].
        valid, test: clean, from other text.
    """

    train: Tensor
    corrupted: Tensor
    valid: Tensor
    test: Tensor


def source(folder: str | os.PathLike[str] | None = None) -> bytes:
    """The text: `MODULES`, one after the other.

    Args:
        folder: where they are; None for the standard library's.

    Raises:
        FileNotFoundError: this Python keeps its library elsewhere (in a zip file, say).

    Example:
        >>> b"import" in source()
        True
    """
    library = pathlib.Path(os.__file__).parent if folder is None else pathlib.Path(folder)
    try:
        # Windows keeps other line ends.
        return b"".join((library / f"{name}.py").read_bytes().replace(b"\r\n", b"\n") for name in MODULES)
    except OSError as error:
        raise FileNotFoundError(
            f"the text of this problem is the source of Python's standard library, and {error.filename} could not be "
            f"read. Pass text of your own: language.setup(data=language.load(text=...))"
        ) from error


def load(
    seed: int = 0,
    corruption: float = 0.5,
    device: torch.device | str = "cpu",
    *,
    context: int = 64,
    examples: int = 64,
    validation: int = 64,
    test: int = 64,
    text: bytes | None = None,
) -> Text:
    """Cut sequences out of the text, at random places, and corrupt some.

    Args:
        seed: of the places and the corruption; the same one gives the same data.
        corruption: share of the training sequences that are replaced by random bytes.
        device: of all tensors.
        context: length of the sequences, less the one byte that is only predicted.
        examples: how many training sequences.
        validation: how many validation sequences.
        test: how many test sequences.
        text: in place of `source()`.

    Raises:
        FileNotFoundError: see `source`.
        ValueError: `corruption` is not in [0, 1], a size is smaller than 1, or the text is too short.

    Example:
        >>> data = load(context=24)
        >>> data.train.shape, int(data.corrupted.sum())
        (torch.Size([64, 25]), 32)
        >>> len(bytes(data.valid[0].tolist()))
        25
    """
    if not 0 <= corruption <= 1:
        raise ValueError(f"language.load() was given corruption={corruption}; a share in [0, 1] was needed")
    for name, size in {"context": context, "examples": examples, "validation": validation, "test": test}.items():
        if size < 1:
            raise ValueError(f"language.load() was given {name}={size}; at least 1 was needed")
    text = source() if text is None else text
    length, kept = context + 1, len(text) * 4 // 5
    if min(kept, len(text) - kept) < length:
        raise ValueError(
            f"language.load() was given context={context}, and a text of {len(text)} bytes; the last fifth must hold "
            f"{length}"
        )
    rng = random.Random(seed)

    def cut(count: int, low: int, high: int) -> list[bytes]:
        places = [rng.randrange(low, high - length + 1) for _ in range(count)]
        return [text[place : place + length] for place in places]

    # In this order: which sequences are corrupted depends on no other size, and the training set on none of the other
    # sets'.
    wrong = set(rng.sample(range(examples), round(corruption * examples)))
    train = [rng.randbytes(length) if row in wrong else sequence for row, sequence in enumerate(cut(examples, 0, kept))]
    valid, unseen = cut(validation, kept, len(text)), cut(test, kept, len(text))

    def numbers(sequences: list[bytes]) -> Tensor:
        return torch.tensor([list(sequence) for sequence in sequences], device=device)

    corrupted = torch.tensor([row in wrong for row in range(examples)], device=device)
    return Text(train=numbers(train), corrupted=corrupted, valid=numbers(valid), test=numbers(unseen))


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
) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor], Batches]:
    """`(problem, outer, inner, batches)`: outer {"logits": [examples]} of zeros (every weight 1/2), inner the
    transformer's parameters.

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
        ValueError: see `load` and `Transformer`; `batch` is smaller than 1.

    Example:
        >>> import bilevel as bl
        >>> problem, outer, inner, batches = setup(layers=1, width=16, context=16, batch=8)
        >>> hg = bl.hypergradient(problem, outer, inner, batches, solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled())
        >>> hg.grad["logits"].shape, int((hg.grad["logits"] != 0).sum())
        (torch.Size([64]), 24)
    """
    if batch is not None and batch < 1:
        raise ValueError(f"language.setup() was given batch={batch}; at least 1 was needed, or None for all sequences")
    if data is None:
        data = load(seed, corruption, device, context=context, examples=examples, validation=validation, test=1)
    call, inner = transformer(
        context=data.train.shape[1] - 1, layers=layers, width=width, heads=heads, seed=seed, dtype=dtype, device=device
    )

    def inner_loss(inner: Params, outer: Params, batch: Indexed) -> Tensor:
        sequences, index = batch
        weights = torch.sigmoid(outer["logits"][index])
        loss = torch.dot(weights, _losses(call, inner, sequences)) / weights.sum()
        return loss if l2 == 0 else loss + 0.5 * l2 * _squares(inner)

    def outer_loss(inner: Params, outer: Params, batch: Tensor) -> Tensor:
        return _losses(call, inner, batch).mean()

    count = len(data.train)
    outer = {"logits": torch.zeros(count, dtype=dtype, device=device, requires_grad=True)}
    if batch is None:
        return (
            Problem(inner_loss, outer_loss),
            outer,
            inner,
            Batches(inner=(data.train, torch.arange(count, device=device)), outer=data.valid),
        )
    minibatches = [(data.train[rows], torch.tensor(rows, device=device)) for rows in _rows(count, batch, steps, seed)]
    return Problem(inner_loss, outer_loss), outer, inner, Batches(inner=PerStep(minibatches), outer=data.valid)


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
    """What learned weights are worth: a fresh transformer is trained on the partly corrupted sequences with them, and
    compared.

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
    if logits.shape != data.corrupted.shape:
        raise ValueError(
            f"evaluate() was given logits of shape {tuple(logits.shape)}; one for each of the {len(data.corrupted)} "
            f"sequences was needed"
        )
    found = {"corruption_auc": _auc(logits.double(), data.corrupted)}
    weights = torch.sigmoid(logits)
    for prefix, chosen in (
        {"": weights, "baseline_": torch.ones_like(weights), "ideal_": (~data.corrupted).to(weights)}.items()
        if steps
        else ()
    ):
        call, start = transformer(
            context=data.train.shape[1] - 1,
            layers=layers,
            width=width,
            heads=heads,
            seed=seed + 1,
            dtype=logits.dtype,
            device=logits.device,
        )
        params = {name: tensor.requires_grad_() for name, tensor in start.items()}
        optimizer = torch.optim.Adam(params.values(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (chosen / chosen.mean() * _losses(call, params, data.train)).mean().backward()
            optimizer.step()
        with torch.no_grad():
            found[f"{prefix}test_loss"] = _losses(call, params, data.test).mean().item()
    return found


def _losses(call: Callable[..., Tensor], params: Params, sequences: Tensor) -> Tensor:
    """Cross-entropy of each sequence, nats a byte: [B]."""
    read, told = sequences[:, :-1], sequences[:, 1:]
    scores = call(params, read)
    return (
        nn.functional.cross_entropy(scores.flatten(0, 1), told.flatten(), reduction="none")
        .unflatten(0, told.shape)
        .mean(1)
    )


def _rows(count: int, size: int, steps: int, seed: int) -> Sequence[list[int]]:
    rng, rows, chosen = random.Random(seed), list[int](), list[list[int]]()
    for _ in range(steps):
        while len(rows) < size:
            rows += rng.sample(range(count), count)
        chosen.append(rows[:size])
        rows = rows[size:]
    return chosen


def _auc(logits: Tensor, corrupted: Tensor) -> float:
    clean, wrong = logits[~corrupted].sort().values, logits[corrupted]
    if not len(clean) or not len(wrong):
        return float("nan")
    # For each corrupted one, how many clean ones are larger, ties half.
    below, upto = (torch.searchsorted(clean, wrong, right=right).double() for right in (False, True))
    return 1 - ((below + upto) / 2).mean().item() / len(clean)


def _squares(params: Params) -> Tensor:
    return torch.stack([tensor.pow(2).sum() for tensor in params.values()]).sum()
