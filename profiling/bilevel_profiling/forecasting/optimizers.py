"""Optimizers that a forecast function steps, put back: a step on tensors without data leaves a state without data, and
every later step would do nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Give optimizers over real tensors that step inside the block their state, and their groups' settings, back.

    Their real tensors are not written to on the way, so the containers are all that is kept.
    """
    saved: dict[int, tuple[torch.optim.Optimizer, Any, list[dict[str, Any]]]] = {}

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        tensors = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        if id(optimizer) not in saved and not any(isinstance(leaf, FakeTensor) for leaf in tensors):
            state = {key: _pytree.tree_map(lambda leaf: leaf, value) for key, value in optimizer.state.items()}
            saved[id(optimizer)] = optimizer, state, [dict(group) for group in optimizer.param_groups]

    hook = register_optimizer_step_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
        for optimizer, state, groups in saved.values():
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, known in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(known)
