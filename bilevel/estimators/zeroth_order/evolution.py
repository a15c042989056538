"""Evolution strategies: the gradient of a smoothed objective from its values alone, in antithetic pairs.

    dF/dx ~ 1/N sum_i e_i (F(x + s e_i) - F(x - s e_i)) / (2 s),    e_i ~ N(0, I),    F(x) = f(y_K(x), x)

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| EvolutionStrategies(pairs=N) | (2 N + 1) K | 0 | 0 | 2 P + 3 Q, independent of K and N |

Wins: the inner solver is a black box (no derivative at all is taken of f or in x); chaotic or long inner loops; x is
    small.
Fails: x is large: E|estimate - mean|^2 = (Q + 1) / N |dF/dx|^2 where F is linear or quadratic.
Reference: Rechenberg 1973; Salimans et al. 2017, arXiv 1703.03864; for optimizers, Metz et al. 2019, arXiv 1810.10180.
Differences from peers: all 2 N + 1 programs see the same batches and random numbers, so that only x differs between
them; the unperturbed program is run as well, whose y and losses are those that are reported.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.zeroth_order.base import (
    Digits,
    added,
    check_count,
    check_width,
    directions,
    narrowed,
    run_at,
    shifted,
)
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class EvolutionStrategies(Estimator):
    """Antithetic evolution strategies on the K-step program.

    Bias: the mean is the gradient of E F(x + std e), which is that of F up to O(std^2); none where F is quadratic.
        Rounding of x and of F over std: stats["digits"] says what that leaves, and below one digit the
        status (DIGITS_LOST).

    Args:
        std: s, in the units of x.
        pairs: N, antithetic pairs.

    With tasks, those of one chunk share their directions.

    Memory: independent of K and N: y, its optimizer's state, and x, a direction and the sum; linear in T.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y**2 - x * y).sum(), lambda y, x, b: (y**2).sum() / 2)
        >>> seed = torch.manual_seed(0)
        >>> hg = bl.hypergradient(problem, torch.ones(1), torch.zeros(1), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4),
        ...     estimator=bl.estimators.EvolutionStrategies(std=0.1, pairs=500))
        >>> round(hg.grad.item(), 1)  # 0.2197
        0.2
    """

    std: float = 0.01
    pairs: int = 1

    def __post_init__(self) -> None:
        check_width("EvolutionStrategies", "std", self.std)
        check_count("EvolutionStrategies", "pairs", self.pairs)

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "unbiased for the smoothed objective, off by O(std^2) from the program; random, of variance about Q / N"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        drawn = instance.oracles.generators.peek()
        here = run_at(instance)
        after = instance.oracles.generators.peek()
        total: list[Tensor | None] = [None] * len(tree.tensors(instance.outer))
        codes, digits = [here.code], Digits(instance)
        for _ in range(self.pairs):
            instance.oracles.generators.set(after)
            (direction,) = directions(instance, 1)
            after = instance.oracles.generators.peek()
            digits.moved(self.std, direction)
            above, below = (run_at(shifted(instance, s, direction), draws=drawn) for s in (self.std, -self.std))
            added(total, (above.outer_loss - below.outer_loss) / (2 * self.std * self.pairs), direction)
            codes += [above.code, below.code]
            for side in (above, below):
                digits.differed([side.outer_loss - here.outer_loss], [here.outer_loss], here.eps)
        instance.oracles.generators.set(after)
        left, rounded = digits.left(still=False)
        return instance.finish(
            here.found,
            narrowed(total, instance),
            here.outer_loss,
            codes=[*codes, rounded],
            stats={"digits": left},
        )
