"""Backpropagation through the inner loop with a fixed number of snapshots, placed so that the fewest steps run again.

    t(K, c) = r K - C(c + r, c + 1),    r the least number with C(c + r, c) >= K

t counts the steps that are moved through once more, or for the first time, on the way to the tape of each step: all
steps of the forward pass but the last, and those from a snapshot to the step that is differentiated next. The last step
of the forward pass, which ends at y_K, and the K steps whose tape is built are not in it.

| | inner gradients | HVPs | mixed | memory, S = P + optimizer state |
| --- | --- | --- | --- | --- |
| Revolve(c) | t(K, c) + 1 + K | K, each with its mixed product | - | (c + 1) S + one tape |

(K, c) and t: (10, 3) 15; (20, 3) 45; (60, 5) 156; (100, 5) 316; (100, 10) 222; (1000, 10) 3636. With c >= K it is
Unrolled("iterates"), with c = 1 every step runs again from the start.

Wins: K is long and S, not the tape, fills the memory: the peak is chosen, and the price is the least for it.
Fails: K is short, or there is room for sqrt(2 K) iterates: Unrolled("segments") runs no step more than twice.
Reference: Griewank and Walther 2000, ACM TOMS algorithm 799 (recalled; the counts are held against the recursion).
Differences from peers: random numbers, batches and the optimizer's state are replayed; none of the libraries compared
has the schedule.
"""

import dataclasses

from torch import Tensor

from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.reverse.checkpoints import Checkpoints
from bilevel.estimators.reverse.plans import Binomial
from bilevel.estimators.reverse.sweep import run
from bilevel.estimators.reverse.terms import Terms
from bilevel.estimators.state import State
from bilevel.inner.descent import Descent


@dataclasses.dataclass(frozen=True)
class Revolve(Estimator):
    """Backpropagate through the inner loop from a fixed number of snapshots.

    Args:
        snapshots: c, iterates kept at once (with the optimizer's state), the start among them; one more is in hand.
        offload: whether snapshots wait in pinned memory of the host, on CUDA.

    Stats: as of `Unrolled`: `cotangent_growth`, `digits`, `cotangent_left`.

    Bias: none; the gradient of the K-step program to rounding.

    Memory: (c + 1) S + one tape of a differentiable step: constant in K, independent of Q but for one copy, linear in
        T. Where losses draw random numbers, one state of the generator (5 KB) a snapshot.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.estimators.Revolve(snapshots=2))
        >>> hg.grad, hg.stats["calls"]["inner_gradient"]  # t(4, 2) = 4
        (tensor(0.2197), 9)
    """

    snapshots: int
    offload: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.snapshots, int) or isinstance(self.snapshots, bool) or self.snapshots < 1:
            raise ValueError(f"Revolve was given snapshots={self.snapshots!r}; an integer of at least 1 was needed")
        if not isinstance(self.offload, bool):
            raise ValueError(f"Revolve was given offload={self.offload!r}; True or False was needed")

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return ""

    def estimate(self, instance: Instance, state: State | None) -> Estimate:
        return run(instance, self._trajectory).estimate(instance)

    def _trajectory(
        self, instance: Instance, program: Descent, first: int, masks: list[Tensor] | None, terms: Terms
    ) -> Checkpoints:
        return Checkpoints(instance, program, Binomial(self.snapshots), masks, terms, offload=self.offload)
