"""Element-wise step sizes learned online while a network trains: plain, optimistic and bootstrapped meta-gradients.

    python examples/papers/optimistic_network.py

Flennerhag et al. 2023 (arXiv 2301.03236) tune one step size per weight of an ImageNet network while it trains. Here a
perceptron on digits and on glyphs does so, one pass over a stream of batches: at every step the network moves by
y <- y - exp(w) * gradient, and the next batch says how w should have been. Against SGD (with and without momentum) and
Adam. Every method is tuned on the validation set with a seed that is not reported.
"""

import itertools
import math
import string
from functools import partial

import matplotlib.pyplot as plt
import torch
from publish import SMALL, publish
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.data import digits, glyphs

STEPS, BATCH, AHEAD, EVERY = (12 if SMALL else 300), 32, 4, 10  # EVERY: steps between looks at the test set
TUNING_SEED, SEEDS = 100, (0, 1) if SMALL else (0, 1, 2)
STUDENT = {2: 12.71, 3: 4.303}[len(SEEDS)]  # of a 95 % interval from so few seeds


def digits_data():
    data = digits.load(corruption=0.0)
    return (data.train_x, data.train_y), (data.valid_x, data.valid_y), (data.test_x, data.test_y)


def glyphs_data():
    images = glyphs.load(string.ascii_uppercase[: 8 if SMALL else 26], per_class=40)
    pixels = avg_pool2d(images.images.float() / 255, 2).reshape(len(images.names), 40, 196)
    labels = torch.arange(len(images.names)).unsqueeze(1).expand(-1, 40)
    parts = (slice(0, 24), slice(24, 32), slice(32, 40))
    return tuple((pixels[:, part].reshape(-1, 196), labels[:, part].reshape(-1)) for part in parts)


class Training:
    """One network, one stream of batches, and what is looked at on the way."""

    def __init__(self, data, seed):
        torch.manual_seed(seed)
        (inputs, labels), self.valid, self.test = data
        layers = torch.nn.Linear(inputs.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, int(labels.max()) + 1)
        self.call, self.start = bl.functional(torch.nn.Sequential(*layers))
        rows = torch.randint(len(labels), (STEPS + AHEAD + 1, BATCH))
        self.stream, self.curve, self.rates = [(inputs[row], labels[row]) for row in rows], [], ""

    def loss(self, y, x, batch):
        return cross_entropy(self.call(y, batch[0]), batch[1])

    @torch.no_grad()
    def look(self, step, y):
        if step % EVERY == 0 or step == STEPS:
            self.curve.append(self.loss(y, None, self.test).item())
        if step == STEPS:
            self.valid_loss = self.loss(y, None, self.valid).item()
            self.accuracy = (self.call(y, self.test[0]).argmax(1) == self.test[1]).float().mean().item()


def plain(make, data, seed, **settings):
    """Training with an optimizer of torch."""
    run = Training(data, seed)
    y = {name: leaf.clone().requires_grad_() for name, leaf in run.start.items()}
    optimizer = make(y.values(), **settings)
    run.look(0, y)
    for step in range(STEPS):
        optimizer.zero_grad()
        run.loss(y, None, run.stream[step]).backward()
        optimizer.step()
        run.look(step + 1, y)
    return run


def learned(estimator, optimism, data, seed, lr, meta_lr):
    """Training with step sizes exp(w) that are learned on the way."""
    run, further = Training(data, seed), AHEAD if isinstance(estimator, bl.Bootstrapped) else 0
    w = {name: torch.full_like(leaf, math.log(lr)).requires_grad_() for name, leaf in run.start.items()}
    steps = bl.iterate(
        bl.Problem(run.loss, run.loss),
        w,
        run.start,
        # inner: the batch of this step (and of those that the target takes further); outer: the next one
        (bl.Batches(bl.PerStep(run.stream[t : t + 1 + further]), run.stream[t + 1]) for t in range(STEPS)),
        solver=bl.Descent(bl.SGD(lr=lambda w: {name: leaf.exp() for name, leaf in w.items()}), steps=1),
        estimator=estimator,
        optimizer=bl.DualAveraging(w.values(), lr=meta_lr, optimism=optimism, adaptive=True),
    )
    run.look(0, run.start)
    for step in steps:
        run.look(step.index + 1, step.hypergradient.inner)
    rates = torch.cat([leaf.detach().exp().reshape(-1) for leaf in w.values()])
    run.rates = f"{rates.min():.2g} to {rates.max():.2g}"
    return run


def tried(**values):
    return [dict(zip(values, setting, strict=True)) for setting in itertools.product(*values.values())]


AHEAD_OF_IT = bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(AHEAD))
RATES = tried(lr=(0.5, 1.0, 2.0), meta_lr=(0.01, 0.03, 0.1, 0.3))
METHODS = {  # name: gradients per step, how it trains, the settings that it is tuned over
    "SGD": (1, partial(plain, SGD), tried(lr=(0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0))),
    "SGD with momentum": (1, partial(plain, SGD, momentum=0.9), tried(lr=(0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5))),
    "Adam": (1, partial(plain, Adam), tried(lr=(0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05))),
    "meta-gradients": (2, partial(learned, bl.Unrolled(), 0.0), RATES),
    "optimistic": (2, partial(learned, bl.Unrolled(), 1.0), RATES),
    f"bootstrapped, {AHEAD} steps ahead": (AHEAD + 4, partial(learned, AHEAD_OF_IT, 0.0), RATES),
}


def mean_and_interval(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean(0), STUDENT * values.std(0) / len(SEEDS) ** 0.5


def score(train, data, settings):
    try:
        loss = train(data, TUNING_SEED, **settings).valid_loss
    except bl.BilevelError:  # steps too long
        loss = math.inf
    return loss if math.isfinite(loss) else math.inf


(figure, axes), table = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained"), []
for axis, (name, load) in zip(axes, {"digits": digits_data, "glyphs": glyphs_data}.items(), strict=True):
    data = load()
    for method, (gradients, train, grid) in METHODS.items():
        best = min(grid[:2] if SMALL else grid, key=lambda settings: score(train, data, settings))
        runs = [train(data, seed, **best) for seed in SEEDS]
        middle, width = mean_and_interval([run.curve for run in runs])
        shares, spread = mean_and_interval([100 * run.accuracy for run in runs])
        steps = [min(step * EVERY, STEPS) for step in range(len(middle))]
        axis.plot(steps, middle, label=method)
        chosen = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in best.items())
        loss = f"{middle[-1]:.3f} ± {width[-1]:.3f}"
        table.append([name, method, gradients, chosen, loss, f"{shares:.1f} ± {spread:.1f}", runs[0].rates])
    axis.set(title=f"{name}, batches of {BATCH}", xlabel="steps", ylabel="test loss, mean of the seeds", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
axes[0].legend()
header = ["data", "method", "gradients a step", "tuned to", "test loss", "test accuracy (%)", "learned rates, seed 0"]
publish("optimistic_network", figure, header, table)
