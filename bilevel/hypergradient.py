"""hypergradient(): the one entry point. Arguments are checked here and nowhere deeper."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff, shards, spans
from bilevel.engine.base import Derivatives, Engine
from bilevel.engine.eager import Eager
from bilevel.engine.split import split_over
from bilevel.engine.together import guarded, together
from bilevel.estimators.base import Estimator, Instance
from bilevel.estimators.run import estimated
from bilevel.estimators.state import State
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Hypergradient, Status, code_if, worst
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.shards import Sharding, spread
from bilevel.space.tree import Tree


def hypergradient(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    solver: InnerSolver,
    estimator: Estimator,
    state: Any = None,
    engine: Engine | None = None,
) -> Hypergradient:
    """Estimate dF/dx for F(x) = f(y*(x), x).

    Args:
        problem: the two losses.
        outer: x, a pytree of floating tensors of one device and dtype; not changed.
        inner: the start of y, a pytree likewise; not changed. None if the problem has `init`. DTensors if y is sharded
            over processes: all ranks then call this together, the losses receive DTensors, and so do the results
            `inner` and `next_inner`; `state` holds this rank's parts. See `bilevel.distributed.fully_sharded`.
        batches: the data.
        solver: how y moves.
        estimator: how the hypergradient is estimated.
        state: `state` of this estimator's previous result, for warm starts.
        engine: how derivatives are computed: `bilevel.Eager()` (the default), `bilevel.Compiled()`. All give the same
            numbers to rounding; what one of them did, and its cost, is in `stats["engine"]`.

    Returns:
        The hypergradient with its status. Failures of the computation are data: see `status` and `raise_if_failed`.

    Raises:
        TypeError, ValueError: an argument is not what is needed; the message says what to write.
        NotTwiceDifferentiableError: an operator in a loss lacks the second derivative that the estimator needs.
        NotTraceableError, EngineMismatchError: of an engine that traces; see `bilevel.Compiled`.

    Warns:
        UserWarning: an outer tensor influences nothing; its gradient is zero.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(
        ...     inner_loss=lambda y, x, batch: ((y - x["target"]) ** 2).sum(),
        ...     outer_loss=lambda y, x, batch: (y**2).sum() / 2,
        ... )
        >>> hg = bl.hypergradient(problem, {"target": torch.ones(2)}, torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled())
        >>> hg.grad
        {'target': tensor([1., 1.])}
    """
    check_kind("hypergradient", "estimator", estimator, Estimator, "bilevel.Implicit(bilevel.CG(max_steps=10))")
    sharding = Sharding.of("hypergradient", inner)
    if sharding is not None:
        return _on_parts(sharding, problem, outer, inner, batches, solver, estimator, state, engine)
    return _estimated(problem, outer, inner, batches, solver, estimator, state, engine, None)


def _on_parts(
    sharding: Sharding,
    problem: Problem,
    outer: Tree,
    inner: Tree,
    batches: Batches,
    solver: InnerSolver,
    estimator: Estimator,
    state: Any,
    engine: Engine | None,
) -> Hypergradient:
    """The hypergradient where each rank has a part of y: of DTensors, by way of their parts."""
    eager = engine is None or isinstance(engine, Eager)
    check_kind("hypergradient", "problem", problem, Problem, "bilevel.Problem(inner_loss, outer_loss)")
    shards.check("hypergradient", problem, (estimator, solver), eager=eager, split=split_over(problem) is not None)
    given = shards.Whole.of("hypergradient", outer, sharding)
    shards.check_same("the outer variables", given.plain, sharding.ranks, exact=True)
    posed, part = shards.posed(problem, sharding, given.spread), sharding.parts(inner)
    moves = shards.shared(solver, sharding.ranks)
    found = _estimated(posed, given.plain, part, batches, moves, estimator, state, engine, sharding.ranks)
    shards.check_same("the losses", [found.outer_loss, found.inner_loss], sharding.ranks)
    (code,) = sharding.ranks.largest([torch.as_tensor(found.code)])
    return dataclasses.replace(
        found,
        grad=given.like(shards.agreed(found.grad, sharding.ranks)),
        inner=sharding.joined(found.inner),
        next_inner=None if found.next_inner is None else sharding.joined(found.next_inner),
        code=code,
    )


def _estimated(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    solver: InnerSolver,
    estimator: Estimator,
    state: Any,
    engine: Engine | None,
    parts: Ranks | None,
) -> Hypergradient:
    ranks = split_over(problem)
    with estimator.company.guarded(), guarded(ranks, outer):
        check_arguments("hypergradient", problem, outer, inner, batches, solver)
        derivatives = opened("hypergradient", engine)
        start = None if inner is None else tree.detach(inner)
        instance = Instance(problem, tree.detach(outer), start, batches, solver, engine=derivatives, ranks=parts)
    calls = spans.Calls()
    given = estimator, solver, state
    with prepared(), spans.listen(calls), contextlib.ExitStack() as stack:
        with estimator.company.guarded():
            same = stack.enter_context(together("hypergradient", ranks, instance, given))
        estimate = estimated(estimator, instance, state)
        same([estimate.grad, estimate.inner, estimate.outer_loss, estimate.inner_loss])
    names = tree.names(instance.outer)
    if estimate.unused:
        warnings.warn(
            f"outer variable {', '.join(names[i] for i in sorted(estimate.unused))} influences neither loss: its "
            f"hypergradient is zero. Is it used in inner_loss or outer_loss, from the `outer` argument and not from a "
            f"copy of it?",
            stacklevel=3 if parts is None else 4,
        )
    xs = tree.tensors(instance.outer)
    own = Owned([*xs, *tree.tensors(instance.inner), *given_in(batches)])
    grad = own.leaves([leaf.detach() for leaf in autodiff.filled(estimate.grad, xs)])
    report = derivatives.report()
    sound = tree.finite([*grad, estimate.outer_loss, estimate.inner_loss])
    return Hypergradient(
        grad=tree.like(instance.outer, grad),
        inner=own.tree(estimate.inner),
        outer_loss=own.tensor(estimate.outer_loss.detach().mean()),
        inner_loss=own.tensor(estimate.inner_loss.detach().mean()),
        state=None if estimate.state is None else own.state(estimate.state),
        next_inner=None if estimate.next_inner is None else own.tree(tree.detach(estimate.next_inner)),
        stats={
            "calls": calls.calls,
            **{name: value for name, value in estimate.stats.items() if value is not None},
            **({"engine": report} if report else {}),
        },
        code=most_telling(estimate.code, code_if(~sound, Status.NONFINITE)),
    )


def opened(who: str, engine: Engine | None) -> Derivatives:
    """The derivatives of one call, as the engine computes them; raise TypeError unless it is one."""
    if engine is not None:
        check_kind(who, "engine", engine, Engine, "bilevel.Eager() or bilevel.Compiled()")
    if engine is not None and not isinstance(engine, Eager):
        with spans.span(spans.HIDDEN):
            pass
    return (engine or Eager()).open()


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """The modes in which derivatives are taken, whatever the caller's are.

    Inside an open autocast its cache of cast leaves is off: it would keep every y_k until the user's block ends.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def given_in(batches: Batches) -> list[Tensor]:
    """The tensors of the batches that are at hand (those of a PerStep are made when asked for)."""
    inner = [] if isinstance(batches.inner, PerStep) else tree.tensors(batches.inner)
    return [*inner, *tree.tensors(batches.outer)]


