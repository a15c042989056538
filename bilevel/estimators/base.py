"""The contract of an estimator, what it is given, and the one way in which it ends."""

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.batches import Batches, PerStep
from bilevel.engine import spans
from bilevel.engine.again import facing
from bilevel.engine.base import Derivatives
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.refusals import restless
from bilevel.estimators.company import ALONE, Company
from bilevel.estimators.known import Known
from bilevel.estimators.state import State, checked
from bilevel.inner.base import InnerSolver
from bilevel.inner.descent import Descent
from bilevel.inner.loop import Ended, Moving, Visit, run
from bilevel.linear.base import LinearSolver
from bilevel.outcome import Solution, Status, code_if, worst
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.tree import PartialLeaves, Tree

_GAINED, _NOTABLE = 0.05, 0.05
"""Of what the last gradient step promised, the least that must come true, where it promised this part of the loss."""


class Path(enum.Enum):
    """How an outer tensor acts. The value names the path in messages."""

    INNER_LOSS = "the inner loss"
    OUTER_LOSS = "the outer loss"
    START = "the start of the inner loop (Problem.init)"
    HYPERPARAMETER = "a hyper-parameter of the inner optimizer"
    STATIONARITY = "a term that the inner optimizer adds to the inner gradient (weight decay)"


@dataclasses.dataclass(frozen=True)
class Instance:
    """One bilevel problem with its data: what `hypergradient` was given, checked and detached.

    `posed` is the problem and the outer batch whose outer loss the dynamics sees, where an estimator has put another
    one in the place of f. `constant` are the outer tensors, by position, that nobody differentiates in, and `known` is
    what `solve` found before.
    """

    problem: Problem
    outer: Tree
    inner: Tree | None
    batches: Batches
    solver: InnerSolver
    tasks: int | None = None
    engine: Derivatives | None = None
    posed: tuple[Problem, Any] | None = None
    constant: frozenset[int] = frozenset()
    known: Known | None = None
    ranks: Ranks | None = None

    @functools.cached_property
    def oracles(self) -> Oracles:
        """The oracles of this instance: made once, the only door to derivatives."""
        return Oracles(
            self.problem,
            self.outer,
            self.inner,
            self.batches,
            self.solver.dynamics,
            tasks=self.tasks,
            engine=self.engine,
            posed=self.posed,
            constant=self.constant,
            ranks=self.ranks,
        )

    def facing(self, outer: Any, known: Known | None, engine: Derivatives | None) -> "Instance":
        """The same with another outer batch, and a solution that is known: its start and its shared features are not
        made again.
        """
        batches = dataclasses.replace(self.batches, outer=outer)
        other = dataclasses.replace(self, batches=batches, known=known, engine=engine)
        vars(other)["oracles"] = facing(self.oracles, batches, engine)
        return other

    def solve(
        self,
        start: Tree | None = None,
        *,
        solver: InnerSolver | None = None,
        at: Callable[[int], At] | None = None,
        visit: Visit | None = None,
        moving: Moving | None = None,
        masks: Sequence[Tensor] | None = None,
        ended: Ended | None = None,
    ) -> Solution:
        """Run the inner solver, unless that was done before; keeps no trajectory unless `visit` does."""
        oracles = self.oracles
        plain = all(each is None for each in (start, solver, at, visit, moving, masks, ended))
        if self.known is not None and plain and self.known.of(self):
            oracles.generators.set(self.known.ended)
            return self.known.solution
        with spans.span(spans.INNER):
            y = oracles.start() if start is None else start
            before = oracles.generators.peek()
            rule, at, steady = solver or self.solver, at or oracles.point, self.steady
            found = run(rule, oracles, y, at, visit=visit, moving=moving, masks=masks, steady=steady, ended=ended)
            return self.seen(found, drew=not oracles.generators.same(before, oracles.generators.peek()))

    def program(self) -> "Program":
        """The K steps that are taken: those of a solver that stops by itself are learned by running it."""
        oracles, solver = self.oracles, self.solver
        if solver.fixed:
            return Program(Descent(solver.dynamics, solver.max_steps))
        oracles.start()
        if not isinstance(self.batches.inner, PerStep):
            oracles.embedding(0)
        before, moving = oracles.generators.peek(), list[Tensor]()
        learned = self.solve(moving=moving.append)
        oracles.generators.set(before)
        masks = moving if self.tasks is not None else None
        return Program(Descent(solver.dynamics, learned.steps), masks, learned.code, learned.residual)

    @property
    def steady(self) -> bool:
        """Whether every step sees the same batch, so that losses of different steps may be compared."""
        return not isinstance(self.batches.inner, PerStep)

    def seen(self, found: Solution, *, drew: bool) -> Solution:
        """`found` without a graph; its losses say nothing about the steps where each was of another batch or noise.

        A dynamics that draws numbers (Langevin) does not descend: its loss may rise to where it rests.
        """
        steady = not drew and self.steady
        restless = drew and self.solver.dynamics.update is None
        return dataclasses.replace(
            found,
            inner=tree.detach(found.inner),
            first_loss=None if restless else found.first_loss,
            rise=found.rise if steady else None,
            unsteady=found.unsteady if steady else None,
            promised=found.promised if steady else None,
        )

    def require_rest(self, estimator: "Estimator") -> None:
        """Raise ValueError unless the inner loop is an optimizer that says where it rests."""
        oracles = self.oracles
        update = oracles.dynamics.update
        if update is None:
            raise ValueError(
                f"{type(estimator).__name__} perturbs the inner loss, and {type(self.solver.dynamics).__name__} need "
                f"not follow its gradient. Use Unrolled(), or Implicit with a linear solver for systems that are not "
                f"symmetric"
            )
        start = oracles.start()
        if update.stationarity(start, start, oracles.x) is None:
            raise ValueError(restless(self.solver.dynamics, type(estimator).__name__))

    def finish(
        self,
        found: Solution,
        grad: PartialLeaves,
        outer_loss: Tensor,
        *,
        inner: Tree | None = None,
        inner_loss: Tensor | None = None,
        codes: Sequence[Tensor | int] = (),
        stats: dict[str, Any] | None = None,
        state: State | None = None,
        next_inner: Tree | None = None,
    ) -> "Estimate":
        """The epilogue of every estimator: health of the inner loop, losses at the solution, status and stats.

        Args:
            found: the inner solution.
            grad: the estimate, summed over tasks; None for outer tensors that it did not reach.
            outer_loss: f at the solution, per task.
            inner: the adapted inner variable, if it is not `found.inner`.
            inner_loss: g at the solution on the last inner batch, per task, if it is known.
            codes: further statuses.
            stats: further figures.
            state: what is carried to the next call.
            next_inner: where the next call's inner loop starts, if not at `inner`.
        """
        inner = found.inner if inner is None else inner
        inner_loss = self.oracles.inner_loss(inner, found.steps) if inner_loss is None else inner_loss
        figures = {"inner_steps": found.steps, "inner_residual": found.residual, "inner_rise": found.rise}
        return Estimate(
            grad=grad,
            inner=inner,
            outer_loss=outer_loss,
            inner_loss=inner_loss,
            code=worst(found.code, self.health(found, inner, inner_loss), *codes),
            stats=figures | (stats or {}),
            state=state,
            next_inner=next_inner,
        )

    def health(self, found: Solution, inner: Tree, last_loss: Tensor | None) -> Tensor:
        """Status code of an inner loop: DIVERGED, INNER_ROSE when a task's loss more than doubled, INNER_UNSTABLE."""
        codes: list[Tensor | int] = [code_if(~tree.finite(inner), Status.DIVERGED)]
        if found.first_loss is not None and last_loss is not None and not isinstance(self.batches.inner, PerStep):
            codes.append(code_if(last_loss > found.first_loss + found.first_loss.abs(), Status.INNER_ROSE))
        if found.unsteady is not None:
            codes.append(code_if(found.unsteady, Status.INNER_UNSTABLE))
        # (Of few steps, a large first one that gains nothing is how training of a net may begin.)
        if found.promised is not None and found.last_loss is not None and last_loss is not None and found.steps >= 10:
            # A step of length c gains c (1 - c h / 2) |dg/dy|^2 along a curvature h: nothing is left of it at c = 2 /
            # h.
            gained, size = found.last_loss - last_loss, found.last_loss.abs() + last_loss.abs()
            rounding = torch.finfo(size.dtype).eps * (
                size if found.first_loss is None else size + found.first_loss.abs()
            )
            idle = (gained < _GAINED * found.promised) & (found.promised > _NOTABLE * size + 10 * rounding)
            codes.append(code_if(idle, Status.INNER_UNSTABLE))
        return worst(*codes)


