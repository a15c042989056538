"""A trial of an optimizer whose step others wrote: on a few numbers, before it is trusted with a problem.

It leaves what it is given as it is; the same arguments give the same answer; and what autograd says of three steps, in
the gradients and in the start, is what central differences say.

| | gradients | memory |
| --- | --- | --- |
| trial | about two hundred steps on seven numbers, once | - |
"""

from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.optim.base import Optimizer
from bilevel.space import tree

STEPS = 3
_WIDTH = 1e-6


def numbers() -> tuple[list[Tensor], list[list[Tensor]]]:
    """A start and the gradients of a few steps, away from zero, where roots and signs have no derivative."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(low: float) -> list[Tensor]:
        return [low + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (2, 2))]

    return draw(0.5), [draw(0.3) for _ in range(STEPS)]


def check(owner: str, optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimizer passes."""
    with torch.device("cpu"):
        y, gradients = numbers()
        _check_pure(owner, optimizer, y, gradients)
        _check_derivative(owner, optimizer, y, gradients)


def _run(optimizer: Optimizer, y: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    state = optimizer.init(y)
    for g in gradients:
        y, state = optimizer.step(g, state, y, None)
    return tree.tensors(y)


def _check_pure(owner: str, optimizer: Optimizer, y: list[Tensor], gradients: list[list[Tensor]]) -> None:
    with torch.no_grad():
        start, state = y, optimizer.init(y)
        for g in gradients:
            given = [leaf for leaf in tree.flatten((y, g, state))[0] if isinstance(leaf, Tensor)]
            before, versions = [leaf.clone() for leaf in given], [leaf._version for leaf in given]
            moved, after = optimizer.step(g, state, y, None)
            again, _ = optimizer.step(g, state, y, None)
            if versions != [leaf._version for leaf in given] or not _equal(given, before):
                raise ValueError(
                    f"{owner} was given an optimizer that changes the gradient, the inner variable or its state in "
                    f"place, so that no step could be rebuilt; a pure one was needed"
                )
            if not _equal(tree.tensors(moved), tree.tensors(again)):
                raise ValueError(
                    f"{owner} was given an optimizer that keeps something from call to call outside of its state: the "
                    f"same step twice gives two answers. Everything it counts must be in the state that a step returns"
                )
            if tree.flatten(after)[1] != tree.flatten(state)[1]:
                raise ValueError(
                    f"{owner} was given an optimizer whose state changes its structure from "
                    f"{tree.flatten(state)[1]} to {tree.flatten(after)[1]}; one structure for all steps was needed"
                )
            y, state = moved, after
        if not _equal(_run(optimizer, start, gradients), tree.tensors(y)):
            raise ValueError(
                f"{owner} was given an optimizer that runs another way the second time; it keeps something"
            )


def _check_derivative(owner: str, optimizer: Optimizer, y: list[Tensor], gradients: list[list[Tensor]]) -> None:
    weights = [torch.linspace(1.0, 2.0, leaf.numel(), dtype=torch.float64).reshape(leaf.shape) for leaf in y]
    with torch.enable_grad():
        inputs: list[Any] = [[leaf.clone().requires_grad_() for leaf in each] for each in (y, *gradients)]
        ends = _run(optimizer, inputs[0], inputs[1:])
        flat = [leaf for each in inputs for leaf in each]
        outputs = [(leaf, weight) for leaf, weight in zip(ends, weights, strict=True) if leaf.requires_grad]
        if not outputs:
            raise ValueError(f"{owner} was given {_NO_DERIVATIVE}: what it returns has no graph")
        found = autodiff.grad([leaf for leaf, _ in outputs], flat, [weight for _, weight in outputs])
    with torch.no_grad():
        for place, leaf in enumerate(flat):
            said = torch.zeros_like(leaf) if found[place] is None else found[place]
            assert said is not None
            true = torch.zeros_like(leaf)
            for entry in range(leaf.numel()):
                ends = []
                for sign in (1.0, -1.0):
                    moved = [each.detach().clone() for each in flat]
                    moved[place].view(-1)[entry] += sign * _WIDTH
                    pairs = [moved[2 * i : 2 * i + 2] for i in range(len(inputs))]
                    ends.append(_weighted(_run(optimizer, pairs[0], pairs[1:]), weights))
                true.view(-1)[entry] = (ends[0] - ends[1]) / (2 * _WIDTH)
            if not torch.allclose(said, true, rtol=1e-5, atol=1e-7):
                what = "the start" if place < 2 else f"the gradient of step {place // 2 - 1}"
                raise ValueError(
                    f"{owner} was given {_NO_DERIVATIVE}: in {what} autograd says {said.view(-1).tolist()} and central "
                    f"differences say {true.view(-1).tolist()}"
                )


_NO_DERIVATIVE = "an optimizer whose steps are not differentiable as they are written"


def _weighted(leaves: list[Tensor], weights: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(leaves, weights, strict=True)]).sum()


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
