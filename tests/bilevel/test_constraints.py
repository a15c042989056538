"""Constraints on the outer variable: projections after any torch optimizer's step, and unconstrained variables."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.outer import (
    Ball,
    Box,
    Exp,
    NonNegative,
    Projected,
    Sigmoid,
    Simplex,
    Softmax,
    Softplus,
    constrained,
    reparametrized,
)

D = torch.float64
NONE = bl.Batches(None, None)


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


# Projections


def by_bisection(v: Tensor, total: float) -> Tensor:
    """max(v - t, 0) with the t that makes the sum right, found without sorting."""
    low, high = v.min() - total, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (v - middle).clamp_min(0).sum() > total else (low, middle)
    return (v - low).clamp_min(0)


@pytest.mark.parametrize("total", [1.0, 7.5])
@pytest.mark.parametrize("shape", [(1,), (2,), (50,)])
def test_the_simplex_is_that_of_a_bisection(shape, total):
    for seed in range(5):
        v = 3 * draws(*shape, seed=seed)
        torch.testing.assert_close(Simplex(total)(v), by_bisection(v, total), rtol=1e-12, atol=1e-12)


def test_a_simplex_lies_along_its_dimension_and_large_numbers_keep_their_sums():
    v = 3 * draws(4, 3)
    columns = torch.stack([by_bisection(v[:, i], 2.0) for i in range(3)], 1)
    torch.testing.assert_close(Simplex(2.0, dim=0)(v), columns, rtol=1e-12, atol=1e-12)
    far = Simplex()(torch.tensor([1e8, 1e8 + 16, -1e8], dtype=torch.float32))
    assert far.tolist() == [0.0, 1.0, 0.0]
    for dtype in (torch.bfloat16, torch.float16):
        many = Simplex()(draws(1000, dtype=dtype))
        assert many.dtype == dtype
        assert many.float().sum().item() == pytest.approx(1.0, abs=1e-2)
    with pytest.raises(ValueError, match="0-dim"):
        Simplex()(torch.tensor(1.0))


PROJECTIONS = {
    "non-negative": (NonNegative(), lambda x: x.abs()),
    "box": (Box(-0.5, 0.25), lambda x: 0.75 * x.sigmoid() - 0.5),
    "half a box": (Box(0.1, float("inf")), lambda x: x.abs() + 0.1),
    "ball": (Ball(2.0, 0.3), lambda x: 0.3 + 2 * x / (1 + x.norm())),
    "simplex": (Simplex(), lambda x: x.softmax(-1)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_is_the_nearest_point_of_its_set(name):
    """<v - P v, z - P v> <= 0 for every z of the set, which the nearest point of a convex set alone has."""
    project, inside = PROJECTIONS[name]
    for seed in range(20):
        v, z = 4 * draws(6, seed=seed), inside(3 * draws(6, seed=100 + seed))
        near = project(v)
        torch.testing.assert_close(project(z), z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(project(near), near, rtol=1e-12, atol=1e-12)
        assert (v - near) @ (z - near) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), "low=1.0, high=0.0"),
        (lambda: Ball(0.0), r"radius=0\.0; a positive number"),
        (lambda: Simplex(-1.0), r"total=-1\.0; a positive number"),
        (lambda: Sigmoid(1.0, 1.0), "low < high"),
    ],
)
def test_sets_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Projected


def test_it_is_projected_gradient_descent_and_reaches_the_nearest_point():
    """min |x - v|^2 / 2 over the simplex is the projection of v."""
    v, x = 2 * draws(6), leaf(torch.full((6,), 1 / 6, dtype=D))
    optimizer = Projected(torch.optim.SGD([x], lr=0.3), Simplex())
    for _ in range(120):
        by_hand = Simplex()(x.detach() - 0.3 * (x.detach() - v))
        x.grad = (x - v).detach()
        optimizer.step()
        torch.testing.assert_close(x.detach(), by_hand, rtol=0, atol=0)
    torch.testing.assert_close(x.detach(), Simplex()(v), rtol=1e-10, atol=1e-12)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "ours": lambda params: bl.NormalizedSGD(params, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_copied_and_pickled_it_goes_on(name):
    gradients = [draws(4, seed=seed) + 1 for seed in range(8)]

    def run(break_at, how):
        x = leaf(torch.full((4,), 0.05, dtype=D))
        optimizer = Projected(OPTIMIZERS[name]([x]), NonNegative())
        for index, gradient in enumerate(gradients):
            if index == break_at and how == "state":
                saved = copy.deepcopy(optimizer.state_dict())
                x = leaf(x.detach())
                optimizer = Projected(OPTIMIZERS[name]([x]), NonNegative())
                optimizer.load_state_dict(saved)
            elif index == break_at:
                optimizer = copy.deepcopy(optimizer) if how == "copy" else pickle.loads(pickle.dumps(optimizer))
                (x,) = optimizer.param_groups[0]["params"]
            x.grad = gradient.clone()
            optimizer.step()
        return x.detach()

    whole = run(-1, "")
    assert (whole >= 0).all()
    assert (whole == 0).any()
    for how in ("state", "copy", "pickle"):
        assert torch.equal(run(4, how), whole)


def test_schedulers_closures_scalers_groups_and_hooks_see_one_optimizer():
    x, z = leaf(torch.ones(2, dtype=D)), leaf(torch.tensor([0.25, 0.75], dtype=D))
    inner = torch.optim.SGD([x], lr=1.0)
    optimizer = Projected(inner, {x: Box(0.0, 1.0)})
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def closure():
        optimizer.zero_grad()
        loss = (3 * x).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert x.tolist() == [0.0, 0.0]
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.5
    assert steps == [1]
    optimizer.add_param_group({"params": [z], "lr": 0.1})
    assert len(inner.param_groups) == 2
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    x.grad, z.grad = None, 4 * torch.ones_like(z)
    scaler.step(optimizer)
    assert z.tolist() == pytest.approx([0.15, 0.65])
    scaler.update()
    z.grad = torch.full_like(z, float("inf"))
    scaler.step(optimizer)
    assert z.tolist() == pytest.approx([0.15, 0.65])
    lbfgs = Projected(torch.optim.LBFGS([x], lr=1.0), NonNegative())

    def quadratic():
        lbfgs.zero_grad()
        loss = (x + 1).square().sum()
        loss.backward()
        return loss

    lbfgs.step(quadratic)
    assert x.tolist() == [0.0, 0.0]


def test_parameters_are_found_by_their_names():
    model = torch.nn.Linear(2, 1)
    model.weight.data.abs_()
    named = torch.optim.SGD(model.named_parameters(), lr=1.0)
    optimizer = Projected(named, {"weight": NonNegative()})
    model.weight.grad, model.bias.grad = torch.full((1, 2), 9.0), torch.full((1,), 9.0)
    optimizer.step()
    assert (model.weight == 0).all()
    assert model.bias.item() < -5


@pytest.mark.parametrize(
    ("projections", "start", "message"),
    [
        (lambda x: x / 2, 0.5, "moves a point that it has returned"),
        (lambda x: x.clamp_(0), 0.5, "changed its argument in place"),
        (lambda x: x[:1], 0.5, r"returned \(1,\) torch.float64; a tensor of \(2,\)"),
        (lambda x: x.float(), 0.5, "torch.float32"),
        (NonNegative(), -0.5, "does not start on its set"),
        ({torch.zeros(2): NonNegative()}, 0.5, "which the optimizer does not hold"),
        ({"weight": NonNegative()}, 0.5, "'weight', which the optimizer does not hold"),
    ],
)
def test_what_is_no_projection_and_a_start_off_the_set_are_refused(projections, start, message):
    x = leaf(torch.full((2,), start, dtype=D))
    with pytest.raises(ValueError, match=message):
        Projected(torch.optim.SGD([x], lr=0.1), projections)


def test_other_kinds_are_refused():
    x = leaf(torch.ones(2))
    with pytest.raises(TypeError, match="Projected was given a SGD"):
        Projected(bl.SGD(0.1), NonNegative())
    with pytest.raises(TypeError, match="a projection, or a dict"):
        Projected(torch.optim.SGD([x], lr=0.1), 3)
    with pytest.raises(TypeError, match="the projection 3"):
        Projected(torch.optim.SGD([x], lr=0.1), {x: 3})


# Hyper-gradients under constraints: y* = x, f = |y - v|^2 / 2


def follow(x, problem, optimizer, steps=150):
    loop = bl.iterate(
        problem,
        x,
        torch.zeros(5, dtype=D),
        [NONE] * steps,
        solver=bl.Descent(bl.SGD(0.5), 2),
        estimator=bl.Implicit(bl.CG(3)),
        optimizer=optimizer,
    )
    for _ in loop:
        pass


def nearest(v):
    return bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: (y - v).square().sum() / 2)


@pytest.mark.parametrize("name", ["simplex", "box", "ball", "non-negative"])
def test_a_bilevel_loop_ends_at_the_best_point_of_the_set(name):
    v, project = 2 * draws(5, seed=4), PROJECTIONS[name][0]
    x = leaf(project(torch.zeros(5, dtype=D)))
    follow(x, nearest(v), Projected(torch.optim.SGD([x], lr=0.4), project))
    torch.testing.assert_close(x.detach(), project(v), rtol=1e-8, atol=1e-9)


MAPS = {
    "exp": (Exp(), lambda n: draws(n).abs() + 0.1),
    "softplus": (Softplus(), lambda n: draws(n).abs() + 1e-3),
    "softplus above": (Softplus(-2.0), lambda n: draws(n).abs() - 1.9),
    "interval": (Sigmoid(-1.0, 3.0), lambda n: 3.9 * draws(n).sigmoid() - 0.95),
    "softmax": (Softmax(), lambda n: draws(n).softmax(0)),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_and_its_inverse_and_the_chain_rule_through_every_function_of_a_problem(name):
    """Against torch's own derivative of the program written out; x acts in both losses, the start and the features."""
    each, make = MAPS[name]
    x = {"a": make(3), "b": draws(2, seed=9)}
    t = draws(3, seed=8)
    problem = bl.Problem(
        lambda y, x, z: ((y - z).square() * (1 + x["a"].square())).sum() + x["b"].sum() * y.sum(),
        lambda y, x, z: (y - t).square().sum() + (x["a"] * z).sum() + x["b"].square().sum(),
        init=lambda x, b: 2 * x["a"],
        features=lambda x, b: b * x["a"].sin(),
    )
    data = draws(3, seed=7)
    free, u = reparametrized(problem, x, {"a": each})
    torch.testing.assert_close(constrained(u, {"a": each})["a"].detach(), x["a"], rtol=1e-12, atol=1e-13)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in u.values())

    def program(u):
        x, y = {"a": each(u["a"]), "b": u["b"]}, 2 * each(u["a"])
        z = data * x["a"].sin()
        for _ in range(3):
            y = y - 0.1 * torch.func.grad(problem.inner_loss)(y, x, z)
        return problem.outer_loss(y, x, z)

    expected = torch.func.grad(program)({k: v.detach() for k, v in u.items()})
    for estimator in (bl.Unrolled(), bl.Unrolled("iterates"), bl.TaskMean(bl.Unrolled())):
        tasks = isinstance(estimator, bl.TaskMean)
        batches = bl.Batches(data[None], data[None]) if tasks else bl.Batches(data, data)
        hg = bl.hypergradient(free, u, None, batches, solver=bl.Descent(bl.SGD(0.1), 3), estimator=estimator)
        for key in x:
            torch.testing.assert_close(hg.grad[key], expected[key], rtol=1e-10, atol=1e-12)


