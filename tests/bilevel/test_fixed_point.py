"""FixedPoint and GaussNewton: the systems that they solve, written out; what they refuse."""

import dataclasses

import catalogue
import pytest
import torch
from test_conformance import flat, quietly

import bilevel as bl
from bilevel.estimators import FixedPoint, GaussNewton
from bilevel.testing.catalogue import Quadratic

D = torch.float64
NO_DATA = bl.Batches(None, None)
CROSS = torch.nn.functional.cross_entropy


def neumann(products):
    return FixedPoint(bl.Neumann(products, step_size=1.0))


# FixedPoint


@pytest.mark.parametrize(
    ("estimator", "answer"), [(FixedPoint(bl.Dense()), 0.234375), (neumann(1), 0.17578125), (neumann(60), 0.234375)]
)
def test_scalar_quadratic_after_four_steps(estimator, answer):
    """TP1 of methods.md: the exact solve at y_4, and two terms of the series."""
    problem = bl.Problem(lambda y, x, _: y**2 - x * y, lambda y, x, _: y**2 / 2)
    one, zero = torch.tensor(1.0, dtype=D), torch.tensor(0.0, dtype=D)
    found = bl.hypergradient(problem, one, zero, NO_DATA, solver=bl.Descent(bl.SGD(0.25), 4), estimator=estimator)
    assert found.grad.item() == pytest.approx(answer, abs=1e-10)
    assert found.stats["fixed_point_motion"].item() == pytest.approx(0.25 * 0.0625, abs=1e-12)


MOMENTUM = bl.SGD(0.3, momentum=0.6)


@pytest.mark.parametrize(
    "optimizer",
    [bl.SGD(0.4), MOMENTUM, bl.SGD(0.3, momentum=0.6, nesterov=True, weight_decay=0.1, dampening=0.0)],
    ids=["sgd", "momentum", "nesterov"],
)
@pytest.mark.parametrize("products", [1, 4])
def test_neumann_is_backpropagation_through_the_last_steps(optimizer, products):
    """Of an affine map, state included: J products are J + 1 steps."""
    arguments = Quadratic.example(9).posed() | {"solver": bl.Descent(optimizer, 9)}
    found = bl.hypergradient(**arguments, estimator=neumann(products))
    last = bl.hypergradient(**arguments, estimator=bl.Unrolled(last=products + 1))
    torch.testing.assert_close(flat(found.grad), flat(last.grad), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "optimizer", [MOMENTUM, bl.Adam(0.05), bl.AdamW(0.05, weight_decay=0.0), bl.SGD(0.3, weight_decay=0.2)], ids=str
)
def test_with_its_state_the_fixed_point_is_the_solution(optimizer):
    q = Quadratic.example(800)
    arguments = q.posed() | {"solver": bl.Descent(optimizer, 800)}
    found = bl.hypergradient(**arguments, estimator=FixedPoint(bl.Dense(tol=1e-4)))
    exact = bl.hypergradient(**arguments, estimator=bl.Implicit(bl.Dense()))
    assert (flat(found.grad) - flat(exact.grad)).norm() < 1e-6 * flat(exact.grad).norm()


@dataclasses.dataclass(frozen=True)
class Equilibrium(bl.inner.Dynamics):
    """y = tanh(W y + x), of which nothing says where it rests; momentum on top, in the state."""

    momentum: float = 0.0

    def init(self, inner, outer):
        return {"step": 0, "velocity": torch.zeros_like(inner), "note": None}

    def step(self, inner, state, outer, at):
        velocity = self.momentum * state["velocity"] + at.apply(_towards, inner)
        return inner + velocity, {"step": state["step"] + 1, "velocity": velocity, "note": None}


