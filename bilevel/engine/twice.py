"""Does a loss have the second derivative that an estimator asks for? Some have not, and autograd says nothing.

torch's own operators, but for a few (`_DOUBTFUL`), have a right second derivative or raise. Three kinds of node may
drop it without a word: what torch.compile made, a Function marked @once_differentiable whose incoming gradient is a
constant, and a Function of the user's whose backward computes with detached tensors. The first is refused; for the
others, and for the doubtful ones, a product with the second derivatives is held against differences of the gradient,
once per problem. A rematerialized block is what is inside of it.
"""

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from bilevel.engine import autodiff, scaling
from bilevel.engine.base import Losses
from bilevel.engine.rematerialize import inside
from bilevel.engine.replay import Generators
from bilevel.engine.split import Embedded
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_DOUBTFUL = ("WeightNormInterface", "NativeLayerNormBackwardBackward", "NativeBatchNormBackwardBackward")
"""Operators of torch 2.13 whose second derivative was seen to be wrong: torch._weight_norm; and the derivative of layer
and batch normalization, which is in a loss that takes a gradient through them."""
_KNOWN = ("BilevelSolutionBackward", "_SolvedBackward", "_InsideBackward", "_VaryBackward", "_TotalBackward")
"""The nodes of the library's own: of layers, which refuse in words what they cannot differentiate again, and of sums
over ranks, which can be differentiated to any order."""
_SPREAD = ("_WholeBackward", "_LocalBackward", "_ToTorchTensor", "Redistribute")
"""The nodes between ranks, ours and DTensor's, whose second derivatives are tested. (Not that of DTensor.from_local: in
torch 2.13 its backward is no function of its cotangent where that must move between ranks.)"""
_KINK_FREE = 0.02
"""Two step sizes must give the same difference this closely: between kinks they do, across kinks they do not."""
_MISSING = 1e-3
"""The part of a difference that a product must lack to be called incomplete."""


def check(value: Tensor, loss: Losses, inner: Tree, outer: Tree, batch: object, *, alone: bool = True) -> None:
    """Raise unless autograd returns the whole second derivative in y of the loss behind `value`, a loss with its graph.

    Args:
        value: the loss.
        loss: what computes it.
        inner: y.
        outer: x.
        batch: its data.
        alone: whether this process has all of y; where it has a part, nothing can be held against differences.

    Raises:
        NotTwiceDifferentiableError: it has not, with the name of the node.
    """
    compiled, custom = _nodes(value)
    if compiled:
        raise autodiff.not_twice_differentiable("torch.compile", compiled=True)
    if not custom or type(value) is not Tensor:
        return
    if not alone:
        raise autodiff.not_twice_differentiable(", ".join(sorted(custom)))
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
    custom = _custom([value], set())
    return any(name.startswith("CompiledFunction") for name in custom), custom


def _custom(values: list[Tensor], outside: set[object]) -> set[str]:
    """The names of the nodes behind tensors, apart from those `outside`, that are not torch's own or are doubtful."""
    custom, seen = set[str](), set(outside)
    queue: list[torch.autograd.graph.Node | None] = [value.grad_fn for value in values]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue += [following for following, _ in node.next_functions]
        made = inside(node)
        if made is not None:
            # At once and by itself, so that one block's graph is there at a time.
            custom |= _custom(made, seen)
            del made
            continue
        name = node.name()
        if name in _KNOWN or name.startswith(_SPREAD) or scaling.is_edge(node):
            continue
        compiled = name.startswith("CompiledFunction")
        if compiled or isinstance(node, BackwardCFunction) or "CppNode" in name or name.startswith(_DOUBTFUL):
            custom.add(name)
    return custom


def _lacking(loss: Losses, inner: Tree, outer: Tree, batch: object, generators: Generators) -> bool:
    """Whether the second derivatives in use, of dg/dy in y, x and the features, lack something that differences have.

    For one tensor z of them at a time, <w, d(dg/dy)/dz v> is taken by autograd and by differences of dg/dy along v.
    """
    ys, xs = tree.tensors(inner), tree.tensors(outer)
    # (Of features whose rows are split over ranks, a difference is that of all rows and a product that of one rank's.)
    features = [] if isinstance(batch, Embedded) else [leaf for leaf in tree.tensors(batch) if leaf.requires_grad]
    here, seed = [*ys, *xs, *features], torch.Generator(device="cpu").manual_seed(0)
    start = generators.peek()

    def random(like: list[Tensor]) -> list[Tensor]:
        return [torch.randn(leaf.shape, generator=seed, dtype=torch.float64).to(leaf) for leaf in like]

    def slope(moved: list[Tensor], *, graph: bool = False) -> tuple[PartialLeaves, float]:
        generators.set(start)
        rest = iter(moved[len(ys) + len(xs) :])
        embedded = tree.tree_map(
            lambda leaf: next(rest, leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf, batch
        )
        y, x = tree.like(inner, moved[: len(ys)]), tree.like(outer, moved[len(ys) : len(ys) + len(xs)])
        value = loss(y, x, embedded).sum()
        return autodiff.grad([value], moved[: len(ys)], create_graph=graph), float(value.detach())

    at = [leaf.detach().requires_grad_() for leaf in here]
    first, _ = slope(at, graph=True)
    w = random(ys)
    pairs = [(g, v) for g, v in zip(first, w, strict=True) if g is not None]
    products = autodiff.filled(autodiff.grad([g for g, _ in pairs], at, [v for _, v in pairs]), at)
    size = max(1.0, max((leaf.detach().abs().max().item() for leaf in here if leaf.numel()), default=1.0))
    length = size * torch.finfo(ys[0].dtype).eps ** (1 / 3)
    total = sum(g.detach().double().norm().item() for g, _ in pairs)
    noise = 100 * torch.finfo(ys[0].dtype).eps * total / length
    for i, v in enumerate(random(here)):

        def difference(step: float, i: int = i, v: Tensor = v) -> tuple[float, float]:
            ends = []
            for sign in (1, -1):
                moved = [leaf.detach() for leaf in here]
                moved[i] = moved[i] + sign * step * v
                ends.append(slope([leaf.detach().requires_grad_() for leaf in moved]))
            (up, above), (down, below) = ends
            parts = zip(autodiff.filled(up, ys), autodiff.filled(down, ys), w, strict=True)
            return sum(float(((a - b).double() * u).sum()) for a, b, u in parts) / (2 * step), (above - below) / (
                2 * step
            )

        (coarse, fall), (fine, _) = difference(length), difference(length / 2)
        if i < len(ys) and first[i] is not None:
            known = float((first[i].detach() * v).double().sum())  # type: ignore[union-attr]
            if abs(fall - known) > 0.05 * abs(fall) + 1e-3 * total:
                continue  # its first derivative is another's by design: a straight-through estimator
        lacking = abs(coarse - float((products[i].double() * v).sum()))
        scale = _norm(w) * float(v.double().norm())
        if (
            lacking > noise * scale**0.5
            and abs(coarse - fine) < _KINK_FREE * lacking
            and lacking > _MISSING * abs(coarse)
        ):
            return True
    return False


def _norm(leaves: list[Tensor]) -> float:
    """The Euclidean norm of all of them."""
    return sum(float(leaf.double().square().sum()) for leaf in leaves) ** 0.5
