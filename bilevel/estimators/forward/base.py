"""What forward estimators share: the inner loop with tangents, which move with it and are forgotten with it.

    z_{k+1}, r_{k+1} = derivative of step k along (z_k, r_k, e);    (z_0, r_0) = that of the start along e
    dF/dx e = <df/dx, e> + <df/dy(y_K), z_K>

One tangent more follows a perturbation of the start: what it grows by, rounding errors grow by too, and what is left of
it is what the end remembers of the start.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.eager import Eager
from bilevel.engine.oracles import Oracles
from bilevel.engine.replay import State
from bilevel.engine.step_forward import Linear, Pushed, Tangent, leaves
from bilevel.estimators import paths
from bilevel.estimators.base import Instance, Path, Program
from bilevel.estimators.reverse.growth import Growth
from bilevel.inner.loop import run
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Direction = Callable[[], list[Tensor | None]]
"""A direction of x, made when it is asked for: one tensor for each of x, None where it is zero."""


@dataclasses.dataclass(frozen=True)
class Carried:
    """Where a run goes on from: the dynamics' state, and a tangent per direction."""

    state: Any
    tangents: list[Tangent]


@dataclasses.dataclass(frozen=True)
class Pushforward:
    """What the inner loop with tangents came to.

    `numbers` are <df/dy, z_K>, one per direction, None where nothing arrived; `carried` is where the run could go on.
    """

    found: Solution
    loss: Tensor
    direct: PartialLeaves
    numbers: list[Tensor | None]
    code: Tensor
    stats: dict[str, Any]
    carried: Carried | None


def pushforward(
    instance: Instance, directions: Sequence[Direction], *, chunk: int | None, carried: Carried | None = None
) -> Pushforward:
    """Run the inner loop with a tangent for each direction of x.

    Args:
        instance: what is solved.
        directions: of x.
        chunk: tangents at once: the loop is run once for so many of them. None for all.
        carried: where an earlier run ended, which this one goes on from.
    """
    if instance.solver.dynamics.update is None and instance.oracles.engine.pure:
        instance = dataclasses.replace(instance, engine=Eager().open())  # a third derivative is taken of its steps
    oracles, program = instance.oracles, instance.program()
    start, steps = oracles.start(), program.solver.steps
    if steps and not isinstance(instance.batches.inner, PerStep):
        oracles.embedding(0)  # drawn before the first step, which may run again
    size = max(chunk or len(directions), 1)
    parts = [directions[low : low + size] for low in range(0, len(directions), size)] or [[]]
    numbers, before = list[Tensor | None](), oracles.generators.peek()
    with spans.span(spans.INNER):
        moves = _Carrying(oracles, parts[0], program, carried, watched=True)
        found = moves.run(start, steady=instance.steady)
        found = instance.seen(found, drew=not oracles.generators.same(before, oracles.generators.peek()))
    with spans.span(spans.HYPERGRADIENT):
        loss, slope, direct = oracles.outer_gradient(found.inner)
        after = oracles.generators.peek()
        numbers += moves.numbers(slope)
        for part in parts[1:]:
            oracles.generators.set(before)
            again = _Carrying(oracles, part, program, carried, watched=False)
            again.run(start, steady=instance.steady)
            numbers += again.numbers(slope)
            del again
        oracles.generators.set(after)
    figures = moves.growth.figures()
    forgets = program.code if instance.problem.init is None else None
    return Pushforward(
        program.ended(found),
        loss,
        direct,
        numbers,
        moves.growth.code(forgets=forgets),
        {
            "tangent_growth": figures["cotangent_growth"],
            "tangent_left": figures["cotangent_left"],
            "digits": figures["digits"],
        },
        Carried(moves.state, moves.tangents) if len(parts) == 1 else None,
    )


def acting(instance: Instance) -> list[bool]:
    """For each outer tensor whether it acts through the inner loop; all, where that is not known."""
    taken, count = paths.of(instance), len(tree.tensors(instance.outer))
    return [True] * count if taken is None else [bool(each - {Path.OUTER_LOSS}) for each in taken]


class _Seen:
    """A point of the inner loop: its gradient is the one that the step was made with."""

    def __init__(self, step: int, embedded: Any, drawn: State | None) -> None:
        self.step, self.embedded, self.drawn = step, embedded, drawn
        self.loss: Tensor | None = None
        self.shown: Tensor | None = None
        self.code: Tensor | int = 0
        self.reported = self.vanishing = False
        self.made: Pushed | None = None

    def known(self, made: Pushed) -> None:
        """The step that was made here."""
        self.made, self.loss = made, made.loss
        self.shown, self.reported, self.vanishing, self.code = made.shown, made.reported, made.vanishing, made.code

    def gradient(self, inner: Tree) -> Tree:
        assert self.made is not None, "a step was made"
        return self.made.gradient()


