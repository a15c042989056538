"""Learn the inner optimizer's step sizes, one for each parameter tensor, by differentiating through the inner loop.

    python examples/learned_step_size.py

x enters only through the optimizer, so it moves the path and not the solution: backpropagation through the loop sees
it, and every estimator that looks at the solution only refuses. Ten inner steps on digits, from a random start.
"""

import itertools
import os

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel as bl

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: three outer steps
INNER_STEPS, START_LR = 10, 0.05
OUTER_STEPS, OUTER_LR = (3 if SMALL else 80), 0.05
TRAIN = 1000

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
shuffled = torch.randperm(len(labels))
train, valid = [(images[rows], labels[rows]) for rows in (shuffled[:TRAIN], shuffled[TRAIN:])]

call, inner = bl.functional(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)))
# A log step size for each tensor of the net.
outer = {name: torch.tensor(START_LR).log().requires_grad_() for name in inner}


def loss(inner, outer, batch):
    return cross_entropy(call(inner, batch[0]), batch[1])


problem = bl.Problem(loss, loss)
batches = bl.Batches(inner=train, outer=valid)
# A function of the outer variable, returning a tree like the inner one. Element-wise rates: values shaped like the
# tensors.
solver = bl.Descent(
    bl.SGD(lr=lambda outer: {name: log_rate.exp() for name, log_rate in outer.items()}), steps=INNER_STEPS
)

try:
    bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Implicit(bl.CG(max_steps=5)))
except ValueError as refusal:
    print(f"Implicit refuses: {refusal}\n")

loop = bl.iterate(
    problem,
    outer,
    inner,
    itertools.repeat(batches, OUTER_STEPS),
    solver=solver,
    estimator=bl.Unrolled(),
    optimizer=torch.optim.Adam(outer.values(), lr=OUTER_LR),
    carry=False,  # what K steps do from the same start; carrying y on would ask another question
)
for step in loop:
    if step.index % 10 == 0:
        status = step.hypergradient.status.name
        print(
            f"outer step {step.index:3d}   validation loss after {INNER_STEPS} inner steps "
            f"{step.outer_loss.item():.3f}   {status}"
        )

print(f"\nlearned step sizes (all began at {START_LR})")
for name, log_rate in outer.items():
    print(f"  {name:10s} {log_rate.exp().item():.3f}")
