"""One ridge penalty for each feature, learned on validation data, with every estimator held against the closed form.

    python examples/ridge_hyperparameters.py

Diabetes data: 442 patients, 10 features, float64. First the error of each estimator at one point, then the outer loop.
"""

import itertools
import os

import torch

import bilevel as bl
from bilevel.problems import ridge

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: three outer steps
INNER_STEPS = 200  # the condition number is about 30, so that y is at the solution to a few digits
OUTER_STEPS, OUTER_LR = (3 if SMALL else 100), 0.1
ESTIMATORS = {
    "Unrolled()": bl.Unrolled(),
    "Unrolled(last=20)": bl.Unrolled(last=20),
    "Implicit(CG(10))": bl.Implicit(bl.CG(max_steps=10, tol=1e-12)),
    "Implicit(CG(3))": bl.Implicit(bl.CG(max_steps=3, tol=1e-12)),
    "Implicit(Neumann(20))": bl.Implicit(bl.Neumann(steps=20, step_size=0.4)),
    "MemoryReduced()": bl.MemoryReduced(tol=1e-12),
    "FirstOrderCorrected()": bl.FirstOrderCorrected(),
    "...(scheme='forward')": bl.FirstOrderCorrected(scheme="forward"),
}

data = ridge.load()
outer = {"log_penalty": torch.full((10,), -2.0, dtype=torch.float64, requires_grad=True)}
inner = torch.zeros(10, dtype=torch.float64)


def half_mean_square(weights, batch):
    features, responses = batch
    return 0.5 * (features @ weights - responses).square().mean()


problem = bl.Problem(
    inner_loss=lambda w, x, batch: half_mean_square(w, batch) + 0.5 * (x["log_penalty"].exp() * w.square()).sum(),
    outer_loss=lambda w, x, batch: half_mean_square(w, batch),
)
batches = bl.Batches(inner=data.train, outer=data.valid)

exact = ridge.hypergradient(outer, data.train, data.valid)["log_penalty"]
print(f"{'estimator':24s} {'error':>8s}   gradients   HVPs   status")
for label, estimator in ESTIMATORS.items():
    solver = bl.Descent(bl.SGD(lr=0.4), steps=INNER_STEPS)
    hg = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator)
    error = ((hg.grad["log_penalty"] - exact).norm() / exact.norm()).item()
    calls = hg.stats["calls"]
    print(
        f"{label:24s} {error:8.1e}   {calls['inner_gradient'] + calls['outer_gradient']:9d}   {calls['hvp']:4d}   "
        f"{hg.status.name}"
    )

# A penalty grows without bound where its feature is useless, so the step size must follow it: a function of x for each
# weight.
loop = bl.iterate(
    problem,
    outer,
    inner,
    itertools.repeat(batches, OUTER_STEPS),
    solver=bl.Descent(bl.SGD(lr=ridge.step_size), steps=20),  # few, because y is carried from step to step
    estimator=bl.Implicit(bl.CG(max_steps=10)),
    optimizer=torch.optim.Adam(outer.values(), lr=OUTER_LR),
)
before = half_mean_square(ridge.solution(outer, data.train), data.valid).item()
for _ in loop:
    pass
learned = ridge.solution(outer, data.train)
print(
    f"\nvalidation loss {before:.4f} -> {half_mean_square(learned, data.valid).item():.4f} after {OUTER_STEPS} outer "
    f"steps"
)
for name, penalty, weight in zip(data.features, outer["log_penalty"].exp().tolist(), learned.tolist(), strict=True):
    print(f"  {name:4s} penalty {penalty:8.3f}   weight {weight:+.3f}")
