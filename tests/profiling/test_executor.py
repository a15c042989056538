"""Comparisons through executors: the same rows as without one, in the order of the plan, whatever the executor does."""

import concurrent.futures
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from bilevel_profiling import compare
from bilevel_profiling.cli import main
from bilevel_profiling.comparison import parcel
from bilevel_profiling.comparison.progress import Progress
from bilevel_profiling.comparison.resume import ResumeError
from bilevel_profiling.measurement.errand import Answer
from bilevel_profiling.records.failure import never_begun
from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.record import Record
from bilevel_profiling.records.records_file import read

import bilevel as bl
from bilevel.problems import quadratic

CASE = """
import os, signal
import torch
import bilevel as bl
import beside_of_{stem}

def setup(device):
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    return bl.Problem(beside_of_{stem}.inner, lambda y, x, b: (y ** 2).sum()), x, y, bl.Batches(None, None)

def fatal(problem, outer, inner, batches, solver):
    \"\"\"Kills the worker: its server is our parent.\"\"\"
    worker = int(open(f"/proc/{{os.getppid()}}/stat").read().rpartition(")")[2].split()[1])
    assert worker not in (1, {pid})
    os.kill(worker, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def zeros(problem, outer, inner, batches, solver):
    return torch.zeros_like(outer)

OPTIMIZER = bl.SGD(lr=0.25)
INNER_STEPS = [2]
ESTIMATORS = {{"unrolled": bl.Unrolled(), "blind": bl.FirstOrder()}}
OUTER_STEPS = {loop}
{more}
"""
BESIDE = "def inner(y, x, b): return ((y - x) ** 2).sum()\n"


@pytest.fixture
def case(tmp_path):
    """A case file with a module beside it, with names of their own: modules are kept by name."""

    def made(stem, loop=0, more=""):
        (tmp_path / f"beside_of_{stem}.py").write_text(BESIDE)
        path = tmp_path / f"{stem}.py"
        path.write_text(CASE.format(stem=stem, loop=loop, more=more, pid=os.getpid()))
        return str(path)

    return made


def done(function, *arguments):
    future = concurrent.futures.Future()
    future.set_result(function(*arguments))
    return future


def failed(error):
    future = concurrent.futures.Future()
    future.set_exception(error)
    return future


def cancelled():
    future = concurrent.futures.Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


def made_up(found, place=None, begun=0.0, ended=0.0, **more):
    """The answer of a parcel, without having run anything."""
    job, value = pickle.loads(found.errand.job), "made up"
    if found.errand.what == "cost":
        settings = repr(job.overrides["estimators"][job.label])
        value = Record(case="quadratic", estimator=job.row, inner_steps=2, settings=settings, status="OK", **more)
    return done(pickle.dumps, parcel.Returned(Answer(value, place=place or {}), begun=begun, ended=ended))


class Executor(concurrent.futures.Executor):
    """Does what `how` says with each piece: called with the parcel, which it may look into, and a way to do it."""

    def __init__(self, how=lambda parcel, do: done(do)):
        self.how, self.seen = how, []

    def submit(self, fn, /, versions, payload):
        found = pickle.loads(payload)
        self.seen.append(found.errand.what)
        return self.how(found, lambda: fn(versions, payload))


class Backwards(Executor):
    """The last that came first, from another thread, once nothing more comes; calls back twice."""

    def __init__(self):
        super().__init__(self.keep)
        self.waiting, self.lock = [], threading.Lock()

    def keep(self, _, do):
        future = concurrent.futures.Future()
        with self.lock:
            self.waiting.append((future, do))
        threading.Timer(0.2, self.work).start()
        return future

    def work(self):
        with self.lock:
            future, do = self.waiting.pop()
        future.set_result(do())
        future._invoke_callbacks()


class Told(Progress):
    def __init__(self):
        self.planned, self.finished, self.said = [], [], []

    def start(self, tasks):
        self.planned = list(tasks)

    def finish(self, task, said):
        self.finished.append(task)

    def say(self, text):
        self.said.append(text)


def figures(records):
    names = ("estimator", "inner_steps", "status", "reason", "peak_tensor_bytes", "base_tensor_bytes", "calls")
    more = ("matmul_flops", "program_relative_error", "program_cosine", "reference_note", "metrics", "settings")
    return [[getattr(r, name) for name in (*names, *more)] + [i.outer_loss for i in r.iterations] for r in records]


