"""A second look from outside at the rewritten core: each test is a wrong number, a false refusal or a raw error."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from right_or_refused import NONE, D, central, close, refusal_of, right_or_refused
from torch import Tensor

import bilevel as bl

A = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=D)
X = torch.tensor([1.0, -2.0], dtype=D)
ZERO = torch.zeros(2, dtype=D)
KEEPS = ["graph", "iterates", "segments"]


def towards_one(y: Tensor, x: Any, b: Any) -> Tensor:
    return (y - 1).pow(2).sum()


def pulled(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return 0.5 * y @ A @ y - (x * y).sum()


def near(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return 0.5 * (y - x).pow(2).sum()


# --- the state of a dynamics, where it begins and how it is handed on


@dataclasses.dataclass(frozen=True)
class Lookahead(bl.Optimizer):
    """Slow weights that begin at the start; every second step goes halfway to the fast ones."""

    lr: float = 0.1

    def init(self, inner: Any) -> Any:
        return {"slow": inner.clone(), "t": 0}

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        fast, t = inner - self.lr * grad, state["t"] + 1
        if t % 2:
            return fast, {"slow": state["slow"], "t": t}
        slow = 0.5 * state["slow"] + 0.5 * fast
        return slow, {"slow": slow, "t": t}


@pytest.mark.parametrize("keep", KEEPS)
def test_a_state_that_begins_at_the_start_carries_the_start_s_influence(keep: str) -> None:
    # x is the start, the optimizer's init copies it into its state: its influence through the state counts as well.
    def program(x: Tensor) -> Tensor:
        y, slow = x, x
        for t in range(1, 5):
            y = y - 0.1 * A @ y
            if t % 2 == 0:
                y = slow = 0.5 * slow + 0.5 * y
        return towards_one(y, None, None)

    maml = bl.Problem(lambda y, x, b: 0.5 * y @ A @ y, towards_one, init=lambda x, b: x)
    solver, estimator = bl.Descent(Lookahead(), 4), bl.Unrolled(keep=keep)
    right_or_refused(
        lambda: bl.hypergradient(maml, X, None, NONE, solver=solver, estimator=estimator), central(program, X)
    )


@dataclasses.dataclass(frozen=True)
class Launched(bl.inner.Dynamics):
    """A heavy ball whose first velocity is the outer variable."""

    def init(self, inner: Any, outer: Any) -> Any:
        return {"v": outer["v"] * 1.0}

    def step(self, inner: Any, state: Any, outer: Any, at: Any) -> tuple[Any, Any]:
        v = 0.5 * state["v"] + at.gradient(inner)
        return inner - 0.1 * v, {"v": v}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("twice", [False, True])
def test_a_first_state_made_of_the_outer_variable_is_differentiated(keep: str, twice: bool) -> None:
    # init(inner, outer) may depend on outer; alone, "iterates" refuses what "graph" computes; beside a path through g,
    # "iterates" returns that part only.
    def program(x: Tensor) -> Tensor:
        y, v = ZERO + 1, x
        for _ in range(4):
            v = 0.5 * v + A @ y - (x if twice else 0)
            y = y - 0.1 * v
        return towards_one(y, None, None)

    problem = bl.Problem(lambda y, x, b: 0.5 * y @ A @ y - ((x["v"] * y).sum() if twice else 0), towards_one)
    solver, estimator = bl.Descent(Launched(), 4), bl.Unrolled(keep=keep)

    def call() -> bl.Hypergradient:
        return bl.hypergradient(problem, {"v": X}, ZERO + 1, NONE, solver=solver, estimator=estimator)

    assert refusal_of(call) is None
    close(call().grad, [central(program, X)])


@dataclasses.dataclass(frozen=True)
class CountsInPlace(bl.Optimizer):
    """A schedule that counts its steps in place, which is how most people write it."""

    def init(self, inner: Any) -> Any:
        return {"t": 0}

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        state["t"] += 1
        return inner - 0.3 / state["t"] * grad, state


@pytest.mark.parametrize("keep", KEEPS)
def test_a_state_changed_in_place_is_refused_or_kept_apart(keep: str) -> None:
    # A kept state must be that of its step, not the last one's: a rebuilt step counted on from the end.
    def program(x: Tensor) -> Tensor:
        y = ZERO
        for t in range(1, 5):
            y = y - 0.3 / t * (A @ y - x)
        return towards_one(y, None, None)

    solver, estimator = bl.Descent(CountsInPlace(), 4), bl.Unrolled(keep=keep)
    right_or_refused(
        lambda: bl.hypergradient(bl.Problem(pulled, towards_one), X, ZERO, NONE, solver=solver, estimator=estimator),
        central(program, X),
    )


@dataclasses.dataclass(frozen=True)
class MomentInPlace(bl.Optimizer):
    """A momentum buffer changed by mul_ and add_."""

    def init(self, inner: Any) -> Any:
        return {"m": torch.zeros_like(inner)}

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        state["m"].mul_(0.5).add_(grad)
        return inner - 0.1 * state["m"], state


@dataclasses.dataclass(frozen=True)
class MovesInPlace(bl.Optimizer):
    """Moves the inner variable itself."""

    def init(self, inner: Any) -> Any:
        return None

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        return inner.sub_(0.1 * grad), state

    def stationarity(self, grad: Any, inner: Any, outer: Any) -> Any:
        return grad


@pytest.mark.parametrize("optimizer", [MomentInPlace(), MovesInPlace()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("estimator", [*(bl.Unrolled(keep=keep) for keep in KEEPS), bl.Implicit(bl.CG(10))], ids=str)
def test_an_optimizer_in_place_gets_no_raw_error_and_leaves_the_start_alone(optimizer: Any, estimator: Any) -> None:
    # `inner` is "not changed", and an in-place step is answered in words, not by autograd's own RuntimeError.
    start, problem = ZERO.clone(), bl.Problem(pulled, towards_one)
    try:
        refusal_of(
            lambda: bl.hypergradient(problem, X, start, NONE, solver=bl.Descent(optimizer, 4), estimator=estimator)
        )
    finally:
        assert torch.equal(start, ZERO)


@dataclasses.dataclass(frozen=True)
class Cooling(bl.inner.Dynamics):
    """A step size that is one number for all tasks and shrinks by a factor of the outer variable's."""

    def init(self, inner: Any, outer: Any) -> Any:
        return {"lr": torch.tensor(0.5, dtype=D)}

    def step(self, inner: Any, state: Any, outer: Any, at: Any) -> tuple[Any, Any]:
        return inner - state["lr"] * at.gradient(inner), {"lr": state["lr"] * outer.sigmoid()}

    def stationarity(self, inner: Any, outer: Any, at: Any) -> Any:
        return at.gradient(inner)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("keep", ["iterates", "segments"])
