"""Outer optimizers: closed forms, and the meta-objective they are made for."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bilevel as bl

F64 = torch.float64
OPTIMIZERS = {
    "clipped": lambda params, **kwargs: bl.ClippedSGD(params, lr=0.5, radius=0.1, **kwargs),
    "normalized": lambda params, **kwargs: bl.NormalizedSGD(params, lr=0.1, **kwargs),
}


def leaf(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64, requires_grad=True)


def stepped(make: Callable, gradients: list[Tensor], **kwargs: float) -> list[Tensor]:
    """The positions after each gradient, from zero."""
    x = torch.zeros_like(gradients[0], requires_grad=True)
    optimizer, path = make([x], **kwargs), []
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
        path.append(x.detach().clone())
    return path


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ((0.06, 0.08), (-0.03, -0.04)),  # |g| = 0.1, lr |g| = 0.05 < radius: plain descent
        ((0.12, 0.16), (-0.06, -0.08)),  # lr |g| = radius exactly
        ((30.0, 40.0), (-0.06, -0.08)),  # a step of length radius
    ],
)
def test_clipped_steps_are_plain_up_to_the_radius(gradient, expected):
    (x,) = stepped(OPTIMIZERS["clipped"], [torch.tensor(gradient, dtype=F64)])
    torch.testing.assert_close(x, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_whose_square_overflows_still_make_a_step(name):
    """Exploding gradients are what these optimizers are for; |g| = inf would make every step zero, quietly."""
    (x,) = stepped(OPTIMIZERS[name], [torch.tensor([3e25, 4e25], dtype=torch.float32)])
    torch.testing.assert_close(x, torch.tensor([-0.06, -0.08], dtype=torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e100])
def test_normalized_steps_have_the_length_lr_whatever_the_gradient(scale):
    (x,) = stepped(OPTIMIZERS["normalized"], [scale * torch.tensor([3.0, 4.0], dtype=F64)])
    torch.testing.assert_close(x, torch.tensor([-0.06, -0.08], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_averages_the_gradients_and_the_average_is_what_is_scaled(name):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, generator=generator, dtype=F64) for _ in range(5)]
    path = stepped(OPTIMIZERS[name], gradients, momentum=0.8)
    x, m = torch.zeros(3, dtype=F64), gradients[0]
    for index, gradient in enumerate(gradients):
        m = m if index == 0 else 0.8 * m + 0.2 * gradient
        x = x - (min(0.5, 0.1 / m.norm().item()) if name == "clipped" else 0.1 / m.norm().item()) * m
        torch.testing.assert_close(path[index], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_gradient_makes_no_step(name, momentum):
    for x in stepped(OPTIMIZERS[name], [torch.zeros(3, dtype=F64)] * 2, momentum=momentum):
        assert torch.equal(x, torch.zeros(3, dtype=F64))


def test_normalized_makes_no_step_along_rounding_noise():
    assert torch.equal(
        stepped(OPTIMIZERS["normalized"], [torch.full((3,), 1e-14, dtype=F64)])[0], torch.zeros(3, dtype=F64)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_is_taken_over_all_tensors_of_a_group(name):
    a, b = leaf(0.0), leaf(0.0, 0.0)
    a.grad, b.grad = torch.tensor([2.0], dtype=F64), torch.tensor([3.0, 6.0], dtype=F64)
    OPTIMIZERS[name]([a, b]).step()
    torch.testing.assert_close(
        torch.cat([a, b]).detach(), -0.1 * torch.tensor([2.0, 3.0, 6.0], dtype=F64) / 7, rtol=1e-12, atol=0
    )


def test_parameter_groups_have_their_own_norms_and_settings():
    a, b, idle = leaf(0.0), leaf(0.0), leaf(5.0)
    a.grad, b.grad = torch.tensor([4.0], dtype=F64), torch.tensor([-8.0], dtype=F64)
    bl.NormalizedSGD([{"params": [a]}, {"params": [b, idle], "lr": 0.5}], lr=0.1).step()
    assert [x.item() for x in (a, b, idle)] == pytest.approx([-0.1, 0.5, 5.0], rel=1e-12)
    a, b = leaf(0.0), leaf(0.0)
    a.grad, b.grad = torch.tensor([4.0], dtype=F64), torch.tensor([-8.0], dtype=F64)
    bl.ClippedSGD([{"params": [a], "lr": 0.01}, {"params": [b], "radius": 0.7}], lr=1.0, radius=0.1).step()
    assert [x.item() for x in (a, b)] == pytest.approx([-0.04, 0.7], rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip_continues_the_same_path(name):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(3, generator=generator, dtype=F64) for _ in range(6)]
    whole = stepped(OPTIMIZERS[name], gradients, momentum=0.7)
    x = leaf(0.0, 0.0, 0.0)
    optimizer = OPTIMIZERS[name]([x], momentum=0.7)
    for index, gradient in enumerate(gradients):
        if index == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            x = x.detach().clone().requires_grad_()
            optimizer = OPTIMIZERS[name]([x])  # momentum comes back with the state
            optimizer.load_state_dict(saved)
        x.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(x.detach(), whole[-1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned(name):
    x = leaf(1.0)
    optimizer = OPTIMIZERS[name]([x])

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert x.item() == pytest.approx(0.9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_not_changed_and_learning_rate_schedulers_apply(name):
    x = leaf(0.0, 0.0)
    x.grad = torch.tensor([0.3, 0.4], dtype=F64)
    optimizer = OPTIMIZERS[name]([x], momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert torch.equal(x.grad, torch.tensor([0.3, 0.4], dtype=F64))
    assert optimizer.param_groups[0]["lr"] == pytest.approx({"clipped": 0.5, "normalized": 0.1}[name] / 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: bl.ClippedSGD([x], lr=-1.0, radius=1.0), r"ClippedSGD was given lr=-1\.0; a number of at least 0"),
        (lambda x: bl.ClippedSGD([x], lr=float("nan"), radius=1.0), "lr=nan"),
        (lambda x: bl.ClippedSGD([x], lr=0.1, radius=0.0), r"radius=0\.0; a positive number"),
        (lambda x: bl.ClippedSGD([x], lr=0.1, radius=1.0, momentum=1.0), r"momentum=1\.0; a number in \[0, 1\)"),
        (lambda x: bl.NormalizedSGD([x], lr=-1.0), r"NormalizedSGD was given lr=-1\.0"),
        (lambda x: bl.NormalizedSGD([x], lr=0.1, momentum=-0.1), r"momentum=-0\.1"),
        (lambda x: bl.NormalizedSGD([x], lr=0.1, eps=-1.0), r"eps=-1\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(leaf(0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: bl.ClippedSGD([x], lr=float("inf"), radius=1.0),
            "ClippedSGD was given lr=inf; a number of at least",
        ),
        (lambda x: bl.ClippedSGD([x], lr="0.1", radius=1.0), "lr='0.1'"),
        (lambda x: bl.ClippedSGD([x], lr=True, radius=1.0), "lr=True"),
        (lambda x: bl.ClippedSGD([x], lr=0.1, radius=float("nan")), "radius=nan; a positive number"),
        (lambda x: bl.ClippedSGD([x], lr=0.1, radius=None), "radius=None; a positive number"),
        (lambda x: bl.ClippedSGD([{"params": [x], "radius": -1.0}], lr=0.1, radius=1.0), r"radius=-1\.0"),
        (lambda x: bl.NormalizedSGD([{"params": [x], "momentum": 1.5}], lr=0.1), r"momentum=1\.5"),
        (lambda x: bl.NormalizedSGD([x.detach().to(torch.complex64)], lr=0.1), "dtype torch.complex64; use torch.view"),
    ],
)
def test_settings_of_groups_and_what_is_no_number_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(leaf(0.0))


def test_an_infinite_radius_clips_nothing():
    x = leaf(0.0)
    x.grad = torch.tensor([30.0], dtype=F64)
    bl.ClippedSGD([x], lr=0.5, radius=math.inf).step()
    assert x.item() == -15.0


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_move_as_dense_ones(name, momentum):
    """Of nn.Embedding(sparse=True), with a row that was looked up twice."""
    paths = []
    for sparse in (True, False):
        table = torch.nn.Embedding(4, 2, sparse=sparse, dtype=F64)
        torch.nn.init.constant_(table.weight, 0.5)
        optimizer = OPTIMIZERS[name](table.parameters(), momentum=momentum)
        for tokens in ([0, 2, 2], [1, 2], [0, 0]):
            optimizer.zero_grad()
            table(torch.tensor(tokens)).pow(3).sum().backward()
            assert (table.weight.grad.layout == torch.sparse_coo) == sparse
            optimizer.step()
        paths.append(table.weight.detach().clone())
    assert (paths[0] - 0.5).abs().max() > 1e-2
    torch.testing.assert_close(*paths, rtol=1e-13, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_empty_tensors_missing_and_zero_gradients_move_nothing_and_break_nothing(name, momentum):
    empty, missing, still, moved = torch.zeros(0, 3, requires_grad=True), leaf(1.0), leaf(2.0), leaf(0.0, 0.0)
    optimizer = OPTIMIZERS[name](
        [{"params": [empty]}, {"params": [missing, still]}, {"params": [moved, empty.clone().detach()]}],
        momentum=momentum,
    )
    empty.grad, still.grad = torch.zeros(0, 3), torch.zeros(1, dtype=F64)
    optimizer.step()
    moved.grad = torch.tensor([30.0, 40.0], dtype=F64)
    optimizer.step()
    assert [missing.item(), still.item(), *moved.tolist()] == pytest.approx([1.0, 2.0, -0.06, -0.08], rel=1e-12)
    assert missing not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_number_in_any_dtype_moves_and_keeps_its_dtype(name, dtype):
    x = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    x.grad = torch.tensor(8.0, dtype=dtype)
    OPTIMIZERS[name]([x], momentum=0.5).step()
    assert x.dtype == dtype
    assert x.item() == pytest.approx(0.9, rel=1e-2)


# The meta-objective of papers.md 1.6 d: support loss cos(phi), query loss phi^2 / 2, proximal strength 2.
# phi(theta) solves theta = phi - sin(phi) / 2, and F' = 2 phi / (2 - cos phi). Its curvature is unbounded, but |F''| <=
# 4 + 2 |F'|.


def adapted(theta: float) -> float:
    phi = theta
    for _ in range(60):
        change = (phi - math.sin(phi) / 2 - theta) / (1 - math.cos(phi) / 2)
        phi -= change
        if abs(change) < 1e-14 * max(1.0, abs(phi)):
            break
    return phi


def slope(theta: float) -> float:
    phi = adapted(theta)
    return 2 * phi / (2 - math.cos(phi))


def curvature(theta: float) -> float:
    phi = adapted(theta)
    gain = 2 / (2 - math.cos(phi))
    return gain**2 - phi * gain * 2 * math.sin(phi) / (2 - math.cos(phi)) ** 2


@pytest.mark.parametrize("theta", [0.0, 0.7, -3.0, 10.0, 100.0])
def test_the_hypergradient_of_the_generalized_smoothness_example_is_the_closed_form(theta):
    maml = bl.Problem(lambda y, x, b: y.cos(), lambda y, x, b: y**2 / 2, init=lambda x, b: x)
    solver = bl.Converge(bl.SGD(lr=0.4), tol=1e-12, max_steps=2000)
    hg = bl.hypergradient(
        bl.proximal(maml, 2.0),
        torch.tensor(theta, dtype=F64),
        None,
        bl.Batches(None, None),
        solver=solver,
        estimator=bl.Implicit(bl.CG(max_steps=1, tol=1e-12)),
    )
    assert hg.status is bl.Status.OK
    assert hg.inner.item() == pytest.approx(adapted(theta), rel=1e-10, abs=1e-10)
    assert hg.grad.item() == pytest.approx(slope(theta), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize(("reach", "largest"), [(10, 11), (100, 133), (1000, 1394)])
def test_curvature_grows_with_the_distance_but_not_faster_than_the_slope(reach, largest):
    grid = [reach * (i / 2000 - 1) for i in range(4001)]
    curvatures = [abs(curvature(theta)) for theta in grid]
    assert max(curvatures) == pytest.approx(largest, rel=0.05)
    assert max(c / (4 + 2 * abs(slope(theta))) for c, theta in zip(curvatures, grid, strict=True)) <= 1 + 1e-12


def steps_until_flat(
    optimizer: torch.optim.Optimizer, x: Tensor, derivative: Callable[[float], float], most: int
) -> int:
    """Steps until |F'| <= 1e-3 (or `most`)."""
    for step in range(most):
        g = derivative(x.item())
        if not math.isfinite(g):
            return most
        if abs(g) <= 1e-3:
            return step
        x.grad = torch.tensor([g], dtype=F64)
        optimizer.step()
        for group in optimizer.param_groups:
            if isinstance(optimizer, bl.NormalizedSGD) and abs(x.item()) < 1:
                group["lr"] *= 0.8  # steps do not shrink by themselves
    return most


