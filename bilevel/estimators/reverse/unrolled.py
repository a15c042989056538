"""Backpropagation through the inner loop: the exact gradient of the K-step program.

    a_K = df/dy(y_K);   a_k, x_bar += VJP of step k at (a_{k+1});   dF/dx = df/dx + x_bar + (dy_0/dx)' a_0

| keep | inner gradients | HVP-class products | memory, S = P + optimizer state |
| --- | --- | --- | --- |
| "graph" | K | K | K tapes of a differentiable step |
| "iterates" | 2 K | K | K S + one tape |
| "segments" | about 3 K - sqrt(2 K) | K | sqrt(2 K) S + one tape |

References: Maclaurin et al. 2015, arXiv 1502.03492; Franceschi et al. 2017, arXiv 1703.01785; multi-step MAML, arXiv
2002.07836, section 2.2 (the ordered product of I - alpha H). Differences from peers: one step is split into the
gradient and the optimizer's algebra, so a rebuilt step holds no copy of the update; random numbers are replayed; the
growth of the cotangent, which is the growth of rounding errors, is reported.
"""

import dataclasses
import itertools
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance, Path
from bilevel.estimators.reverse.checkpoints import Checkpoints, shrinking
from bilevel.estimators.reverse.tape import Tape
from bilevel.inner.descent import Descent
from bilevel.outcome import Solution
from bilevel.space import tree

_KEEPS = ("graph", "iterates", "segments")


@dataclasses.dataclass(frozen=True)
class Unrolled(Estimator):
    """Backpropagate through the inner loop.

    The three ways of keeping the trajectory give the same gradient to rounding; they trade memory for compute. Which of
    "graph" and "iterates" is smaller depends on the tape of a step against its S numbers: forecast, or measure.

    Args:
        keep: "graph" keeps the tape of every step; "iterates" keeps the iterates and rebuilds one step's graph at a
            time; "segments" keeps about sqrt(2 K) iterates and recomputes the others once.
        segment: a uniform segment length for keep="segments"; None for lengths that shrink towards the end, the least
            memory for one recomputation.
        last: backpropagate through the last steps only; None for all. Truncation drops everything that acted before:
            biased, with an error that decays like (1 - lr mu)^last for a mu-strongly convex inner loss, and it cannot
            see Problem.init.

    Stats: `cotangent_growth`, the largest norm of a cotangent on its way back over the one that entered; `digits`, the
    decimal digits that rounding leaves of the hypergradient by it; `cotangent_left`, the part that reached the start.
    With a solver that stops by itself (Converge) and no init, more than 1% left is Status.STOPPED_EARLY.

    Memory: see the table in `bilevel.estimators.reverse.unrolled`; independent of Q but for one copy, linear in T.

    Raises:
        ValueError: an argument is out of range, or (when used) x enters only through Problem.init and `last` cuts that
            path.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.Unrolled(keep="segments"))
        >>> hg.grad
        tensor(0.2197)
    """

    keep: str = "graph"
    segment: int | None = None
    last: int | None = None

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

    sees = EVERYWHERE

    def sees_after(self, steps: int) -> frozenset[Path]:
        return EVERYWHERE if self.last is None or self.last >= steps else EVERYWHERE - {Path.START}

    @property
    def memory_growth(self) -> str:
        if self.last is not None:
            return "constant"
        return "sqrt" if self.keep == "segments" and self.segment is None else "linear"

    @property
    def bias(self) -> str:
        if self.last is None:
            return ""
        return f"truncated to the last {self.last} steps: an error that decays like (1 - lr mu)^{self.last}"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles, dynamics, steps = instance.oracles, instance.solver.dynamics, instance.solver.max_steps
        learned: Solution | None = None
        masks: list[Tensor] | None = None
        if not instance.solver.fixed:
            # A solver that stops by itself runs once to learn K; then the program is known, whichever way it is kept.
            oracles.start()
            if not isinstance(instance.batches.inner, PerStep):
                oracles.embedding(0)
            before, moving = oracles.generators.peek(), list[Tensor]()
            learned = instance.solve(moving=moving.append)
            steps, masks = learned.steps, moving if instance.tasks is not None else None
            oracles.generators.set(before)
        first, program = 0 if self.last is None else max(steps - self.last, 0), Descent(dynamics, steps)
        forward = (
            Tape(instance, program, first, masks)
            if self.keep == "graph"
            else Checkpoints(instance, program, self._starts(first, steps), masks)
        )
        found, forgets = forward.solution, None
        if learned is not None:
            found = dataclasses.replace(found, code=learned.code, residual=learned.residual)
            forgets = learned.code if instance.problem.init is None else None
            del learned
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, cotangent, direct = oracles.outer_gradient(found.inner)
            entering: list[Tensor | None] = list(cotangent)
            del cotangent
            indirect, growth = forward.pull(entering, to_start=forgets is not None)
            grad, code = tree.accumulate(direct, indirect), growth.code(forgets=forgets)
            return instance.finish(found, grad, outer_loss, codes=[code], stats=growth.figures())

    def _starts(self, first: int, steps: int) -> list[int]:
        """The steps at which a segment begins; "iterates" is one segment, kept as it is made."""
        count = steps - first
        if count == 0 or self.keep == "iterates":
            return [first]
        if self.segment is not None:
            return list(range(first, steps, self.segment))
        return list(itertools.accumulate(shrinking(count)[:-1], initial=first))