def test_any_order_gives_the_rows_of_a_comparison_without_executor(case, tmp_path):
    path, told, workers = case("order", loop=2), Told(), Backwards()
    known = {"inner_steps": [1, 2], "repeats": 1}
    alone = compare(path, out=tmp_path / "alone", **known)
    found = compare(path, out=tmp_path / "r", executor=workers, progress=told, **known)
    assert figures(found) == figures(alone)
    assert [r.status for r in found] == ["OK", "ERROR"] * 2  # FirstOrder cannot see x
    assert read(tmp_path / "r" / "records.jsonl") == found
    assert sorted(told.finished, key=repr) == sorted(told.planned, key=repr)
    assert [task.text for task in told.finished] != [task.text for task in told.planned]
    assert all(r.environment["worker"].endswith(f"process {os.getpid()}") for r in found)
    assert all("worker" not in r.environment for r in alone)
    assert "process" in (tmp_path / "r" / "index.html").read_text()
    # continued: nothing is left; then one more K, whose rows come to their place in the plan
    workers = Executor()
    assert compare(path, out=tmp_path / "r", executor=workers, resume=True, **known) == found
    assert workers.seen == []
    more = compare(
        path,
        {"unrolled": bl.Unrolled(), "mine": bl.FirstOrder()},
        out=tmp_path / "r",
        executor=workers,
        resume=True,
        inner_steps=[1, 2],
        repeats=1,
        outer_steps=0,
    )
    assert [(r.estimator, r.inner_steps) for r in more if r.estimator in ("unrolled", "mine")] == [
        ("unrolled", 1), ("mine", 1), ("unrolled", 2), ("mine", 2),
    ]  # fmt: skip
    assert workers.seen == ["reference", "reference", "cost", "cost"]
    with pytest.raises(ResumeError, match="number of repeats 1, and this is 2"):
        compare(path, out=tmp_path / "r", executor=workers, resume=True, inner_steps=[1, 2], repeats=2)


FATES = {
    "raises at submit": (RuntimeError("cannot schedule new futures after shutdown"), "ERROR", "Not run", False),
    "breaks": (BrokenProcessPool("a child died"), "ERROR", "Not run", False),
    "breaks after it began": (concurrent.futures.BrokenExecutor("oh"), "CRASHED", "Its worker, process 7, was", True),
    "cancelled": (None, "ERROR", "Not run, because the executor failed: CancelledError", False),
    "interrupted": (KeyboardInterrupt(), "ERROR", "Not run, because the executor failed: KeyboardInterrupt", False),
    "cannot unpickle": (ModuleNotFoundError("No module named 'oh'"), "ERROR", "did not run it: ModuleNotFou", True),
    "no memory": (MemoryError("oh"), "OUT_OF_MEMORY", "The worker did not run it: MemoryError: oh", True),
    "no future": (None, "ERROR", "AttributeError: 'NoneType'", False),
    "not bytes": (None, "ERROR", "did not run it", True),
    "other bytes": (None, "ERROR", "the executor gave back a int", True),
    "another row": (None, "ERROR", "The answer is that of another row", True),
    "other versions": (None, "ERROR", "Not run: torch is", False),
    "well": (None, "OK", "", True),
}


def test_whatever_an_executor_does_is_a_row_with_its_reason(tmp_path):
    """And --resume measures what was not begun, and nothing else."""
    reply = {
        "cancelled": lambda: cancelled(),
        "no future": lambda: None,
        "not bytes": lambda: done(lambda: "oh"),
        "other bytes": lambda: done(pickle.dumps, 3),
        "another row": lambda: done(
            pickle.dumps, parcel.Returned(Answer(Record(case="quadratic", estimator="well", inner_steps=2)))
        ),
        "other versions": lambda: done(parcel.carry_out, {"torch": "1.0"}, b""),
    }

    def how(found, do):
        if found.errand.what != "cost" or (label := pickle.loads(found.errand.job).row) == "well":
            return made_up(found)
        if label == "breaks after it began":
            found.started[1].write_text("process 7")
        if label == "raises at submit":
            raise FATES[label][0]
        return reply[label]() if label in reply else failed(FATES[label][0])

    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path}
    asked, told = dict.fromkeys(FATES, bl.Unrolled()), Told()
    found = compare(quadratic.setup, asked, executor=Executor(how), progress=told, **known)
    assert [r.estimator for r in found] == list(FATES)
    for row in found:
        _, status, reason, begun = FATES[row.estimator]
        assert (row.status, reason in row.reason, not never_begun(row)) == (status, True, begun), row.reason
    assert len(told.said) == 1
    assert "--resume" in told.said[0]
    later = [label for label, fate in FATES.items() if not fate[3]]
    workers = Executor(lambda found, do: made_up(found))
    again = compare(quadratic.setup, asked, executor=workers, resume=True, **known)
    assert workers.seen == ["reference", *["cost"] * len(later)]
    assert [r.status for r in again if r.estimator in later] == ["OK"] * len(later)
    assert [r for r in again if r.estimator not in later] == [r for r in found if r.estimator not in later]
    assert [r.estimator for r in again] == list(FATES)


