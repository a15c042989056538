"""The processes that compute one thing together: the pool that tests run on, and sums over ranks inside a loss."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.distributed import Ranks
from bilevel.engine.collectives import total, vary

ROWS = 8


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((ROWS, 3), (3,), (3,)))  # type: ignore[return-value]


def loss(y: dict[str, Tensor], rows: Tensor) -> Tensor:
    return (rows @ y["a"] + y["b"]).sin().square().sum() / ROWS


def split(y: dict[str, Tensor], ranks: Ranks, rows: Tensor) -> Tensor:
    mine = rows[ranks.rank :: ranks.size]
    return total(ranks, loss(vary(ranks, y), mine))[0]


def derivatives(function: Any, y: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    y = {name: leaf.clone().requires_grad_() for name, leaf in y.items()}
    value = function(y)
    (gradient,) = torch.autograd.grad(value, [y["a"]], create_graph=True)
    product, mixed = torch.autograd.grad(gradient @ v, [y["a"], y["b"]], create_graph=True)
    (third,) = torch.autograd.grad(product @ v, [y["a"]])
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(function({**y, "a": forward_ad.make_dual(y["a"].detach(), v)})).tangent
    rows = torch.stack([y["a"].detach(), v])
    mapped = torch.func.vmap(lambda a: torch.func.grad(lambda a: function({**y, "a": a}))(a))(rows)
    found = {"value": value, "gradient": gradient, "product": product, "mixed": mixed, "third": third, "pushed": pushed}
    return {name: leaf.detach() for name, leaf in {**found, "mapped": mapped}.items()}


def derivatives_split(ranks: Ranks) -> dict[str, Tensor]:
    rows, a, v = data()
    return derivatives(lambda y: split(y, ranks, rows), {"a": a, "b": torch.ones((), dtype=torch.float64)}, v)


# (Of torch's own file, when a dual number is made for the first time.)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_loss_that_is_summed_over_ranks_has_the_derivatives_of_the_sum(ranks: Any, count: int) -> None:
    rows, a, v = data()
    whole = derivatives(lambda y: loss(y, rows), {"a": a, "b": torch.ones((), dtype=torch.float64)}, v)
    for found in ranks.run(count, derivatives_split):
        for name, leaf in whole.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-13, atol=1e-13, msg=name)


def fails_on_the_last(ranks: Ranks) -> None:
    error = KeyError("mine") if ranks.rank == ranks.size - 1 else None
    ranks.agree(error, "the sum")


def test_a_failure_of_one_rank_is_an_error_on_all(ranks: Any) -> None:
    first, last = ranks.run(2, fails_on_the_last)
    assert (first.kind, last.kind) == ("RankError", "KeyError")
    assert "rank 1" in first.message
    assert "mine" in first.message


def test_without_a_group_it_is_said_what_to_start() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        _ = Ranks().size
