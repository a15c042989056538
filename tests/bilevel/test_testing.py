"""bilevel.testing: the library's own entries pass, and each check is seen to fail on a planted defect."""

import dataclasses
import itertools
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.estimators import Estimate, Instance, State, per_task
from bilevel.space import tree
from bilevel.testing import ENTRIES, Entry, Kind, check_estimator, check_problem, probes
from bilevel.testing.storages import Storages

F64 = torch.float64
NEEDS_NO_BUDGET = {"implicit neumann": bl.Implicit(bl.Neumann(steps=200, step_size=0.5))}


# The catalogue


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)
def test_an_entry_says_what_its_estimator_says(entry):
    assert entry.sees == entry.estimator.sees
    assert entry.memory == entry.estimator.memory_growth
    if entry.target == "program":
        assert (entry.bias is None) == (entry.estimator.bias == "")
    assert entry.at(3).sees == entry.sees


def test_labels_are_unique_and_words_are_checked():
    assert len({entry.label for entry in ENTRIES}) == len(ENTRIES)
    with pytest.raises(ValueError, match="'log'"):
        Entry("x", bl.FirstOrder(), "program", lambda k, m: {}, "log", frozenset())
    with pytest.raises(ValueError, match="'optimum'"):
        Entry("x", bl.FirstOrder(), "optimum", lambda k, m: {}, "sqrt", frozenset())


# check_estimator

COUNT = itertools.count(1)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)
def test_the_librarys_own_estimators_pass(entry):
    unbiased = entry.variance is None and (
        entry.bias is None or (entry.target == "solution" and entry.on_quadratic is None)
    )
    check_estimator(
        NEEDS_NO_BUDGET.get(entry.label, entry.estimator),
        target=entry.target if unbiased and entry.settles == 1 else None,
        memory_growth=entry.memory if entry.label in WITH_MEMORY else "",  # (test_memory.py has all of them)
    )


WITH_MEMORY = {"graph", "segments", "implicit cg", "corrected", "forward", "evolution"}


@pytest.mark.parametrize("label", ["iterates", "implicit cg", "corrected", "first order"])
def test_they_pass_in_single_precision(label):
    entry = next(entry for entry in ENTRIES if entry.label == label)
    target = None if label == "first order" else entry.target
    check_estimator(entry.estimator, target=target, dtype=torch.float32)


def test_the_program_written_out_equals_the_closed_form():
    probe = probes.probes(F64)[0]
    for target in ("program", "solution"):
        (written,) = probes.written_out(probe, probe.steps(target))
        torch.testing.assert_close(written, probe.expected(target)[0], rtol=1e-12, atol=1e-14)


