"""Inner optimizers: torch.optim's steps, their derivatives, purity."""

import pytest
import torch
from optim_cases import CONFIGURATIONS, as_functions, assert_same_path, gradient_of, ours, start, theirs
from torch import Tensor

import bilevel as bl


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
