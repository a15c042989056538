"""A Nystrom preconditioner: the large eigenvalues of A taken out by a low-rank model.

    M = (s_l + mu) Q diag(1 / (s + mu)) Q' + (I - Q Q')

| | products with A | memory |
| --- | --- | --- |
| made once per operator | rank | rank P, twice on the way |
| each r -> M r | none | 2 P |

Wins: a few large eigenvalues above a flat rest, as Hessians of nets have.
Fails: a slowly falling spectrum, where it costs its products and gains nothing.
Reference: Frangella, Tropp and Udell 2021, arXiv 2110.02820 (formula recalled). Differences from peers: none has it.
"""

import dataclasses

from bilevel.linear.base import check_number, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.preconditioners.base import Apply, Preconditioner
from bilevel.linear.sketch import joined, low_rank, split
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """The inverse of a low-rank model of A on its range, one elsewhere.

    Args:
        rank: l, products with A; at most P.
        shift: mu, added to the model's eigenvalues.
        seed: of the random combinations that the products are made of.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.diag(torch.tensor([100.0, 1.0, 1.0]))
        >>> solver = bl.CG(max_steps=2, preconditioner=bl.linear.NystromPreconditioner(rank=2))
        >>> solver.solve(lambda v: (A @ v[0],), (torch.ones(3),)).value[0].round(decimals=4)
        tensor([0.0100, 1.0000, 1.0000])
    """

    rank: int
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("NystromPreconditioner", "rank", self.rank)
        check_number("NystromPreconditioner", "shift", self.shift, 0.0)

    def prepare(self, operator: LinearOperator, space: Space, like: Leaves) -> Apply:
        model = low_rank(operator, like, space, self.rank, None, self.seed)
        there = model.values > 0
        # (The least of the values that are there; 1 where the model is empty.)
        least = (
            model.values.masked_fill(~there, float("inf")).amin(-1, keepdim=True)
            if model.values.numel()
            else model.values
        )
        least = least.masked_fill(least.isinf(), 1.0) + self.shift
        factors = least / (model.values + self.shift).masked_fill(~there, 1.0)

        def apply(r: Leaves) -> Leaves:
            along, rest = model.parts(joined(r, space))
            return split((model.basis @ (factors * along).unsqueeze(-1)).squeeze(-1) + rest, r, space)

        return apply
