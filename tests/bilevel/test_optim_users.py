"""Inner optimizers: where they rest, those of a user, dtypes and trees."""

import dataclasses
import math

import pytest
import torch
from optim_cases import TORCH, gradient_of, loss_of, numbers_in_float64, start
from torch import Tensor

import bilevel as bl

# Where an optimizer rests


def test_stationarity_is_the_gradient_plus_coupled_decay():
    y = start()
    g = {"w": y["w"] * 2, "b": None, "scale": y["scale"] * 3}
    for kind in (bl.SGD, bl.Adam):
        for decay, of in ((0.3, None), (lambda outer: outer["d"], {"d": torch.tensor(0.3, dtype=torch.float64)})):
            rest = kind(lr=0.1, weight_decay=decay).stationarity(g, y, of)
            assert list(rest) == list(y)
            assert rest["b"] is None
            torch.testing.assert_close(rest["w"], 2.3 * y["w"])
            torch.testing.assert_close(rest["scale"], 3.3 * y["scale"])
        rest = kind(lr=0.1, weight_decay={"w": 0.5, "b": 0.1, "scale": 0.0}).stationarity(g, y, None)
        torch.testing.assert_close(rest["w"], 2.5 * y["w"])
        torch.testing.assert_close(rest["scale"], 3 * y["scale"])
    assert bl.SGD(lr=0.1).stationarity(g, y, None)["w"] is g["w"]


def test_adamw_with_decay_and_optimizers_that_hold_a_tensor_fixed_do_not_say_where_they_rest():
    y = start()
    assert bl.AdamW(weight_decay=0.1).stationarity(y, y, None) is None
    assert bl.AdamW(weight_decay=lambda outer: 0.0).stationarity(y, y, None) is None
    assert bl.AdamW(weight_decay=0.0).stationarity(y, y, None) is y
    assert bl.SGD(lr={"w": 0.1, "b": 0.0, "scale": 0.1}).stationarity(y, y, None) is None
    assert ClippedNorm(bl.SGD(lr=0.1), 1.0).stationarity(y, y, None) is None


@pytest.mark.parametrize(
    "optimizer",
    [
        bl.SGD(lr=0.2, weight_decay=0.3),
        bl.SGD(lr=0.05, momentum=0.9, dampening=0.2, weight_decay={"w": 0.3, "b": 0.1, "scale": 0.2}),
        bl.Adam(lr=0.02, weight_decay=0.3),
    ],
)
def test_stationarity_is_zero_where_the_steps_come_to_rest(optimizer):
    y = start()
    state = optimizer.init(y)
    for _ in range(4000):
        moved, state = optimizer.step(gradient_of(y), state, y, None)
        step, y = max((moved[key] - y[key]).abs().max().item() for key in y), moved
        if step < 1e-10:
            break
    assert step < 1e-10, "it has not come to rest"
    rest = optimizer.stationarity(gradient_of(y), y, None)
    assert max(leaf.abs().max().item() for leaf in rest.values()) < 1e-7
    assert max(leaf.abs().max().item() for leaf in gradient_of(y).values()) > 1e-3, "the test needs decay that matters"


# Optimizers of a user


@dataclasses.dataclass(frozen=True)
class ClippedNorm(bl.Optimizer):
    """Scales the whole gradient to a norm of at most `limit`, then steps."""

    inside: bl.Optimizer
    limit: float

    def init(self, inner):
        return self.inside.init(inner)

    def step(self, grad, state, inner, outer):
        norm = sum(g.pow(2).sum() for g in grad.values()).sqrt()
        share = (self.limit / norm).clamp(max=1.0)
        return self.inside.step({name: share * g for name, g in grad.items()}, state, inner, outer)


@dataclasses.dataclass(frozen=True)
class Cosine(bl.Optimizer):
    """Adam with a step size that falls along a cosine; counts its own steps."""

    steps: int

    def init(self, inner):
        return (0, bl.Adam().init(inner))

    def step(self, grad, state, inner, outer):
        count, inside = state
        rate = 0.5 * (1 + math.cos(math.pi * count / self.steps))
        adam = bl.Adam(lr=lambda x: rate * x["rate"].exp())
        moved, inside = adam.step(grad, inside, inner, outer)
        return moved, (count + 1, inside)


@dataclasses.dataclass(frozen=True)
class Reader(bl.Optimizer):
    """Reads outer in its step, with no field that says so; momentum in a state of one tensor for all."""

    def init(self, inner):
        return {"past": torch.zeros(sum(leaf.numel() for leaf in inner.values()), dtype=torch.float64)}

    def step(self, grad, state, inner, outer):
        flat = torch.cat([g.reshape(-1) for g in grad.values()])
        past = outer["rate"].sigmoid() * state["past"] + flat
        parts = past.split([leaf.numel() for leaf in inner.values()])
        return {
            name: leaf - 0.1 * part.reshape(leaf.shape) for (name, leaf), part in zip(inner.items(), parts, strict=True)
        }, {"past": past}


