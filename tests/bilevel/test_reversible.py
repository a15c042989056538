"""Reversible: every step undone to the last bit, the bits that this takes, and the gradient of the program."""

import fractions
import math

import catalogue
import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel.engine import spans
from bilevel.estimators.reverse.fixed_point import Store, ratio

D = torch.float64
REVERSIBLE = bl.estimators.Reversible()


def quadratic(size=50, dtype=D):
    g = torch.Generator().manual_seed(0)
    h, c = 0.1 + torch.rand(size, generator=g, dtype=D), torch.randn(size, generator=g, dtype=D)
    start = torch.randn(size, generator=g, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (b[0] * y.square()).sum() / 2 - x["shift"] * (b[1] * y).sum(),
        lambda y, x, b: (y - b[1]).square().sum() / 2 + sum(leaf**2 for leaf in x.values()),
    )
    x = {name: torch.tensor(value, dtype=dtype) for name, value in START.items()}
    data = [h.to(dtype), c.to(dtype)]
    return problem, x, start.to(dtype), bl.Batches(data, data)


START = {"shift": 0.7, "lr": -2.0, "momentum": 2.2, "decay": -4.0, "dampening": 0.4}
LEARNED = bl.SGD(
    lr=lambda x: x["lr"].exp(),
    momentum=lambda x: x["momentum"].sigmoid(),
    weight_decay=lambda x: x["decay"].exp(),
    dampening=lambda x: x["dampening"],
)


def grads(arguments, solver, estimator):
    hg = bl.hypergradient(*arguments, solver=solver, estimator=estimator)
    return torch.cat([leaf.reshape(-1).double() for leaf in torch.utils._pytree.tree_leaves(hg.grad)]), hg


@pytest.mark.parametrize("factor", [0.9, 0.5, 0.99, 0.123456789, 1 - 1e-6, math.pi / 4])
def test_multiplications_are_undone_bit_by_bit_and_keep_what_they_forget(factor):
    n_over_d, steps = ratio(factor), 700
    assert abs(n_over_d - fractions.Fraction(factor)) <= fractions.Fraction(1, 2**53)
    g = torch.Generator().manual_seed(0)
    v = first = torch.randint(-(2**61), 2**61, (300,), generator=g)
    store, added = Store(v), torch.randint(-(2**50), 2**50, (steps, 300), generator=g)
    for each in added:
        expected = [int(a) * n_over_d.numerator // n_over_d.denominator for a in v[:5]]
        v = store.multiply(v, n_over_d)
        assert all(0 <= int(a) - b <= 1 for a, b in zip(v[:5], expected, strict=True))
        v = v + each
    forgotten = steps * math.log2(1 / factor)
    assert forgotten <= store.bits <= forgotten + 2 * math.log2(n_over_d.denominator) + 8
    for each in reversed(added):
        v = store.divide(v - each, n_over_d)
    assert torch.equal(v, first)
    assert store.bits == 0


@pytest.mark.parametrize(("momentum", "bits", "once"), [(0.9, 0.152, 9), (0.99, 0.0145, 15)])
def test_the_history_takes_the_bits_that_the_momentum_forgets(momentum, bits, once):
    """TP10: 0.152 bits a weight and step at 0.9, 210 times less than float32 iterates; 2207 times at 0.99."""
    steps = 1000
    solver = bl.Descent(bl.SGD(0.01, momentum=momentum), steps)
    hg = bl.hypergradient(*quadratic(), solver=solver, estimator=REVERSIBLE)
    assert hg.status is bl.Status.OK
    assert bits - 5e-4 <= hg.stats["history_bits"] <= bits + 5e-4 + once / steps
    assert 32 / math.log2(1 / 0.9) == pytest.approx(210.5, abs=0.1)
    assert 32 / math.log2(1 / 0.99) == pytest.approx(2207, abs=1)


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 400])
def test_every_hyper_parameter_has_the_gradient_of_the_float64_program(steps):
    arguments, solver = quadratic(), bl.Descent(LEARNED, steps)
    (found, hg), (expected, exact) = (grads(arguments, solver, each) for each in (REVERSIBLE, bl.Unrolled("iterates")))
    assert hg.status is exact.status is bl.Status.OK
    assert (found - expected).norm() <= 1e-11 * expected.norm()
    torch.testing.assert_close(hg.inner, exact.inner, rtol=0, atol=1e-12)
    coarse, _ = grads(arguments, solver, bl.estimators.Reversible(bits=24))
    if steps > 1:
        assert 1e-10 < (coarse - expected).norm() / expected.norm() < 1e-5


