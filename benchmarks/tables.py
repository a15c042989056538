"""Write benchmarks/README.md from the committed results: python benchmarks/tables.py"""

import json
from pathlib import Path

from plain_reference import table

HERE = Path(__file__).parent


def rows(name):
    path = HERE / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def environment(records):
    return "; ".join(sorted({", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in records}))


def cleaning(records):
    lines = ["| estimator | seed | test accuracy | equal weights | clean labels only | AUC | statuses of the outer steps |", "| --- " * 7 + "|"]
    for r in records:
        statuses = ", ".join(f"{n} {name}" for name, n in r["statuses"].items())
        lines.append(
            f"| {r['estimator']} | {r['seed']} | {r['test_accuracy']:.3f} | {r['baseline_test_accuracy']:.3f} | {r['ideal_test_accuracy']:.3f} "
            f"| {r['corruption_auc']:.3f} | {statuses} |"
        )
    return "\n".join(lines)


def characters(records):
    lines = ["| estimator | shot | K | outer steps | accuracy before | after | without adaptation |", "| --- " * 7 + "|"]
    for r in records:
        lines.append(
            f"| {r['estimator']} | {r['shot']} | {r['inner_steps']} | {r['outer_steps']} "
            f"| {r['before_accuracy']:.3f} +- {r['before_accuracy_interval']:.3f} "
            f"| {r['accuracy']:.3f} +- {r['accuracy_interval']:.3f} | {r['unadapted_accuracy']:.3f} |"
        )
    return "\n".join(lines)


def main():
    plain, problems = rows("plain_reference.jsonl"), rows("problems.jsonl")
    text = f"""# Benchmarks

Every table here is written by `python benchmarks/tables.py` from `results/`, and every result by the script named above it.

## Beside hand-written torch

    python benchmarks/plain_reference.py

`../shared/bench/plain_ref.py` is torch by hand, without a library. Both sides do the same work in one fresh single-threaded process, call by call
in turn; the time ratio is the median over rounds of ours / theirs in process CPU seconds, with quartiles (other work on the machine moves it by
several percent; memory is exact). P1: MAML of a 4-conv net, one task, 5-way 5-shot. P2: hyper-cleaning, MLP 784-300-10, 5000 weights, minibatch 500.
Memory is the peak of live tensor bytes under that folder's meter. "difference" is the relative difference of the two hypergradients.

"implicit": at the K-th iterate of these nets the Hessian is indefinite. Our CG says so and stops (status, HVPs made); the hand-written one goes
on through negative curvature for its ten products, so the two numbers differ and the time ratio is not like for like. In "implicit damped" ours
solves (H + 10 I) v = b: on P1 it then makes all ten products, plus an eleventh in the mixed product, from which the true residual comes; the
hand-written one has no residual, and on P1 its mixed product is a multiplication by hand. On P2 four products meet float32's precision.

{table(plain)}

Environment: {environment(plain)}

## The ready problems

    python benchmarks/problems.py

Hyper-cleaning, 50 outer steps of Adam, K = 30, y carried on; accuracies of a fresh net trained with the learned weights:

{cleaning([r for r in problems if r["problem"] == "hypercleaning"])}

Few-shot characters of the DejaVu fonts, 5-way, accuracy on 40 tasks of unseen characters after 10 steps:

{characters([r for r in problems if r["problem"] == "fewshot"])}

Environment: {environment(problems)}
"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
