"""Inner optimizers: torch.optim's steps, their derivatives, purity."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import bilevel as bl

STEPS = 20

CONFIGURATIONS = {
    "sgd": (bl.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "sgd-decay": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "sgd-all": (bl.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd-nesterov-decay": (
        bl.SGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.1, "nesterov": True},
    ),
    "adam": (bl.Adam, torch.optim.Adam, {"lr": 0.1}),
    "adam-betas": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.8)}),
    "adam-no-averaging": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.0)}),
    "adam-eps": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "eps": 0.3}),
    "adam-decay": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2}),
    "adamw": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adamw-all": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.3, "weight_decay": 0.5}),
    "adamw-no-decay": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
}


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("w", (3, 2)), ("b", (2,)), ("scale", ()))
    }


def loss_of(y: dict[str, Tensor]) -> Tensor:
    """Nonquadratic, coupled over the leaves."""
    return (
        (1 + (y["w"].tanh() + y["b"]).pow(2)).log().sum()
        + (y["scale"] + 0.3 * y["w"].sum()).cos()
        + (0.3 * y["scale"]).exp()
    )


def gradient_of(y: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in y.items()}
    return dict(zip(leaves, torch.autograd.grad(loss_of(leaves), list(leaves.values())), strict=True))


def ours(optimizer: bl.Optimizer, outer: object) -> list[dict[str, Tensor]]:
    y, path = start(), []
    state = optimizer.init(y)
    for _ in range(STEPS):
        y, state = optimizer.step(gradient_of(y), state, y, outer)
        path.append(y)
    return path


def theirs(kind: type[torch.optim.Optimizer], arguments: dict) -> list[dict[str, Tensor]]:
    y, path = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}, []
    optimizer = kind(list(y.values()), **arguments)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(y).backward()
        optimizer.step()
        path.append({name: leaf.detach().clone() for name, leaf in y.items()})
    return path


def assert_same_path(path: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert (expected[-1]["w"] - start()["w"]).abs().max() > 1e-2, "the reference did not move"
    for step, (a, b) in enumerate(zip(path, expected, strict=True)):
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-12, atol=1e-12, msg=lambda text, at=f"step {step}, {name}": f"{at}: {text}"
            )


def as_functions(arguments: dict) -> tuple[dict, dict[str, Tensor]]:
    """The same hyper-parameters as functions of an outer variable that holds them."""
    outer, functions = {}, {}
    for name, value in arguments.items():
        if name == "nesterov":
            functions[name] = value
        elif name == "betas":
            outer |= {
                "beta1": torch.tensor(value[0], dtype=torch.float64),
                "beta2": torch.tensor(value[1], dtype=torch.float64),
            }
            functions[name] = (lambda outer: outer["beta1"], lambda outer: outer["beta2"])
        else:
            outer[name] = torch.tensor(value, dtype=torch.float64)
            functions[name] = lambda outer, name=name: outer[name]
    return functions, outer


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps_equal_those_of_torch_optim(name):
    kind, reference, arguments = CONFIGURATIONS[name]
    assert_same_path(ours(kind(**arguments), None), theirs(reference, arguments))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps_are_the_same_with_hyper_parameters_as_functions_of_outer(name):
    kind, reference, arguments = CONFIGURATIONS[name]
    functions, outer = as_functions(arguments)
    optimizer = kind(**functions)
    assert_same_path(ours(optimizer, outer), theirs(reference, arguments))


@pytest.mark.parametrize("chained", [1, 3])
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "adam-no-averaging"])
def test_derivatives_of_steps_pass_gradcheck_in_gradient_inner_and_hyper_parameters(name, chained):
    kind, _, arguments = CONFIGURATIONS[name]
    functions, outer = as_functions(arguments)
    optimizer, names = kind(**functions), list(outer)
    generator = torch.Generator().manual_seed(1)
    # Away from zero: Adam's first step is sign(g), which has no derivative there.
    gradients = [torch.rand(3, generator=generator, dtype=torch.float64) + 0.3 for _ in range(chained)]
    y = torch.randn(3, generator=generator, dtype=torch.float64)
    inputs = [leaf.clone().requires_grad_() for leaf in (*gradients, y, *outer.values())]

    def steps(*tensors):
        hyper, at = dict(zip(names, tensors[chained + 1 :], strict=True)), tensors[chained]
        state = optimizer.init(at)
        for g in tensors[:chained]:
            at, state = optimizer.step(g, state, at, hyper)
        return at

    assert torch.autograd.gradcheck(steps, inputs)


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
@pytest.mark.parametrize(
    ("kind", "reference", "arguments"),
    [
        (bl.Adam, torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.0}),
        (bl.Adam, torch.optim.Adam, {"lr": 0.05, "eps": 1e-3}),
        (bl.AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    ],
)
def test_adam_hypergradient_is_finite_and_right_when_a_unit_is_dead_at_every_step(kind, reference, arguments, keep):
    target = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def inner_loss(y, x, batch):
        # The last two entries only enter through relu(negative): their gradient is exactly zero at every step.
        return (x.exp()[:2] * (y[:2] - target[:2]).pow(4)).sum() + torch.relu(y[2:] - 10).sum() * x[2]

    def outer_loss(y, x, batch):
        return (y - target).pow(2).sum() + x[0] * y[2]

    def value(x):
        y = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = reference([y], **arguments)
        for _ in range(6):
            optimizer.zero_grad()
            inner_loss(y, x, None).backward()
            assert y.grad[2:].eq(0).all(), "the test needs a dead unit"
            optimizer.step()
        return outer_loss(y.detach(), x, None)

    x = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    y0 = torch.zeros(4, dtype=torch.float64)
    hg = bl.hypergradient(
        bl.Problem(inner_loss, outer_loss),
        x,
        y0,
        bl.Batches(None, None),
        solver=bl.Descent(kind(**arguments), steps=6),
        estimator=bl.Unrolled(keep=keep),
    )
    hg.raise_if_failed(strict=True)
    steps = 1e-6 * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(value(x + d) - value(x - d)) / 2e-6 for d in steps])
    torch.testing.assert_close(hg.outer_loss, value(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(hg.grad, differences, rtol=1e-6, atol=1e-8)


ELEMENTWISE = {
    "one number a leaf": {"w": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor(2.0, dtype=torch.float64)},
    "one number an entry": {
        "w": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.float64),
        "b": torch.tensor([1.0, 2.0], dtype=torch.float64),
    },
}


@pytest.mark.parametrize("rates", ELEMENTWISE.values(), ids=list(ELEMENTWISE))
@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_learned_step_sizes_may_be_a_tree_like_inner(kind, rates):
    y = {name: leaf for name, leaf in start().items() if name != "scale"}
    g = {name: torch.full_like(leaf, 0.5) for name, leaf in y.items()}
    optimizer = kind(lr=lambda outer: outer["rates"], weight_decay=0.0)
    moved, _ = optimizer.step(g, optimizer.init(y), y, {"rates": rates})
    for name in y:
        # Adam's first step is sign(g) up to eps.
        direction = g[name] if kind is bl.SGD else g[name].sign()
        torch.testing.assert_close(moved[name], y[name] - rates[name] * direction, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_learned_weight_decay_may_be_a_tree_like_inner(kind):
    y, g = (
        {name: start()[name] for name in ("w", "b")},
        {name: torch.full_like(start()[name], 0.5) for name in ("w", "b")},
    )
    decays = {"w": torch.tensor(0.5, dtype=torch.float64), "b": torch.tensor(0.0, dtype=torch.float64)}
    optimizer = kind(lr=0.1, weight_decay=lambda outer: outer)
    moved, _ = optimizer.step(g, optimizer.init(y), y, decays)
    for name, decay in decays.items():
        alone = kind(lr=0.1, weight_decay=decay.item())
        torch.testing.assert_close(
            moved[name], alone.step(g[name], alone.init(y[name]), y[name], None)[0], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_learned_step_sizes_meet_the_leaf_of_their_own_name_or_are_refused(kind):
    """A dict with the same names in another order is the same tree to its author."""
    y = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    g = {name: torch.ones_like(leaf) for name, leaf in y.items()}
    optimizer = kind(lr=lambda outer: {"b": torch.tensor(100.0), "a": torch.tensor(1.0)}, weight_decay=0.0)
    try:
        moved, _ = optimizer.step(g, optimizer.init(y), y, None)
    except ValueError:
        return
    assert moved["a"].item() == pytest.approx(-1.0, rel=1e-6)
    assert moved["b"].item() == pytest.approx(-100.0, rel=1e-6)


@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_a_tree_of_step_sizes_with_too_few_leaves_is_refused(kind):
    y = {name: start()[name] for name in ("w", "b")}
    optimizer = kind(lr=lambda outer: {"w": torch.tensor(0.1)})
    with pytest.raises(ValueError, match="1 leaves where the inner variable has 2"):
        optimizer.step(y, optimizer.init(y), y, None)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_changes_none_of_its_arguments_and_returns_new_objects(name):
    kind, _, arguments = CONFIGURATIONS[name]
    functions, outer = as_functions(arguments)
    optimizer, y = kind(**functions), start()
    state = optimizer.init(y)
    for _ in range(3):
        g = gradient_of(y)
        given = torch.utils._pytree.tree_leaves((g, state, y, outer))
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        before, versions = [leaf.clone() for leaf in tensors], [leaf._version for leaf in tensors]
        moved, next_state = optimizer.step(g, state, y, outer)
        assert versions == [leaf._version for leaf in tensors]
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        storages = {leaf.untyped_storage().data_ptr() for leaf in y.values()}
        assert not storages & {leaf.untyped_storage().data_ptr() for leaf in moved.values()}
        y, state = moved, next_state


def test_plain_sgd_carries_no_state():
    y = start()
    optimizer = bl.SGD(lr=0.1)
    _, state = optimizer.step(gradient_of(y), optimizer.init(y), y, None)
    assert state is None


@pytest.mark.parametrize("kind", [bl.Adam, bl.AdamW])
def test_an_entry_whose_second_moment_is_zero_does_not_move_even_without_eps(kind):
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer = kind(lr=0.1, eps=0.0, weight_decay=0.0)
    moved, _ = optimizer.step(torch.tensor([0.0, 1.0], dtype=torch.float64), optimizer.init(y), y, None)
    torch.testing.assert_close(moved, torch.tensor([1.0, 1.9], dtype=torch.float64), rtol=1e-12, atol=0)


# Tensors that a step does not use


def two_heads() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"body": (3, 3), "head0": (3,), "head1": (3,), "gain": ()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


# "late" meets its head first after momentum and moments of the others have formed, "gaps" leaves everything out once.
SCHEDULES = {
    "in turn": [(k % 2,) for k in range(STEPS)],
    "late": [(0,) if k < 7 else (0, 1) if k < 12 else (1,) for k in range(STEPS)],
    "gaps": [() if k % 5 == 3 else (k % 3 % 2,) for k in range(STEPS)],
}


def heads_loss(y: dict[str, Tensor], used: tuple[int, ...], x: Tensor | float = 1.0) -> Tensor:
    features = (y["body"] @ torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)).tanh()
    loss = y["gain"] * 0 + sum((x * y[f"head{k}"] @ features - 1 + k).cosh() for k in used)
    return loss if used else (y["gain"] * x).cosh()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tensors_that_a_step_does_not_use_are_left_alone_as_torch_optim_does(name, schedule):
    kind, reference, arguments = CONFIGURATIONS[name]
    optimizer, y = kind(**arguments), two_heads()
    state = optimizer.init(y)
    structure = torch.utils._pytree.tree_structure(state)
    theirs = {key: leaf.clone().requires_grad_() for key, leaf in two_heads().items()}
    other = reference(list(theirs.values()), **arguments)
    for used in SCHEDULES[schedule]:
        leaves = {key: leaf.detach().requires_grad_() for key, leaf in y.items()}
        gradient = torch.autograd.grad(heads_loss(leaves, used), list(leaves.values()), allow_unused=True)
        assert len(used) == 2 or None in gradient, "the test needs unused tensors"
        y, state = optimizer.step(dict(zip(y, gradient, strict=True)), state, y, None)
        assert torch.utils._pytree.tree_structure(state) == structure, "places in the state must not move"
        other.zero_grad(set_to_none=True)
        heads_loss(theirs, used).backward()
        other.step()
        for key, leaf in theirs.items():
            torch.testing.assert_close(y[key], leaf.detach(), rtol=1e-12, atol=1e-12)
    assert (y["head1"] - two_heads()["head1"]).abs().max() > 1e-2, "the reference did not move"


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "adam-no-averaging"])
def test_derivatives_through_steps_that_leave_tensors_out_pass_gradcheck_state_by_state(name):
    """The cotangents of (y', s') pulled back step by step, matched by their place in the flattened state, are those of
    the whole path."""
    kind, _, arguments = CONFIGURATIONS[name]
    functions, outer = as_functions(arguments)
    optimizer, names = kind(**functions), list(outer)
    schedule = [(0,), (0,), (1,), (0, 1), (1,)]

    def gradient(y, used, hyper):
        leaves = list(y.values())
        found = torch.autograd.grad(heads_loss(y, used), leaves, create_graph=True, allow_unused=True)
        return dict(zip(y, found, strict=True))

    def path(*tensors):
        y, hyper = dict(zip(two_heads(), tensors, strict=False)), dict(zip(names, tensors[4:], strict=True))
        state = optimizer.init(y)
        for used in schedule:
            y, state = optimizer.step(gradient(y, used, hyper), state, y, hyper)
        return sum((1 + k) * leaf.sin().sum() for k, leaf in enumerate(y.values()))

    inputs = [leaf.clone().requires_grad_() for leaf in (*two_heads().values(), *outer.values())]
    assert torch.autograd.gradcheck(path, inputs, atol=1e-6)
    whole = torch.autograd.grad(path(*inputs), inputs)

    flatten, tensor = torch.utils._pytree.tree_leaves, lambda leaf: isinstance(leaf, Tensor)
    kept = [({key: leaf.detach() for key, leaf in two_heads().items()}, optimizer.init(two_heads()))]
    for used in schedule:
        y = {key: leaf.detach().requires_grad_() for key, leaf in kept[-1][0].items()}
        kept.append(
            torch.utils._pytree.tree_map_only(
                Tensor, Tensor.detach, optimizer.step(gradient(y, used, outer), kept[-1][1], y, outer)
            )
        )
    end = {key: leaf.detach().requires_grad_() for key, leaf in kept.pop()[0].items()}
    value = sum((1 + k) * leaf.sin().sum() for k, leaf in enumerate(end.values()))
    places = len(flatten(optimizer.init(end)))
    cotangents = [*torch.autograd.grad(value, list(end.values())), *[None] * places]
    total = [torch.zeros_like(leaf) for leaf in outer.values()]
    for used in reversed(schedule):
        before = torch.utils._pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().requires_grad_(), kept.pop())
        hyper = {key: leaf.detach().requires_grad_() for key, leaf in outer.items()}
        after = optimizer.step(gradient(before[0], used, hyper), before[1], before[0], hyper)
        pairs = [(a, w) for a, w in zip(flatten(after), cotangents, strict=True) if w is not None and a.requires_grad]
        starts = flatten(before)
        inputs_here = [leaf for leaf in starts if tensor(leaf)]
        found = iter(
            torch.autograd.grad(
                [a for a, _ in pairs], [*inputs_here, *hyper.values()], [w for _, w in pairs], allow_unused=True
            )
        )
        cotangents = [next(found) if tensor(leaf) else None for leaf in starts]
        total = [a if b is None else a + b for a, b in zip(total, found, strict=True)]
    for a, b in zip([*cotangents[:4], *total], whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_a_gradient_with_too_few_leaves_is_refused(kind):
    y, optimizer = start(), kind(lr=0.1)
    with pytest.raises(ValueError, match=r"a gradient of 1 leaves for an inner variable of 3; one per tensor.*None wh"):
        optimizer.step({"w": y["w"]}, optimizer.init(y), y, None)


# Hyper-parameters per tensor and per entry

PER_TENSOR = {"w": 0.3, "b": 0.0, "scale": 0.7}
HYPERS = {
    "lr": [bl.SGD, bl.Adam, bl.AdamW],
    "momentum": [bl.SGD],
    "dampening": [bl.SGD],
    "weight_decay": [bl.SGD, bl.Adam, bl.AdamW],
    "beta1": [bl.Adam, bl.AdamW],
    "beta2": [bl.Adam, bl.AdamW],
    "eps": [bl.Adam, bl.AdamW],
}
CASES = [(name, kind) for name, kinds in HYPERS.items() for kind in kinds]
TORCH = {bl.SGD: torch.optim.SGD, bl.Adam: torch.optim.Adam, bl.AdamW: torch.optim.AdamW}


def arguments_with(kind: type, name: str, value: object) -> dict:
    arguments = {"lr": 0.1, "momentum": 0.9} if kind is bl.SGD else {"lr": 0.1}
    if name.startswith("beta"):
        return arguments | {"betas": (value, 0.99) if name == "beta1" else (0.8, value)}
    return arguments | {name: value}


FORMS = {
    "floats": lambda tree: tree,
    "mixed": lambda tree: tree | {"w": torch.tensor(tree["w"], dtype=torch.float64)},
    "entries": lambda tree: {
        key: torch.full_like(leaf, tree[key]) if key != "b" else tree[key] for key, leaf in start().items()
    },
    "another order": lambda tree: dict(reversed(tree.items())),
    "a function": lambda tree: lambda outer: tree,
    "a function of tensors": lambda tree: (
        lambda outer: {key: torch.tensor(one, dtype=torch.float64) for key, one in tree.items()}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_hyper_parameter_may_be_a_tree_like_inner_as_torch_optim_has_groups(name, kind, form):
    path = ours(kind(**arguments_with(kind, name, FORMS[form](PER_TENSOR))), None)
    y = {key: leaf.clone().requires_grad_() for key, leaf in start().items()}
    optimizer = TORCH[kind](
        [{"params": [leaf], **arguments_with(kind, name, PER_TENSOR[key])} for key, leaf in y.items()], lr=0.1
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(y).backward()
        optimizer.step()
        for key, leaf in y.items():
            torch.testing.assert_close(path[step][key], leaf.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_derivatives_in_element_wise_hyper_parameters_pass_gradcheck(name, kind):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.rand(3, generator=generator, dtype=torch.float64) + 0.3 for _ in range(3)]
    y = torch.randn(3, generator=generator, dtype=torch.float64)
    value = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)

    def steps(value, at):
        optimizer = kind(**arguments_with(kind, name, lambda outer: outer))
        state = optimizer.init(at)
        for g in gradients:
            at, state = optimizer.step(g, state, at, value)
        return at

    assert torch.autograd.gradcheck(steps, [value.requires_grad_(), y.requires_grad_()])


def test_momentum_of_zero_for_one_tensor_allocates_no_buffer():
    y = start()
    optimizer = bl.SGD(lr=0.1, momentum=PER_TENSOR)
    _, state = optimizer.step(gradient_of(y), optimizer.init(y), y, None)
    assert [leaf is None for leaf in state] == [False, True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": 0.1, "b": 0.1}, "has 2 leaves where the inner variable has 3"),
        ({"w": 0.1, "b": 0.1, "other": 0.1}, "is a dict whose structure is not that of the inner variable"),
        ([0.1, 0.1, 0.1], "is a list whose structure is not that"),
        ({"w": torch.ones(3), "b": 0.1, "scale": 0.1}, r"of inner\['w'\] has the shape \(3,\).*\(3, 2\)"),
        ({"w": 0.1, "b": 0.1, "scale": torch.ones(1)}, r"of inner\['scale'\] has the shape \(1,\).*\(\)"),
        ({"w": "fast", "b": 0.1, "scale": 0.1}, r"of inner\['w'\] is a str; a number or a tensor"),
        (None, "has 1 leaves where the inner variable has 3; a number, a 0-dim tensor or a tree like inner"),
    ],
)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_hyper_parameter_of_another_shape_or_structure_gets_a_sentence(name, kind, value, message):
    y, optimizer = start(), kind(**arguments_with(kind, name, lambda outer: value))
    named = {"beta1": r"betas\[0\]", "beta2": r"betas\[1\]"}.get(name, name)
    with pytest.raises(ValueError, match=f"^{named} {message}"):
        optimizer.step(y, optimizer.init(y), y, None)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), -0.1, "0.1", None, {}, {"w": True}, {"w": -1.0}])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_no_number_in_range_is_refused_at_construction(name, kind, value):
    named = {"beta1": r"betas\[0\]", "beta2": r"betas\[1\]"}.get(name, name)
    with pytest.raises(ValueError, match=rf"{kind.__name__} was given {named}=.*number in \[0\.0, .*function of outer"):
        kind(**arguments_with(kind, name, value))


@pytest.mark.parametrize("value", [torch.tensor(0.1, requires_grad=True), {"w": torch.tensor(0.1, requires_grad=True)}])
def test_a_learned_tensor_given_as_a_constant_is_refused(value):
    """It looks like a learned step size, and no hypergradient would reach it."""
    with pytest.raises(ValueError, match=r"requires grad: .*no hypergradient would reach it.*lr=lambda outer: outer"):
        bl.SGD(lr=value)


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
    assert step < 1e-9, "it has not come to rest"
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
@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
def test_steps_keep_dtype_and_structure_and_equal_torch_optim_in_every_dtype(kind, shape, dtype):
    generator = torch.Generator().manual_seed(5)
    y = TREES[shape](lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
    leaves, structure = torch.utils._pytree.tree_flatten(y)
    # A learned rate in float64: it widens a 0-dim tensor unless it is cast.
    rate = torch.tensor(0.05, dtype=torch.float64)
    optimizer = kind(lr=lambda outer: outer, **({"momentum": 0.5} if kind is bl.SGD else {"eps": 1e-3}))
    others = [leaf.clone().requires_grad_() for leaf in leaves]
    arguments = {"momentum": 0.5} if kind is bl.SGD else {"eps": 1e-3}
    other = TORCH[kind](others, lr=0.05, foreach=False, **arguments)
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
    assert all(leaf.dtype == dtype for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("kind", [bl.SGD, bl.Adam, bl.AdamW])
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
