"""The backward of a layer: an estimator at the outer loss <w, y>, for whatever cotangent w arrives.

    w -> (dy*/dx)' w   by the estimator of   F(x) = <w, y*(x) - y>,   y the solution of the forward

The loss is 0 at y, so that an estimator that moves y (FirstOrderCorrected) keeps the digits of differences. It is taken
at w / s with s the power of two next to |w|, and the result times s: nothing is rounded by that, and an estimator with
a length of its own (nu) has the same accuracy for every scale of a loss.

| | cost | memory |
| --- | --- | --- |
| pull | the estimator's, without the inner solve | the estimator's |
| pull, of a recorded loop | its sweep | what `keep` says, while the layer lives |
| differentiable, of a kept graph | one sweep with a graph | that graph |
| differentiable, implicit | `engine.implied` | a graph of the condition |
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.engine import implied, layer, spans
from bilevel.engine.base import Derivatives
from bilevel.estimators.base import Estimator, Instance, Recorded
from bilevel.estimators.known import Known
from bilevel.estimators.run import estimated, looked_at
from bilevel.hypergradient import most_telling, prepared
from bilevel.layer.report import Report, Teller
from bilevel.linear.base import LinearSolver
from bilevel.outcome import LinearSolution, NotTwiceDifferentiableError, Status, code_if, readable, worst
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


class Cotangent(NamedTuple):
    """The outer batch of a layer: w, and the solution."""

    weight: Tree
    at: Tree


def paired(inner: Tree, outer: Tree, batch: Cotangent) -> Tensor:
    """<w, y - at>: the outer loss of a layer."""
    leaves = zip(*(tree.tensors(each) for each in (batch.weight, inner, batch.at)), strict=True)
    products = [(w * (y - at)).sum() for w, y, at in leaves]
    return products[0] if len(products) == 1 else torch.stack(products).sum()


@dataclasses.dataclass(frozen=True)
class _Features:
    """The problem's features; a cotangent is no data."""

    features: Callable[[Tree, Any], Any]

    def __call__(self, outer: Tree, batch: Any) -> Any:
        return batch if isinstance(batch, Cotangent) else self.features(outer, batch)


def posed(problem: Problem) -> Problem:
    """The problem whose outer loss is <w, y>; made once, and kept with what is learned about it."""
    made = problem.memo.get("layer")
    if made is None:
        features = None if problem.features is None else _Features(problem.features)
        made = problem.memo["layer"] = dataclasses.replace(problem, outer_loss=paired, features=features)
    return made


@dataclasses.dataclass(frozen=True)
class Ambience:
    """Whether autocast is open around a call, which the losses of its backward run under, too."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, kind: str) -> "Ambience | None":
        """That of now; None on devices that have none."""
        if not torch.amp.is_autocast_available(kind):
            return None
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside this block it is as it was."""
        if not self.enabled and not torch.is_autocast_enabled(self.kind):
            yield
            return
        with torch.autocast(self.kind, dtype=self.dtype, enabled=self.enabled, cache_enabled=False):
            yield


