"""Rematerialized blocks: the numbers of plain autograd, and what is kept to have them."""

import contextlib
import functools
import gc

import pytest
import torch
from bilevel_profiling import Case, forecast, measure
from bilevel_profiling.meters.tensors import Tensors
from catalogue import ALIKE
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bilevel as bl
from bilevel.engine import lean
from bilevel.testing import catalogue

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def lean_at_every_size(monkeypatch):
    monkeypatch.setattr(lean, "_WORTH", 1)
    monkeypatch.setattr(lean, "_LARGE", 1)


def tensor(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def close(ours, theirs, tol=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).detach().norm() <= tol * max(1.0, float(b.detach().norm()))


def orders(function, leaves, order=2):
    """The value, the gradient of it, of its squared norm, and so on up to an order."""
    value = function(*leaves)
    found = [value.detach()]
    for each in range(order):
        gradient = torch.autograd.grad(value, leaves, create_graph=each + 1 < order, allow_unused=True)
        found += gradient
        value = sum(g.abs().square().sum() for g in gradient if g is not None and g.requires_grad)
        if not torch.is_tensor(value):
            break
    return found


def same(function, leaves, order=2, make=bl.rematerialize, **options):
    """The derivatives of make(block) put into `function`, against those of the block as it is."""
    torch.manual_seed(0)
    theirs = orders(lambda *x: function(lambda f: f, *x), leaves, order)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    close(orders(lambda *x: function(make, *x), leaves, order), theirs, **options)
    assert torch.equal(torch.get_rng_state(), after)


def layer(h, w):
    return torch.tanh(h @ w) + 0.3 * h


# --- functions


def test_first_and_second_derivatives_are_those_of_differences():
    block = bl.rematerialize(lambda h, w, scale: {"out": [torch.tanh(h @ w) * scale, (h * w.sum()).sin()]})

    def stack(h, w):
        first, second = block(h, w, 2.0)["out"]
        third, fourth = block(first, w, scale=0.5)["out"]
        return second, third * fourth

    inputs = tensor(4, 3), tensor(3, 3, seed=1)
    assert torch.autograd.gradcheck(stack, inputs)
    assert torch.autograd.gradgradcheck(stack, inputs)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_every_order_are_those_of_autograd(order):
    same(
        lambda make, h, w: make(layer)(make(layer)(h, w), w).square().sum(), (tensor(4, 3), tensor(3, 3, seed=1)), order
    )


def test_complex_inputs():
    block = bl.rematerialize(lambda h, w: torch.sin(h @ w) * h.conj())
    inputs = tensor(2, 3, dtype=torch.complex128), tensor(3, 3, seed=1, dtype=torch.complex128)
    assert torch.autograd.gradcheck(block, inputs)
    assert torch.autograd.gradgradcheck(block, inputs)


def nested(make, h, w):
    inner = make(layer)
    return make(lambda h: inner(inner(h, w), w))(inner(h, w)).square().sum()


def nested_with_arguments(make, h, w):
    inner = make(layer)
    return make(lambda h, w: inner(inner(h, w), w))(inner(h, w), w).square().sum()


def in_place_inside(make, h, w):
    def block(h, w):
        a = h @ w
        a.mul_(2.0).add_(h)
        return a.sin()

    return make(block)(h * 1.0, w).square().sum()


def views_and_inputs_returned(make, h, w):
    def block(h, w, factor):
        return h, h.view(-1)[1:], w.t(), (h @ w)[:, ::2], factor

    same, view, turned, part, factor = make(block)(h * 1.0, w, 3)
    return (same.sin().sum() + view.square().sum() + turned.cos().sum() + part.exp().sum()) * factor


def tensors_without_gradient(make, h, w):
    def block(h, index, mask, w, name, extra=None):
        out = h[index] @ w
        return {name: out.where(mask, out.sin()), "top": out.argmax(0), "none": extra, "ones": torch.ones(2)}

    index, mask = torch.tensor([0, 2, 1, 0]), torch.tensor([True, False, True])
    found = make(block)(h.detach(), index, mask, w, "a", extra=None)
    assert found["none"] is None
    assert not found["top"].requires_grad
    assert not found["ones"].requires_grad
    return found["a"].square().sum() + h.sum()


def some_outputs_unused(make, h, w):
    def block(h, w):
        return torch.tanh(h @ w), (h * h).sum(), w.exp()

    first, _, third = make(block)(h, w)
    return make(block)(first, w)[0].square().sum() + 0 * third.detach().sum()


def shapes_that_depend_on_data(make, h, w):
    return make(lambda h, w: (h @ w)[h.sum(1) > 0].square())(h, w).sum()


def a_leaf_of_the_closure(make, h, w):
    return make(lambda h: torch.tanh(h @ w))(h).square().sum()


def a_result_in_the_closure(make, h, w):
    v = {"deep": [w.exp()]}
    return make(lambda h: torch.tanh(h @ v["deep"][0]))(h).square().sum()


def the_same_tensor_twice(make, h, w):
    return make(lambda a, b, c: a @ w * b.sin() + c)(h, h, h).square().sum()


def a_gradient_inside(make, h, w):
    def block(h, w):
        value = torch.tanh(h @ w).square().sum()
        return torch.autograd.grad(value, h, create_graph=True)[0]

    return make(block)(h * 1.0, w).sin().sum()


def a_partial(make, h, w):
    return make(functools.partial(torch.nn.functional.linear, bias=w[0]))(h, w).sin().sum()


def lean_operators(make, h, w):
    """Those of bilevel.engine.lean, in all their spellings, each with its weight once, twice and transposed."""

    def block(h, w):
        a = F.gelu(F.linear(h, w, w[0]).unsqueeze(0).expand(2, 4, 3)) + F.gelu(h, approximate="tanh")
        b = torch.softmax(a, -1) + a.softmax(1) + F.softmax(a, dim=0) + torch.softmax(a, -1, dtype=h.dtype)
        return F.linear(F.linear(b, w), w.t()) @ w + F.gelu(w.t().contiguous().t()).sum(0) + F.linear(h[0], w)

    return make(block)(make(block)(h, w)[0], w).square().sum()


def lean_operators_inside_gradients(make, h, w):
    def block(h, w):
        value = F.linear(F.gelu(F.linear(h, w)), w).softmax(-1).square().sum()
        to_h, to_w = torch.autograd.grad(value, (h, w), create_graph=True)
        return F.linear(to_h, to_w)

    return make(lambda h, w: F.linear(make(block)(h, w), w).square())(h * 1.0, w).sum()


def a_hook_on_a_parameter(make, h, w):
    def block(h, w):
        if w.requires_grad:
            w.register_hook(lambda g: 2 * g)
        return F.linear(h, w).sin()

    return make(block)(h, w * 1.0).square().sum()


def an_end_whose_numbers_are_read(make, h, w):
    def block(h, w):
        a = F.linear(h, w)
        scale = a.detach().abs().max()
        return a + h * scale, F.linear(a.detach(), w)

    def other(h, w):
        a = F.linear(h, w)
        return a + h, a.reshape(-1) * 2, a.argmax(1)

    first, second = make(block)(h, w)
    third, fourth, place = make(other)(first + second, w)
    return third.sin().sum() + fourth.square().sum() * place.sum()


def ends_that_are_not_needed(make, h, w):
    first = make(lambda h, w: h + F.linear(h.sin(), w, w[0]))
    second = make(lambda h, w: (F.linear(h, w) + F.linear(h.cos(), w)).reshape(2, 2, 3))
    third = make(lambda h, w: F.linear(first(h, w), w))
    fourth = make(lambda h, w: first(F.linear(h, w), w) + h)
    return fourth(third(first(second(first(h, w), w).flatten(0, 1), w), w), w).sin().sum()


def dropout(make, h, w):
    def block(h, w):
        return F.dropout(torch.tanh(h @ w), 0.5) + torch.rand(3, dtype=h.dtype) * h

    noise = torch.rand(3, dtype=h.dtype)
    return make(block)(make(block)(h, w) * noise, w).square().sum()


def dropout_in_nested_blocks(make, h, w):
    inner = make(lambda h, w: F.dropout(torch.tanh(h @ w), 0.5))
    return make(lambda h, w: inner(F.dropout(inner(h, w)), w) * torch.rand(3, dtype=h.dtype))(h, w).square().sum()


PROGRAMS = [
    nested,
    nested_with_arguments,
    in_place_inside,
    views_and_inputs_returned,
    tensors_without_gradient,
    some_outputs_unused,
    shapes_that_depend_on_data,
    a_leaf_of_the_closure,
    a_result_in_the_closure,
    the_same_tensor_twice,
    a_gradient_inside,
    a_partial,
    lean_operators,
    lean_operators_inside_gradients,
    a_hook_on_a_parameter,
    an_end_whose_numbers_are_read,
    ends_that_are_not_needed,
    dropout,
    dropout_in_nested_blocks,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_numbers_of_autograd(program):
    same(program, (tensor(4, 3), tensor(3, 3, seed=1)))


def test_activations_in_pieces(monkeypatch):
    monkeypatch.setattr(lean, "_PIECE", 5)
    same(lean_operators, (tensor(4, 3), tensor(3, 3, seed=1)))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_the_product_that_ends_a_block_is_not_made_again():
    h, w = tensor(4, 3), tensor(3, 3, seed=1)

    def products(function):
        block = bl.rematerialize(function)
        with Products() as counter:
            (gradient,) = torch.autograd.grad(block(block(h, w), w).sum(), h, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), h)
        return counter.count

    assert products(lambda h, w: F.linear(h.sin(), w) + h) < products(lambda h, w: (F.linear(h.sin(), w) + h) * 1.0)


def test_a_block_that_ends_otherwise_the_second_time():
    calls = []

    def program(make, h, w):
        def block(h, w):
            calls.append(1)
            found = F.linear(h.sin(), w)
            return found + h if len(calls) % 3 == 1 else (found * 1.0 + h) * 1.0

        return make(block)(make(block)(make(block)(h, w), w), w).sin().sum()

    same(program, (tensor(4, 3), tensor(3, 3, seed=1)))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_third_derivatives_are_right_or_refused(program):
    try:
        same(program, (tensor(4, 3), tensor(3, 3, seed=1)), order=3)
    except RuntimeError as error:
        assert "give it to the block as an argument" in str(error)  # noqa: PT017
        assert program in (nested, a_leaf_of_the_closure, a_result_in_the_closure, the_same_tensor_twice, a_partial)


def test_a_graph_that_is_kept_gives_many_products():
    h, w = tensor(4, 3), tensor(3, 3, seed=1)
    found = []
    for make in (lambda f: f, bl.rematerialize):
        block = make(lambda h, w: F.dropout(torch.tanh(h @ w), 0.5))
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(block(block(h, w), w).square().sum(), w, create_graph=True)
        products = [
            torch.autograd.grad(gradient, (h, w), tensor(3, 3, seed=seed).detach(), retain_graph=True)
            for seed in (2, 3, 2)
        ]
        close(products[0], products[2], tol=0)
        found.append(products[0] + products[1])
    close(*reversed(found))


def test_autocast_is_restored():
    def program(make, h, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block = make(lambda h, w: torch.tanh(h @ w).float() * (h @ w))
            out = block(block(h, w).float(), w)
        assert out.dtype == torch.float32  # the promotion of a product, as without blocks
        return out.square().sum()

    same(program, (tensor(4, 3, dtype=torch.float32), tensor(3, 3, seed=1, dtype=torch.float32)), tol=0.05)


def test_half_precision_by_autocast():
    def program(make, h, w):
        with torch.autocast("cpu", dtype=torch.float16):
            return make(lambda h, w: h @ w)(h, w).float().square().sum()

    same(program, (tensor(4, 3, dtype=torch.float32), tensor(3, 3, seed=1, dtype=torch.float32)), tol=1e-3)


def test_without_a_graph_it_is_the_function_itself():
    calls = []

    def function(h):
        calls.append(torch.is_grad_enabled())
        return h.sin()

    block, h = bl.rematerialize(function), tensor(3)
    with torch.no_grad():
        assert block(h).grad_fn is None
    assert block(h.detach()).grad_fn is None
    with torch.inference_mode():
        block(h)
    assert calls == [False, True, False]
    torch.autograd.grad(block(h).sum(), h)
    assert len(calls) == 4  # the graph of the block that ran last is at hand
    torch.autograd.grad((block(h) + block(h)).sum(), h)
    assert len(calls) == 7


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch's own forward mode
def test_under_func_transforms_it_is_the_function_itself():
    block, h, w = bl.rematerialize(layer), tensor(4, 3).detach(), tensor(3, 3, seed=1).detach()
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        close([transform(block, 1)(h, w)], [transform(layer, 1)(h, w)])


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_under_vmap(closure, deep, order):
    def program(make, y, w):
        def one(y, x):
            if closure:
                block = make(lambda h: torch.tanh(h @ y) @ w)
                return block(block(x)).square().sum()
            block = make(lambda h, y, w: F.dropout(torch.tanh(h @ y), 0.5) @ w)
            return block(block(x, y, w), y, w).square().sum()

        mapped = torch.func.vmap(one, randomness="different")
        if not deep:
            return mapped(y, x).sum()
        return torch.func.vmap(mapped, (0, None), randomness="different")(torch.stack([y, 2 * y]), x).sum()

    x = tensor(5, 4, 3, seed=2).detach()
    with pytest.raises((RuntimeError, ValueError)) if closure and (deep or order == 3) else contextlib.nullcontext():
        same(program, (tensor(5, 3, 3), tensor(3, 3, seed=1)), order)


# --- what is refused


def test_what_is_refused_in_words():
    h, w = tensor(4, 3), tensor(3, 3, seed=1)
    with pytest.raises(ValueError, match="changes one of its inputs in place"):
        bl.rematerialize(lambda h: h.mul_(2.0))(h * 1.0)
    with pytest.raises(ValueError, match="changes one of its inputs in place"):
        bl.rematerialize(lambda h, c: c.mul_(2.0) * h)(h, torch.ones(3))
    with pytest.raises(ValueError, match="changes one of its inputs in place"):
        bl.rematerialize(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3).double()))(h * 1.0)
    with pytest.raises(TypeError, match="a function was needed"):
        bl.rematerialize(3)
    v = w.exp()
    with pytest.raises(ValueError, match="one of which was computed from the other"):
        bl.rematerialize(lambda h: h @ v + w.sum())(h)
    hidden = iter([v])
    with pytest.raises(ValueError, match="made by ExpBackward0"):
        bl.rematerialize(lambda h: h @ next(hidden))(h)
    with pytest.raises(ValueError, match="writes a buffer"):
        bl.rematerialize(nn.BatchNorm1d(3).double())(h)
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"has a torch\.Generator"):
        bl.rematerialize(lambda h: h * torch.rand(3, generator=generator))
    with pytest.raises(ValueError, match="pytrees do not know"):
        bl.rematerialize(lambda h: Holder(h * 2))(h)
    with pytest.raises(ValueError, match="made by MulBackward0"):
        bl.rematerialize(lambda h, holder: holder.held * h)(h, Holder(h * 2))


