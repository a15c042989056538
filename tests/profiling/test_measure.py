"""measure(): what a record says about leaks, failures, references and the state it leaves behind."""

import dataclasses
import itertools

import pytest
import torch
from bilevel_profiling import Case, measure
from bilevel_profiling.cases.case import Posed, in_steps
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.measurement import references
from bilevel_profiling.measurement.cell import Job
from bilevel_profiling.meters.storages import storage_bytes

import bilevel as bl
from bilevel.estimators import Estimate, Estimator, Instance
from bilevel.problems import quadratic

SOLVER = bl.Descent(bl.SGD(lr=1.0), steps=5)
LIBRARY = [
    bl.Unrolled(),
    bl.Unrolled("iterates"),
    bl.Unrolled("segments"),
    bl.Unrolled(last=2),
    bl.Implicit(bl.CG(6)),
    bl.Implicit(bl.Neumann(5, 1.0)),
    bl.Implicit(bl.Dense()),
    bl.MemoryReduced(warm_inner=True, warm_adjoint=True),
    bl.FirstOrderCorrected(),
    bl.FirstOrder(),
]


@dataclasses.dataclass(frozen=True)
class Hoarding(Estimator):
    """The leaking twin: it keeps every iterate, for good."""

    estimator: Estimator
    kept: list = dataclasses.field(default_factory=list)
    sees = frozenset(bl.Path)

    def estimate(self, instance: Instance, state: object) -> Estimate:
        instance.solve(visit=lambda step, y, s: self.kept.append(y.clone()))
        return self.estimator.estimate(instance, state)


def quick(estimator, steps=5, **options):
    return measure(
        Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), steps), estimator=estimator),
        repeats=1,
        errors=False,
        **options,
    )


@pytest.mark.parametrize("estimator", LIBRARY, ids=repr)
def test_no_estimator_of_the_library_leaks(estimator):
    assert quick(estimator).kept_tensor_bytes == 0


def test_a_leaking_twin_is_caught_by_what_it_keeps_and_by_its_slope():
    inner_bytes = 6 * 8
    for steps in (5, 40):
        assert quick(Hoarding(bl.Implicit(bl.CG(6))), steps).kept_tensor_bytes == steps * inner_bytes
    honest = quick(bl.Implicit(bl.CG(6)), 40).peak_tensor_bytes - quick(bl.Implicit(bl.CG(6)), 5).peak_tensor_bytes
    leaking = (
        quick(Hoarding(bl.Implicit(bl.CG(6))), 40).peak_tensor_bytes
        - quick(Hoarding(bl.Implicit(bl.CG(6))), 5).peak_tensor_bytes
    )
    assert honest == 0
    assert leaking >= 35 * inner_bytes


def test_the_phases_of_a_case_add_up():
    found = quick(bl.FirstOrderCorrected())
    # The inner phase runs twice in one call: counts are sums, peaks are maxima, and no phase takes longer than the
    # whole.
    assert found.phases["inner"].calls == {"inner_gradient": 10, "outer_gradient": 10}
    assert {
        name: sum(phase.calls.get(name, 0) for phase in found.phases.values()) for name in found.calls
    } == found.calls
    assert found.peak_tensor_bytes == max(phase.peak_tensor_bytes for phase in found.phases.values())
    assert sum(phase.wall_seconds for phase in found.phases.values()) <= found.wall_seconds
    assert sum(phase.matmul_flops for phase in found.phases.values()) <= found.matmul_flops


class Failing:
    """A problem whose loss fails after a number of calls."""

    def __init__(self, error, after):
        self.error, self.calls = error, itertools.count()
        self.after = after

    def setup(self, device):
        def outer_loss(y, x, batch):
            if next(self.calls) >= self.after:
                raise self.error
            return (y**2).sum()

        return (
            bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), outer_loss),
            torch.ones(3),
            torch.zeros(3),
            bl.Batches(None, None),
        )

    def case(self):
        return Case(self.setup, solver=bl.Descent(bl.SGD(lr=0.25), 2), estimator=bl.Unrolled())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 b"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_is_a_record_with_what_was_measured_before(error):
    found = measure(Failing(error, after=3).case(), repeats=5)
    assert found.status == "OUT_OF_MEMORY"
    assert found.reason
    assert found.outer_size == 3
    assert found.wall_seconds is not None
    assert found.matmul_flops is None


