"""From where a task adapts: the start y_0 of what adapts, and how strongly the inner problem is pulled to it."""

import abc
import dataclasses
from typing import Any

from bilevel._strategy import Strategy
from bilevel.space.tree import Tree

Params = dict[str, Any]


class Start(Strategy):
    """Where a task begins. A frozen dataclass with `learned`, `pull` and `begin`.

    Example:
        A head that starts at zero, whatever x holds:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Zero(bl.meta.Start):
        ...     learned, pull = False, 0.0
        ...     def begin(self, own, outer, batch):
        ...         return {name: value * 0 for name, value in own.items()}
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> learner = bl.meta.Learner(net, torch.nn.functional.cross_entropy, adapts="1", start=Zero())
        >>> sorted(learner.outer()["parameters"])
        ['0.bias', '0.weight']
    """

    @property
    @abc.abstractmethod
    def learned(self) -> bool:
        """Whether the values of what adapts are part of x."""

    @property
    @abc.abstractmethod
    def pull(self) -> float:
        """The strength of the proximal term pull/2 |y - y_0|^2; 0 for none."""

    @abc.abstractmethod
    def begin(self, own: Params, outer: Tree, batch: Any) -> Params:
        """y_0 of one task.

        Args:
            own: the parameters that adapt, by name: x's where they are learned, the module's otherwise.
            outer: x.
            batch: the support, `(inputs, targets)`.
        """


def check_pull(owner: str, pull: Any) -> None:
    """Raise ValueError unless pull is a number of at least 0."""
    if isinstance(pull, bool) or not isinstance(pull, (int, float)) or not 0 <= pull < float("inf"):
        raise ValueError(f"{owner} was given pull={pull!r}; a number of at least 0 was needed, 0 for no proximal term")


@dataclasses.dataclass(frozen=True)
class Shared(Start):
    """Every task starts at x itself: MAML.

    Args:
        pull: strength of the proximal term pull/2 |y - x|^2, which makes the start visible to estimators that look at
            the solution only: implicit ones (iMAML) and corrected ones (2409.03682). 0 for none.

    Raises:
        ValueError: `pull` is negative.

    Example:
        >>> import bilevel as bl
        >>> bl.meta.Shared(pull=2.0).learned
        True
    """

    pull: float = 0.0

    def __post_init__(self) -> None:
        check_pull("Shared", self.pull)

    @property
    def learned(self) -> bool:
        return True

    def begin(self, own: Params, outer: Tree, batch: Any) -> Params:
        return own


@dataclasses.dataclass(frozen=True)
class Fixed(Start):
    """Every task starts at the module's own values, which are no part of x: the head of the released code of
    2412.12030, which stays at its random initialization.

    Args:
        pull: strength of the proximal term pull/2 |y - y_0|^2; 0 for none.

    Raises:
        ValueError: `pull` is negative.

    Example:
        >>> import bilevel as bl
        >>> bl.meta.Fixed().learned
        False
    """

    pull: float = 0.0

    def __post_init__(self) -> None:
        check_pull("Fixed", self.pull)

    @property
    def learned(self) -> bool:
        return False

    def begin(self, own: Params, outer: Tree, batch: Any) -> Params:
        return own