class Holder:
    def __init__(self, held):
        self.held = held


@pytest.mark.parametrize("last", [False, True])
def test_a_tensor_stored_outside_is_refused(last):
    h, w, stored = tensor(4, 3), tensor(3, 3, seed=1), []

    def function(h, w):
        stored.append(torch.tanh(h @ w))
        return stored[-1] * 2

    block = bl.rematerialize(function)
    with pytest.raises(ValueError, match="stored a tensor"):
        (block(h, w) if last else block(block(h, w), w)).sum().backward()


def test_another_function_the_second_time_is_refused():
    h, sizes, w = tensor(4, 3), iter([2, 3, 3]), [tensor(3), tensor(3)]
    block = bl.rematerialize(lambda h: h[: next(sizes)].sin())
    first, _ = block(h), block(h)  # the graph at hand is that of the second
    with pytest.raises(ValueError, match="returned other tensors"):
        torch.autograd.grad(first.sum(), h)
    block = bl.rematerialize(lambda h: h * w.pop())
    first, _ = block(h), block(h)
    w.append(tensor(3))
    with pytest.raises(ValueError, match="used other tensors"):
        torch.autograd.grad(first.sum(), h)


def test_an_input_changed_in_place_afterwards_is_refused():
    h, w = tensor(4, 3), tensor(3, 3, seed=1)
    moved = h * 1.0
    block = bl.rematerialize(layer)
    first, _ = block(moved, w), block(h, w)
    moved.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), w)