@dataclasses.dataclass(frozen=True, eq=False)
class Backward:
    """The rule of a layer's node.

    Args:
        estimator: the one chosen.
        instance: of the posed problem.
        known: the solve of the forward.
        recorded: what the estimator kept of it.
        open: the engine's derivatives of one call.
        teller: where reports go.
    """

    estimator: Estimator
    instance: Instance
    known: Known
    recorded: Recorded | None
    open: Callable[[], Derivatives]
    teller: Teller
    ambience: Ambience | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ambience", Ambience.of(tree.tensors(self.instance.outer)[0].device.type))

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        """The modes and the random numbers of the forward; the generators are as they were when it ends."""
        generators = self.instance.oracles.generators
        now = generators.peek()
        with contextlib.ExitStack() as stack:
            if self.ambience is not None:
                stack.enter_context(self.ambience.again())
            stack.enter_context(prepared())
            generators.set(self.known.began)
            try:
                yield
            finally:
                generators.set(now)

    def pull(self, cotangents: Sequence[Tensor]) -> PartialLeaves:
        """The estimate at these cotangents; None for outer tensors that are constants or on no path."""
        scale = _scale(cotangents)
        xs = tree.tensors(self.instance.outer)
        if readable(scale) and not bool(scale > 0):  # zero, or not finite, which is not the solve's
            return tuple(
                None if i in self.instance.constant else torch.full_like(leaf, float(scale))
                for i, leaf in enumerate(xs)
            )
        inner = self.known.solution.inner
        weight = tree.like(inner, [leaf / scale.to(leaf.dtype) for leaf in cotangents])
        calls, derivatives = spans.Calls(), self.open()
        with self._as_before(), spans.listen(calls):
            instance = self.instance.facing(Cotangent(weight, inner), self.known, derivatives)
            found = (
                estimated(self.estimator, instance, None)
                if self.recorded is None
                else looked_at(self.estimator, instance, self.recorded.estimate(instance))
            )
        self._warn_of(found.unused - self.instance.constant)
        grad = tuple(
            None if leaf is None or i in self.instance.constant else leaf.detach() * scale.to(leaf.dtype)
            for i, leaf in enumerate(found.grad)
        )
        report = derivatives.report()
        stats = {
            "calls": calls.calls,
            **{name: value for name, value in found.stats.items() if value is not None},
            **({"engine": report} if report else {}),
        }
        sound = tree.finite([leaf for leaf in grad if leaf is not None])
        code = most_telling(found.code, code_if(~sound, Status.NONFINITE))
        self.teller.tell(Report("backward", stats, code))
        return grad

    def _warn_of(self, unused: frozenset[int]) -> None:
        if unused:
            names = tree.names(self.instance.outer)
            warnings.warn(
                f"outer variable {', '.join(names[i] for i in sorted(unused))} does not influence the inner solution: "
                f"it gets no gradient from bilevel.solution. Is it used in inner_loss, from the `outer` argument and "
                f"not from a copy of it?",
                stacklevel=2,
            )

    def differentiable(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> PartialLeaves:
        """The same with its graph.

        Raises:
            NotTwiceDifferentiableError: the estimator does not allow it.
        """
        kept, linear = None if self.recorded is None else self.recorded.graph, self.estimator.adjoint_solver
        if kept is not None:
            if not self.instance.solver.fixed:  # whether it stopped too early, a sweep without a graph says
                idle = not any(bool(leaf.any()) for leaf in cotangents)
                self.pull([torch.ones_like(leaf) if idle else leaf.detach() for leaf in cotangents])
            ends, starts = (tree.tensors(each) for each in kept)
            with spans.span(spans.HYPERGRADIENT):
                found = layer.pulled(ends, starts, inputs, cotangents)
            self.teller.tell(Report("differentiable backward", {}, self._code(found)))
            return found
        if linear is None:
            raise NotTwiceDifferentiableError(_ONCE.format(name=_written(self.estimator)))
        with self._as_before(), spans.span(spans.HYPERGRADIENT):
            at = self._condition(linear, "differentiable backward")
            found = implied.product(at, outputs, inputs, cotangents)
        self.teller.tell(Report("differentiable backward", {}, self._code(found)))
        return found

    def pull_many(self, rows: Sequence[Sequence[Tensor]]) -> list[PartialLeaves]:
        """The estimates at several cotangents; where they are linear solves, they share one linearization."""
        linear = self.estimator.adjoint_solver
        if linear is None:
            return [self.pull(row) for row in rows]
        inner, constant = tree.tensors(self.known.solution.inner), self.instance.constant
        with self._as_before(), spans.span(spans.HYPERGRADIENT):
            ys, xs = (tree.tensors(tree.attach(each)) for each in (inner, self.instance.outer))
            xs = [leaf.detach() if i in constant else leaf for i, leaf in enumerate(xs)]
            found = implied.rows(self._condition(linear, "backward"), ys, xs, rows)
        self.teller.tell(Report("backward", {"rows": len(rows)}, worst(*map(self._code, found))))
        return found

    def _condition(self, linear: LinearSolver, phase: str) -> implied.Condition:
        """The stationarity condition at the solution; its solves are told of."""

        def told(solved: LinearSolution) -> None:
            stats = {"linear_residual": solved.residual, "linear_steps": solved.steps}
            self.teller.tell(Report(phase, stats, solved.code))

        solution, ambience = self.known.solution, self.ambience
        return implied.Condition(
            self.instance.facing(None, self.known, None).oracles,
            solution.inner,
            solution.steps,
            linear,
            self.known.ended,
            contextlib.nullcontext if ambience is None else ambience.again,
            told,
        )

    @staticmethod
    def _code(found: PartialLeaves) -> Tensor:
        return code_if(~tree.finite([leaf.detach() for leaf in found if leaf is not None]), Status.NONFINITE)


_ONCE = (
    "the backward of bilevel.solution was asked for its own derivative (create_graph=True), which {name} does not "
    'have. Use bilevel.Unrolled() with keep="graph" and the eager engine, or bilevel.Implicit(bilevel.CG(20)), which '
    "have it; or leave create_graph out"
)


def _written(estimator: Estimator) -> str:
    keep = getattr(estimator, "keep", None)
    return type(estimator).__name__ + ("" if keep is None else f"({keep!r}) of this engine")


def _scale(cotangents: Sequence[Tensor]) -> Tensor:
    """The power of two next to |w|; 0 for w = 0, and NaN where it is not finite."""
    wide = [leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in cotangents]
    size = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in wide]))
    # (In the range of the narrowest of them.)
    limit = math.log2(min(torch.finfo(leaf.dtype).max for leaf in cotangents)) - 2
    power = torch.log2(torch.where(size > 0, size, 1.0)).round().clamp(-limit, limit)
    return torch.where(size.isfinite(), torch.where(size > 0, torch.exp2(power), 0.0), torch.nan)
