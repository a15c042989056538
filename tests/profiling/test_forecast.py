"""A forecast is the run without the run: equal to the tensors meter to the byte, and honest about what it cannot
see."""

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterator

import catalogue
import pytest
import torch
from bilevel_profiling import Case, ForecastError, Record, forecast, measure, recommend
from bilevel_profiling.cases.case_file import load
from bilevel_profiling.measurement.passes import Figures
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.devices import DEVICES, Device
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.meters.work import Work
from torch.utils._python_dispatch import _disable_current_modes

import bilevel as bl
from bilevel.problems import quadratic

pytestmark = [
    pytest.mark.filterwarnings("ignore:outer variable"),
    pytest.mark.filterwarnings("ignore:iterate.. stepped through"),
]
RUNS = ((4, torch.float64), (1, torch.float32))
"""K and dtype, both at once: a step more is more tensors, another dtype smaller ones."""


def metered(case: Case) -> Record:
    """What `measure` finds in its metered passes, without its repeats and in one pass."""
    trial = Trial(case)
    trial.prime()
    figures, meters = Figures(), (Oracles(), Work(), Tensors())  # the last is asked first: the others' reads are theirs
    gc.collect()
    with contextlib.ExitStack() as around:
        for meter in meters:
            around.enter_context(meter)
        result = trial()
    del result
    trial.tidy()
    gc.collect()
    for meter in meters:
        with figures.of(meter):
            pass
    return figures.record(Record(case="", estimator=""))


def same_or_refused(case: Case) -> None:
    """Some estimators refuse some problems, in a forecast as in a run."""
    try:
        real = metered(case)
    except bl.BilevelError:  # the step is refused for its numbers, which a forecast does not have
        return
    except ValueError as error:
        refusal = str(error)
        with pytest.raises(ValueError) as same_error:
            forecast(case)
        assert str(same_error.value) == refusal
    else:
        same(case, real)


def same(case: Case, real: Record | None = None) -> None:
    """Forecast and meter agree: where a solver stopped before its step limit on the peaks, else on everything.

    A linear solver that is sure of its residual saves a product at the end, with its few bytes.
    """
    found, real = forecast(case), real or metered(case)
    saved = found.matmul_flops > real.matmul_flops or found.moved_bytes > 1.001 * real.moved_bytes
    room = 64 if saved and any("step limit" in note for note in found.notes) else 0
    assert 0 <= found.peak_tensor_bytes - real.peak_tensor_bytes <= room
    assert found.phases.keys() == real.phases.keys()
    for name, phase in found.phases.items():
        assert 0 <= phase.peak_tensor_bytes - real.phases[name].peak_tensor_bytes <= room
    assert found.kept_tensor_bytes == real.kept_tensor_bytes == 0
    if found.calls == real.calls and not room:
        assert found.alive == real.alive
        assert found.matmul_flops == real.matmul_flops
        assert found.moved_bytes == pytest.approx(real.moved_bytes, rel=1e-3)  # a run also reads its status
    else:
        assert any("step limit" in note for note in found.notes)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A problem of the catalogue as a case's setup."""

    problem: str
    dtype: torch.dtype
    tasks: int | None = None

    def __call__(self, device):
        problem, outer, inner, batches = catalogue.PROBLEMS[self.problem](self.dtype, device)
        if self.tasks is None:
            return problem, outer, inner, batches
        many = [
            torch.stack([leaf.roll(shift, 0) for shift in range(self.tasks)])
            for leaf in (*batches.inner, *batches.outer)
        ]
        inner = None if inner is None else {name: leaf.expand(self.tasks, *leaf.shape) for name, leaf in inner.items()}
        return problem, outer, inner, bl.Batches(many[:2], many[2:])


def pairs(row: tuple) -> set:
    return set(itertools.combinations(enumerate(row), 2))


def pairwise(rows: list[tuple]) -> Iterator[tuple]:
    """Few of the rows in which any two values that meet in some row meet."""
    missing = set().union(*map(pairs, rows))
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        yield best


