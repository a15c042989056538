"""Sinusoid regression with three inner steps, the experiment of the first version of arXiv 2002.07836.

    python examples/papers/multi_step_sinusoid.py     # some three minutes of CPU time

The setting of the authors' code (JunjieYang97/GGS-MAML-DL): amplitude U[0.1, 5], phase U[0, pi], x in [-5, 5], 10
points to adapt on and 10 to judge by, 25 tasks per outer step, 3 inner steps, a net 1-40-40-1 with ReLU, 3,000 outer
steps, inner and outer step sizes 1e-4.

What is changed: 2,000 outer steps, and step sizes. At 1e-4 three inner steps hardly move this net; the last row shows
it. The others take 0.01 inside, and Adam with 2e-3 outside. Methods: MAML, with the exact product of (I - alpha H);
first order, without it; the multi-step loss of MAML++; and none, one net for all tasks. With 0.01 the steps of some
tasks overshoot, which statuses report (INNER_UNSTABLE); the table counts them.
"""

import functools
import math
import time
import warnings

import torch
from matplotlib.figure import Figure
from publish import SMALL, publish

import bilevel as bl

TASKS, SHOT, INNER_STEPS = 25, 10, 3
INNER_LR, OUTER_LR, THEIRS = 0.01, 2e-3, 1e-4
OUTER_STEPS, TEST_TASKS, EVERY = (4, 10, 2) if SMALL else (2000, 500, 100)
warnings.filterwarnings("ignore", message=r"iterate\(\) stepped through")  # counted below
mse = torch.nn.functional.mse_loss


def sinusoids(count, tasks, seed):
    """`count` batches of tasks: support and query points of sinusoids, of shape (tasks, SHOT, 1)."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        amplitude, phase = (
            0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=g),
            math.pi * torch.rand(tasks, 1, 1, generator=g),
        )
        x = 10 * torch.rand(2, tasks, SHOT, 1, generator=g) - 5
        y = amplitude * (x + phase).sin()
        yield bl.Batches(inner=(x[0], y[0]), outer=(x[1], y[1]))


def learner(steps, estimator, lr=INNER_LR, outer_lr=OUTER_LR):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)
    )
    return bl.meta.Learner(
        net,
        mse,
        solver=bl.Descent(bl.SGD(lr), steps),
        estimator=estimator,
        optimizer=functools.partial(torch.optim.Adam, lr=outer_lr),
    )


METHODS = {
    "MAML": learner(INNER_STEPS, bl.Unrolled()),
    "MAML, multi-step loss": learner(INNER_STEPS, bl.Unrolled(step_weights=(1 / 3, 1 / 3, 1 / 3))),
    "first order": learner(INNER_STEPS, bl.FirstOrder()),
    "no adaptation": learner(0, bl.FirstOrder()),
    "MAML, step sizes of theirs": learner(INNER_STEPS, bl.Unrolled(), THEIRS, THEIRS),
}
test = list(sinusoids(1, TEST_TASKS, seed=1))


def judged(x, steps, lr):
    """The mean query error of the test tasks after so many steps, with its 95 % interval."""
    judge, error = learner(steps, bl.FirstOrder(), lr), lambda prediction, target: mse(prediction, target).item()
    return judge.evaluate(x, test, score=error)


figure = Figure(figsize=(11, 4.2), layout="constrained")
left, right = figure.subplots(1, 2)
rows = []
for number, (name, method) in enumerate(METHODS.items()):
    lr = THEIRS if "theirs" in name else INNER_LR
    x, losses, overshot, begun = method.outer(), [], 0, time.process_time()
    for step in method.train(x, sinusoids(OUTER_STEPS, TASKS, seed=0)):
        final = step.hypergradient.stats.get("final_outer_loss")
        overshot += step.hypergradient.status is bl.Status.INNER_UNSTABLE
        losses.append(float(step.outer_loss if final is None else final.mean()))
    seconds = time.process_time() - begun
    smooth = [sum(losses[i : i + EVERY]) / EVERY for i in range(0, OUTER_STEPS, EVERY)]
    left.plot(range(EVERY, OUTER_STEPS + 1, EVERY), smooth, f"C{number}", label=name)
    errors = {steps: judged(x, steps, lr) for steps in (0, 1, INNER_STEPS, 10)}
    right.plot(list(errors), [each.score for each in errors.values()], f"C{number}o-", label=name)
    found = bl.meta.smoothness(method.problem, x, None, test[0], tasks=True, chunk=100)
    largest = found.largest.max().item()
    cells = [f"{errors[k].score:.3f} ± {errors[k].interval:.3f}" for k in (0, INNER_STEPS, 10)]
    rows.append(
        [
            name,
            *cells,
            largest,
            1 / (8 * INNER_STEPS * largest),
            100 * overshot / OUTER_STEPS,
            1e3 * seconds / OUTER_STEPS,
        ]
    )
left.set(title=f"Query error while training (mean of {EVERY} steps)", xlabel="outer step", ylabel="mean squared error")
right.set(title=f"{TEST_TASKS} new sinusoids", xlabel="inner steps", ylabel="mean squared error on the query")
for axes in (left, right):
    axes.set_yscale("log")
    axes.legend(fontsize=8)
header = [
    "method",
    "test error, 0 steps",
    f"{INNER_STEPS} steps",
    "10 steps",
    "largest L of a test task",
    "1 / (8 N L)",
    "outer steps with a task that overshot, %",
    "CPU ms per outer step",
]
publish("multi_step_sinusoid", figure, header, rows)
