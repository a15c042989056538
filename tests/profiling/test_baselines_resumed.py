"""What a baseline is made of, told from what it was: its code, what it holds, and what its row says of it."""

import functools
import importlib
import json
import linecache
import subprocess
import sys
import threading

import pytest
import torch
from bilevel_profiling import Baseline, compare
from bilevel_profiling.baselines import torchopt
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.cli import main
from bilevel_profiling.comparison import content
from bilevel_profiling.comparison.code import UNTOLD, marks_of_baselines
from bilevel_profiling.comparison.plan import Plan, Settled, settle
from bilevel_profiling.records.record import Target
from bilevel_profiling.records.records_file import read

import bilevel as bl
from bilevel.problems import quadratic

CASE = """
import functools
import torch
import bilevel as bl
from bilevel_profiling import Baseline
from bilevel.problems.quadratic import setup as setup

OPTIMIZER = bl.SGD(lr=1.0)
INNER_STEPS = [2]
ESTIMATORS = {"unrolled": bl.Unrolled()}

def own(problem, outer, inner, batches, solver, factor=1.0):
    return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled()).grad * factor

class Scaled:
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, *given):
        return own(*given) * self.factor

BASELINES = {"it": IT}
"""
QUICK = ["--repeats", "1", "--device", "cpu"]
MADE = {
    "a lambda": "lambda *given: own(*given) * 1.0",
    "an object": "Scaled(1.0)",
    "a bound method": "Scaled(1.0).__call__",
    "a partial of an object": "functools.partial(Scaled(1.0))",
    "a partial": "functools.partial(own, factor=1.0)",
    "a long tensor": "functools.partial(lambda w, *given: own(*given) * w.sum(), torch.full((2000,), 1.0) / 2000)",
    "notes": "Baseline(own, notes=('1.0',))",
    "a target": "Baseline(own, target='program' if 1.0 == 1 else None)",
}


def marks(case, text):
    case.write_text(text)
    linecache.clearcache()
    return marks_of_baselines(settle([Plan(str(case))])[0])


@pytest.mark.parametrize("made", MADE)
def test_another_baseline_under_its_label_has_another_mark(made, tmp_path):
    text = CASE.replace("IT", MADE[made])
    first = marks(tmp_path / "made.py", text)
    assert len(first["it"]) == 16
    assert marks(tmp_path / "made.py", text) == first
    more = text.replace('{"it": ', '{"more": own, "it": ')
    assert marks(tmp_path / "made.py", more)["it"] == first["it"]
    assert marks(tmp_path / "made.py", text.replace("1.0", "2.0").replace("SGD(lr=2.0)", "SGD(lr=1.0)")) != first


def test_an_edited_lambda_is_refused_and_an_added_baseline_is_measured(tmp_path, capsys):
    case, out = tmp_path / "edited.py", tmp_path / "report"
    case.write_text(CASE.replace("IT", MADE["a lambda"]))
    command = ["compare", str(case), "--out", str(out), *QUICK]
    assert main(command) == 0
    before = (out / "records.jsonl").read_bytes()
    case.write_text(CASE.replace("IT", MADE["a lambda"].replace("1.0", "3.0")))
    assert main([*command, "--resume"]) == 2
    assert "measured with other code, arguments or notes of it than it has now" in capsys.readouterr().err
    # left out, its row stays and so does its mark; beside it, others are measured
    assert main([*command, "--resume", "--estimators", "unrolled"]) == 0
    assert main([*command, "--resume"]) == 2
    case.write_text(CASE.replace("IT", MADE["a lambda"] + ', "new": own'))
    assert main([*command, "--resume"]) == 0
    assert (out / "records.jsonl").read_bytes().startswith(before)
    assert [row.estimator for row in read(out / "records.jsonl")] == ["unrolled", "it", "new"]
    # what was read back is as good as what was measured
    assert [type(row.target) for row in read(out / "records.jsonl")][:1] == [Target]


