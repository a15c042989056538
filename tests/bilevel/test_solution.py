"""bl.solution: the inner solution in the caller's graph, with any estimator for its backward."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.testing.catalogue import ENTRIES
from bilevel.testing.catalogue.quadratic import Quadratic

DOUBLE = torch.float64
NONE = bl.Batches(None, None)
EXACT = bl.Implicit(bl.CG(60, tol=1e-14))
UNROLLED = bl.Unrolled()
DENSE = bl.Implicit(bl.Dense())
GD = bl.Descent(bl.SGD(lr=0.4), steps=60)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(value):
    return value.detach().clone().requires_grad_()


A, B = normal(12, 3), normal(12, seed=1)


def smooth(y, x, batch):
    """Strongly convex in y, with derivatives of every order; P = 4, Q = 15."""
    error = A @ y["w"] + y["c"] - B
    fit = (F.softplus(x["s"]) * error.square()).mean() / 2 + (y["w"] ** 4).sum() / 40
    return fit + (x["p"].exp() * y["w"].square()).sum() / 2 + y["c"] ** 2 / 2


SMOOTH = bl.Problem(smooth, smooth)


def point(dtype=DOUBLE):
    return {"s": leaf(normal(12, seed=2, dtype=dtype)), "p": leaf(0.3 * normal(3, seed=3, dtype=dtype))}


def zeros(dtype=DOUBLE):
    return {"w": torch.zeros(3, dtype=dtype), "c": torch.zeros((), dtype=dtype)}


def solved(x, estimator=EXACT, solver=GD, problem=SMOOTH, inner=None, batches=NONE, **more):
    return bl.solution(
        problem, x, zeros() if inner is None else inner, batches, solver=solver, estimator=estimator, **more
    )


def product(y, x, w, **more):
    return torch.autograd.grad(list(y.values()), list(x.values()), list(w.values()), **more)


W = {"w": normal(3, seed=5), "c": normal(seed=6)}


# --- the backward is the estimator


def paired(w):
    """The outer loss of a layer at the solution that an estimator starts from."""

    def loss(y, x, batch):
        return sum(((y[name] - batch[name]) * w[name]).sum() for name in w)

    return loss


@dataclasses.dataclass(frozen=True)
class Own(bl.Estimator):
    """A user's: one product with a step's derivative, from the solution."""

    sees = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS})

    def estimate(self, instance, state):
        found = instance.solve()
        loss, in_y, direct = instance.oracles.outer_gradient(found.inner)
        at = instance.oracles.linearize(found.inner, found.steps)
        mixed = at.mixed_alone(in_y)
        grad = [d if m is None else -m if d is None else d - m for d, m in zip(direct, mixed, strict=True)]
        return instance.finish(found, tuple(grad), loss)


def carries(entry):
    q = Quadratic.example(steps=6)
    return entry.estimator.init_state(instance_of(q)) is not None


def instance_of(q):
    from bilevel.estimators.base import Instance

    posed = q.posed()
    return Instance(*(posed[name] for name in ("problem", "outer", "inner", "batches", "solver")))


FIT = {
    entry.label: entry.estimator
    for entry in ENTRIES
    if not entry.estimator.unlike_a_layer and bl.Path.INNER_LOSS in entry.sees and not carries(entry)
} | {"own": Own()}


@pytest.mark.filterwarnings("ignore:.*linear solver")
@pytest.mark.parametrize("label", FIT)
def test_a_backward_is_the_estimator_at_the_arriving_cotangent(label):
    """hypergradient() of the outer loss <w, y - y*>, to the last digits, from the same random numbers."""
    posed = Quadratic.example(steps=30).posed()
    w = {"a": 0.3 * normal(2, 1, seed=7), "b": 0.5 * normal(2, seed=8)}
    size = sum(each.square().sum() for each in w.values()).sqrt()
    w = {name: each / size for name, each in w.items()}  # then no scale comes in between
    x = {name: leaf(each) for name, each in posed["outer"].items()}
    torch.manual_seed(3)
    y = bl.solution(
        posed["problem"],
        x,
        posed["inner"],
        NONE,
        solver=posed["solver"],
        estimator=FIT[label],
        on_failure="warn",
    )
    found = product(y, x, w)
    posed |= {
        "problem": bl.Problem(posed["problem"].inner_loss, paired(w)),
        "batches": bl.Batches(None, {name: each.detach() for name, each in y.items()}),
    }
    torch.manual_seed(3)
    wanted = bl.hypergradient(**posed, estimator=FIT[label])
    for name, each in zip(x, found, strict=True):
        torch.testing.assert_close(each, wanted.grad[name], rtol=1e-12, atol=1e-13)


COUNTED = {entry.label: entry for entry in ENTRIES if entry.label in FIT}


@pytest.mark.parametrize("label", [name for name, entry in COUNTED.items() if entry.solves(7) == 7])
def test_the_inner_solve_is_shared(label):
    """Forward and backward cost together what one hypergradient costs; two backwards one of its second halves more."""
    q, seen = Quadratic.example(steps=7), []
    posed, estimator = q.posed(), COUNTED[label].at(3)
    x = {name: leaf(each) for name, each in posed["outer"].items()}
    more = {"estimator": estimator, "on_failure": "warn", "report": seen.append}
    y = bl.solution(posed["problem"], x, posed["inner"], NONE, solver=posed["solver"], **more)
    for _ in range(2):
        sum(each.sum() for each in y.values()).backward(retain_graph=True)
    assert [each.phase for each in seen] == ["forward", "backward", "backward"]
    forward, first, second = (each.stats["calls"] for each in seen)
    hg = bl.hypergradient(**posed, estimator=estimator)
    assert forward["inner_gradient"] == 7
    saved = hg.stats["calls"]["inner_gradient"] - first["inner_gradient"]
    # (Others look at more of their inner loop than where it ends, and run it themselves.)
    shares = estimator.adjoint_solver is not None or estimator.recorded(instance_of(q)) is not None
    assert saved == 7 if shares else saved in (0, 7)
    assert {**first, "inner_gradient": 0} == {**hg.stats["calls"], "inner_gradient": 0}
    assert first == second


@pytest.mark.parametrize("label", [label for label, each in FIT.items() if each.adjoint_solver is not None])
def test_products_with_directions_are_the_jacobians_by_every_linear_solver(label):
    """Both ways: the derivative of a backward solves with the other transpose."""
    posed = Quadratic.example(steps=120).posed()
    x = {name: leaf(each) for name, each in posed["outer"].items()}
    y = bl.solution(posed["problem"], x, posed["inner"], NONE, solver=posed["solver"], estimator=FIT[label])
    d = {name: normal(*each.shape, seed=3) for name, each in x.items()}
    rows, found = bl.layer.jacobian(y, x, chunk=4), bl.layer.jvp(y, x, d)
    for name, row in rows.items():
        wanted = sum(torch.tensordot(row[each], d[each], d[each].dim()) for each in d)
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("label", ["corrected", "implicit cg", "iterates"])
def test_the_scale_of_a_loss_does_not_matter(label, factor):
    """As autograd has it: a loss scaled for mixed precision, or divided by a count, has the scaled gradient."""
    x = point()
    y = solved(x, FIT[label])
    plain = product(y, x, W, retain_graph=True)
    scaled = product(y, x, {name: factor * each for name, each in W.items()})
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b / factor, a, rtol=1e-6, atol=0)


def test_a_cotangent_of_zeros_or_nan_is_passed_on():
    x = point()
    y = solved(x)
    zero = product(y, x, {name: 0 * each for name, each in W.items()}, retain_graph=True)
    assert all(not each.any() for each in zero)
    nan = product(y, x, {name: each * torch.nan for name, each in W.items()})
    assert all(each.isnan().all() for each in nan)


# --- derivatives


SMALL = {"w": zeros()["w"], "c": zeros()["c"]}
ONCE_MORE = {
    "implicit": (EXACT, bl.Descent(bl.SGD(lr=0.5), steps=60)),
    "dense": (bl.Implicit(bl.Dense()), bl.Converge(bl.SGD(lr=0.5), tol=1e-11, max_steps=200)),
    "memory reduced": (bl.MemoryReduced(tol=1e-14), bl.Descent(bl.SGD(lr=0.5, momentum=0.1), steps=80)),
    "unrolled": (bl.Unrolled(), bl.Descent(bl.SGD(lr=0.5), steps=4)),
    "unrolled Adam": (bl.Unrolled(), bl.Descent(bl.Adam(lr=0.1), steps=3)),
    "weight decay": (EXACT, bl.Descent(bl.SGD(lr=0.4, weight_decay=0.2), steps=60)),
}


@pytest.mark.parametrize("label", ONCE_MORE)
def test_first_and_second_derivatives_equal_finite_differences(label):
    estimator, solver = ONCE_MORE[label]
    inputs, targets = A[:5], B[:5]

    def loss(y, x, batch):
        error = inputs @ y["w"] + y["c"] - targets
        fit = (F.softplus(x["s"]) * error.square()).mean() / 2 + (y["w"] ** 4).sum() / 40
        return fit + (x["p"].exp() * y["w"].square()).sum() / 2 + y["c"] ** 2 / 2

    problem = bl.Problem(loss, loss)

    def layer(s, p):
        y = solved({"s": s, "p": p}, estimator, solver, problem)
        return y["w"], y["c"]

    at = leaf(normal(5, seed=2)), leaf(0.3 * normal(seed=3))
    assert torch.autograd.gradcheck(layer, at, atol=1e-8, rtol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, at, atol=1e-8, rtol=1e-6, fast_mode=True)


def ridge(x):
    """argmin |A w - B|^2 / 24 + exp(p)' w^2 / 2 in closed form."""
    return torch.linalg.solve(A.T @ A / 12 + torch.diag(x["p"].exp()), A.T @ B / 12)


