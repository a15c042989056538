"""What the files of other libraries share: our problem and our inner solver in the terms that most of them have."""

from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree


def descent(package: str, solver: bl.InnerSolver, *known: type[bl.Optimizer]) -> tuple[Any, int]:
    """The optimizer and the number of steps of an inner solver that another library can follow.

    Args:
        package: which library, for the message.
        solver: any inner solver.
        known: the optimizers that it has.

    Raises:
        ValueError: it is not a fixed number of steps of one of these.

    Example:
        >>> import bilevel as bl
        >>> descent("higher", bl.Descent(bl.SGD(lr=0.1), steps=3), bl.SGD)[1]
        3
    """
    update = solver.dynamics.update
    if not isinstance(solver, bl.Descent) or type(update) not in known:
        names = " or ".join(f"bl.{each.__name__}" for each in known)
        raise ValueError(f"{package} has no {solver!r}; it takes bl.Descent with {names}")
    return update, solver.steps


def value(package: str, optimizer: bl.Optimizer, name: str, hyper: Any, outer: Any) -> float | Tensor:
    """A hyper-parameter: a number, or what a function of x gives, which must be a 0-dim tensor.

    Raises:
        ValueError: it is one number for each tensor.
    """
    found = hyper(outer) if callable(hyper) else hyper
    if isinstance(found, (int, float)) or (isinstance(found, Tensor) and found.dim() == 0):
        return found
    raise ValueError(
        f"{package} has one {name} for all tensors of the inner variable, and {type(optimizer).__name__} was given one "
        f"for each"
    )


def number(package: str, optimizer: bl.Optimizer, name: str, hyper: Any) -> float:
    """A hyper-parameter that is a number.

    Raises:
        ValueError: it is a function of x, or one number for each tensor.
    """
    if isinstance(hyper, (int, float)):
        return hyper
    raise ValueError(
        f"{package} takes a plain number as {name}, and {type(optimizer).__name__} was given "
        f"{'a function of outer' if callable(hyper) else f'a {type(hyper).__name__}'}"
    )


def start(problem: bl.Problem, outer: Any, inner: Any, batches: bl.Batches) -> Any:
    """y_0: with its graph in x where the problem has an init, else leaves that require grad."""
    if problem.init is None:
        return tree.attach(inner)
    begun = problem.init(outer, batches.inner_at(0))
    # init may return x itself: y and x must be told apart.
    return tree.tree_map(
        lambda leaf: leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_(), begun
    )


def finished(problem: bl.Problem, outer: Any, batches: bl.Batches, inner: Any, steps: int) -> bl.Hypergradient:
    """The hypergradient by one backward pass from the outer loss at y_K, whose graph leads to x."""
    loss, leaves = problem.outer(inner, outer, batches.outer), tree.tensors(outer)
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    at = tree.attach(inner)  # a loss may take a gradient of its own
    last = problem.inner(at, tree.detach(outer), batches.inner_at(max(steps - 1, 0)))
    return bl.Hypergradient(tree.like(outer, found), tree.detach(inner), loss.detach(), last.detach())