USERS = {
    "clip": ClippedNorm(bl.SGD(lr=lambda x: x["rate"].exp(), momentum=0.5), 0.7),
    "cosine": Cosine(8),
    "reader": Reader(),
    "clip of a reader": ClippedNorm(Reader(), 0.7),
}


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
@pytest.mark.parametrize("name", USERS)
def test_a_users_optimizer_is_differentiated_through_its_own_reading_of_outer(name, keep):
    optimizer = USERS[name]

    def inner_loss(y, x, batch):
        return loss_of(y) + x["shift"] * y["w"].sum()

    def outer_loss(y, x, batch):
        return sum(leaf.pow(2).sum() for leaf in y.values())

    def value(rate, shift):
        x, y = {"rate": rate, "shift": shift}, start()
        state = optimizer.init(y)
        for _ in range(6):
            leaves = {key: leaf.detach().requires_grad_() for key, leaf in y.items()}
            gradient = torch.autograd.grad(inner_loss(leaves, x, None), list(leaves.values()))
            y, state = optimizer.step(dict(zip(y, gradient, strict=True)), state, y, x)
        return outer_loss(y, x, None)

    x = {"rate": torch.tensor(-1.5, dtype=torch.float64), "shift": torch.tensor(0.4, dtype=torch.float64)}
    hg = bl.hypergradient(
        bl.Problem(inner_loss, outer_loss),
        x,
        start(),
        bl.Batches(None, None),
        solver=bl.Descent(optimizer, steps=6),
        estimator=bl.Unrolled(keep=keep),
    )
    for key in x:
        up, down = ({**x, key: x[key] + sign * 1e-6} for sign in (1, -1))
        difference = (value(**up) - value(**down)) / 2e-6
        assert difference.abs() > 1e-3, "the path must matter"
        torch.testing.assert_close(hg.grad[key], difference, rtol=1e-6, atol=1e-8)


# Dtypes and trees

TREES = {
    "one number": lambda t: t(),
    "nested": lambda t: {"layers": [t(2), (t(3), {"deep": t()})], "last": t(1)},
    "tuple": lambda t: (t(2), [t()]),
    "with an empty tensor": lambda t: [t(2), t(0)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("kind", TORCH)
@numbers_in_float64()
def test_steps_keep_dtype_and_structure_and_equal_torch_optim_in_every_dtype(kind, shape, dtype):
    generator = torch.Generator().manual_seed(5)
    y = TREES[shape](lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
    leaves, structure = torch.utils._pytree.tree_flatten(y)
    # A learned rate in float64: it widens a 0-dim tensor unless it is cast.
    rate = torch.tensor(0.05, dtype=torch.float64)
    arguments = {bl.SGD: {"momentum": 0.5}, bl.optim.Lion: {}}.get(kind, {"eps": 1e-3})
    optimizer = kind(lr=lambda outer: outer, **arguments)
    others = [leaf.clone().requires_grad_() for leaf in leaves]
    other = TORCH[kind](others, lr=0.05, **({} if kind is bl.optim.Lion else {"foreach": False}), **arguments)
    state = optimizer.init(y)
    for _ in range(5):
        gradient = [(leaf * 2).detach() for leaf in others]
        y, state = optimizer.step(torch.utils._pytree.tree_unflatten(gradient, structure), state, y, rate)
        for leaf, g in zip(others, gradient, strict=True):
            leaf.grad = g.clone()
        other.step()
    found, kept = torch.utils._pytree.tree_flatten(y)
    assert kept == structure
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip(found, others, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.detach(), rtol=bound, atol=bound)
    # What float16 cannot hold, the second moment of a small gradient, is kept in float32.
    kept = dtype if kind is bl.SGD else torch.promote_types(dtype, torch.float32)
    assert all(leaf.dtype == kept for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("kind", TORCH)
def test_element_wise_step_sizes_in_a_wider_dtype_do_not_widen_the_inner_variable(kind):
    y = torch.ones(3, dtype=torch.float32)
    optimizer = kind(lr=lambda outer: outer)
    moved, _ = optimizer.step(y, optimizer.init(y), y, torch.full((3,), 0.1, dtype=torch.float64))
    assert moved.dtype == torch.float32


@pytest.mark.parametrize("keep", ["graph", "iterates"])
@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_one_tensor_in_two_places_of_the_inner_variable_is_two_tensors_that_start_alike(kind, keep):
    same = torch.tensor([1.0, -2.0], dtype=torch.float64)
    problem = bl.Problem(
        lambda y, x, b: ((y["a"] - x) ** 4).sum() + (2 * y["b"] + x).cosh().sum(),
        lambda y, x, b: (y["a"] * y["b"].exp()).sum(),
    )
    grads = [
        bl.hypergradient(
            problem,
            torch.tensor(0.3, dtype=torch.float64),
            {"a": same, "b": other},
            bl.Batches(None, None),
            solver=bl.Descent(kind(lr=0.01, weight_decay=0.1), 5),
            estimator=bl.Unrolled(keep=keep),
        ).grad
        for other in (same, same.clone())
    ]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=0)
