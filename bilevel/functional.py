"""functional(module): an nn.Module as a pure function of its parameters.

Not torch.func.functional_call: where a module stands in two places that one puts tensors into the same place twice, and
so takes back at the end what it had put there itself: the module is left with plain tensors for parameters. Here each
place is known once, whatever names lead to it, and all are found when `functional` is called, not at every forward.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bilevel import checkpointing

Trainable = bool | str | Collection[str] | Callable[[str], bool]


def functional(
    module: nn.Module, *, trainable: Trainable | None = None, requires_grad: bool | None = None
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Split a module into a function and its parameters.

    Args:
        module: any module whose forward writes no buffer. It may use one layer or one parameter in several places.
        trainable: which parameters go into `params`; the others stay fixed at the module's own values, as buffers do.
            None: those that require grad. True: all of them. Names and prefixes of names, such as `["head"]` for
            "head.weight" and "head.bias". A function of the name that says yes or no.
        requires_grad: whether `params` require grad, as the leaves of an outer variable must, which a torch.optim
            optimizer holds. None: True where `trainable` is given. The library takes either kind as inner variable; in
            a loop of your own False spares the graph.

    Returns:
        `(call, params)`. `call(params, *inputs, **keywords)` runs the module with these parameters; it works under
        vmap. `params` maps names to leaves that share the storage of the module's parameters. A parameter with several
        names (tied weights, a shared layer) is there once, under the first, and its gradient is the sum over its uses.
        The module keeps its own parameters, their flags and their gradients.

    As outer variable, `params` is what the optimizer steps move in place, so the module has each new value at once. An
    inner variable is never changed in place; what was adapted goes back into the module by
    `module.load_state_dict(hg.inner, strict=False)`, which writes the tied ones in all their places and leaves the
    fixed ones and the buffers as they are (`params` shares the storage, so it then holds the adapted values as well).

    Raises:
        ValueError: here, when a normalization layer is in a mode that writes its running statistics, when an embedding
            has max_norm or scale_grad_by_freq, when `trainable` matches nothing, when parameters do not have a shape
            yet, or when the module is wrapped by DataParallel, DistributedDataParallel or torch.jit; in `call`, when a
            parameter is missing or unknown, when the forward changed a buffer, when a layer runs inside
            torch.utils.checkpoint, or when the module has backward hooks and is mapped by vmap, which does not run
            them.
        TypeError: `module` is no nn.Module, or `trainable` is none of the above.

    Example:
        >>> import torch, bilevel as bl
        >>> call, params = bl.functional(torch.nn.Linear(3, 2))
        >>> call(params, torch.ones(4, 3)).shape
        torch.Size([4, 2])

        The head as inner variable, the body as outer variable, and the adapted head back into the module:

        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> call, head = bl.functional(net, trainable="2", requires_grad=False)
        >>> body = bl.functional(net, trainable="0")[1]
        >>> def loss(inner, outer, batch):
        ...     return call({**inner, **outer}, batch).pow(2).mean()
        >>> step, = bl.iterate(bl.Problem(loss, loss), body, head, [bl.Batches(torch.ones(5, 3), torch.ones(5, 3))],
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=3), estimator=bl.Unrolled(),
        ...     optimizer=torch.optim.Adam(body.values(), lr=0.01))
        >>> net.load_state_dict(step.hypergradient.inner, strict=False).unexpected_keys
        []
    """
    _refuse(module)
    layout = _Layout(module)
    names = layout.selected(trainable)
    leaves = trainable is not None if requires_grad is None else requires_grad
    params = {name: layout.parameters[name].detach() for name in names}
    if leaves:
        for name, parameter in params.items():
            if not parameter.is_floating_point() and not parameter.is_complex():
                raise ValueError(
                    f"functional() was asked for the parameter {name!r} of dtype {parameter.dtype}, which has no "
                    f"gradient; leave it out of trainable=..."
                )
            parameter.requires_grad_()
    wanted = frozenset(names)

    def call(params: dict[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        layout.check_unchanged()
        _refuse_running_statistics(layout.norms)
        if parametrize._cache_enabled and layout.parametrized:
            raise ValueError(
                "the module has parametrizations and was called inside parametrize.cached(), which would hold the "
                "first parameters it sees for all later calls; leave the cached() block"
            )
        if params.keys() != wanted:
            layout.check_names(params, wanted)
        if layout.hooked_backward() and torch._C._functorch.maybe_current_level() is not None:
            raise ValueError(
                "the module has backward hooks, which torch.func.vmap does not run; remove them, or take one task "
                "after another."
            )
        buffers = layout.buffers()
        versions = [buffer._version for buffer in buffers.values()]
        with layout.holding(params), checkpointing.refused():
            output = module(*inputs, **keywords)
        changed = [
            name
            for (name, buffer), version in zip(buffers.items(), versions, strict=True)
            if buffer._version != version
        ]
        if changed:
            raise ValueError(
                f"the module wrote its buffers {changed} in its forward; an inner loop needs a pure function of the "
                f"parameters. Switch the layer to a mode that does not write (module.eval(), or "
                f"track_running_stats=False)"
            )
        return output

    return call, params


class _Layout:
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
        kept = [(vars(layer), _made_tensors(layer)) for layer in self.keepers]
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


def _made_tensors(layer: nn.Module) -> dict[str, Any]:
    # Weights as old weight_norm computes them before a forward; the list of its weights in a recurrent layer.
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) or name in ("_flat_weights", "_flat_weight_refs")
    }


def _refuse(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional() was given a {type(module).__name__}; a torch.nn.Module was needed")
    for name, layer in module.named_modules():
        where = f"{type(layer).__name__} {name or '(the module itself)'}"
        if isinstance(layer, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"{where} runs copies of its module on other devices; write functional(module.module)")
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(f"{where} is compiled by torch.jit, which fixes its parameters; use the nn.Module")
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            _refuse_embedding(where, layer)
        tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        for key, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(
                    f"{where} has no shape for {key!r} yet; run the module once on a batch, module(batch), before "
                    f"functional(module)"
                )
            if tensor.is_inference():
                raise ValueError(
                    f"{where} was made under torch.inference_mode(), so {key!r} can have no gradient; make the module "
                    f"outside it"
                )
    _refuse_running_statistics(list(module.named_modules()))


def _refuse_embedding(where: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    if layer.max_norm is not None:
        raise ValueError(
            f"{where} has max_norm={layer.max_norm}, with which every forward writes its weight. Build it without, and "
            f"divide the rows that were found by their norms where they are longer"
        )
    if layer.scale_grad_by_freq:
        raise ValueError(
            f"{where} has scale_grad_by_freq=True, with which its gradient is not the derivative of the loss; torch "
            f"differentiates it as if it were. Build it without"
        )


def _refuse_running_statistics(layers: Sequence[tuple[str, nn.Module]]) -> None:
    for name, layer in layers:
        if (
            isinstance(layer, nn.modules.batchnorm._NormBase)
            and layer.track_running_stats
            and layer.training
            and layer.running_mean is not None
        ):
            raise ValueError(
                f"{type(layer).__name__} {name or '(the module itself)'} is in training mode with "
                f"track_running_stats=True: every forward of the inner loop would write its running statistics. Build "
                f"it with track_running_stats=False (batch statistics, the usual choice in meta-learning), or call "
                f"module.eval() first (running statistics, held fixed), or use GroupNorm"
            )