def ridge_loss(w, x, batch):
    return (A @ w - B).square().mean() / 2 + (x["p"].exp() * w.square()).sum() / 2


@pytest.mark.parametrize("estimator", [EXACT, bl.Unrolled()], ids=["implicit", "unrolled"])
def test_all_orders_up_to_the_third_equal_the_closed_form(estimator):
    x = {"p": leaf(0.3 * normal(3, seed=3))}
    y = bl.solution(
        ridge_loss, x, torch.zeros(3, dtype=DOUBLE), NONE, solver=bl.Descent(bl.SGD(lr=0.5), 70), estimator=estimator
    )
    found, wanted = y, ridge(x)
    for order in range(3):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
        weight = normal(3, seed=20 + order)
        (found,) = torch.autograd.grad((found * weight).sum(), x["p"], create_graph=True)
        (wanted,) = torch.autograd.grad((wanted * weight).sum(), x["p"], create_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("estimator", [EXACT, bl.Unrolled()], ids=["implicit", "unrolled"])
def test_jacobians_and_products_equal_the_closed_form(estimator, mode):
    x = {"p": leaf(0.3 * normal(3, seed=3)), "unused": leaf(normal(2))}
    more = {"solver": bl.Descent(bl.SGD(lr=0.5), 70), "estimator": estimator}
    with (
        pytest.warns(UserWarning, match=r"\['unused'\] does not influence")
        if mode == "reverse"
        else torch.enable_grad()
    ):
        y = bl.solution(ridge_loss, x, torch.zeros(3, dtype=DOUBLE), NONE, **more)
        found = bl.layer.jacobian(y, x, mode=mode)
    wanted = torch.autograd.functional.jacobian(lambda p: ridge({"p": p}), x["p"].detach())
    torch.testing.assert_close(found["p"], wanted, rtol=1e-9, atol=1e-10)
    assert found["unused"].shape == (3, 2)
    assert not found["unused"].any()
    if mode == "reverse":
        seen = []
        one = bl.solution(ridge_loss, {"p": x["p"]}, torch.zeros(3, dtype=DOUBLE), NONE, **more, report=seen.append)
        found = bl.layer.jacobian(one, {"p": x["p"]}, chunk=2)
        torch.testing.assert_close(found["p"], wanted, rtol=1e-9, atol=1e-10)
        assert len([each for each in seen if "rows" in each.stats]) == (2 if estimator is EXACT else 0)
    d = {"p": normal(3, seed=9), "unused": normal(2)}
    torch.testing.assert_close(bl.layer.jvp(y, x, d), wanted @ d["p"], rtol=1e-9, atol=1e-10)


def test_a_dynamics_that_is_not_symmetric_has_products_both_ways():
    """y <- T(y, x): the derivatives of a fixed point, whose H is no Hessian."""
    M = 0.3 * normal(3, 3, seed=4)

    @dataclasses.dataclass(frozen=True)
    class Map(bl.inner.Dynamics):
        def moved(self, y, x):
            return torch.tanh(M @ y + x)

        def step(self, inner, state, outer, at):
            return self.moved(inner, outer), state

        def stationarity(self, inner, outer, at):
            return inner - self.moved(inner, outer)

    x, start, solver = leaf(normal(3, seed=5)), torch.zeros(3, dtype=DOUBLE), bl.Descent(Map(), 40)
    problem = bl.Problem(lambda y, x, b: y.sum(), lambda y, x, b: y.sum())

    def layer(x, estimator=DENSE):
        return bl.solution(problem, x, start, NONE, solver=solver, estimator=estimator)

    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x,), atol=1e-7, fast_mode=True)
    y, d = layer(x), normal(3, seed=6)
    torch.testing.assert_close(bl.layer.jvp(y, x, d), bl.layer.jacobian(y, x) @ d, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="symmetric=False"):
        layer(x, EXACT).sum().backward()


