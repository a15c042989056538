"""A second stranger at the engines: compiled blocks, closures and what stands in arguments; right, or refused."""

import math
import types

import pytest
import torch
from engine_pairs import same
from torch import nn
from torch.nn import functional as F

import bilevel as bl

D = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=G, dtype=D)
W = 0.5 * torch.randn(4, 4, generator=G, dtype=D)
OUTER = torch.linspace(-1, 1, 6, dtype=D)
BATCHES = bl.Batches(X, X / 2)
CHECKED = pytest.mark.parametrize("check", [True, False])


def problem(apply):
    return bl.Problem(
        lambda y, x, b: (x.sigmoid() * apply(y, x, b).square().mean(1)).mean() + 0.5 * y.square().sum(),
        lambda y, x, b: (apply(y, x, b) - 1).square().mean(),
    )


def each(apply, change, check, times=3):
    """Calls of one problem with an engine and without, with a change between."""
    engine, one = bl.Compiled(backend="graph", check=check), problem(apply)
    for step in range(times):
        change(step)
        same(one, OUTER, W, BATCHES, engine=engine)


class Settings:
    """An object that says nothing of what is in it."""

    def __init__(self):
        self.scale = 1.0


@CHECKED
def test_an_object_among_the_arguments_of_a_block_is_read_anew(check):
    settings, block = Settings(), bl.rematerialize(lambda h, w, s: torch.tanh(h @ w) * s.scale)
    each(
        lambda y, x, b: block(block(b, y, settings), y, settings), lambda n: setattr(settings, "scale", 1.0 + n), check
    )


@CHECKED
def test_a_function_made_anew_among_the_arguments_of_a_block(check):
    settings, block = Settings(), bl.rematerialize(lambda h, w, f: f(h @ w))

    def times(scale):
        return lambda h: torch.tanh(h) * scale

    each(lambda y, x, b: block(b, y, times(settings.scale)), lambda n: setattr(settings, "scale", 1.0 + n), check)


@CHECKED
def test_a_layer_among_the_arguments_of_a_block_whose_mode_changes(check):
    layer, block = nn.Dropout(0.5), bl.rematerialize(lambda h, w, drop: drop(torch.tanh(h @ w)))
    each(lambda y, x, b: block(b, y, layer), lambda n: layer.train(n % 2 == 1), check)


def test_an_argument_that_is_another_object_at_each_call_leaves_few_traces():
    def made():
        settings = Settings()
        settings.scale = 2.0
        return settings

    block = bl.rematerialize(lambda h, w, s: torch.tanh(h @ w) * s.scale)
    same(problem(lambda y, x, b: block(b, y, made())), OUTER, W, BATCHES, solver=bl.Descent(bl.SGD(0.05), 30))


@CHECKED
@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.tanh, torch.sin), (F.softmax, F.log_softmax), (math.sin, math.cos)],
)
def test_a_builtin_function_that_is_exchanged(first, second, check):
    settings = types.SimpleNamespace(f=first)

    def apply(y, x, b):
        h = b @ y
        return (
            settings.f(h, dim=1) if first is F.softmax else h * settings.f(0.3) if first is math.sin else settings.f(h)
        )

    each(apply, lambda n: setattr(settings, "f", (first, second)[n % 2]), check)


@CHECKED
def test_a_class_that_is_exchanged(check):
    settings = types.SimpleNamespace(kind=torch.distributions.Normal)

    def apply(y, x, b):
        return settings.kind(0.0, 1.0, validate_args=False).log_prob(b @ y)

    kinds = torch.distributions.Normal, torch.distributions.Gumbel
    each(apply, lambda n: setattr(settings, "kind", kinds[n % 2]), check)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4, dtype=D), nn.Dropout(0.3)

    def forward(self, h):
        return h + self.drop(torch.tanh(self.linear(h)))


class Segment(nn.Sequential):
    pass


@CHECKED
@pytest.mark.parametrize("estimator", [bl.Unrolled("iterates"), bl.Implicit(bl.CG(3))], ids=["iterates", "cg"])
def test_compiled_blocks_in_blocks_drop_the_same_units_again(estimator, check):
    torch.manual_seed(0)
    net = nn.Sequential(Segment(Layer(), Layer()), Segment(Layer()))
    call, params = bl.functional(net, requires_grad=False, rematerialize=(Segment, Layer))
    plain = bl.functional(net, requires_grad=False)[0]

    def one(run):
        return bl.Problem(
            lambda y, x, b: (
                (x.sigmoid() * run(y, b).square().mean(1)).mean() + sum(p.square().sum() for p in y.values())
            ),
            lambda y, x, b: (run(y, b) - 1).square().mean(),
        )

    found, wanted = [], []
    for run, engine, results in ((call, bl.Compiled(backend="graph", check=check), found), (plain, None, wanted)):
        torch.manual_seed(1)
        solver = bl.Descent(bl.SGD(0.05), 3)
        hg = bl.hypergradient(one(run), OUTER, params, BATCHES, solver=solver, estimator=estimator, engine=engine)
        results += [hg.grad, torch.rand(3)]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("use", ["leaf", "computed"])