def test_what_needs_a_reference_or_a_row_that_was_not_begun_waits_for_it(case, tmp_path):
    """A row without its error would count as finished; so would a row whose outer loop was lost without a word."""
    path = case("needy", loop=2)

    def without(what):
        return Executor(lambda found, do: cancelled() if found.errand.what == what else done(do))

    known = {"out": tmp_path / "r", "repeats": 1, "estimators": {"unrolled": bl.Unrolled()}}
    (row,) = compare(path, executor=without("reference"), **known)
    assert row.reason.startswith("Not run, because its float64 reference was not made: Not run")
    assert never_begun(row)
    (row,) = compare(path, executor=without("loop"), resume=True, **known)
    assert (row.status, row.iterations) == ("OK", ())
    assert row.program_relative_error < 1e-6
    assert "--resume runs it" in next(note.text for note in row.notes if note.kind is NoteKind.OUTER_LOOP)
    (row,) = compare(path, executor=Executor(), resume=True, **known)
    assert [i.status for i in row.iterations] == ["OK", "OK"]
    assert NoteKind.OUTER_LOOP not in {note.kind for note in row.notes}


def test_an_executor_that_never_answers_is_given_up(tmp_path):
    held = []

    def how(found, do):
        if found.errand.what == "reference":
            return made_up(found)
        held.append(concurrent.futures.Future())
        if len(held) == 1:
            found.started[1].write_text("process 7")
        return held[-1]

    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 2, "out": tmp_path}
    asked = {"a": bl.Unrolled(), "b": bl.Unrolled("iterates")}
    begun = time.monotonic()
    found = compare(quadratic.setup, asked, executor=Executor(how), time_limit=0.1, wait_limit=0.05, **known)
    assert 0.2 < time.monotonic() - begun < 60
    assert [(r.status, never_begun(r)) for r in found] == [("TIMEOUT", False), ("TIMEOUT", True)]
    assert "gave no answer for 0.25 s" in found[0].reason
    assert all(future.cancelled() for future in held)


def test_ctrl_c_cancels_what_has_not_begun_and_leaves_a_file_to_continue(tmp_path):
    held = []

    class Interrupting(Told):
        def finish(self, task, said):
            super().finish(task, said)
            if len(self.finished) == 2:
                raise KeyboardInterrupt

    def how(found, do):
        if found.errand.what == "reference" or pickle.loads(found.errand.job).row == "a":
            return made_up(found)
        held.append(concurrent.futures.Future())
        return held[-1]

    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path}
    asked = {"a": bl.Unrolled(), "b": bl.Unrolled("iterates")}
    with pytest.raises(KeyboardInterrupt):
        compare(quadratic.setup, asked, executor=Executor(how), progress=Interrupting(), **known)
    assert [future.cancelled() for future in held] == [True]
    (kept,) = read(tmp_path / "records.jsonl")
    found = compare(quadratic.setup, asked, resume=True, **known)  # here, without an executor
    assert found[0] == kept
    assert [r.status for r in found] == ["OK", "OK"]


def test_a_case_goes_by_its_text_where_its_files_are_not(case, tmp_path):
    """On a machine that has neither the case file, nor the module beside it, nor the references."""
    (tmp_path / "home").mkdir()
    path, away = case("text"), tmp_path / "away"

    def elsewhere(found, do):
        for name in ("text.py", "beside_of_text.py", "r/references"):
            if (tmp_path / name).exists():
                away.mkdir(exist_ok=True)
                (tmp_path / name).rename(away / name.replace("/", "-"))
        try:
            return done(do)
        finally:
            for name in ("text.py", "beside_of_text.py", "r/references"):
                if (away / name.replace("/", "-")).exists():
                    (away / name.replace("/", "-")).rename(tmp_path / name)

    known = {"repeats": 1, "estimators": {"unrolled": bl.Unrolled()}}
    (row,) = compare(path, out=tmp_path / "r", executor=Executor(elsewhere), trace=True, **known)
    assert (row.status, row.case) == ("OK", "text"), row.reason
    assert [trace.name for trace in (tmp_path / "r" / "traces").iterdir()] == ["text-unrolled-2.json.gz"]
    assert row.program_relative_error < 1e-6


