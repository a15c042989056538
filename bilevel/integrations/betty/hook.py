"""A hypergradient hook: what Betty calls, (vector, curr, prev, sync) -> (dy*/dx)^T vector, computed by an estimator.

| where the inner loop is | when | estimators |
| --- | --- | --- |
| at the lower problem's parameters | `register(estimator)` | Implicit, MemoryReduced |
| goes on from there, with `solver` | `register(estimator, solver)` | any |
| what Betty did, replayed | `use(problem, estimator)` | those that differentiate steps: Unrolled |
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.integrations.betty.modules import norm
from bilevel.integrations.betty.movers import other_movers
from bilevel.integrations.betty.optimizer import Named, at_rest, require_decay
from bilevel.integrations.betty.program import Program, program
from bilevel.integrations.betty.recording import Recording
from bilevel.integrations.betty.sameness import require_same

_LINEAR = (bl.Implicit, bl.MemoryReduced, bl.Unrolled, bl.FirstOrderCorrected)
"""Estimators that are known to scale with the outer gradient."""


class Hook:
    """An estimator with the signature of Betty's hypergradients.

    Args:
        estimator: how the hypergradient is estimated.
        solver: how the inner loop goes on from the lower problem's parameters (which stay where they are): for
            FirstOrderCorrected and others that need steps of their own. With steps=0 it only says where the problem
            rests. None: it rests where its torch optimizer does, at gradient + weight_decay * parameter = 0.
        below: where the lower problem is itself above others: for how many steps of their optimizers (SGD) these follow
            it, from where they are; or `Descent(SGD(...), steps)`, with their weight decay, to follow by that; 0 to
            take them as fixed, as Betty's darts does. Each step costs a gradient with its graph, and as many of each
            problem below that. How much dependence is left is logged as `below_left`; more than half is refused.
        tolerate: failed statuses that are handed on with a warning in Betty's log, as in `bilevel.iterate`.

    Cost of a call: the estimator's own, and one evaluation of the loss; a replay makes the K gradients of the inner
    loop again. The first call of a pair of problems: 3 gradients more. Memory: the estimator's own.

    Warm starts: an estimator's state is kept from call to call, for each pair of problems.

    Source: Betty, Choe et al. 2023, arXiv 2207.02849, whose hooks these are; the estimators name theirs.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.integrations import betty
        >>> betty.Hook(bl.Implicit(bl.CG(max_steps=10))).estimator
        Implicit(linear=CG(max_steps=10, tol=1e-06, damping=0.0, preconditioner=None))
    """

    def __init__(
        self,
        estimator: bl.Estimator,
        solver: bl.InnerSolver | None = None,
        *,
        below: int | bl.Descent | None = None,
        tolerate: Collection[bl.Status] = (bl.Status.NEGATIVE_CURVATURE,),
    ) -> None:
        _check(estimator, solver, below)
        self.estimator, self.solver, self.below, self.tolerate = estimator, solver, below, tuple(tolerate)
        self._recordings: weakref.WeakKeyDictionary[Any, Recording] = weakref.WeakKeyDictionary()
        self._states: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
        self._looked: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
        self._admitted = isinstance(estimator, _LINEAR)

    @property
    def differentiates_steps(self) -> bool:
        """Whether the estimator looks back on the steps that were made, which Betty does not keep."""
        return bl.Path.START in self.estimator.sees_after(1)

    def record(self, problem: Any) -> None:
        """Keep the inner loops of a problem from now on; once more does nothing."""
        if problem not in self._recordings:
            self._recordings[problem] = Recording(problem)

    def __call__(self, vector: Sequence[Tensor], curr: Any, prev: Any, sync: bool = False) -> list[Tensor] | None:
        """(dy*/dx)^T vector, for the parameters of `prev`.

        Args:
            vector: the gradient of what lies above by the parameters of `curr`.
            curr: the lower problem.
            prev: the problem whose parameters the result is for.
            sync: add the result to the `.grad` of these parameters and return None.

        Raises:
            ValueError: the two problems cannot be differentiated in this way; the message says why.
            BilevelError: the hypergradient failed (see `Status.failed`) or is not finite.
            NotTwiceDifferentiableError: a loss lacks the second derivative that the estimator needs.
        """
        recorded = self.solver is None and curr in self._recordings
        posed = program(curr, prev, below=self.below, whole=recorded)
        v = posed.paired(vector)
        try:
            found = self._replayed(posed, v, self._recordings[curr]) if recorded else self._estimated(posed, v)
        except bl.NotTwiceDifferentiableError as error:
            raise type(error)(
                f"problem {curr.name}: {error} (Inside a Betty program that is register(bilevel.FirstOrderCorrected(), "
                f"bilevel.Descent(bilevel.SGD(lr=0.1), 20)), with the problem's weight decay; FirstOrder() has nothing "
                f"to differentiate there.)"
            ) from error
        self._log(found, posed, posed.follow_up())
        # Of a parameter that stands twice in the list Betty adds up what it gets.
        gradients = [
            found.grad[name] if name not in posed.given[:place] else torch.zeros_like(found.grad[name])
            for place, name in enumerate(posed.given)
        ]
        if not sync:
            return gradients
        prev.set_grads(list(prev.trainable_parameters()), gradients)
        return None

    def _look(self, posed: Program) -> None:
        """Whether the losses see the tensors that are put in the places of parameters; once for each pair."""
        seen = self._looked.setdefault(posed.curr, weakref.WeakSet())
        if posed.prev not in seen:
            require_same(posed, posed.curr.cur_batch, once=isinstance(self.estimator, _AT_A_POINT))
            seen.add(posed.prev)

    def _estimated(self, posed: Program, v: Named) -> bl.Hypergradient:
        curr = posed.curr
        now = {name: leaf.detach() for name, leaf in posed.inner.items()}
        problem = bl.Problem(posed.loss, lambda y, x, w: sum(((y[name] - now[name]) * w[name]).sum() for name in w))
        if self.solver is not None:
            require_decay(curr.name, curr.optimizer, posed.inner, self.solver.dynamics.update)
        solver = bl.Descent(self._resting(posed), 0) if self.solver is None else self.solver
        self._look(posed)
        self._admit(lambda w: self._run(problem, posed, now, bl.Batches(curr.cur_batch, w), solver), v)
        return self._run(problem, posed, now, bl.Batches(inner=curr.cur_batch, outer=v), solver)

    def _replayed(self, posed: Program, v: Named, recording: Recording) -> bl.Hypergradient:
        problem, started, solver, steps = recording.replayed(posed)
        self._look(posed)
        device = next(iter(v.values())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._admit(lambda w: self._run(problem, posed, started, bl.Batches(steps, w), solver), v)
            found = self._run(problem, posed, started, bl.Batches(steps, v), solver)
            recording.check(found.inner, posed)
        return found

    def _run(
        self, problem: bl.Problem, posed: Program, start: Named, batches: bl.Batches, solver: bl.InnerSolver
    ) -> bl.Hypergradient:
        states = self._states.setdefault(posed.curr, weakref.WeakKeyDictionary())
        with torch.enable_grad(), warnings.catch_warnings():
            # (That a part of a module is not used is common; that none of it is, is refused below.)
            warnings.filterwarnings("ignore", message=r"outer variable .* influences neither loss")
            found = bl.hypergradient(
                problem,
                {name: leaf.detach() for name, leaf in posed.outer.items()},
                start,
                batches,
                solver=solver,
                estimator=self.estimator,
                state=states.get(posed.prev),
            )
        states[posed.prev] = found.state
        if not any(bool(leaf.any()) for leaf in found.grad.values()):
            inner = batches.inner
            recorded = isinstance(inner, bl.PerStep)
            posed.require_dependence([inner[k].batch for k in range(len(inner))] if recorded else [inner])
        return found

    def _resting(self, posed: Program) -> bl.Optimizer:
        """The optimizer that says where the lower problem rests."""
        curr = posed.curr
        if used := other_movers(curr, posed.inner.values()):
            raise ValueError(
                f"problem {curr.name} has {', '.join(used)}, which may move its parameters or change their "
                f"gradients, so where it rests is not known. If it does neither (it logs, say), write solver="
                f"bilevel.Descent(bilevel.SGD(lr=1.0, weight_decay=...), 0), with the weight decay of its optimizer"
            )
        if self.differentiates_steps:
            name = type(self.estimator).__name__
            raise ValueError(
                f"{name} differentiates the steps of problem {curr.name}, which Betty does not keep. Write "
                f"bilevel.integrations.betty.use({curr.name}, bilevel.{name}(...)) before the engine runs, which keeps "
                f"them, in place of register(...)"
            )
        return at_rest(curr.name, curr.optimizer, posed.inner)

    def _admit(self, run: Callable[[Named], bl.Hypergradient], v: Named) -> None:
        """Hold an estimator that is not known to it to what Betty wants: to be linear in the vector. Once."""
        if self._admitted:
            return
        device = next(iter(v.values())).device
        found: list[Named] = []
        for scale in (1, 2):  # from the same random numbers
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                found.append(run({name: scale * leaf for name, leaf in v.items()}).grad)
        once, twice = ([leaf.double() for leaf in each.values()] for each in found)
        if norm([b - 2 * a for a, b in zip(once, twice, strict=True)]) > 0.2 * norm(once):
            raise ValueError(
                f"{type(self.estimator).__name__} does not return (dy*/dx)^T v of the vector v that Betty hands it: "
                f"for 2 v it is not twice as large, so it estimates something else than the gradient of the upper loss"
            )
        self._admitted = True

    def _log(self, found: bl.Hypergradient, posed: Program, below: dict[str, float]) -> None:
        """Status and residual, to Betty's log; a failure is raised."""
        curr, status = posed.curr, found.status
        figures: dict[str, Any] = {
            key: number
            for key, value in found.stats.items()
            if key not in _NO_FIGURE and (number := _number(value)) is not None
        }
        figures |= below
        text = " || ".join(f"{key}: {value:.3g}" for key, value in figures.items())
        said = f'[Problem "{curr.name}"] [Hypergradient for "{posed.prev.name}"] {status.name}'
        logger = getattr(curr, "logger", None)
        refused = status.failed and (
            status not in self.tolerate
            or status in (bl.Status.NONFINITE, bl.Status.DIVERGED)
            or not all(bool(leaf.isfinite().all()) for leaf in found.grad.values())
        )
        if logger is not None:
            step = getattr(curr, "_global_step", None) or curr.count
            logger.log({**figures, "status": int(found.code)}, tag=f"{curr.name}/hypergradient", step=step)
            if status is bl.Status.OK:
                logger.info(f"{said} || {text}" if text else said)
            else:
                logger.warning(f"{said} || {text} || {status.value}")
        if refused:
            raise bl.BilevelError(
                f"problem {curr.name}, hypergradient for {posed.prev.name}: {status.name}: {status.value}", status
            )


