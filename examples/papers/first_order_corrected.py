"""First-order MAML with a correction (arXiv 2409.03682): its bias, and what it is worth in an outer loop.

    python examples/papers/first_order_corrected.py

(a) The error of the hypergradient against the accuracy delta of the inner solves, at the best nu for each delta.
(b) The norm of the true gradient of the meta-objective against gradient evaluations. Eight logistic tasks with a
proximal inner problem, float64; the true gradient is Newton's method and a dense solve, written here.
"""

import dataclasses
import functools
import itertools
import math

import matplotlib.pyplot as plt
import torch
from publish import SMALL, publish
from torch import Tensor

import bilevel as bl

TASKS, ROWS, SIZE, PULL, LR, D = 8, 20, 5, 0.5, 1.0, torch.float64
NAMES = {1: "forward", 2: "symmetric", 4: "4 points"}

# Tasks with weights and scales of their own: support and query, each ROWS inputs and labels.
g = torch.Generator().manual_seed(0)
weights = 1 + 2 * torch.randn(TASKS, SIZE, generator=g, dtype=D)
scales = 2 * torch.rand(TASKS, 1, SIZE, generator=g, dtype=D)
inputs = scales * torch.randn(TASKS, 2 * ROWS, SIZE, generator=g, dtype=D)
chances = torch.einsum("tni,ti->tn", inputs, weights).sigmoid()
labels = (torch.rand(TASKS, 2 * ROWS, generator=g, dtype=D) < chances).to(D)
support, query = (inputs[:, :ROWS], labels[:, :ROWS]), (inputs[:, ROWS:], labels[:, ROWS:])