def test_what_has_no_content_is_refused_in_a_sentence(tmp_path, capsys):
    case, out = tmp_path / "locked.py", tmp_path / "report"
    case.write_text(
        CASE.replace("IT", "functools.partial(lambda lock, *given: own(*given), __import__('_thread').RLock())")
    )
    command = ["compare", str(case), "--out", str(out), *QUICK]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 2
    assert "whether it is what it was cannot be told: a RLock" in capsys.readouterr().err


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A baseline's module and one that it imports, written anew and imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def made(deep="FACTOR = 1.0\n", top=""):
        (tmp_path / "deep_of_it.py").write_text(deep)
        text = "import deep_of_it\nSCALES = {'a': [1.0]}\n"
        text += "class Callable:\n    def __init__(self, n):\n        self.n = n\n"
        text += "    def __call__(self, *given):\n        return scaled(self.n)\n"
        text += "    def __repr__(self):\n        return ''\n"
        text += "def scaled(n):\n    return n * SCALES['a'][0] * deep_of_it.FACTOR\ndef unrelated():\n    return 1\n"
        (tmp_path / "top_of_it.py").write_text(top or text)
        importlib.invalidate_caches()
        linecache.clearcache()
        for name in ("deep_of_it", "top_of_it"):
            sys.modules.pop(name, None)
        return importlib.import_module("top_of_it"), text

    return made


def test_the_local_module_of_an_object_is_followed(modules):
    def mark(*texts, n=1.0):
        return content.mark(modules(*texts)[0].Callable(n))

    text = modules()[1]
    first = mark()
    assert mark() == first
    assert mark(n=2.0) != first
    assert mark("# a comment\nFACTOR = 1.0\n") == first
    assert mark("FACTOR = 2.0\n") != first
    assert mark("FACTOR = 1.0\n", text.replace("return 1", "return 2")) == first
    for old, new in (("[1.0]", "[2.0]"), ("return n *", "return 2 * n *"), ("scaled(self.n)", "scaled(-self.n)")):
        assert mark("FACTOR = 1.0\n", text.replace(old, new)) != first, old


LOCAL = """
import functools
FIRST, SECOND = [1.0], [2.0]
TABLE = {}
TABLE["a"] = 3.0
TABLE.update(b=4.0)
class Rate:
    def __init__(self, value):
        self.value = value
RATE = Rate(5.0)
@functools.cache
def cached():
    return 6.0
def scaled(n):
    return SECOND[0] * TABLE["a"] * RATE.value * cached() * n
@functools.cache
def whole(n):
    return 7.0 * scaled(n)
class Callable:
    factor = 8.0
    @staticmethod
    def times(n):
        return 9.0 * n
    @property
    def turned(self):
        return whole(self.factor)
    def __call__(self, *given):
        return self.times(self.turned)
if __name__ == "__main__":
    print(TABLE, 10.0)
"""


def test_what_a_module_makes_at_its_top_is_followed(modules):
    def mark(text):
        made = modules("", text)[0]
        return content.mark(made.Callable()), content.mark(made.whole)

    first = mark(LOCAL)
    assert mark(LOCAL) == first
    assert mark(LOCAL.replace("10.0", "11.0")) == first
    for number in ("2.0", "3.0", "4.0", "5.0", "6.0", "7.0"):
        assert not set(mark(LOCAL.replace(number, "0.5"))) & set(first), number
    assert mark(LOCAL.replace("self.value = value", "self.value = -value"))[1] != first[1]
    for number in ("8.0", "9.0"):
        assert mark(LOCAL.replace(number, "0.5"))[0] != first[0], number


def around(value):
    def function(*given):
        return value

    return function


def recursive():
    def function(*given):
        return function

    return function