def test_a_state_that_tasks_share_is_counted_once(keep: str, chunk: int | None) -> None:
    # The cotangent of a 0-dim state went past the tasks at rest and through the others: it doubled at every step.
    problem = bl.Problem(lambda y, x, b: 0.5 * (y - b).pow(2).sum(), lambda y, x, b: (y - 5).pow(2).sum())
    data = torch.tensor([[0.02, 0.01], [2.0, 1.0], [50.0, 20.0], [60.0, 30.0]], dtype=D)

    def grad(keep: str) -> Tensor:
        return bl.hypergradient(
            problem,
            torch.tensor(2.5, dtype=D),
            torch.zeros(4, 2, dtype=D),
            bl.Batches(data, data),
            solver=bl.Converge(Cooling(), tol=0.1, max_steps=30),
            estimator=bl.TaskMean(bl.Unrolled(keep=keep), chunk=chunk),
        ).grad

    close(grad(keep), grad("graph"))


# --- tasks


@dataclasses.dataclass(frozen=True)
class Projected(bl.inner.Dynamics):
    """Projected gradient descent on the unit ball, written for one task."""

    def step(self, inner: Any, state: Any, outer: Any, at: Any) -> tuple[Any, Any]:
        y = inner - 0.2 * at.gradient(inner)
        return y / y.norm().clamp_min(1.0), state