def _towards(y, x, batch):
    return (batch @ y + x).tanh() - y


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize(
    "linear",
    [
        bl.Dense(),
        bl.Neumann(400, 1.0),
        bl.linear.GMRES(20, tol=1e-12),
        bl.linear.BiCGSTAB(40, tol=1e-12),
        bl.linear.LSMR(60, tol=1e-12),
        bl.linear.NormalCG(60, tol=1e-12),
    ],
    ids=lambda linear: type(linear).__name__,
)
def test_a_map_of_the_users_that_says_nothing_of_its_rest(momentum, linear):
    """The equilibrium layer, against its closed form: (I - S W)^-1 S with S = diag(1 - y^2)."""
    g = torch.Generator().manual_seed(0)
    W, x = 0.3 * torch.randn(5, 5, generator=g, dtype=D), torch.randn(5, generator=g, dtype=D)
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**3).sum())
    found = bl.hypergradient(
        problem,
        x,
        torch.zeros(5, dtype=D),
        bl.Batches(W, None),
        solver=bl.Descent(Equilibrium(momentum), 300),
        estimator=FixedPoint(linear),
    )
    y = found.inner
    S = torch.diag(1 - y**2)
    expected = S @ torch.linalg.solve((torch.eye(5, dtype=D) - S @ W).T, 3 * y**2)
    assert found.status is bl.Status.OK
    assert found.stats["fixed_point_motion"] < 1e-12
    torch.testing.assert_close(found.grad, expected, rtol=1e-9, atol=1e-12)


def test_decoupled_decay_that_is_learned():
    """AdamW says not where it rests; with a large eps its fixed point moves with the decay, as a difference shows."""
    t = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    problem = bl.Problem(lambda y, x, _: ((y - t) ** 2).sum(), lambda y, x, _: (y**3).sum())
    solver = bl.Descent(bl.AdamW(0.3, betas=(0.5, 0.9), eps=1.0, weight_decay=lambda x: x), 250)

    def run(decay, estimator):
        return bl.hypergradient(
            problem, torch.tensor(decay, dtype=D), torch.zeros(3, dtype=D), NO_DATA, solver=solver, estimator=estimator
        )

    found = run(0.2, FixedPoint(bl.Dense()))
    ahead, behind = (run(0.2 + d, neumann(1)) for d in (1e-5, -1e-5))
    difference = (ahead.outer_loss - behind.outer_loss) / 2e-5
    assert found.grad.item() == pytest.approx(difference.item(), rel=1e-6)
    with pytest.raises(ValueError, match="Implicit cannot see"):
        run(0.2, bl.Implicit(bl.Dense()))


def test_a_tensor_that_no_step_moves_is_a_constant():
    problem = bl.Problem(lambda y, x, _: ((y["a"] - x) ** 2).sum(), lambda y, x, _: (y["a"] * y["b"]).sum())
    start = {"a": torch.zeros(2, dtype=D), "b": torch.tensor([2.0, -3.0], dtype=D)}
    for optimizer in (bl.SGD(0.3, momentum=0.5), bl.Adam(0.1)):
        found = bl.hypergradient(
            problem,
            torch.ones(2, dtype=D),
            start,
            NO_DATA,
            solver=bl.Descent(optimizer, 500),
            estimator=FixedPoint(bl.Dense(tol=1e-4)),
        )
        torch.testing.assert_close(found.grad, start["b"], rtol=1e-6, atol=0)
        assert found.status is bl.Status.OK


def test_of_an_optimizer_that_accumulates_the_next_step_must_move():
    optimizer = bl.optim.Accumulated(bl.SGD(0.4), every=2)
    for steps in (200, 201):
        q = Quadratic.example(steps)
        arguments = q.posed() | {"solver": bl.Descent(optimizer, steps), "estimator": FixedPoint(bl.Dense())}
        if steps % 2:
            found = bl.hypergradient(**arguments)
            torch.testing.assert_close(flat(found.grad), q.implicit(flat(found.inner)), rtol=1e-10, atol=0)
        else:
            with pytest.raises(ValueError, match="accumulates gradients"):
                bl.hypergradient(**arguments)


