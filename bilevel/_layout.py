"""Where the parameters and buffers of a module stand, and how others are put there for a while."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

Trainable = bool | str | Collection[str] | Callable[[str], bool]


class Layout:
    """Where a module's parameters and buffers stand, and under which names."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = list(module.named_modules())
        self.norms = [
            (name, layer) for name, layer in self.modules if isinstance(layer, nn.modules.batchnorm._NormBase)
        ]
        self.parameters = dict(module.named_parameters())
        """Each once, under its first name."""
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        self.canonical = {
            name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        """Every name of a parameter, and the first of the same parameter."""
        # A place is a dict of a layer and a key in it; a layer that stands twice in the module is one owner.
        self.places = [
            (layer._parameters, key, first[id(parameter)])
            for _, layer in self.modules
            for key, parameter in layer._parameters.items()
            if parameter is not None
        ]
        self.buffer_places = [
            (layer._buffers, key, f"{name}.{key}" if name else key)
            for name, layer in self.modules
            for key, buffer in layer._buffers.items()
            if buffer is not None
        ]
        self.entries = sum(len(layer._parameters) for _, layer in self.modules)
        self.parametrized = any(parametrize.is_parametrized(layer) for _, layer in self.modules)
        # Layers that keep tensors they made of their parameters: they would keep those of a call, with its graph.
        self.keepers = [layer for _, layer in self.modules if isinstance(layer, nn.RNNBase) or layer._forward_pre_hooks]

    def buffers(self) -> dict[str, Tensor]:
        """The buffers as they are now: Module.to puts others in their places."""
        return {name: buffer for owner, key, name in self.buffer_places if (buffer := owner[key]) is not None}

    def hooked_backward(self) -> bool:
        """Whether a layer has a hook that may change gradients."""
        return any(layer._backward_hooks or layer._backward_pre_hooks for _, layer in self.modules)

    def selected(self, trainable: Trainable | None) -> list[str]:
        """The first names of the parameters that `trainable` says, in the module's order."""
        if trainable is None:
            return [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        if trainable is True:
            return list(self.parameters)
        names: set[str]
        if callable(trainable):
            names = {first for name, first in self.canonical.items() if trainable(name)}
            if not names:
                raise ValueError(
                    f"functional()'s trainable=... said yes to none of the parameters {list(self.canonical)}"
                )
            return [name for name in self.parameters if name in names]
        entries = [trainable] if isinstance(trainable, str) else trainable
        if (
            isinstance(entries, (bool, Mapping))
            or not isinstance(entries, Collection)
            or not all(isinstance(entry, str) for entry in entries)
        ):
            raise TypeError(
                f"functional() was given trainable={trainable!r}; True, names such as ['head', 'body.0.weight'] or a "
                f"function of the name was needed"
            )
        names = set()
        for entry in entries:
            prefix = entry.rstrip(".") + "."
            matched = {first for name, first in self.canonical.items() if name == entry or name.startswith(prefix)}
            if not matched:
                raise ValueError(
                    f"functional() was given {entry!r} in trainable=..., which is no parameter of the module and no "
                    f"prefix of one up to a dot; it has {list(self.canonical)}"
                )
            names |= matched
        return [name for name in self.parameters if name in names]

    def check_unchanged(self) -> None:
        """Raise ValueError if layers or parameters were added, replaced or taken away since."""
        now = list(self.module.modules())
        if (
            len(now) != len(self.modules)
            or any(a is not b for a, (_, b) in zip(now, self.modules, strict=True))
            or sum(len(layer._parameters) for layer in now) != self.entries
            or any(key not in owner for owner, key, _ in (*self.places, *self.buffer_places))
        ):
            raise ValueError(
                "the module's layers or parameters were changed after functional(module); call functional again for "
                "the new ones"
            )

    def check_names(self, params: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        """Raise ValueError unless `params` has all wanted ones and nothing that the module does not have."""
        buffers = {name for name, _ in self.module.named_buffers(remove_duplicate=False)}
        unknown = [name for name in params if name not in self.canonical and name not in buffers]
        if unknown:
            raise ValueError(
                f"call() was given {unknown}, which are no parameters of the module; it has {list(self.canonical)}"
            )
        given = {self.canonical.get(name, name) for name in params}
        missing = [name for name in self.parameters if name in wanted and name not in given]
        if missing:
            raise ValueError(
                f"call() was not given the parameters {missing}; pass all that functional() returned, or leave them "
                f"fixed by functional(module, trainable=...)"
            )
        for name, value in params.items():
            if params.get(self.canonical.get(name, name), value) is not value:
                raise ValueError(
                    f"call() was given two tensors for one parameter, {self.canonical[name]!r} and {name!r}; give one"
                )

    @contextmanager
    def holding(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors into their places, and take back whatever happens inside."""
        values = {self.canonical.get(name, name): tensor for name, tensor in params.items()}
        before = [(owner, key, owner[key]) for owner, key, _ in (*self.places, *self.buffer_places)]
        kept = [(vars(layer), made_tensors(layer)) for layer in self.keepers]
        try:
            for owner, key, name in self.places:
                own = owner[key]
                if name in values:
                    owner[key] = values[name]
                elif own is not None and own.requires_grad:
                    owner[key] = own.detach()
            for buffers, key, name in self.buffer_places:
                if name in values:
                    buffers[key] = values[name]
            yield
        finally:
            for store, key, tensor in before:
                store[key] = tensor
            for attributes, made in kept:
                attributes.update(made)


def made_tensors(layer: nn.Module) -> dict[str, Any]:
    """Weights as old weight_norm computes them before a forward; the list of its weights in a recurrent layer."""
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) or name in ("_flat_weights", "_flat_weight_refs")
    }
