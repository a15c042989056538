"""solution(): an inner solution as a function of the outer variable, in the caller's graph."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import layer, spans
from bilevel.engine.base import Derivatives, Engine
from bilevel.engine.split import split_over
from bilevel.estimators import admission, paths
from bilevel.estimators.base import Estimator, Instance
from bilevel.estimators.known import Known
from bilevel.hypergradient import Owned, check_arguments, check_kind, given_in, opened, prepared
from bilevel.inner.base import InnerSolver
from bilevel.layer.backward import Backward, Cotangent, posed
from bilevel.layer.report import Report, Teller
from bilevel.outcome import worst
from bilevel.problem import Loss, Problem, Pulled
from bilevel.space import tree
from bilevel.space.tree import Tree
from bilevel.tasks.mean import TaskMean


def solution(
    problem: Problem | Loss,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    solver: InnerSolver,
    estimator: Estimator,
    engine: Engine | None = None,
    on_failure: str = "raise",
    strict: bool = False,
    report: Callable[[Report], Any] | None = None,
) -> Tree:
    """y*(x) as tensors with a graph back to x: a layer whose backward is an estimator's.

    The forward moves y once. A backward is the estimator at the outer loss <w, y>, w the cotangent that arrives, at the
    solution of the forward, which is not computed again: Unrolled pulls w back through what it keeps (with "auto" it
    runs anew), estimators at the solution begin there, and others (FirstOrderCorrected moves y by another loss,
    FixedPoint looks at the last step) run as they do. Random numbers are those of the forward, autocast is as it was.

    A second derivative is right for Unrolled() (keep="graph", the eager engine) and, at the inner solution, for
    Implicit and MemoryReduced, also of a derivative; so that a loss may contain a `solution` of its own, three levels
    and more. Others raise where create_graph=True asks for it.

    Args:
        problem: the problem, whose outer loss is not used, or an inner loss g(y, x, batch) alone. Keep a `Problem`
            over calls: what is learned about it is then asked once.
        outer: x, as for `hypergradient`; its tensors may be leaves, parameters, or computed by a network. Those that do
            not require grad are constants.
        inner: the start of y, a constant, or None with Problem.init.
        batches: the data, constants: to differentiate in a tensor, put it into `outer`. The outer batch is not used;
            write Batches(data, None).
        solver: how y moves.
        estimator: how (dy/dx)' w is estimated. Under TaskMean y has a leading task dimension, and gradients are summed
            over the tasks as autograd does.
        engine: how derivatives are computed; a second derivative of Implicit is computed by the eager one.
        on_failure: what a failed status does, in the forward and in each backward: "raise" a BilevelError, or "warn".
        strict: whether an unmet tolerance is a failure, too.
        report: called with a `bilevel.layer.Report` after the forward and after each backward; None for nobody.

    Returns:
        y, a tree like the start. Without a graph under torch.no_grad() and where no tensor of outer requires grad.

    Memory: until y is freed, what the estimator keeps: the start and y for estimators at the solution, what
        `Unrolled.keep` says; a second backward needs retain_graph=True, as everywhere.

    Raises:
        TypeError, ValueError: an argument is not what is needed; the estimator does not see how x acts, carries a state
            from call to call, or is no product with df/dy; a batch or the start has a graph.
        BilevelError: a solve failed and `on_failure` is "raise"; in a backward, too.
        NotTwiceDifferentiableError: in a backward with create_graph=True, of an estimator that is not differentiable
            again.
        RuntimeError: of autograd, in a backward: x, y, the start or a batch was changed in place since the forward, or
            the graph was freed by an earlier backward.

    Warns:
        UserWarning: in a backward, a failed solve with on_failure="warn", or an outer tensor that influences nothing.

    Differences from peers: optimistix, jaxopt, TorchOpt, theseus and cvxpylayers have such a layer with one or two
    fixed ways to differentiate it; here it is any estimator, a user's own too.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = bl.solution(lambda y, x, b: (y - x) ** 2 / 2 + (y - 1) ** 2 / 2, x, torch.tensor(0.0),
        ...     bl.Batches(None, None), solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Implicit(bl.CG(5)))
        >>> y  # (x + 1) / 2
        tensor(2., grad_fn=<BilevelSolutionBackward>)
        >>> torch.sin(y).backward()  # an outer loss, or the rest of a network
        >>> x.grad  # cos(2) / 2
        tensor(-0.2081)
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise ValueError(
            "solution() was called inside a transform of torch.func (vmap, grad, ...), which would mix what its solver "
            "keeps apart. Call it outside: TaskMean(estimator) solves for many tasks at once, and a loss with a "
            "solution of its own needs TaskMean(estimator, chunk=1)"
        )
    if not isinstance(problem, Problem) and callable(problem) and not isinstance(problem, type):
        problem = Problem(problem, _absent)
    check_arguments("solution", problem, outer, inner, batches, solver)
    check_kind("solution", "estimator", estimator, Estimator, "bilevel.Implicit(bilevel.CG(max_steps=10))")
    teller = Teller(on_failure, strict, report)
    assert isinstance(problem, Problem)
    if split_over(problem) is not None:
        raise ValueError(
            "solution() was given a problem whose data are split over ranks, and what is computed from its answer "
            "would be each rank's own. Use hypergradient(), with the rest as the outer loss"
        )
    xs = tree.tensors(outer)
    follow = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in xs)
    if follow:
        _refuse(estimator, inner, batches)

    if layer.has_tangent([*xs, *tree.tensors(inner), *given_in(dataclasses.replace(batches, outer=None))]):
        raise ValueError(
            "solution() was given a dual number of forward-mode differentiation, which its solver does not carry "
            "along. Use bilevel.layer.jvp(y, x, direction), of an x that requires grad"
        )

    def derivatives() -> Derivatives:
        return opened("solution", engine)

    start = None if inner is None else tree.detach(inner)
    constant = frozenset(i for i, leaf in enumerate(xs) if not leaf.requires_grad)
    whole = Instance(problem, tree.detach(outer), start, batches, solver, engine=derivatives(), constant=constant)
    make = _Layer(xs, derivatives, teller, follow=follow)
    if not isinstance(estimator, TaskMean):
        return make(whole, estimator)
    parts = estimator.parts(whole)
    return estimator.joined(parts, [make(part, estimator.estimator) for part in parts])


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One solve, and its node in the graph of `xs`."""

    xs: list[Tensor]
    derivatives: Callable[[], Derivatives]
    teller: Teller
    follow: bool

    def __call__(self, instance: Instance, estimator: Estimator) -> Tree:
        seen = instance.problem, instance.batches.outer
        batches = dataclasses.replace(instance.batches, outer=None)
        instance = dataclasses.replace(instance, problem=posed(instance.problem), batches=batches, posed=seen)
        calls, generators = spans.Calls(), instance.oracles.generators
        with prepared(), spans.listen(calls):
            start = instance.oracles.start()
            if not isinstance(batches.inner, PerStep):
                instance.oracles.embedding(0)  # drawn once, before the first step
            nothing = tree.tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape), start)
            instance = instance.facing(Cotangent(nothing, start), None, instance.engine)
            began = generators.state()
            if self.follow:
                _admit(estimator, instance)
                generators.set(began)
            recorded = estimator.recorded(instance) if self.follow else None
            found = instance.solve() if recorded is None else recorded.solution
            known = Known(instance, found, began, generators.state(began))
            loss = instance.oracles.inner_loss(found.inner, found.steps)
            code = worst(found.code, instance.health(found, found.inner, loss))
        figures = {"inner_steps": found.steps, "inner_residual": found.residual, "inner_rise": found.rise}
        report = None if instance.engine is None else instance.engine.report()
        stats = {"calls": calls.calls, **{name: value for name, value in figures.items() if value is not None}}
        stats |= {"engine": report} if report else {}
        self.teller.tell(Report("forward", stats, code))
        constants = _constants(instance, estimator)
        inner = Owned([*self.xs, *constants, *tree.tensors(instance.inner)]).tree(found.inner)
        if not self.follow:
            return inner
        known = dataclasses.replace(known, solution=dataclasses.replace(found, inner=inner))
        rule = Backward(estimator, instance, known, recorded, self.derivatives, self.teller)
        return tree.like(inner, layer.node(rule, self.xs, tree.tensors(inner), constants))


def _constants(instance: Instance, estimator: Estimator) -> list[Tensor]:
    """What a backward reads beside x and y: the batches at hand, and the start where it is of use."""
    inner, found = instance.batches.inner, given_in(dataclasses.replace(instance.batches, outer=None))
    found += tree.tensors(None if isinstance(instance.batches.curvature, PerStep) else instance.batches.curvature)
    if isinstance(inner, PerStep) and isinstance(inner._batches, (list, tuple)):
        found += [leaf for batch in inner._batches[: instance.solver.max_steps] for leaf in tree.tensors(batch)]
    if estimator.adjoint_solver is None or isinstance(instance.problem.inner_loss, Pulled):
        found += tree.tensors(instance.inner)
    return [leaf.detach() for leaf in found if leaf.layout is torch.strided and not leaf.is_inference()]


def _admit(estimator: Estimator, instance: Instance) -> None:
    """Raise unless the estimator sees how x acts, and does without a state."""
    paths.check(estimator, instance)
    admission.check(estimator, instance)
    if estimator.init_state(instance) is not None:
        raise ValueError(
            f"solution() was given {estimator}, which carries a state from call to call, and a layer begins anew at "
            f"each cotangent. Use an estimator without one, such as Implicit(bilevel.CG(20)) or MemoryReduced() "
            f"without warm starts, or call hypergradient()"
        )


def _refuse(estimator: Estimator, inner: Tree | None, batches: Batches) -> None:
    """Raise ValueError where a gradient would be missing without a word."""
    if estimator.unlike_a_layer:
        raise ValueError(
            f"solution() was given {estimator}, which is no product with dy/dx: {estimator.unlike_a_layer}. Use it "
            f"with hypergradient(), or Unrolled() here"
        )
    given = given_in(dataclasses.replace(batches, outer=None))
    given += tree.tensors(None if isinstance(batches.curvature, PerStep) else batches.curvature)
    if any(leaf.requires_grad for leaf in given):
        raise ValueError(
            "solution() was given a batch with a tensor that requires grad, and would give it none: batches are "
            "constants. Put the tensor into outer, outer={'x': x, 'features': features}, and read it there in the "
            "loss; or pass its .detach()"
        )
    if any(leaf.grad_fn is not None for leaf in tree.tensors(inner)):
        raise ValueError(
            "solution() was given an inner start that was computed from tensors that require grad, and would give them "
            "none: the start is a constant. Put what it is computed from into outer and write Problem(..., init=lambda "
            "outer, batch: ...), or pass its .detach()"
        )


def _absent(inner: Tree, outer: Tree, batch: Any) -> Tensor:
    raise ValueError(
        "the inner dynamics asks for the gradient of the outer loss, and solution() was given an inner loss alone; "
        "pass a bilevel.Problem(inner_loss, outer_loss)"
    )