def test_many_cotangents_at_once():
    """torch.func.vmap over a backward, which maps nothing of an estimator: row by row."""
    x, rows = point(), torch.eye(3, dtype=DOUBLE)
    for estimator in (EXACT, bl.Unrolled(), bl.Unrolled("iterates"), FIT["corrected"]):
        y = solved(x, estimator, bl.Descent(bl.SGD(lr=0.4), 30))

        def row(unit, y=y):
            return torch.autograd.grad(y["w"], x["p"], unit, retain_graph=True)[0]

        torch.testing.assert_close(torch.func.vmap(row)(rows), torch.stack([row(unit) for unit in rows]))
    with pytest.raises(NotImplementedError, match=r"bilevel.layer.jacobian\(y, x\)"):
        torch.autograd.grad(y["w"], x["p"], rows, is_grads_batched=True)


@pytest.mark.parametrize(
    "estimator",
    [bl.Unrolled("iterates"), bl.Unrolled("segments"), bl.FirstOrderCorrected(), Own()],
    ids=lambda each: type(each).__name__,
)
def test_what_cannot_be_differentiated_again_says_so(estimator):
    x = point()
    y = solved(x, estimator)
    with pytest.raises(bl.NotTwiceDifferentiableError, match=r"create_graph=True.*does not have"):
        torch.autograd.grad(y["w"].sum(), x["p"], create_graph=True)
    with pytest.raises(bl.NotTwiceDifferentiableError, match="Unrolled"):
        bl.layer.jvp(y, x, {name: each.detach() for name, each in x.items()})