def test_where_floats_run_backwards_fail():
    """TP10: reversing 200 steps of momentum 0.9 in float32 leaves an error of about 4e-2."""
    problem, x, y, batches = quadratic(dtype=torch.float32)
    h, c = batches.inner
    v, first = torch.zeros_like(y), y
    for _ in range(200):
        v = 0.9 * v + h * y - 0.7 * c
        y = y - 0.1 * v
    for _ in range(200):
        y = y + 0.1 * v
        v = (v - (h * y - 0.7 * c)) / 0.9
    assert (y - first).abs().max() > 1e-3
    solver = bl.Descent(bl.SGD(0.1, momentum=0.9), 200)
    found, hg = grads((problem, x, first, batches), solver, REVERSIBLE)
    assert hg.status is bl.Status.OK
    exact, _ = grads(quadratic(), solver, bl.Unrolled("iterates"))
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_a_net_with_its_own_batch_and_dropout_at_each_step_and_tensors_that_are_not_always_used():
    problem, outer, inner, batches = catalogue.weighted_net()
    inputs, labels = batches.inner
    inner = inner | {"late": torch.ones(3, dtype=D)}

    def inner_loss(y, x, b):
        dropped = torch.nn.functional.dropout(b[0], 0.3)
        late = (y["late"] - x["decay"]).square().sum() if b[2] in (2, 3, 6) else 0.0
        return problem.inner_loss({"a": y["a"], "b": y["b"]}, x, (dropped, b[1])) + late

    noisy = bl.Problem(
        inner_loss, lambda y, x, b: problem.outer_loss(y, x, b) + y["late"].square().sum() + x["log_lr"] ** 2
    )
    steps = [[inputs.roll(k, 0), labels.roll(k, 0), k] for k in range(8)]
    solver = bl.Descent(bl.SGD(0.1, momentum=0.8, weight_decay=0.01), 8)
    arguments, found = (noisy, outer, inner, bl.Batches(bl.PerStep(steps), batches.outer)), []
    for estimator in (REVERSIBLE, bl.Unrolled("iterates")):
        torch.manual_seed(0)
        found.append((grads(arguments, solver, estimator), torch.rand(1)))
    assert found[0][0][1].status is bl.Status.OK
    torch.testing.assert_close(found[0][0][0], found[1][0][0], rtol=1e-10, atol=1e-12)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_come_back_too(dtype):
    found, hg = grads(quadratic(dtype=dtype), bl.Descent(bl.SGD(0.1, momentum=0.9), 60), REVERSIBLE)
    exact, _ = grads(quadratic(), bl.Descent(bl.SGD(0.1, momentum=0.9), 60), bl.Unrolled())
    assert hg.status is bl.Status.OK
    assert hg.inner.dtype == dtype
    assert (found - exact).norm() < {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[
        dtype
    ] * exact.norm()


@pytest.mark.parametrize("chunk", [None, 1])
def test_tasks_and_a_start_that_is_x(chunk):
    g = torch.Generator().manual_seed(1)
    data = torch.randn(3, 4, generator=g, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: ((y - b) ** 2).sum() + 0.1 * (y - x).square().sum(),
        lambda y, x, b: (y.cos() * b).sum(),
        init=lambda x, b: x + b.sum(),
    )
    solver, found = bl.Descent(bl.SGD(0.05, momentum=0.9), 20), []
    for estimator in (REVERSIBLE, bl.Unrolled()):
        arguments = problem, torch.ones(4, dtype=D), None, bl.Batches(data, data)
        found.append(grads(arguments, solver, bl.TaskMean(estimator, chunk)))
    assert found[0][1].status is bl.Status.OK
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-11, atol=1e-12)


