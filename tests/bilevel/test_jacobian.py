"""Derivatives inside functions: normalization layers written out, Jacobians and their derivatives, layer by layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import bilevel as bl
from bilevel.engine import jacobian
from bilevel.engine.jacobian import Elementary

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def scaled(layer):
    """Weights, biases and running statistics that are not 1 and 0."""
    layer = layer.double()
    for i, tensor in enumerate((*layer.parameters(), *layer.buffers())):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(draw(*tensor.shape, seed=i).abs() + 0.5)
    return layer


LAYERS = {
    "batch 1d": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
    "batch 1d of sequences": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4, 3)),
    "batch 2d, no affine": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), (3, 4, 5, 2)),
    "batch 3d": (lambda: nn.BatchNorm3d(4, track_running_stats=False, eps=0.1), (3, 4, 2, 2, 2)),
    "batch, running": (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 5, 2)),
    "batch, running, no affine": (lambda: nn.BatchNorm1d(4, affine=False).eval(), (3, 4)),
    "layer": (lambda: nn.LayerNorm(4), (3, 5, 4)),
    "layer of two dimensions": (lambda: nn.LayerNorm((5, 4), eps=0.1), (3, 5, 4)),
    "layer, no affine": (lambda: nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "layer, no bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "group, no affine": (lambda: nn.GroupNorm(4, 4, affine=False), (3, 4, 2, 2)),
    "instance": (lambda: nn.InstanceNorm2d(4), (3, 4, 5, 2)),
    "instance, affine": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "instance, running": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), (3, 4, 5)),
    "weight": (lambda: weight_norm(nn.Linear(4, 3)), (5, 4)),
    "weight of a convolution": (lambda: weight_norm(nn.Conv1d(4, 3, 2), dim=1), (5, 4, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_written_out_have_the_same_values(name, dtype):
    make, shape = LAYERS[name]
    layer, x = scaled(make()).to(dtype), draw(*shape, seed=9).to(dtype)
    with Elementary():
        written = layer(x)
    assert written.dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(written, layer(x), rtol=tolerance, atol=tolerance)


def test_layers_that_write_their_statistics_still_do():
    for layer in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
        with Elementary():
            layer(draw(3, 4, 5).float())
        assert float(layer.running_mean.abs().max()) > 0


@pytest.mark.parametrize("name", LAYERS)
def test_the_derivative_of_products_with_a_jacobian(name):
    """d/dp |J(J' a)|^2, a third derivative, against finite differences, singly and under vmap."""
    make, shape = LAYERS[name]
    layer = scaled(make())
    module = nn.Sequential(nn.Linear(shape[-1], shape[-1]).double(), layer, nn.Tanh(), nn.Flatten())
    call, p = bl.functional(module, trainable=True)
    x = draw(2, *shape, seed=9)
    a = draw(*module(x[0]).shape, seed=3)

    def one(p, x):
        _, pull = jacobian.pullback(lambda p: call(p, x), p)
        return jacobian.product(lambda p: call(p, x), p, pull(a)).square().sum()

    def loop(p):
        return sum(one(p, each) for each in x)

    def mapped(p):
        return torch.func.vmap(lambda each: one(p, each))(x).sum()

    direction = {key: draw(*leaf.shape, seed=7) for key, leaf in p.items()}
    h = 1e-6
    ahead, back = (loop({key: leaf.detach() + s * h * direction[key] for key, leaf in p.items()}) for s in (1, -1))
    expected = float(ahead - back) / (2 * h)
    for program in (loop, mapped):
        slope = torch.autograd.grad(program(p), list(p.values()), allow_unused=True)
        found = sum(float((s * direction[key]).sum()) for key, s in zip(p, slope, strict=True) if s is not None)
        assert found == pytest.approx(expected, rel=2e-6, abs=1e-7)


def test_products_with_a_jacobian_are_each_others_transposes():
    call, p = bl.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = draw(4, 3)
    value, rows = jacobian.jacobian(lambda p: call(p, x), p)
    v, u = {name: draw(*leaf.shape, seed=1) for name, leaf in p.items()}, draw(4, 2, seed=2)
    forward = jacobian.product(lambda p: call(p, x), p, v)
    expected = sum(rows[name].flatten(1) @ v[name].reshape(-1) for name in p)
    torch.testing.assert_close(forward.reshape(-1), expected, rtol=1e-12, atol=1e-13)
    same, pull = jacobian.pullback(lambda p: call(p, x), p)
    back = pull(u)
    assert float(sum((back[name] * v[name]).sum() for name in p)) == pytest.approx(
        float((u * forward).sum()), rel=1e-12
    )
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(
        jacobian.dot(rows, rows), sum(leaf.flatten(1) @ leaf.flatten(1).mT for leaf in rows.values())
    )


def test_a_gradient_is_of_a_number():
    value, slope = jacobian.gradient(lambda y: (y["a"] ** 3).sum(), {"a": torch.tensor([1.0, 2.0])})
    torch.testing.assert_close((value, slope["a"]), (torch.tensor(9.0), torch.tensor([3.0, 12.0])))
    with pytest.raises(ValueError, match="0-dim"):
        jacobian.gradient(lambda y: y**2, torch.ones(2))
