"""functional(module): which parameters, in which places, and what the module holds afterwards."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import bilevel as bl

F64 = torch.float64


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def frozen_body() -> nn.Sequential:
    net = perceptron()
    net[0].requires_grad_(False)
    return net


class Tied(nn.Module):
    """A decoder that is the embedding, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.body(self.embedding(tokens)).tanh())


class Nested(nn.Module):
    """One block in two blocks, one layer of it once more on its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.left, self.right, self.last = nn.ModuleList([block]), nn.Sequential(block, nn.Linear(3, 3)), block[0]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.right(self.left[0](x)))


def twice() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer).double()


SHARING = {
    "a layer in two places": (twice, ["0.weight", "0.bias"]),
    "tied embedding": (Tied, ["embedding.weight", "body.weight", "body.bias"]),
    "nested": (Nested, ["left.0.0.weight", "left.0.0.bias", "right.1.weight", "right.1.bias"]),
}


def inputs_of(module: nn.Module) -> Tensor:
    if isinstance(module, Tied):
        return torch.tensor([[0, 3], [1, 1]])
    return torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)


def held(module: nn.Module) -> list[tuple[str, object, bool]]:
    """What stands in every place of a module."""
    return [
        (f"{name}.{key}", tensor, isinstance(tensor, nn.Parameter))
        for name, layer in module.named_modules(remove_duplicate=False)
        for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
    ]


def assert_same_places(module: nn.Module, before: list[tuple[str, object, bool]]) -> None:
    for (name, now, kind), (known, then, was) in zip(held(module), before, strict=True):
        assert name == known
        assert now is then, f"{name} holds another tensor"
        assert kind == was


# Tensors in several places


@pytest.mark.parametrize("name", SHARING)
def test_shared_parameters_appear_once_and_their_gradients_sum(name):
    make, names = SHARING[name]
    module = make()
    x, before = inputs_of(module), held(module)
    call, params = bl.functional(module)
    assert list(params) == names
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in params.items()}
    ours = torch.autograd.grad(call(leaves, x).pow(2).sum(), list(leaves.values()))
    assert_same_places(module, before)
    theirs = torch.autograd.grad(module(x).pow(2).sum(), [dict(module.named_parameters())[key] for key in names])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    moved = {key: tensor + 0.5 for key, tensor in params.items()}
    other = make()
    other.load_state_dict(moved, strict=False)
    torch.testing.assert_close(call(moved, x), other(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SHARING)
def test_the_module_holds_its_own_parameters_after_any_number_of_calls_also_failed_ones(name):
    module = SHARING[name][0]()
    x, before = inputs_of(module), held(module)
    call, params = bl.functional(module)
    fails = True

    def broken(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if fails:
            raise ArithmeticError("in the middle of the forward")

    # The last layer that runs: the tensors are in their places when it fails.
    handle = list(module.modules())[-1].register_forward_hook(broken)
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            call(params, x)
        assert_same_places(module, before)
    fails = False
    for _ in range(3):
        call(params, x)
        assert_same_places(module, before)
    handle.remove()


def test_a_loss_that_raises_leaves_the_module_as_it_was():
    module = twice()
    before = held(module)
    call, params = bl.functional(module)

    def loss(y, x, batch):
        call(y, batch, no_such_keyword=1)

    for _ in range(2):
        with pytest.raises(TypeError):
            bl.hypergradient(
                bl.Problem(loss, loss),
                torch.ones(1, dtype=F64),
                params,
                bl.Batches(inputs_of(module), inputs_of(module)),
                solver=bl.Descent(bl.SGD(lr=0.1), 2),
                estimator=bl.Unrolled(),
            )
        assert_same_places(module, before)
    module.to(torch.float32)  # fails on a module with plain tensors for parameters
    assert len(list(module.parameters())) == 2


@pytest.mark.parametrize("name", SHARING)
def test_the_hypergradient_of_a_module_with_shared_parameters_is_that_of_a_loop_by_hand(name):
    module = SHARING[name][0]()
    x = inputs_of(module)
    call, params = bl.functional(module)

    def inner_loss(y, outer, batch):
        return call(y, x).pow(2).mean() + outer.exp() * sum(leaf.pow(2).sum() for leaf in y.values())

    def outer_loss(y, outer, batch):
        return (call(y, x) - 1).pow(2).mean()

    outer = torch.tensor(-1.0, dtype=F64)
    hg = bl.hypergradient(
        bl.Problem(inner_loss, outer_loss),
        outer,
        params,
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(lr=0.1), 4),
        estimator=bl.Unrolled(keep="iterates"),
    )
    reference = copy.deepcopy(module)

    def value(at: Tensor) -> Tensor:
        net = copy.deepcopy(reference)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (net(x).pow(2).mean() + at.exp() * sum(p.pow(2).sum() for p in net.parameters())).backward()
            optimizer.step()
        return (net(x).detach() - 1).pow(2).mean()

    torch.testing.assert_close(hg.outer_loss, value(outer), rtol=1e-12, atol=0)
    torch.testing.assert_close(hg.grad, (value(outer + 1e-6) - value(outer - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)


def test_two_tensors_for_one_parameter_are_refused_and_one_under_another_name_is_taken():
    module = Tied()
    x = inputs_of(module)
    call, params = bl.functional(module)
    renamed = {("decoder.weight" if name == "embedding.weight" else name): p + 1 for name, p in params.items()}
    torch.testing.assert_close(call(renamed, x), call({k: p + 1 for k, p in params.items()}, x), rtol=0, atol=0)
    call({**params, "decoder.weight": params["embedding.weight"]}, x)
    with pytest.raises(ValueError, match=r"two tensors for one parameter, 'embedding.weight' and 'decoder.weight'"):
        call({**params, "decoder.weight": params["embedding.weight"] + 1}, x)


# Which parameters


def test_frozen_parameters_stay_fixed():
    net = frozen_body()
    call, params = bl.functional(net)
    assert list(params) == ["2.weight", "2.bias"]
    x = inputs_of(net)
    torch.testing.assert_close(call(params, x), net(x), rtol=0, atol=0)
    trained = bl.hypergradient(
        bl.Problem(lambda y, w, b: (w * call(y, x)).pow(2).mean(), lambda y, w, b: call(y, x).pow(2).mean()),
        torch.ones((), dtype=F64),
        params,
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(lr=0.1), 3),
        estimator=bl.Unrolled(),
    ).inner
    net.load_state_dict(trained, strict=False)
    reference = frozen_body()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        reference(x).pow(2).mean().backward()
        optimizer.step()
    for (name, a), b in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("trainable", "names"),
    [
        (None, ["2.weight", "2.bias"]),
        (True, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["0"], ["0.weight", "0.bias"]),
        ("0.", ["0.weight", "0.bias"]),
        ("2.bias", ["2.bias"]),
        ({"2.bias", "0.weight"}, ["0.weight", "2.bias"]),
        (lambda name: name.endswith("bias"), ["0.bias", "2.bias"]),
    ],
)
def test_trainable_says_which_parameters_are_variables(trainable, names):
    net = frozen_body()
    call, params = bl.functional(net, trainable=trainable)
    assert list(params) == names
    leaves = {name: (p * 2).detach().requires_grad_() for name, p in params.items()}
    output = call(leaves, inputs_of(net))
    other = copy.deepcopy(net)
    other.load_state_dict(leaves, strict=False)
    torch.testing.assert_close(output, other(inputs_of(net)), rtol=0, atol=0)
    output.sum().backward()
    assert all(p.grad is None for p in net.parameters()), "a fixed parameter collected a gradient"
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


def test_parameters_left_out_are_fixed_also_where_they_require_grad():
    net = perceptron()
    call, params = bl.functional(net, trainable="2", requires_grad=False)
    assert not call(params, inputs_of(net)).requires_grad
    assert all(p.requires_grad for p in net.parameters())


def test_a_prefix_ends_at_a_dot_and_any_name_of_a_tied_parameter_selects_it():
    net = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    assert list(bl.functional(net, trainable="1")[1]) == ["1.weight", "1.bias"]
    assert list(bl.functional(Tied(), trainable="decoder")[1]) == ["embedding.weight"]
    assert list(bl.functional(Tied(), trainable=lambda name: name == "decoder.weight")[1]) == ["embedding.weight"]


@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        (["0", "hed"], ValueError, r"'hed' in trainable=.*no prefix of one up to a dot; it has \['0\.weight'"),
        ("", ValueError, "given '' in trainable"),
        (lambda name: False, ValueError, r"said yes to none of the parameters \['0\.weight'"),
        (False, TypeError, "trainable=False; True, names such as"),
        (3, TypeError, "trainable=3"),
        ({"0": False}, TypeError, "trainable={'0': False}"),
        ([nn.Linear(1, 1)], TypeError, "trainable=.*a function of the name was needed"),
    ],
)
def test_trainable_that_matches_nothing_is_refused(trainable, error, message):
    with pytest.raises(error, match=message):
        bl.functional(perceptron(), trainable=trainable)


def test_unknown_and_missing_parameters_are_refused():
    call, params = bl.functional(frozen_body())
    x = inputs_of(perceptron())
    with pytest.raises(ValueError, match=r"given \['2\.wieght'\], which are no parameters.*it has \['0\.weight'"):
        call({**params, "2.wieght": params["2.weight"]}, x)
    with pytest.raises(ValueError, match=r"not given the parameters \['2\.bias'\].*trainable="):
        call({"2.weight": params["2.weight"]}, x)


def test_more_than_the_variables_may_be_given():
    """dict(module.named_parameters()), or the whole state, of a module with fixed parts."""
    net = nn.Sequential(frozen_body(), nn.BatchNorm1d(2).double()).eval()
    call, params = bl.functional(net)
    doubled = {name: tensor * 2 for name, tensor in net.state_dict().items()}
    other = copy.deepcopy(net)
    other.load_state_dict(doubled)
    x = inputs_of(perceptron())
    torch.testing.assert_close(call(doubled, x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(call(dict(net.named_parameters()), x), net(x), rtol=0, atol=0)
    torch.testing.assert_close(call(params, x), net(x), rtol=0, atol=0)


# As outer variable, and back


@pytest.mark.parametrize("trainable", [True, ["0"]])
def test_selected_parameters_are_an_outer_variable_whose_steps_show_in_the_module(trainable):
    net = frozen_body()
    flags = [p.requires_grad for p in net.parameters()]
    call, outer = bl.functional(net, trainable=trainable)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x = inputs_of(net)
    problem = bl.Problem(
        lambda y, o, b: (y - call(o, x)).pow(2).sum(), lambda y, o, b: (y - torch.ones_like(y)).pow(2).sum()
    )
    losses = [
        step.outer_loss.item()
        for step in bl.iterate(
            problem,
            outer,
            torch.zeros(4, 2, dtype=F64),
            [bl.Batches(None, None)] * 30,
            solver=bl.Descent(bl.SGD(lr=0.25), 10),
            estimator=bl.Unrolled(),
            optimizer=torch.optim.Adam(outer.values(), lr=0.05),
        )
    ]
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in outer), name
        if name in outer:
            assert torch.equal(parameter, outer[name])
        assert parameter.grad is None
    assert [p.requires_grad for p in net.parameters()] == flags


def test_requires_grad_may_be_said_either_way():
    net = frozen_body()
    assert not any(p.requires_grad for p in bl.functional(net)[1].values())
    assert all(p.requires_grad for p in bl.functional(net, requires_grad=True)[1].values())
    assert not any(p.requires_grad for p in bl.functional(net, trainable=True, requires_grad=False)[1].values())


def test_adapted_parameters_go_back_into_all_their_places():
    module = Tied()
    module.body.requires_grad_(False)
    _, params = bl.functional(module)
    adapted = {name: p + 1 for name, p in params.items()}
    body = module.body.weight.clone()
    missing, unexpected = module.load_state_dict(adapted, strict=False)
    assert not unexpected
    assert "body.weight" in missing
    assert torch.equal(module.decoder.weight, adapted["embedding.weight"])
    assert module.decoder.weight is module.embedding.weight
    assert torch.equal(module.body.weight, body)


# Kinds of modules


@pytest.mark.parametrize("make", [twice, Tied, Nested, frozen_body])
def test_call_works_under_vmap(make):
    module = make()
    call, params = bl.functional(module)
    stacked = {name: torch.stack([p, p * 2, p - 1]) for name, p in params.items()}
    x = inputs_of(module)
    before = held(module)
    together = torch.func.vmap(lambda p: call(p, x))(stacked)
    assert_same_places(module, before)
    alone = torch.stack([call({name: p[i] for name, p in stacked.items()}, x) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def with_parametrization() -> nn.Module:
    net = perceptron()
    parametrizations.weight_norm(net[0])
    parametrize.register_parametrization(net[2], "weight", Scaled())
    return net


def with_weight_norm() -> nn.Module:
    net = perceptron()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[0])
    return net


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[None])[0]


@pytest.mark.parametrize("make", [with_parametrization, with_weight_norm, Recurrent])
def test_modules_that_compute_or_list_their_weights_are_right_and_keep_nothing_of_a_call(make):
    module = make()
    x = inputs_of(module)
    call, params = bl.functional(module)
    moved = {name: (p + 0.3).requires_grad_() for name, p in params.items()}
    other = make()
    other.load_state_dict(moved)
    output = call(moved, x)
    torch.testing.assert_close(output, other(x), rtol=1e-13, atol=0)
    ours = torch.autograd.grad(output.pow(2).sum(), list(moved.values()))
    theirs = torch.autograd.grad(other(x).pow(2).sum(), list(other.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    gone = [weakref.ref(leaf) for leaf in moved.values()]
    del moved, output, ours, theirs, other
    gc.collect()
    assert all(reference() is None for reference in gone), "the module kept tensors of a call"
    if make is not with_weight_norm:  # which cannot be copied either way
        copy.deepcopy(module)
    torch.testing.assert_close(module(x), call(params, x), rtol=0, atol=0)


def test_cached_parametrizations_are_refused():
    module = with_parametrization()
    call, params = bl.functional(module)
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize\.cached\(\), which would hold the first"):
        call(params, inputs_of(module))


def test_dropout_in_training_mode_draws_anew_and_follows_the_seed():
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).double().train()
    call, params = bl.functional(module)
    torch.manual_seed(3)
    first, second = call(params, inputs_of(module)), call(params, inputs_of(module))
    torch.manual_seed(3)
    assert torch.equal(first, call(params, inputs_of(module)))
    assert not torch.equal(first, second)


class Rebinding(nn.Module):
    """A forward that puts another tensor into the place of a buffer and of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=F64))
        self.register_buffer("seen", torch.zeros(3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        output = self.weight * x + self.seen
        self.weight = nn.Parameter(torch.zeros(3, dtype=F64))
        return output


def test_what_a_forward_puts_into_the_places_does_not_outlive_the_call():
    module = Rebinding()
    call, params = bl.functional(module)
    before, x = held(module), inputs_of(module)
    assert torch.equal(call(params, x), x + 1)
    assert torch.equal(call(params, x), x + 1)
    assert_same_places(module, before)


def test_buffers_moved_by_the_module_are_followed():
    module = nn.BatchNorm1d(3).eval()
    call, _ = bl.functional(module)
    module.double()
    module.running_mean.fill_(2.0)
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = inputs_of(module)
    torch.testing.assert_close(call(params, x), module(x), rtol=0, atol=0)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: bl.functional(nn.Sequential(nn.LazyLinear(3))),
            ValueError,
            r"LazyLinear 0 has no shape for 'weight' yet; run the module once on a batch, module\(batch\)",
        ),
        (
            lambda: bl.functional(nn.DataParallel(nn.Linear(2, 2))),
            ValueError,
            r"DataParallel \(the module itself\).*functional\(module\.module\)",
        ),
        (lambda: bl.functional(in_inference_mode()), ValueError, r"made under torch\.inference_mode\(\), so 'weight'"),
        (lambda: bl.functional(lambda x: x), TypeError, r"was given a function; a torch\.nn\.Module was needed"),
        (lambda: bl.functional(Whole(), trainable=True), ValueError, "'table' of dtype torch.int64, which has no grad"),
    ],
)
def test_modules_that_cannot_be_split_get_a_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_module_without_parameters_is_a_function():
    call, params = bl.functional(Nothing())
    assert params == {}
    assert call(params, 3) == 3


