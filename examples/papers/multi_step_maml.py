"""Multi-step MAML, Ji, Yang and Liang, arXiv 2002.07836: two facts about N inner steps, as numbers and figures.

    python examples/papers/multi_step_maml.py     # some ten seconds

Left: the plug-in bias of the resampling case. l(w; h) = h w^2 / 2 with h = 1/2 or 3/2, drawn at each step. The true
meta-gradient is (1 - alpha)^(2 N) w. Where the factor 1 - alpha h takes the sample of its step, as backpropagation
does, the mean is ((1 - alpha)^2 + alpha^2 / 4)^N w; where it takes a fresh one (Unrolled(resampled=True)), there is no
bias. Every sequence of samples is a task, and a mean over tasks the exact expectation.

Middle and right: alpha ~ 1 / N. l(w) = cos(w - c) + 0.05 w^2 has a crest of negative curvature near 0, and L = rho =
1.1. With alpha = 1 / L the meta-gradient grows like (1 + alpha L)^N off the crest, with alpha = 1 / (8 N L) it does
not; and one outer step size descends for N = 1 to 50 in the one case and flies off in the other.
"""

import itertools

import torch
from matplotlib.figure import Figure
from publish import SMALL, publish

import bilevel as bl

D = torch.float64
ALPHA, W = 0.4, 1.0
STEPS = range(1, 4 if SMALL else 8)
SWEEP = [1, 5, 50] if SMALL else range(1, 51)
CURVES, OUTER_STEPS, OUTER_STEP = (1, 10, 20), 3 if SMALL else 40, 0.5

# --- the plug-in bias

scaled = bl.Problem(lambda y, x, h: h * y**2 / 2, lambda y, x, h: h * y**2 / 2, init=lambda x, h: x)


def mean_gradient(steps, resampled):
    """The mean over all sequences of samples; the outer sample, which enters linearly, at its mean."""
    draws = 2 * steps if resampled else steps
    samples = torch.tensor(list(itertools.product((0.5, 1.5), repeat=draws)), dtype=D).unbind(1)
    batches = bl.Batches(
        inner=bl.PerStep(samples[:steps]),
        outer=torch.ones_like(samples[0]),
        curvature=bl.PerStep(samples[steps:]) if resampled else None,
    )
    return bl.hypergradient(
        scaled,
        torch.tensor(W, dtype=D),
        None,
        batches,
        solver=bl.Descent(bl.SGD(ALPHA), steps),
        estimator=bl.TaskMean(bl.Unrolled("iterates", resampled=resampled)),
    ).grad.item()


true = [(1 - ALPHA) ** (2 * n) * W for n in STEPS]
plug_in = [((1 - ALPHA) ** 2 + ALPHA**2 / 4) ** n * W for n in STEPS]
fresh, reused = ([mean_gradient(n, resampled) for n in STEPS] for resampled in (True, False))

# --- alpha ~ 1 / N

SMOOTHNESS = HESSIAN_LIPSCHITZ = 1.1


def loss(y, x, center):
    return ((y - center).cos() + 0.05 * y**2).sum()  # each number of w is a problem of its own


crest = bl.Problem(loss, loss, init=lambda x, center: x)
CENTERS = torch.tensor([0.0, 0.01, -0.02], dtype=D)
tasks = bl.Batches(inner=torch.zeros_like(CENTERS), outer=CENTERS)
DISTANCES = torch.logspace(-16, 0, 200, dtype=D).mul(4)


def constants(steps, fixed):
    return bl.meta.MultiStep(steps, SMOOTHNESS, HESSIAN_LIPSCHITZ, 1 / SMOOTHNESS if fixed else None)


def meta(w, steps, fixed):
    return bl.hypergradient(
        crest,
        w,
        None,
        tasks,
        solver=bl.Descent(bl.SGD(constants(steps, fixed).alpha), steps),
        estimator=bl.TaskMean(bl.Unrolled("iterates")),
    )


def largest(steps, fixed):
    """The largest |meta-gradient| over starts at all distances from the crest."""
    return meta(torch.cat([DISTANCES, -DISTANCES]), steps, fixed).grad.abs().max().item()


def curve(steps, fixed):
    """The meta-loss from a start that N steps of 1 / L, which multiply a distance by 1.82, carry just off the crest."""
    w, losses = torch.tensor(0.5 * (1 + 0.9 / 1.1) ** -steps, dtype=D), []
    for _ in range(OUTER_STEPS):
        hg = meta(w, steps, fixed)
        losses.append(hg.outer_loss.item())
        w = w - OUTER_STEP * hg.grad
    return losses


peaks = {fixed: [largest(n, fixed) for n in SWEEP] for fixed in (True, False)}
curves = {(n, fixed): curve(n, fixed) for n in CURVES for fixed in (True, False)}

# --- figure and table

figure = Figure(figsize=(15, 4.2), layout="constrained")
left, middle, right = figure.subplots(1, 3)
left.plot(STEPS, true, "k-", label=r"true, $(1-\alpha)^{2N} w$")
left.plot(STEPS, plug_in, "k--", label=r"plug-in, $((1-\alpha)^2+\alpha^2/4)^N w$")
left.plot(STEPS, fresh, "C0o", label="Unrolled(resampled=True)")
left.plot(STEPS, reused, "C3s", label="Unrolled(), samples reused")
left.set(title=r"Mean meta-gradient, $\alpha=0.4$, w = 1", xlabel="inner steps N", ylabel="mean of dF/dw", yscale="log")
for fixed, color in ((True, "C3"), (False, "C0")):
    name = r"$\alpha=1/L$" if fixed else r"$\alpha=1/(8NL)$"
    middle.plot(SWEEP, peaks[fixed], color, label=f"{name}: largest found")
    middle.plot(SWEEP, [constants(n, fixed).product for n in SWEEP], color, ls=":", label=r"$(1+\alpha L)^N$, " + name)
    for n, style in zip(CURVES, ("-", "--", "-."), strict=True):
        right.plot(range(OUTER_STEPS), curves[n, fixed], color + style, label=f"N = {n}, {name}")
middle.set(title="Largest |meta-gradient| over starts", xlabel="inner steps N", ylabel="|dF/dw|", yscale="log")
right.set(title=f"Meta-loss, outer step size {OUTER_STEP}", xlabel="outer step", ylabel="F(w)", ylim=(-1, 10))
for axes in (left, middle, right):
    axes.legend(fontsize=8)
rows = []
for n in (1, 5, 10, 20, 50):
    both = [peaks[fixed][list(SWEEP).index(n)] if n in SWEEP else "" for fixed in (False, True)]
    ends = [
        f"{curves[n, fixed][0]:.3f}, {max(curves[n, fixed][1:]):.3f}, {curves[n, fixed][-1]:.3f}" if n in CURVES else ""
        for fixed in (False, True)
    ]
    rows.append([n, constants(n, fixed=False).growth, constants(n, fixed=False).gradient_weight, *both, *ends])
header = [
    "N",
    "$(1+a)^{2N}$ at $1/(8NL)$",
    "$C_L$",
    "largest gradient, $1/(8NL)$",
    "largest gradient, $1/L$",
    "loss at first, at most later, at last, $1/(8NL)$",
    "the same, $1/L$",
]
publish("multi_step_maml", figure, header, rows)