@dataclasses.dataclass(frozen=True)
class Clipped(bl.Optimizer):
    """Clips by the norm over all of y, another optimizer within."""

    base: bl.Optimizer

    def init(self, inner: Any) -> Any:
        return self.base.init(inner)

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        if grad is None:
            return inner, state
        return self.base.step(grad / grad.norm().clamp_min(1.0), state, inner, outer)


@pytest.mark.parametrize("moves", [Projected(), Clipped(bl.SGD(lr=0.2))], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("chunk", [None, 2])
def test_steps_that_mix_tasks_are_refused_whenever_they_begin_to(moves: Any, chunk: int | None) -> None:
    # A Dynamics is held to nothing; an Optimizer to its first step only, before the gradients grow to the clip.
    problem = bl.Problem(lambda y, x, b: 3 * (y + x * b).cos().sum(), towards_one)
    data = torch.tensor([[0.03, 0.01], [0.1, 0.05], [0.05, 0.02]], dtype=D)

    def call(chunk: int | None) -> bl.Hypergradient:
        return bl.hypergradient(
            problem,
            torch.ones(2, dtype=D),
            torch.zeros(3, 2, dtype=D),
            bl.Batches(data, data),
            solver=bl.Descent(moves, 12),
            estimator=bl.TaskMean(bl.Unrolled(), chunk=chunk),
        )

    right_or_refused(lambda: call(chunk), call(1).grad)


def test_a_checkpointed_loss_under_vmap_is_refused_with_the_way_out() -> None:
    # torch.utils.checkpoint recomputes in the backward, outside of vmap: the remedy is chunk=1, as for other losses.
    from torch.utils.checkpoint import checkpoint

    def loss(y: Tensor, x: Tensor, b: Any) -> Tensor:
        squared: Tensor = checkpoint(lambda u: u.tanh().pow(2).sum(), y, use_reentrant=False)
        return near(y, x, b) + squared

    batches = bl.Batches(torch.zeros(3), torch.zeros(3))
    refusal_of(
        lambda: bl.hypergradient(
            bl.Problem(loss, towards_one),
            X,
            torch.zeros(3, 2, dtype=D),
            batches,
            solver=bl.Descent(bl.SGD(lr=0.1), 3),
            estimator=bl.TaskMean(bl.Unrolled()),
        )
    )


# --- where the inner loop rests


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "estimator", [bl.Implicit(bl.CG(10)), bl.Implicit(bl.Dense()), bl.MemoryReduced()], ids=lambda e: type(e).__name__
)
def test_entries_held_fixed_by_a_step_size_of_zero_rest_anywhere(estimator: Any, learned: bool) -> None:
    # lr = 0 for a whole tensor of y is refused; lr = 0 for some of its entries (a mask) is the same thing.
    mask = torch.tensor([0.3, 0.0], dtype=D)
    rate: Any = (lambda x: mask) if learned else mask

    def solution(x: Tensor) -> Tensor:
        return towards_one(torch.stack([x[0] / 2, torch.zeros((), dtype=D)]), None, None)

    solver = bl.Descent(bl.SGD(lr=rate), 200)
    right_or_refused(
        lambda: bl.hypergradient(bl.Problem(pulled, towards_one), X, ZERO, NONE, solver=solver, estimator=estimator),
        central(solution, X),
    )


@dataclasses.dataclass(frozen=True)
class HiddenDecay(bl.Optimizer):
    """Weight decay, about which stationarity() says nothing."""

    def init(self, inner: Any) -> Any:
        return None

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        return inner if grad is None else inner - 0.2 * (grad + inner), None

    def stationarity(self, grad: Any, inner: Any, outer: Any) -> Any:
        return grad


