"""TaskStream: batches of tasks as a loader, the same for the same seed, resumable at any position.

Task n is a function of the seed and of n alone, and batch i holds the tasks i T .. i T + T-1. So a run that goes on at
batch i sees what it would have seen, and the first 600 tasks are the same however many come at once.
"""

import abc
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.data._checks import whole

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


class Drawn(NamedTuple):
    """Tasks: support and query, each with a leading task dimension, and the identity of each task."""

    support: Pair
    query: Pair
    identities: list[str]


class TaskStream(abc.ABC):
    """An iterable of `Batches`: support as inner, query as outer batch, `index` the position, `task_ids` the tasks.

    A loop over it begins at position 0 each time, as a loop over a list does; after `load_state_dict` or `seek`, the
    next one begins there. To train in parts without seeing tasks again, keep one iterator, `batches = iter(stream)`.
    It also has a length (where `steps` is given) and an index, so that a DataLoader with batch_size=None can read it.

    Args:
        tasks: T, tasks in each batch.
        seed: the same one gives the same tasks in every process and on every device.
        steps: batches of a loop; None for no end.
        pool: draw from a fixed collection of so many tasks, in passes, each in a new order, in which none comes twice;
            a pass leaves out what does not fill a batch. None: each task is new.
        device: where the tensors go.

    Raises:
        TypeError: a number is not whole.
        ValueError: a count is smaller than 1, the seed is negative, or `pool` is smaller than `tasks`.
    """

    def __init__(
        self,
        *,
        tasks: int,
        seed: int,
        steps: int | None,
        pool: int | None,
        device: torch.device | str,
    ) -> None:
        name = type(self).__name__
        self.tasks = whole(name, "tasks", tasks)
        self.seed = whole(name, "seed", seed, 0)
        self.steps = None if steps is None else whole(name, "steps", steps, 0)
        self.pool = None if pool is None else whole(name, "pool", pool)
        if self.pool is not None and self.pool < self.tasks:
            raise ValueError(f"{name} was given pool={pool} and tasks={tasks}; a batch needs {tasks} different tasks")
        self.device = torch.device(device)
        self._position = 0
        self._resume: int | None = None
        self._pass: tuple[tuple[int, int], list[int]] | None = None  # the order of the last pass that was asked for

    @abc.abstractmethod
    def draw(self, numbers: list[int]) -> Drawn:
        """The tasks of these numbers, where the data are; a function of the seed and the numbers alone."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the tasks depend on besides the seed, as JSON values: a state of other settings is refused."""

    def numbers(self, position: int) -> list[int]:
        """The numbers of the tasks in a batch."""
        if self.pool is None:
            return list(range(position * self.tasks, (position + 1) * self.tasks))
        turn, batch = divmod(position, self.pool // self.tasks)
        if self._pass is None or self._pass[0] != (turn, self.pool):
            order = self.generator("pass", turn).sample(range(self.pool), self.pool)
            self._pass = (turn, self.pool), order
        order = self._pass[1]
        return order[batch * self.tasks : (batch + 1) * self.tasks]

    def generator(self, *what: object) -> random.Random:
        """Python's generator for one thing: a text seed goes through SHA-512, the same in every version."""
        return random.Random(" ".join(map(str, (type(self).__name__, self.seed, *what))))

    def __getitem__(self, position: int) -> Batches:
        """The batch at a position; as a loop gives it."""
        position = whole(f"{type(self).__name__}[...]", "position", position, 0)
        if self.steps is not None and position >= self.steps:
            raise IndexError(f"there is no batch {position}; {type(self).__name__} has {self.steps}, from 0")
        drawn = self.draw(self.numbers(position))
        support, query = ((pair[0].to(self.device), pair[1].to(self.device)) for pair in (drawn.support, drawn.query))
        return Batches(inner=support, outer=query, index=position, task_ids=drawn.identities)

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: the stream has no end.
        """
        if self.steps is None:
            raise TypeError(f"{type(self).__name__} has no end, and so no length; give it steps=...")
        return self.steps

    def __bool__(self) -> bool:
        return self.steps != 0

    def __iter__(self) -> Iterator[Batches]:
        begin, self._resume = self._resume or 0, None
        self._position = begin
        return self._from(begin)

    def _from(self, position: int) -> Iterator[Batches]:
        while self.steps is None or position < self.steps:
            batches = self[position]
            position += 1
            self._position = position
            yield batches

    @property
    def position(self) -> int:
        """The position of the batch that the last loop would give next."""
        return self._position

    def seek(self, position: int) -> None:
        """Let the next loop begin at this position.

        Raises:
            TypeError: it is not whole.
            ValueError: it is negative or beyond the end.
        """
        position = whole(f"{type(self).__name__}.seek()", "position", position, 0)
        if self.steps is not None and position > self.steps:
            raise ValueError(
                f"{type(self).__name__}.seek() was given position={position}; there are {self.steps} batches"
            )
        self._position = self._resume = position

    def state_dict(self) -> dict[str, Any]:
        """Where the last loop is, and whose state it is: numbers and strings."""
        return {"owner": type(self).__name__, "position": self._position, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop go on where the state was taken.

        Raises:
            TypeError: it is no state.
            ValueError: it is the state of another stream (the message says what differs), or its position is not one.
        """
        name = type(self).__name__
        if not isinstance(state, Mapping) or not {"owner", "position", "settings"} <= set(state):
            raise TypeError(f"{name} was given a state that is none of its own; what its state_dict() gave was needed")
        if state["owner"] != name:
            raise ValueError(f"{name} was given a state of {state['owner']}; a state of its own was needed")
        own, given = self._settings(), state["settings"]
        if differ := [key for key in sorted({*own, *given}) if own.get(key) != given.get(key)]:
            raise ValueError(
                f"{name} was given the state of another {name}: "
                + ", ".join(f"{key} was {given.get(key)!r} and is {own.get(key)!r}" for key in differ)
                + ". Make it as it was then, or use seek(position) if the change is meant"
            )
        self.seek(state["position"])

    def _settings(self) -> dict[str, Any]:
        own = {"seed": self.seed, "tasks": self.tasks, "pool": self.pool, **self.settings()}
        return dict(json.loads(json.dumps(own)))  # as they come back from a file

    def _identity(self, number: int) -> str:
        """Of task `number` of a family."""
        return digest({"owner": type(self).__name__, "seed": self.seed, "number": number, **self.settings()})


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
