"""Baselines at the edges: what Betty leaves out of its own account, zero gradients, what is wrong with a result or an
argument, weights of tasks, labels, and rows of packages with other settings."""

import importlib.util
import warnings

import pytest
import torch
from bilevel_profiling import Baseline, compare
from bilevel_profiling.baselines import betty, higher, packages, torchopt
from bilevel_profiling.cases.case_file import CaseError, Definition
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.folder import Folder
from bilevel_profiling.comparison.plan import Plan, Settings, Settled
from bilevel_profiling.comparison.tasks import Reference, Site
from bilevel_profiling.records.record import Record, Target

import bilevel as bl
from bilevel.integrations.betty import release
from bilevel.problems import quadratic

SGD = bl.SGD(lr=0.05)


def hand(problem, outer, inner, batches, solver):
    return torch.zeros_like(outer)


needs_betty = pytest.mark.skipif(not release.available(), reason="betty-ml is not installed")


# --- Betty


def ragged():
    """One batch a step, of another size each."""
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 3, generator=draw, dtype=torch.float64) for rows in (4, 2, 5)]

    def g(y, x, batch):
        return (batch @ y - 1).square().mean() + x.exp() * y.square().sum()

    start = torch.randn(3, generator=draw, dtype=torch.float64)
    steps = bl.PerStep(batches, ragged=True)
    problem = bl.Problem(g, lambda y, x, b: (b @ y - 2).square().mean())
    return problem, torch.tensor(0.3, dtype=torch.float64), start, bl.Batches(steps, batches[0])


@needs_betty
@pytest.mark.parametrize("name", ["cg", "neumann", "darts", "sama", "unrolled"])
def test_the_inner_loss_of_betty_is_that_at_the_last_iterate(name):
    if name not in betty.methods():
        pytest.skip(f"the installed release of betty-ml has no {name}")
    problem, x, y, batches = ragged()
    row = betty.baselines()[f"betty {name}"]
    found = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(SGD, 3), estimator=row)
    at_last = problem.inner(found.inner, x, batches.inner_at(2))
    assert float(found.inner_loss) == pytest.approx(float(at_last), rel=1e-13)


def informed(start=None):
    """A loss that takes a gradient inside."""
    points = torch.linspace(0, 1, 7, dtype=torch.float64)

    def u(y, z):
        return 1 + y[0] * z + y[1] * z * z

    def residual(y, x, z):
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(u(y, z).sum(), z, create_graph=True)
        return (slope + x * u(y, z)).square().mean()

    problem = bl.Problem(residual, lambda y, x, z: (u(y, z) - (-2 * z).exp()).square().mean(), init=start)
    inner = torch.zeros(2, dtype=torch.float64) if start is None else None
    return problem, torch.tensor(1.0, dtype=torch.float64), inner, bl.Batches(points, points, curvature=points)


def start_by_a_gradient(x, z):
    at = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad((at**2).sum(), at)
    return slope[:2] * x


@needs_betty
@pytest.mark.parametrize("start", [None, start_by_a_gradient], ids=["given", "of init"])
@pytest.mark.parametrize("name", ["unrolled", "neumann", "darts"])
def test_losses_that_take_gradients_go_through_betty(name, start):
    problem, x, inner, batches = informed(start)
    given = {"solver": bl.Descent(SGD, 3)}
    method = {"unrolled": betty.unrolled(), "neumann": betty.neumann(2), "darts": betty.darts()}[name]
    found = betty.hypergradient_with_betty(problem, x, inner, batches, given["solver"], method)
    ours = bl.hypergradient(problem, x, inner, batches, estimator=bl.Unrolled(), **given)
    assert torch.allclose(found.inner, ours.inner, rtol=1e-12)
    assert torch.allclose(found.inner_loss, ours.inner_loss, rtol=1e-12)
    assert not found.inner_loss.requires_grad
    if name == "unrolled":
        assert torch.allclose(found.grad, ours.grad, rtol=1e-12)


@needs_betty
@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("term", [lambda y: y.sum(), lambda y: 0.0], ids=["linear", "unused"])
@pytest.mark.parametrize("method", [betty.cg(2), betty.neumann(2)], ids=["cg", "neumann"])
def test_an_inner_tensor_without_curvature_gets_a_sentence(method, term, size):
    problem = bl.Problem(lambda y, x, b: ((y["w"] - x) ** 2).sum() + term(y["e"]), lambda y, x, b: (y["w"] ** 2).sum())
    inner = {"w": torch.zeros(2), "e": torch.zeros(size)}
    given = problem, torch.ones(2), inner, bl.Batches(None, None), bl.Descent(SGD, 2)
    with pytest.raises(ValueError, match=f"Betty's {method.name} takes products with the Hessian in every inner"):
        betty.hypergradient_with_betty(*given, method)