def test_values_are_told_by_what_they_hold():
    ones, long = torch.ones(3), torch.arange(5000.0)
    changed = long.clone()
    changed[2500] += 1
    pairs = [
        (ones, ones * 2),
        (ones, ones.double()),
        (long, changed),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (around(1), around(2)),
        (around(ones), around(ones + 1)),
        (torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)),
        (bl.SGD(lr=0.1), bl.SGD(lr=0.2)),
        ({"a": 1}, {"a": 1.0}),
        ({1, 2}, {1, 3}),
        (Target.PROGRAM, Target.SOLUTION),
        (functools.partial(around, 1), functools.partial(around, value=1)),
        (around(lambda: 1), around(lambda: 2)),
    ]
    for one, other in pairs:
        assert content.mark(one) == content.mark(one)
        assert content.mark(one) != content.mark(other), one
    assert content.mark(recursive()) == content.mark(recursive())
    circle = []
    circle.append(circle)
    assert content.mark(circle)
    with pytest.raises(content.UntoldError, match="a lock"):
        content.mark({"held": threading.Lock()})


def test_marks_are_the_same_in_another_process(tmp_path):
    """Sets of text are ordered otherwise in each."""
    case = tmp_path / "sets.py"
    case.write_text(
        CASE.replace(
            "IT", "functools.partial(lambda w, *given: own(*given) if 'b' in {'a', 'b'} else 0, {'x', 'y', 'z'})"
        )
    )
    program = (
        "import sys; from bilevel_profiling.comparison.plan import Plan, settle; "
        "from bilevel_profiling.comparison.code import marks_of_baselines; "
        "print(marks_of_baselines(settle([Plan(sys.argv[1])])[0]))"
    )
    found = {subprocess.check_output([sys.executable, "-c", program, str(case)]) for _ in range(2)}
    assert len(found) == 1
    assert UNTOLD.encode() not in found.pop()


def test_the_code_of_this_package_is_its_version():
    case = Definition("q", quadratic.setup, baselines={"two": Baseline(torchopt.unrolled, notes=("a",))})
    here = Settled(Plan("quadratic"), case, ("two",))
    assert marks_of_baselines(here) == {"two": content.mark(torchopt.unrolled, ("a",), None, frozenset(bl.Path))}
    assert marks_of_baselines(Settled(Plan("quadratic"), case, ())) == {}


SCRIPT = """
import sys
import bilevel as bl
from bilevel.problems import quadratic
from bilevel_profiling import compare

def mine(problem, outer, inner, batches, solver):
    return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())

if __name__ == "__main__":
    for resume in (False, True):
        found = compare(quadratic.setup, {"u": bl.Unrolled()}, optimizer=bl.SGD(lr=1.0), inner_steps=[2], repeats=1,
                        baselines={"m": mine}, out=sys.argv[1], resume=resume)
        print([row.status for row in found], found[1].settings)
"""


def test_a_function_of_the_script_itself_can_be_gone_on_with(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = subprocess.run([sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True)
    assert found.stdout.splitlines() == ["['OK', 'OK'] Baseline(__main__.mine)"] * 2, found.stderr


class Held:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, problem, outer, inner, batches, solver):
        found = bl.hypergradient(problem, outer.detach(), inner, batches, solver=solver, estimator=bl.Unrolled())
        return found.grad * self.factor

    def __repr__(self):
        return "the same"


def test_an_object_given_to_compare_is_told_by_what_it_holds(tmp_path):
    given = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "out": tmp_path}
    compare(quadratic.setup, {"u": bl.Unrolled()}, baselines={"m": Held(1.0)}, **given)
    before = json.loads((tmp_path / "records.plan.json").read_text())
    compare(quadratic.setup, {"u": bl.Unrolled()}, baselines={"m": Held(1.0)}, resume=True, **given)
    assert json.loads((tmp_path / "records.plan.json").read_text()) == before
    with pytest.raises(ValueError, match="other code, arguments or notes of m than it has now"):
        compare(quadratic.setup, {"u": bl.Unrolled()}, baselines={"m": Held(2.0)}, resume=True, **given)
