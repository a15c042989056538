"""First-order MAML with a correction (arXiv 2409.03682) on MNIST-1D: memory against channels, and accuracy.

    python examples/papers/first_order_corrected_memory.py

(c) Peak tensor memory of one outer step on one task, against the number of channels of a convolutional net, for
second-order MAML (Unrolled), the corrected estimator, and plain training: one gradient on the task's support.
(d) Accuracy on digits that were not trained on: 3-way 5-shot tasks, six digits to train on, four to test on.
"""

import functools

import matplotlib.pyplot as plt
import torch
from bilevel_profiling import measure
from publish import SMALL, publish
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.data import Episodes, mnist1d

WAY, TASKS = 3, 4
SETTING = {"way": WAY, "shot": 5, "query": 10, "tasks": TASKS}
STEPS, PULL, NU = 10, 2.0, 0.03  # K; of the proximal term; of the correction
CHANNELS = [4, 8] if SMALL else [10, 50, 100, 150, 200, 250]
WIDTH, OUTER_STEPS, TESTED = (4, 2, 4) if SMALL else (32, 150, 300)

data = mnist1d.load(200 if SMALL else 5000)
train, test = data.select(range(6)), data.select(range(6, 10))


def net(channels: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv1d(1, channels, 5, stride=2, padding=2), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv1d(channels, channels, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * channels, WAY))


def learner(estimator: bl.Estimator, channels: int, pull: float, seed: int = 0) -> bl.meta.Learner:
    return bl.meta.Learner(
        net(channels, seed),
        cross_entropy,
        start=bl.meta.Shared(pull=pull),
        solver=bl.Descent(bl.SGD(lr=0.05), STEPS),
        estimator=estimator,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
    )


METHODS = {
    "MAML (Unrolled)": (bl.Unrolled(), 0.0, "C3"),
    "corrected (symmetric)": (bl.FirstOrderCorrected(NU), PULL, "C0"),
    "FOMAML (FirstOrder)": (bl.FirstOrder(), 0.0, "C4"),
}

# --- (c) memory of one task

rows = []
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=[3, 2])
one = next(iter(Episodes(train, **{**SETTING, "tasks": 1}, seed=0)))


def mebibytes(call) -> float:
    return measure(call, repeats=1).peak_tensor_bytes / 2**20


def plain(channels: int) -> float:
    model, (inputs, targets) = net(channels), one.inner

    def step() -> None:
        torch.autograd.grad(cross_entropy(model(inputs[0]), targets[0]), list(model.parameters()))

    return mebibytes(step)


trained = [plain(channels) for channels in CHANNELS]
left.plot(CHANNELS, trained, "s:", color="k", label="plain training, one gradient")
rows.append(("c", "plain training", f"MiB at {CHANNELS[-1]} channels", trained[-1], "1"))
for label, (estimator, pull, color) in METHODS.items():
    peaks = []
    for channels in CHANNELS:
        maml = learner(estimator, channels, pull)
        x = maml.outer()
        peaks.append(mebibytes(functools.partial(maml.hypergradient, x, one)))
    left.plot(CHANNELS, peaks, "o-", color=color, label=label)
    ratios = f"{peaks[0] / trained[0]:.1f} to {peaks[-1] / trained[-1]:.1f}"
    rows.append(("c", label, f"MiB at {CHANNELS[-1]} channels", peaks[-1], ratios))
left.set(xlabel="channels", ylabel="peak tensor memory of one task [MiB]", title=f"(c) memory, K = {STEPS} inner steps")
left.legend()

# --- (d) accuracy on unseen digits, adapted by K plain steps whatever the training was

judge = learner(bl.Unrolled(), WIDTH, 0.0)
tests = Episodes(test, **SETTING, seed=2, steps=TESTED // TASKS)
right.axhline(judge.evaluate(judge.outer(), tests).score, color="k", linestyle=":")
for place, (label, (estimator, pull, color)) in enumerate(METHODS.items()):
    maml = learner(estimator, WIDTH, pull)
    x = maml.outer()
    loader, failed = Episodes(train, **SETTING, seed=1, steps=OUTER_STEPS), 0
    for step in maml.train(x, loader, tolerate=[bl.Status.UNBOUNDED]):
        failed += step.hypergradient.status.failed
    found = judge.evaluate(x, tests)
    right.bar(place, found.score, yerr=found.interval, color=color, capsize=4)
    print(label, found, f"{failed} steps where a side ran away", flush=True)
    rows.append(
        ("d", label, f"accuracy of {found.tasks} tasks", found.score, f"+- {found.interval:.3f}; {failed} failed")
    )
right.set_xticks(range(len(METHODS)), [label.replace(" (", "\n(") for label in METHODS])
right.set(ylabel="accuracy on unseen digits (dotted: untrained)", ylim=(0.3, 1.0))
right.set_title(f"(d) {WAY}-way 5-shot, {WIDTH} channels, {OUTER_STEPS} outer steps")
publish(
    "first_order_corrected_memory",
    figure,
    ["panel", "estimator", "quantity", "measured", "ratio to plain, few to many channels; 95 % interval, failed steps"],
    rows,
)
