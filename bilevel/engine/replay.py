"""Replay of random numbers: a rebuilt step draws what the first pass drew.

A state is read before each step and kept only when it moved, so a loss without randomness costs one state in all.
"""

import torch
from torch.utils._python_dispatch import _disable_current_modes


class Replay:
    """The random states before steps 0, 1, 2, ... of one pass, on the CPU and on the device that the variables live
    on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._states: list[tuple[torch.Tensor, ...]] = []
        self._end: tuple[torch.Tensor, ...] | None = None

    def record(self) -> None:
        """Remember the state before the next step."""
        self._states.append(self._current(self._states[-1] if self._states else None))

    def finish(self) -> None:
        """Remember the state after the last step; `end` goes back to it."""
        self._end = self._current(self._states[-1] if self._states else None)

    def seek(self, step: int) -> None:
        """Go to the state before `step`."""
        self._set(self._states[step])

    def end(self) -> None:
        """Leave the random state as if nothing had been replayed."""
        if self._end is not None:
            self._set(self._end)

    def _current(self, last: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...]:
        state = (
            (torch.get_rng_state(),)
            if self._cuda is None
            else (torch.get_rng_state(), torch.cuda.get_rng_state(self._cuda))
        )
        with _disable_current_modes():  # a state is real also where tensors are fake
            return (
                last if last is not None and all(torch.equal(a, b) for a, b in zip(state, last, strict=True)) else state
            )

    def _set(self, state: tuple[torch.Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[1], self._cuda)