# --- a citizen of autograd


def test_several_losses_share_one_solve_in_any_order():
    x, seen = point(), []
    y = solved(x, report=seen.append)
    one, two = y["w"].square().sum(), y["c"].sin() + x["p"].sum()
    grads = [torch.autograd.grad(each, list(x.values()), retain_graph=True) for each in (two, one)]
    assert [each.stats["calls"]["inner_gradient"] for each in seen] == [60, 1, 1]
    (one + two).backward()
    for i, each in enumerate(x.values()):
        torch.testing.assert_close(each.grad, grads[0][i] + grads[1][i], rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        one.backward()


@pytest.mark.parametrize("changed", ["x", "constant", "y", "start", "batch", "a step's batch", "not the start"])
@pytest.mark.parametrize(
    "estimator", [EXACT, bl.Unrolled("iterates"), bl.Unrolled()], ids=["implicit", "iter", "graph"]
)
def test_what_was_changed_in_place_is_an_error(estimator, changed):
    def loss(y, x, batch):
        return (y - x["moved"] * batch).square().sum() + (x["constant"] * y.square()).sum()

    x = {"moved": leaf(normal(2)), "constant": normal(2, seed=1).abs()}
    start, batch, steps = torch.zeros(2, dtype=DOUBLE), normal(2, seed=2), [normal(2, seed=i) for i in range(3)]
    batches = bl.Batches(bl.PerStep(steps) if "step" in changed else batch, None)
    y = bl.solution(loss, x, start, batches, solver=bl.Descent(bl.SGD(lr=0.1), 3), estimator=estimator)
    chosen = {"x": x["moved"], "constant": x["constant"], "y": y, "batch": batch, "a step's batch": steps[2]}
    if changed == "not the start" or (changed == "start" and estimator is EXACT):
        if estimator is EXACT:  # it does not look there
            start.add_(1)
        y.sum().backward()
        return
    with torch.no_grad():
        chosen.get(changed, start).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_constants_of_x_get_no_gradient_and_need_not_be_seen():
    """The start enters x, which Implicit does not see: where it is a constant, nothing is missing."""
    problem = bl.Problem(lambda y, x, b: ((y - x["to"]) ** 2).sum(), smooth, init=lambda x, b: x["from"])
    x = {"to": leaf(normal(2)), "from": normal(2, seed=1)}
    more = {"solver": bl.Descent(bl.SGD(lr=0.25), 60), "estimator": EXACT}
    y = bl.solution(problem, x, None, NONE, **more)
    y.sum().backward()
    torch.testing.assert_close(x["to"].grad, torch.ones(2, dtype=DOUBLE))
    assert x["from"].grad is None
    with pytest.raises(ValueError, match=r"cannot see .* the start of the inner loop"):
        bl.solution(problem, {"to": x["to"], "from": leaf(x["from"])}, None, NONE, **more)


def test_the_start_is_followed_by_unrolling():
    problem = bl.Problem(lambda y, x, b: ((y - x["to"]) ** 2).sum(), smooth, init=lambda x, b: x["from"])
    for keep in ("graph", "iterates"):
        x = {"to": leaf(normal(2)), "from": leaf(normal(2, seed=1))}
        y = bl.solution(problem, x, None, NONE, solver=bl.Descent(bl.SGD(lr=0.25), 3), estimator=bl.Unrolled(keep))
        y.sum().backward()
        torch.testing.assert_close(x["from"].grad, torch.full((2,), 0.125, dtype=DOUBLE))
        torch.testing.assert_close(x["to"].grad, torch.full((2,), 0.875, dtype=DOUBLE))


def test_without_grad_nothing_is_followed_or_kept():
    x, seen = point(), []
    with torch.no_grad():
        y = solved(x, report=seen.append)
    assert not y["w"].requires_grad
    assert not solved({name: each.detach() for name, each in x.items()})["w"].requires_grad
    torch.testing.assert_close(y["w"], solved(x)["w"].detach())
    assert [each.phase for each in seen] == ["forward"]


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates")], ids=["graph", "iterates"])
def test_no_steps(estimator):
    """y is the start, a copy of it, and does not move with x."""
    x, start = point(), zeros()
    y = solved(x, estimator, bl.Descent(bl.SGD(0.1), 0), inner=start)
    assert y["w"].data_ptr() != start["w"].data_ptr()
    with pytest.warns(UserWarning, match=r"\['s'\], \['p'\] does not influence the inner solution"):
        assert torch.autograd.grad(y["w"].sum(), x["p"], allow_unused=True) == (None,)


def test_a_layer_is_freed_with_its_result():
    for estimator in (EXACT, bl.Unrolled(), bl.Unrolled("iterates")):
        x = point()
        y = solved(x, estimator)
        gone = [weakref.ref(each.grad_fn.rule) for each in y.values()]
        y["w"].sum().backward()
        gc.collect()
        gc.disable()
        try:
            del y
            assert [each() for each in gone] == [None, None]
        finally:
            gc.enable()


def test_a_rate_of_the_inner_optimizer_is_differentiated_where_it_is_seen():
    def layer(lr, p, estimator=UNROLLED):
        x = {"lr": lr, "p": p, "s": normal(12, seed=2)}
        return solved(x, estimator, bl.Descent(bl.SGD(lr=lambda x: x["lr"], momentum=0.3), 4))["w"]

    at = leaf(torch.tensor(0.2, dtype=DOUBLE)), leaf(0.3 * normal(3))
    assert torch.autograd.gradcheck(layer, at, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: layer(*x, bl.Unrolled("iterates")), at, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, at, fast_mode=True)
    with pytest.raises(ValueError, match=r"Implicit cannot see .*\['lr'\] through a hyper-parameter"):
        layer(*at, EXACT)


def test_a_proximal_start_is_differentiated_twice_by_implicit():
    """iMAML as a layer: y*(x) = argmin g(y) + |y - sin x|^2."""
    loss = bl.Problem(lambda y, x, b: (y**4).sum() / 5 + (y - 1).square().sum(), smooth, init=lambda x, b: x.sin())
    problem = bl.proximal(loss, 2.0)

    def layer(x):
        return bl.solution(problem, x, None, NONE, solver=bl.Descent(bl.SGD(0.15), 80), estimator=EXACT)

    assert torch.autograd.gradcheck(layer, (leaf(normal(3)),), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (leaf(normal(3)),), fast_mode=True)


def test_a_start_alone_is_followed_by_first_order():
    problem = bl.Problem(lambda y, x, b: (y - 1).square().sum(), smooth, init=lambda x, b: 2 * x)
    x = leaf(normal(3))
    more = {"solver": bl.Descent(bl.SGD(0.1), 3), "estimator": bl.FirstOrder()}
    bl.solution(problem, x, None, NONE, **more).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0, dtype=DOUBLE))


