"""What the ready problems can do: hyper-cleaning against equal weights, few-shot accuracy on unseen characters.

    python benchmarks/problems.py [hypercleaning] [fewshot]      # ten minutes on one core; results/problems.jsonl

The tables of benchmarks/README.md come from here.
"""

import argparse
import json
import platform
from collections import Counter
from pathlib import Path

import torch

import bilevel as bl
from bilevel.problems import fewshot, hypercleaning

OUT = Path(__file__).parent / "results" / "problems.jsonl"


def cleaning():
    estimators = {
        "Unrolled()": bl.Unrolled(),
        "Implicit(Neumann(20, 0.3))": bl.Implicit(bl.Neumann(20, 0.3)),
        "Implicit(CG(10))": bl.Implicit(bl.CG(10)),
        "MemoryReduced(damping=0.01)": bl.MemoryReduced(damping=1e-2),
    }
    for label, estimator in estimators.items():
        for seed in (0, 1, 2):
            problem, outer, inner, batches = hypercleaning.setup(seed=seed)
            loop = bl.iterate(
                problem,
                outer,
                inner,
                [batches] * hypercleaning.OUTER_STEPS,
                solver=bl.Descent(bl.SGD(hypercleaning.INNER_LR), hypercleaning.INNER_STEPS),
                estimator=estimator,
                optimizer=torch.optim.Adam(outer.values(), lr=hypercleaning.OUTER_LR),
            )
            statuses = Counter(step.hypergradient.status.name for step in loop)
            yield {
                "problem": "hypercleaning",
                "estimator": label,
                "seed": seed,
                "statuses": statuses,
                **hypercleaning.evaluate(outer, seed=seed),
            }


def characters():
    train, test = fewshot.load("train"), fewshot.load("test")
    for label, estimator, shot, steps, outer_steps in (
        ("TaskMean(FirstOrder(), chunk=1)", bl.FirstOrder(), 5, 5, 100),
        ("TaskMean(Unrolled(), chunk=1)", bl.Unrolled(), 1, 3, 100),
    ):
        problem, outer, _, _ = fewshot.setup(data=train, shot=shot)
        before = fewshot.evaluate(outer, test, tasks=40, chunk=1, shot=shot)
        loop = bl.iterate(
            problem,
            outer,
            None,
            fewshot.stream(train, steps=outer_steps, shot=shot, seed=1),
            solver=bl.Descent(bl.SGD(fewshot.INNER_LR), steps),
            estimator=bl.TaskMean(estimator, chunk=1),
            optimizer=torch.optim.Adam(outer.values(), lr=fewshot.OUTER_LR),
        )
        statuses = Counter(step.hypergradient.status.name for step in loop)
        after = fewshot.evaluate(outer, test, tasks=40, chunk=1, shot=shot)
        yield {
            "problem": "fewshot",
            "estimator": label,
            "shot": shot,
            "inner_steps": steps,
            "outer_steps": outer_steps,
            "statuses": statuses,
            **{f"before_{name}": value for name, value in before.items()},
            **after,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "problems", nargs="*", default=["hypercleaning", "fewshot"], help="which problems; both by default"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    records = []
    for name in arguments.problems:
        for record in {"hypercleaning": cleaning, "fewshot": characters}[name]():
            records.append(json.dumps({**record, "environment": environment}))
            print(records[-1], flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(records) + "\n")


if __name__ == "__main__":
    main()