def test_a_bug_in_a_loss_is_raised_not_recorded():
    with pytest.raises(KeyError, match="oops"):
        measure(Failing(KeyError("oops"), after=0).case())


def test_divergence_is_a_record_with_its_cost_and_without_an_error():
    found = measure(Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1e9), 60), estimator=bl.Unrolled()), repeats=1)
    assert found.status in ("DIVERGED", "NONFINITE")
    assert found.reason
    assert found.peak_tensor_bytes > 0
    assert found.program_relative_error is None
    assert set(found.phases) == {"inner", "hypergradient"}


def test_a_tolerated_failure_is_a_status_and_not_a_warning():
    """Warnings are errors here; iterate() would warn at every step."""

    def setup(device):
        problem = bl.Problem(lambda y, x, b: y[0] ** 2 - y[1] ** 2 + (x * y).sum(), lambda y, x, b: (y**2).sum())
        return problem, torch.ones(2), torch.ones(2), bl.Batches(None, None)

    found = measure(Case(setup, solver=bl.Descent(bl.SGD(lr=0.1), 3), estimator=bl.Implicit(bl.CG(5))), repeats=2)
    assert found.status == "NEGATIVE_CURVATURE"
    assert "outer" in found.phases


def test_measuring_leaves_no_trace():
    posed = quadratic.setup()
    before = [leaf.detach().clone() for leaf in (posed[1], posed[2])]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    measure(Case(lambda device: posed, solver=SOLVER, estimator=bl.Unrolled()), repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (posed[1], posed[2]), strict=True))
    assert posed[1].grad is None


def test_tasks_are_compared_with_the_mean_over_tasks():
    def setup(device):
        targets = torch.linspace(-1, 1, 3)
        problem = bl.Problem(
            lambda y, x, b: ((y - b) ** 2).sum(), lambda y, x, b: ((y - 2 * b) ** 2).sum(), init=lambda x, b: x
        )
        return bl.proximal(problem, 1.0), torch.ones(4), None, bl.Batches(inner=targets, outer=targets)

    case = Case(setup, solver=bl.Descent(bl.SGD(lr=0.1), 3), estimator=bl.TaskMean(bl.Unrolled()))
    found = measure(case, repeats=1)
    assert (found.tasks, found.inner_size, found.outer_size) == (3, 12, 4)
    assert found.program_relative_error < 1e-6
    assert found.calls["inner_gradient"] == 3


def captures_float32(device):
    data = torch.randn(4, 3)
    problem = bl.Problem(lambda y, x, b: (data @ y - x).square().sum(), lambda y, x, b: y.square().sum())
    return problem, torch.ones(4), torch.zeros(3), bl.Batches(None, None)


def casts(device):
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: y.float().square().sum())
    return problem, torch.ones(4), torch.zeros(4), bl.Batches(None, None)


@pytest.mark.parametrize(("setup", "note"), [(captures_float32, "pass them in the batches"), (casts, "a loss casts")])
def test_a_reference_that_cannot_be_made_is_a_note(setup, note):
    found = measure(Case(setup, solver=bl.Descent(bl.SGD(lr=0.01), 3), estimator=bl.Unrolled()), repeats=1)
    assert found.status == "OK"
    assert found.program_relative_error is None
    assert note in found.reference_note


def test_a_solution_that_is_not_reached_is_no_reference():
    case = Case(
        quadratic.setup,
        solver=SOLVER,
        estimator=bl.Unrolled(),
        solution=bl.Converge(bl.SGD(lr=1.0), tol=1e-12, max_steps=3),
    )
    found = references.of_case(case)
    assert found.solution.grad is None
    assert "INNER_MAX_STEPS" in found.solution.note
    assert found.program.grad is not None


