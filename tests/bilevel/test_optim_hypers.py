"""Inner optimizers: hyper-parameters per tensor and per entry, and those that are refused."""

import dataclasses

import pytest
import torch
from optim_cases import STEPS, TORCH, gradient_of, loss_of, numbers_in_float64, ours, start

import bilevel as bl

PER_TENSOR = {"w": 0.3, "b": 0.0, "scale": 0.7}
# (torch's Adagrad has one initial value for all groups.)
FLAGS = ("nesterov", "centered", "decoupled_weight_decay", "smooth", "initial_accumulator_value")


def names_of(kind: type) -> list[str]:
    names = [field.name for field in dataclasses.fields(kind) if field.name not in FLAGS]
    return [each for name in names for each in (("beta1", "beta2") if name == "betas" else (name,))]


CASES = [(name, kind) for kind in TORCH for name in names_of(kind)]
WITH_MOMENTUM = {bl.SGD: {"momentum": 0.9}, bl.optim.RMSprop: {"momentum": 0.3, "alpha": 0.5}}


def arguments_with(kind: type, name: str, value: object) -> dict:
    arguments = {"lr": 0.1, **WITH_MOMENTUM.get(kind, {})}
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


IN_EVERY_FORM = (bl.SGD, bl.Adam, bl.AdamW)  # the others read their hyper-parameters by the same lines
FEW_FORMS = ("mixed", "a function of tensors")


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [(*case, form) for case in CASES for form in (FORMS if case[1] in IN_EVERY_FORM else FEW_FORMS)],
)
@numbers_in_float64()
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
