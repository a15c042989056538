"""The contract of a preconditioner: a linear map near the inverse of A, made once per operator."""

import abc
from collections.abc import Callable

from bilevel._strategy import Strategy
from bilevel.linear.operator import LinearOperator, versions
from bilevel.linear.system import widened
from bilevel.space.inner_product import Leaves, Space

Apply = Callable[[Leaves], Leaves]
"""r -> M r."""


class Preconditioner(Strategy):
    """How M near the inverse of A is made: symmetric and positive definite, whatever A is.

    Example:
        A preconditioner of the user's own:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Scale(bl.linear.Preconditioner):
        ...     by: float
        ...     def prepare(self, operator, space, like):
        ...         return lambda r: tuple(self.by * leaf for leaf in r)
        >>> bl.CG(preconditioner=Scale(0.5)).solve(lambda v: (2 * v[0],), (torch.ones(1),)).value[0]
        tensor([0.5000])
    """

    @abc.abstractmethod
    def prepare(self, operator: LinearOperator, space: Space, like: Leaves) -> Apply:
        """Make r -> M r for an operator, damping included.

        Args:
            operator: A + damping I.
            space: where r lives.
            like: tensors shaped like r, in the operator's dtype; r itself comes in float32 where that has 16 bits.
        """


Preconditioning = Preconditioner | Apply


def as_preconditioner(owner: str, given: object) -> None:
    """Raise TypeError unless `given` is a preconditioner, a function r -> M r, or None."""
    if given is not None and not isinstance(given, Preconditioner) and not callable(given):
        raise TypeError(
            f"{owner} was given preconditioner={type(given).__name__}; a preconditioner was needed, such as "
            f"bilevel.linear.Jacobi(), or a function r -> M r on tuples of tensors"
        )


def prepared_preconditioner(given: Preconditioning, operator: LinearOperator, space: Space, like: Leaves) -> Apply:
    """r -> M r, checked for its shapes, and that r is left as it is; in the dtype of r."""
    apply = given.prepare(operator, space, like) if isinstance(given, Preconditioner) else given
    shapes = [tuple(leaf.shape) for leaf in like]

    def checked(r: Leaves) -> Leaves:
        before = versions(r)
        image = apply(r)
        if before != versions(r):
            raise ValueError(
                "the preconditioner r -> M r changed r in place, which the solver goes on with; a new tuple of tensors "
                "was needed. Write (2 * r[0],), not (r[0].mul_(2),)"
            )
        found = [tuple(leaf.shape) for leaf in image] if isinstance(image, (tuple, list)) else type(image).__name__
        if found != shapes:
            raise ValueError(
                f"the preconditioner r -> M r returned {found}; a tuple of tensors like r, with the shapes {shapes}, "
                f"was needed. Write (M @ r[0],) with the comma"
            )
        return tuple(leaf.to(like.dtype) for leaf, like in zip(image, widened(r), strict=True))

    return checked