class Owned:
    """Tensors that may be changed in place: no result shares memory with an argument or with another result.

    autograd returns expanded tensors and the same tensor twice, zero steps return the start itself, a state holds the
    inner variable that is returned beside it.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        # (A sparse tensor of a batch has no storage of its own, and nothing that is returned is sparse.)
        self._seen = {
            leaf.untyped_storage()._cdata for leaf in given if leaf.layout is torch.strided and not spread(leaf)
        }

    def tensor(self, leaf: Tensor) -> Tensor:
        """The tensor, or a copy."""
        leaf = leaf.detach()
        shared = leaf.untyped_storage()._cdata in self._seen or not leaf.is_contiguous()
        owned = leaf.clone(memory_format=torch.contiguous_format) if shared else leaf
        self._seen.add(owned.untyped_storage()._cdata)
        return owned

    def leaves(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Likewise for several."""
        return [self.tensor(leaf) for leaf in leaves]

    def tree(self, value: Tree) -> Tree:
        """Likewise for the tensors of a tree."""
        return tree.tree_map(lambda leaf: self.tensor(leaf) if isinstance(leaf, Tensor) else leaf, value)

    def state(self, state: State) -> State:
        """Likewise for the fields of a state."""
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        owned = {
            name: self.state(value) if isinstance(value, State) else self.tree(value) for name, value in fields.items()
        }
        return dataclasses.replace(state, **owned)