@pytest.mark.parametrize(
    "optimizer",
    [bl.optim.RAdam(0.05), bl.optim.ClippedByNorm(bl.SGD(0.1), 1.0), bl.optim.FromTorch(torch.optim.SGD, lr=0.1)],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_other_optimizers_have_the_same_fixed_point(optimizer):
    q = Quadratic.example(120)
    arguments = q.posed() | {"solver": bl.Descent(optimizer, 120)}
    found = bl.hypergradient(**arguments, estimator=FixedPoint(bl.Dense(tol=1e-4)))
    expected = q.implicit(flat(found.inner))
    assert (flat(found.grad) - expected).norm() < 1e-5 * expected.norm()


def test_without_steps_the_map_is_linearized_at_the_start():
    q = Quadratic.example(0)
    for optimizer in (bl.SGD(q.rate), MOMENTUM):
        arguments = q.posed() | {"solver": bl.Descent(optimizer, 0)}
        found = bl.hypergradient(**arguments, estimator=FixedPoint(bl.Dense()))
        torch.testing.assert_close(flat(found.grad), q.implicit(q.start), rtol=1e-10, atol=0)


def test_a_rule_that_stops_tasks_by_themselves_hands_over_their_states():
    problem = bl.Problem(lambda y, x, b: (b * (y - x) ** 2).sum(), lambda y, x, b: ((y - b) ** 3).sum())
    tasks = torch.tensor([0.2, 1.0, 0.5], dtype=D)
    solver = bl.Converge(bl.SGD(0.3, momentum=0.5), tol=1e-9, max_steps=500)
    arguments = problem, torch.tensor([0.4, 0.1], dtype=D), torch.zeros(3, 2, dtype=D), bl.Batches(tasks, tasks)
    found, exact = (
        bl.hypergradient(*arguments, solver=solver, estimator=bl.TaskMean(each))
        for each in (FixedPoint(bl.Neumann(600, 1.0)), bl.Implicit(bl.CG(5, tol=1e-12)))
    )
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-7, atol=0)


def test_what_has_no_fixed_point_or_none_that_moves_is_refused():
    problem = bl.Problem(lambda y, x, _: y**2, lambda y, x, _: y**2 / 2)
    one = torch.tensor(1.0, dtype=D)

    def run(estimator, optimizer, problem=problem, inner=one):
        bl.hypergradient(problem, one, inner, NO_DATA, solver=bl.Descent(optimizer, 3), estimator=estimator)

    with pytest.raises(ValueError, match=r"cannot see.*hyper-parameter"):
        run(FixedPoint(bl.Dense()), bl.SGD(lambda x: 0.1 * x))
    with pytest.raises(ValueError, match=r"cannot see.*start"):
        run(FixedPoint(bl.Dense()), bl.SGD(0.1), dataclasses.replace(problem, init=lambda x, _: x), None)
    coupled = bl.Problem(lambda y, x, _: (y - x) ** 2, lambda y, x, _: y**2 / 2)
    with pytest.raises(ValueError, match="CG was given Linearization"):
        run(FixedPoint(bl.CG(5)), bl.SGD(0.1), coupled)
    with pytest.raises(ValueError, match="never"):
        run(FixedPoint(bl.Dense()), bl.inner.Langevin(0.1, 0.5), coupled)
    with pytest.raises(ValueError, match="another map each"):
        run(FixedPoint(bl.Dense()), bl.inner.Aggregated(bl.SGD(0.1), share=0.5), coupled)
    run(FixedPoint(bl.Dense()), bl.inner.Aggregated(bl.SGD(0.1), share=0.0), coupled)
    with pytest.raises(TypeError, match="FixedPoint was given int"):
        FixedPoint(3)


# GaussNewton


def logits(y, x, b):
    return torch.tanh(b[0] @ y["a"]) @ y["b"]


def weighted(z, x, b):
    return (x["weights"][: len(b[1])].sigmoid() * CROSS(z, b[1], reduction="none")).mean()


def decay(y, x, b):
    return x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())


def gauss_newton(linear=None, outputs=logits, loss=weighted, rest=decay):
    return GaussNewton(bl.CG(60, tol=1e-13) if linear is None else linear, outputs, loss, rest)


