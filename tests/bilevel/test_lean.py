"""What the eager engine leaves out is not missed: the same numbers, residuals and refusals for less work."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bilevel as bl
from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.inner import loop
from bilevel.linear.cg import PreparedCG
from bilevel.space.inner_product import Space, _norms

D = torch.float64


def spd(size, condition, seed, dtype=D):
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=D)).Q
    return (basis @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=D)) @ basis.T).to(dtype)


# --- a residual that a solver is sure of


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("warm", [False, True])
def test_a_residual_that_cg_is_sure_of_is_the_true_one(dtype, warm):
    sure = []
    for seed in range(6):
        for condition in (10.0, 1e3, 1e6):
            for steps in (1, 2, 5, 20, 60):
                A = spd(40, condition, seed, dtype)
                b = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=dtype)
                start = (torch.randn(40, generator=torch.Generator().manual_seed(9), dtype=dtype) / condition,)
                solver = bl.CG(steps, tol=0.0, damping=0.1)
                found = solver.prepare(lambda v, A=A: (A @ v[0],)).iterate((b,), start if warm else None)
                true = (b - A @ found.value[0] - 0.1 * found.value[0]).double().norm() / b.double().norm()
                if found.sure:
                    assert found.residual.item() == pytest.approx(true.item(), rel=0.1)
                    assert true < 0.95
                sure.append(found.sure)
    assert 10 < sum(sure) < len(sure)


def test_cg_is_not_sure_where_it_has_met_the_limits_of_the_dtype():
    A, b = spd(30, 1e4, 0, torch.float32), torch.ones(30)
    found = bl.CG(200, tol=0.0).prepare(lambda v: (A @ v[0],)).iterate((b,))
    assert found.residual < 1e-5
    assert not found.sure


def test_cg_is_not_sure_of_a_product_that_changes():
    A, calls = spd(30, 100.0, 0), []

    def changing(v):
        calls.append(1)
        kept = torch.rand(30, generator=torch.Generator().manual_seed(len(calls)), dtype=D) < 0.9
        return (A @ v[0] * kept,)

    for steps in (2, 5, 10):
        calls.clear()
        assert not bl.CG(steps, tol=0.0).prepare(changing).iterate((torch.ones(30, dtype=D),)).sure


@pytest.mark.parametrize("steps", [3, 6, 12])
def test_cg_is_not_sure_of_noise_nor_of_a_matrix_that_is_not_symmetric(steps):
    A, draw = spd(30, 100.0, 1), torch.Generator().manual_seed(0)
    skew = torch.triu(torch.ones(30, 30, dtype=D), 1)
    noisy = lambda v: (A @ v[0] + 0.5 * torch.randn(30, generator=draw, dtype=D),)  # noqa: E731
    skewed = lambda v: (A @ v[0] + 3 * (skew - skew.T) @ v[0],)  # noqa: E731
    b = torch.randn(30, generator=draw, dtype=D)
    for function in (noisy, skewed):
        found = bl.CG(steps, tol=0.0).prepare(function).iterate((b,))
        assert not found.sure


def test_with_tasks_every_one_must_be_sure():
    A = torch.stack([spd(10, 100.0, 0), spd(10, 100.0, 1)])
    space = Space(tasks=2)
    b = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), dtype=D)
    of = lambda b: bl.CG(4, tol=0.0).prepare(lambda v: ((A @ v[0].unsqueeze(2)).squeeze(2),), space).iterate((b,))  # noqa: E731
    assert of(b).sure
    b[1] = 0
    assert not of(b).sure


# --- the mixed product without H v


def weighted(dtype=D):
    """A ridge net whose examples are weighted by x, and its features."""
    draw = torch.Generator().manual_seed(0)
    inputs, labels = (torch.randn(12, n, generator=draw, dtype=dtype) for n in (5, 2))

    def inner_loss(y, x, z):
        losses = ((z @ y["a"] + y["b"]).tanh() - labels).square().mean(1)
        return (x["w"].sigmoid() * losses).mean() + 0.05 * sum(leaf.square().sum() for leaf in y.values())

    def outer_loss(y, x, z):
        return ((z @ y["a"] + y["b"]) - labels).square().mean()

    inner = {"a": torch.zeros(3, 2, dtype=dtype), "b": torch.zeros(2, dtype=dtype)}
    outer = {"w": torch.zeros(12, dtype=dtype), "m": torch.randn(5, 3, generator=draw, dtype=dtype)}
    problem = bl.Problem(inner_loss, outer_loss, features=lambda x, batch: (batch @ x["m"]).tanh())
    return problem, outer, inner, bl.Batches(inputs, inputs)


def of(estimator, **changes):
    problem, outer, inner, batches = weighted(**changes)
    return bl.hypergradient(
        problem, outer, inner, batches, solver=bl.Descent(bl.SGD(lr=0.5), steps=60), estimator=estimator
    )


@pytest.mark.parametrize("estimator", [bl.Implicit(bl.CG(3)), bl.MemoryReduced(4, warm_adjoint=True)])
def test_the_hypergradient_is_the_same_without_the_product_for_the_residual(estimator, monkeypatch):
    swept = []
    with monkeypatch.context() as patch:
        alone = PreparedCG._sure
        patch.setattr(PreparedCG, "_sure", lambda *a: swept.append(alone(*a)) or swept[-1])
        lean = of(estimator)
    monkeypatch.setattr(PreparedCG, "_sure", lambda *a: False)
    full = of(estimator)
    assert swept == [True]
    for name in ("w", "m"):
        torch.testing.assert_close(lean.grad[name], full.grad[name], rtol=1e-12, atol=1e-14)
    assert lean.status is full.status is bl.Status.MAX_STEPS
    assert lean.stats["calls"] == full.stats["calls"]
    torch.testing.assert_close(lean.stats["linear_residual"], full.stats["linear_residual"], rtol=1e-6, atol=0.0)


def test_mixed_alone_is_the_outer_part_of_mixed_and_costs_less():
    problem, outer, inner, batches = weighted()
    oracles = Oracles(problem, outer, inner, batches, bl.Descent(bl.SGD(lr=0.5), steps=1).dynamics)
    v = tuple(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3), dtype=D) for leaf in inner.values())
    whole, part = oracles.linearize(inner, 1), oracles.linearize(inner, 1)
    with FlopCounterMode(display=False) as most:
        image, mixed = whole.mixed(v)
    with FlopCounterMode(display=False) as least:
        alone = part.mixed_alone(v)
    assert len(image) == 2
    for a, b in zip(mixed, alone, strict=True):
        torch.testing.assert_close(a, b)
    assert least.get_total_flops() < most.get_total_flops()
    with pytest.raises(AssertionError, match="freed"):
        part.matvec(v)


# --- norms


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_norm_of_all_leaves_at_once_is_that_of_one_after_another(scale, dtype):
    draw = torch.Generator().manual_seed(0)
    sizes = [(3,), (0, 2), (70, 70), (4096,), (5000,), (), (1, 2, 3)]
    x = [scale * torch.randn(size, generator=draw).to(dtype) for size in sizes]
    one_by_one = torch.linalg.vector_norm(torch.stack([_norms(leaf.reshape(1, -1), D) for leaf in x]))
    torch.testing.assert_close(Space().norm(x), one_by_one, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        Space().norm(x), torch.cat([leaf.double().reshape(-1) for leaf in x]).norm(), rtol=1e-6, atol=0.0
    )
    assert Space().norm(x).dtype == D


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_norm_hides_nothing(bad, where):
    x = [torch.ones(5), torch.ones(5000)]
    x[where][3] = bad
    assert not Space().norm(x).isfinite()


def test_leaves_at_once_keep_their_graph_and_their_dtypes():
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(Space().norm([x]), x)
    torch.testing.assert_close(grad, torch.full((3,), 3**-0.5))
    summed = Space().axpy(torch.tensor(2.0), [torch.ones(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)])
    assert [leaf.tolist() for leaf in summed] == [[3.0, 3.0], [2.0]]


# --- the loop


class Ops(TorchDispatchMode):
    """The names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_span_is_recorded_for_a_profiler_and_for_a_mode_and_for_nobody_else(monkeypatch):
    with profile(activities=[ProfilerActivity.CPU]) as found, spans.span(spans.HVP):
        pass
    assert any(event.name == spans.HVP for event in found.events())
    with Ops() as ops, spans.span(spans.HVP):
        pass
    assert any("record_function" in name for name in ops.names)
    monkeypatch.setattr(spans, "record_function", lambda name: pytest.fail("recorded for nobody"))
    heard = spans.Calls()
    with spans.listen(heard), spans.span(spans.HVP, count=3):
        pass
    assert heard.calls["hvp"] == 3