@dataclasses.dataclass(frozen=True)
class Program:
    """A fixed number of steps, with what a solver that stops by itself said of them: the tasks that each step moves
    (None for all), its code and its residual (None where the number was fixed).
    """

    solver: Descent
    masks: list[Tensor] | None = None
    code: Tensor | int | None = None
    residual: Tensor | None = None

    def ended(self, found: Solution) -> Solution:
        """What was found by running it, with what the solver said of its end."""
        if self.code is None:
            return found
        return dataclasses.replace(found, code=self.code, residual=self.residual)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an estimator returns; best made by `Instance.finish`.

    `grad` is summed over tasks, with None for outer tensors that nothing reached; losses are per task. `unused` names
    the outer tensors, by position, that are known to be on no path at all.
    """

    grad: PartialLeaves
    inner: Tree
    outer_loss: Tensor
    inner_loss: Tensor
    code: Tensor | int
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: State | None = None
    next_inner: Tree | None = None
    unused: frozenset[int] = frozenset()


class Estimator(Strategy):
    """How dF/dx is estimated from one instance.

    A subclass is a frozen dataclass with `estimate` and `sees`. `sees` has no default: a class that does not say which
    paths of the outer variable it follows is refused when it is defined, and a problem in which x acts along other
    paths is refused when it is used.

    Example:
        An estimator of the user's own: the direct part of the gradient, and nothing else.

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Direct(bl.Estimator):
        ...     sees = frozenset({bl.Path.OUTER_LOSS})
        ...     def estimate(self, instance, state):
        ...         found = instance.solve()
        ...         loss, _, direct = instance.oracles.outer_gradient(found.inner)
        ...         return instance.finish(found, direct, loss)
        >>> problem = bl.Problem(lambda y, x, b: (y - 1) ** 2, lambda y, x, b: (y - x) ** 2)
        >>> bl.hypergradient(problem, torch.tensor(0.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=Direct()).grad
        tensor(-2.)
    """

    sees: frozenset[Path]
    """The paths of x that the estimate follows."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        abstract = any(getattr(value, "__isabstractmethod__", False) for value in vars(cls).values())
        if not abstract and "estimate" in vars(cls) and not hasattr(cls, "sees"):
            raise TypeError(
                f"{cls.__name__} does not say which paths of the outer variable it sees. Write, in the class, "
                f"sees = frozenset({{bilevel.Path.INNER_LOSS, bilevel.Path.OUTER_LOSS}}), with the paths that its "
                f"estimate follows: {', '.join(path.name for path in Path)}"
            )

    def sees_after(self, steps: int) -> frozenset[Path]:
        """The paths that are followed through at most `steps` inner steps."""
        return self.sees

    def sees_in(self, instance: Instance) -> frozenset[Path]:
        """The paths that are followed on this instance."""
        return self.sees_after(instance.solver.max_steps)

    @property
    def memory_growth(self) -> str:
        """How peak memory grows with the inner steps K: "constant", "sqrt" or "linear"; "" promises nothing.

        Profilers hold it to the promise.
        """
        return ""

    @property
    def bias(self) -> str:
        """What separates the estimate from the gradient of the K-step program, as a clause; "" when nothing does."""
        return "of unknown bias"

    @property
    def delegates(self) -> bool:
        """Whether it only hands parts of the instance to another estimator, each of which is checked by itself."""
        return False

    @property
    def unlike_a_layer(self) -> str:
        """Why the estimate is no product of df/dy with the derivative of the returned y, as the backward of
        `bilevel.solution` must be: a clause; "" where it is one.
        """
        return ""

    @property
    def adjoint_solver(self) -> LinearSolver | None:
        """The solver of (H + damping I)' v = df/dy, where the estimate is df/dx - M v and nothing else: then it can be
        differentiated once more.
        """
        return None

    def recorded(self, instance: Instance) -> "Recorded | None":
        """The inner loop, run once and kept for estimates at several outer losses; None where its solution is all that
        they need, or where they run it themselves.
        """
        return None

    @property
    def one_by_one(self) -> bool:
        """Whether `TaskMean` must take one task after another: the gradient in x of each is needed by itself."""
        return False

    @property
    def company(self) -> Company:
        """The processes that make an estimate together."""
        return ALONE

    def missed(self, acts: str) -> str:
        """What to say where it returned None for outer tensors that act, which `acts` names with their paths; "" for
        the library's own words.
        """
        return ""

    def init_state(self, instance: Instance) -> State | None:
        """A state like those that this estimator returns on this instance; None if it carries nothing."""
        return None

    def admit_state(self, instance: Instance, state: Any) -> Any:
        """`state`, or what was saved of one, if it fits this instance.

        Raises:
            ValueError: it is another estimator's or another problem's.
        """
        return checked(type(self).__name__, state, self.init_state(instance))

    @abc.abstractmethod
    def estimate(self, instance: Instance, state: Any) -> Estimate:
        """The estimate; `state` is what the last call returned as its state, or None."""


class Recorded(Protocol):
    """An inner loop that was run, with what an estimator keeps of it."""

    @property
    def solution(self) -> Solution:
        """What it found."""

    @property
    def graph(self) -> tuple[Tree, Tree] | None:
        """y at its end with its graph, and the attached x where that begins; None where no graph is kept."""

    def estimate(self, instance: Instance) -> Estimate:
        """The estimate of the same instance with the outer batch of this one; may be asked for several times."""


AT_SOLUTION = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS, Path.STATIONARITY})
"""What an estimator that differentiates the solution sees."""
EVERYWHERE = frozenset(Path)
