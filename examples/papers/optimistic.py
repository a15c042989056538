"""Learned update rules with and without a hint: the rates, and the example that tells optimism from momentum.

    python examples/papers/optimistic.py

Flennerhag et al. 2023 (arXiv 2301.03236): a learned update rule alone gains a constant factor, optimism accelerates.
The rule here answers its own parameters, phi(x, w) = w, so that it is heavy ball for weights 1 and no hint. Left: a
quadratic in 600 dimensions whose curvatures are spread evenly in their logarithm from 1e-9 to L = 1, which makes slopes
clean. Right: a piecewise quadratic in one dimension; on quadratics alone, momentum is as fast as optimism.
"""

import itertools

import matplotlib.pyplot as plt
import torch
from publish import SMALL, publish

import bilevel as bl
from bilevel.meta import last_gradient, learned_updates

STEPS, FIT_FROM = (60, 10) if SMALL else (2000, 200)
F64 = torch.float64
CURVATURES = torch.logspace(-9, 0, 600, dtype=F64)


def quadratic(x, batch):
    """Smoothness L = 1, minimum 0 at x = 1; |x_0 - x*|^2 = 600 from x_0 = 0."""
    return 0.5 * (CURVATURES * (x - 1) ** 2).sum()


def piecewise(x, batch):
    """f' = 25 x below 1, x + 24 up to 2, 25 x - 24 above: L = 25, minimum 0 at 0."""
    middle, upper = 0.5 * x**2 + 24 * x - 12, 12.5 * x**2 - 24 * x + 36
    return torch.where(x < 1, 12.5 * x**2, torch.where(x < 2, middle, upper)).sum()


def learned(f, start, rate, weights=1.0, hint=None):
    """Losses of the averages; ends where they are no longer finite."""
    rule = learned_updates(
        f, lambda x, w, b: w, start, start, itertools.repeat(None, STEPS), rate=rate, weights=weights, hint=hint
    )
    losses = []
    try:
        losses.extend(step.loss.item() for step in rule)
    except bl.BilevelError:
        losses.append(float("inf"))
    return losses


def descended(f, start, nesterov=False):
    """Gradient descent with 1 / L, or Nesterov's method, on the quadratic (L = 1)."""
    x = previous = start
    losses = []
    for t in range(1, STEPS + 1):
        ahead = (x + (t - 1) / (t + 2) * (x - previous) if nesterov else x).requires_grad_()
        (gradient,) = torch.autograd.grad(f(ahead, None), ahead)
        previous, x = x.detach(), (ahead - gradient).detach()
        losses.append(f(x, None).item())
    return losses


def slope(losses):
    """Of log loss against log t, by least squares from FIT_FROM on."""
    t = torch.arange(FIT_FROM, STEPS + 1, dtype=F64).log()
    y = torch.tensor(losses[FIT_FROM - 1 :], dtype=F64).log()
    return (((t - t.mean()) * (y - y.mean())).sum() / (t - t.mean()).square().sum()).item()


def schedule(t):
    """beta_t = (t - 1) / (2 t L) of the optimistic rate, L = 1."""
    return (t - 1) / (2 * t)


zero, off = torch.zeros(600, dtype=F64), torch.tensor([3.3], dtype=F64)
RATES = {  # name: losses, the bound at the last step
    "gradient descent": (descended(quadratic, zero), None),
    "Nesterov": (descended(quadratic, zero, nesterov=True), None),
    "learned, weights 1": (learned(quadratic, zero, 1.0), 600 / (2 * STEPS)),
    "learned, weights 1, hint": (learned(quadratic, zero, 1.0, 1.0, last_gradient), None),
    "learned, weights t": (learned(quadratic, zero, 0.5, float), None),
    "learned, weights t, hint": (learned(quadratic, zero, schedule, float, last_gradient), 1200 / (STEPS**2 - 1)),
}
KINKED = {
    "weights t, hint, 1 / (2 L)": learned(piecewise, off, 1 / 50, float, last_gradient),
    "weights t, 1 / (2 L)": learned(piecewise, off, 1 / 50, float),
    "weights t, hint, 1 / L": learned(piecewise, off, 1 / 25, float, last_gradient),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
table = []
for name, (losses, bound) in RATES.items():
    left.loglog(range(1, STEPS + 1), losses, label=name, linestyle="--" if "learned" not in name else "-")
    largest = max(losses[STEPS // 2 - 1 :])
    table.append(["quadratic", name, slope(losses), largest, losses[-1], "" if bound is None else losses[-1] / bound])
for name, losses in KINKED.items():
    shown = [loss for loss in losses if loss < 1e10]
    right.semilogy(range(1, len(shown) + 1), shown, label=name)
    ends = [max(losses[STEPS // 2 - 1 :]), losses[-1]] if len(shown) == STEPS else ["diverges"] * 2
    table.append(["piecewise quadratic", f"learned, {name}", "", *ends, ""])
left.set(title="quadratic, L = 1", xlabel="steps", ylabel="loss of the average")
right.set(title="piecewise quadratic, L = 25", xlabel="steps", ylabel="loss of the average", ylim=(1e-38, 1e6))
left.legend(fontsize=8)
right.legend(fontsize=8)
header = ["problem", "method", f"slope from step {FIT_FROM}", "largest loss of the second half", "last loss"]
publish("optimistic", figure, [*header, "last loss / bound"], table)
