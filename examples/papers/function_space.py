"""Adaptation in function space beside MAML and ANIL: 5-way 1-shot on characters drawn from fonts.

Our reading of the abstract of Park and Kang, arXiv 2411.00404 (I-AMFS: a closed form in place of inner steps; O-AMFS:
task weights from the similarity of gradients), and Meta-RKHS II of Zhou et al., arXiv 2102.03909. No number of either
paper is claimed: data, network and budget are ours.

    python examples/papers/function_space.py            # about three minutes on two cores
"""

import functools
import math
import time

import matplotlib.pyplot as plt
import torch
from publish import SMALL, publish
from torch import nn

import bilevel as bl
from bilevel.data import Episodes, glyphs
from bilevel.data.imageset import one_split
from bilevel.meta import NTK, RBF, Cosine, GradientFlow, KernelRidge, Learner, Linear, Sum
from bilevel.problems.conv4 import conv4

WAY, SHOT, TASKS, WIDTH = 5, 1, 4, 4 if SMALL else 8
STEPS, TEST_TASKS = (2, 4) if SMALL else (150, 600)

characters = glyphs.load()
train = one_split(characters, "train", seed=0)
test = one_split(characters, "test", seed=0)  # other characters
loader = functools.partial(Episodes, way=WAY, shot=SHOT)

classifier = conv4(WAY, width=WIDTH)  # scores
features = conv4(WAY, width=WIDTH)[:-1]  # the same network without its linear head
LAST = ("12", "17")  # its last convolution and its head
steps = bl.Descent(bl.SGD(lr=0.1), steps=5)
similar = bl.GradientSimilarity(temperature=0.5)
# One regularizer and one scale of the scores for all kernels, learned from there like everything else.
ridge = functools.partial(
    KernelRidge, regularizer=1.0, learn_regularizer=True, classes=WAY, coding="centered", scale=5.0, learn_scale=True
)
tangent = GradientFlow(
    NTK(over=LAST), time=0.01, prior=nn.Identity(), classes=WAY, coding="centered", scale=5.0, learn_scale=True
)


def learner(module, adapts=True, weights=None):
    return Learner(
        module,
        nn.functional.cross_entropy,
        adapts=adapts,
        solver=None if isinstance(adapts, bl.meta.Head) else steps,
        weights=weights,
        optimizer=functools.partial(torch.optim.Adam, lr=2e-3),
    )


def written(found):
    return f"{100 * found.score:.1f} ± {100 * found.interval:.1f}"


METHODS = {
    "MAML": learner(classifier),
    "MAML, weighted tasks": learner(classifier, weights=similar),
    "ANIL": learner(classifier, adapts=LAST[1]),
    "linear kernel (ridge head)": learner(features, ridge(Linear())),
    "linear kernel, weighted tasks": learner(features, ridge(Linear()), similar),
    "cosine kernel": learner(features, ridge(Cosine())),
    "Gaussian kernel, median": learner(features, ridge(RBF("median", learn=True))),
    "Gaussian kernel, weighted tasks": learner(features, ridge(RBF("median", learn=True)), similar),
    "cosine + Gaussian, learned weights": learner(features, ridge(Sum([Cosine(), RBF("median")], learn=True))),
    "tangent kernel of the last layers (Meta-RKHS II)": learner(classifier, tangent),
}

rows, curves = [], {}
for name, method in METHODS.items():
    x, losses, effective, begun = method.outer(), [], [], time.process_time()
    # The same tasks for every method. (Plain task means have as many effective tasks as tasks.)
    for step in method.train(x, loader(train, tasks=TASKS, query=5, seed=1, steps=STEPS)):
        step.hypergradient.raise_if_failed()
        losses.append(float(step.hypergradient.outer_loss))
        effective.append(float(step.hypergradient.stats.get("effective_tasks", TASKS)))
    seconds = (time.process_time() - begun) / STEPS
    tests = loader(test, tasks=min(TEST_TASKS, 50), query=5, seed=2, steps=math.ceil(TEST_TASKS / 50))
    # (Weights change nothing before the first step.)
    before = rows[-1][1] if method.weights else written(method.evaluate(method.outer(), tests, tasks=TEST_TASKS))
    after = written(method.evaluate(x, tests, tasks=TEST_TASKS))
    curves[name] = losses
    rows.append([name, before, after, sum(effective) / STEPS, 1000 * seconds])
    print(*rows[-1], flush=True)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
window = max(1, STEPS // 10)
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
    left.plot(range(window, STEPS + 1), smooth, label=name, linestyle="--" if "weighted" in name else "-")
left.set(xlabel="outer step", ylabel=f"query loss (nats), mean of {window} steps", title="Training tasks")
places = range(len(rows))[::-1]
for column, color, label in ((1, "0.7", "untrained start"), (2, "C0", f"after {STEPS} outer steps")):
    values, errors = zip(*(map(float, row[column].split(" ± ")) for row in rows), strict=True)
    right.errorbar(values, places, xerr=errors, fmt="o", color=color, capsize=3, label=label)
right.set(xlabel=f"accuracy (%), {TEST_TASKS} new tasks, 95 % interval", yticks=places, title="5-way 1-shot")
right.set_yticklabels([row[0] for row in rows])
right.legend(fontsize=8, loc="lower right")
left.legend(fontsize=7)
figure.tight_layout()
publish(
    "function_space",
    figure,
    [
        "what adapts",
        "accuracy at the start (%)",
        "accuracy (%)",
        "effective tasks of 4",
        "CPU time per outer step (ms)",
    ],
    rows,
)
