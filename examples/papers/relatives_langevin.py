"""The gradient of an expectation over a Langevin chain, four ways, where every answer is known in closed form.

g = e^x y^2 / 2 at temperature tau and f = y^2 / 2: F(x) = E[f] = tau e^-x / 2, and a deterministic method finds 0.
"""

import math
import warnings

import torch
from matplotlib.figure import Figure
from publish import SMALL, publish

import bilevel as bl
from bilevel.estimators.stochastic import Covariance, Pathwise

X, TAU = 0.3, 0.5
CURVATURE = math.exp(X)
EXACT = -TAU / (2 * CURVATURE)
GROUPS, CHAINS = 10, 40 if SMALL else 2000
STEPS = (0.05, 0.2) if SMALL else (0.02, 0.05, 0.1, 0.2, 0.3)
LENGTHS = (5, 20) if SMALL else (5, 10, 20, 40, 80, 160)

# Chain c belongs to group c // CHAINS, which has an x of its own: ten estimates in one call, and so a standard error.
# Each chain starts at rest, so that none burns in.
problem = bl.Problem(lambda y, x, b: (x * b).sum().exp() * y**2 / 2, lambda y, x, b: y**2 / 2)
rows = torch.eye(GROUPS, dtype=torch.float64).repeat_interleave(CHAINS, 0)


def estimate(estimator: bl.Estimator, step_size: float, steps: int) -> tuple[float, float]:
    """The mean of ten estimates and its standard error."""
    torch.manual_seed(0)
    spread = math.sqrt(TAU / (CURVATURE * (1 - step_size * CURVATURE / 2)))
    hg = bl.hypergradient(
        problem,
        torch.full((GROUPS,), X, dtype=torch.float64),
        spread * torch.randn(len(rows), dtype=torch.float64),
        bl.Batches(rows, rows),
        solver=bl.Descent(bl.inner.Langevin(step_size, TAU), steps),
        estimator=bl.TaskMean(estimator),
    )
    hg.raise_if_failed()
    return (GROUPS * hg.grad).mean().item(), (GROUPS * hg.grad).std().item() / math.sqrt(GROUPS)


def methods(size: float) -> dict[str, tuple[bl.Estimator, int, float]]:
    """Estimator, steps of the chain, and what it tends to at this step size, by name."""
    shift, memory = 1 - size * CURVATURE / 2, math.ceil(6 / (size * CURVATURE))
    window = round(1 / (2 * size * CURVATURE))
    return {
        "covariance": (Covariance(thinning=memory // 2), 10 * memory, EXACT / shift**2),
        "exact closure": (Pathwise(burn_in=memory), memory + 5, EXACT * (1 - size * CURVATURE) / shift**2),
        "decay": (
            Pathwise("decay", gamma=(1 - size * CURVATURE) ** 2, burn_in=memory),
            memory + 5,
            EXACT / shift**2,
        ),
        "identity, window": (
            Pathwise("identity", window=window, burn_in=memory),
            memory + 5,
            -window * size * TAU / shift,
        ),
    }


table, figure = [], Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for place, name in enumerate(methods(0.1)):
    points = []
    for size in STEPS:
        estimator, steps, limit = methods(size)[name]
        value, error = estimate(estimator, size, steps)
        points.append((size, value, error))
        table.append([name, size, value, error, limit, value / EXACT - 1])
    sizes, values, errors = zip(*points, strict=True)
    left.errorbar(sizes, values, [2 * error for error in errors], fmt="o", color=f"C{place}", label=name, capsize=3)
    fine = torch.linspace(STEPS[0], STEPS[-1], 50).tolist()
    if "window" not in name:
        left.plot(fine, [methods(size)[name][2] for size in fine], color=f"C{place}", linewidth=1)
left.axhline(EXACT, color="black", linestyle=":", label="exact")
left.set(xlabel="step size of the chain", ylabel="estimate of dF/dx", title="Lines: what each tends to")
left.legend()

size = 0.02
for name, color, make in (
    ("identity", "C3", lambda length: Pathwise("identity", burn_in=length)),
    ("decay", "C2", lambda length: Pathwise("decay", gamma=(1 - size * CURVATURE) ** 2, burn_in=length)),
    ("exact closure", "C1", lambda length: Pathwise(burn_in=length)),
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the identity closure grows is what is shown
        made = [estimate(make(length), size, length + 1) for length in LENGTHS]
    right.errorbar(LENGTHS, [-value for value, _ in made], [2 * error for _, error in made], color=color, label=name)
right.axhline(-EXACT, color="black", linestyle=":", label="exact")
right.set(xscale="log", yscale="log", xlabel="steps of the chain before the sample", ylabel="-estimate of dF/dx")
right.set_title(f"Step size {size}: the identity closure forgets nothing")
right.legend()
publish(
    "relatives_langevin",
    figure,
    ["method", "step size", "estimate", "standard error", "its limit", "relative to exact"],
    table,
)