def test_cotangents_at_the_end_of_a_narrow_range():
    """|w| is beyond the largest number of float16; and below its smallest normal one."""
    x = leaf(torch.zeros(3, dtype=torch.float16))
    more = {"solver": bl.Descent(bl.SGD(0.25), 20), "estimator": bl.Unrolled("iterates")}
    y = bl.solution(lambda y, x, b: (y - x).square().sum(), x, torch.zeros_like(x), NONE, **more)
    for size in (6e4, 6e-8):
        w = torch.full((3,), size, dtype=torch.float16)
        assert torch.equal(torch.autograd.grad(y, x, w, retain_graph=True)[0], w)


def test_derivatives_through_a_network_between():
    net, inputs = nn.Linear(2, 3).double(), leaf(normal(2))
    y = solved({"p": net(inputs).tanh(), "s": normal(12)})["w"]
    rows = bl.layer.jacobian(y, inputs)
    torch.testing.assert_close(bl.layer.jacobian(y, inputs, chunk=3), rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bl.layer.jacobian(y, inputs, mode="forward"), rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bl.layer.jvp(y, inputs, torch.ones_like(inputs)), rows.sum(1), rtol=1e-9, atol=1e-12)


# --- what a forward depends on


def test_random_numbers_are_those_of_the_forward():
    """Dropout in the loss: the backward draws what the forward drew, and leaves the generator alone."""

    def loss(y, x, batch):
        return (F.dropout(A, 0.3) @ y - B).square().mean() + (x.exp() * y.square()).sum()

    for estimator in (bl.Unrolled(), bl.Unrolled("iterates"), bl.Unrolled("segments"), FIT["corrected"], EXACT):
        x, start, w = leaf(normal(3)), torch.zeros(3, dtype=DOUBLE), normal(3, seed=1)
        w = w / w.norm()
        torch.manual_seed(7)
        y = bl.solution(loss, x, start, NONE, solver=bl.Descent(bl.SGD(0.1), 6), estimator=estimator)
        torch.randn(3)
        before = torch.get_rng_state()
        for _ in range(2):
            (found,) = torch.autograd.grad(y, x, w, retain_graph=True)
            assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(7)
        problem, at = bl.Problem(loss, lambda y, x, b: ((y - b[0]) * b[1]).sum()), bl.Batches(None, (y.detach(), w))
        wanted = bl.hypergradient(problem, x, start, at, solver=bl.Descent(bl.SGD(0.1), 6), estimator=estimator)
        torch.testing.assert_close(found, wanted.grad, rtol=1e-10, atol=1e-12)


def test_random_numbers_are_those_of_the_forward_in_second_derivatives_too():
    def loss(y, x, batch):
        return (F.dropout(A, 0.3) @ y - B).square().mean() + (x.exp() * y.square()).sum() + (y**4).sum()

    problem = bl.Problem(loss, loss)

    def layer(x):
        torch.manual_seed(0)
        more = {"solver": bl.Descent(bl.SGD(0.1), 4), "estimator": UNROLLED}
        return bl.solution(problem, x, torch.zeros(3, dtype=DOUBLE), NONE, **more)

    assert torch.autograd.gradgradcheck(layer, (leaf(normal(3)),), fast_mode=True)


