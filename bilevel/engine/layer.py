"""An inner solution as a node of the caller's graph, and graphs inside of nodes.

| | cost | memory |
| --- | --- | --- |
| node | what its rule costs, at each backward | what its rule keeps, while the node lives |
| pulled | one sweep through the inner graph, with a graph of its own | both graphs |

A node keeps what it was made of as autograd does (`save_for_backward`): what was changed in place since, or freed by an
earlier backward, is autograd's own error. Cotangents that arrive under a torch.func.vmap are pulled
one by one, by what they can share.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.engine import autodiff
from bilevel.space.tree import PartialLeaves

_BATCHED = (
    "the backward of bilevel.solution was given many cotangents at once (is_grads_batched=True, vectorize=True); write "
    "bilevel.layer.jacobian(y, x), or one torch.func.vmap over torch.autograd.grad"
)


class Rule(Protocol):
    """How cotangents of the outputs become cotangents of the inputs; those of no input that requires grad are None."""

    def pull(self, cotangents: Sequence[Tensor]) -> PartialLeaves:
        """Numbers, without a graph."""

    def pull_many(self, rows: Sequence[Sequence[Tensor]]) -> list[PartialLeaves]:
        """The same for several cotangents."""

    def differentiable(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> PartialLeaves:
        """The same with its graph in all three."""


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a dual number of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in tensors)


def node(
    rule: Rule, inputs: Sequence[Tensor], outputs: Sequence[Tensor], watched: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`outputs` as functions of `inputs`; `watched` are constants that must not be changed before a backward."""
    # (As other tensors: a rule that holds the outputs must not hold the node.)
    return BilevelSolution.apply(rule, len(inputs), [leaf.detach() for leaf in outputs], *inputs, *watched)


class BilevelSolution(torch.autograd.Function):
    """The node. Its name is known to `engine.twice`: what it cannot differentiate again, it refuses."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, count: int, outputs: list[Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.rule, ctx.count, ctx.given = rule, count, len(given)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, *outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, outputs = saved[: ctx.count], saved[ctx.given :]
        constants = (None,) * (ctx.given - ctx.count)
        if all(leaf is None for leaf in cotangents):
            return (None, None, None, *[None] * ctx.count, *constants)
        if any(leaf is not None and torch._C._functorch.is_legacy_batchedtensor(leaf) for leaf in cotangents):
            raise NotImplementedError(_BATCHED)
        ws = autodiff.filled(cotangents, outputs)
        if torch.is_grad_enabled():
            return (None, None, None, *ctx.rule.differentiable(outputs, inputs, ws), *constants)
        known = _Known()
        found = iter(_Numbers.apply(ctx.rule, known, *[leaf.detach() for leaf in ws]))
        return (None, None, None, *[next(found) if there else None for there in known.places], *constants)


class _Known:
    """Which inputs have a cotangent. (No list: vmap hands on copies of those.)"""

    places: list[bool]


class _Numbers(torch.autograd.Function):
    """A rule's numbers; under vmap one row after another."""

    @staticmethod
    def forward(rule: Rule, known: _Known, *cotangents: Tensor) -> tuple[Tensor, ...]:
        found = rule.pull(cotangents)
        known.places = [leaf is not None for leaf in found]
        return tuple(leaf for leaf in found if leaf is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rule: Rule, known: _Known, *cotangents: Tensor) -> Any:
        def row(place: int) -> list[Tensor]:
            pairs = zip(cotangents, in_dims[2:], strict=True)
            return [leaf if dim is None else leaf.select(dim, place) for leaf, dim in pairs]

        if torch._C._functorch.maybe_current_level() is not None:
            raise NotImplementedError(_BATCHED)
        found = rule.pull_many([row(place) for place in range(info.batch_size)])
        known.places = [leaf is not None for leaf in found[0]]
        stacked = [torch.stack(leaves) for leaves in zip(*map(_there, found), strict=True)]
        return tuple(stacked), (0,) * len(stacked)


def _there(leaves: PartialLeaves) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None]


def batched(output: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> PartialLeaves:
    """The gradients of <w, output> for each row w of weights, by torch.func.vmap; the graph stays as it is."""
    known = _Known()

    def row(weight: Tensor) -> tuple[Tensor, ...]:
        found = autodiff.grad([output], inputs, [weight], retain_graph=True)
        known.places = [leaf is not None for leaf in found]
        return tuple(_there(found))

    given = iter(torch.func.vmap(row)(weights))
    return tuple(next(given) if there else None for there in known.places)


def pulled(
    ends: Sequence[Tensor], starts: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> PartialLeaves:
    """Cotangents of `ends`, the outputs of a graph that begins at the leaves `starts`, to cotangents of those, with a
    graph in `inputs`, which stand for `starts` in the caller's graph, and in `cotangents`.
    """
    with torch.enable_grad():
        ws = [leaf.detach().requires_grad_() for leaf in cotangents]
        found = autodiff.grad(ends, starts, ws, create_graph=True)
    own = [leaf for leaf in found if leaf is not None]
    if not own:
        return found
    given = iter(_Inside.apply(own, [*starts, *ws], *inputs, *cotangents))
    return tuple(None if leaf is None else next(given) for leaf in found)


class _Inside(torch.autograd.Function):
    """A graph from `starts` to `ends` as one node, any number of times differentiable."""

    @staticmethod
    def forward(ctx: Any, ends: list[Tensor], starts: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.ends, ctx.starts = ends, starts
        ctx.save_for_backward(*inputs)
        return tuple(leaf.detach() for leaf in ends)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, *pulled(ctx.ends, ctx.starts, inputs, cotangents))
        return (None, None, *autodiff.grad(ctx.ends, ctx.starts, cotangents, retain_graph=True))