def test_a_proximal_problem_is_reparametrized_whole():
    problem = bl.proximal(
        bl.Problem(lambda y, x, b: y.cos().sum(), lambda y, x, b: y.square().sum() / 2, init=lambda x, b: x), 2.0
    )
    x = torch.tensor([0.5, 1.5], dtype=D)
    free, u = reparametrized(problem, x, Exp())
    solver, estimator = bl.Converge(bl.SGD(0.3), 1e-12), bl.Implicit(bl.CG(3, tol=1e-13))
    grads = [
        bl.hypergradient(p, v, None, NONE, solver=solver, estimator=estimator).grad
        for p, v in ((problem, x), (free, u))
    ]
    torch.testing.assert_close(grads[1], x * grads[0], rtol=1e-9, atol=1e-11)


def test_a_learned_step_size_is_given_through_the_map():
    maps = {"lr": Exp()}
    problem = bl.Problem(lambda y, x, b: y**2 - y, lambda y, x, b: y**2 / 2)
    free, u = reparametrized(problem, {"lr": torch.tensor(0.25, dtype=D)}, maps)
    optimizer = bl.SGD(lr=lambda u: constrained(u, maps)["lr"])
    hg = bl.hypergradient(
        free, u, torch.tensor(0.0, dtype=D), NONE, solver=bl.Descent(optimizer, 4), estimator=bl.Unrolled()
    )
    assert hg.grad["lr"].item() == pytest.approx(0.25 * 0.234375, rel=1e-12)  # lr times TP1's d/d(lr)


