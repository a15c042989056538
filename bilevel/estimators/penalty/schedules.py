"""How a penalty grows from call to call."""

import dataclasses

from bilevel.estimators.penalty.base import check_positive


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """start (k + 1)^power at call k, up to a limit.

    Args:
        start: at the first call.
        power: at least 0. F2SA's is 2/7 to 1/2 of the outer steps, MEHA's below 1/2, LV-HBA's toy has 0.3.
        limit: the most it grows to.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import bilevel as bl
        >>> growing = bl.estimators.Polynomial(start=10.0, power=0.5)
        >>> growing(0), growing(3)
        (10.0, 20.0)
    """

    start: float
    power: float
    limit: float = float("inf")

    def __post_init__(self) -> None:
        check_positive("Polynomial", "start", self.start)
        if not isinstance(self.power, (int, float)) or not 0 <= self.power < float("inf"):
            raise ValueError(f"Polynomial was given power={self.power!r}; a number of at least 0 was needed")
        if not isinstance(self.limit, (int, float)) or not self.limit >= self.start:
            raise ValueError(f"Polynomial was given limit={self.limit!r}; at least its start, {self.start}, was needed")

    def __call__(self, call: int) -> float:
        """The value at a call."""
        return min(self.start * float(call + 1) ** self.power, self.limit)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """From start to end in equal steps, and then constant: the ramp of PBGD.

    Args:
        start: at the first call.
        end: at call number `calls`, and after it.
        calls: at least 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import bilevel as bl
        >>> ramp = bl.estimators.Ramp(start=1.0, end=10.0, calls=9)
        >>> ramp(0), ramp(3), ramp(50)
        (1.0, 4.0, 10.0)
    """

    start: float
    end: float
    calls: int

    def __post_init__(self) -> None:
        check_positive("Ramp", "start", self.start)
        check_positive("Ramp", "end", self.end)
        if not isinstance(self.calls, int) or isinstance(self.calls, bool) or self.calls < 1:
            raise ValueError(f"Ramp was given calls={self.calls!r}; an integer of at least 1 was needed")

    def __call__(self, call: int) -> float:
        """The value at a call."""
        return self.start + (self.end - self.start) * min(call, self.calls) / self.calls
