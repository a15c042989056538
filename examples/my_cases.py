"""Logistic regression on breast-cancer data, with one penalty for each feature: a case file of one's own.

Write a report with `bilevel compare examples/my_cases.py --out report`.
"""

import os

import torch
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: one K, one estimator

# Everything but `setup` may be left out: see the table in docs/profiling.md.
OPTIMIZER = bl.SGD(lr=0.5, momentum=0.5)
INNER_STEPS = [5] if SMALL else [5, 20, 80]
OUTER_STEPS = 2 if SMALL else 30
SOLUTION = bl.Converge(bl.SGD(lr=0.5, momentum=0.5), tol=1e-7, max_steps=20_000)  # runs in float64
ESTIMATORS = {"implicit CG": bl.Implicit(bl.CG(max_steps=20, tol=1e-3))}
if not SMALL:
    ESTIMATORS |= {
        "unrolled": bl.Unrolled(),
        "unrolled segments": bl.Unrolled(keep="segments"),
        "memory-reduced": bl.MemoryReduced(steps=20, tol=1e-3),
        "first-order corrected": bl.FirstOrderCorrected(),
    }


def data(part, device):
    bundle = load_breast_cancer()
    rows = torch.randperm(len(bundle.target), generator=torch.Generator().manual_seed(0))
    train, chosen = rows[:285], {"train": rows[:285], "valid": rows[285:427], "test": rows[427:]}[part]
    features = torch.tensor(bundle.data, dtype=torch.float64)
    features = (features - features[train].mean(0)) / features[train].std(0)
    return features[chosen].float().to(device), torch.tensor(bundle.target)[chosen].float().to(device)


def error(weights, batch):
    features, labels = batch
    return binary_cross_entropy_with_logits(features @ weights, labels)


def inner_loss(inner, outer, batch):
    return error(inner, batch) + 0.5 * (outer["log_penalty"].exp() * inner.square()).sum()


def outer_loss(inner, outer, batch):
    return error(inner, batch)


def setup(device):
    """Called afresh in every process: (problem, outer, inner, batches)."""
    outer = {"log_penalty": torch.full((30,), -4.0, device=device, requires_grad=True)}
    inner = torch.zeros(30, device=device)
    return (
        bl.Problem(inner_loss, outer_loss),
        outer,
        inner,
        bl.Batches(inner=data("train", device), outer=data("valid", device)),
    )


def outer_optimizer(tensors):
    return torch.optim.Adam(tensors, lr=0.1)


def evaluate(outer, device):
    """Called before and after the outer loop: what the penalties are worth on data that nothing was fitted to."""
    problem, _, inner, batches = setup(device)
    hg = bl.hypergradient(
        problem, outer, inner, batches, solver=bl.Descent(OPTIMIZER, steps=500), estimator=bl.FirstOrderCorrected()
    )
    features, labels = data("test", device)
    accuracy = ((features @ hg.inner > 0).float() == labels).float().mean()
    return {"test_loss": error(hg.inner, (features, labels)).item(), "test_accuracy": accuracy.item()}
