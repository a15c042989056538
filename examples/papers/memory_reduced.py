"""Memory-reduced meta-learning (arXiv 2412.12030) beside MAML, ANIL and ITD-BiO: memory, accuracy, time.

    python examples/papers/memory_reduced.py           # three minutes; docs/papers/made/memory_reduced.{png,md}

5-way 5-shot, 4-conv net with 32 channels, linear head. Memory is forecast at the paper's image size (84 x 84, RGB), for
one task: nothing is allocated. "Recomputed" runs the features with a graph at every inner step, as the released code
does in its baselines; "once" runs them once, as a well-written ANIL does. Accuracy is on glyphs (28 x 28), which need
no download, after the same few outer steps for all.
"""

import functools
import statistics
import string
import time

import torch
from bilevel_profiling import Case, forecast
from matplotlib.figure import Figure
from publish import SMALL, publish
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.data import Episodes, glyphs
from bilevel.problems import fewshot
from bilevel.problems.conv4 import conv4

torch.manual_seed(0)
HEAD = "17"  # the linear layer of conv4; 17 of 18 layers are the features
WIDTH, SIDE = (4, 16) if SMALL else (32, 84)
OUTER_STEPS, TASKS, TESTS = (2, 2, 4) if SMALL else (60, 4, 100)


def method(net, steps, lr, **arguments):
    """A Learner; `outer_lr` as in the released code's miniImageNet part, but for the few steps of this script 2e-3."""
    solver = bl.Descent(bl.SGD(lr=lr), steps)
    return bl.Learner(
        net, cross_entropy, solver=solver, optimizer=functools.partial(torch.optim.Adam, lr=2e-3), **arguments
    )


def methods(net, *, once):
    """Settings of the released code (K and inner step size of its miniImageNet part)."""
    head = {"adapts": HEAD, "reuse_features": once}
    reduced = bl.MemoryReduced(steps=20, damping=1e-2)
    return {
        "MAML": lambda k=3: method(net, k, 0.5 if k == 3 else 0.1, chunk=1),
        "ANIL": lambda k=5: method(net, k, 0.1, chunk=1, **head),
        "ITD-BiO": lambda k=20: method(net, k, 0.05, chunk=1, start=bl.meta.Fixed(), **head),
        "Algorithm 1": lambda k=20: method(net, k, 0.05, chunk=1, start=bl.meta.Fixed(), estimator=reduced, **head),
    }


# --- memory against the number of inner steps, forecast for one task
def peak(make, steps):
    def setup(device):
        draw = lambda n: (torch.rand(n, 3, SIDE, SIDE), torch.arange(n).remainder(5))  # noqa: E731
        learner = make(steps)
        return learner.problem, learner.outer(), None, bl.Batches(draw(25), draw(25))

    learner = make(steps)
    return forecast(Case(setup, solver=learner.inner_solver, estimator=learner.estimator)).peak_tensor_bytes / 2**20


large = conv4(5, channels=3, side=SIDE, width=WIDTH, seed=0)
KS = (1, 2) if SMALL else (1, 3, 5, 10, 20)
curves = {}
for once in (False, True):
    for name, make in methods(large, once=once).items():
        if name == "MAML" and once:
            continue  # every layer adapts: nothing to run once
        label = name if name == "MAML" else f"{name}, features {'once' if once else 'recomputed'}"
        curves[label] = [peak(make, k) for k in KS]
        print(f"{label}: " + ", ".join(f"K = {k}: {value:.0f} MiB" for k, value in zip(KS, curves[label], strict=True)))

# --- accuracy, time and oracle calls at the settings of the released code
letters = (
    {"train": fewshot.load("train"), "test": fewshot.load("test")}
    if not SMALL
    else glyphs.load(string.ascii_letters).split()
)
sizes = {"way": 5, "shot": 5, "query": 5}  # as there: 5 query images a class
rows = []
small = conv4(5, width=WIDTH, seed=0)
runs = {
    "untrained start, MAML's adaptation": (methods(small, once=True)["MAML"](), 0),
    **{name: (make(), OUTER_STEPS) for name, make in methods(small, once=True).items()},
}
(timed,) = Episodes(letters["train"], tasks=TASKS, steps=1, seed=2, **sizes)
seconds = {name: [] for name in runs}
for _ in range(2 if SMALL else 4):  # in turns, so that what else the machine does meets all of them
    for name, (learner, _) in runs.items():
        x, began = learner.outer(), time.perf_counter()
        learner.hypergradient(x, timed)
        seconds[name].append(time.perf_counter() - began)
for name, (learner, steps) in runs.items():
    x, calls = learner.outer(), {}
    for step in learner.train(
        x, Episodes(letters["train"], tasks=TASKS, steps=steps, seed=0, **sizes), tolerate=tuple(bl.Status)
    ):
        calls = step.hypergradient.stats["calls"]
        found = learner.evaluate(x, Episodes(letters["test"], tasks=2, seed=1, **sizes), tasks=TESTS)
    k = learner.inner_solver.max_steps
    memory = [curves[label][KS.index(k)] for label in curves if label.startswith(name) and k in KS]
    rows.append([
        name,
        k,
        f"{100 * found.score:.1f} ± {100 * found.interval:.1f}",
        " / ".join(f"{value:.0f}" for value in memory) or "-",
        statistics.median(seconds[name][1:]) / statistics.median(seconds["MAML"][1:]),
        *(calls.get(oracle, 0) / TASKS for oracle in ("inner_gradient", "outer_gradient", "hvp", "mixed")),
    ])  # fmt: skip
    print(rows[-1])

figure = Figure(figsize=(7, 4))
axes = figure.subplots()
for label, values in curves.items():
    axes.plot(KS, values, "o-" if "recomputed" in label or label == "MAML" else "s--", label=label)
axes.set(xlabel="inner steps K", ylabel="peak tensor memory of one task, MiB (forecast)", yscale="log", xticks=KS)
axes.set_title("5-way 5-shot, 84 x 84, 4-conv net of 32 channels")
axes.legend(fontsize=8)
axes.grid(alpha=0.3)
header = [
    "method",
    "K",
    f"accuracy, % ({TESTS} tasks)",
    "memory, MiB (recomputed / once)",
    "time / MAML's",
    "gradients of g",
    "of f",
    "HVPs",
    "mixed",
]
publish("memory_reduced", figure, header, rows)