def test_features_are_made_once_and_drawn_again_alike():
    calls = []

    def features(x, batch):
        calls.append(1)
        return F.dropout(torch.tanh(A * x["scale"]), 0.3)

    def loss(y, x, z):
        return (z @ y - B).square().mean() + (x["p"].exp() * y.square()).sum()

    problem = bl.Problem(loss, loss, features=features)
    for estimator in (EXACT, bl.Unrolled(), bl.Unrolled("iterates")):
        x = {"scale": leaf(normal(3)), "p": leaf(normal(3, seed=1))}

        def layer(scale, p, estimator=estimator):
            torch.manual_seed(1)
            more = {"solver": bl.Descent(bl.SGD(0.25), 60), "estimator": estimator}
            return bl.solution(problem, {"scale": scale, "p": p}, torch.zeros(3, dtype=DOUBLE), NONE, **more)

        calls.clear()
        layer(**x).sum().backward()
        assert len(calls) <= 4  # not once a step
        assert torch.autograd.gradcheck(layer, tuple(x.values()), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("estimator", [EXACT, bl.Unrolled("iterates"), bl.Unrolled()], ids=["cg", "iterates", "graph"])
def test_steps_with_batches_of_their_own(estimator):
    """The same as hypergradient with the same PerStep, at <w, y>."""

    def loss(y, x, batch):
        inputs, targets = batch
        return (inputs @ y - targets).square().mean() + (x.exp() * y.square()).sum()

    steps = [(normal(4, 3, seed=i), normal(4, seed=90 + i)) for i in range(5)]
    x, start, w = leaf(normal(3)), torch.zeros(3, dtype=DOUBLE), normal(3, seed=1)
    w, solver = w / w.norm(), bl.Descent(bl.SGD(0.1), 5)
    batches = bl.Batches(bl.PerStep(steps), None, curvature=steps[0])
    y = bl.solution(loss, x, start, batches, solver=solver, estimator=estimator)
    (found,) = torch.autograd.grad(y, x, w)
    problem, batches = bl.Problem(loss, lambda y, x, b: (y * w).sum()), dataclasses.replace(batches, outer=0)
    wanted = bl.hypergradient(problem, x, start, batches, solver=solver, estimator=estimator).grad
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_autocast_is_as_it_was():
    x = point(torch.float32)
    more = {"inner": zeros(torch.float32), "estimator": bl.Implicit(bl.CG(30, tol=1e-6))}

    def loss(y, x, batch):
        error = (A.float() @ y["w"].unsqueeze(1)).squeeze(1).float() + y["c"] - B.float()
        return (
            (F.softplus(x["s"]) * error.square()).mean() / 2 + (x["p"].exp() * y["w"].square()).sum() / 2 + y["c"] ** 2
        )

    problem, grads = bl.Problem(loss, loss), []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = solved(x, problem=problem, **more)
            if inside:
                grads.append(torch.autograd.grad(y["w"].sum(), x["p"])[0])
        if not inside:
            grads.append(torch.autograd.grad(y["w"].sum(), x["p"])[0])
    plain = torch.autograd.grad(solved(x, problem=problem, **more)["w"].sum(), x["p"])[0]
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], plain)


def test_an_engine_is_used_in_both_directions():
    x, seen = point(), []
    y = solved(x, engine=bl.Compiled(backend="graph", check=False), report=seen.append)
    found = product(y, x, W, retain_graph=True)
    assert all("engine" in each.stats for each in seen)
    wanted = product(solved(x), x, W)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # The second derivative is the eager engine's, of Implicit; a tape of compiled steps has none.
    grad = torch.autograd.grad(y["w"].sum(), x["p"], create_graph=True)[0].sum()
    other = torch.autograd.grad(solved(x)["w"].sum(), x["p"], create_graph=True)[0].sum()
    torch.testing.assert_close(
        torch.autograd.grad(grad, x["s"])[0], torch.autograd.grad(other, x["s"])[0], rtol=1e-8, atol=1e-11
    )
    tape = solved(x, bl.Unrolled(), bl.Descent(bl.SGD(0.4), 5), engine=bl.Compiled(backend="graph"))
    with pytest.raises(bl.NotTwiceDifferentiableError, match="eager engine"):
        torch.autograd.grad(tape["w"].sum(), x["p"], create_graph=True)


# --- kinds of variables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    wanted, exact = point(), None
    exact = product(solved(wanted), wanted, W)
    x = point(dtype)

    def loss(y, x, batch):
        error = A.to(dtype) @ y["w"] + y["c"] - B.to(dtype)
        fit = (F.softplus(x["s"]) * error.square()).mean() / 2 + (y["w"] ** 4).sum() / 40
        return fit + (x["p"].exp() * y["w"].square()).sum() / 2 + y["c"] ** 2 / 2

    y = solved(x, bl.Implicit(bl.CG(10)), problem=bl.Problem(loss, loss), inner=zeros(dtype))
    found = product(y, x, {name: each.to(dtype) for name, each in W.items()})
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=float(b.norm()) * (1e-4 if dtype == torch.float32 else 0.2)
        )


