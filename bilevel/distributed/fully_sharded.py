"""A module that torch's fully_shard (FSDP2) has sharded, as a loss of its parameters: first derivatives only."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.engine.hooked import backward, hooked, part_of
from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.shards import spread
from bilevel.space.tree import Tree

Loss = Callable[[nn.Module, Tree, Any], Tensor]


def fully_sharded(module: nn.Module, loss: Loss) -> Callable[[Tree, Tree, Any], Tensor]:
    """A loss of a `Problem` from a module that torch.distributed.fsdp.fully_shard has sharded.

    The module gathers the weights of a layer when it is reached and frees them behind it, and scatters gradients, all
    by its own hooks. What is computed is the mean over ranks of the loss that each rank returns, as FSDP trains: each
    may be given other data, and dropout may draw other masks. With the same on all, it is that loss.

    Args:
        module: to which `fully_shard` was applied, all of its parameters in the end; on a mesh of one dimension.
        loss: called as `loss(module, outer, batch)`; it calls the module and returns a 0-dim tensor. The outer variable
            acts in it as plain tensors, the same on every rank.

    Returns:
        A loss for `Problem(inner_loss, outer_loss)`; y is `dict(module.named_parameters())`, whose DTensors
        `hypergradient` takes as `inner`. The module's own parameters are what they were after each call, `.grad`
        included; what was learned comes back as `hg.inner`, for `module.load_state_dict(hg.inner)`.

    It is differentiated once: estimators of second derivatives are refused (NotTwiceDifferentiableError). For those,
    `gathered`.

    Cost: a forward and a backward of the module for every gradient, in y, in x or in both.

    Memory: of P numbers over n ranks 3 P / n beside what the module itself needs (the layers at work, and their
        activations): the module's own parameters are put aside while others are in their place, and the gradient. Each
        y of the estimator is P / n.

    Communication: that of fully_shard: each weight is gathered in the forward and in the backward, each gradient
        scattered, so 3 P numbers a gradient; one all-reduce of a number, and of Q numbers where the gradient in x is
        wanted.

    Raises:
        ValueError: the module has parameters that are not sharded; (when used) y is no dict of all parameters.
        NotTwiceDifferentiableError: (when used) a second derivative is asked for.

    Example:
        Under torchrun --nproc-per-node 2, with torch.distributed initialized::

            for block in net.blocks:
                fully_shard(block)
            fully_shard(net)

            def inner_loss(net, x, batch):
                rows, labels, index = batch
                losses = torch.nn.functional.cross_entropy(net(rows), labels, reduction="none")
                return (x["weights"][index].sigmoid() * losses).mean()

            problem = bl.Problem(fully_sharded(net, inner_loss), fully_sharded(net, outer_loss))
            hg = bl.hypergradient(problem, x, dict(net.named_parameters()), batches,
                solver=bl.Descent(bl.SGD(lr=0.1), steps=5), estimator=bl.FirstOrderCorrected())

        See examples/distributed/sharded.py.
    """
    if not isinstance(module, nn.Module) or not callable(loss):
        raise TypeError(
            f"fully_sharded() was given {type(module).__name__} and {type(loss).__name__}; a module and a function of "
            f"(module, outer, batch) were needed"
        )
    plain = [name for name, parameter in module.named_parameters() if not spread(parameter)]
    if plain:
        raise ValueError(
            f"fully_sharded() was given a module whose parameters {plain} are not sharded; write "
            f"torch.distributed.fsdp.fully_shard(module) first"
        )
    return _FullySharded(module, loss)


class _FullySharded:
    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self._module, self._loss = module, loss
        self._parameters = dict(module.named_parameters())
        mesh = next(iter(self._parameters.values())).device_mesh  # type: ignore[attr-defined]
        self._ranks = Ranks(mesh.get_group())

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        if not isinstance(inner, dict) or set(inner) != set(self._parameters):
            raise ValueError(
                "a loss of fully_sharded() was given another inner variable than the parameters of its module; pass "
                "inner=dict(module.named_parameters())"
            )
        parts = [part_of(inner[name]) if spread(inner[name]) else inner[name] for name in self._parameters]
        entries, structure = tree.flatten((outer, batch))
        places = [i for i, entry in enumerate(entries) if isinstance(entry, Tensor)]

        def run(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            count = len(parts)
            others = [
                leaf.detach().requires_grad_(want) if want else leaf.detach()
                for leaf, want in zip(tensors[count:], wanted[count:], strict=True)
            ]
            filled = list(entries)
            for i, leaf in zip(places, others, strict=True):
                filled[i] = leaf
            x, data = tree.unflatten(filled, structure)
            with self._holding(tensors[:count]), torch.set_grad_enabled(any(wanted)):
                value = self._loss(self._module, x, data)
                if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
                    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
                    raise ValueError(
                        f"the loss given to fully_sharded() returned {given}; a floating 0-dim tensor was needed"
                    )
                if any(wanted):
                    backward(value)
                slopes = [
                    None if parameter.grad is None or not want else parameter.grad.to_local()  # type: ignore[attr-defined]
                    for parameter, want in zip(self._parameters.values(), wanted[:count], strict=True)
                ]
            reached = [leaf.grad for leaf in others if leaf.grad is not None]
            loss, *summed = self._ranks.sum([value.detach(), *reached])
            means = iter([each / self._ranks.size for each in summed])
            rest = [None if leaf.grad is None else next(means) for leaf in others]
            return loss / self._ranks.size, [*slopes, *rest]

        return hooked(run, [*parts, *(entries[i] for i in places)])

    @contextlib.contextmanager
    def _holding(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Other numbers in the place of the module's parameters, and no gradients."""
        self._reshard()
        own = [parameter.to_local().data for parameter in self._parameters.values()]  # type: ignore[attr-defined]
        kept = [None if _same(leaf, part) else leaf.clone() for leaf, part in zip(own, parts, strict=True)]
        gradients = [parameter.grad for parameter in self._parameters.values()]
        try:
            for leaf, part, other in zip(own, parts, kept, strict=True):
                if other is not None:
                    leaf.copy_(part)
            for parameter in self._parameters.values():
                parameter.grad = None
            yield
        finally:
            self._reshard()
            for leaf, other in zip(own, kept, strict=True):
                if other is not None:
                    leaf.copy_(other)
            for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
                parameter.grad = gradient

    def _reshard(self) -> None:
        """Nothing gathered from other numbers is used again."""
        from torch.distributed.fsdp import FSDPModule

        for layer in self._module.modules():
            if isinstance(layer, FSDPModule):
                layer.reshard()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory."""
    storages = (one.untyped_storage()._cdata, other.untyped_storage()._cdata)
    return storages[0] == storages[1] and one.storage_offset() == other.storage_offset()