@pytest.mark.parametrize("where", ["function", "module", "closure", "inside", "in place"])
def test_compiled_blocks_are_refused(where):
    compiled = torch.compile(nn.Linear(3, 3), backend="eager")
    inner = nn.Linear(3, 3)
    if where == "in place":
        inner.compile(backend="eager")
    block = {
        "function": torch.compile(layer, backend="eager"),
        "module": compiled,
        "closure": lambda h: compiled(h) + 1,
        "inside": nn.Sequential(nn.Linear(3, 3), compiled),
        "in place": nn.Sequential(inner),
    }[where]
    with pytest.raises(ValueError, match=r"torch\.compile"):
        bl.rematerialize(block)
    if isinstance(block, nn.Module):
        with pytest.raises(ValueError, match=r"torch\.compile"):
            bl.functional(nn.Sequential(block), rematerialize=type(block))


# --- modules


class Residual(nn.Module):
    def __init__(self, width=4, dropout=0.0, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(width)
        self.widen, self.narrow, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), dropout

    def forward(self, h):
        return h + F.dropout(self.narrow(F.gelu(self.widen(self.norm(h)))), self.dropout)


def stack(n=3, width=4, **options):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, width), *[Residual(width, **options) for _ in range(n)], nn.Linear(width, 2))


def tied():
    net = stack()
    net[2].widen.weight = net[1].widen.weight
    net[3] = net[2]
    return net