def set_grad(outer: Tree, grad: Tree) -> None:
    """Put a copy of a hypergradient where torch.optim looks for it: into `.grad` of each outer tensor (replacing what
    is there).

    Args:
        outer: the tensors the optimizer was made with. A tensor that stands in it twice gets the sum of its two
            gradients.
        grad: a tree of the same structure and shapes.

    Raises:
        ValueError: structures or shapes differ, or a tensor of outer is no leaf that requires grad.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.zeros(2, requires_grad=True)
        >>> bl.set_grad(x, torch.ones(2)); x.grad
        tensor([1., 1.])
    """
    xs, gs = tree.tensors(outer), tree.aligned(grad, outer)
    if gs is None or [leaf.shape for leaf in xs] != [leaf.shape for leaf in gs]:
        raise ValueError(
            f"set_grad was given outer tensors of shapes {[tuple(leaf.shape) for leaf in xs]} and gradients of shapes "
            f"{[tuple(leaf.shape) for leaf in tree.tensors(grad)]}; the same tree was needed, such as set_grad(outer, "
            f"hg.grad)"
        )
    check_movable(outer)
    for x in xs:
        x.grad = None
    for x, g in zip(xs, gs, strict=True):
        g = g.detach().to(dtype=x.dtype, device=x.device)
        x.grad = g.clone(memory_format=torch.contiguous_format) if x.grad is None else x.grad + g


def check_movable(outer: Tree) -> None:
    """Raise ValueError unless every outer tensor is a leaf that requires grad, which is what an optimizer can move."""
    for name, x in zip(tree.names(outer), tree.tensors(outer), strict=True):
        if not (x.is_leaf and x.requires_grad):
            raise ValueError(
                f"outer {name} is no leaf that requires grad, so no optimizer can hold it; make it with "
                f"torch.tensor(..., requires_grad=True)"
            )


def most_telling(code: Tensor | int, nonfinite: Tensor) -> Tensor:
    """The estimator's own failure explains a non-finite result better than NONFINITE does."""
    code = torch.as_tensor(code, device=nonfinite.device)
    return torch.where(code >= Status.NOT_CONTRACTIVE.code, code, worst(code, nonfinite))


def check_arguments(who: str, problem: Any, outer: Tree, inner: Tree | None, batches: Any, solver: Any) -> None:
    """Raise TypeError or ValueError unless these arguments describe a bilevel problem that can be solved."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{who}() was called under torch.inference_mode(), where nothing has a gradient. Leave it out")
    check_kind(who, "problem", problem, Problem, "bilevel.Problem(inner_loss, outer_loss)")
    check_kind(who, "batches", batches, Batches, "bilevel.Batches(inner=..., outer=...)")
    check_kind(who, "solver", solver, InnerSolver, "bilevel.Descent(bilevel.SGD(lr=0.1), steps=20)")
    _check_variables(who, outer, inner, problem)
    for name, batch in (("Batches.inner", batches.inner), ("Batches.outer", batches.outer)):
        if any(leaf.is_inference() for leaf in tree.tensors(batch)):
            raise ValueError(_INFERENCE.format(name=name))
    _check_steps(batches, solver)


_INFERENCE = (
    "{name} was made under torch.inference_mode(), and such tensors cannot take part in derivatives. Make it under "
    "torch.no_grad() instead, or pass {name}.clone()"
)


def check_kind(who: str, name: str, value: Any, kind: type, write: str) -> None:
    """Raise TypeError unless `value` is a `kind`; `write` says what to write instead."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__} itself" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{who}() was given {given} as {name}; {write} was needed")


