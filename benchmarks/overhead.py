"""What measuring costs: a hypergradient bare, under the cheap meters, and under the tensors meter, in turn in one process.

    python benchmarks/overhead.py                    # about five minutes on one core; writes results/overhead.jsonl
    python benchmarks/overhead.py language --rounds 5

Cheap meters: oracles, clock, CUDA (off on a CPU) and phases, all at once. Seconds are the process's own CPU seconds, single-threaded, the garbage
collector off; one sample is as many hypergradients as take 60 ms. Each round takes the three in turn, in an order that changes, and the ratios
within a round share whatever else the machine does at that moment.
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
from bilevel_profiling import Case, case_file
from bilevel_profiling.measurement import STEPPED_THROUGH, Trial
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.phases import Phases
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel import _spans

OUT = Path(__file__).parent / "results" / "overhead.jsonl"
CASES = {"hypercleaning": 20, "language": 4, "fewshot": 3}
"""And K. The cases are those of `bilevel compare`."""
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
    """Least CPU seconds of a block under a meter with so many empty spans in it; of the two kinds of span, the dearer."""
    least = []
    for name in (_spans.HVP, _spans.HYPERGRADIENT):
        samples = []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(count):
                with meter():
                    for _ in range(spans):
                        with _spans.span(name):
                            pass
            samples.append((time.process_time() - start) / count)
        least.append(min(samples))
    return max(least)


def counted(spans):
    """CPU seconds that the cheap meters add to a step of so many spans, whatever else it does."""
    return block_seconds(cheap, spans, 50) - block_seconds(bare, spans, 50)


def cell(name, label, steps, rounds):
    case = case_file.load(name)
    trial = Trial(Case(case.setup, bl.Descent(case.optimizer, steps=steps), case.estimators[label], name=name, label=label))
    spans = Spans()
    with _spans.listen(spans):
        trial.hypergradient()
    once = sample(trial, bare, 1)
    repeats = max(1, round(SAMPLE_SECONDS / once))
    seconds = {side: [] for side in SIDES}
    for number in range(rounds):
        # The tensors meter takes one sample in four rounds: its factor is large and known soon.
        sides = [side for side in SIDES if side != "tensors" or number % 4 == 0]
        for side in sides if number % 2 else reversed(sides):
            seconds[side].append(sample(trial, SIDES[side], repeats))
    ratios = [metered / plain for plain, metered in zip(seconds["bare"], seconds["cheap"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    plain = statistics.median(seconds["bare"])
    return {
        "case": name,
        "estimator": label,
        "inner_steps": steps,
        "rounds": rounds,
        "repeats": repeats,
        "bare_seconds": plain,
        "bare_seconds_least": min(seconds["bare"]),
        "cheap_ratio": statistics.median(seconds["cheap"]) / plain,
        "cheap_quartiles": [quartiles[0], quartiles[2]],
        "cheap_ratio_of_least": min(seconds["cheap"]) / min(seconds["bare"]),
        "tensors_ratio": statistics.median(seconds["tensors"]) / plain,
        "spans": spans.count,
        "cheap_counted": counted(spans.count) / plain,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=60, help="of each cell")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "threads": 1}
    records = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=STEPPED_THROUGH)
        for name in given.cases:
            for label in ESTIMATORS:
                records.append({**cell(name, label, CASES[name], given.rounds), "environment": environment})
                print(json.dumps({key: value for key, value in records[-1].items() if key != "environment"}), flush=True)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