def test_a_solver_with_a_tolerance_is_compared_like_any_other():
    defined = Definition("toy", quadratic.setup, optimizer=bl.Converge(bl.SGD(lr=1.0), tol=1e-2))
    case = Job("quadratic", {}, "unrolled", in_steps(defined.optimizer, 30)).case(defined)
    assert case.solver == bl.Converge(bl.SGD(lr=1.0), tol=1e-2, max_steps=30)
    found = measure(case, repeats=1)
    assert found.inner_steps == 30
    assert found.program_relative_error < 1e-10
    assert "the steps that the tolerance takes in float64" in found.reference_note


@dataclasses.dataclass(frozen=True)
class Unlimited(bl.InnerSolver):
    """A rule of the user's own, which always takes two steps."""

    dynamics = optimizer = bl.SGD(lr=1.0)
    max_steps = 2
    fixed = True


Unlimited.__abstractmethods__ = frozenset()  # it is never run


def test_a_solver_without_a_limit_to_set_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="a field called steps or max_steps"):
        in_steps(Unlimited(), 3)


class Endless:
    """Minibatches without end, made when they are asked for."""

    def __len__(self):
        return 10**9

    def __getitem__(self, step):
        return torch.full((3,), float(step))


def test_batches_without_end_are_looked_at_as_far_as_they_are_used():
    problem = bl.Problem(lambda y, x, b: ((y - x - b) ** 2).sum(), lambda y, x, b: (y**2).sum())
    posed = Posed(problem, torch.ones(3), torch.zeros(3), bl.Batches(bl.PerStep(Endless()), None))
    assert storage_bytes(posed.tensors(4)) == (2 + 4) * 12
    assert posed.double().batches.inner[5].dtype == torch.float64
    parts = (posed.problem, posed.outer, posed.inner, posed.batches)
    case = Case(lambda device: parts, solver=bl.Descent(bl.SGD(lr=0.1), 4), estimator=bl.Unrolled())
    assert measure(case, repeats=1).program_relative_error < 1e-6


def test_a_cached_reference_is_used_until_the_problem_changes(tmp_path, monkeypatch):
    made = []
    original = references.program
    monkeypatch.setattr(references, "program", lambda case: made.append(case.solver.max_steps) or original(case))

    def case(seed, estimator=None):
        return Case(quadratic.setup, solver=SOLVER, estimator=estimator or bl.Unrolled(), seed=seed)

    path = tmp_path / "reference.pt"
    first = references.cached(case(0), "program", path)
    again = references.cached(case(0, bl.Implicit(bl.CG(3))), "program", path)
    assert torch.equal(first.grad[0], again.grad[0])
    other = references.cached(case(1), "program", path)
    assert not torch.equal(first.grad[0], other.grad[0])
    # a program of five steps was made twice; the others are the single steps that tell problems apart
    assert made.count(5) == 2
    path.write_bytes(b"half a fi")
    assert torch.equal(references.cached(case(1), "program", path).grad[0], other.grad[0])


@pytest.mark.parametrize(
    ("made", "message"),
    [(None, "a NoneType"), ((1, 2), "int, int"), ((1, torch.ones(1), None, None), "bl.Problem")],
)
def test_a_setup_that_returns_something_else_is_told_what_to_return(made, message):
    with pytest.raises(TypeError, match=message):
        measure(Case(lambda device: made, solver=SOLVER, estimator=bl.Unrolled()))


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="a Case or a function"):
        measure(3)
    with pytest.raises(ValueError, match="repeats"):
        measure(lambda: None, repeats=0)
    with pytest.raises(TypeError, match="Descent"):
        Case(quadratic.setup, solver=bl.SGD(lr=1.0), estimator=bl.Unrolled())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_case_on_a_gpu():
    found = measure(Case(quadratic.setup, solver=SOLVER, estimator=bl.Unrolled(), device="cuda"), repeats=2)
    assert found.device == "cuda"
    assert found.cuda_allocated_bytes >= found.base_tensor_bytes
    assert found.phases["inner"].cuda_allocated_bytes > 0
    assert found.program_relative_error < 1e-10