@pytest.mark.parametrize("start", [1.0, 0.0])
@pytest.mark.parametrize(
    "estimator", [bl.Implicit(bl.CG(10)), bl.Implicit(bl.Dense()), bl.MemoryReduced()], ids=lambda e: type(e).__name__
)
def test_a_hidden_decay_is_refused_wherever_y_begins(estimator: Any, start: float) -> None:
    # The check of a user's optimizer takes its gradient under no_grad, where a loss without a gradient of its own has
    # none: it compares None with None and passes everything. With that mended, y_0 = 0 still hides a decay.
    def solution(x: Tensor) -> Tensor:
        return towards_one(x / 2, None, None)

    solver = bl.Descent(HiddenDecay(), 100)
    right_or_refused(
        lambda: bl.hypergradient(
            bl.Problem(near, towards_one), X, ZERO + start, NONE, solver=solver, estimator=estimator
        ),
        central(solution, X),
    )


@dataclasses.dataclass(frozen=True)
class LateDecay(bl.Optimizer):
    """Weight decay after a warm-up, about which stationarity() says nothing."""

    def init(self, inner: Any) -> Any:
        return {"t": 0}

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        t = state["t"] + 1
        if grad is None:
            return inner, {"t": t}
        return inner - 0.2 * (grad + (inner if t > 3 else 0)), {"t": t}

    def stationarity(self, grad: Any, inner: Any, outer: Any) -> Any:
        return grad


@pytest.mark.xfail(
    strict=True, reason="known limit: what an optimizer says of its rest is held against its first step only"
)
def test_a_decay_that_begins_after_a_warm_up_is_no_less_a_decay() -> None:
    # y rests at x / 2, where grad is not 0: Implicit doubles the hypergradient. The first step cannot show it; the
    # residual of the stationarity at the solution can.
    def solution(x: Tensor) -> Tensor:
        return towards_one(x / 2, None, None)

    solver = bl.Descent(LateDecay(), 100)
    right_or_refused(
        lambda: bl.hypergradient(
            bl.Problem(near, towards_one), X, ZERO, NONE, solver=solver, estimator=bl.Implicit(bl.CG(10))
        ),
        central(solution, X),
    )


@dataclasses.dataclass(frozen=True)
class Reordered(bl.inner.Dynamics):
    """Says where it rests in a dict whose keys come in another order than those of y."""

    @property
    def symmetric(self) -> bool:
        return True

    def step(self, inner: Any, state: Any, outer: Any, at: Any) -> tuple[Any, Any]:
        g = at.gradient(inner)
        return {name: inner[name] - 0.3 * g[name] for name in inner}, state

    def stationarity(self, inner: Any, outer: Any, at: Any) -> Any:
        g = at.gradient(inner)
        return {name: g[name] for name in sorted(g)}


def test_a_stationarity_in_another_order_of_keys_is_matched_by_key() -> None:
    # Dicts match by key elsewhere; here conjugate gradients met a permuted matrix, and failed.
    problem = bl.Problem(
        lambda y, x, b: near(y["b"], x, b) + 1.5 * (y["a"] - y["b"] * x).pow(2).sum(),
        lambda y, x, b: towards_one(y["a"], x, b) + y["b"].pow(2).sum(),
    )
    x = torch.tensor([0.5, -0.3], dtype=D)

    def solution(x: Tensor) -> Tensor:
        return towards_one(x * x, None, None) + x.pow(2).sum()

    hg = bl.hypergradient(
        problem,
        x,
        {"b": ZERO, "a": ZERO},
        NONE,
        solver=bl.Descent(Reordered(), 300),
        estimator=bl.Implicit(bl.CG(30, tol=1e-12)),
    )
    assert not hg.status.failed
    close(hg.grad, central(solution, x))


