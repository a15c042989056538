"""P2: hyper-cleaning of a perceptron with 238,510 numbers by 5,000 weights, a minibatch of 500 for each inner step.

The problem P2 of ../shared/bench (784-300-10, 40 % of the labels changed, weight decay 1e-3 in the inner loss, SGD
0.1), as a case file: every estimator of the library and the methods of other libraries in one report.

    bilevel compare benchmarks/cases/p2.py --estimators all --baselines betty higher torchopt --out report-p2

The data are random numbers of that shape; the outer variable enters the inner loss alone.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl

EXAMPLES, BATCH, CLASSES, INPUTS, HIDDEN = 5000, 500, 10, 784, 300
DECAY, DAMPING = 1e-3, 0.5

OPTIMIZER = bl.SGD(lr=0.1)
INNER_STEPS = (20,)
OUTER_STEPS = 0
ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "unrolled last 5": bl.Unrolled(last=5),
    # After 20 steps the Hessian is indefinite.
    "implicit CG, damped": bl.Implicit(bl.CG(max_steps=10, tol=1e-3, damping=DAMPING)),
    "memory-reduced, damped": bl.MemoryReduced(steps=10, tol=1e-3, damping=DAMPING),
    "first-order corrected": bl.FirstOrderCorrected(),
}


def logits(y: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The perceptron."""
    hidden = torch.relu(torch.addmm(y["a.bias"], inputs, y["a.weight"].T))
    return torch.addmm(y["b.bias"], hidden, y["b.weight"].T)


def inner_loss(y: Any, x: Any, batch: Any) -> torch.Tensor:
    """The weighted loss of a minibatch, and the decay."""
    inputs, labels, first = batch
    weights = torch.sigmoid(torch.index_select(x, 0, first + torch.arange(len(labels), device=x.device)))
    losses = cross_entropy(logits(y, inputs), labels, reduction="none")
    return (weights * losses).mean() + 0.5 * DECAY * sum(leaf.square().sum() for leaf in y.values())


def outer_loss(y: Any, x: Any, batch: Any) -> torch.Tensor:
    """The loss of the clean examples."""
    return cross_entropy(logits(y, batch[0]), batch[1])


class Minibatches(bl.PerStep):
    """One after another, from the beginning again."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self._inputs, self._labels = inputs, labels

    def __getitem__(self, step: int) -> Any:
        first = step * BATCH % EXAMPLES
        rows = slice(first, first + BATCH)
        return [self._inputs[rows], self._labels[rows], torch.tensor(first, device=self._inputs.device)]

    def __len__(self) -> int:
        return 10_000


def setup(device: str, seed: int = 0) -> Any:
    """The problem, its variables and its data."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def classes(count: int) -> torch.Tensor:
        return torch.randint(0, CLASSES, (count,), generator=generator)

    centers, labels = normal(CLASSES, INPUTS), classes(EXAMPLES)
    inputs = 0.3 * centers[labels] + normal(EXAMPLES, INPUTS)
    changed = torch.rand(EXAMPLES, generator=generator) < 0.4
    given = torch.where(changed, classes(EXAMPLES), labels)
    clean = classes(BATCH)
    valid = 0.3 * centers[clean] + normal(BATCH, INPUTS)
    y = {
        "a.weight": normal(HIDDEN, INPUTS) * (2 / INPUTS) ** 0.5,
        "a.bias": torch.zeros(HIDDEN),
        "b.weight": normal(CLASSES, HIDDEN) * HIDDEN**-0.5,
        "b.bias": torch.zeros(CLASSES),
    }
    batches = bl.Batches(
        inner=Minibatches(inputs.to(device), given.to(device)), outer=[valid.to(device), clean.to(device)]
    )
    start = {name: leaf.to(device) for name, leaf in y.items()}
    return bl.Problem(inner_loss, outer_loss), torch.zeros(EXAMPLES, device=device), start, batches