class _Carrying:
    """The oracles as the loop sees them, with tangents.

    Args:
        oracles: of the instance.
        directions: of x.
        program: the steps.
        carried: where an earlier run ended.
        watched: whether a perturbation of the start is followed.
    """

    def __init__(
        self,
        oracles: Oracles,
        directions: Sequence[Direction],
        program: Program,
        carried: Carried | None,
        *,
        watched: bool,
    ) -> None:
        self.space, self.dynamics = oracles.space, oracles.dynamics
        self._oracles, self._directions, self._program, self._carried = oracles, directions, program, carried
        self._embedded: list[Any] | None = None
        self._probe: Tangent | None = None
        self._watched, self._steps = watched, program.solver.steps
        self.growth = Growth(oracles.space, self._steps)
        self.tangents, self.state = list[Tangent](), None

    def run(self, start: Tree, *, steady: bool) -> Solution:
        """The loop; keeps what arrives at its end."""
        found = run(self._program.solver, self, start, self.point, masks=self._program.masks, steady=steady)
        self._embedded = None
        return found

    def begin(self, inner: Tree) -> Any:
        oracles = self._oracles
        xs, none = tree.tensors(oracles.attached), [None] * len(tree.tensors(inner))
        starts = None
        if oracles.problem.init is not None:
            starts = Linear(tree.tensors(oracles.differentiable_start()), xs)
        y = tree.attach(inner)
        with torch.enable_grad():
            state = self.dynamics.init(y, oracles.attached)
        states = Linear(leaves(state), [*tree.tensors(y), *xs])
        self.state = tree.detach(state)

        def begun(z: list[Tensor | None], e: list[Tensor | None]) -> Tangent:
            return Tangent(z, states([*z, *e]))

        if self._watched:
            seed, no, before = torch.Generator(device="cpu").manual_seed(0), [None] * len(xs), oracles.generators.peek()
            z: list[Tensor | None] = [
                torch.randn(leaf.shape, generator=seed, dtype=torch.float64).to(leaf) for leaf in tree.tensors(inner)
            ]
            oracles.generators.set(before)  # (without data, torch draws from the global generator all the same)
            self.growth.enter(self._steps, z)
            self._probe = begun(z, list(no))
        if self._carried is not None:
            self.state, self.tangents = self._carried.state, list(self._carried.tangents)
            return self.state
        for direction in self._directions:
            e = direction()
            self.tangents.append(begun(list(none) if starts is None else starts(e), e))
        return self.state

    def point(self, step: int) -> Any:
        shared = not isinstance(self._oracles.batches.inner, PerStep)
        drawn = None if shared else self._oracles.generators.peek()
        if self._embedded is None or not shared:
            # In a list, because a batch may be anything, None too.
            self._embedded = [self._oracles.differentiable_embedding(step)]
        return _Seen(step, self._embedded[0], drawn)

    def step(self, inner: Tree, state: Any, at: _Seen) -> tuple[Tree, Any]:
        made = self._oracles.step_forward(inner, state, at.step, at.embedded, at.drawn)
        at.known(made)
        self.state = made.state
        live = None if self._program.masks is None else self._program.masks[at.step]
        with spans.span(spans.HYPERGRADIENT):
            for i, direction in enumerate(self._directions):
                self.tangents[i] = self._moved(made, self.tangents[i], direction(), live, at.step)
            if self._probe is not None:
                no = [None] * len(tree.tensors(self._oracles.attached))
                self._probe = self._moved(made, self._probe, list(no), live, at.step)
                left = self._steps - at.step - 1
                if self.growth.wanted(left):
                    self.growth.look(left, self._probe.inner)
        return made.moved, made.state

    def _moved(
        self, made: Pushed, tangent: Tangent, outer: list[Tensor | None], live: Tensor | None, step: int
    ) -> Tangent:
        pushed = made.push(tangent, outer)
        if live is None:
            return pushed
        # (As the loop does it: a state that only appears at the first step is every task's.)
        inner = self._where(live, pushed.inner, tangent.inner)
        return Tangent(inner, pushed.state if step == 0 else self._where(live, pushed.state, tangent.state))

    def _where(self, live: Tensor, new: list[Tensor | None], old: list[Tensor | None]) -> list[Tensor | None]:
        def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            known = b if a is None else a
            if known is None or known.dim() == 0:
                return a
            zero = torch.zeros_like(known)
            return torch.where(self.space.per_task(live, known), zero if a is None else a, zero if b is None else b)

        return [choose(a, b) for a, b in zip(new, old, strict=True)]

    def stationarity(self, inner: Tree, at: Any) -> list[Tensor]:
        raise AssertionError("a fixed number of steps does not ask")

    def numbers(self, slope: Leaves) -> list[Tensor | None]:
        """<df/dy, z> of each tangent; None where it is zero throughout."""
        return [self._number(tangent.inner, slope) for tangent in self.tangents]

    def _number(self, z: list[Tensor | None], slope: Leaves) -> Tensor | None:
        pairs = [(a, b) for a, b in zip(z, slope, strict=True) if a is not None]
        return self.space.dot([a for a, _ in pairs], [b for _, b in pairs]).sum() if pairs else None