def test_clipped_and_normalized_descent_need_a_fraction_of_the_steps_of_plain_descent_at_its_safe_step_size():
    """L0 = 4, L1 = 2; the step size safe for plain descent on |theta| <= 100 is 1 / 133."""
    counts = {}
    for name, make in {
        "plain": lambda x: torch.optim.SGD([x], lr=1 / 133),
        "clipped": lambda x: bl.ClippedSGD([x], lr=1 / 8, radius=1 / 4),
        "normalized": lambda x: bl.NormalizedSGD([x], lr=1 / 4),
    }.items():
        x = leaf(100.0)
        counts[name] = steps_until_flat(make(x), x, slope, most=3000)
    assert counts["clipped"] < 450
    assert counts["normalized"] < 450
    assert counts["plain"] > 2 * max(counts["clipped"], counts["normalized"])


def test_where_curvature_grows_fast_plain_descent_diverges_and_clipped_and_normalized_arrive():
    """F = x^4 / 4 from 1000, with a step size that is fine near the minimum."""
    counts = {}
    for name, make in {
        "plain": lambda x: torch.optim.SGD([x], lr=0.1),
        "clipped": lambda x: bl.ClippedSGD([x], lr=0.1, radius=2.0),
        "normalized": lambda x: bl.NormalizedSGD([x], lr=2.0),
    }.items():
        x = leaf(1000.0)
        counts[name] = steps_until_flat(make(x), x, lambda at: at**3 if abs(at) < 1e100 else math.inf, most=1500)
    assert counts["plain"] == 1500
    assert counts["clipped"] < 1500
    assert counts["normalized"] < 1500


def test_any_outer_optimizer_drives_iterate():
    problem = bl.Problem(lambda y, x, b: (y - x["a"]) ** 2, lambda y, x, b: (y - 3) ** 2)
    for optimizer in (
        lambda p: bl.ClippedSGD(p, lr=0.25, radius=0.3),
        lambda p: bl.NormalizedSGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1),
    ):
        x = {"a": torch.tensor(1.0, dtype=F64, requires_grad=True)}
        loop = bl.iterate(
            problem,
            x,
            torch.tensor(0.0, dtype=F64),
            [bl.Batches(None, None)] * 40,
            solver=bl.Descent(bl.SGD(lr=0.25), steps=10),
            estimator=bl.Implicit(bl.CG(1)),
            optimizer=optimizer(list(x.values())),
        )
        losses = [step.outer_loss.item() for step in loop]
        assert len(losses) == 40
        assert losses[-1] < 0.1 < 4 < losses[0]