def dense(problem, outer, y, batches, extra):
    """df/dx - M (G + extra I)^-1 df/dy with the matrix written out, at a y in flat form."""
    names = list(y)

    def tree(v):
        parts = v.split([y[name].numel() for name in names])
        return {name: part.reshape(y[name].shape) for name, part in zip(names, parts, strict=True)}

    v = flat(y)
    J = torch.func.jacrev(lambda v: logits(tree(v), outer, batches.inner).reshape(-1))(v)
    z = logits(y, outer, batches.inner)
    L = torch.func.jacrev(torch.func.jacrev(lambda v: weighted(v.reshape(z.shape), outer, batches.inner)))(
        z.reshape(-1)
    )
    G = J.T @ L @ J + (2 * outer["decay"].exp() + extra) * torch.eye(len(v), dtype=D)
    b, direct = torch.func.grad(lambda v, x: problem.outer_loss(tree(v), x, batches.outer), argnums=(0, 1))(v, outer)
    solution = torch.linalg.solve(G, b)

    def product(x):
        return torch.func.grad(lambda v: problem.inner_loss(tree(v), x, batches.inner))(v) @ solution

    mixed = torch.func.grad(product)(outer)
    return torch.cat([(direct[name] - mixed[name]).reshape(-1) for name in outer])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_the_matrix_is_gauss_newtons(weight_decay, damping):
    problem, outer, inner, batches = catalogue.weighted_net()
    solver = bl.Descent(bl.SGD(0.3, weight_decay=weight_decay), 4)
    estimator = gauss_newton(bl.CG(60, tol=1e-13, damping=damping))
    found = quietly(lambda: bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator))
    assert found.status is bl.Status.OK
    expected = dense(problem, outer, found.inner, batches, weight_decay + damping)
    torch.testing.assert_close(flat(found.grad), expected, rtol=1e-9, atol=1e-12)


def test_it_is_definite_where_the_hessian_is_not():
    problem, outer, inner, batches = catalogue.weighted_net()
    outer = outer | {"decay": torch.tensor(-9.0, dtype=D)}
    solver = bl.Descent(bl.SGD(0.3), 1)
    statuses = [
        quietly(lambda e=e: bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=e)).status
        for e in (bl.Implicit(bl.CG(40, tol=1e-8)), gauss_newton(bl.CG(80, tol=1e-8)))
    ]
    assert statuses == [bl.Status.NEGATIVE_CURVATURE, bl.Status.OK]


SQUARES = bl.Problem(lambda y, x, b: ((b @ y - x) ** 2).mean() + 0.1 * y @ y, lambda y, x, b: (y**3).sum())


def squares(linear):
    return GaussNewton(
        linear,
        lambda y, x, b: {"z": b @ y, "none": y[:0]},
        lambda z, x, b: ((z["z"] - x) ** 2).mean(),
        lambda y, x, b: 0.1 * y @ y,
    )


@pytest.mark.parametrize("pulled", [False, True], ids=["plain", "proximal"])
def test_on_linear_least_squares_it_is_the_hessian(pulled):
    g = torch.Generator().manual_seed(0)
    X, x = torch.randn(6, 4, generator=g, dtype=D), torch.randn(6, generator=g, dtype=D)
    problem, start = SQUARES, torch.zeros(4, dtype=D)
    if pulled:
        problem, start = bl.proximal(dataclasses.replace(SQUARES, init=lambda x, b: x[:4] + 1), 0.7), None
    arguments = problem, x, start, bl.Batches(X, None)
    linear = bl.CG(10, tol=1e-13)
    found, exact = (
        bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.2, weight_decay=0.05), 30), estimator=each)
        for each in (squares(linear), bl.Implicit(linear))
    )
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-11, atol=0)
    assert found.stats["linear_steps"] == exact.stats["linear_steps"]
    assert found.stats["calls"]["mixed"] == 1