@dataclasses.dataclass(frozen=True)
class Planted(bl.Estimator):
    """An estimator with one defect; the rest is another's."""

    defect: str
    honest: bl.Estimator = dataclasses.field(default_factory=lambda: bl.Unrolled("iterates"))
    kept: list[Any] = dataclasses.field(default_factory=list, compare=False)

    @property
    def sees(self) -> frozenset[bl.Path]:
        return self.honest.sees

    def init_state(self, instance: Instance) -> State | None:
        return self.honest.init_state(instance)

    def admit_state(self, instance: Instance, state: Any) -> Any:
        if self.defect == "takes any state":
            return None
        return self.honest.admit_state(instance, state)

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        if self.defect == "draws":
            torch.rand(next(COUNT))
        if self.defect == "refuses":
            raise ValueError("not today")
        if self.defect == "edits the start":
            tree.tensors(instance.oracles.start())[0].mul_(1.0)
        if self.defect == "edits the batch" and not isinstance(instance.batches.inner, bl.PerStep):
            for leaf in tree.tensors(instance.batches.inner):
                leaf.add_(1.0)
        if self.defect == "keeps iterates":
            instance.solve(visit=lambda step, y, s: self.kept.append(y))
        found = self.honest.estimate(instance, state)
        self.kept.clear()
        changes: dict[str, Any] = {}
        if self.defect == "one percent":
            changes["grad"] = tuple(None if leaf is None else 1.01 * leaf for leaf in found.grad)
        if self.defect == "fails":
            changes["code"] = bl.Status.UNSOLVED.code
        if self.defect == "noise":
            noise = 1e-12 * time.perf_counter_ns()
            changes["grad"] = tuple(None if leaf is None else leaf + noise for leaf in found.grad)
        if self.defect == "another structure":
            changes["inner"] = [found.inner]
        if self.defect == "another dtype":
            changes["inner"] = tree.tree_map(Tensor.float, found.inner)
        if self.defect == "sum of tasks" and instance.tasks is not None:
            changes["grad"] = tuple(None if leaf is None else instance.tasks * leaf for leaf in found.grad)
        return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("one percent", r"is not right for its target \(program\), on a strongly convex quadratic: relative error \d"),
        ("fails", "says that it failed, on a strongly convex quadratic: UNSOLVED"),
        ("noise", "another answer under the same seed.*largest difference"),
        ("draws", r"draws differently under the same seed.*global random state"),
        ("refuses", r"does not see what it says.*raised ValueError: not today"),
        ("edits the start", "changes its arguments.*inner .* was written to"),
        ("edits the batch", r"changes its arguments.*Batches.inner .* moved by 1"),
        ("another structure", r"hg\.inner of another structure"),
        ("another dtype", r"hg\.inner of another shape or dtype"),
        ("sum of tasks", r"under TaskMean\(chunk=None\) is not the mean of single tasks.*relative difference"),
        ("takes any state", "accepts a state of another class"),
    ],
)
def test_a_planted_defect_of_an_estimator_is_found(defect, message):
    target = None if defect in ("noise", "sum of tasks") else "program"
    with pytest.raises(AssertionError, match=message):
        check_estimator(Planted(defect), target=target)


@pytest.mark.parametrize("defect", ["none", "keeps iterates"])
def test_memory_is_held_to_the_promise(defect):
    estimator = Planted(defect, bl.Implicit(bl.CG(10)))
    if defect == "none":
        check_estimator(estimator, target=None, memory_growth="constant")
        return
    with pytest.raises(AssertionError, match=r"faster than promised \(constant\).*K = 16: [\d,]+ bytes"):
        check_estimator(estimator, target=None, memory_growth="constant")
    with pytest.raises(AssertionError, match=r"faster than promised \(sqrt\)"):
        check_estimator(estimator, target=None, memory_growth="sqrt")
    check_estimator(estimator, target=None, memory_growth="linear")


def test_sees_that_is_too_wide_is_found():
    """Its gradient is right in all but the path that it only claims to follow."""

    @dataclasses.dataclass(frozen=True)
    class Claims(bl.Estimator):
        sees = frozenset(bl.Path)

        def estimate(self, instance: Instance, state: Any) -> Estimate:
            found = bl.Unrolled().estimate(instance, state)
            if callable(getattr(instance.solver.dynamics.update, "lr", None)):
                found = dataclasses.replace(found, grad=tuple(torch.zeros_like(leaf) for leaf in found.grad))
            return found

    with pytest.raises(AssertionError, match=r"not right.*only through a hyper-parameter.*leave that out of `sees`"):
        check_estimator(Claims(), target="program")