def replaced(net: nn.Sequential) -> None:
    net[2] = nn.Linear(4, 2)


def added(net: nn.Sequential) -> None:
    net.append(nn.Tanh())


def grown(net: nn.Sequential) -> None:
    net[0].scale = nn.Parameter(torch.ones(1))


def normalized(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])


@pytest.mark.parametrize("change", [replaced, added, grown, normalized])
def test_a_module_that_was_rebuilt_since_is_refused(change):
    net = perceptron()
    call, params = bl.functional(net)
    change(net)
    with pytest.raises(ValueError, match=r"changed after functional\(module\); call functional again"):
        call(params, inputs_of(net))


class Checkpointed(nn.Module):
    """A body that is recomputed in the backward, as transformers do it."""

    def __init__(self, use):
        super().__init__()
        self.body, self.head, self.use = nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), use

    def forward(self, inputs):
        use = self.use if self.use is not None else self.training
        return self.head(checkpoint(self.body, inputs, use_reentrant=False) if use else self.body(inputs)).tanh()


def test_a_checkpoint_inside_the_module_is_refused_where_there_is_a_graph():
    inputs = torch.randn(4, 3, dtype=torch.float64)
    call, params = bl.functional(Checkpointed(True))
    with torch.no_grad():
        call(params, inputs)
    with pytest.raises(ValueError, match=r"uses torch.utils.checkpoint inside, .*its own parameters again"):
        call(params, inputs)
    module = Checkpointed(None).eval()
    call, params = bl.functional(module)
    call(params, inputs)
    module.train()
    with pytest.raises(ValueError, match=r"uses torch\.utils\.checkpoint inside"):
        call(params, inputs)


def test_a_checkpoint_around_the_call_is_right():
    """It runs the call again, with the tensors that it was given."""
    call, params = bl.functional(Checkpointed(False))
    moved = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
    inputs = torch.randn(4, 3, dtype=torch.float64)
    losses = [
        checkpoint(call, moved, inputs, use_reentrant=False).square().sum(),
        call(moved, inputs).square().sum(),
    ]
    ours, plain = (torch.autograd.grad(loss, moved.values()) for loss in losses)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
