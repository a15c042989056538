"""The modules of a Betty program: their parameters are exchanged for tensors while a problem computes its loss."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm


class Modules(nn.Module):
    """The modules of problems, so that the parameters of any can be exchanged while one computes its loss."""

    def __init__(self, problems: Sequence[Any]) -> None:
        super().__init__()
        for number, problem in enumerate(problems):
            # (Names are for messages; a module's name may hold anything but a dot.)
            name = f"problem {problem.name}".replace(".", "_")
            self.add_module(f"{name} ({number})" if name in self._modules else name, problem.module)

    def forward(self, problem: Any, batch: Any) -> Tensor:
        return loss_of(problem, batch)


def loss_of(problem: Any, batch: Any) -> Tensor:
    """The loss of a problem's training_step, which may return a dict with it."""
    loss = problem.training_step_exec(batch)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else loss


@contextlib.contextmanager
def no_statistics(modules: nn.Module) -> Iterator[None]:
    """Normalization layers in training mode write no running statistics: what they normalize by does not change."""
    writing = [
        layer
        for layer in modules.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats
    ]
    kept = [(layer, layer.running_mean, layer.running_var) for layer in writing if isinstance(layer, _InstanceNorm)]
    for layer in writing:
        layer.track_running_stats = False
    for layer, _, _ in kept:  # which write them all the same
        layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer in writing:
            layer.track_running_stats = True
        for layer, mean, variance in kept:
            layer.running_mean, layer.running_var = mean, variance


def dense(gradient: Tensor) -> Tensor:
    """A gradient without a graph, which embeddings with sparse=True make sparse."""
    return gradient.detach() if gradient.layout is torch.strided else gradient.detach().to_dense()


def as_leaf(leaf: Tensor) -> Tensor:
    """A tensor that requires grad, as parameters do, and is none."""
    return leaf if leaf.requires_grad and not isinstance(leaf, nn.Parameter) else leaf.detach().requires_grad_()


def norm(leaves: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them."""
    return sum(float(leaf.detach().double().square().sum()) for leaf in leaves) ** 0.5


def leaves_behind(value: Tensor) -> Iterator[Tensor]:
    """The leaf tensors behind a tensor's graph."""
    seen, queue = set[object](), [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        queue += [following for following, _ in node.next_functions]