# --- what comes back


def posed(outer):
    """f at the start, with the outer variable in it, in the structure that is given."""

    def total(x):
        return sum(leaf.square().sum() for leaf in ([x] if isinstance(x, torch.Tensor) else x.values()))

    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**2).sum() + total(x))
    return problem, outer, torch.ones(2), bl.Batches(None, None)


def returned(given, **fields):
    """A baseline that returns this gradient, at the start; with more of a result where there is more."""

    def made(problem, outer, inner, batches, solver):
        if fields:
            loss = torch.tensor(1.0)
            return bl.Hypergradient(given, inner, loss, loss, **fields)
        return given

    return made


TWO = {"a": torch.ones(2), "b": torch.ones(())}


@pytest.mark.parametrize(
    ("outer", "given", "message"),
    [
        (TWO, {"a": torch.ones(2)}, "returned a dict without 'b' as the hypergradient.*a dict with 'a', 'b'"),
        (TWO, {**TWO, "c": torch.ones(2)}, "returned a dict with 'c' as the hypergradient"),
        (TWO, {"a": torch.ones(2), "c": torch.ones(2)}, "returned a dict without 'b' and with 'c'"),
        (
            TWO,
            {"a": torch.ones(2), "b": None},
            r"returned None for a part of the hypergradient, but x enters as \['b'\] through the outer loss. Was",
        ),
        (torch.ones(2), None, r"returned None, .*does it end in a return\? .*return torch.zeros_like\(outer\)"),
        (torch.ones(2), torch.eye(2)[0].to_sparse(), r"a sparse tensor \(torch.sparse_coo\).*write .to_dense\(\)"),
    ],
)
def test_what_is_wrong_with_a_gradient_is_named(outer, given, message):
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(*posed(outer), solver=bl.Descent(SGD, 1), estimator=Baseline(returned(given)))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (bl.Status.MAX_STEPS, r"whose code is <Status.MAX_STEPS.*write code=bl.Status.MAX_STEPS.code"),
        (777, r"whose code is 777, where the code of a status was needed, 0 to \d+"),
        (torch.tensor(-1), "whose code is tensor"),
        ("OK", "whose code is 'OK'"),
        (torch.tensor(0.5), "whose code is tensor"),
    ],
)
def test_a_code_that_is_none_is_refused(code, message):
    given = posed(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(*given, solver=bl.Descent(SGD, 1), estimator=Baseline(returned(torch.ones(2), code=code)))


def test_stats_of_its_own_are_handed_on_but_for_those_of_every_result():
    stats = {"uncounted": "mine", "without_inner": True, "tasks": 7, "calls": {"hvp": 99}, "residual": 0.5}
    estimator = Baseline(returned(torch.ones(2), stats=stats))
    found = bl.hypergradient(*posed(torch.ones(2)), solver=bl.Descent(SGD, 1), estimator=estimator)
    assert found.stats == {
        "calls": dict.fromkeys(("inner_gradient", "outer_gradient", "hvp", "mixed"), 0),
        "residual": 0.5,
    }


def test_nothing_for_one_bare_tensor_is_zero_in_a_result():
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    given = problem, torch.ones(2), torch.ones(2), bl.Batches(None, None)
    rows = {"mine": Baseline(returned(None, code=0))}
    for name in ("higher", "torchopt"):
        if importlib.util.find_spec(name):
            rows |= packages.named([name])
    for label, row in rows.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = bl.hypergradient(*given, solver=bl.Descent(SGD, 0), estimator=row)
        if "implicit" not in label:
            assert torch.equal(found.grad, torch.zeros(2)), label
        assert found.status is bl.Status.OK
    # where x acts, it is refused
    with pytest.raises(ValueError, match=r"but x enters as \(the tensor itself\) through the inner loss"):
        bl.hypergradient(*given, solver=bl.Descent(SGD, 1), estimator=rows["mine"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"notes": None}, "notes=None; sentences such as"),
        ({"notes": [1]}, "notes="),
        ({"package": None}, "package=None; its name was needed"),
        ({"version": 1.2}, 'version=1.2; text such as "1.2"'),
        ({"sees": ["outer"]}, "sees=.*; paths such as"),
        ({"target": "it"}, "target='it'; 'program', 'solution' or None was needed"),
    ],
)
def test_facts_of_another_kind_are_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Baseline(hand, **given)


def test_one_note_is_a_sentence():
    assert Baseline(hand, notes="It is slow.").said == ("It is slow.",)
    assert Baseline(hand, sees=[bl.Path.START]).sees == frozenset({bl.Path.START})


