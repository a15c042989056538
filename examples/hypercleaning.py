"""Data hyper-cleaning: one weight for each training example, so that corrupted labels lose theirs.

    python examples/hypercleaning.py                   # Algorithm 1 of arXiv 2412.12030
    python examples/hypercleaning.py unrolled          # backpropagation through the inner loop

The outer variable has as many numbers as there are examples (1000); the inner one is a perceptron; 40 % of the labels
are wrong. Digits, on the CPU.
"""

import itertools
import os
import sys

import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.problems import hypercleaning

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: two outer steps
INNER_STEPS, INNER_LR = 30, 0.5
OUTER_STEPS, OUTER_LR = (2 if SMALL else 50), 0.3
FINAL_STEPS = 20 if SMALL else 300
L2 = 1e-3
ESTIMATORS = {
    "memory-reduced": bl.MemoryReduced(steps=10, damping=0.1),
    "neumann": bl.Implicit(bl.Neumann(steps=20, step_size=0.3)),
    "unrolled": bl.Unrolled(),
    "segments": bl.Unrolled(keep="segments"),
}

torch.manual_seed(0)
data = hypercleaning.load(seed=0, corruption=0.4)
call, inner = bl.functional(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
outer = {"logits": torch.zeros(len(data.train_y), requires_grad=True)}  # sigmoid(0) = 1/2 for everyone


def weighted(inner, weights):
    losses = cross_entropy(call(inner, data.train_x), data.train_y, reduction="none")
    return (weights * losses).mean() + 0.5 * L2 * sum(leaf.square().sum() for leaf in inner.values())


def inner_loss(inner, outer, batch):
    return weighted(inner, outer["logits"].sigmoid())


def outer_loss(inner, outer, batch):
    return cross_entropy(call(inner, data.valid_x), data.valid_y)


def accuracy_with(weights):
    """Test accuracy of a fresh net, trained with these weights."""
    torch.manual_seed(1)
    fresh = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    params = dict(fresh.named_parameters())
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for _ in range(FINAL_STEPS):
        optimizer.zero_grad()
        weighted(params, weights).backward()
        optimizer.step()
    with torch.no_grad():
        return (call(params, data.test_x).argmax(1) == data.test_y).float().mean().item()


name = sys.argv[1] if len(sys.argv) > 1 else "memory-reduced"
if name not in ESTIMATORS:
    sys.exit(f"no estimator {name!r}; choose one of {', '.join(ESTIMATORS)}")

loop = bl.iterate(
    bl.Problem(inner_loss, outer_loss),
    outer,
    inner,
    itertools.repeat(bl.Batches(inner=None, outer=None), OUTER_STEPS),  # the losses close over the data
    solver=bl.Descent(bl.SGD(lr=INNER_LR), steps=INNER_STEPS),
    estimator=ESTIMATORS[name],
    optimizer=torch.optim.Adam(outer.values(), lr=OUTER_LR),
)
for step in loop:
    if step.index % 10 == 0 or step.index == OUTER_STEPS - 1:
        print(
            f"outer step {step.index:3d}   validation loss {step.outer_loss.item():.3f}   "
            f"{step.hypergradient.status.name}"
        )

weights = outer["logits"].detach().sigmoid()
print(f"{name}: AUC of the corrupted examples {roc_auc_score(data.corrupted.numpy(), -weights.numpy()):.3f}")
equal = weights.mean().expand_as(weights)
print(f"test accuracy: learned weights {accuracy_with(weights):.3f}, equal weights {accuracy_with(equal):.3f}")