def logistic(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(batch[0] @ y, batch[1])


PROBLEM = bl.proximal(bl.Problem(logistic, logistic, init=lambda x, batch: x), PULL)


def exact(theta: Tensor) -> Tensor:
    """The gradient of F for each task: pull (H + pull I)^-1 grad h(phi*), dense."""
    x, phi, eye = theta.detach(), theta.detach().expand(TASKS, SIZE), torch.eye(SIZE, dtype=D)

    def parts(batch: tuple[Tensor, Tensor], phi: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.einsum("tni,ti->tn", batch[0], phi).sigmoid()
        gradient = torch.einsum("tni,tn->ti", batch[0], p - batch[1]) / ROWS
        return gradient, torch.einsum("tni,tn,tnj->tij", batch[0], p * (1 - p), batch[0]) / ROWS + PULL * eye

    for _ in range(10):
        gradient, hessian = parts(support, phi)
        phi = phi - torch.linalg.solve(hessian, gradient + PULL * (phi - x))
    return PULL * torch.linalg.solve(parts(support, phi)[1], parts(query, phi)[0])


# --- (a) bias against delta, of the first task


@dataclasses.dataclass(frozen=True)
class Inexact(bl.Optimizer):
    """Gradient steps, the last of which lands `delta` away, in another direction for every inner solve."""

    steps: int
    delta: float
    generator: torch.Generator

    def init(self, inner):
        return 0

    def step(self, grad, state, inner, outer):
        moved = inner - LR * grad
        error = torch.randn(SIZE, generator=self.generator, dtype=D)
        last = state == self.steps - 1
        return moved + last * self.delta * error / error.norm(), state + 1

    def stationarity(self, grad, inner, outer):
        return grad


def error(scheme: int, delta: float, nu: float) -> float:
    batches, wanted, found = bl.Batches(*[(one[0][0], one[1][0]) for one in (support, query)]), exact(START)[0], []
    for seed in range(2 if SMALL else 4):
        solver = bl.Descent(Inexact(40, delta, torch.Generator().manual_seed(seed)), 40)
        estimator = bl.FirstOrderCorrected(nu, scheme)
        grad = bl.hypergradient(PROBLEM, START, None, batches, solver=solver, estimator=estimator).grad
        found.append(((grad - wanted).norm() / wanted.norm()).item() ** 2)
    return math.sqrt(sum(found) / len(found))


START = torch.full((SIZE,), -2.0, dtype=D)
DELTAS = [1e-3, 1e-5] if SMALL else [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
(figure, (left, right)), rows = plt.subplots(1, 2, figsize=(13, 5)), []
for scheme, color in {1: "C1", 2: "C0", 4: "C2"}.items():
    expected = scheme / (scheme + 1)
    centers = {delta: bl.best_nu(delta, scheme, sensitivity=PULL) for delta in DELTAS}
    best = [min(error(scheme, delta, nu * 10 ** (k / 4)) for k in range(-3, 4)) for delta, nu in centers.items()]
    logs = torch.tensor([[math.log(delta), 1.0] for delta in DELTAS], dtype=D)
    slope = torch.linalg.lstsq(logs, torch.tensor(best, dtype=D).log()[:, None]).solution[0].item()
    left.loglog(DELTAS, best, "o-", color=color, label=f"{NAMES[scheme]}: slope {slope:.2f}")
    guide = [best[0] * (delta / DELTAS[0]) ** expected for delta in DELTAS]
    left.loglog(DELTAS, guide, ":", color=color, label=f"slope {expected:.2f}")
    rows.append(("a", NAMES[scheme], "slope in delta", slope, f"{expected:.2f}"))
left.set(xlabel="delta: distance of an inner solution from its minimizer", ylabel="relative error of the hypergradient")
left.set_title("(a) error at the best nu for each delta")

# --- (b) an outer loop

OUTER_STEPS, K = (3 if SMALL else 100), 20


def trained(estimator: bl.Estimator, make) -> tuple[list[int], list[float]]:
    theta = START.clone().requires_grad_()
    optimizer, spent, calls, norms = make([theta]), 0, [], []
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    loader = itertools.repeat(bl.Batches(inner=support, outer=query), OUTER_STEPS)
    given = {"solver": bl.Descent(bl.SGD(LR), K), "estimator": bl.TaskMean(estimator), "optimizer": optimizer}
    for step in bl.iterate(PROBLEM, theta, None, loader, **given):
        counted = step.hypergradient.stats["calls"].items()
        spent += sum(count * (2 if name in ("hvp", "mixed") else 1) for name, count in counted)
        calls.append(spent)
        norms.append(exact(theta).mean(0).norm().item())
        if isinstance(optimizer, bl.NormalizedSGD):
            decay.step()  # steps of a fixed length do not come to rest by themselves
    return calls, norms


sgd = {lr: functools.partial(torch.optim.SGD, lr=lr) for lr in (4.0, 1.0, 0.5)}
clipped = functools.partial(bl.ClippedSGD, lr=8.0, radius=0.5, momentum=0.5)
normalized = functools.partial(bl.NormalizedSGD, lr=0.5, momentum=0.5)
runs = [
    *((f"FOMAML, SGD({lr:g})", bl.FirstOrder(), sgd[lr], "C3", style) for lr, style in ((4.0, "-"), (1.0, "--"))),
    *((f"Reptile, SGD({lr:g})", bl.meta.Reptile(), sgd[lr], "C4", style) for lr, style in ((1.0, "-"), (0.5, "--"))),
    ("MAML, clipped", bl.Unrolled(), clipped, "C5", "-"),
    ("iMAML (CG, 5 products), clipped", bl.Implicit(bl.CG(SIZE)), clipped, "C6", "-"),
    ("forward, nu = 0.1, clipped", bl.FirstOrderCorrected(0.1, "forward"), clipped, "C1", "-"),
    ("symmetric, nu = 0.1, clipped", bl.FirstOrderCorrected(0.1), clipped, "C0", "-"),
    ("symmetric, nu = 0.1, normalized", bl.FirstOrderCorrected(0.1), normalized, "C0", "--"),
    ("4 points, nu = 0.1, clipped", bl.FirstOrderCorrected(0.1, 4), clipped, "C2", "-"),
]
for label, estimator, make, color, style in runs:
    calls, norms = trained(estimator, make)
    right.semilogy(calls, norms, style, color=color, label=label)
    rows.append(("b", label, f"norm of grad F after {calls[-1]} gradients", norms[-1], ""))
right.set(xlabel="gradient evaluations per task (a Hessian-vector product is two)", ylabel="norm of the true grad F")
right.set_title(f"(b) {OUTER_STEPS} outer steps, K = {K} inner steps")
for axes in (left, right):
    axes.legend(fontsize=8)
publish("first_order_corrected", figure, ["panel", "estimator", "quantity", "measured", "expected"], rows)
