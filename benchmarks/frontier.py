"""Error against memory and against time, every estimator beside other libraries: who is on the frontier?

    bilevel compare benchmarks/cases/p2.py --estimators all --baselines betty higher torchopt --out report-p2
    python benchmarks/frontier.py report-p2/records.jsonl

Keeps the records as benchmarks/results/p2.jsonl and writes benchmarks/results/p2.md. A row is on a frontier where no
other has at most its error and at most its cost. Errors are 1 - cosine to the gradient of the K-step program in
float64; those below 1e-6 count as equal, and times within 10 % too. Without an argument: from what is kept.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KEPT, TABLE = RESULTS / "p2.jsonl", RESULTS / "p2.md"
PEERS = ("betty", "higher", "torchopt")
EXACT, ALIKE = 1e-6, 1.1
FIELDS = [
    "case",
    "estimator",
    "settings",
    "solver",
    "inner_steps",
    "seed",
    "device",
    "dtype",
    "status",
    "reason",
    "peak_tensor_bytes",
    "wall_seconds",
    "wall_seconds_low",
    "wall_seconds_high",
    "repeats",
    "calls",
    "program_cosine",
    "program_relative_error",
    "environment",
]
"""Of a record, what is kept."""
COSTS = {"memory": ("peak_tensor_bytes", 1.0), "time": ("wall_seconds", ALIKE)}


def error(row):
    """1 - cosine to the exact hypergradient."""
    return max(1 - row["program_cosine"], EXACT)


def measured(rows):
    """Those that returned a number."""
    return [row for row in rows if row.get("program_cosine") is not None and row.get("wall_seconds") is not None]


def theirs(row):
    return row["estimator"].startswith(PEERS)


def dominated(row, others, cost):
    """Whether one of the others has at most its error and at most its cost."""
    field, room = COSTS[cost]
    return any(error(each) <= error(row) * (1 + 1e-3) and each[field] <= room * row[field] for each in others)


def frontier(rows, cost):
    """The rows that no other has both less error and less cost than."""
    field, _ = COSTS[cost]
    found, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (error(row), row[field])):
        if row[field] < least:
            found.append(row)
            least = row[field]
    return found


def outside(rows, cost):
    """Other libraries' rows that none of ours reaches."""
    ours = [row for row in rows if not theirs(row)]
    return [row for row in rows if theirs(row) and not dominated(row, ours, cost)]


def written(rows):
    """The page."""
    numbers = measured(rows)
    fronts = {cost: frontier(numbers, cost) for cost in COSTS}
    first = next(row for row in numbers if row["estimator"] == "unrolled")
    lines = [
        f"K = {first['inner_steps']}: {len(numbers)} rows measured, {len(rows) - len(numbers)} refused or failed.",
        "",
        "| estimator | status | MiB | time / unrolled | cosine to the exact | frontier |",
        "| --- " * 6 + "|",
    ]
    for row in sorted(numbers, key=lambda row: (error(row), row["peak_tensor_bytes"])):
        on = ", ".join(cost for cost, front in fronts.items() if row in front)
        lines.append(
            f"| {row['estimator']} | {row['status']} | {row['peak_tensor_bytes'] / 2**20:.2f} "
            f"| {row['wall_seconds'] / first['wall_seconds']:.2f} | {row['program_cosine']:.4f} | {on} |"
        )
    lines += ["", "Rows without a number:", ""]
    for row in rows:
        if row not in numbers:
            lines.append(f"- {row['estimator']}: {row['status']}. {' '.join(row.get('reason', '').split())[:300]}")
    for cost in COSTS:
        beyond = [row["estimator"] for row in outside(numbers, cost)]
        lines += ["", f"Other libraries' rows outside of ours, in {cost}: {', '.join(beyond) or 'none'}."]
    environment = first["environment"]
    lines += ["", f"Environment: {', '.join(f'{key} {value}' for key, value in environment.items() if value)}."]
    return "\n".join(lines) + "\n"


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kept = [{name: row[name] for name in FIELDS} for row in read(sys.argv[1])]
        KEPT.write_text("".join(json.dumps(row) + "\n" for row in kept))
    TABLE.write_text(written(read(KEPT)))
    print(TABLE.read_text())
