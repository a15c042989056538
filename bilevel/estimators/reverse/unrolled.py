"""Backpropagation through the inner loop: the exact gradient of the K-step program.

    a_K = df/dy(y_K);   a_k, x_bar += VJP of step k at (a_{k+1});   dF/dx = df/dx + x_bar + (dy_0/dx)' a_0

With `step_weights` the outer loss is F = sum over k = 1..K of w_k f(y_k, x): a_k += w_k df/dy(y_k) on the way, and
df/dx likewise. With `resampled` a step's VJP takes the derivatives of dg/dy at another batch, Batches.curvature_at(k).

| keep | inner gradients | HVP-class products | memory, S = P + optimizer state |
| --- | --- | --- | --- |
| "graph" | K | K | K tapes of a differentiable step |
| "iterates" | 2 K | K | K S + one tape |
| "segments" | about 3 K - sqrt(2 K) | K | sqrt(2 K) S + one tape |
| ... offload, on CUDA | as above, and 2 copies of S numbers a step | | 2 S + one tape; the rest on the host |
| ... resampled | K more, but for SGD with a number as its lr alone | as above | + one batch |

One outer gradient, or one per weight that is not 0 (with keep="graph" each holds its P numbers until the sweep).

Wins: x is the start or a step size, K is far from a solution, or no bias is allowed; "segments" for long loops.
Fails: memory grows with K; where cotangents grow (an unstable loop), digits are lost, and the status says so.
References: Maclaurin et al. 2015, arXiv 1502.03492; Franceschi et al. 2017, arXiv 1703.01785; multi-step MAML, arXiv
2002.07836 (the ordered product of I - alpha H, and its resampling case); MAML++, Antoniou et al. 2019, arXiv 1810.09502
(the multi-step loss). Differences from peers: one step is split into the
gradient and the optimizer's algebra, so a rebuilt step holds no copy of the update; random numbers are replayed; the
growth of the cotangent, which is the growth of rounding errors, is reported.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance, Path, Recorded
from bilevel.estimators.reverse import auto
from bilevel.estimators.reverse.checkpoints import Checkpoints
from bilevel.estimators.reverse.plans import Segments
from bilevel.estimators.reverse.plans import shrinking as shrinking
from bilevel.estimators.reverse.sweep import run
from bilevel.estimators.reverse.tape import Tape
from bilevel.estimators.reverse.terms import Terms
from bilevel.inner.descent import Descent

_KEEPS = ("graph", "iterates", "segments", "auto")


@dataclasses.dataclass(frozen=True)
class Unrolled(Estimator):
    """Backpropagate through the inner loop.

    The three ways of keeping the trajectory give the same gradient to rounding; they trade memory for compute. Which of
    "graph" and "iterates" is smaller depends on the tape of a step against its S numbers: forecast, or measure.

    Args:
        keep: "graph" keeps the tape of every step; "iterates" keeps the iterates and rebuilds one step's graph at a
            time; "segments" keeps about sqrt(2 K) iterates and recomputes the others once; "auto" takes what has the
            least compute of those whose forecast fits `budget`: these three and offload, with and without blocks.
        segment: a uniform segment length for keep="segments"; None for lengths that shrink towards the end, the least
            memory for one recomputation.
        last: backpropagate through the last steps only; None for all. Truncation drops everything that acted before:
            biased, with an error that decays like (1 - lr mu)^last for a mu-strongly convex inner loss, and it cannot
            see Problem.init.
        step_weights: w_1, ..., w_K for the multi-step loss of MAML++, the outer loss F = sum of w_k f(y_k, x) over the
            iterates after each of the K steps; None for f(y_K, x). `hg.outer_loss` is then F, the weighted sum, and
            f(y_K, x) is in stats["final_outer_loss"] (per task) if w_K is not 0. Iterates that `last` cuts off count as
            constants: of their terms only the direct gradient in x is left.
        resampled: the resampling case of multi-step MAML: the steps are those of `Batches.inner`, the factors I - lr H
            of their product are taken at `Batches.curvature` (a PerStep for fresh samples at each step, or one batch
            for all), and so are the derivatives of dg/dy in x. Where those samples are independent of the steps', the
            product is unbiased for the derivative of the step at the iterates; with one batch for both it is not. What
            an optimizer does with a gradient (momentum, moments, rates that are functions of x) is differentiated
            where it ran. Random numbers in losses are drawn anew.
        offload: whether the kept iterates wait in pinned memory of the host, on CUDA: copied there while the next step
            runs, and back while the one after is differentiated. For variables on the CPU they stay what they are.
        budget: for keep="auto", the bytes that the estimate may add at its peak to what is there before (data and
            variables): a number, or a size such as "2GiB". On a GPU leave room for workspaces and fragmentation. Under
            TaskMean it is the budget of a chunk.

    Stats: `cotangent_growth`, the largest norm of a cotangent on its way back over the one that entered; `digits`, the
    decimal digits that rounding leaves of the hypergradient by it; `cotangent_left`, the part that reached the start.
    (Where several cotangents enter, over the sum of their norms.) With keep="auto" `keep`, what was chosen, such as
    "iterates, offload" or "segments, blocks" (blocks run as such), and `keep_peaks`, the forecast bytes of each choice.
    With a solver that stops by itself (Converge) and no init, more than 1% left is Status.STOPPED_EARLY.

    Memory: see the table in `bilevel.estimators.reverse.unrolled`; independent of Q but for one copy, linear in T. With
        `offload` the peak of a CUDA device does not grow with K: beside one step there are the iterate in use and the
        next; that of the host grows as the table says.

    Raises:
        ValueError: an argument is out of range, or (when used) nothing fits the budget, before anything is computed; x
            enters only through Problem.init and `last` cuts that path; step_weights are not one per step, or all of
            those not 0 are cut off by `last`; resampled without `Batches.curvature`, or with a dynamics that is no
            optimizer.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.Unrolled(keep="segments"))
        >>> hg.grad
        tensor(0.2197)

        The multi-step loss, w_1 f(y_1) + w_2 f(y_2) with y_1 = x / 4 and y_2 = 3 x / 8:

        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=2), estimator=bl.Unrolled(step_weights=(0.5, 0.5)))
        >>> hg.grad, hg.outer_loss
        (tensor(0.1016), tensor(0.0508))
    """

    sharded = True

    keep: str = "graph"
    segment: int | None = None
    last: int | None = None
    step_weights: Sequence[float] | None = None
    resampled: bool = False
    offload: bool = False
    budget: str | int | None = None

    def __post_init__(self) -> None:
        if self.keep not in _KEEPS:
            raise ValueError(f"Unrolled was given keep={self.keep!r}; one of {', '.join(map(repr, _KEEPS))} was needed")
        for name in ("segment", "last"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"Unrolled was given {name}={value!r}; None or an integer of at least 1 was needed")
        if self.segment is not None and self.keep != "segments":
            raise ValueError(
                f"Unrolled was given segment={self.segment} with keep={self.keep!r}; write "
                f'Unrolled(keep="segments", segment={self.segment})'
            )
        for name in ("resampled", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Unrolled was given {name}={getattr(self, name)!r}; True or False was needed")
        if self.offload and self.keep == "graph":
            raise ValueError(
                'Unrolled was given offload=True with keep="graph", which keeps what autograd saves of every step, and '
                'no iterates; write Unrolled("iterates", offload=True). The inputs of rematerialized blocks leave a '
                "graph by bilevel.functional(module, rematerialize=Block, offload=True)"
            )
        if self.resampled and self.keep == "graph":
            raise ValueError(
                'Unrolled was given resampled=True with keep="graph", which keeps the graph of the steps as they ran, '
                'on their own batches; write Unrolled("iterates", resampled=True), or "segments"'
            )
        if self.step_weights is not None:
            object.__setattr__(self, "step_weights", _checked(self.step_weights))
        self._check_budget()

    def _check_budget(self) -> None:
        if self.keep != "auto":
            if self.budget is not None:
                raise ValueError(
                    f'Unrolled was given budget={self.budget!r} with keep={self.keep!r}; write Unrolled("auto", '
                    f"budget={self.budget!r}), which chooses how to keep the trajectory within it"
                )
            return
        if self.budget is None:
            raise ValueError(
                'Unrolled was given keep="auto" and no budget to choose by; write Unrolled("auto", budget="2GiB")'
            )
        if self.offload:
            raise ValueError(
                f'Unrolled was given offload=True with keep="auto", which chooses whether to; write '
                f'Unrolled("auto", budget={self.budget!r}), or Unrolled("iterates", offload=True)'
            )
        if not isinstance(self.budget, (str, int)) or isinstance(self.budget, bool):
            raise ValueError(f'Unrolled was given budget={self.budget!r}; bytes or a size such as "2GiB" was needed')
        auto.parsed(self.budget)

    sees = EVERYWHERE

    def sees_after(self, steps: int) -> frozenset[Path]:
        return EVERYWHERE if self.last is None or self.last >= steps else EVERYWHERE - {Path.START}

    @property
    def memory_growth(self) -> str:
        if self.last is not None:
            return "constant"
        if self.keep == "auto":
            return ""
        return "sqrt" if self.keep == "segments" and self.segment is None else "linear"

    @property
    def bias(self) -> str:
        clauses = []
        if self.last is not None:
            clauses.append(
                f"truncated to the last {self.last} steps: an error that decays like (1 - lr mu)^{self.last}"
            )
        if self.resampled:
            clauses.append("the derivatives of the steps are sampled anew, on Batches.curvature")
        return "; ".join(clauses)

    @property
    def unlike_a_layer(self) -> str:
        return "" if self.step_weights is None else "with step_weights its outer loss is a sum over the iterates"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        self._check(instance)
        if self.keep == "auto":
            assert self.budget is not None
            return auto.within(self._ways(instance), auto.parsed(self.budget), instance)
        return self._run(instance).estimate(instance)

    def recorded(self, instance: Instance) -> Recorded | None:
        if self.keep == "auto":
            return None
        self._check(instance)
        return self._run(instance)

    def _run(self, instance: Instance) -> Recorded:
        return run(instance, self._trajectory, last=self.last, step_weights=self.step_weights)

    def _trajectory(
        self, instance: Instance, program: Descent, first: int, masks: list[Tensor] | None, terms: Terms
    ) -> Tape | Checkpoints:
        if self.keep == "graph":
            return Tape(instance, program, first, masks, terms)
        plan = Segments(tuple(self._starts(first, program.steps)))
        return Checkpoints(instance, program, plan, masks, terms, resampled=self.resampled, offload=self.offload)

    def _ways(self, instance: Instance) -> dict[str, auto.Way]:
        """The choices of keep="auto", with their compute by the table above."""

        def way(cost: float, keep: str, *, offload: bool = False) -> auto.Way:
            return auto.Way(cost, dataclasses.replace(self, keep=keep, offload=offload, budget=None))

        ways = {} if self.resampled else {"graph": way(2, "graph")}
        ways["iterates"] = way(3, "iterates")
        if auto.can_leave(instance):
            ways["iterates, offload"] = way(3.1, "iterates", offload=True)
        return ways | {"segments": way(4, "segments")}

    def _check(self, instance: Instance) -> None:
        """Raise ValueError where the batches or the solver are not what the arguments need."""
        solver, curvature = instance.solver, instance.batches.curvature
        if self.resampled:
            update = solver.dynamics.update
            if update is None:
                raise ValueError(
                    f"Unrolled(resampled=True) was given a {type(solver.dynamics).__name__}; an inner optimizer was "
                    f"needed, whose step takes one gradient of the inner loss. Use Unrolled({self.keep!r})"
                )
            if curvature is None:
                raise ValueError(
                    "Unrolled(resampled=True) was given no Batches.curvature, the samples of the steps' derivatives; "
                    "write Batches(inner, outer, curvature=PerStep([...])) with one fresh batch per step, or "
                    f"Unrolled({self.keep!r}), which differentiates the steps on their own batches"
                )
            if isinstance(curvature, PerStep) and len(curvature) < max(solver.max_steps, 1):
                raise ValueError(
                    f"Batches.curvature holds {len(curvature)} batches and the inner solver takes {solver.max_steps} "
                    f"steps: Unrolled(resampled=True) needs one per step"
                )
        if self.step_weights is not None:
            count = len(self.step_weights)
            if not solver.fixed:
                raise ValueError(
                    f"Unrolled was given step_weights with {type(solver).__name__}, which takes as many steps as it "
                    f"needs; write Descent(optimizer, steps={count}), or leave step_weights out"
                )
            if count != solver.max_steps:
                raise ValueError(
                    f"Unrolled was given {count} step_weights and the inner solver takes {solver.max_steps} steps; one "
                    f"weight per step was needed, w_1 for the iterate after the first step"
                )
            if self.last is not None and not any(self.step_weights[-self.last :]):
                raise ValueError(
                    f"Unrolled was given step_weights that are 0 for all of the last={self.last} steps, which are "
                    f"those that it backpropagates through; give one of them a weight, or raise last"
                )

    def _starts(self, first: int, steps: int) -> list[int]:
        """The steps at which a segment begins; "iterates" is one segment, kept as it is made."""
        count = steps - first
        if count == 0 or self.keep == "iterates":
            return [first]
        if self.segment is not None:
            return list(range(first, steps, self.segment))
        return list(itertools.accumulate(shrinking(count)[:-1], initial=first))


def _checked(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of the steps.

    Raises:
        ValueError: they are no finite numbers, or all 0.
    """
    needed = (
        f"Unrolled was given step_weights={weights!r}; a sequence of one finite number per inner step was needed, one "
        f"of them not 0, such as step_weights=(0.2, 0.3, 0.5)"
    )
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise ValueError(needed)
    numbers = [isinstance(each, (int, float)) and not isinstance(each, bool) for each in weights]
    if not all(numbers) or not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(needed)
    return tuple(weights)