def test_a_span_ends_where_its_block_fails():
    heard = []

    class Ear:
        def enter(self, name, count):
            heard.append(name)

        def exit(self, name):
            heard.append("end")

    with spans.listen(Ear()), pytest.raises(ZeroDivisionError), spans.span("a"):
        1 / 0  # noqa: B018
    assert heard == ["a", "end"]


@pytest.mark.parametrize("rate", [1e-7, 1e-4, 1.0])
@pytest.mark.parametrize("tasks", [None, 3])
def test_what_a_plain_step_moves_is_known_from_its_gradient(rate, tasks):
    draw = torch.Generator().manual_seed(0)
    y, g = (
        [torch.randn(3, n, generator=draw, dtype=D) * 10.0 ** torch.arange(-1, 2).unsqueeze(1) for n in (4, 2)]
        for _ in range(2)
    )
    moved = [a - rate * b for a, b in zip(y, g, strict=True)]

    class Moves:
        space = Space(tasks)

    plain, other = Moves(), Moves()
    plain.dynamics = bl.Descent(bl.SGD(lr=rate), steps=1).dynamics
    other.dynamics = bl.Descent(bl.SGD(lr=rate, momentum=0.5), steps=1).dynamics
    slope = Moves.space.norm(g)
    assert torch.equal(loop._moves_on(plain, slope, y, moved), loop._moves_on(other, slope, y, moved))


def test_the_loss_may_not_change_its_arguments_at_any_step():
    seen = []

    def inner_loss(y, x, batch):
        seen.append(1)
        if len(seen) == 7:
            with torch.no_grad():
                batch += 1
        return ((y - x * batch) ** 2).sum()

    problem = bl.Problem(inner_loss, lambda y, x, b: (y**2).sum())
    with pytest.raises(ValueError, match="changed the batch in place"):
        bl.hypergradient(
            problem,
            torch.ones(2),
            torch.zeros(2),
            bl.Batches(torch.ones(2), None),
            solver=bl.Descent(bl.SGD(lr=0.1), steps=9),
            estimator=bl.Unrolled("iterates"),
        )