def batch_norm_in_eval():
    net = stack(norm=nn.BatchNorm1d(4))
    net(torch.randn(8, 3))
    return net.eval()


def reparametrized():
    net = stack()
    parametrizations.weight_norm(net[1].widen)
    parametrizations.spectral_norm(net[2].narrow)
    return net.eval()


def weight_norm_of_old():
    net = stack()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net[1].widen)
    return net


class WithHooks(Residual):
    def __init__(self):
        super().__init__()
        self.widen.register_forward_hook(lambda layer, given, out: out * 2)
        self.register_forward_pre_hook(lambda layer, given: (given[0] * 0.5,))
        self.register_full_backward_hook(lambda layer, given, out: tuple(g * 3 for g in given))


def with_hooks():
    return nn.Sequential(nn.Linear(3, 4), WithHooks(), Residual(), nn.Linear(4, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, h):
        return h + self.lstm(h[:, None])[0][:, 0]


def with_attention():
    """torch's own layer; its fused attention is switched off in the test."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    return nn.Sequential(nn.Linear(3, 4), nn.Unflatten(0, (2, 3)), layer, nn.Flatten(0, 1), nn.Linear(4, 2))


class Convolution(nn.Sequential):
    """With an activation in place that is not the first."""


def convolutional():
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    block = Convolution(nn.Conv2d(4, 3, 3, padding=1), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (4, 4, 4)), block, nn.Flatten(), nn.Linear(12, 2))


def recurrent():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), Recurrent(), Recurrent(), nn.Linear(4, 2))


class Borrows(nn.Module):
    """A block that uses a layer that is not its own."""

    def __init__(self, other):
        super().__init__()
        self.others = [other]

    def forward(self, h):
        return torch.tanh(self.others[0](h))


def borrowing():
    net = stack()
    return nn.Sequential(*net[:3], Borrows(net[1]), net[4])


NETS = {
    "plain": (stack, Residual),
    "dropout": (functools.partial(stack, dropout=0.5), Residual),
    "several classes": (stack, (Residual, nn.Linear)),
    "a list": (stack, [nn.LayerNorm]),
    "predicate": (stack, lambda layer: isinstance(layer, nn.LayerNorm) or hasattr(layer, "widen")),
    "the whole": (stack, nn.Sequential),
    "nested": (stack, (nn.Sequential, Residual, nn.Linear)),
    "nested with dropout": (functools.partial(stack, dropout=0.5), (nn.Sequential, Residual)),
    "tied": (tied, Residual),
    "batch norm in eval": (batch_norm_in_eval, Residual),
    "parametrized": (reparametrized, Residual),
    "parametrized layers": (reparametrized, nn.Linear),
    "old weight norm": (weight_norm_of_old, Residual),
    "old weight norm on the block": (weight_norm_of_old, nn.Linear),
    "hooks": (with_hooks, Residual),
    "recurrent": (recurrent, Recurrent),
    "recurrent itself": (recurrent, nn.LSTM),
    "borrowing": (borrowing, Borrows),
    "attention": (with_attention, nn.TransformerEncoderLayer),
    "convolutional": (convolutional, Convolution),
}


def hessian_products(net, x, y, seed=0, **options):
    """The loss, its gradient, and products with its second derivatives, in the parameters and in x."""
    call, params = bl.functional(net, requires_grad=True, **options)
    torch.manual_seed(seed)
    loss = (F.mse_loss(call(params, x), y, reduction="none").mean(1) * x.sigmoid().sum(1)).mean()
    leaves = [*params.values(), x]
    gradient = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    v = [tensor(*leaf.shape, seed=i).detach() for i, leaf in enumerate(leaves)]
    pairs = [(g, w) for g, w in zip(gradient, v, strict=True) if g is not None]
    products = torch.autograd.grad([g for g, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
    return [loss.detach(), *gradient, *products]


@pytest.mark.parametrize("kind", NETS)
def test_modules_have_the_numbers_they_had(kind):
    make, which = NETS[kind]
    net, x, y = make().double(), tensor(6, 3), tensor(6, 2, seed=5).detach()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with sdpa_kernel(SDPBackend.MATH):
        theirs = hessian_products(net, x, y)
        after = torch.get_rng_state()
        close(hessian_products(net, x, y, rematerialize=which), theirs, tol=1e-10)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any("forward" in vars(layer) for layer in net.modules())
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_buffers_given_with_the_parameters_are_those_of_every_run():
    net = batch_norm_in_eval().double()
    found = []
    for options in ({}, {"rematerialize": Residual}):
        call, params = bl.functional(net, requires_grad=True, **options)
        buffers = {name: 2 * value for name, value in net.named_buffers() if value.is_floating_point()}
        loss = call({**params, **buffers}, tensor(6, 3)).square().sum()
        leaves = list(params.values())
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradient), leaves))
    close(*reversed(found))


def test_what_functional_refuses():
    net = stack()
    with pytest.raises(ValueError, match="said none"):
        bl.functional(net, rematerialize=nn.Conv2d)
    with pytest.raises(TypeError, match="rematerialize='Residual'"):
        bl.functional(net, rematerialize="Residual")
    with pytest.raises(TypeError, match="rematerialize"):
        bl.functional(net, rematerialize=net[1])
    with pytest.raises(ValueError, match="no forward"):
        bl.functional(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), rematerialize=nn.ModuleList)


# --- estimators


@functools.cache
def module():
    return stack(n=2, dropout=0.25).double()


def weighted(**options):
    """A weight for each row and a shift of the outer loss's inputs; dropout in the blocks; as strong a proximal term as
    makes the Hessian positive."""
    call, params = bl.functional(module(), requires_grad=False, **options)

    def inner_loss(y, x, batch):
        inputs, labels = batch
        return (x["w"].sigmoid() * (call(y, inputs) - labels).square().mean(1)).mean() + 0.5 * sum(
            leaf.square().sum() for leaf in y.values()
        )

    def outer_loss(y, x, batch):
        inputs, labels = batch
        return F.mse_loss(call(y, inputs + x["shift"]), labels)

    outer = {"w": tensor(6, seed=8), "shift": tensor(3, seed=9)}
    return bl.Problem(inner_loss, outer_loss), outer, params


def from_start(**options):
    problem, x, params = weighted(**options)
    outer = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    fixed = {name: leaf.detach() for name, leaf in x.items()}
    return (
        bl.Problem(
            lambda y, x, batch: problem.inner_loss(y, fixed, batch),
            lambda y, x, batch: problem.outer_loss(y, fixed, batch),
            init=lambda x, batch: x,
        ),
        outer,
        None,
    )


def numbers(setup, estimator, steps=4, momentum=0.5, **options):
    problem, outer, inner = setup(**options)
    batch = tensor(6, 3, seed=3).detach(), tensor(6, 2, seed=4).detach()
    torch.manual_seed(0)
    hg = bl.hypergradient(
        problem,
        outer,
        inner,
        bl.Batches(batch, batch),
        solver=bl.Descent(bl.SGD(lr=0.1, momentum=momentum), steps),
        estimator=estimator,
    )
    return [*hg.grad.values(), *hg.inner.values(), hg.outer_loss, hg.inner_loss], torch.get_rng_state(), hg.status


@pytest.mark.parametrize(
    "entry", [entry for entry in catalogue.ENTRIES if entry.label not in ALIKE], ids=lambda entry: entry.label
)
def test_every_estimator_has_the_same_numbers(entry):
    setup = weighted if bl.Path.INNER_LOSS in entry.sees else from_start
    momentum = 0.0 if isinstance(entry.estimator, bl.estimators.GammaDecay) else 0.5  # (which it refuses)
    theirs, after, status = numbers(setup, entry.at(6), momentum=momentum)
    ours, state, found = numbers(setup, entry.at(6), momentum=momentum, rematerialize=Residual)
    assert found == status
    assert torch.equal(state, after)
    close(ours, theirs, tol=1e-10)
    assert any(each.norm() > 1e-6 for each in ours[: len(setup()[1])])


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.Implicit(bl.CG(4))], ids=repr)
def test_tasks_have_the_same_numbers(estimator, chunk):
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4)

        def forward(self, tokens):
            return torch.tanh(self.mix(self.table(tokens).sum(1)))

    torch.manual_seed(0)
    net = nn.Sequential(Embedded(), Residual(dropout=0.25), nn.Linear(4, 2)).double()
    tokens, labels = torch.arange(24).reshape(4, 2, 3) % 5, tensor(4, 2, 2).detach()
    batches = bl.Batches((tokens, labels), (tokens.flip(1), labels))
    found = []
    for options in ({}, {"rematerialize": (Embedded, Residual)}):
        call, params = bl.functional(net, requires_grad=True, **options)

        def loss(y, x, batch, call=call):
            return F.mse_loss(call(y, batch[0]), batch[1])

        problem = bl.proximal(bl.Problem(loss, loss, init=lambda x, batch: x), 1.0)
        torch.manual_seed(0)
        hg = bl.hypergradient(
            problem,
            params,
            None,
            batches,
            solver=bl.Descent(bl.SGD(lr=0.1), 3),
            estimator=bl.TaskMean(estimator, chunk=chunk),
        )
        found.append([*hg.grad.values(), *hg.inner.values()])
    close(*reversed(found), tol=1e-10)


# --- is there a second derivative?


class Halved(torch.autograd.Function):
    """A second derivative that is dropped without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, weight):
        return weight * 3 * ctx.saved_tensors[0].detach() ** 2