def test_nested_trees_and_parts_of_y_that_nobody_uses():
    x = {"a": [leaf(normal(2)), leaf(normal(2, seed=1))], "b": (leaf(normal(seed=2)),)}

    def loss(y, x, batch):
        first, (second, third) = y["u"], y["v"]
        own = (first - x["a"][0] * x["b"][0]).square().sum() + (second - x["a"][1]).square().sum()
        return own + (third - second.sum()).square()

    inner = {"u": torch.zeros(2, dtype=DOUBLE), "v": (torch.zeros(2, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE))}
    y = bl.solution(loss, x, inner, NONE, solver=bl.Descent(bl.SGD(0.2), 400), estimator=EXACT)
    assert isinstance(y["v"], tuple)
    y["v"][1].backward()
    torch.testing.assert_close(x["a"][1].grad, torch.ones(2, dtype=DOUBLE))
    assert not x["a"][0].grad.any()


class Penalties(nn.Module):
    """A network that says how the inner problem is to be solved, and one that uses what was found."""

    def __init__(self, estimator):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.estimator = nn.Linear(3, 3), nn.Linear(3, 1), estimator
        self.problem = bl.Problem(ridge_loss, ridge_loss)

    def forward(self, inputs):
        x = {"p": self.body(inputs)}
        more = {"solver": bl.Descent(bl.SGD(lr=0.2), 80), "estimator": self.estimator}
        return self.head(bl.solution(self.problem, x, torch.zeros(3, dtype=DOUBLE), NONE, **more))


@pytest.mark.parametrize("label", ["implicit cg", "graph", "segments", "corrected"])
def test_a_module_with_a_layer_inside_trains_as_with_the_closed_form(label):
    net, inputs = Penalties(FIT[label]).double(), 0.3 * normal(3, seed=11)
    losses = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        loss = (net(inputs) - 2).square().sum()
        closed = (net.head(ridge({"p": net.body(inputs)})) - 2).square().sum()
        wanted = torch.autograd.grad(closed, list(net.parameters()))
        optimizer.zero_grad()
        loss.backward()
        for parameter, each in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, each, rtol=1e-5, atol=1e-7)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # The same as a function of its parameters.
    params = {name: leaf(each) for name, each in net.named_parameters()}
    (torch.func.functional_call(net, params, (inputs,)) - 2).square().sum().backward()
    assert all(each.grad is not None for each in params.values())


# --- tasks


@pytest.mark.parametrize("chunk", [None, 2, 1])
@pytest.mark.parametrize("label", ["implicit cg", "graph", "iterates", "corrected"])
def test_tasks_are_layers_side_by_side(label, chunk):
    data = normal(5, 12, seed=4)
    weight = normal(5, 3, seed=5)

    def loss(w, x, batch):
        return (A @ w - batch).square().mean() / 2 + (x["p"].exp() * w.square()).sum() / 2

    x, problem = {"p": leaf(0.3 * normal(3, seed=3))}, bl.Problem(loss, loss)
    more, start = {"solver": bl.Descent(bl.SGD(lr=0.4), 12)}, torch.zeros(3, dtype=DOUBLE)
    estimator = FIT[label]
    alone = torch.stack(
        [bl.solution(problem, x, start, bl.Batches(each, None), estimator=estimator, **more) for each in data]
    )
    together = bl.solution(
        problem, x, start.expand(5, 3), bl.Batches(data, None), estimator=bl.TaskMean(estimator, chunk), **more
    )
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    wanted, found = (
        torch.autograd.grad((each * weight).sum(), x["p"], create_graph=label in ("implicit cg", "graph"))[0]
        for each in (alone, together)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)
    if found.requires_grad:
        again = [torch.autograd.grad(each.sum(), x["p"])[0] for each in (found, wanted)]
        torch.testing.assert_close(again[0], again[1], rtol=1e-7, atol=1e-10)


# --- never silent


def test_a_failed_forward_raises_or_warns():
    x = point()
    solver = bl.Descent(bl.SGD(lr=1e3), 60)
    with pytest.raises(bl.BilevelError, match=r"the forward of bilevel.solution: DIVERGED: .*step size"):
        solved(x, solver=solver)
    seen = []
    with pytest.warns(UserWarning, match="forward of bilevel.solution: DIVERGED"):
        solved(x, solver=solver, on_failure="warn", report=seen.append)
    assert seen[0].status is bl.Status.DIVERGED


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_backward_raises_or_warns(again):
    """A saddle of the inner loss, which conjugate gradients refuse."""

    def loss(y, x, batch):
        return y[0] ** 2 - y[1] ** 2 / 100 + x * y.sum()

    x, start = leaf(normal()), torch.ones(2, dtype=DOUBLE)
    more = {"solver": bl.Descent(bl.SGD(0.1), 2), "estimator": bl.Implicit(bl.CG(20))}
    y = bl.solution(loss, x, start, NONE, **more)
    with pytest.raises(bl.BilevelError, match="NEGATIVE_CURVATURE"):
        torch.autograd.grad(y.sum(), x, create_graph=again)
    y = bl.solution(loss, x, start, NONE, on_failure="warn", **more)
    with pytest.warns(UserWarning, match="NEGATIVE_CURVATURE"):
        torch.autograd.grad(y.sum(), x, create_graph=again)


