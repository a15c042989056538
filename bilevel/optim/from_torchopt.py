"""Any gradient transformation of TorchOpt as an inner optimizer.

    u, s <- transform.update(g, s, params=y);      y <- y + scale u

| | gradients | extra memory |
| --- | --- | --- |
| step | - | the transformation's own |

When it is made, the transformation is tried on a few numbers: it must leave what it is given as it is, answer the same
twice, and have the derivative that central differences have. Where it rests is not known unless `stationary` says so;
what that says is held against a step on the problem itself.

Wins: chains and schedules that TorchOpt has and this library has not.
Fails: a tensor that a loss does not use is refused, since whose state is whose is not known; an entry whose gradient is
always zero gets NaN from TorchOpt's roots (eps_root > 0 helps), reported as such; a rule that mixes entries needs
TaskMean(chunk=1), and is refused without.
Reference: TorchOpt 0.7, arXiv 2211.06934.
Differences from peers: its hyper-parameters are constants here; the length of the step may be learned, by `scale`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from bilevel.optim import trial
from bilevel.optim.base import Hyper, Optimizer, check_hyper, gradients, plus, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class FromTorchopt(Optimizer):
    """Steps of a TorchOpt gradient transformation, such as torchopt.adam(lr=0.1) or a torchopt.combine.chain(...).

    Args:
        transform: its `init` and `update`, functional (no torchopt.Adam, which holds parameters).
        scale: multiplies its update: a number, a tree of numbers like inner, or a function of outer that returns a
            number, a 0-dim tensor or a tree like inner.
        stationary: (grad, inner, outer) -> the tree that is zero where it rests, such as lambda grad, inner, outer:
            grad; None where that is not known.

    Raises:
        TypeError: `transform` has no `init` and `update`.
        ValueError: it does not pass its trial; in `step`, a tensor has no gradient.

    Example:
        One by hand, where torchopt is not installed:

        >>> import types, torch, bilevel as bl
        >>> down = types.SimpleNamespace(
        ...     init=lambda params: (),
        ...     update=lambda g, state, params=None, inplace=True: (tuple(-0.1 * each for each in g), state))
        >>> optimizer, y = bl.optim.FromTorchopt(down), torch.ones(2)
        >>> optimizer.step(torch.ones(2), optimizer.init(y), y, None)[0]
        tensor([0.9000, 0.9000])
    """

    transform: Any
    scale: Hyper = 1.0
    stationary: Callable[[Tree, Tree, Tree], Tree | None] | None = None

    foreign: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not all(callable(getattr(self.transform, name, None)) for name in ("init", "update")):
            raise TypeError(
                f"FromTorchopt was given {type(self.transform).__name__}; a gradient transformation with init and "
                f"update was needed, such as torchopt.adam(lr=0.1) (not torchopt.Adam, which holds parameters)"
            )
        check_hyper("FromTorchopt", "scale", self.scale, 0.0)
        if self.stationary is not None and not callable(self.stationary):
            raise TypeError(f"FromTorchopt was given stationary={self.stationary!r}; a function or None was needed")
        if isinstance(self.scale, (int, float)) and self.scale == 1:
            trial.check("FromTorchopt", self)
        else:
            dataclasses.replace(self, scale=1.0)

    def init(self, inner: Tree) -> Any:
        return self.transform.init(tuple(leaf.detach() for leaf in tree.tensors(inner)))

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        leaves, y = gradients(grad, inner), tuple(tree.tensors(inner))
        for leaf, name in zip(leaves, tree.names(inner), strict=True):
            if leaf is None:
                raise ValueError(
                    f"FromTorchopt was given no gradient for inner{name}, which the loss of a step does not use; all "
                    f"were needed. Leave it out of inner, or hand it to another optimizer with Groups"
                )
        updates, state = self.transform.update(tuple(leaves), state, params=y, inplace=False)
        scales = spread(value_of(self.scale, outer), inner, "scale")
        moved = [_moved(leaf, scale, update) for leaf, scale, update in zip(y, scales, updates, strict=True)]
        return tree.like(inner, moved), state

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return None if self.stationary is None else self.stationary(grad, inner, outer)


def _moved(y: Tensor, scale: Any, update: Tensor) -> Tensor:
    return plus(y, scale, update)
