"""kill -9 in the middle of a comparison, at random moments: no finished row is lost, and --resume completes.

Three times in a test run, one comparison. Twenty times, most of them followed by --resume to the end, with a line for
each: `BILEVEL_KILLS=20 pytest -s tests/profiling/test_kill.py`.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from bilevel_profiling.records.record import Record
from bilevel_profiling.records.records_file import read, scan

KILLS = int(os.environ.get("BILEVEL_KILLS", "3"))
LABELS, STEPS = ("unrolled", "iterates", "corrected"), (1, 2, 3)
CASE = """
import torch
import bilevel as bl

def setup(device):
    x, y = torch.ones(30, device=device), torch.full((30,), 0.5, device=device)
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y ** 2).sum())
    return problem, x, y, bl.Batches(None, None)

OPTIMIZER = bl.SGD(lr=0.25)
INNER_STEPS = [1, 2, 3]
ESTIMATORS = {"unrolled": bl.Unrolled(), "iterates": bl.Unrolled(keep="iterates")}
ESTIMATORS["corrected"] = bl.FirstOrderCorrected()
OUTER_STEPS = 2
"""


def start(case: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "bilevel_profiling.cli",
        "compare",
        str(case),
        "--out",
        str(out),
        "--resume",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def alive(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stream:
                state, _, its = stream.read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == group and state not in "ZX":
            found.append(int(name))
    return found


def until(deadline: float, true) -> bool:
    while not (done := true()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return done


def whole(path: Path) -> dict[tuple, bytes]:
    """The finished rows of a file, as they are written."""
    return (
        {(row.record.estimator, row.record.inner_steps): row.text for row in scan(path).rows} if path.exists() else {}
    )


def unlooped(text: bytes) -> Record:
    return dataclasses.replace(Record.from_json(text.decode()), iterations=(), metrics={}, metrics_before={})


def check_kept(before: dict[tuple, bytes], after: dict[tuple, bytes]) -> None:
    """Each row that was seen is there byte for byte, or with its outer loop, which joined it."""
    for key, text in before.items():
        assert key in after, f"the row {key} was lost"
        if after[key] != text:
            assert not Record.from_json(text.decode()).iterations
            assert Record.from_json(after[key].decode()).iterations
            assert unlooped(after[key]) == unlooped(text)


def check_complete(out: Path) -> None:
    found = read(out / "records.jsonl")
    assert [(r.estimator, r.inner_steps, r.status) for r in found if r.status != "OK"] == []
    assert sorted((r.estimator, r.inner_steps) for r in found) == sorted((label, k) for label in LABELS for k in STEPS)
    assert [len(r.iterations) for r in found] == [2 if r.inner_steps == STEPS[-1] else 0 for r in found]
    assert "corrected" in (out / "index.html").read_text()
    assert sorted(path.name for path in out.rglob("*.tmp")) == []


@dataclasses.dataclass
class Attempt:
    """A comparison that was killed, or that was faster."""

    seen: dict[tuple, bytes]
    """The rows in the file just before the end."""
    ended: bool
    seconds: float
    errors: str
    who: str


def attempt(case: Path, out: Path, number: int, rng: random.Random) -> Attempt:
    """Begin or continue a comparison, and kill it: at any time, or when the file has just been written, the moment that
    matters most."""
    running, begun, records = start(case, out), time.monotonic(), out / "records.jsonl"

    def ended() -> bool:
        return running.poll() is not None

    def size() -> int:
        return records.stat().st_size if records.exists() else 0

    if number % 2:
        for _ in range(rng.randint(1, 5)):
            before = size()
            until(begun + 60, lambda before=before: ended() or size() != before)
        time.sleep(rng.uniform(0, 0.02))
    else:
        until(begun + rng.uniform(0, 8), ended)
    seen, done, alone = whole(records), ended(), number % 3 == 2
    if not done:
        (os.kill if alone else os.killpg)(running.pid, signal.SIGKILL)  # alone: its processes notice that it is gone
    seconds = time.monotonic() - begun
    errors = running.communicate(timeout=60)[1]
    assert until(time.monotonic() + 20, lambda: not alive(running.pid)), (
        f"processes outlive the comparison: {alive(running.pid)}"
    )
    assert not done or running.returncode == 0, errors
    return Attempt(seen, done, seconds, errors, "the command" if alone else "the group")


def test_kill_9_at_random_moments_loses_no_finished_row(tmp_path):
    case = tmp_path / "small.py"
    case.write_text(CASE)
    rng, kills, completed, halves, drafts, seen = random.Random(20), 0, 0, 0, 0, {}
    while kills < KILLS:
        out = tmp_path / f"report-{completed}"
        tried = attempt(case, out, kills, rng)
        kept = whole(out / "records.jsonl")
        check_kept({**seen, **tried.seen}, kept)
        if tried.ended:
            check_complete(out)
            completed, seen = completed + 1, {}
            continue
        kills, seen = kills + 1, kept
        damage = scan(out / "records.jsonl").damage if kept else ()
        assert all(each.torn for each in damage)
        halves, drafts = halves + len(damage), drafts + len(list(out.rglob("*.tmp")))
        said = f"{tried.seconds:5.2f} s after the start, {tried.who:<11}: {len(tried.seen)} rows seen, "
        said += f"{len(kept)} in the file"
        finishing = kills == KILLS or (
            KILLS > 3 and kills % 4 > 0
        )  # else the next kill falls into the comparison that is continued
        print(
            f"kill {kills:2d}  {said}{', half a line' if damage else ''}{'; resumed, completed' if finishing else ''}"
        )
        if finishing:
            errors = start(case, out).communicate(timeout=300)[1]
            check_kept(seen, whole(out / "records.jsonl"))
            assert f"continuing with {len(seen)} finished row" in errors or not seen
            check_complete(out)
            completed, seen = completed + 1, {}
    print(
        f"{kills} kills, {completed} comparisons completed, {halves} half lines and {drafts} drafts left by kills, no "
        f"row lost"
    )
