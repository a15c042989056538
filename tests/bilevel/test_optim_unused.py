"""Inner optimizers where a step does not use some of the tensors: torch.optim's steps, and their derivatives."""

import pytest
import torch
from optim_cases import CONFIGURATIONS, STEPS, as_functions, numbers_in_float64, start
from torch import Tensor

import bilevel as bl


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
@numbers_in_float64()
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


@pytest.mark.parametrize(
    "name",
    [
        "sgd-all",
        "sgd-nesterov-decay",
        "adam-betas",
        "adam-decay",
        "adamw-all",
        "rmsprop-all",
        "nadam-all",
        "radam-all",
    ],
)
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
