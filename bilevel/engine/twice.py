"""Does a loss have the second derivative that an estimator asks for? Some have not, and autograd says nothing.

torch's own operators have a right second derivative or raise. Three kinds of node may drop it without a word: what
torch.compile made, a Function marked @once_differentiable whose incoming gradient is a constant, and a Function of the
user's whose backward computes with detached tensors. The first is refused; for the others a product with the second
derivatives is held against differences of the gradient, once per problem.
"""

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from bilevel.engine import autodiff
from bilevel.engine.base import Losses
from bilevel.engine.replay import Generators
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_DOUBTFUL = ("WeightNormInterface",)
"""Operators of torch whose second derivative was seen to be wrong (torch 2.13, torch._weight_norm: half of it missing)."""
_KINK_FREE = 0.02
"""Two step sizes must give the same difference this closely: between kinks they do, across kinks they do not."""
_MISSING = 1e-3
"""The part of a difference that a product must lack to be called incomplete."""


def check(value: Tensor, loss: Losses, inner: Tree, outer: Tree, batch: object) -> None:
    """Raise unless autograd returns the whole second derivative in y of the loss behind `value`, a loss with its graph.

    Raises:
        NotTwiceDifferentiableError: it has not, with the name of the node.
    """
    compiled, custom = _nodes(value)
    if compiled:
        raise autodiff.not_twice_differentiable("torch.compile", compiled=True)
    if not custom or type(value) is not Tensor:
        return
    generators = Generators(value.device)
    before = generators.peek()
    try:
        lacking = _lacking(loss, inner, outer, batch, generators)
    finally:
        generators.set(before)
    if lacking:
        raise autodiff.not_twice_differentiable(", ".join(sorted(custom)))


def _nodes(value: Tensor) -> tuple[bool, set[str]]:
    """Whether a compiled node is behind a tensor, and the names of the nodes that are not torch's own."""
    compiled, custom, seen = False, set[str](), set[object]()
    queue: list[torch.autograd.graph.Node | None] = [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        compiled = compiled or name.startswith("CompiledFunction")
        if isinstance(node, BackwardCFunction) or "CppNode" in name or name.startswith(_DOUBTFUL):
            custom.add(name)
        queue += [following for following, _ in node.next_functions]
    return compiled, custom


def _lacking(loss: Losses, inner: Tree, outer: Tree, batch: object, generators: Generators) -> bool:
    """Whether second derivatives lack something that differences of the gradient have, in any tensor of y."""
    ys, xs = tree.tensors(inner), tree.tensors(outer)
    here, seed = [*ys, *xs], torch.Generator(device="cpu").manual_seed(0)
    direction = [torch.randn(leaf.shape, generator=seed, dtype=torch.float64).to(leaf) for leaf in here]
    start = generators.peek()

    def gradient(step: float, *, graph: bool = False) -> tuple[list[Tensor], PartialLeaves, float]:
        generators.set(start)
        moved = [(leaf.detach() + step * v).requires_grad_() for leaf, v in zip(here, direction, strict=True)]
        value = loss(tree.like(inner, moved[: len(ys)]), tree.like(outer, moved[len(ys) :]), batch).sum()
        return moved, autodiff.grad([value], moved, create_graph=graph), float(value.detach())

    at, first, _ = gradient(0.0, graph=True)
    pairs = [(g, v) for g, v in zip(first, direction, strict=True) if g is not None]
    products = autodiff.filled(autodiff.grad([g for g, _ in pairs], at, [v for _, v in pairs]), at)
    size = max(1.0, max((leaf.abs().max().item() for leaf in here if leaf.numel()), default=1.0))
    step = size * torch.finfo(ys[0].dtype).eps ** (1 / 3)
    differences, slope = [], 0.0
    for length in (step, step / 2):
        (_, up, above), (_, down, below) = (gradient(sign * length) for sign in (1, -1))
        slope = (above - below) / (2 * length)
        both = zip(autodiff.filled(up, here), autodiff.filled(down, here), strict=True)
        differences.append([((a - b) / (2 * length)).double() for a, b in both])
    known_slope = sum(float((g.detach() * v).double().sum()) for g, v in pairs)
    total = sum(g.double().norm().item() for g, _ in pairs)
    if abs(slope - known_slope) > _MISSING * abs(slope) + 1e-3 * total:
        return False  # its first derivative is another's by design: a straight-through estimator, a reversed gradient
    noise = 100 * torch.finfo(ys[0].dtype).eps * total / step
    for product, coarse, fine in zip(products[: len(ys)], *(each[: len(ys)] for each in differences), strict=True):
        wanted, shift, lacking = coarse.norm(), (coarse - fine).norm(), (coarse - product.double()).norm()
        if lacking > noise and shift < _KINK_FREE * lacking and lacking > _MISSING * wanted:
            return True
    return False