def test_unmet_tolerances_count_when_strict():
    x, seen = point(), []
    solved(x, bl.Implicit(bl.CG(1)), report=seen.append)["w"].sum().backward()
    assert [each.status.name for each in seen] == ["OK", "MAX_STEPS"]
    with pytest.raises(bl.BilevelError, match="MAX_STEPS"):
        solved(x, bl.Implicit(bl.CG(1)), strict=True)["w"].sum().backward()
    with pytest.raises(bl.BilevelError, match="INNER_MAX_STEPS"):
        solved(x, solver=bl.Converge(bl.SGD(0.4), tol=1e-12, max_steps=3), strict=True)


@pytest.mark.parametrize("again", [False, True])
def test_an_unrolled_solver_that_stopped_too_early_is_a_failure(again):
    x = point()
    with torch.no_grad():
        start = solved(x)
    solver = bl.Converge(bl.SGD(0.4), tol=1e-6, max_steps=100)
    y = solved(x, bl.Unrolled(), solver, inner=start)
    with pytest.raises(bl.BilevelError, match="STOPPED_EARLY"):
        torch.autograd.grad(y["w"].sum(), x["p"], create_graph=again)
    if again:
        with pytest.raises(bl.BilevelError, match="STOPPED_EARLY"):
            bl.layer.jvp(y, x, {name: each.detach() for name, each in x.items()})


def refused():
    x, data = point(), leaf(normal(3))
    return {
        "a state": ({"estimator": bl.MemoryReduced(warm_adjoint=True)}, "carries a state from call to call"),
        "no product": (
            {"estimator": bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(2))},
            "no product with dy/dx: its estimate is the gradient of a distance",
        ),
        "a sum over iterates": ({"estimator": bl.Unrolled(step_weights=[1.0] * 60)}, "sum over the iterates"),
        "weights of tasks": (
            {"estimator": bl.TaskMean(EXACT, weights=bl.GivenWeights([1.0, 2.0]))},
            "its weights are of the tasks' losses",
        ),
        "a batch with a graph": (
            {"batches": bl.Batches(data, None)},
            "batches are constants. Put the tensor into outer",
        ),
        "a start with a graph": ({"inner": {"w": data * 2, "c": zeros()["c"]}}, "the start is a constant"),
        "a word": ({"on_failure": "ignore"}, "'raise', 'warn' was needed"),
        "an estimator that does not see": ({"estimator": bl.FirstOrder()}, "cannot see how the outer variable acts"),
        "one start too many": (
            {"problem": bl.Problem(smooth, smooth, init=lambda x, b: zeros())},
            "one start too many",
        ),
    }, x


@pytest.mark.parametrize("label", refused()[0])
def test_what_cannot_be_right_is_refused_in_words(label):
    cases, x = refused()
    given, said = cases[label]
    with pytest.raises(ValueError, match=said):
        solved(x, **given)


@pytest.mark.parametrize("label", ["problem", "estimator", "report"])
def test_arguments_of_the_wrong_kind(label):
    x = point()
    wrong = {"problem": 3, "estimator": bl.Implicit, "report": 3}
    with pytest.raises(TypeError, match=r"was given .* was needed"):
        solved(x, **{label: wrong[label]})


def test_transforms_of_torch_func_are_refused():
    x = point()
    with pytest.raises(ValueError, match=r"inside a transform of torch.func .*TaskMean\(estimator, chunk=1\)"):
        torch.func.vmap(lambda p: solved({"s": x["s"], "p": p})["w"])(torch.zeros(2, 3, dtype=DOUBLE))


def test_bad_directions_and_words_of_derivatives():
    x = point()
    y = solved(x)
    with pytest.raises(ValueError, match="a tree like outer"):
        bl.layer.jvp(y, x, {"s": torch.zeros(3), "p": torch.zeros(3)})
    with pytest.raises(ValueError, match="mode='both'"):
        bl.layer.jacobian(y, x, mode="both")
    with pytest.raises(ValueError, match="chunk=0"):
        bl.layer.jacobian(y, x, chunk=0)
    with pytest.raises(ValueError, match="without a graph"):
        bl.layer.jacobian({name: each.detach() for name, each in y.items()}, x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
def test_dual_numbers_are_refused():
    x = torch.zeros(3, dtype=DOUBLE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match=r"dual number .* bilevel.layer.jvp"):
            solved({"s": normal(12), "p": dual})
