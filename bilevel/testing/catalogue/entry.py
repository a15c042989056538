"""What is promised of one variant of an estimator, in a form that tests can hold it to."""

import dataclasses
import enum
from collections.abc import Callable

from torch import Tensor

import bilevel as bl
from bilevel.testing.catalogue.quadratic import Quadratic

Calls = dict[str, int]
EVERYWHERE = frozenset(bl.Path)
AT_SOLUTION = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.STATIONARITY})
GRADIENTS = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS})

TARGETS = ("program", "solution")
GROWTHS = ("constant", "sqrt", "linear")


class Need(enum.Enum):
    """What an estimator asks of a problem. The value names it in sentences and tables."""

    SECOND_DERIVATIVES = "second derivatives of the inner loss"
    SOLUTION = "inner steps that reach the solution"
    DEFINITE = "a positive definite Hessian there"
    FEW_OUTER = "few outer numbers"
    FEW_INNER = "few inner numbers"


@dataclasses.dataclass(frozen=True)
class Slope:
    """How a bias falls with a parameter: the error is of order parameter^order.

    Args:
        parameter: its name, for tables.
        order: of the error; negative where a large parameter is the accurate one.
        make: the estimator with a value of the parameter.
        values: where the slope is measured, from the least accurate on; between rounding and the next order.

    Example:
        >>> import bilevel as bl
        >>> Slope("nu", 2, lambda nu: bl.FirstOrderCorrected(nu), (0.1, 0.05)).order
        2
    """

    parameter: str
    order: float
    make: Callable[[float], bl.Estimator]
    values: tuple[float, ...]


def once(steps: int) -> int:
    """One run of the inner loop."""
    return steps


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant of an estimator and what is promised of it.

    Args:
        label: its name in tests and reports.
        estimator: the variant, with linear solves accurate enough for its target.
        target: "program" for the gradient of the K-step program, "solution" for that of the inner solution.
        calls: oracle calls as a function of (K, products of the linear solver), with a fixed number of steps K.
        memory: how peak memory grows with K at most: "constant", "sqrt" or "linear".
        sees: the paths of the outer variable that it follows; equals `estimator.sees`.
        definite: whether it needs a positive definite Hessian; None for those at the solution that make products.
        few_outer: whether its cost grows with Q, which `calls` then is given as its products.
        everyday: the same with the budgets of everyday use, for comparisons; None for the estimator itself.
        bias: what separates it from its target, as an order; None for nothing but rounding and unfinished solves.
        spending: the same variant with exactly so many products of its linear solver; None where it has none.
        quadratic_in_inner: whether it holds P x P numbers.
        on_quadratic: the closed form of what it returns on a quadratic, bias included (the mean, where it draws); None
            for that of its target.
        slope: how its bias falls.
        solves: inner gradients of its inner phase as a function of K: K where the inner loop is run once.
        settles: calls with the carried state, x standing still, until it is at its target.
        variance: E|g - mean|^2 of one call on a quadratic; None where nothing is drawn.

    Raises:
        ValueError: target or memory is none of the words above.

    Example:
        >>> from bilevel.testing.catalogue import by_label
        >>> entry = by_label("iterates")
        >>> entry.target, entry.memory, entry.calls(5, 0)["hvp"]
        ('program', 'linear', 5)
    """

    label: str
    estimator: bl.Estimator
    target: str
    calls: Callable[[int, int], Calls]
    memory: str
    sees: frozenset[bl.Path]
    bias: str | None = None
    spending: Callable[[int], bl.Estimator] | None = None
    quadratic_in_inner: bool = False
    on_quadratic: Callable[[Quadratic], Tensor] | None = None
    slope: Slope | None = None
    solves: Callable[[int], int] = once
    settles: int = 1
    variance: Callable[[Quadratic], Tensor] | None = None
    everyday: bl.Estimator | None = None
    definite: bool | None = None
    few_outer: bool = False

    def __post_init__(self) -> None:
        for name, value, words in (("target", self.target, TARGETS), ("memory", self.memory, GROWTHS)):
            if value not in words:
                raise ValueError(f"Entry {self.label!r} was given {name}={value!r}; one of {words} was needed")

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks of a problem, from what is promised of it."""
        spent, at_solution = self.calls(8, 3), self.target == "solution"
        second = any(spent.get(name, 0) for name in spent if not name.endswith("gradient"))
        definite = at_solution and spent.get("hvp", 0) > 0 if self.definite is None else self.definite
        asked = {
            Need.SECOND_DERIVATIVES: second,
            Need.SOLUTION: at_solution,
            Need.DEFINITE: definite,
            Need.FEW_OUTER: self.few_outer or self.variance is not None,
            Need.FEW_INNER: self.quadratic_in_inner,
        }
        return frozenset(need for need, there in asked.items() if there)

    @property
    def usual(self) -> bl.Estimator:
        """The estimator with the budgets of everyday use."""
        return self.estimator if self.everyday is None else self.everyday

    def at(self, products: int) -> bl.Estimator:
        """The variant with a budget of `products`, where it has a linear solver that takes one; else as it is."""
        return self.estimator if self.spending is None else self.spending(products)

    @property
    def exact(self) -> bool:
        """Whether it is the gradient of the K-step program to rounding."""
        return self.target == "program" and self.bias is None and self.variance is None

    def expected(self, quadratic: Quadratic) -> Tensor:
        """What it returns on a quadratic."""
        if self.on_quadratic is not None:
            return self.on_quadratic(quadratic)
        return quadratic.program() if self.target == "program" else quadratic.implicit(quadratic.last)


def counts(inner_gradient: int, outer_gradient: int, hvp: int, mixed: int) -> Calls:
    """Oracle calls by name."""
    return {"inner_gradient": inner_gradient, "outer_gradient": outer_gradient, "hvp": hvp, "mixed": mixed}