def _check(estimator: Any, solver: Any, below: Any) -> None:
    if not isinstance(estimator, bl.Estimator):
        given = (
            f"the class {estimator.__name__} itself" if inspect.isclass(estimator) else f"a {type(estimator).__name__}"
        )
        raise TypeError(f"{given} was given as estimator; bilevel.Implicit(bilevel.CG(max_steps=10)) was needed")
    name = type(estimator).__name__
    if solver is not None and not isinstance(solver, bl.InnerSolver):
        raise TypeError(
            f"a {type(solver).__name__} was given as solver; bilevel.Descent(bilevel.SGD(lr=0.1), steps=20) was needed"
        )
    counted = isinstance(below, int) and not isinstance(below, bool) and below >= 0
    if not (below is None or counted or (isinstance(below, bl.Descent) and isinstance(below.optimizer, bl.Optimizer))):
        raise ValueError(
            f"below={below!r} was given; a number of steps of at least 0 was needed, or "
            f"bilevel.Descent(bilevel.SGD(lr=0.1), 20)"
        )
    if estimator.delegates:
        raise ValueError(
            f"{name} hands tasks to another estimator, and a Betty problem has no tasks; give the estimator inside it"
        )
    if getattr(estimator, "warm_inner", False):
        raise ValueError(f"{name} was given with warm_inner=True, and where y is, Betty decides; leave it out")
    if solver is None and bl.Path.START not in estimator.sees_after(1) and not isinstance(estimator, _AT_A_POINT):
        raise ValueError(
            f"{name} may need inner steps of its own, which start where the problem is. Write "
            f"solver=bilevel.Descent(bilevel.SGD(lr=0.1), steps=20), or steps=0 if it needs none"
        )


_NO_FIGURE = ("calls", "inner_steps")
"""Stats that say nothing of the solve."""
_AT_A_POINT = (bl.Implicit, bl.MemoryReduced)


def _number(value: Any) -> float | None:
    """The largest of a figure's entries, as a number; None for what is none."""
    if isinstance(value, Tensor):
        return float(value.detach().double().max()) if value.numel() else None
    return float(value) if isinstance(value, (int, float)) else None
