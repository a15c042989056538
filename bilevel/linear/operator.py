"""What a linear solver is given: a linear map, known by its products."""

import abc
import dataclasses
from collections.abc import Callable

from bilevel.space.inner_product import PLAIN, Leaves, Space


class LinearOperator(abc.ABC):
    """A linear map A from the space of b to itself. Vectors are tuples of tensors shaped like b.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.linear.operator import LinearOperator
        >>> class Diagonal(LinearOperator):
        ...     symmetric = True
        ...     def __init__(self, d):
        ...         self.d = d
        ...     def matvec(self, v):
        ...         return (self.d * v[0],)
        ...     def diagonal(self):
        ...         return (self.d,)
        >>> bl.CG().solve(Diagonal(torch.tensor([2.0, 4.0])), (torch.ones(2),)).value[0]
        tensor([0.5000, 0.2500])
    """

    symmetric: bool = False
    """Whether A equals its transpose. Conjugate gradients need that."""

    @abc.abstractmethod
    def matvec(self, v: Leaves) -> Leaves:
        """A v."""

    def rmatvec(self, v: Leaves) -> Leaves:
        """A^T v; by default `matvec` of a symmetric A.

        Raises:
            NotImplementedError: A is not symmetric and the operator does not define its transposed product.
        """
        if self.symmetric:
            return self.matvec(v)
        raise NotImplementedError(
            f"{type(self).__name__} was asked for a product with its transpose, which it does not define; define "
            f"rmatvec(v), or set symmetric = True if A equals its transpose"
        )

    def diagonal(self) -> Leaves | None:
        """The diagonal of A, for preconditioners; None where it is not known."""
        return None


@dataclasses.dataclass(frozen=True)
class Product(LinearOperator):
    """The operator of a function v -> A v.

    Args:
        function: v -> A v, linear.
        symmetric: whether A equals its transpose, as Hessians do.
    """

    function: Callable[[Leaves], Leaves]
    symmetric: bool = True

    def matvec(self, v: Leaves) -> Leaves:
        image = self.function(v)
        given = [tuple(leaf.shape) for leaf in image] if isinstance(image, (tuple, list)) else type(image).__name__
        if given != [tuple(leaf.shape) for leaf in v]:
            raise ValueError(
                f"the function v -> A v returned {given}; a tuple of tensors like v, with the shapes "
                f"{[tuple(leaf.shape) for leaf in v]}, was needed. Write (A @ v[0],) with the comma"
            )
        return image


@dataclasses.dataclass(frozen=True)
class Shifted(LinearOperator):
    """A + shift I."""

    operator: LinearOperator
    shift: float
    space: Space = PLAIN

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    def matvec(self, v: Leaves) -> Leaves:
        return self.space.axpy(self.shift, v, self.operator.matvec(v))

    def rmatvec(self, v: Leaves) -> Leaves:
        return self.space.axpy(self.shift, v, self.operator.rmatvec(v))

    def diagonal(self) -> Leaves | None:
        known = self.operator.diagonal()
        return None if known is None else tuple(leaf + self.shift for leaf in known)


@dataclasses.dataclass(frozen=True)
class Transposed(LinearOperator):
    """A^T: what an adjoint system of a map that is not symmetric is solved with."""

    operator: LinearOperator

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    def matvec(self, v: Leaves) -> Leaves:
        return self.operator.rmatvec(v)

    def rmatvec(self, v: Leaves) -> Leaves:
        return self.operator.matvec(v)

    def diagonal(self) -> Leaves | None:
        return self.operator.diagonal()


def as_operator(given: LinearOperator | Callable[[Leaves], Leaves]) -> LinearOperator:
    """An operator as it is; a bare function v -> A v as a symmetric `Product`.

    Raises:
        TypeError: neither of both.
    """
    if isinstance(given, LinearOperator):
        return given
    if callable(given):
        return Product(given)
    raise TypeError(
        f"a linear solver was given {type(given).__name__} for A; a LinearOperator or a function v -> A v on tuples of "
        f"tensors was needed, such as lambda v: (matrix @ v[0],)"
    )