WIDE = {"graph", "iterates", "segments", "implicit cg", "memory reduced", "corrected", "forward", "sama", "f2sa"}
"""Estimators that meet every optimizer; the others meet two."""
MATRIX = [
    (problem, estimator, optimizer, *run)
    for problem, estimator, optimizer, run in pairwise(
        [
            row
            for row in itertools.product(catalogue.PROBLEMS, catalogue.ESTIMATORS, catalogue.OPTIMIZERS, RUNS)
            if (row[0], row[2]) != ("meta start", "learned lr") and (row[1] in WIDE or row[2] in ("sgd", "adam"))
        ]
    )
]


@pytest.mark.parametrize(("problem", "estimator", "optimizer", "steps", "dtype"), MATRIX)
def test_equal_to_the_byte_over_the_conformance_matrix(problem, estimator, optimizer, steps, dtype):
    case = Case(
        Setup(problem, dtype),
        solver=bl.Descent(catalogue.OPTIMIZERS[optimizer], steps),
        estimator=catalogue.ESTIMATORS[estimator],
        name="matrix",
    )
    same_or_refused(case)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("estimator", ["graph", "iterates", "segments", "corrected"])
@pytest.mark.parametrize("problem", catalogue.PROBLEMS)
def test_equal_to_the_byte_over_tasks(problem, estimator, chunk):
    mean = bl.TaskMean(catalogue.ESTIMATORS[estimator], chunk)
    same(Case(Setup(problem, torch.float64, 3), solver=bl.Descent(bl.SGD(0.3), 3), estimator=mean, name="tasks"))


BUILT_IN = [
    (name, label)
    for name in ("hypercleaning", "fewshot", "language", "ridge", "quadratic")
    for label in load(name).estimators
]


@pytest.mark.parametrize(("name", "label"), BUILT_IN)
def test_equal_to_the_byte_on_the_built_in_cases(name, label):
    definition = load(name)
    case = Case(
        definition.setup,
        solver=bl.Descent(definition.optimizer, 2),
        estimator=definition.estimators[label],
        name=name,
        outer_optimizer=definition.outer_optimizer,
    )
    same_or_refused(case)


def quadratic_case(**changes):
    given = {"solver": bl.Descent(bl.SGD(lr=1.0), 5), "estimator": bl.Unrolled()} | changes
    return Case(given.pop("setup", quadratic.setup), **given)


def test_a_forecast_leaves_the_real_world_alone():
    before = torch.get_rng_state()
    real = measure(quadratic_case(), repeats=1)
    forecast(quadratic_case())
    after = measure(quadratic_case(), repeats=1)
    assert torch.equal(before, torch.get_rng_state())
    assert (real.program_relative_error, real.peak_tensor_bytes) == (
        after.program_relative_error,
        after.peak_tensor_bytes,
    )


def test_random_numbers_in_the_loss_are_no_obstacle():
    def setup(device):
        call, inner = bl.functional(
            torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(), torch.nn.Linear(64, 4))
        )
        x, y = torch.randn(128, 64), torch.randint(0, 4, (128,))
        loss = torch.nn.functional.cross_entropy
        weighted = lambda w, v, b: (v.sigmoid() * loss(call(w, x), y, reduction="none")).mean()  # noqa: E731
        return (
            bl.Problem(weighted, lambda w, v, b: loss(call(w, x), y)),
            torch.zeros(128),
            inner,
            bl.Batches(None, None),
        )

    for keep in ("graph", "iterates", "segments"):
        same(quadratic_case(setup=setup, estimator=bl.Unrolled(keep=keep)))


DRAWING = {
    "randn_like": (torch.randn_like, True),
    "dropout": (torch.nn.functional.dropout, True),
    "in place": (lambda x: x.clone().uniform_(), True),
    "attention": (lambda x: torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3), False),
    "rrelu in eval": (torch.nn.functional.rrelu, False),
    "dropout in eval": (lambda x: torch.nn.functional.dropout(x, training=False), False),
}


@pytest.mark.parametrize("name", DRAWING)
def test_the_generator_moves_where_a_run_would_move_it(name):
    """Estimators look at it, and keep a state where it has moved: bytes that a forecast has to count."""
    call, draws = DRAWING[name]
    moved = []

    def step():
        x = torch.ones(4, 8)
        with _disable_current_modes():
            before = torch.get_rng_state()
        call(x)
        with _disable_current_modes():
            moved.append(not torch.equal(before, torch.get_rng_state()))

    forecast(step)
    measure(step, repeats=1)
    assert set(moved) == {draws}


