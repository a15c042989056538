"""Jacobi's preconditioner: the diagonal of A, known or estimated.

    M = diag(1 / max(|a_ii|, floor max |a_ii|));      a ~ mean of z * (A z) over random signs z          (Hutchinson)

| | products with A | memory |
| --- | --- | --- |
| made once per operator | none where the operator knows its diagonal, else `probes` | P |
| each r -> M r | none | P |

Wins: variables on different scales (a bias beside a weight, an embedding that is rarely met).
Fails: curvature that is not along the axes; an estimate from few probes is off by the size of the rest of a row.
Reference: Bekas, Kokiopoulou and Saad 2007 for the estimate (recalled). Differences from peers: none has it for a
hypergradient.
"""

import dataclasses

import torch

from bilevel.linear.base import check_positive
from bilevel.linear.operator import LinearOperator, named
from bilevel.linear.preconditioners.base import Apply, Preconditioner
from bilevel.linear.system import scattered, widened
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class Jacobi(Preconditioner):
    """The inverse of the diagonal's absolute value.

    Args:
        probes: products for an estimate of the diagonal, where the operator does not know it; 0 refuses that.
        floor: entries below this share of the largest count as that.
        seed: of the signs; no generator is asked.

    Raises:
        ValueError: an argument is out of range; (when used) the diagonal is not known and probes is 0.

    Example:
        >>> import torch, bilevel as bl
        >>> d = torch.tensor([1000.0, 1.0, 10.0])
        >>> solver = bl.CG(max_steps=1, preconditioner=bl.linear.Jacobi(probes=1))
        >>> solver.solve(lambda v: (d * v[0],), (torch.ones(3),)).value[0]
        tensor([0.0010, 1.0000, 0.1000])
    """

    probes: int = 0
    floor: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.probes, int) or self.probes < 0:
            raise ValueError(f"Jacobi was given probes={self.probes!r}; an integer of at least 0 was needed")
        check_positive("Jacobi", "floor", self.floor)

    def prepare(self, operator: LinearOperator, space: Space, like: Leaves) -> Apply:
        known = operator.diagonal()
        if known is None and self.probes == 0:
            raise ValueError(
                f"Jacobi was given {named(operator)}, an operator that does not know its diagonal; write "
                f"Jacobi(probes=20) for an estimate by products with random signs, or define diagonal()"
            )
        if known is not None and [tuple(leaf.shape) for leaf in known] != [tuple(leaf.shape) for leaf in like]:
            raise ValueError(
                f"Jacobi was given {named(operator)}, whose diagonal() has the shapes "
                f"{[tuple(leaf.shape) for leaf in known]}; those of v, {[tuple(leaf.shape) for leaf in like]}, were "
                f"needed"
            )
        diagonal = tuple(
            leaf.abs() for leaf in widened(self._estimated(operator, space, like) if known is None else known)
        )
        least = space.largest(diagonal) * self.floor
        least = torch.where(least > 0, least, 1.0)
        inverse = tuple(1 / torch.maximum(leaf, space.per_task(least, leaf).to(leaf.dtype)) for leaf in diagonal)
        return lambda r: tuple(a * b for a, b in zip(inverse, r, strict=True))

    def _estimated(self, operator: LinearOperator, space: Space, like: Leaves) -> Leaves:
        total = tuple(torch.zeros_like(leaf) for leaf in widened(like))
        for probe in range(self.probes):
            drawn = scattered(widened(like), 1000 * self.seed + probe, space)
            signs = tuple(
                torch.where(each > 0, 1.0, -1.0).to(leaf.dtype) for each, leaf in zip(drawn, like, strict=True)
            )
            image = widened(operator.matvec(signs))
            total = tuple(a + b * z for a, b, z in zip(total, image, signs, strict=True))
        return tuple(leaf / self.probes for leaf in total)