@dataclasses.dataclass(frozen=True)
class EveryLeaf(bl.Optimizer):
    """Takes it for granted that the loss uses every tensor, as here it does."""

    def init(self, inner: Any) -> Any:
        return None

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        return {name: inner[name] - 0.3 * grad[name] for name in inner}, None

    def stationarity(self, grad: Any, inner: Any, outer: Any) -> Any:
        return grad


@pytest.mark.parametrize(
    "estimator", [bl.Implicit(bl.CG(10, tol=1e-12)), bl.FirstOrderCorrected()], ids=lambda e: type(e).__name__
)
def test_an_optimizer_meets_no_missing_gradients_that_its_loss_does_not_have(estimator: Any) -> None:
    # The check of a user's optimizer hands it gradients of None although the loss has them: `float * None`.
    problem = bl.Problem(
        lambda y, x, b: near(y["b"], x, b) + 1.5 * (y["a"] - y["b"] * x).pow(2).sum(),
        lambda y, x, b: towards_one(y["a"], x, b) + y["b"].pow(2).sum(),
    )
    hg = bl.hypergradient(
        problem, X / 4, {"b": ZERO, "a": ZERO}, NONE, solver=bl.Descent(EveryLeaf(), 300), estimator=estimator
    )
    close(hg.grad, central(lambda x: towards_one(x * x, None, None) + x.pow(2).sum(), X / 4), rtol=1e-5)


# --- second derivatives


class Cube(torch.autograd.Function):
    """y^3 / 30 with a backward that is right once and loses its own derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y**3 / 30

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].detach() ** 2 / 10


class Product(torch.autograd.Function):
    """Z w with a backward that is right once and loses how the gradient in w depends on Z."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(w, z)
        return z @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        w, z = ctx.saved_tensors
        return z.detach().T @ g, torch.outer(g, w)


def unrolled(loss: Callable[..., Tensor], y0: Tensor, lr: float, steps: int) -> Callable[[Tensor], Tensor]:
    """The K-step program by hand; differences of it need no second derivative."""

    def program(x: Tensor) -> Tensor:
        y = y0
        for _ in range(steps):
            y = y.detach().requires_grad_()
            y = (y - lr * torch.autograd.grad(loss(y, x, True), y)[0]).detach()
        return towards_one(y, x, None)

    return program


