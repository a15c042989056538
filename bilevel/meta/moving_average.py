"""The hypergradient of one task at its personal model: what `MOML` and `LocalMOML` do with one task, or client.

    u <- (1 - b) u + b y_K;    D = (dy_K/dx)' df/dy(u)  ("paper"),    b (dy_0/dx)' df/dy(u)  ("released")

The table of costs is that of `bilevel.meta.moml`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance, Path
from bilevel.estimators.reverse.checkpoints import Checkpoints
from bilevel.estimators.reverse.plans import Segments
from bilevel.estimators.reverse.tape import Tape
from bilevel.estimators.reverse.terms import Terms
from bilevel.estimators.state import State, per_task
from bilevel.inner.descent import Descent
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_FORMS = ("paper", "released", "plain")


def check_blend(owner: str, blend: Any, form: Any) -> None:
    """Raise ValueError unless these are a weight and one of the forms."""
    if not isinstance(blend, (int, float)) or isinstance(blend, bool) or not 0 < blend <= 1:
        raise ValueError(f"{owner} was given blend={blend!r}; a number above 0 and at most 1 was needed")
    if form not in _FORMS:
        raise ValueError(f"{owner} was given form={form!r}; one of {', '.join(map(repr, _FORMS))} was needed")


@dataclasses.dataclass(frozen=True)
class Personal(State):
    """The personal model of a task, and whether it has one yet."""

    inner: Tree = per_task()
    known: Tensor = per_task()


@dataclasses.dataclass(frozen=True)
class MovingAverage(Estimator):
    """The hypergradient of one task at its personal model, which moves by a part of an adaptation.

    Args:
        blend: as for `MOML`.
        form: likewise.
        stretch: n / B of the variant in which all tasks move; None for the other.
    """

    blend: float
    form: str
    stretch: float | None = None

    sees = EVERYWHERE

    def sees_after(self, steps: int) -> frozenset[Path]:
        return EVERYWHERE if self.form == "paper" else frozenset({Path.START, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "linear" if self.form == "paper" else "constant"

    @property
    def bias(self) -> str:
        late = "taken at a moving average of adaptations"
        return late if self.form == "paper" else f"of first order, and {late}"

    def init_state(self, instance: Instance) -> Personal:
        start = instance.oracles.start()
        shape = () if instance.tasks is None else (instance.tasks,)
        return Personal(start, torch.zeros(shape, dtype=torch.bool, device=tree.tensors(start)[0].device))

    def estimate(self, instance: Instance, state: Personal | None) -> Estimate:
        _check_solver(instance)
        oracles = instance.oracles
        if self.form == "paper":
            return self._of_second_order(instance, state)
        found = instance.solve()
        u = self._blended(instance, found.inner, state)
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, slope, direct = oracles.outer_gradient(u)
            grad = tree.accumulate(direct, self._scaled(oracles.start_vjp(slope)))
            return self._finished(instance, found, u, grad, outer_loss)

    def _of_second_order(self, instance: Instance, state: Personal | None) -> Estimate:
        """The steps are pulled back as in Unrolled, with another cotangent: df/dy at u."""
        oracles, program = instance.oracles, Descent(instance.solver.dynamics, instance.solver.max_steps)
        terms = _AtModel(oracles, program.steps, lambda adapted: self._blended(instance, adapted, state))
        forward = (
            Tape(instance, program, 0, None, terms)
            if instance.batches.curvature is None
            else Checkpoints(instance, program, Segments((0,)), None, terms, resampled=True)
        )
        with spans.span(spans.HYPERGRADIENT):
            indirect, growth = forward.pull(to_start=False)
            grad = tree.accumulate(terms.direct, indirect)
            assert terms.model is not None, "the end of the steps was met"
            more = {"codes": [growth.code(forgets=None)], "stats": growth.figures()}
            return self._finished(instance, forward.solution, terms.model, grad, terms.loss, **more)

    def _finished(
        self, instance: Instance, found: Solution, u: Tree, grad: PartialLeaves, outer_loss: Tensor, **more: Any
    ) -> Estimate:
        last_loss = instance.oracles.inner_loss(found.inner, found.steps)
        codes = [instance.health(found, found.inner, last_loss), *more.pop("codes", ())]
        return instance.finish(
            dataclasses.replace(found, first_loss=None, promised=None),  # of the adaptation, which is not at u
            grad,
            outer_loss,
            inner=u,
            codes=codes,
            state=Personal(u, torch.ones_like(outer_loss, dtype=torch.bool)),
            **more,
        )

    def _scaled(self, leaves: PartialLeaves) -> PartialLeaves:
        if self.form == "plain":
            return leaves
        return tuple(None if leaf is None else self.blend * leaf for leaf in leaves)

    def _blended(self, instance: Instance, adapted: Tree, state: Personal | None) -> Tree:
        """(1 - b) u + b y, where u is y for a task that is new."""
        space, b = instance.oracles.space, self.blend
        ys = tree.tensors(adapted)
        if state is None:
            us = ys
        else:
            us = [
                torch.where(space.per_task(state.known, y), u, y)
                for u, y in zip(tree.tensors(state.inner), ys, strict=True)
            ]
        if self.stretch is not None:
            starts = tree.tensors(instance.oracles.start())
            ys = [w + self.stretch * (y - w) for w, y in zip(starts, ys, strict=True)]
        return tree.like(adapted, [(1 - b) * u + b * y for u, y in zip(us, ys, strict=True)])


class _AtModel(Terms):
    """The outer loss at the personal model that belongs to the end of the steps, in the place of that end."""

    def __init__(self, oracles: Oracles, steps: int, model_of: Callable[[Tree], Tree]) -> None:
        super().__init__(oracles, None, steps, 0)
        self._model_of = model_of
        self.model: Tree | None = None

    def enter(self, step: int, inner: Tree) -> list[Tensor | None]:
        """Add f at u; returns df/dy there."""
        self.model = self._model_of(inner)
        return super().enter(step, self.model)


def _check_solver(instance: Instance) -> None:
    """Raise ValueError unless the steps are a fixed number, and can be differentiated on the batches of Hessians."""
    solver, curvature = instance.solver, instance.batches.curvature
    if not solver.fixed:
        raise ValueError(
            f"MOML was given {type(solver).__name__}; it averages the ends of a fixed number of steps: write "
            f"Descent(bilevel.SGD(lr=0.1), steps=1)"
        )
    if curvature is not None and solver.dynamics.update is None:
        raise ValueError(
            f"MOML was given Batches.curvature and a {type(solver.dynamics).__name__}; an inner optimizer was needed, "
            f"whose step takes one gradient of the inner loss. Leave curvature out"
        )
    if isinstance(curvature, PerStep) and len(curvature) < max(solver.max_steps, 1):
        raise ValueError(
            f"Batches.curvature holds {len(curvature)} batches and the inner solver takes {solver.max_steps} steps; "
            f"one batch a step was needed"
        )
