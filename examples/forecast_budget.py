"""Which estimators of a hypergradient fit one GPU, for a language model that this machine could not hold.

Nothing is allocated: the memory is forecast. A weight is learned for each training sequence of a transformer
(`bilevel.problems.language`). The same on the command line, for a problem with a case file:
`bilevel forecast CASE --budget 80GiB --on a100`.
"""

import functools
import os
import time

from bilevel_profiling import Case, recommend

import bilevel as bl
from bilevel.problems import language

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"
LAYERS, WIDTH, STEPS = (1, 64, 1) if SMALL else (4, 5120, 3)
GPU = "a100"
# Of 80: the rest is for what a forecast cannot see, workspaces and fragmentation.
BUDGET = "200MiB" if SMALL else "72GiB"

setup = functools.partial(
    language.setup, layers=LAYERS, width=WIDTH, heads=WIDTH // 64, context=256, batch=16, validation=16, steps=STEPS
)
case = Case(
    setup, solver=bl.Descent(bl.SGD(lr=0.05), steps=STEPS), estimator=bl.Unrolled(), device="cuda", name="language"
)
estimators = {
    "unrolled": bl.Unrolled(),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "implicit CG": bl.Implicit(bl.CG(max_steps=3)),
    "first-order corrected": bl.FirstOrderCorrected(),
}

started = time.perf_counter()
ranked = recommend(case, BUDGET, estimators=estimators, on=GPU)
print(
    f"{ranked[0].forecast.inner_size:,} numbers in the model, K = {case.solver.steps}, {BUDGET}; "
    f"{time.perf_counter() - started:.0f} s"
)
print(f"{'estimator':22} {'needs GiB':>10} {'fits':>5} {'s at least':>11}  most of the peak")
for advice in ranked:
    record = advice.forecast
    most = record.alive[0]
    origin = f"{most.operator}, {most.line}"
    print(
        f"{advice.label:22} {advice.needed_bytes / 2**30:10.1f} {'yes' if advice.fits else 'no':>5} "
        f"{record.roofline_seconds:11.2f}  {origin}"
    )
print(f"Take {ranked[0].label}. {ranked[0].sentence}" if ranked[0].fits else "None of these fits.")