def _check_variables(who: str, outer: Tree, inner: Tree | None, problem: Problem) -> None:
    if inner is None and problem.init is None:
        raise ValueError(
            f"{who}() was given inner=None and a problem without init, so y has no start. Pass the start as "
            "inner, or write Problem(..., init=lambda outer, batch: ...)"
        )
    if inner is not None and problem.init is not None:
        raise ValueError(
            f"{who}() was given inner and a problem with init, which is one start too many. Pass inner=None, or "
            "leave init out"
        )
    seen: dict[tuple[torch.device, torch.dtype], str] = {}
    for variable, value in (("outer", outer), ("inner", inner)):
        if value is None and variable == "inner":
            continue
        leaves = tree.flatten(value)[0]
        if not leaves:
            raise ValueError(
                f"{variable} holds no tensors; a pytree of floating tensors was needed, such as "
                f"dict(model.named_parameters())"
            )
        for name, leaf in zip(tree.names(value), leaves, strict=True):
            if not isinstance(leaf, Tensor):
                hint = (
                    "; write dict(model.named_parameters())"
                    if isinstance(leaf, torch.nn.Module)
                    else f"; write torch.tensor({leaf!r})"
                    if isinstance(leaf, (int, float))
                    else ""
                )
                raise TypeError(
                    f"{variable} {name} is a {type(leaf).__name__}; a pytree of floating tensors was needed{hint}"
                )
            if spread(leaf):
                raise TypeError(
                    f"{who}() was given the DTensor {variable} {name}; plain tensors were needed. An inner variable "
                    f"that is sharded over processes is taken by hypergradient() and iterate(), where all of inner "
                    f"are DTensors"
                )
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{variable} {name} has dtype {leaf.dtype}; only floating tensors can be differentiated. Convert "
                    f"it with .float(), or pass it in the batch"
                )
            if leaf.is_inference():
                raise ValueError(_INFERENCE.format(name=f"{variable} {name}"))
            if leaf.layout is not torch.strided:
                raise TypeError(
                    f"{variable} {name} is a sparse tensor ({leaf.layout}); dense tensors were needed. Write "
                    f".to_dense()"
                )
            seen.setdefault((leaf.device, leaf.dtype), f"{variable} {name}")
    if len(seen) > 1:
        found = "; ".join(f"{where} is {dtype} on {device}" for (device, dtype), where in seen.items())
        raise ValueError(
            f"outer and inner mix devices or dtypes: {found}. Bring all of them to one with .to(device=..., dtype=...)"
        )


def _check_steps(batches: Batches, solver: InnerSolver) -> None:
    if not isinstance(batches.inner, PerStep):
        if hasattr(batches.inner, "__next__"):
            raise TypeError(
                "Batches.inner is an iterator, which can be read only once. Pass one batch, or "
                "PerStep(list(itertools.islice(loader, K)))"
            )
        return
    if not solver.fixed:
        raise ValueError(
            "Converge was given PerStep batches; whether the gradient is small is a question about one loss, so it "
            "needs one batch. Pass the whole data as Batches.inner, or use Descent(optimizer, steps)"
        )
    if len(batches.inner) < solver.max_steps or len(batches.inner) == 0:
        raise ValueError(
            f"PerStep holds {len(batches.inner)} batches and the inner solver takes {solver.max_steps} steps: one "
            f"batch a step is needed. Give it {max(solver.max_steps, 1)} batches, or lower steps"
        )