def once(y, x, batch, make):
    block = make(lambda y, x: Halved.apply(y) * x)
    return block(block(y, x), x).sum()


def sound(y, x, batch, make):
    block = make(lambda y, x: torch.tanh(y) * x)
    return make(lambda y, x: block(block(y, x), x))(y, x).square().sum()


@pytest.mark.parametrize("make", [lambda f: f, bl.rematerialize], ids=["plain", "rematerialized"])
def test_a_dropped_second_derivative_inside_a_block_is_still_found(make):
    y, x = tensor(3).detach(), tensor(3, seed=1)
    for loss, right in ((once, False), (sound, True)):
        pose = functools.partial(loss, make=make)
        problem = bl.Problem(lambda y, x, b, pose=pose: 0.1 * pose(y, x, b) + y.square().sum(), pose)
        arguments = (problem, x, y, bl.Batches(None, None))
        options = {"solver": bl.Descent(bl.SGD(lr=0.1), 2), "estimator": bl.Unrolled()}
        if right:
            assert bl.hypergradient(*arguments, **options).grad.norm() > 0
        else:
            with pytest.raises(bl.NotTwiceDifferentiableError, match="Halved"):
                bl.hypergradient(*arguments, **options)


def test_a_block_is_no_reason_to_compare_differences(monkeypatch):
    from bilevel.engine import twice

    monkeypatch.setattr(twice, "_lacking", lambda *args: pytest.fail("a block was taken for a doubtful node"))
    problem, outer, inner = weighted(rematerialize=lambda layer: isinstance(layer, Residual))
    batch = tensor(6, 3).detach(), tensor(6, 2).detach()
    for estimator in (bl.Unrolled(), bl.Implicit(bl.CG(2))):
        bl.hypergradient(
            problem, outer, inner, bl.Batches(batch, batch), solver=bl.Descent(bl.SGD(0.1), 2), estimator=estimator
        )