# --- cases


@pytest.mark.parametrize(
    ("given", "write"),
    [("higher", r"baselines=\['higher'\]"), (hand, 'baselines={"mine": hand}'), (3, "names of libraries")],
)
def test_baselines_that_are_no_names_get_the_line_to_write(given, write, tmp_path):
    with pytest.raises(TypeError, match=write):
        compare(quadratic.setup, baselines=given, out=tmp_path)


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "labelled.py"
    path.write_text(
        "import bilevel as bl\nfrom bilevel.problems.quadratic import setup as setup\n"
        "def own(*given): raise ValueError\nBASELINES = {'mine': own, 'a, b': own}\n"
    )
    return path


def test_a_label_that_is_taken_and_one_with_a_comma_get_a_sentence(case, tmp_path, capsys):
    with pytest.raises(CaseError, match="'mine' is one of its BASELINES, and another of that label was asked for"):
        compare(str(case), baselines={"mine": hand}, out=tmp_path)
    assert main(["compare", str(case), "--estimators", "a, b", "--out", str(tmp_path / "out")]) == 2
    assert "--estimators takes commas apart, so it cannot name 'a, b'" in capsys.readouterr().err


def test_tasks_are_weighted_as_those_that_were_asked_for(tmp_path):
    weights = bl.GivenWeights([1, 2, 3])
    plain, weighted = bl.TaskMean(bl.Unrolled()), bl.TaskMean(bl.Unrolled(), weights=weights)
    case = Definition("tasks", quadratic.setup, {"plain": plain, "weighted": weighted}, baselines={"mine": hand})

    def row(*labels):
        plan = Settled(Plan(quadratic.setup), case, labels)
        cells = {cell.label: cell for cell in plan.cells}
        ours = Reference(plan, cells[labels[0]], Target.PROGRAM), Reference(plan, cells["mine"], Target.PROGRAM)
        return plan.compared["mine"], *ours

    site = Site(Settings(), Folder(tmp_path), None, "")
    for label, expected in (("plain", None), ("weighted", weights)):
        found, ours, theirs = row(label, "mine")
        assert found == bl.TaskMean(Baseline(hand), chunk=1, weights=expected)
        assert ours.path(site) == theirs.path(site)
    both, ours, theirs = row("weighted", "plain", "mine")
    assert both.weights is None
    assert both.estimator.notes[0].startswith("Its tasks are weighted as those of plain; others")
    assert ours.path(site) != theirs.path(site)


def test_an_enum_that_was_read_back_is_one():
    for target in (*Target, None):
        record = Record(case="c", estimator="e", device="cpu", dtype="float32", target=target)
        assert Record.from_json(record.to_json()).target is target
    with pytest.raises(ValueError, match="'elsewhere' is not a valid Target"):
        Record.from_json(record.to_json().replace('"target":null', '"target":"elsewhere"'))


# --- rows of packages with other settings


def test_torchopt_with_other_settings_says_whose_it_is():
    pytest.importorskip("torchopt", reason="torchopt is not installed: pip install 'bilevel[peers]'")
    damped, plain = (
        torchopt.baseline(torchopt.implicit, steps=20, damping=0.2),
        torchopt.baselines()["torchopt implicit CG"],
    )
    assert (damped.package, damped.version, damped.sees) == (plain.package, plain.version, plain.sees)
    assert damped.notes[0] == (
        "It takes at most 20 steps of conjugate gradients, to a relative residual of 1e-05, with damping 0.2."
    )
    assert (damped.target, plain.target) == (None, Target.SOLUTION)
    assert "steps=20, damping=0.2" in repr(damped)
    linear = bl.CG(max_steps=20, tol=1e-5, damping=0.2)
    given = {"solver": bl.Descent(bl.SGD(lr=1.0), 5)}
    ours = bl.hypergradient(*quadratic.setup(), estimator=bl.Implicit(linear), **given)
    assert torch.allclose(bl.hypergradient(*quadratic.setup(), estimator=damped, **given).grad, ours.grad, rtol=1e-4)
    with pytest.raises(TypeError, match="torchopt implicit has no setting stpes; it has steps, tol, damping"):
        torchopt.baseline(torchopt.implicit, stpes=20)
    with pytest.raises(ValueError, match=r"torchopt\.unrolled or torchopt\.implicit was needed"):
        torchopt.baseline(hand)


def test_the_row_of_higher_under_another_label():
    pytest.importorskip("higher", reason="higher is not installed: pip install 'bilevel[peers]'")
    assert higher.baseline() == higher.baselines()["higher unrolled"]