def with_cube(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return near(y, x, b) + (Cube.apply(y).sum() if b else 0)


def with_cube_and_rounding(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return with_cube(y, x, b) + 0.1 * (y + (y.round() - y).detach()).sum()


def with_cube_and_scale(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return near(y, x, b) + 0.5e5 * (y[0] - x[0]).square() + Cube.apply(y[1])


SECOND = {
    # At y = 0 the lost term is 0, and that one look is remembered for good: y_0 = 0 is where most heads begin.
    "lost where it is zero at the start": (with_cube, ZERO, 0.3, 30),
    # A straight-through estimator beside it: differences of the loss then disagree with its first derivative by design,
    # and the look ends there, although differences of the gradient still tell.
    "lost beside a straight-through estimator": (with_cube_and_rounding, ZERO + 0.8, 0.3, 10),
    # Compared by the norm over the whole tensor, a steep entry hides what the others lack.
    "lost beside a steep entry": (with_cube_and_scale, ZERO + 0.8, 1e-5, 0),
}


@pytest.mark.xfail(
    reason="known limit: second derivatives are looked at once, at the first point, and not beside surrogates"
)
@pytest.mark.parametrize("case", list(SECOND))
def test_a_lost_second_derivative_is_found(case: str) -> None:
    loss, y0, lr, steps = SECOND[case]

    def call(loss: Any) -> bl.Hypergradient:
        return bl.hypergradient(
            bl.Problem(loss, towards_one),
            X / 2,
            y0,
            bl.Batches(True, None),
            solver=bl.Descent(bl.SGD(lr=lr), steps),
            estimator=bl.Unrolled() if steps else bl.Implicit(bl.Dense()),
        )

    def whole(y: Tensor, x: Tensor, b: Any) -> Tensor:
        if case == "lost beside a steep entry":
            return near(y, x, b) + 0.5e5 * (y[0] - x[0]).square() + y[1] ** 3 / 30
        return near(y, x, b) + (y**3 / 30).sum() + (0.1 * y.sum() if "straight" in case else 0)

    right_or_refused(lambda: call(loss), call(whole).grad)


@pytest.mark.xfail(strict=True, reason="known limit: second derivatives are looked at once, at the first point")
def test_a_lost_second_derivative_is_found_when_it_comes_later() -> None:
    # The first call's batch does not meet the function; what was seen then is not true of the second.
    problem = bl.Problem(with_cube, towards_one)

    def call(on: bool) -> bl.Hypergradient:
        solver = bl.Descent(bl.SGD(lr=0.3), 30)
        return bl.hypergradient(problem, X / 2, ZERO + 1, bl.Batches(on, None), solver=solver, estimator=bl.Unrolled())

    call(False)
    right_or_refused(lambda: call(True), central(unrolled(with_cube, ZERO + 1, 0.3, 30), X / 2))


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.Implicit(bl.CG(10, tol=1e-12))], ids=lambda e: type(e).__name__
)
def test_a_lost_mixed_derivative_is_found(features: bool, estimator: Any) -> None:
    # d2g / dy dx is what carries x to y: the rows of x (and those of the features) must be looked at, along y alone.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, dtype=D, generator=generator)
    t = torch.randn(6, dtype=D, generator=generator)

    def loss(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fit(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * (product(w, z) - t).square().mean() + 0.1 * w.square().sum()

        return fit if features else lambda w, x, b: fit(w, x, b * x)

    def call(product: Callable[..., Tensor]) -> bl.Hypergradient:
        problem = bl.Problem(loss(product), towards_one, features=(lambda x, b: b * x) if features else None)
        solver = bl.Descent(bl.SGD(lr=0.2), 400)
        return bl.hypergradient(problem, X / 2, ZERO, bl.Batches(z, z), solver=solver, estimator=estimator)

    right_or_refused(lambda: call(Product.apply), call(lambda w, z: z @ w).grad)


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled(keep="iterates")], ids=lambda e: e.keep)
def test_weight_norm_has_its_second_derivative(estimator: Any) -> None:
    # torch's own operator (2.13): the double backward of _weight_norm takes the norms for constants, and says nothing.
    # "torch's own operators have a right second derivative or raise", which engine/twice.py relies on, is not so.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 3, dtype=D, generator=generator)
    layer = torch.nn.Linear(3, 1, bias=False, dtype=D)
    torch.nn.init.constant_(layer.weight, 0.5)
    call, y0 = bl.functional(torch.nn.utils.parametrizations.weight_norm(layer), requires_grad=False)
    size, direction = y0  # original0: the length, original1: the direction

    def by_hand(y: Any, z: Tensor) -> Tensor:
        return z @ (y[size] * y[direction] / y[direction].norm(dim=1, keepdim=True)).T

    def grad(call: Callable[..., Tensor]) -> bl.Hypergradient:
        problem = bl.Problem(
            lambda y, x, b: ((call(y, z)[:, 0] - x).square()).mean(), lambda y, x, b: call(y, z).tanh().sum()
        )
        x = torch.linspace(-1, 1, 5, dtype=D)
        solver = bl.Descent(bl.SGD(lr=0.1), 5)
        return bl.hypergradient(problem, x, y0, NONE, solver=solver, estimator=estimator)

    right_or_refused(lambda: grad(call), grad(by_hand).grad)


# --- what was learned about a problem, and is no longer so


def switched(y: Tensor, x: Tensor, b: Any) -> Tensor:
    return near(y, x if b else x.detach(), b)


STALE = {
    "inner loss": (bl.Problem(switched, towards_one), ZERO, bl.FirstOrder()),
    "start": (
        bl.Problem(lambda y, x, b: near(y, ZERO, b), towards_one, lambda x, b: x * 1 if b else ZERO),
        None,
        bl.Implicit(bl.CG(5)),
    ),
}


@pytest.mark.parametrize("case", list(STALE))
def test_a_path_that_opens_later_is_seen(case: str) -> None:
    # x.detach() for a warm-up, then x: refused where it is the first call, zeros with OK where it is the second.
    problem, inner, estimator = STALE[case]

    def call(on: bool, problem: bl.Problem) -> bl.Hypergradient:
        solver = bl.Descent(bl.SGD(lr=0.1), 3)
        return bl.hypergradient(problem, X, inner, bl.Batches(on, None), solver=solver, estimator=estimator)

    assert refusal_of(lambda: call(True, dataclasses.replace(problem))) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(False, problem)
    assert refusal_of(lambda: call(True, problem)) is not None


def test_a_path_that_opens_at_a_later_batch_of_per_step_is_seen() -> None:
    # Only the first batch of PerStep is looked at.
    batches = bl.Batches(bl.PerStep([False, True, True]), None)
    solver = bl.Descent(bl.SGD(lr=0.1), 3)
    found = refusal_of(
        lambda: bl.hypergradient(
            bl.Problem(switched, towards_one), X, ZERO, batches, solver=solver, estimator=bl.FirstOrder()
        )
    )
    assert found is not None


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.FirstOrder()], ids=lambda e: type(e).__name__)
def test_a_gradient_penalty_that_is_switched_on_later_works(estimator: Any) -> None:
    # "plain" is remembered of a loss that takes a gradient of its own only later: torch's raw error comes through then.
    def loss(y: Tensor, x: Tensor, b: Any) -> Tensor:
        if not b:
            return near(y, x, b)
        slope = torch.autograd.grad((y**3).sum(), y, create_graph=True)[0]
        return near(y, x, b) + 0.01 * slope.square().sum()

    def call(on: bool, problem: bl.Problem) -> Tensor:
        solver = bl.Descent(bl.SGD(lr=0.1), 3)
        return bl.hypergradient(problem, X, ZERO + 1, bl.Batches(on, None), solver=solver, estimator=estimator).grad

    problem = bl.Problem(loss, lambda y, x, b: towards_one(y, x, b) + x.sum())
    call(False, problem)
    close(call(True, problem), call(True, dataclasses.replace(problem)))


