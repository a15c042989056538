"""What a linear solver is given: a linear map, known by its products."""

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.space.inner_product import NARROW, PLAIN, Leaves, Space


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

    @property
    def transposable(self) -> bool:
        """Whether `rmatvec` is there: A is symmetric, or the operator defines it."""
        return self.symmetric or type(self).rmatvec is not LinearOperator.rmatvec

    @property
    def point(self) -> Leaves | None:
        """The y at which A is the Hessian of a loss, for preconditioners made there; None where it is not known."""
        return None


@dataclasses.dataclass(frozen=True)
class Product(LinearOperator):
    """The operator of a function v -> A v.

    Args:
        function: v -> A v, linear.
        symmetric: whether A equals its transpose, as Hessians do.
        transposed: v -> A' v, where A is not symmetric and a solver needs it.
        known_diagonal: the diagonal of A, for preconditioners.
    """

    function: Callable[[Leaves], Leaves]
    symmetric: bool = True
    transposed: Callable[[Leaves], Leaves] | None = None
    known_diagonal: Leaves | None = None

    def matvec(self, v: Leaves) -> Leaves:
        return like_given("the function v -> A v", self.function, v)

    def rmatvec(self, v: Leaves) -> Leaves:
        if self.transposed is not None:
            return like_given("the function v -> A' v", self.transposed, v)
        if self.symmetric:
            return self.matvec(v)
        raise NotImplementedError(
            "Product was asked for a product with its transpose, which it was not given; write "
            "Product(function, symmetric=False, transposed=function_of_the_transpose), or symmetric=True if A equals "
            "its transpose"
        )

    def diagonal(self) -> Leaves | None:
        return self.known_diagonal

    @property
    def transposable(self) -> bool:
        return self.symmetric or self.transposed is not None


def like_given(name: str, product: Callable[[Leaves], Leaves], v: Leaves) -> Leaves:
    """`product(v)`, held against v.

    Raises:
        ValueError: it is no tuple of tensors like v, or v was written to.
    """
    before = versions(v)
    image = product(v)
    if before != versions(v):
        raise ValueError(
            f"{name} changed v in place, which the solver goes on with; a new tuple of tensors was needed. Write "
            f"(2 * v[0],), not (v[0].mul_(2),)"
        )
    tensors = isinstance(image, (tuple, list)) and all(isinstance(leaf, Tensor) for leaf in image)
    given = [tuple(leaf.shape) for leaf in image] if tensors else type(image).__name__
    if given != [tuple(leaf.shape) for leaf in v]:
        raise ValueError(
            f"{name} returned {given}; a tuple of tensors like v, with the shapes "
            f"{[tuple(leaf.shape) for leaf in v]}, was needed. Write (A @ v[0],) with the comma"
        )
    for leaf, known in zip(image, v, strict=True):
        if leaf.dtype != known.dtype and not (known.dtype in NARROW and leaf.dtype == torch.float32):
            raise ValueError(
                f"{name} returned {leaf.dtype} for a v of {known.dtype}; the dtype of v was needed. Write "
                f"(A.to(v[0].dtype) @ v[0],)"
            )
    return image


def versions(leaves: Leaves) -> list[int]:
    """How often each tensor was written to."""
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class Held(LinearOperator):
    """An operator of the user's own, whose products are held against v."""

    operator: LinearOperator

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    def matvec(self, v: Leaves) -> Leaves:
        return like_given(f"{named(self)}.matvec(v)", self.operator.matvec, v)

    def rmatvec(self, v: Leaves) -> Leaves:
        return like_given(f"{named(self)}.rmatvec(v)", self.operator.rmatvec, v)

    def diagonal(self) -> Leaves | None:
        return self.operator.diagonal()

    @property
    def transposable(self) -> bool:
        return self.operator.transposable

    @property
    def point(self) -> Leaves | None:
        return self.operator.point


def named(operator: LinearOperator) -> str:
    """The name of an operator's class, as its author wrote it."""
    return type(operator.operator if isinstance(operator, Held) else operator).__name__


@dataclasses.dataclass(frozen=True)
class Rectangular(LinearOperator):
    """A map between two spaces, for LSMR and NormalCG: v and b need not have one shape.

    Args:
        function: v -> A v, linear.
        transpose: u -> A' u, on tensors shaped like b; their image has the shapes of v.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> operator = bl.linear.Rectangular(lambda v: (A @ v[0],), lambda u: (A.T @ u[0],))
        >>> bl.linear.LSMR(least_squares=True).solve(operator, (torch.ones(3),)).value[0].round(decimals=4)
        tensor([1.0000, 0.5000])
    """

    function: Callable[[Leaves], Leaves]
    transpose: Callable[[Leaves], Leaves]

    def matvec(self, v: Leaves) -> Leaves:
        return self.function(v)

    def rmatvec(self, v: Leaves) -> Leaves:
        return self.transpose(v)


@dataclasses.dataclass(frozen=True)
class Shifted(LinearOperator):
    """A + shift I; the shift is a number, or one number per task."""

    operator: LinearOperator
    shift: float | Tensor
    space: Space = PLAIN

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    def matvec(self, v: Leaves) -> Leaves:
        return self._shifted(v, self.operator.matvec(v))

    def rmatvec(self, v: Leaves) -> Leaves:
        return self._shifted(v, self.operator.rmatvec(v))

    def _shifted(self, v: Leaves, image: Leaves) -> Leaves:
        if [leaf.shape for leaf in image] != [leaf.shape for leaf in v]:
            raise ValueError(
                f"A + damping I was asked for with damping={self.shift}, but A maps tensors of the shapes "
                f"{[tuple(leaf.shape) for leaf in v]} to {[tuple(leaf.shape) for leaf in image]}: only a square A can "
                f"be damped. Write damping=0, and append the damping's root as rows of A"
            )
        return self.space.axpy(self.shift, v, image)

    def diagonal(self) -> Leaves | None:
        known = self.operator.diagonal()
        if known is None or not isinstance(self.shift, Tensor):
            return None if known is None else tuple(leaf + self.shift for leaf in known)
        return tuple(leaf + self.space.per_task(self.shift, leaf).to(leaf.dtype) for leaf in known)

    @property
    def transposable(self) -> bool:
        return self.operator.transposable

    @property
    def point(self) -> Leaves | None:
        return self.operator.point


@dataclasses.dataclass(frozen=True)
class Transposed(LinearOperator):
    """A^T: what an adjoint system of a map that is not symmetric is solved with."""

    operator: LinearOperator

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", as_operator(self.operator))

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    def matvec(self, v: Leaves) -> Leaves:
        return self.operator.rmatvec(v)

    def rmatvec(self, v: Leaves) -> Leaves:
        return self.operator.matvec(v)

    def diagonal(self) -> Leaves | None:
        return self.operator.diagonal()

    @property
    def transposable(self) -> bool:
        return True

    @property
    def point(self) -> Leaves | None:
        return self.operator.point


def as_operator(given: LinearOperator | Callable[[Leaves], Leaves]) -> LinearOperator:
    """An operator, one of the user's own as `Held`; a bare function v -> A v as a symmetric `Product`.

    Raises:
        TypeError: neither of both.
    """
    if isinstance(given, LinearOperator):
        return given if type(given).__module__.startswith("bilevel.") else Held(given)
    if callable(given):
        return Product(given)
    raise TypeError(
        f"a linear solver was given {type(given).__name__} for A; a LinearOperator or a function v -> A v on tuples of "
        f"tensors was needed, such as lambda v: (matrix @ v[0],)"
    )
