"""functional(module): an nn.Module as a pure function of its parameters.

Not torch.func.functional_call: where a module stands in two places that one puts tensors into the same place twice, and
so takes back at the end what it had put there itself: the module is left with plain tensors for parameters. Here each
place is known once, whatever names lead to it, and all are found when `functional` is called, not at every forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bilevel import checkpointing
from bilevel._blocks import Blocks, Rematerialized, chosen
from bilevel._layout import Layout, Trainable


def functional(
    module: nn.Module,
    *,
    trainable: Trainable | None = None,
    requires_grad: bool | None = None,
    rematerialize: Blocks | None = None,
    offload: bool = False,
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
        rematerialize: which layers keep nothing but their inputs, in the forward, in the backward and in the double
            backward, and are computed again instead: a class of layers such as `Block`, several classes, or a function
            of a layer that says yes or no. Layers in each other may both be meant. See `bilevel.rematerialize`.
        offload: whether the inputs that such layers keep wait on the host, on CUDA. See `bilevel.rematerialize`, too.

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
            has max_norm or scale_grad_by_freq, when `trainable` matches nothing, when `offload` is given without
            `rematerialize`, when parameters do not have a shape yet, or when the module is wrapped by DataParallel,
            DistributedDataParallel or torch.jit; in `call`, when a parameter is missing or unknown, when the forward
            changed a buffer, when a layer runs inside torch.utils.checkpoint, or when the module has backward hooks and
            is mapped by vmap, which does not run them.
        TypeError: `module` is no nn.Module, `trainable` is none of the above, or `offload` is no bool.

    Example:
        >>> import torch, bilevel as bl
        >>> call, params = bl.functional(torch.nn.Linear(3, 2))
        >>> call(params, torch.ones(4, 3)).shape
        torch.Size([4, 2])

        With blocks that keep their inputs alone:

        >>> blocks = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in "ab"])
        >>> call, params = bl.functional(blocks, rematerialize=lambda layer: layer in list(blocks))

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
    if not isinstance(offload, bool):
        raise TypeError(f"functional() was given offload={offload!r}; True or False was needed")
    if offload and rematerialize is None:
        raise ValueError(
            "functional() was given offload=True without rematerialize; it is the inputs of rematerialized blocks that "
            "leave the device. Write functional(module, rematerialize=Block, offload=True)"
        )
    layout = Layout(module)
    held = layout if rematerialize is None else Rematerialized(layout, chosen(module, rematerialize), offload=offload)
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
        with held.holding(params), checkpointing.refused():
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
