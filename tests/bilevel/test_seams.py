"""The seams of the house: dynamics, stopping rules, states, task identities, adaptation; nothing kept after a call."""

import dataclasses
import gc
import warnings

import pytest
import torch

import bilevel as bl

D = torch.float64
NONE = bl.Batches(None, None)
G = torch.Generator().manual_seed(0)
H = torch.randn(4, 4, generator=G, dtype=D)
H = H @ H.T / 4 + torch.eye(4, dtype=D)
X = torch.randn(4, generator=G, dtype=D)
PROBLEM = bl.Problem(
    lambda y, x, b: 0.5 * y @ H @ y - x @ y + 0.1 * y.pow(4).sum(), lambda y, x, b: (y - 1).square().sum()
)
KEEPS = {keep: bl.Unrolled(keep) for keep in ("graph", "iterates", "segments")}


@dataclasses.dataclass(frozen=True)
class HeavyBall(bl.inner.Dynamics):
    """Polyak's step, with the last iterate as the state: a dynamics that is no optimizer of the library."""

    rate: float = 0.1
    weight: float = 0.5

    @property
    def symmetric(self):
        return True

    def init(self, inner, outer):
        return {"last": inner, "count": 0}

    def step(self, inner, state, outer, at):
        moved = inner - self.rate * at.gradient(inner) + self.weight * (inner - state["last"])
        return moved, {"last": inner, "count": state["count"] + 1}

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@dataclasses.dataclass(frozen=True)
class Extragradient(bl.inner.Dynamics):
    """Two gradients a step, at two points."""

    rate: float = 0.1

    def step(self, inner, state, outer, at):
        ahead = inner - self.rate * at.gradient(inner)
        return inner - self.rate * at.gradient(ahead), state

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@dataclasses.dataclass(frozen=True)
class Map(bl.inner.Dynamics):
    """A fixed-point map that has nothing to do with g; x enters it alone."""

    def step(self, inner, state, outer, at):
        return torch.tanh(0.5 * inner @ H / 4 + outer), state

    def stationarity(self, inner, outer, at):
        return inner - torch.tanh(0.5 * inner @ H / 4 + outer)


def by_hand(dynamics, steps, x):
    """The K-step program in plain torch."""
    y = torch.zeros(4, dtype=D, requires_grad=True)
    last = y
    for _ in range(steps):

        def slope(at):
            return torch.autograd.grad(PROBLEM.inner_loss(at, x, None), at, create_graph=True)[0]

        if isinstance(dynamics, HeavyBall):
            y, last = y - 0.1 * slope(y) + 0.5 * (y - last), y
        elif isinstance(dynamics, Extragradient):
            y = y - 0.1 * slope(y - 0.1 * slope(y))
        else:
            y = torch.tanh(0.5 * y @ H / 4 + x)
    return PROBLEM.outer_loss(y, x, None), y


def run(estimator, dynamics, solver=None, **options):
    solver = solver or bl.Descent(dynamics, 5)
    return bl.hypergradient(PROBLEM, X, torch.zeros(4, dtype=D), NONE, solver=solver, estimator=estimator, **options)


DYNAMICS = [HeavyBall(), Extragradient(), Map()]


