"""Three levels by layers: how strongly data weights are regularized, learned from a few audited examples.

    python examples/three_levels.py

A third of the training labels is wrong. Lowest, a ridge regression is fitted to weighted examples. In the middle, the
weights are chosen so that the fit is good on clean data, with a penalty on how far they go. On top, the strength of
that penalty is chosen so that the weights of the few examples that somebody has looked at say what was found.

Each level is a `bilevel.solution` inside the loss of the one above; nothing is said about levels anywhere. The gradient
on top is held against a difference quotient of the whole program.
"""

import os

import torch

import bilevel as bl

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: one step on top
STEPS = 1 if SMALL else 8
COUNT, SIZE, AUDITED = 24, 4, 12

draw = torch.Generator().manual_seed(1)


def random(*shape):
    """Standard normal numbers, in float64."""
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


truth = random(SIZE)
train, clean = random(COUNT, SIZE), random(8, SIZE)
wrong = torch.arange(COUNT) % 3 == 0
labels = train @ truth + 0.1 * random(COUNT) + torch.where(wrong, 2 * random(COUNT), 0.0)
clean_labels = clean @ truth + 0.5 * random(8)
solved = bl.Implicit(bl.CG(max_steps=40, tol=1e-12))


def fit_loss(model, outer, batch):
    """Lowest: weighted least squares and a small ridge."""
    return (outer["weights"].sigmoid() * (train @ model - labels).square()).mean() + 0.1 * model.square().sum()


def model_of(weights):
    """The fit, as a function of the weights."""
    return bl.solution(
        FIT,
        {"weights": weights},
        torch.zeros_like(truth),
        bl.Batches(None, None),
        solver=bl.Converge(bl.SGD(lr=0.55), tol=1e-11, max_steps=200),
        estimator=solved,
    )


def weights_loss(weights, outer, batch):
    """In the middle: the error of the fit on clean data, and the penalty."""
    error = (clean @ model_of(weights) - clean_labels).square().mean()
    return error + 0.5 * outer["log_strength"].exp() * weights.square().sum()


def weights_of(log_strength):
    """The data weights, as a function of the strength of their penalty."""
    return bl.solution(
        WEIGHTS,
        {"log_strength": log_strength},
        torch.zeros(COUNT, dtype=torch.float64),
        bl.Batches(None, None),
        solver=bl.Converge(bl.SGD(lr=4.0), tol=1e-9, max_steps=400),
        estimator=solved,
    )


def audit_loss(log_strength):
    """On top: what the weights say of the audited examples."""
    right = (~wrong[:AUDITED]).to(torch.float64)
    weights = weights_of(log_strength)[:AUDITED]
    return torch.nn.functional.binary_cross_entropy_with_logits(weights, right)


# Kept over calls, so that what is learned about them is asked once.
FIT, WEIGHTS = bl.Problem(fit_loss, fit_loss), bl.Problem(weights_loss, weights_loss)

if __name__ == "__main__":
    log_strength = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(audit_loss(log_strength), log_strength)
    with torch.no_grad():
        ends = [audit_loss(log_strength + sign * 1e-4) for sign in (1, -1)]
    quotient = (ends[0] - ends[1]) / 2e-4
    print(f"gradient {gradient.item():+.8f}, difference quotient {quotient.item():+.8f}")

    optimizer = torch.optim.Adam([log_strength], lr=0.2)
    for step in range(STEPS):
        loss = audit_loss(log_strength)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}: strength {log_strength.exp().item():.4f}, audit loss {loss.item():.4f}")
    with torch.no_grad():
        weights = weights_of(log_strength).sigmoid()
    print(f"mean weight of right labels {weights[~wrong].mean():.2f}, of wrong ones {weights[wrong].mean():.2f}")
