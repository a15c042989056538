"""Does MAML only re-use features? Data whose bodies differ by a chosen amount, and what adapts on them (2112.13137).

    python examples/papers/feature_reuse.py

Tasks are random networks 1 -> 15 -> 15 -> 15 -> 1 around a common center. `body_std` spreads their first three layers:
near 0 all tasks share their features, and a head is enough; far from 0 the body must change. MAML and ANIL are trained
on each family and judged on new tasks of it: how far adaptation moves the activations of each layer, at two inner step
sizes; the error when only the last j layers adapt at test time; and the cheapest such pattern that loses at most a
tenth of what adaptation gains (2206.05930). Errors are shares of the variance of a task's query.
"""

import functools
import itertools

import torch
from matplotlib.figure import Figure
from publish import SMALL, publish
from torch import nn

import bilevel as bl
from bilevel.data import RandomNets
from bilevel.meta import Evaluation, Learner, patterns
from bilevel.meta.similarity import euclidean, pwcca, reuse

STDS = [0.01, 2.0] if SMALL else [0.01, 0.1, 0.5, 3.0]
OUTER, TASKS, TEST = (2, 2, 4) if SMALL else (400, 8, 104)
HIDDEN, SUPPORT, QUERY = 15, 40, 200  # 200 > 10 x 15: enough examples for canonical correlations
LR, LARGE_LR, STEPS = 0.1, 0.4, 5
ALLOWED = 0.1


def scaled(batches):
    """Targets of mean 0 and variance 1 over each support: some bodies make them a thousand times larger than others."""
    (x, y), (query_x, query_y) = batches.inner, batches.outer
    center, size = y.mean(1, keepdim=True), y.std(1, keepdim=True)
    return bl.Batches(inner=(x, (y - center) / size), outer=(query_x, (query_y - center) / size))


def error(prediction, target):
    """Mean square over the variance of the targets, at most 2: the mean of the tasks is not the worst of them."""
    return float(((prediction - target).square().mean() / target.var()).clamp_max(2.0))


def network():
    torch.manual_seed(0)
    sizes = [1, HIDDEN, HIDDEN, HIDDEN, 1]
    layers = [each for a, b in itertools.pairwise(sizes) for each in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def trained(family, adapts=True, lr=LR):
    learner = Learner(
        network(),
        nn.functional.mse_loss,
        adapts=adapts,
        solver=bl.Descent(bl.SGD(lr), STEPS),
        optimizer=functools.partial(torch.optim.Adam, lr=2e-3),
    )
    x = learner.outer()
    for _ in learner.train(x, (scaled(family[i]) for i in range(OUTER))):
        pass
    return learner, x


def shown(found):
    return f"{found.score:.3f} +- {found.interval:.3f}"


rows, moved, errors = [], [], []
for std in STDS:
    family = RandomNets(tasks=TASKS, support=SUPPORT, query=QUERY, body_std=std)
    judged = [scaled(family[OUTER + i]) for i in range(TEST // TASKS)]  # new tasks around the same center
    (maml, x), (large, large_x), (anil, anil_x) = trained(family), trained(family, lr=LARGE_LR), trained(family, "6")
    near, far = reuse(maml, x, judged, distance=euclidean), reuse(large, large_x, judged, distance=euclidean)
    correlated = reuse(maml, x, judged, distance=pwcca)
    unadapted = maml.evaluate(x, judged, score=error, solver=bl.Descent(bl.SGD(LR), 0))
    full, by_anil = maml.evaluate(x, judged, score=error), anil.evaluate(anil_x, judged, score=error)
    allowed = ALLOWED * max(unadapted.score - full.score, 0.0)
    found = patterns.search(maml, x, judged, threshold=allowed, score=lambda *both: -error(*both))
    by_mask = {str(each.pattern): each for each in found.measured}
    head, work = by_mask["0001"], by_mask[str(found.pattern)].cost / by_mask["1111"].cost
    moved.append((near, far))
    errors.append({mask: each.evaluation for mask, each in by_mask.items()} | {"0000": unadapted, "anil": by_anil})
    above = f"{-head.difference:.3f} +- {head.interval:.3f}"
    distances = [shown(each.body) for each in (correlated, near, far)]
    apart = [a - b for a, b in zip(by_anil.scores, full.scores, strict=True)]  # on the same tasks
    gap = Evaluation.of(apart, apart)
    rows.append([std, *distances, shown(full), shown(gap), above, str(found.pattern), work])
    print(*rows[-1], sep="   ", flush=True)

figure = Figure(figsize=(13, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for which, lr, line in ((0, LR, "-"), (1, LARGE_LR, "--")):
    for color, (name, label) in enumerate({"0": "layer 1", "2": "layer 2", "4": "layer 3", "output": "output"}.items()):
        found = [each[which].layers[name] for each in moved]
        values, intervals = [f.score for f in found], [f.interval for f in found]
        style = {"color": f"C{color}", "linestyle": line, "marker": "o", "capsize": 3}
        left.errorbar(STDS, values, intervals, label=f"{label}, step size {lr}", **style)
left.set(yscale="log", ylabel="normalized Euclidean distance", title="How far adaptation moves activations (MAML)")
labels = {"0000": "nothing", "anil": "head, trained so: ANIL", "0001": "head", "0011": "last 2 layers"}
for mask, label in (labels | {"0111": "last 3 layers", "1111": "all: MAML"}).items():
    found = [each[mask] for each in errors]
    values, intervals = [abs(f.score) for f in found], [f.interval for f in found]
    style = {"0000": ":", "anil": "--"}.get(mask, "-")
    right.errorbar(STDS, values, intervals, marker="o", capsize=3, linestyle=style, label=label)
right.set(yscale="log", ylabel="error on the query / variance", title="What adapts at test time (trained by MAML)")
for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xlabel("standard deviation of the tasks' bodies")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
header = [
    "std of bodies",
    "PWCCA distance, mean of layers 1-3",
    f"Euclidean, step size {LR}",
    f"Euclidean, step size {LARGE_LR}",
    "MAML, error / variance",
    "ANIL: more than MAML",
    "MAML, head alone: more",
    "cheapest pattern",
    "its work / that of all",
]
publish("feature_reuse", figure, header, rows)