def test_a_module_that_is_another_on_the_worker_is_refused(tmp_path, monkeypatch):
    module = tmp_path / "module_of_functions.py"
    text = "from bilevel.problems import quadratic\ndef setup(device): return quadratic.setup(device)\n"
    module.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("module_of_functions")

    def stale(found, do):
        module.write_text(text + "A = 1\n")
        return done(do)

    def gone(found, do):
        module.unlink(missing_ok=True)
        return done(do)

    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path / "r"}
    for how, said in ((stale, "with another text"), (gone, "Install the module that defines it")):
        module.write_text(text)
        (row,) = compare(mine.setup, {"unrolled": bl.Unrolled()}, executor=Executor(how), **known)
        assert (row.status, said in row.reason) == ("ERROR", True), row.reason


def test_rows_say_whether_they_shared_a_machine_and_which(tmp_path):
    """Two at once on one machine, one later, one elsewhere with another processor."""
    when = {"a": ("one", 0, 10), "b": ("one", 5, 15), "c": ("one", 20, 30), "d": ("two", 0, 30)}

    def how(found, do):
        if found.errand.what == "reference":
            return made_up(found, {"host": "one"}, begun=12, ended=13)
        host, begun, ended = when[pickle.loads(found.errand.job).row]
        processor = {"cpu": "abacus" if host == "one" else "slide rule"}
        place = {"host": host, "worker": "1"}
        return made_up(found, place, begun=begun, ended=ended, wall_seconds=1.0, environment=processor)

    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "outer_steps": 0, "out": tmp_path}
    found = compare(quadratic.setup, dict.fromkeys("abcd", bl.Unrolled()), executor=Executor(how), **known)
    assert [NoteKind.BESIDE in {note.kind for note in r.notes} for r in found] == [True, True, False, False]
    assert [sum("Measured on" in str(note) for note in r.notes) for r in found] == [0, 0, 0, 1]
    assert [r.environment["host"] for r in found] == ["one", "one", "one", "two"]
    assert read(tmp_path / "records.jsonl") == found


FATAL = 'BASELINES = {"fatal": fatal, "behind": zeros}; del ESTIMATORS["blind"]'


def test_a_pool_that_breaks_blames_only_what_had_begun(case, tmp_path):
    """One worker, killed by the second of three rows; the one behind it is measured when the comparison goes on."""
    known = {"out": tmp_path / "r", "repeats": 1}
    path = case("breaks", more=FATAL)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        first, fatal, behind = compare(path, executor=workers, **known)
    assert (first.estimator, first.status) == ("unrolled", "OK")
    assert first.environment["worker"].startswith("SpawnProcess-")
    assert fatal.status == "CRASHED"
    assert "was lost: BrokenProcessPool" in fatal.reason
    assert behind.reason.startswith("Not run, because the executor failed: BrokenProcessPool")
    again = compare(path, resume=True, **known)
    assert again[:2] == [first, fatal]
    assert (again[2].estimator, again[2].status) == ("behind", "OK")


def test_dask(case, tmp_path):
    """A local cluster: a worker that dies is a row."""
    distributed = pytest.importorskip("distributed")
    import dask

    path, known = case("dask", more=FATAL.replace(', "behind": zeros', "")), {"out": tmp_path / "r", "repeats": 1}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        with pytest.raises(TypeError, match=r"write executor=client.get_executor\(\)"):
            compare(path, executor=client, **known)
        first, fatal = compare(path, executor=client.get_executor(), **known)
    assert (first.estimator, first.status) == ("unrolled", "OK")
    assert "Dask" in first.environment["worker"]
    assert fatal.status == "CRASHED"
    assert "Its workers died: KilledWorker" in fatal.reason


