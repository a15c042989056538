"""Random numbers once more: a rebuilt step draws what the first pass drew.

A generator's state is read where a step may be rebuilt, and kept with what is needed to rebuild it. A state that equals
the one before is shared, so a loss without randomness costs one state in all.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@dataclasses.dataclass(frozen=True)
class State:
    """The generators' states at one moment.

    torch makes them below its dispatcher, where no meter sees them; `carriers` are tensors of the same size that are
    seen. On real tensors they hold the numbers themselves, on fake ones they stand for them.
    """

    numbers: tuple[Tensor, ...]
    carriers: tuple[Tensor, ...] = ()


class Generators:
    """The generators that a loss draws from: the CPU's, and that of the device the variables live on."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def peek(self) -> State:
        """The present state, to go back to soon."""
        with _disable_current_modes():  # a state is real also where tensors are fake
            numbers = (torch.get_rng_state(),)
            return State(numbers if self._cuda is None else (*numbers, torch.cuda.get_rng_state(self._cuda)))

    def state(self, last: State | None = None) -> State:
        """The present state, to be kept; `last` itself if nothing was drawn since."""
        state = self.peek()
        if last is not None and self.same(state, last):
            return last
        carriers = tuple(torch.empty(number.numel(), dtype=torch.uint8) for number in state.numbers)
        if type(carriers[0]) is not Tensor:
            return State(state.numbers, carriers)
        with _disable_current_modes():  # a copy that a forecast does not make is not counted
            return State(tuple(carrier.copy_(number) for carrier, number in zip(carriers, state.numbers, strict=True)))

    @staticmethod
    def same(one: State, other: State) -> bool:
        """Whether nothing was drawn between two states."""
        with _disable_current_modes():
            return all(torch.equal(a, b) for a, b in zip(one.numbers, other.numbers, strict=True))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What is drawn in this block moves no stream."""
        before = self.peek()
        yield
        self.set(before)

    def seed(self, number: int) -> None:
        """Begin anew at a number."""
        torch.default_generator.manual_seed(number)
        if self._cuda is not None:
            torch.cuda.default_generators[self._place].manual_seed(number)

    def advance(self) -> None:
        """Draw a number from each."""
        torch.rand((), device="cpu")
        if self._cuda is not None:
            torch.rand((), device=self._cuda)

    @property
    def _place(self) -> int:
        assert self._cuda is not None
        return torch.cuda.current_device() if self._cuda.index is None else self._cuda.index

    def set(self, state: State) -> None:
        """Go back to a state."""
        with _disable_current_modes():
            torch.set_rng_state(state.numbers[0])
            if self._cuda is not None:
                torch.cuda.set_rng_state(state.numbers[1], self._cuda)