@pytest.mark.parametrize(
    "defect",
    [
        "lost on saving",
        "goes on differently",
        "holds a function",
        "wrong tasks",
        "of any size",
        "of any owner",
        "changed",
    ],
)
def test_a_planted_defect_of_a_state_is_found(defect):
    @dataclasses.dataclass(frozen=True)
    class Kept(State):
        inner: Any = per_task()  # noqa: RUF009
        extra: Any = None

        def to_dict(self):
            saved = super().to_dict()
            return (
                saved | {"inner": tree.tree_map(torch.zeros_like, self.inner)}
                if defect == "goes on differently"
                else saved
            )

        @classmethod
        def from_dict(cls, saved):
            found = super().from_dict(saved)
            return dataclasses.replace(found, extra=7.0) if defect == "lost on saving" else found

    @dataclasses.dataclass(frozen=True)
    class Warm(bl.Estimator):
        sees = frozenset(bl.Path)

        def init_state(self, instance):
            return Kept(instance.oracles.start(), extra=1.0)

        def admit_state(self, instance, state):
            if isinstance(state, dict):
                if defect == "of any owner":
                    state = state | {"owner": "Kept"}
                if defect != "of any size":
                    super().admit_state(instance, state)
                return Kept.from_dict(state)
            if not isinstance(state, Kept):
                raise ValueError("state")
            return state

        def estimate(self, instance, state):
            if state is not None:
                y = state.inner
                if defect == "of any size":
                    y = tree.tree_map(lambda a, b: a[tuple(map(slice, b.shape))], y, instance.oracles.start())
                if defect == "changed":
                    tree.tensors(y)[0].add_(1e-3)
                if defect == "wrong tasks" and instance.tasks is not None:
                    y = tree.tree_map(lambda leaf: leaf.flip(0), y)
                instance = dataclasses.replace(
                    instance, inner=y, problem=dataclasses.replace(instance.problem, init=None)
                )
            found = bl.Unrolled().estimate(instance, None)
            extra = print if defect == "holds a function" else 1.0
            return dataclasses.replace(found, state=Kept(found.inner, extra=extra))

    message = {
        "lost on saving": "loses numbers of its state",
        "goes on differently": "goes on differently from a saved state|loses numbers",
        "holds a function": "holds more than tensors and numbers",
        "of any size": "accepts a state of another problem",
        "of any owner": "accepts a state of another owner",
        "changed": "changes the state that it is given",
        "wrong tasks": "mixes the states of tasks",
    }[defect]
    with pytest.raises(AssertionError, match=message):
        check_estimator(Warm(), target=None)


def test_an_estimator_blind_to_a_solved_start_is_found():
    """Unrolled passes for the solution, but not from a start that is it: no step is taken there."""

    @dataclasses.dataclass(frozen=True)
    class Blind(bl.Estimator):
        sees = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.STATIONARITY})

        def estimate(self, instance: Instance, state: Any) -> Estimate:
            return bl.Unrolled("iterates").estimate(instance, state)

    with pytest.raises(AssertionError, match=r"not right.*with Converge from its solution"):
        check_estimator(Blind(), target="solution")


def test_an_estimator_that_refuses_everything_is_found():
    @dataclasses.dataclass(frozen=True)
    class Shy(bl.Estimator):
        sees = frozenset()

        def estimate(self, instance: Instance, state: Any) -> Estimate:
            raise AssertionError

    with pytest.raises(AssertionError, match=r"refused every problem.*sees nothing"):
        check_estimator(Shy(), target=None)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="TaskMean"):
        check_estimator(bl.TaskMean(bl.Unrolled()), target="program")
    with pytest.raises(TypeError, match="ABCMeta"):
        check_estimator(bl.Unrolled, target="program")
    with pytest.raises(ValueError, match="target='optimum'"):
        check_estimator(bl.Unrolled(), target="optimum")
    with pytest.raises(ValueError, match="memory_growth='log'"):
        check_estimator(bl.Unrolled(), target="program", memory_growth="log")


def test_storages_are_counted_once_and_given_up():
    with Storages() as storages:
        x = torch.zeros(100, dtype=F64)
        view = x[:10].view(2, 5)
        del x
        assert storages.live == 800
        del view
        assert storages.live == 0
        torch.zeros(10, dtype=F64).add_(1)
    assert storages.peak == 800


# check_problem

X, Y = torch.tensor([0.5, -0.3], dtype=F64), torch.tensor([0.1, 0.4], dtype=F64)
TARGET = torch.tensor([1.0, 2.0], dtype=F64)


def inner_loss(y: Tensor, x: Tensor, batch: Any) -> Tensor:
    return (y - x).square().sum() + 0.1 * (y**4).sum()


def outer_loss(y: Tensor, x: Tensor, batch: Any) -> Tensor:
    return (y - 2).square().sum()