# --- first order, corrected


@pytest.mark.parametrize("scheme", ["symmetric", "forward"])
def test_a_solved_inner_problem_and_a_linear_outer_loss_do_not_run_away(scheme: str) -> None:
    # From y_0 = y*(x) with g = f = 0 there, any distance of order nu looked like an escape: UNBOUNDED, of a right one.
    slope = torch.tensor([1.0, 2.0], dtype=D)
    hg = bl.hypergradient(
        bl.Problem(near, lambda y, x, b: (y * slope).sum()),
        ZERO,
        ZERO,
        NONE,
        solver=bl.Descent(bl.SGD(lr=0.5), 50),
        estimator=bl.FirstOrderCorrected(scheme=scheme),
    )
    close(hg.grad, slope)
    assert not hg.status.failed, hg.status


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("nu", [1e-2, 1e-3])
def test_warm_sides_follow_x_without_a_false_alarm(nu: float, steps: int) -> None:
    # mu = 0.1, nu L_f <= 0.01: both sides are strongly convex throughout. Near the end of an outer loop the sides stand
    # nu apart and x hardly moves them, which is no running away; iterate() stopped with UNBOUNDED.
    h = torch.tensor([1.0, 0.1], dtype=D)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (h * (y - x).square()).sum(),
        lambda y, x, b: 0.5 * towards_one(y, x, b) + 0.05 * x.square().sum(),
    )
    x = torch.tensor([3.0, -2.0], dtype=D, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.05)
    estimator = bl.FirstOrderCorrected(nu=nu, warm_sides=True)
    loop = bl.iterate(
        problem,
        x,
        ZERO,
        [NONE] * 40,
        solver=bl.Descent(bl.SGD(lr=0.9), steps),
        estimator=estimator,
        optimizer=optimizer,
    )
    assert len(list(loop)) == 40


