"""hypergradient(): the one entry point. Arguments are checked here and nowhere deeper."""

import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff, spans
from bilevel.estimators.base import Estimator, Instance
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Hypergradient, Status, code_if, worst
from bilevel.problem import Problem
from bilevel.space import tree
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
) -> Hypergradient:
    """Estimate dF/dx for F(x) = f(y*(x), x).

    Args:
        problem: the two losses.
        outer: x, a pytree of floating tensors of one device and dtype; not changed.
        inner: the start of y, a pytree likewise; not changed. None if the problem has `init`.
        batches: the data.
        solver: how y moves.
        estimator: how the hypergradient is estimated.
        state: `state` of this estimator's previous result, for warm starts.

    Returns:
        The hypergradient with its status. Failures of the computation are data: see `status` and `raise_if_failed`.

    Raises:
        TypeError, ValueError: an argument is not what is needed; the message says what to write.
        NotTwiceDifferentiableError: an operator in a loss lacks the second derivative that the estimator needs.

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
    _check_parts(problem, batches, solver, estimator)
    _check_variables(outer, inner, problem)
    _check_steps(batches, solver)
    instance = Instance(problem, tree.detach(outer), None if inner is None else tree.detach(inner), batches, solver)
    calls = spans.Calls()
    with torch.enable_grad(), spans.listen(calls):
        estimate = estimator.estimate(instance, state)
    xs, names = tree.tensors(instance.outer), tree.names(instance.outer)
    unused = [name for name, leaf in zip(names, estimate.grad, strict=True) if leaf is None]
    if unused:
        warnings.warn(
            f"outer variable {', '.join(unused)} influences neither loss: its hypergradient is zero. Is it used in "
            f"inner_loss or outer_loss, from the `outer` argument and not from a copy of it?",
            stacklevel=2,
        )
    given = {leaf.untyped_storage()._cdata for leaf in (*xs, *tree.tensors(instance.inner))}
    grad = _owned([leaf.detach() for leaf in autodiff.filled(estimate.grad, xs)], given)
    sound = tree.finite([*grad, estimate.outer_loss, estimate.inner_loss])
    return Hypergradient(
        grad=tree.like(instance.outer, grad),
        inner=tree.like(estimate.inner, _owned(tree.tensors(estimate.inner), given)),
        outer_loss=estimate.outer_loss,
        inner_loss=estimate.inner_loss.detach(),
        state=estimate.state,
        stats={"calls": calls.calls, **{name: value for name, value in estimate.stats.items() if value is not None}},
        code=_most_telling(estimate.code, code_if(~sound, Status.NONFINITE)),
    )


def _owned(leaves: list[Tensor], given: set[int]) -> list[Tensor]:
    """Tensors that may be changed in place: autograd returns expanded tensors and the same tensor twice, zero steps
    return the start itself.
    """
    seen, owned = set(given), list[Tensor]()
    for leaf in leaves:
        shared = leaf.untyped_storage()._cdata in seen or not leaf.is_contiguous()
        owned.append(leaf.clone(memory_format=torch.contiguous_format) if shared else leaf)
        seen.add(owned[-1].untyped_storage()._cdata)
    return owned


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


def _most_telling(code: Tensor | int, nonfinite: Tensor) -> Tensor:
    """The estimator's own failure explains a non-finite result better than NONFINITE does."""
    code = torch.as_tensor(code, device=nonfinite.device)
    return torch.where(code >= Status.NOT_CONTRACTIVE.code, code, worst(code, nonfinite))


def _check_parts(problem: Any, batches: Any, solver: Any, estimator: Any) -> None:
    for name, value, kind, write in (
        ("problem", problem, Problem, "bilevel.Problem(inner_loss, outer_loss)"),
        ("batches", batches, Batches, "bilevel.Batches(inner=..., outer=...)"),
        ("solver", solver, InnerSolver, "bilevel.Descent(bilevel.SGD(lr=0.1), steps=20)"),
        ("estimator", estimator, Estimator, "bilevel.Implicit(bilevel.CG(max_steps=10))"),
    ):
        if not isinstance(value, kind):
            given = f"the class {value.__name__} itself" if isinstance(value, type) else f"a {type(value).__name__}"
            raise TypeError(f"hypergradient() was given {given} as {name}; {write} was needed")


def _check_variables(outer: Tree, inner: Tree | None, problem: Problem) -> None:
    if inner is None and problem.init is None:
        raise ValueError(
            "hypergradient() was given inner=None and a problem without init, so y has no start. Pass the start as "
            "inner, or write Problem(..., init=lambda outer, batch: ...)"
        )
    if inner is not None and problem.init is not None:
        raise ValueError(
            "hypergradient() was given inner and a problem with init, which is one start too many. Pass inner=None, or "
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
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{variable} {name} has dtype {leaf.dtype}; only floating tensors can be differentiated. Convert "
                    f"it with .float(), or pass it in the batch"
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