def test_a_gradient_that_differs_from_call_to_call_is_told():
    calls = []

    class Jitter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, weight):
            calls.append(1)
            return weight * (1 + 1e-12 * len(calls))

    problem = bl.Problem(lambda y, x, b: (x * (Jitter.apply(y) - 1) ** 2).sum(), lambda y, x, b: y.sum())
    arguments = problem, torch.tensor(0.5, dtype=D), torch.zeros(3, dtype=D), bl.Batches(None, None)
    hg = bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.1, momentum=0.9), 5), estimator=REVERSIBLE)
    assert hg.status is bl.Status.IRREVERSIBLE
    assert hg.status.failed


def test_numbers_out_of_range_are_told():
    problem, x, y, batches = quadratic()
    solver = bl.Descent(bl.SGD(0.1, momentum=0.9), 5)
    for start, steps in ((1e5 * y, 5), (y.new_full(y.shape, math.nan), 5)):
        hg = bl.hypergradient(problem, x, start, batches, solver=solver, estimator=REVERSIBLE)
        assert hg.status.failed, steps
    fits = bl.hypergradient(problem, x, 1e5 * y, batches, solver=solver, estimator=bl.estimators.Reversible(bits=40))
    assert fits.status is bl.Status.OK


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (bl.SGD(0.1), "without momentum"),
        (bl.SGD(0.1, momentum=0.9, nesterov=True), "nesterov"),
        (bl.Adam(0.1), "given Adam"),
        (bl.SGD(0.1, momentum=lambda x: 1 + x["shift"]), "below 1"),
        (bl.SGD(0.1, momentum=lambda x: 0 * x["shift"]), "above"),
        (bl.SGD(0.1, momentum=torch.full((50,), 0.9)), "one number for each tensor"),
    ],
)
def test_what_cannot_be_undone_is_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(*quadratic(), solver=bl.Descent(optimizer, 3), estimator=REVERSIBLE)


def test_a_solver_that_stops_by_itself_is_refused_and_so_are_bits_out_of_range():
    solver = bl.Converge(bl.SGD(0.1, momentum=0.9), tol=1e-3, max_steps=50)
    with pytest.raises(ValueError, match="fixed number"):
        bl.hypergradient(*quadratic(), solver=solver, estimator=REVERSIBLE)
    for wrong in (8, 60, True, 48.0):
        with pytest.raises(ValueError, match="bits="):
            bl.estimators.Reversible(wrong)


def test_memory_and_calls():
    """Three 64-bit numbers a weight, and 16 bits more at once when a store is full."""

    def peak(steps):
        problem, x, y, batches = quadratic(4_000)
        solver, calls = bl.Descent(bl.SGD(0.01, momentum=0.9), steps), spans.Calls()
        with Tensors() as meter, spans.listen(calls):
            hg = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=REVERSIBLE)
        assert hg.status is bl.Status.OK
        assert calls.calls == {"inner_gradient": 3 * steps, "outer_gradient": 1, "hvp": steps, "mixed": 0}
        return meter.peak_bytes / 4_000

    # 0.152 bits a step are 23 bits in 150 steps, which the first 62 hold.
    assert peak(150) == pytest.approx(peak(10), rel=1e-3)
    assert peak(10) < 18 * 8


def test_on_the_graph_engine():
    arguments, solver = quadratic(), bl.Descent(LEARNED, 12)
    expected, _ = grads(arguments, solver, bl.Unrolled())
    hg = bl.hypergradient(*arguments, solver=solver, estimator=REVERSIBLE, engine=bl.Compiled(backend="graph"))
    assert hg.status is bl.Status.OK
    torch.testing.assert_close(torch.stack(list(hg.grad.values())), expected, rtol=1e-11, atol=1e-12)