@pytest.mark.parametrize("estimator", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda each: type(each).__name__)
def test_steps_of_a_dynamics_of_ones_own_are_differentiated_as_they_ran(dynamics, estimator):
    x = X.clone().requires_grad_()
    loss, y = by_hand(dynamics, 5, x)
    hg = run(estimator, dynamics)
    torch.testing.assert_close(hg.grad, torch.autograd.grad(loss, x)[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hg.inner, y.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda each: type(each).__name__)
def test_the_solution_of_a_dynamics_of_ones_own_is_differentiated_where_it_rests(dynamics):
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(by_hand(dynamics, 200, x)[0], x)[0]
    solver = bl.Converge(dynamics, tol=1e-12, max_steps=2000)
    for linear in (bl.Dense(), bl.Neumann(steps=400, step_size=0.3)):
        hg = run(bl.Implicit(linear), dynamics, solver)
        torch.testing.assert_close(hg.grad, expected, rtol=1e-8, atol=1e-10)
    if dynamics.symmetric:
        torch.testing.assert_close(
            run(bl.Implicit(bl.CG(50, 1e-13)), dynamics, solver).grad, expected, rtol=1e-8, atol=0
        )
    else:
        with pytest.raises(ValueError, match="symmetric"):
            run(bl.Implicit(bl.CG()), dynamics, solver)


def test_an_estimator_that_perturbs_the_inner_loss_refuses_a_dynamics_that_need_not_follow_it():
    with pytest.raises(ValueError, match=r"FirstOrderCorrected (perturbs the inner loss|cannot see)"):
        run(bl.FirstOrderCorrected(), Map())


def test_a_dynamics_that_does_not_say_where_it_rests_is_refused_at_the_solution():
    @dataclasses.dataclass(frozen=True)
    class Silent(bl.inner.Dynamics):
        def step(self, inner, state, outer, at):
            return inner - 0.1 * at.gradient(inner), state

    with pytest.raises(ValueError, match="Silent does not say"):
        run(bl.Implicit(bl.Dense()), Silent())
    assert run(bl.Unrolled(), Silent()).status is bl.Status.OK


def test_an_inner_solver_that_moves_y_itself_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="defines solve"):

        class Mine(bl.InnerSolver):
            def solve(self, gradient, inner, outer):
                return inner


def test_an_estimator_without_sees_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="does not say which paths"):

        class Mine(bl.Estimator):
            def estimate(self, instance, state):
                raise NotImplementedError


