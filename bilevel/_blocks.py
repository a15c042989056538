"""Which layers of a module are rematerialized blocks, and how they run as such."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bilevel._layout import Layout, made_tensors
from bilevel.engine.captures import refuse
from bilevel.engine.rematerialize import rematerialized

Blocks = type[nn.Module] | tuple[type[nn.Module], ...] | list[type[nn.Module]] | Callable[[nn.Module], bool]
"""A class of modules, several, or a function of a module that says yes or no."""


def chosen(module: nn.Module, which: Blocks) -> list[tuple[str, nn.Module]]:
    """The layers that `which` says, with their names.

    Raises:
        TypeError: `which` is none of what it may be.
        ValueError: it says none, or one that cannot be a block.
    """
    kinds = tuple(which) if isinstance(which, (list, tuple)) else (which,)
    if all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds) and kinds:
        found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]  # type: ignore[arg-type]
    elif callable(which) and not isinstance(which, (type, nn.Module)):
        found = [(name, layer) for name, layer in module.named_modules() if which(layer)]
    else:
        raise TypeError(
            f"functional() was given rematerialize={which!r}; a class of modules, several of them, or a function of a "
            f"module was needed"
        )
    if not found:
        have = sorted({type(layer).__name__ for layer in module.modules()})
        raise ValueError(f"functional()'s rematerialize=... said none of the module's layers, which are of {have}")
    for name, layer in found:
        if type(layer).forward is nn.Module.forward and "forward" not in vars(layer):
            raise ValueError(
                f"functional()'s rematerialize=... said {type(layer).__name__} {name!r}, which has no forward of its "
                f"own; say the layers in it"
            )
        refuse(layer)
    return found


class Rematerialized:
    """A layout whose holding() also makes blocks of some layers.

    Args:
        layout: of the whole module.
        blocks: layers of it, with their names.
        offload: whether their inputs wait on the host.
    """

    def __init__(self, layout: Layout, blocks: list[tuple[str, nn.Module]], *, offload: bool = False) -> None:
        self._layout, self.offload = layout, offload
        self._blocks = [(name, block, _places(block)) for name, block in blocks]

    @contextmanager
    def holding(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors into their places, and blocks in the place of forwards, and take back whatever happens inside."""
        before = [vars(block).get("forward") for _, block, _ in self._blocks]
        with self._layout.holding(params):
            try:
                for (name, block, places), own in zip(self._blocks, before, strict=True):
                    forward = own.forward if isinstance(own, _Block) else own or MethodType(type(block).forward, block)
                    vars(block)["forward"] = _Block(self, params, name, block, places, forward)
                yield
            finally:
                for (_, block, _), own in zip(self._blocks, before, strict=True):
                    if own is None:
                        vars(block).pop("forward", None)
                    else:
                        vars(block)["forward"] = own


def _places(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the block's parameters and buffers stand; those it made of them are found at its call."""
    stores = [store for layer in block.modules() for store in (layer._parameters, layer._buffers)]
    return [(store, key) for store in stores for key, tensor in store.items() if tensor is not None]


class _Block:
    """The forward of a block with the parameters of one call of the module."""

    def __init__(
        self,
        owner: Rematerialized,
        params: Mapping[str, Tensor],
        name: str,
        block: nn.Module,
        places: list[tuple[dict[str, Any], str]],
        forward: Callable[..., Any],
    ) -> None:
        self._owner, self._params, self._block, self._places, self.forward = owner, params, block, places, forward
        self.__name__ = f"{type(block).__name__} {name}".strip()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **keywords)
        # What a hook of the block made of its parameters before this forward, as old weight_norm does.
        made = [
            (vars(self._block), key) for key, value in made_tensors(self._block).items() if isinstance(value, Tensor)
        ]
        places = [*self._places, *made]
        run = functools.partial(self._run, places)
        functools.update_wrapper(run, self, assigned=("__name__",), updated=())
        vars(run)["identity"] = self._block  # what stays the same from call to call
        held = [store[key] for store, key in places]
        return rematerialized(run, (held, inputs, keywords), {}, offload=self._owner.offload)

    def _run(self, places: list[tuple[dict[str, Any], str]], held: list[Any], inputs: Any, keywords: Any) -> Any:
        before = [store[key] for store, key in places]
        try:
            # The whole module again: a block may use what is not its own, and has blocks in it.
            with self._owner.holding(self._params):
                for (store, key), tensor in zip(places, held, strict=True):
                    store[key] = tensor
                return self.forward(*inputs, **keywords)
        finally:
            for (store, key), tensor in zip(places, before, strict=True):
                store[key] = tensor