def look(
    inner: Any = inner_loss, outer: Any = outer_loss, x: Any = X, y: Any = Y, batches: Any = None, **more: Any
) -> Any:
    solver = more.pop("solver", bl.Descent(bl.SGD(lr=0.1), steps=5))
    return check_problem(bl.Problem(inner, outer, **more), x, y, batches or bl.Batches(TARGET, TARGET), solver=solver)


def kinds(report: Any) -> set[Kind]:
    return {found.kind for found in report.findings}


SOUND = {
    "plain": {},
    "in single precision": {"x": X.float(), "y": Y.float()},
    "a start of its own": {"init": lambda x, b: x, "y": None},
    "features": {"features": lambda x, b: b * x, "inner": lambda y, x, z: (y - z).square().sum()},
    "dropout": {"inner": lambda y, x, b: (y - torch.nn.functional.dropout(x + b, 0.5)).square().sum()},
    "a kink": {"inner": lambda y, x, b: (y - x).square().sum() + (y - b).relu().sum()},
    "a gradient inside": {
        "inner": lambda y, x, b: (
            torch.autograd.grad((y**4).sum(), y, create_graph=True)[0].square().sum() * 1e-2 + (y - x).square().sum()
        )
    },
    "minibatches": {"batches": bl.Batches(bl.PerStep([TARGET * k for k in range(5)]), TARGET)},
    "converge": {"solver": bl.Converge(bl.SGD(lr=0.1), tol=1e-6, max_steps=500)},
    "a step size that is learned": {"solver": bl.Descent(bl.SGD(lr=lambda x: 0.1 * x.square().sum()), 5)},
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_problem(name):
    report = look(**SOUND[name])
    assert report.findings == ()
    assert report.ok
    report.raise_if_any()
    assert report.skipped == ()


def test_random_numbers_outside_torch_are_found():
    numpy = pytest.importorskip("numpy")
    for draw, library in ((random.random, "Python's random module"), (numpy.random.rand, "numpy's global generator")):
        report = look(lambda y, x, b, draw=draw: inner_loss(y, x, b) + draw() * y.sum())
        assert [found.kind for found in report.findings] == [Kind.NOT_DETERMINISTIC]
        assert library in report.findings[0].sentence
        assert "inner_loss" in report.findings[0].sentence
        with pytest.raises(bl.BilevelError, match="NOT_DETERMINISTIC: two evaluations"):
            report.raise_if_any()
        assert report.skipped != ()


def test_a_generator_of_its_own_keeps_state():
    own = torch.Generator().manual_seed(0)
    report = look(lambda y, x, b: inner_loss(y, x, b) + torch.rand((), generator=own, dtype=F64) * y.sum())
    assert kinds(report) == {Kind.KEEPS_STATE}


def test_a_counter_keeps_state():
    calls = []

    def counting(y, x, b):
        calls.append(1)
        return outer_loss(y, x, b) * (1 + 0.01 * len(calls))

    report = look(outer=counting)
    assert kinds(report) == {Kind.KEEPS_STATE}
    assert "outer_loss" in report.findings[0].sentence


def test_buffers_that_move_are_named_though_the_loss_does_not_see_them():
    norm = torch.nn.BatchNorm1d(2, affine=False, dtype=F64)
    report = look(lambda y, x, b: (norm(torch.stack([y, x, b])) * y).square().sum() + inner_loss(y, x, b))
    assert kinds(report) == {Kind.KEEPS_STATE}
    assert "norm.running_mean" in report.findings[0].sentence


@pytest.mark.parametrize("role", ["inner variable", "outer variable", "batch"])
def test_arguments_edited_in_place_are_found(role):
    def editing(y, x, b):
        {"inner variable": y, "outer variable": x, "batch": b}[role].mul_(1.0)
        return inner_loss(y, x, b)

    x, y, batches = X.clone(), Y.clone(), bl.Batches(TARGET.clone(), TARGET.clone())
    report = look(editing, x=x, y=y, batches=batches)
    assert Kind.EDITED_IN_PLACE in kinds(report)
    assert any(role in found.sentence for found in report.findings)
    assert [leaf._version for leaf in (x, y, batches.inner)] == [0, 0, 0]


def test_unused_tensors_are_found():
    x, y = {"used": X, "idle": X}, {"used": Y, "idle": Y, "outer only": Y}
    report = look(
        lambda y, x, b: inner_loss(y["used"], x["used"], b),
        lambda y, x, b: outer_loss(y["used"] + y["outer only"], x, b),
        x,
        y,
    )
    assert [found.kind for found in report.findings] == [Kind.UNUSED] * 3
    outer, idle, only = (found.sentence for found in report.findings)
    assert "outer variable ['idle']" in outer
    assert "inner variable ['idle'] (nor does outer_loss)" in idle
    assert "inner variable ['outer only'] (outer_loss uses it" in only


def test_a_head_used_in_a_later_minibatch_is_used():
    y = {"one": Y, "two": Y}
    batches = bl.Batches(bl.PerStep(["one", "two"] * 3), TARGET)
    report = look(
        lambda y, x, b: inner_loss(y[b], x, b),
        lambda y, x, b: outer_loss(y["one"] + y["two"], x, b),
        y=y,
        batches=batches,
    )
    assert report.ok


class Detached(torch.autograd.Function):
    """y^4 whose backward computes with detached tensors."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y**4

    @staticmethod
    def backward(ctx, weight):
        return weight * 4 * ctx.saved_tensors[0].detach() ** 3


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y**4

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight):
        return weight * 4 * ctx.saved_tensors[0] ** 3


@pytest.mark.parametrize("function", [Detached, Once])
def test_a_missing_second_derivative_is_found(function):
    report = look(lambda y, x, b: (y - x).square().sum() + function.apply(y).sum())
    assert kinds(report) == {Kind.NOT_TWICE_DIFFERENTIABLE}


def test_losses_that_are_not_finite_are_found():
    report = look(outer=lambda y, x, b: (y - 5).log().sum())
    assert Kind.NOT_FINITE in kinds(report)
    assert "outer_loss is nan at the start" in report.findings[0].sentence
    report = look(lambda y, x, b: (y - Y).square().sum().sqrt() + (x * y).sum())
    assert any("its gradient is not finite" in found.sentence for found in report.findings)
    report = look(solver=bl.Descent(bl.SGD(lr=5.0), 50))
    assert Kind.NOT_FINITE in kinds(report)
    assert any("after 50 inner steps" in found.sentence for found in report.findings)


def test_lost_digits_are_found():
    """A difference of large numbers."""
    report = look(outer=lambda y, x, b: ((y + 1e7) - 1e7 - 2).square().sum(), x=X.float(), y=Y.float())
    assert kinds(report) == {Kind.DIGITS_LOST}
    assert "torch.float32" in report.findings[0].sentence


def test_what_cannot_be_cast_is_said():
    single = torch.eye(2)
    report = look(lambda y, x, b: (single @ (y - x)).square().sum(), x=X.float(), y=Y.float())
    assert report.ok
    assert len(report.skipped) == 3
    assert all("float64" in sentence for sentence in report.skipped)


def test_a_path_cut_halfway_is_found():
    report = look(lambda y, x, b: (y - x).square().sum() + (y * x.detach()).sum())
    assert Kind.WRONG_GRADIENT in kinds(report)
    assert "finite difference" in next(f.sentence for f in report.findings if f.kind is Kind.WRONG_GRADIENT)


def test_a_loss_that_raises_is_a_finding():
    def broken(y, x, b):
        raise KeyError("mine")

    report = look(broken)
    assert Kind.RAISES in kinds(report)
    assert "KeyError: 'mine'" in report.findings[0].sentence


def test_wrong_arguments_of_a_problem_are_refused_as_ever():
    with pytest.raises(TypeError, match=r"check_problem.* as solver"):
        check_problem(bl.Problem(inner_loss, outer_loss), X, Y, bl.Batches(None, None), solver=bl.SGD(0.1))


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    look(SOUND["dropout"]["inner"])
    assert torch.equal(before, torch.get_rng_state())