@pytest.mark.parametrize("scheme", ["symmetric", "forward"])
def test_features_that_draw_are_those_that_y_was_solved_on(scheme: str) -> None:
    # dg/dx at the two solutions was taken on a dropout mask of its own: another problem's, by several times.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, dtype=D, generator=generator)
    t = torch.randn(6, dtype=D, generator=generator)
    drop = torch.nn.Dropout(0.5)
    problem = bl.Problem(
        lambda w, x, b: 0.5 * (b @ w - t).square().mean() + 0.5 * w.square().sum(),
        towards_one,
        features=lambda x, b: b if b is None else drop(b * x),
    )

    def grad(estimator: Any) -> Tensor:
        torch.manual_seed(0)
        x, y, solver = torch.ones(4, dtype=D), torch.zeros(4, dtype=D), bl.Descent(bl.SGD(lr=0.1), 600)
        return bl.hypergradient(problem, x, y, bl.Batches(z, None), solver=solver, estimator=estimator).grad

    expected = grad(bl.Implicit(bl.CG(10, tol=1e-12)))
    close(grad(bl.Unrolled()), expected)
    close(grad(bl.FirstOrderCorrected(scheme=scheme)), expected, rtol=1e-4)


# --- alarms


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_an_inner_problem_solved_to_rounding_is_not_unstable(dtype: torch.dtype) -> None:
    # SGD at 1 / L on least squares with more unknowns than data: g ends at 1e-14 (1e-31), where its digits and what
    # its last step promised are rounding; "a step that gains nothing" is judged relative to g itself.
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, 20, generator=generator).to(dtype)
    t = torch.randn(8, generator=generator).to(dtype)
    lr = 4 / torch.linalg.matrix_norm(z, 2).item() ** 2
    problem = bl.Problem(lambda y, x, b: (x.exp() * z @ y - t).square().mean(), lambda y, x, b: y.square().sum())
    x, y = torch.zeros((), dtype=dtype), torch.zeros(20, dtype=dtype)
    for _ in range(2):  # and once more from there, as iterate(carry=True) does
        solver = bl.Descent(bl.SGD(lr=lr), 400)
        hg = bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=bl.Unrolled())
        assert hg.status is bl.Status.OK
        y = hg.inner


# --- a user's own stopping rule


@dataclasses.dataclass(frozen=True)
class Loose(bl.InnerSolver):
    """Stops at a residual of its own, and answers with a plain bool."""

    dynamics = bl.inner.GradientDynamics(bl.SGD(lr=0.3))
    max_steps = 200
    fixed = False

    def solved(self, residual: Tensor) -> Any:
        return bool(residual < 1e-9)


def test_a_rule_that_answers_with_a_bool_gets_no_raw_error() -> None:
    # `~True` is -2: the loop never stops, and ends in "'int' object has no attribute 'any'".
    refusal_of(
        lambda: bl.hypergradient(bl.Problem(near, towards_one), X, ZERO, NONE, solver=Loose(), estimator=bl.Unrolled())
    )


def test_a_rule_without_tightened_is_refused_in_words() -> None:
    # FirstOrderCorrected lets a NotImplementedError through.
    refusal_of(
        lambda: bl.hypergradient(
            bl.Problem(near, towards_one), X, ZERO, NONE, solver=Loose(), estimator=bl.FirstOrderCorrected()
        )
    )
