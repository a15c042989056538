"""Whether one process makes an estimate or several make it together, and then how none is left waiting."""

import contextlib
from typing import Protocol, TypeVar

from bilevel.space.tree import Tree

Value = TypeVar("Value")


class Company(Protocol):
    """The processes that make an estimate."""

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """A block before the estimate (checks, reading data): an exception in it is raised in all processes.

        They learn of it at their next estimate, where they meet.
        """

    def ended(self) -> None:
        """Call it where a loop ends because its data do: raises in all processes if others go on."""

    def gathered(self, value: Value, outer: Tree) -> list[Value]:
        """What all have for a small picklable value, in their order; `outer` must be the same for all."""


class Alone:
    """One process."""

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ended(self) -> None:
        pass

    def gathered(self, value: Value, outer: Tree) -> list[Value]:
        return [value]


ALONE = Alone()
