"""MAML on characters drawn from fonts: learn an initialization from which a few steps on a new task are enough.

    python examples/maml_glyphs.py                     # exact: backpropagation through the inner loop
    python examples/maml_glyphs.py imaml               # implicit, with a proximal term: no trajectory
    python examples/maml_glyphs.py corrected           # first order only, with a correction (arXiv 2409.03682)
    python examples/maml_glyphs.py fomaml              # first order only, without one

5-way 1-shot tasks. The losses are those of one task; TaskMean averages. Ten steps do not bring this net to a minimum,
so with imaml conjugate gradients meet negative curvature, and iterate() says so. The first run draws the characters
(some ten seconds, then cached).
"""

import os
import string
import sys

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.data import glyphs
from bilevel.problems import fewshot
from bilevel.problems.conv4 import conv4

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: two outer steps, a small net, Latin letters only
WAY, SHOT, QUERY, TASKS = 5, 1, (3 if SMALL else 15), (2 if SMALL else 4)
WIDTH = 4 if SMALL else 32
INNER_STEPS, INNER_LR = 3, 0.1
LONG = 10  # inner steps of the estimators that look at the solution only, so that they get near one
OUTER_STEPS, OUTER_LR = (2 if SMALL else 100), 2e-3
CHUNK = 1  # tasks at once: on a CPU one is as fast as all of them, and needs less memory
PULL = 2.0  # strength of the proximal term, for the estimators that look at the solution only

call, params = bl.functional(conv4(WAY, width=WIDTH, seed=0))
outer = {name: tensor.requires_grad_() for name, tensor in params.items()}


def loss(inner, outer, batch):
    images, labels = batch
    return cross_entropy(call(inner, images), labels)


maml = bl.Problem(loss, loss, init=lambda outer, batch: outer)
METHODS = {
    "maml": (maml, INNER_STEPS, bl.Unrolled()),
    "imaml": (bl.proximal(maml, PULL), LONG, bl.Implicit(bl.CG(max_steps=5, tol=0.1))),
    "corrected": (bl.proximal(maml, PULL), LONG, bl.FirstOrderCorrected(nu=0.1)),
    "fomaml": (maml, INNER_STEPS, bl.FirstOrder()),
}
name = sys.argv[1] if len(sys.argv) > 1 else "maml"
if name not in METHODS:
    sys.exit(f"no method {name!r}; choose one of {', '.join(METHODS)}")
problem, steps, estimator = METHODS[name]

everything = glyphs.load(string.ascii_letters) if SMALL else glyphs.load()
parts = everything.split(seed=0)
judge = {"way": WAY, "shot": SHOT, "query": QUERY, "tasks": 4 if SMALL else 40, "lr": INNER_LR, "steps": 10}


def report(when):
    found = fewshot.evaluate(outer, parts["test"], **judge)
    print(f"{when}: accuracy on unseen characters {found['accuracy']:.3f} +- {found['accuracy_interval']:.3f}")


report("untrained")
loop = bl.iterate(
    problem,
    outer,
    None,  # every task starts at init(outer) = outer
    fewshot.stream(parts["train"], steps=OUTER_STEPS, tasks=TASKS, way=WAY, shot=SHOT, query=QUERY),
    solver=bl.Descent(bl.SGD(lr=INNER_LR), steps=steps),
    estimator=bl.TaskMean(estimator, chunk=CHUNK),
    optimizer=torch.optim.Adam(outer.values(), lr=OUTER_LR),
)
for step in loop:
    if step.index % 20 == 0:
        print(
            f"outer step {step.index:3d}   query loss {step.outer_loss.item():.3f}   {step.hypergradient.status.name}"
        )
report(f"after {OUTER_STEPS} outer steps of {name}")
