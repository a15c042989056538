"""Language modelling: a weight for each of 64 byte sequences, half of them noise; K steps on a transformer of 106,000
numbers.

    inner   weighted next-byte cross-entropy on the training sequences        outer   next-byte cross-entropy on clean
    text

The loop should leave the noise with lower weights (`corruption_auc`), so that a net trained with them predicts unseen
text better than one trained without (`test_loss`, nats a byte, against `baseline_test_loss`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import language

LAYERS, WIDTH, HEADS, CONTEXT, EXAMPLES, VALIDATION = 2, 56, 4, 24, 64, 48
OPTIMIZER = bl.SGD(lr=language.INNER_LR)
INNER_STEPS = [2, 4, 8]
OUTER_STEPS = 8

# After so few steps the Hessian is indefinite; with less damping conjugate gradients meet negative curvature in most
# outer steps.
DAMPING = 10.0

ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "implicit CG": bl.Implicit(bl.CG(max_steps=5, tol=1e-2, damping=DAMPING)),
    "memory-reduced": bl.MemoryReduced(steps=5, tol=1e-2, damping=DAMPING),
    "first-order corrected": bl.FirstOrderCorrected(),
    # No FirstOrder: the weights act through the inner loss alone, which it does not differentiate, so it refuses the
    # problem.
}


def setup(
    device: str,
    seed: int = 0,
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    heads: int = HEADS,
    context: int = CONTEXT,
    examples: int = EXAMPLES,
    batch: int | None = None,
    validation: int = VALIDATION,
    steps: int = 50,
) -> Any:
    """The problem, with all sequences as the inner batch; with `batch`, so many of them in each of `steps` inner
    steps.
    """
    return language.setup(
        device,
        seed,
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        examples=examples,
        batch=batch,
        validation=validation,
        steps=steps,
    )


def outer_optimizer(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam on the logits of the weights."""
    return torch.optim.Adam(tensors, lr=language.OUTER_LR)


def evaluate(outer: Mapping[str, Tensor], device: str, seed: int = 0) -> dict[str, float]:
    """What the weights are worth to a fresh net. `baseline_` is the same net with equal weights."""
    # Few steps: from 30 on, the fresh net begins to learn so few sequences by heart, and its loss on other text is
    # mostly noise.
    found = language.evaluate(outer, seed=seed, layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT, steps=20)
    return {name: value for name, value in found.items() if not name.startswith("ideal_")}