def test_nothing_is_allocated():
    def setup(device):
        inner = torch.zeros(2**36, device=device)  # 256 GiB
        outer = torch.zeros((), device=device)
        return (
            bl.Problem(lambda y, x, b: ((y - x) ** 2).mean(), lambda y, x, b: (y**2).mean()),
            outer,
            inner,
            bl.Batches(None, None),
        )

    found = forecast(quadratic_case(setup=setup))
    assert found.base_tensor_bytes == 2**38 + 4 + 12  # y; x; the two moments and the step count of Adam
    assert found.peak_tensor_bytes > 5 * 2**38


def test_a_function_that_has_nothing_to_do_with_bilevel():
    found = forecast(lambda: torch.ones(2**34) * 2, name="doubled")
    assert (found.case, found.estimator, found.source) == ("functions", "doubled", "forecast")
    assert found.peak_tensor_bytes == 2**37
    real = torch.ones(1000)
    assert (
        forecast(lambda: real + 1).peak_tensor_bytes == measure(lambda: real + 1, repeats=1).peak_tensor_bytes == 4000
    )


def complex_products():
    w = torch.ones(64, 64, dtype=torch.complex64, requires_grad=True)
    x = torch.full((64, 64), 1 + 2j)
    y = ((w @ x).conj() * w).abs().pow(2).sum() + torch.view_as_real(w.conj().mH @ x).pow(2).sum()
    (gradient,) = torch.autograd.grad(y, w, create_graph=True)
    gradient.abs().sum().backward()


def conjugates():
    z = torch.fft.fft(torch.ones(64, 64, requires_grad=True))
    (z * z.conj()).real.sum().backward()


def negations():
    part = torch.ones(128, dtype=torch.complex64).conj().imag  # a view with the sign still to be taken
    return part.clone() + part * 2


@pytest.mark.parametrize("call", [complex_products, conjugates, negations])
def test_conjugations_and_negations_are_made_where_a_run_makes_them(call):
    assert forecast(call).peak_tensor_bytes == measure(call, repeats=1).peak_tensor_bytes


def test_a_leak_is_forecast_too():
    kept = []
    with pytest.warns(UserWarning, match=r"3.9\d KiB of tensors without data outlive the function"):
        found = forecast(lambda: kept.append(torch.ones(1000)))
    assert found.kept_tensor_bytes == 4000
    assert "without data" in found.notes[0]


def reading(y, x, batch):
    loss = ((y - x) ** 2).sum()
    scale = loss.item()
    return loss / scale


def branching(y, x, batch):
    loss = ((y - x) ** 2).sum()
    if loss > 1:
        loss = loss / 2
    return loss


def masking(y, x, batch):
    return ((y - x)[y > 0] ** 2).sum()


def leaving(y, x, batch):
    return ((y - x) ** 2).sum() * float((y.detach().numpy() > 0).mean())


@pytest.mark.parametrize(
    ("loss", "line", "remedy"),
    [
        (reading, "scale = loss.item()", "Keep it a tensor"),
        (branching, "if loss > 1:", "torch.where(condition, a, b) instead of if"),
        (masking, "return ((y - x)[y > 0] ** 2).sum()", "torch.where(mask, a, 0)"),
        (leaving, "return ((y - x) ** 2).sum() * float((y.detach().numpy() > 0).mean())", "Keep it a tensor"),
    ],
)
def test_a_loss_that_reads_values_is_told_where_and_what_to_write(loss, line, remedy):
    def setup(device):
        return bl.Problem(loss, lambda y, x, b: (y**2).sum()), torch.zeros(3), torch.ones(3), bl.Batches(None, None)

    with pytest.raises(ForecastError) as error:
        forecast(quadratic_case(setup=setup))
    text = str(error.value)
    assert f"test_forecast.py:{loss.__code__.co_firstlineno}"[:-1] in text or "test_forecast.py:" in text
    assert line in text
    assert remedy in text
    assert "measure()" in text


