"""The Jacobian of an inner solution, and products with it.

    rows:     e_i' dy/dx          one backward each, of a solve that all share
    columns:  dy/dx d             one differentiable backward at w = 0, and its derivative: w -> (dy/dx)' w is linear

| | cost, beside the one inner solve |
| --- | --- |
| jacobian(mode="reverse") | P backwards; with chunk=P, of Implicit, 1 inner gradient and P solves |
| jacobian(mode="forward") | Q products |
| jvp | of Implicit: 1 linear solve with H, 3 inner gradients; of Unrolled("graph"): 2 sweeps through the steps |
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bilevel.engine import autodiff, layer
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_MODES = ("reverse", "forward")


def jacobian(inner: Tree, outer: Tree, *, mode: str = "reverse", chunk: int = 1) -> Tree:
    """dy/dx of what `bilevel.solution` returned; the graph stays as it is.

    Args:
        inner: y, as it was returned.
        outer: the tensors to differentiate in: x, or whatever x was computed from.
        mode: "reverse" for rows, one backward of any estimator for each number of y; "forward" for columns, one `jvp`
            for each number of x, which needs an estimator that is differentiable again. Take the shorter way.

        chunk: in reverse mode, how many rows at once, through torch.func.vmap: those of Implicit then share one
            linearization and what its solver learns of it (the factors of Dense), and a network between x and `outer`
            is mapped. 1 for one after another.

    Returns:
        A tree like inner of trees like outer of tensors of the shape of y and that of x one after the other, without a
        graph; zeros where nothing acts.

    Raises:
        ValueError: inner has no graph, `mode` is another word, or `chunk` is no positive integer.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> y = bl.solution(lambda y, x, b: (y**2).sum() - (x[0] * x[1]) * y.sum(), x, torch.zeros(1),
        ...     bl.Batches(None, None), solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Implicit(bl.CG(5)))
        >>> bl.layer.jacobian(y, x)
        tensor([[1.0000, 0.5000]])
    """
    if mode not in _MODES:
        raise ValueError(f"jacobian() was given mode={mode!r}; one of {', '.join(map(repr, _MODES))} was needed")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"jacobian() was given chunk={chunk!r}; an integer of at least 1 was needed")
    ys, xs = _graphs("jacobian", inner, outer)
    blocks = [[torch.zeros((*y.shape, *x.shape), dtype=y.dtype, device=y.device) for x in xs] for y in ys]
    if mode == "reverse":
        for row, y in zip(blocks, ys, strict=True):
            for low, parts in _rows(y, xs, chunk) if y.requires_grad else ():
                for block, x, part in zip(row, xs, parts, strict=True):
                    if part is not None:
                        block.view(y.numel(), *x.shape)[low : low + chunk] = part.detach()
    else:
        for j, x in enumerate(xs):
            for i, unit in enumerate(_units(x) if x.requires_grad else ()):
                for row, part in zip(blocks, _pushed(ys, [x], [unit]), strict=True):
                    if part is not None:
                        row[j].view(*part.shape, x.numel())[..., i] = part.detach()
    return tree.like(inner, [tree.like(outer, row) for row in blocks])


def jvp(inner: Tree, outer: Tree, direction: Tree) -> Tree:
    """dy/dx d of what `bilevel.solution` returned; the graph stays as it is.

    Args:
        inner: y, as it was returned by an estimator that is differentiable again.
        outer: as for `jacobian`.
        direction: d, a tree like outer.

    Returns:
        A tree like inner, without a graph.

    Raises:
        ValueError: inner has no graph, or `direction` is not like outer.
        NotTwiceDifferentiableError: the estimator is not differentiable again.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> y = bl.solution(lambda y, x, b: (y**2).sum() - (x[0] * x[1]) * y.sum(), x, torch.zeros(1),
        ...     bl.Batches(None, None), solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Unrolled())
        >>> bl.layer.jvp(y, x, torch.tensor([1.0, 1.0]))
        tensor([1.5000])
    """
    ys, xs = _graphs("jvp", inner, outer)
    ds = tree.aligned(direction, outer)
    if ds is None or [leaf.shape for leaf in ds] != [leaf.shape for leaf in xs]:
        raise ValueError(
            f"jvp() was given a direction of shapes {[tuple(leaf.shape) for leaf in tree.tensors(direction)]}; a tree "
            f"like outer, with {[tuple(leaf.shape) for leaf in xs]}, was needed"
        )
    pushed = autodiff.filled(_pushed(ys, xs, ds), ys)
    return tree.like(inner, [leaf.detach() for leaf in pushed])


def _graphs(who: str, inner: Tree, outer: Tree) -> tuple[list[Tensor], list[Tensor]]:
    ys, xs = tree.tensors(inner), tree.tensors(outer)
    if not any(leaf.requires_grad for leaf in ys) or not any(leaf.requires_grad for leaf in xs):
        raise ValueError(
            f"{who}() was given an inner or an outer variable without a graph; what bilevel.solution returned for "
            f"outer tensors that require grad was needed, and those tensors"
        )
    return ys, xs


def _rows(y: Tensor, xs: list[Tensor], chunk: int) -> Iterator[tuple[int, PartialLeaves]]:
    """The first row of each chunk, and its rows."""
    units = _units(y)
    for low in range(0, y.numel(), chunk):
        some = list(itertools.islice(units, chunk))
        if chunk == 1:
            yield low, autodiff.grad([y], xs, some, retain_graph=True)
        else:
            yield low, layer.batched(y, xs, torch.stack(some))


def _pushed(ys: list[Tensor], xs: list[Tensor], directions: list[Tensor]) -> PartialLeaves:
    with torch.enable_grad():
        weights = [torch.zeros_like(leaf).requires_grad_() for leaf in ys]
        found = autodiff.grad(ys, xs, weights, create_graph=True)
    pairs = [(g, d) for g, d in zip(found, directions, strict=True) if g is not None and g.requires_grad]
    return autodiff.grad([g for g, _ in pairs], weights, [d for _, d in pairs])


def _units(leaf: Tensor) -> Iterator[Tensor]:
    """The unit vectors of a tensor's shape."""
    for i in range(leaf.numel()):
        unit = torch.zeros_like(leaf, memory_format=torch.contiguous_format, requires_grad=False)
        unit.view(-1)[i] = 1
        yield unit
