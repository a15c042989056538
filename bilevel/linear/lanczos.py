"""The ends of a spectrum, from products alone: the smoothness of a loss from Hessian-vector products.

    q_1 = a random unit vector;   b_k q_{k+1} = A q_k - a_k q_k - b_{k-1} q_{k-1};   the ends of tridiag(a, b)

| | products | memory |
| --- | --- | --- |
| spectrum | one per step | 3 P, and k x k numbers after k steps |

Lanczos' iteration, the power iteration that does not forget: after k products its largest |eigenvalue| is at least that
of k steps of the power method from the same start (both never exceed the true one but by rounding), and it finds both
ends at once, which the power method cannot where they have one size. Nothing is orthogonalized again: copies of ends
that were found appear, and do no harm to the ends. References: Golub and Van Loan, Matrix Computations, chapter 10;
Paige 1980 for its stability.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import bound, check_positive, check_steps, epsilon
from bilevel.linear.operator import LinearOperator
from bilevel.space.inner_product import PLAIN, Leaves, Space

_CHECK_EVERY_ON_GPU = 5


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The ends of a spectrum: 0-dim tensors in float64, or of shape (tasks,).

    Attributes:
        lowest: the lowest eigenvalue found.
        highest: the highest.
        residual: A has an eigenvalue as near as this to `lowest`, and one as near to `highest`.
        steps: products made.
        converged: where the residual met the tolerance; False where a product was not finite, and the ends are NaN.
    """

    lowest: Tensor
    highest: Tensor
    residual: Tensor
    steps: int
    converged: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest |eigenvalue|: the smoothness L of a loss whose Hessian A is, at that point."""
        return torch.maximum(self.lowest.abs(), self.highest.abs())


def spectrum(
    operator: LinearOperator | Callable[[Leaves], Leaves],
    like: Leaves,
    *,
    space: Space = PLAIN,
    tol: float = 1e-3,
    max_steps: int = 50,
    seed: int = 0,
) -> Spectrum:
    """The lowest and the highest eigenvalue of a symmetric operator.

    They are those that a random start sees: lower bounds of the true |ends|, close to them with a probability that
    grows with the steps. A residual says that there is an eigenvalue within it, not that there is none beyond.

    Args:
        operator: A, or a function v -> A v of a symmetric A.
        like: tensors of the shapes, the dtype and the device of v.
        space: where v lives; Space(tasks=T) for T operators at once, with a leading task dimension on every leaf.
        tol: on the residual, relative to the largest |eigenvalue|; products go on until all tasks meet it.
        max_steps: the most products.
        seed: of the random start, drawn from a generator of its own.

    Raises:
        TypeError: `operator` is neither an operator nor a function, or `like` holds what is no floating tensor.
        ValueError: A is not symmetric, or an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> d = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
        >>> found = bl.linear.spectrum(lambda v: (d * v[0],), (d,))
        >>> found.lowest, found.highest, found.largest
        (tensor(-3.0000, dtype=torch.float64), tensor(2.0000, dtype=torch.float64), tensor(3.0000, dtype=torch.float64))
    """
    matrix = bound("spectrum", operator, symmetric=True)
    check_positive("spectrum", "tol", tol)
    check_steps("spectrum", "max_steps", max_steps)
    if not like or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in like):
        raise TypeError(f"spectrum was given like={like!r}; a tuple of floating tensors was needed, such as (y,)")
    if not any(leaf.numel() for leaf in like):
        raise ValueError("spectrum was given tensors without elements, on which there is no operator")
    q = _start(like, space, seed)
    past, between = space.zeros_like(like), None
    diagonal, off = list[Tensor](), list[Tensor]()
    every = _CHECK_EVERY_ON_GPU if like[0].is_cuda else 1
    for step in range(1, max_steps + 1):
        image = matrix.matvec(q)
        if between is not None:
            image = space.axpy(-between, past, image)
        along = _wide(space.dot(image, q))
        if between is not None:
            # Where the start has been used up, a number from inside the spectrum changes no end.
            along = torch.where(between > 0, along, diagonal[0])
        image = space.axpy(-along, q, image)
        length = space.norm(image).to(along.dtype)
        # (What rounding leaves of an image is nothing.)
        size = torch.stack([*(each.abs() for each in diagonal), along.abs(), *off]).amax(0)
        length = torch.where(length > epsilon(like) * size, length, 0.0)
        diagonal, off = [*diagonal, along], [*off, length]
        if step % every == 0 or step == max_steps:
            found = _ends(diagonal, off, tol, epsilon(like))
            # What is not finite does not become so.
            if step == max_steps or bool((found.converged | ~found.residual.isfinite()).all()):
                return found
        past, between = q, length
        q = space.scaled(torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0), image)
    raise AssertionError("the last step returns")


def _start(like: Leaves, space: Space, seed: int) -> Leaves:
    # (Each rank draws for its own part: the same on all would miss what is opposite on two of them.)
    generator = torch.Generator().manual_seed(seed if space.ranks is None else seed + 7919 * space.ranks.rank)
    drawn = tuple(torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in like)
    return space.scaled(1 / space.norm(drawn), drawn)


def _wide(number: Tensor) -> Tensor:
    # (Apple GPUs have no float64.)
    return number if number.device.type == "mps" else number.double()


def _ends(diagonal: list[Tensor], off: list[Tensor], tol: float, rounding: float) -> Spectrum:
    """The ends of the tridiagonal matrix, and the larger of their residuals."""
    a, b = torch.stack(diagonal, -1), torch.stack(off, -1)
    sound = (a.isfinite() & b.isfinite()).all(-1)
    a, b = torch.where(sound[..., None], a, 0.0), torch.where(sound[..., None], b, 0.0)
    matrix = torch.diag_embed(a)
    if a.shape[-1] > 1:
        matrix = matrix + torch.diag_embed(b[..., :-1], 1) + torch.diag_embed(b[..., :-1], -1)
    values, vectors = torch.linalg.eigh(matrix)
    lowest, highest = values[..., 0], values[..., -1]
    size = torch.maximum(lowest.abs(), highest.abs())
    # |A u - t u| of a Ritz pair (t, u) is the last off-diagonal number times the last entry of its vector.
    residual = b[..., -1] * torch.maximum(vectors[..., -1, 0].abs(), vectors[..., -1, -1].abs())
    nan = torch.full_like(size, float("nan"))
    return Spectrum(
        lowest=torch.where(sound, lowest, nan),
        highest=torch.where(sound, highest, nan),
        residual=torch.where(sound, residual, nan),
        steps=a.shape[-1],
        converged=sound & (residual <= max(tol, rounding) * size),
    )
