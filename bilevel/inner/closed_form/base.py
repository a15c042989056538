"""What closed forms share: the check that they land, and the solution of linear least squares.

A formula that does not belong to the inner loss would be differentiated by `Unrolled` as if it were its solution, and
estimators at the solution would differentiate a condition that y does not meet. So the inner gradient where a step
landed is held against the one beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.dynamics import Point
from bilevel.optim.base import gradients, spread, value_of
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree


def check_flag(owner: str, check: object) -> None:
    """Raise ValueError unless `check` is a bool."""
    if not isinstance(check, bool):
        raise ValueError(f"{owner} was given check={check!r}; True or False was needed")


def check_function(owner: str, name: str, function: object) -> None:
    """Raise TypeError unless an argument is a function."""
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{owner} was given {name}={function!r}; a function was needed")


def check_landed(owner: str, moved: Tree, at: Point) -> None:
    """Hold a closed form against the inner loss. Waits for a GPU; tensors without data pass.

    Raises:
        ValueError: the inner gradient is not zero where the step landed.
    """
    with torch.no_grad():
        here = tree.attach(moved)
        beside = tree.attach(tree.tree_map(lambda leaf: leaf + 1 + leaf.abs(), tree.detach(moved)))
        left, scale = (_size(at, point) for point in (here, beside))
        eps = max(torch.finfo(leaf.dtype).eps for leaf in tree.tensors(here))
        off = left > eps**0.5 * torch.maximum(scale, torch.full_like(scale, eps))
        if readable(off) and bool(off.any()):
            raise ValueError(
                f"{owner} landed where the inner gradient is {float(left.max()):.3g}, and beside it "
                f"{float(scale.max()):.3g}: its formula does not solve this inner loss. It must return the minimizer "
                f"of inner_loss(inner, outer, batch), with every term that the loss holds (a mean in place of a sum, "
                f"a regularizer, bilevel.proximal), and the loss must be quadratic in inner if the formula solves a "
                f"linear system"
            )


def _size(at: Point, point: Tree) -> Tensor:
    used = [leaf.detach() for leaf in gradients(at.gradient(point), point) if leaf is not None]
    return at.space.norm(used)


def least_squares(owner: str, residuals: Callable[..., Any], penalty: Any, inner: Tree, outer: Tree, at: Point) -> Tree:
    """The minimizer of |r(y)|^2 / 2 + sum of penalty y^2 / 2 for residuals that are linear in y, in float64.

    From P products J d, and one Cholesky factor of J'J + penalty of each task.
    """
    y, space = tree.tensors(inner), at.space
    count = 1 if space.tasks is None else space.tasks
    wide = torch.float32 if y[0].device.type == "mps" else torch.float64
    sizes = [leaf.numel() // count for leaf in y]
    columns = [
        _rows(at.pushforward(residuals, inner, tree.like(inner, unit)), count, wide) for unit in _units(y, sizes, count)
    ]
    jacobian = torch.stack(columns, dim=2)
    found = at.apply(_listed(residuals), inner)
    start = _rows(y, count, wide)
    # (The pull to zero is part of the gradient at y, too.)
    slope = (jacobian.mT @ _rows(found, count, wide).unsqueeze(2)).squeeze(2)
    matrix = jacobian.mT @ jacobian
    if penalty is not None:
        pull = _rows(_spread(penalty, inner, outer, count), count, wide)
        matrix, slope = matrix + torch.diag_embed(pull), slope + pull * start
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1)
    weak = pivots.amin(1) <= pivots.amax(1) * (len(pivots[0]) * torch.finfo(wide).eps) ** 0.5
    singular = (info != 0) | weak
    if readable(singular) and bool(singular.any()) and bool(matrix.isfinite().all()):
        raise ValueError(
            f"{owner} met {matrix.shape[-1]} unknowns that its residuals do not determine: J'J is singular to working "
            f"precision. Write bilevel.inner.Ridge(residuals, penalty=1e-6) with the same penalty in inner_loss, or "
            f"take another dynamics, whose start then decides"
        )
    step = torch.cholesky_solve(slope.unsqueeze(2), factor).squeeze(2)
    solved = torch.where(singular.unsqueeze(1), torch.nan, start - step)
    parts = zip(solved.split(sizes, dim=1), y, strict=True)
    return tree.like(inner, [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in parts])


def _spread(penalty: Any, inner: Tree, outer: Tree, count: int) -> Leaves:
    """The penalty as one number for each of y."""
    values = spread(value_of(penalty, outer), inner, "penalty")
    return tuple(
        torch.where(given < 0, torch.nan, given).expand(leaf.shape)
        for leaf, given in (
            (leaf, torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device))
            for leaf, value in zip(tree.tensors(inner), values, strict=True)
        )
    )


def _listed(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def listed(*arguments: Any) -> list[Tensor]:
        return tree.tensors(function(*arguments))

    return listed


def _units(y: list[Tensor], sizes: list[int], count: int) -> list[list[Tensor]]:
    """The unit vectors of one task, the same for all."""
    units = []
    for place, size in enumerate(sizes):
        for index in range(size):
            unit = [torch.zeros_like(leaf) for leaf in y]
            flat = torch.zeros(count, size, dtype=y[place].dtype, device=y[place].device)
            flat[:, index] = 1
            unit[place] = flat.reshape(y[place].shape)
            units.append(unit)
    return units


def _rows(leaves: Any, count: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([leaf.reshape(count, leaf.numel() // count).to(dtype) for leaf in leaves], dim=1)