@pytest.mark.parametrize(
    ("dtype", "engine"),
    [(torch.float32, bl.Eager()), (torch.bfloat16, bl.Eager())],
    ids=str,
)
def test_tasks_engines_and_coarse_numbers(dtype, engine):
    g = torch.Generator().manual_seed(0)
    X, x = torch.randn(3, 6, 4, generator=g, dtype=dtype), torch.randn(6, generator=g, dtype=dtype)
    solver = bl.Descent(bl.SGD(0.2), 30)

    def run(estimator, *, dtype=dtype, **more):
        batches = bl.Batches(X.to(dtype), X.to(dtype))
        return bl.hypergradient(
            SQUARES,
            x.to(dtype),
            torch.zeros(3, 4, dtype=dtype),
            batches,
            solver=solver,
            estimator=bl.TaskMean(estimator, **more),
            engine=engine,
        ).grad.double()

    exact = run(bl.Implicit(bl.CG(8, tol=1e-12)), dtype=D)
    for more in ({}, {"chunk": 1}):
        found = run(squares(bl.CG(8, tol=1e-6)), **more)
        assert (found - exact).norm() < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * exact.norm()


def test_random_masks_are_those_of_the_inner_loss():
    problem, outer, inner, batches = catalogue.weighted_net()

    def outputs(y, x, b):
        return logits(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1]))

    noisy = bl.Problem(lambda y, x, b: weighted(outputs(y, x, b), x, b) + decay(y, x, b), problem.outer_loss)
    torch.manual_seed(1)
    solver = bl.Descent(bl.SGD(0.3), 3)
    found = quietly(
        lambda: bl.hypergradient(noisy, outer, inner, batches, solver=solver, estimator=gauss_newton(outputs=outputs))
    )
    assert found.status is bl.Status.OK


def twice(z, x, b):
    return 2 * weighted(z, x, b)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"loss": twice}, "where inner_loss is"),
        ({"rest": None}, "where inner_loss is"),
        ({"rest": lambda y, x, b: decay(y, x, b) + 1e-5 * y["a"].sum()}, "where inner_loss is"),
        ({"loss": lambda z, x, b: weighted(z, x, b).reshape(1)}, "shape"),
        ({"outputs": lambda y, x, b: b[1], "loss": lambda z, x, b: weighted(logits(b, x, b), x, b)}, "int64"),
    ],
    ids=["twice", "no rest", "another rest", "shape", "integers"],
)
def test_parts_that_are_not_the_inner_loss_are_refused(parts, match):
    problem, outer, inner, batches = catalogue.weighted_net()
    with pytest.raises((ValueError, TypeError), match=match):
        quietly(
            lambda: bl.hypergradient(
                problem, outer, inner, batches, solver=bl.Descent(bl.SGD(0.3), 3), estimator=gauss_newton(**parts)
            )
        )


def test_another_batch_on_which_the_parts_differ_is_refused_too():
    problem = bl.Problem(lambda y, x, b: ((b * y - x) ** 2).sum(), lambda y, x, b: y @ y)

    def run(batch, steps=3):
        estimator = GaussNewton(bl.CG(5), outputs, lambda z, x, b: ((z - x) ** 2).sum())
        bl.hypergradient(
            problem,
            torch.ones(2, dtype=D),
            torch.ones(2, dtype=D),
            bl.Batches(torch.tensor(batch, dtype=D), None),
            solver=bl.Descent(bl.SGD(0.1), steps),
            estimator=estimator,
        )

    def outputs(y, x, b):
        return b.clamp_max(1.0) * y

    run([0.5, 1.0])
    with pytest.raises(ValueError, match="where inner_loss is"):
        run([0.5, 2.0])


def test_dynamics_and_kinds_are_refused():
    problem, outer, inner, batches = catalogue.weighted_net()
    for bad in ((3, logits, weighted), (bl.CG(3), None, weighted), (bl.CG(3), logits, weighted, 1.0)):
        with pytest.raises(TypeError, match="GaussNewton was given"):
            GaussNewton(*bad)
    with pytest.raises(ValueError, match="SteepestDescent"):
        quietly(
            lambda: bl.hypergradient(
                problem,
                outer,
                inner,
                batches,
                solver=bl.Descent(bl.inner.SteepestDescent(logits), 2),
                estimator=gauss_newton(),
            )
        )