def test_an_error_of_the_users_own_stays_what_it_is():
    def setup(device):
        raise KeyError("no such file")

    with pytest.raises(KeyError) as error:
        forecast(quadratic_case(setup=setup))
    assert "forecast" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("solver", "estimator", "limit"),
    [
        (bl.Converge(bl.SGD(lr=1.0), tol=1e-3, max_steps=7), bl.Implicit(bl.Dense()), {"inner_gradient": 9}),
        (bl.Converge(bl.SGD(lr=1.0), tol=1e-3, max_steps=7), bl.Unrolled(), {"hvp": 7}),
        (bl.Descent(bl.SGD(lr=1.0), 3), bl.Implicit(bl.CG(max_steps=11, tol=0.1)), {"hvp": 11}),
        (bl.Descent(bl.SGD(lr=1.0), 3), bl.MemoryReduced(steps=13), {"hvp": 13}),
    ],
)
def test_a_tolerance_is_forecast_at_the_step_limit_and_the_record_says_so(solver, estimator, limit):
    found = forecast(quadratic_case(solver=solver, estimator=estimator))
    assert {name: found.calls[name] for name in limit} == limit
    assert any("step limit" in note for note in found.notes)


def test_what_stops_on_no_tolerance_has_no_such_note():
    assert forecast(quadratic_case()).notes == ()
    assert forecast(quadratic_case(estimator=bl.Implicit(bl.Neumann(3)))).notes == ()


def test_a_cuda_forecast_needs_no_gpu_and_says_what_it_cannot_see():
    found, cpu = forecast(quadratic_case(device="cuda")), forecast(quadratic_case())
    assert found.peak_tensor_bytes == cpu.peak_tensor_bytes
    assert found.cuda_requested_bytes == cpu.base_tensor_bytes + cpu.peak_tensor_bytes
    assert found.cuda_allocated_bytes % 512 == 0
    assert found.cuda_allocated_bytes >= found.cuda_requested_bytes
    assert found.cuda_reserved_bytes is None
    assert any("workspaces" in note and "fragmentation" in note for note in found.notes)


def test_a_recommendation_for_a_gpu_needs_none():
    found = recommend(quadratic_case(device="cuda"), "1GiB", estimators={"unrolled": bl.Unrolled()})
    assert found[0].fits
    assert found[0].forecast.device == "cuda"


def test_a_roofline_is_the_longer_of_computing_and_moving():
    slow = Device("slow", {"float32": 1e9}, bandwidth=1e9, memory=2**30)
    product = forecast(lambda: torch.ones(512, 512) @ torch.ones(512, 512), on=slow)
    filled, computed = 2 * 512 * 512 * 4 / 1e9, 2 * 512**3 / 1e9
    assert product.roofline_seconds == pytest.approx(filled + computed)
    assert product.roofline_device == "slow"
    assert forecast(lambda: torch.ones(10), on="a100").roofline_device == DEVICES["a100"].name


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: forecast(quadratic_case(), on="a1000"), ValueError, "h100"),
        (lambda: forecast(3), TypeError, "a Case or a function"),
        (lambda: Device("none", {}, 1.0, 1), ValueError, "float32"),
    ],
)
def test_bad_input(call, error, said):
    with pytest.raises(error, match=said):
        call()


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9),
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_a_forecast_of_its_step_as_if_there_had_been_none(name, begun):
    def trained(forecast_it):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        data, optimizer = torch.randn(8, 4), OPTIMIZERS[name](net.parameters())

        def step():
            optimizer.zero_grad()
            net(data).square().mean().backward()
            optimizer.step()

        for index in range(begun + 3):
            if index == begun and forecast_it:
                assert forecast(step).peak_tensor_bytes > 0  # and no warning of what is left over
            step()
        return [*net.state_dict().values(), *(leaf.grad for leaf in net.parameters())], optimizer.state_dict()

    (tensors, state), (others, other) = trained(True), trained(False)
    assert all(map(torch.equal, tensors, others))
    assert str(state) == str(other)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forecast_on_cuda_is_what_the_allocator_was_asked_for():
    case = quadratic_case(device="cuda")
    found, real = forecast(case), measure(case, repeats=1, errors=False)
    assert found.peak_tensor_bytes == real.peak_tensor_bytes
