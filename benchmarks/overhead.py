"""What measuring costs: a hypergradient bare, under the cheap meters, and under the tensors meter, in one process.

    python benchmarks/overhead.py                    # about ten minutes on one core; writes results/overhead.jsonl
    python benchmarks/overhead.py language --seconds 10

Cheap meters: oracles, clock, CUDA (off on a CPU) and phases, all at once. Seconds are the process's own CPU seconds,
single-threaded, the garbage collector off; one sample is as many hypergradients as take 60 ms. Each round takes bare
and metered in turn, in an order that changes, and both share whatever else the machine does at that moment: on a busy
machine the median of the rounds' ratios is the figure to read. Rounds are added until its standard error is one
percent, or the time of the cell is used.
"""

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from bilevel_profiling import Case
from bilevel_profiling.cases import case_file
from bilevel_profiling.measurement.passes import STEPPED_THROUGH
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.phases import Phases
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl

OUT = Path(__file__).parent / "results" / "overhead.jsonl"
CASES = {"hypercleaning": 20, "language": 2, "fewshot": 3}
"""And K. The cases are those of `bilevel compare`."""
LEAST_ROUNDS, ENOUGH = 20, 0.01
ESTIMATORS = ("unrolled", "implicit CG", "first-order corrected")
SAMPLE_SECONDS = 0.06


def bare():
    return contextlib.nullcontext()


def cheap():
    around = contextlib.ExitStack()
    for meter in (Oracles(), Clock("cpu"), Cuda("cpu"), Phases(lambda phase: None)):
        around.enter_context(meter)
    return around


SIDES = {"bare": bare, "cheap": cheap, "tensors": Tensors}


class Spans:
    """A listener that counts every span."""

    count = 0

    def enter(self, name, count):
        self.count += 1

    def exit(self, name):
        pass


def sample(trial, meter, repeats):
    """CPU seconds of one hypergradient under a fresh meter: entering and leaving it included."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        for _ in range(repeats):
            with meter():
                found = trial.hypergradient()
            del found
        return (time.process_time() - start) / repeats
    finally:
        gc.enable()


def block_seconds(meter, spans, count, rounds=20):
    """Least CPU seconds of a block under a meter with so many empty spans in it; of the two kinds of span, the
    dearer."""
    least = []
    for name in (spans.HVP, spans.HYPERGRADIENT):
        samples = []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(count):
                with meter():
                    for _ in range(spans):
                        with spans.span(name):
                            pass
            samples.append((time.process_time() - start) / count)
        least.append(min(samples))
    return max(least)


def counted(spans):
    """CPU seconds that the cheap meters add to a step of so many spans, whatever else it does."""
    return block_seconds(cheap, spans, 50) - block_seconds(bare, spans, 50)


def standard_error(ratios):
    """Of their median, from the distances to it (a normal distribution's, which outliers do not move)."""
    middle = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
    return 1.2533 * spread / len(ratios) ** 0.5


def cell(name, label, steps, limit):
    case = case_file.load(name)
    trial = Trial(
        Case(case.setup, bl.Descent(case.optimizer, steps=steps), case.estimators[label], name=name, label=label)
    )
    spans = Spans()
    with spans.listen(spans):
        trial.hypergradient()
    repeats = max(1, round(SAMPLE_SECONDS / sample(trial, bare, 1)))
    seconds, started = {side: [] for side in SIDES}, time.perf_counter()
    ratios = []
    while len(ratios) < 5 or (
        time.perf_counter() - started < limit and (len(ratios) < LEAST_ROUNDS or standard_error(ratios) > ENOUGH)
    ):
        order = ("bare", "cheap") if len(ratios) % 2 else ("cheap", "bare")
        for side in order:
            seconds[side].append(sample(trial, SIDES[side], repeats))
        ratios.append(seconds["cheap"][-1] / seconds["bare"][-1])
        if len(ratios) % 5 == 0 and len(ratios) <= 50:  # its factor is large, and known soon
            seconds["tensors"].append(sample(trial, Tensors, repeats))
    low, _, high = statistics.quantiles(ratios, n=4)
    plain = statistics.median(seconds["bare"])
    return {
        "case": name,
        "estimator": label,
        "inner_steps": steps,
        "rounds": len(ratios),
        "repeats": repeats,
        "bare_seconds": plain,
        "bare_seconds_least": min(seconds["bare"]),
        "cheap_ratio": statistics.median(ratios),
        "cheap_ratio_error": standard_error(ratios),
        "cheap_quartiles": [low, high],
        "cheap_ratio_of_medians": statistics.median(seconds["cheap"]) / plain,
        "cheap_ratio_of_least": min(seconds["cheap"]) / min(seconds["bare"]),
        "tensors_ratio": statistics.median(seconds["tensors"]) / plain,
        "spans": spans.count,
        "cheap_counted": counted(spans.count) / plain,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--seconds", type=float, default=75, help="at most, for the rounds of a cell")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    records = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=STEPPED_THROUGH)
        for name in given.cases:
            for label in ESTIMATORS:
                records.append({**cell(name, label, CASES[name], given.seconds), "environment": environment})
                print(
                    json.dumps({key: value for key, value in records[-1].items() if key != "environment"}), flush=True
                )
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
