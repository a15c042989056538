"""batch_statistics(module): BatchNorm by the statistics of the batch at hand, as meta-learning means it.

A BatchNorm layer that keeps running statistics writes them at every forward, so an inner loop is no function of its
parameters, and `functional` refuses it. Here each forward normalizes by the mean and variance of its own batch alone:
under `TaskMean` by those of its task, since vmap shows the layer one task at a time, however many are in a chunk.

The query batch is normalized by its own statistics too, so predictions depend on which queries come together (the
"transductive" setting, which the reported numbers of most few-shot methods are of).
"""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

_PLAIN = {_BatchNorm.forward, _InstanceNorm.forward}


def batch_statistics(module: nn.Module) -> nn.Module:
    """A copy of a module whose normalization layers use the statistics of the batch at hand, in training and eval mode.

    Parameters keep their names and values, layers their hooks and their place; the running statistics are gone. So the
    state_dict of the copy is that of the module without `running_mean`, `running_var` and `num_batches_tracked`:
    between the two, load with strict=False.

    BatchNorm1d, 2d and 3d and InstanceNorm1d, 2d and 3d are handled; layers without running statistics (LayerNorm,
    GroupNorm, ...) stay as they are.

    Args:
        module: any module; it is not changed.

    Returns:
        A deep copy, of the same class.

    Raises:
        TypeError: `module` is no nn.Module.
        ValueError: a layer is a SyncBatchNorm (whose statistics span processes), has no shape yet (lazy), or is a
            BatchNorm with a forward of its own.

    Example:
        >>> import torch, bilevel as bl
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> call, params = bl.functional(batch_statistics(net))
        >>> call(params, torch.randn(64, 3)).mean(0).abs().max() < 1e-6, sorted(params)
        (tensor(True), ['0.bias', '0.weight', '1.bias', '1.weight'])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"batch_statistics() was given a {type(module).__name__}; a torch.nn.Module was needed")
    for name, layer in module.named_modules():
        _check(f"{type(layer).__name__} {name or '(the module itself)'}", layer)
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        if isinstance(layer, _NormBase):
            # Without them torch normalizes by the batch in either mode, and its forward writes nothing.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return copied


def _check(where: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.SyncBatchNorm):
        raise ValueError(
            f"{where} takes its statistics over processes, and so over tasks; build the module with nn.BatchNorm2d"
        )
    if any(is_lazy(tensor) for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]):
        raise ValueError(f"{where} has no shape yet; run the module once on a batch before batch_statistics(module)")
    if isinstance(layer, _NormBase) and type(layer).forward not in _PLAIN:
        raise ValueError(
            f"{where} is a normalization layer with a forward of its own, which may use running statistics in another "
            f"way; use torch's own layer, or set its track_running_stats=False yourself"
        )