def test_a_loop_over_the_free_variable_keeps_the_weights_on_the_simplex():
    v = (0.5 * draws(5, seed=4)).softmax(0)
    free, u = reparametrized(nearest(v), torch.full((5,), 0.2, dtype=D), Softmax())
    follow(u, free, torch.optim.SGD([u], lr=10.0), steps=200)
    torch.testing.assert_close(constrained(u, Softmax()).detach(), v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_keep_the_dtype_and_the_digits_of_their_tensors(dtype):
    for value in (1e-3, 0.2, 3.0, 200.0):
        x = torch.full((2,), value, dtype=dtype)
        for each in (Exp(), Softplus(), Softplus(-1.0)):
            _, u = reparametrized(nearest(0.0), x, each)
            assert u.dtype == dtype
            back = constrained(u, each)
            assert back.dtype == dtype
            torch.testing.assert_close(
                back.detach(), x, rtol=64 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
            )


@pytest.mark.parametrize(
    ("outer", "maps", "error", "message"),
    [
        (torch.tensor([1.0, 0.0]), Exp(), ValueError, "not in the .open. set"),
        (torch.tensor([1.0, -2.0]), Softplus(), ValueError, "not in the .open. set"),
        (torch.tensor([0.5, 1.0]), Sigmoid(), ValueError, "not in the .open. set"),
        (torch.tensor([0.5, 0.6]), Softmax(), ValueError, "not in the .open. set"),
        (torch.tensor([0.5]), torch.exp, TypeError, "the map .*inverse"),
        (torch.tensor([0.5]), {"a": Exp()}, TypeError, "a dict of maps"),
        ({"a": torch.tensor([0.5])}, {"b": Exp()}, ValueError, r"maps were given for \['b'\]"),
    ],
)
def test_a_start_outside_and_maps_that_are_none_are_refused(outer, maps, error, message):
    with pytest.raises(error, match=message):
        reparametrized(nearest(0.0), outer, maps)
