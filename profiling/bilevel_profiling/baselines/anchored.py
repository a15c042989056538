"""A proximal problem for those who call its losses one by one."""

import dataclasses
from typing import Any

import torch

import bilevel as bl


def anchored(problem: bl.Problem, batches: bl.Batches) -> bl.Problem:
    """The same problem, its proximal term (if it has one) pulling to the start that the inner loop had: init at the
    first batch, with the random numbers that it drew there, at whatever batch the loss is called.

    The library's oracles do this themselves.
    """
    loss: Any = problem.inner_loss
    if problem.init is None or getattr(loss, "init", None) is not problem.init:
        return problem
    start = _Start(problem.init, batches.inner_at(0))
    return dataclasses.replace(problem, inner_loss=dataclasses.replace(loss, init=start), init=start)


class _Start:
    """init at one batch, with the same random numbers each time."""

    def __init__(self, init: Any, batch: Any) -> None:
        self._init, self._batch, self._before = init, batch, None

    def __call__(self, outer: Any, batch: Any) -> Any:
        if self._before is None:
            self._before = _states()
            return self._init(outer, self._batch)
        now = _states()
        _set(self._before)
        try:
            return self._init(outer, self._batch)
        finally:
            _set(now)


def _states() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _set(states: Any) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