# --- memory


def hvp_peak(n, **options):
    """Peak bytes of a product with the second derivatives, in the parameters and in x, of a stack of n blocks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), *[Residual(16) for _ in range(n)], nn.Linear(16, 2))
    call, params = bl.functional(net, requires_grad=True, **options)
    inputs, x = torch.randn(256, 3), torch.zeros(256, requires_grad=True)
    v = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    gc.collect()
    with Tensors() as meter:
        loss = (x.sigmoid() * call(params, inputs).square().mean(1)).mean()
        gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        roots = [torch.autograd.graph.get_gradient_edge(g) for g in gradient]
        del loss, gradient
        torch.autograd.grad(roots, [*params.values(), x], list(v.values()))
    return meter.peak_bytes


def test_each_block_more_keeps_its_inputs_and_no_more():
    activation = 256 * 16 * 4
    parameters = 4 * sum(leaf.numel() for leaf in Residual(16).parameters())
    slopes = {}
    for label, options in {"plain": {}, "blocks": {"rematerialize": Residual}}.items():
        four, twelve = (hvp_peak(n, **options) for n in (4, 12))
        slopes[label] = (twelve - four) / 8
    # The input and one cotangent of each block, its part of the result, and a generator's state.
    assert slopes["blocks"] <= 2 * activation + parameters + 6000
    assert slopes["plain"] >= 10 * activation


def test_a_hypergradient_has_one_graph_at_a_time():
    """With the check whether there is a second derivative, which looks into every block."""

    def peak(n, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 16), *[Residual(16) for _ in range(n)], nn.Linear(16, 2))
        call, params = bl.functional(net, requires_grad=False, **options)

        def loss(y, x, inputs):
            return (x.sigmoid() * call(y, inputs).square().mean(1)).mean()

        inputs = torch.randn(256, 3)
        arguments = (bl.Problem(loss, loss), torch.zeros(256), params, bl.Batches(inputs, inputs))
        with Tensors() as meter:
            bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.1), 1), estimator=bl.Unrolled("iterates"))
        return meter.peak_bytes

    activation, parameters = 256 * 16 * 4, 4 * sum(leaf.numel() for leaf in Residual(16).parameters())
    slopes = [(peak(12, **options) - peak(4, **options)) / 8 for options in ({"rematerialize": Residual}, {})]
    assert slopes[0] <= 2 * activation + 4 * parameters + 6000
    assert slopes[1] >= slopes[0] + 8 * activation


def test_nothing_is_left_without_a_collection_of_garbage():
    net = stack(dropout=0.5).double()
    call, params = bl.functional(net, requires_grad=True, rematerialize=Residual)
    leaves, x = list(params.values()), torch.randn(6, 3, dtype=DOUBLE)
    gc.collect()
    gc.disable()
    try:
        with Tensors() as meter:
            gradient = torch.autograd.grad(call(params, x).square().sum(), leaves, create_graph=True)
            products = torch.autograd.grad(sum(g.square().sum() for g in gradient), leaves)
            del gradient, products
            torch.autograd.grad(call(params, x).square().sum(), leaves)
            call(params, x)
            assert meter.live_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("inside", [False, True])
def test_beside_checkpoints_of_torch(inside):
    def program(make, h, w):
        block = make(layer)
        if inside:
            return make(lambda h, w: checkpoint(layer, h, w, use_reentrant=False))(h, w).sin().sum()
        return checkpoint(lambda h, w: block(block(h, w), w), h, w, use_reentrant=False).sin().sum()

    same(program, (tensor(4, 3), tensor(3, 3, seed=1)))


def test_a_segment_of_blocks_is_a_block():
    def deep(n):
        return nn.Sequential(*[nn.Sequential(*[Residual(16) for _ in range(4)]) for _ in range(n)])

    def peak(n, which):
        torch.manual_seed(0)
        call, params = bl.functional(deep(n), requires_grad=True, rematerialize=which)
        inputs = torch.randn(256, 16)
        with Tensors() as meter:
            gradient = torch.autograd.grad(
                call(params, inputs).square().mean(), list(params.values()), create_graph=True
            )
            roots = [torch.autograd.graph.get_gradient_edge(g) for g in gradient]
            del gradient
            torch.autograd.grad(roots, list(params.values()), [leaf.detach() for leaf in params.values()])
        return meter.peak_bytes

    def slope(which):
        return (peak(6, which) - peak(3, which)) / 3

    assert slope((nn.Sequential, Residual)) < 0.75 * slope(Residual)


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.Implicit(bl.CG(3))], ids=repr)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_forecast_is_what_is_measured(estimator, rate):
    def setup(device):
        torch.manual_seed(0)
        net = stack(n=3, width=32, dropout=rate).to(device)
        call, params = bl.functional(net, requires_grad=False, rematerialize=Residual)

        def loss(y, x, batch):
            return (x.sigmoid() * call(y, batch).square().mean(1)).mean()

        return bl.Problem(loss, loss), torch.zeros(64, device=device), params, bl.Batches(*[torch.randn(64, 3)] * 2)

    case = Case(setup, solver=bl.Descent(bl.SGD(lr=0.01), 3), estimator=estimator, device="cpu")
    assert forecast(case).peak_tensor_bytes == measure(case, repeats=1).peak_tensor_bytes


def test_what_gelu_gives_to_a_product_is_not_kept(monkeypatch):
    def peak():
        w, v, h = tensor(512, 16), tensor(16, 512, seed=1), tensor(256, 16, seed=2)
        block = bl.rematerialize(lambda h, w, v: F.linear(F.gelu(F.linear(h, w)), v))
        gc.collect()
        with Tensors() as meter:
            first, second = torch.autograd.grad(block(h, w, v).sin().sum(), (w, v), create_graph=True)
            products = torch.autograd.grad((first.sum() + second.sum()).sin(), (h, w, v))
        return meter.peak_bytes, products

    lean_peak, ours = peak()
    linear = lean.Lean._linear
    monkeypatch.setattr(lean.Lean, "_linear", lambda self, *args, activated, **options: linear(self, *args, **options))
    full_peak, theirs = peak()
    close(ours, theirs)
    assert full_peak - lean_peak > 0.8 * 256 * 512 * 8