def test_an_estimate_may_hand_on_where_the_next_inner_loop_starts():
    @dataclasses.dataclass(frozen=True)
    class Handing(bl.Estimator):
        sees = frozenset(bl.Path)

        def estimate(self, instance, state):
            found = instance.solve()
            loss, _, direct = instance.oracles.outer_gradient(found.inner)
            grad = tuple(torch.zeros_like(instance.outer) if leaf is None else leaf for leaf in direct)
            return instance.finish(found, grad, loss, next_inner=torch.full_like(found.inner, 7.0))

    starts = []
    problem = bl.Problem(
        lambda y, x, b: (starts.append(y.detach().clone()), PROBLEM.inner_loss(y, x, b))[1], PROBLEM.outer_loss
    )
    x = X.clone().requires_grad_()
    options = {"solver": bl.Descent(bl.SGD(0.1), 1), "estimator": Handing(), "optimizer": torch.optim.SGD([x], lr=0.1)}
    steps = list(bl.iterate(problem, x, torch.zeros(4, dtype=D), [NONE] * 2, **options))
    assert (steps[0].hypergradient.next_inner == 7).all()
    assert any((start == 7).all() for start in starts)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_states_are_typed_saved_and_follow_their_tasks(chunk, tmp_path):
    targets = torch.arange(12.0, dtype=D).reshape(3, 4)
    problem = bl.Problem(lambda y, x, b: 0.5 * (y - x * b).square().sum(), PROBLEM.outer_loss)
    estimator = bl.TaskMean(bl.MemoryReduced(warm_inner=True, warm_adjoint=True), chunk)

    def call(order, state=None):
        batches = bl.Batches(targets[order], targets[order], task_ids=torch.tensor(order))
        start = torch.zeros(3, 4, dtype=D)
        solver = bl.Descent(bl.SGD(0.1), 1)
        return bl.hypergradient(problem, X, start, batches, solver=solver, estimator=estimator, state=state)

    first = call([0, 1, 2])
    torch.save(first.state.to_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second, reordered = call([0, 1, 2], saved), call([2, 0, 1], first.state)
    assert torch.equal(reordered.inner, second.inner[[2, 0, 1]])
    torch.testing.assert_close(reordered.grad, second.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the same tasks were needed"):
        call([0, 1, 1], first.state)


@pytest.mark.parametrize("solver", [bl.Descent(bl.Adam(0.1), 7), bl.Converge(bl.SGD(0.1), 1e-6)], ids=["K", "tol"])
def test_adapt_moves_y_as_the_inner_loop_of_a_hypergradient_does(solver):
    start = torch.zeros(4, dtype=D)
    found = bl.adapt(PROBLEM, X, start, NONE, solver=solver)
    hg = bl.hypergradient(PROBLEM, X, start, NONE, solver=solver, estimator=bl.Implicit(bl.CG()))
    assert torch.equal(found.inner, hg.inner)
    assert torch.equal(found.outer_loss, hg.outer_loss)
    assert found.stats["calls"]["hvp"] == 0
    assert (start == 0).all()


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_adapt_over_tasks_is_adapt_of_each(chunk):
    targets = torch.arange(12.0, dtype=D).reshape(3, 4)
    problem = bl.Problem(
        lambda y, x, b: (y - b).square().sum(), lambda y, x, b: (y - b).square().sum(), init=lambda x, b: x
    )
    solver = bl.Descent(bl.SGD(0.1), 3)
    together = bl.adapt(problem, X, None, bl.Batches(targets, targets), solver=solver, tasks=True, chunk=chunk)
    alone = [bl.adapt(problem, X, None, bl.Batches(target, target), solver=solver) for target in targets]
    torch.testing.assert_close(together.inner, torch.stack([one.inner for one in alone]))
    torch.testing.assert_close(together.outer_loss, torch.stack([one.outer_loss for one in alone]))


def test_adapt_works_where_an_estimator_would_refuse_and_without_an_outer_batch():
    solver = bl.Descent(bl.AdamW(0.1, weight_decay=0.1), 3)
    broken = bl.Problem(PROBLEM.inner_loss, lambda y, x, b: b.sum())
    assert bl.adapt(broken, X, torch.zeros(4, dtype=D), NONE, solver=solver, evaluate=False).outer_loss is None


@pytest.mark.parametrize(
    "estimator",
    [
        *KEEPS.values(),
        bl.Implicit(bl.CG(3)),
        bl.MemoryReduced(warm_inner=True),
        bl.FirstOrderCorrected(),
        bl.FirstOrder(),
        bl.TaskMean(bl.Unrolled()),
        bl.TaskMean(bl.Implicit(bl.CG(2)), 1),
    ],
    ids=lambda each: repr(each)[:40],
)
@pytest.mark.parametrize("features", [None, lambda x, b: b * x], ids=["plain", "features"])
def test_a_call_leaves_no_cycle_that_keeps_its_tensors(estimator, features):
    loss = lambda y, x, b: (y - b).square().sum()  # noqa: E731
    problem = bl.proximal(bl.Problem(loss, loss, init=lambda x, b: x, features=features), 0.5)
    batch = torch.ones(3, 4) if isinstance(estimator, bl.TaskMean) else torch.ones(4)
    solver = bl.Descent(bl.SGD(0.1, momentum=0.5), 4)

    def alive():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    def call():
        bl.hypergradient(problem, torch.ones(4), None, bl.Batches(batch, batch), solver=solver, estimator=estimator)

    gc.collect()
    gc.disable()
    try:
        call()
        before = alive()
        for _ in range(3):
            call()
        assert alive() == before
    finally:
        gc.enable()


def test_the_forward_scheme_that_carries_both_sides_goes_further_than_one_that_starts_alike():
    """F2SA carries both: at the same work, the gradient of F ends orders of magnitude smaller."""

    def ends(estimator):
        x = torch.zeros(4, dtype=D, requires_grad=True)
        problem = bl.Problem(
            lambda y, x, b: 0.5 * y @ H @ y - x @ y, lambda y, x, b: (y - 1).square().sum() + 0.5 * x.square().sum()
        )
        options = {"solver": bl.Descent(bl.SGD(0.2), 1), "optimizer": torch.optim.SGD([x], lr=0.05)}
        for _ in bl.iterate(problem, x, torch.zeros(4, dtype=D), [NONE] * 800, estimator=estimator, **options):
            pass
        y = torch.linalg.solve(H, x.detach())
        return (torch.linalg.solve(H, 2 * (y - 1)) + x.detach()).square().sum().item()

    alike = ends(bl.FirstOrderCorrected(1e-4, "forward"))
    carried = ends(bl.FirstOrderCorrected(1e-4, "forward", warm_sides=True))
    assert carried < 1e-6 * alike, (carried, alike)