def test_a_compiled_block_that_reads_the_outer_variable_from_its_closure(use):
    def apply(y, x, b):
        z = x[0] if use == "leaf" else x.sigmoid().sum()
        return bl.rematerialize(lambda h, w: torch.tanh(h @ w) * z)(b, y)

    for estimator in (bl.Unrolled("iterates"), bl.Implicit(bl.CG(5))):
        same(problem(apply), OUTER, W, BATCHES, estimator=estimator)


@pytest.mark.parametrize("engine", [None, bl.Compiled(backend="graph")], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_closure_in_a_loop_is_refused(kind, engine):
    def apply(y, x, b):
        h = b
        for k in (1.0, 2.0):
            c = k if kind == "number" else torch.full((4,), k, dtype=D)
            h = bl.rematerialize(lambda h, w: torch.tanh(h @ w) * c)(h, y)  # noqa: B023
        return h

    with pytest.raises(ValueError, match="'c' of the function around it"):
        bl.hypergradient(
            problem(apply),
            OUTER,
            W,
            BATCHES,
            solver=bl.Descent(bl.SGD(0.05), 2),
            estimator=bl.Unrolled(),
            engine=engine,
        )


def test_a_block_may_count_its_calls():
    count = 0

    def counting(h, w):
        nonlocal count
        count += 1
        return torch.tanh(h @ w)

    block, w = bl.rematerialize(counting), W.clone().requires_grad_()
    (found,) = torch.autograd.grad(block(block(X, w), w).sum(), w)
    (wanted,) = torch.autograd.grad(torch.tanh(torch.tanh(X @ w) @ w).sum(), w)
    torch.testing.assert_close(found, wanted)
    assert count > 2


@pytest.mark.parametrize("engine", [None, bl.Compiled(backend="graph")], ids=["eager", "graph"])
@pytest.mark.parametrize("blocks", [None, nn.Linear], ids=["plain", "blocks"])
def test_a_problem_on_the_meta_device_runs_with_blocks_and_engines(blocks, engine):
    call, params = bl.functional(nn.Sequential(nn.Linear(3, 1)).to("meta"), requires_grad=False, rematerialize=blocks)
    one = bl.Problem(lambda y, x, b: (x * call(y, b).square().mean(1)).mean(), lambda y, x, b: call(y, b).mean())
    x, batch = torch.ones(4, device="meta"), torch.ones(4, 3, device="meta")
    hg = bl.hypergradient(
        one,
        x,
        params,
        bl.Batches(batch, batch),
        solver=bl.Descent(bl.SGD(0.1), 2),
        estimator=bl.Unrolled("iterates"),
        engine=engine,
    )
    assert (hg.grad.device.type, hg.grad.shape) == ("meta", (4,))


def _conjugates(held):
    def inner(y, x, batch):
        z = batch if held is None else held[0]
        return ((y - x) ** 2).sum() + 0.1 * (y * z.real).square().sum() + 0.1 * (y * x * (z * z).imag).sum()

    problem = bl.Problem(inner, lambda y, x, b: (y**2).sum() + (y * x).sum())

    def grad(each, engine):
        torch.manual_seed(0)
        x, y = torch.randn(3).double(), torch.zeros(3).double()
        how = {"solver": bl.Descent(bl.SGD(0.1), 3), "estimator": bl.Unrolled("iterates"), "engine": engine}
        return bl.hypergradient(problem, x, y, bl.Batches(each, each), **how).grad

    return grad


def test_a_conjugate_that_is_yet_to_be_computed_is_the_same_graph():
    numbers, grad = torch.randn(3, dtype=torch.complex128), _conjugates(None)
    for each in (numbers, numbers.conj(), numbers, numbers.conj()):
        found = grad(each, bl.Compiled(backend="graph"))
        torch.testing.assert_close(found, grad(each, None), rtol=1e-12, atol=0)


def test_a_conjugate_in_a_closure_is_computed_or_refused():
    numbers = torch.randn(3, dtype=torch.complex128)
    with pytest.raises(bl.NotTraceableError, match="resolve_conj"):
        _conjugates([numbers.conj()])(numbers, bl.Compiled(backend="graph"))
    grad = _conjugates([numbers.conj().resolve_conj()])
    torch.testing.assert_close(grad(numbers, bl.Compiled(backend="graph")), grad(numbers, None), rtol=1e-12, atol=0)