def test_loky(tmp_path):
    loky = pytest.importorskip("loky")
    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path}
    with loky.ProcessPoolExecutor(1) as workers:
        (row,) = compare(quadratic.setup, {"unrolled": bl.Unrolled()}, executor=workers, **known)
    assert (row.status, row.environment["worker"][:11]) == ("OK", "LokyProcess"), row.reason


def test_what_is_no_executor_and_what_cannot_be_sent_are_refused_at_once(tmp_path, monkeypatch):
    class Mapping(concurrent.futures.Executor):
        def map(self, function, *iterables, **_):
            return map(function, *iterables)

    known = {"out": tmp_path / "r", "estimators": {"unrolled": bl.Unrolled()}}
    for executor, message in (
        (concurrent.futures.ProcessPoolExecutor, r"write executor=ProcessPoolExecutor\(\)"),
        (4, r"was given int as executor; a concurrent.futures.Executor was needed, such as"),
        (Mapping(), "Mapping has no submit"),
    ):
        with pytest.raises(TypeError, match=message):
            compare(quadratic.setup, executor=executor, **known)

    def setup(device):
        return quadratic.setup(device)

    setup.__module__, setup.__qualname__ = "__main__", "setup"
    monkeypatch.setattr(sys.modules["__main__"], "setup", setup, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)  # (a worker of xdist has none)
    with pytest.raises(TypeError, match="setup needs setup of the main script, which the workers of an executor"):
        compare(setup, executor=Executor(), **known)
    with pytest.raises(ValueError, match="wait_limit is 0"):
        compare(quadratic.setup, executor=Executor(), wait_limit=0, **known)
    assert not (tmp_path / "r").exists()


def test_the_command_takes_what_makes_an_executor(case, tmp_path, capsys):
    path, out = case("command"), tmp_path / "r"
    text = "from concurrent.futures import ThreadPoolExecutor\ndef start(): return ThreadPoolExecutor(1)\n"
    (tmp_path / "my_threads.py").write_text(text + "def broken(): raise OSError('no cluster')\ndef four(): return 4\n")
    begin = ["compare", path, "--estimators", "unrolled", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    for name, said in (
        ("threads", "a module and a function were needed, such as concurrent.futures:ProcessPoolExecutor"),
        ("no_such_module:start", "no_such_module cannot be imported"),
        (f"{tmp_path}/my_threads.py:stop", "has no function stop"),
        (f"{tmp_path}/my_threads.py:broken", "failed: OSError: no cluster"),
        (f"{tmp_path}/my_threads.py:four", "was given int as executor"),
    ):
        assert main([*begin, "--executor", name]) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()
    assert main([*begin, "--executor", f"{tmp_path}/my_threads.py:start"]) == 0
    (row,) = read(out / "records.jsonl")
    assert (row.status, "worker" in row.environment) == ("OK", True)


def test_a_sweep_over_problems_and_seeds(case, tmp_path):
    """Each with each seed is a case of its own; more seeds may come later."""
    path = case("swept", more="def setup(device, seed=None):\n    torch.manual_seed(seed)\n" + SEEDED)
    known = {"inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path / "r"}
    asked = {"unrolled": bl.Unrolled()}
    found = compare([quadratic.setup, path], asked, executor=Executor(), seeds=[1], **known)
    names = [f"{name}, seed {seed}" for name in ("quadratic", "swept") for seed in (1,)]
    assert [(r.case, r.seed, r.status) for r in found] == [(name, int(name[-1]), "OK") for name in names]
    assert all(r.program_relative_error < 1e-5 for r in found)
    workers = Executor()
    again = compare([quadratic.setup, path], asked, executor=workers, seeds=range(2), resume=True, **known)
    assert workers.seen == ["reference", "reference", "cost", "cost"] or workers.seen == ["reference", "cost"] * 2
    assert [r.case for r in again] == sorted([*names, "quadratic, seed 0", "swept, seed 0"])
    assert [r for r in again if r.seed == 1] == found
    for seeds in ([], 3, "01"):
        with pytest.raises(TypeError, match="as seeds; a list of integers was needed"):
            compare(path, asked, seeds=seeds, **known)
    with pytest.raises(ValueError, match="a seed is 'a'"):
        compare(path, asked, seeds=["a"], **known)


SEEDED = """
    x, y = torch.randn(3, device=device), torch.zeros(3, device=device)
    return bl.Problem(beside_of_swept.inner, lambda y, x, b: (y ** 2).sum()), x, y, bl.Batches(None, None)
"""
