"""How the perturbed inner problem is sampled: at which multiples of nu, with which weights, and how small nu is.

    psi'(0) = sum_j a_j psi(j nu) / nu + O(nu^p),   psi(nu) = dl_nu/dx

| scheme | order p | nodes j | weights a_j | inner solves |
| --- | --- | --- | --- | --- |
| "forward" or 1 | 1 | 0, 1 | -1, 1 | 2 |
| "symmetric" or 2 | 2 | -1, 1 | -1/2, 1/2 | 2 |
| 3 | 3 | -1, 0, 1, 2 | -1/3, -1/2, 1, -1/6 | 4 |
| 4 | 4 | -2, -1, 1, 2 | 1/12, -2/3, 2/3, -1/12 | 4 |

An even p needs p inner solves, an odd one p + 1, so that beyond p = 1 the even ones are the better bargain. References:
Chayti and Jaggi 2024, arXiv 2409.03682 (p = 1 and 2); Chen, Li, Chayti and Zhang, Faster Gradient Methods for
Highly-Smooth Stochastic Bilevel Optimization (any p). The weights are the textbook's: the derivative at 0 of the
polynomial through the points.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from bilevel.outcome import Hypergradient
from bilevel.space import tree
from bilevel.space.inner_product import Space

_ORDERS = {"forward": 1, "symmetric": 2}


@dataclasses.dataclass(frozen=True)
class Stencil:
    """The points of a finite difference at 0, in units of nu, nearest first.

    Args:
        nodes: multiples of nu.
        weights: of psi(j nu) / nu in the derivative; they sum to 0.
        shares: of psi(j nu) in the value at 0; they sum to 1.
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def others(self) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
        """Nodes, weights and shares of all but the first."""
        return self.nodes[1:], self.weights[1:], self.shares[1:]

    @property
    def reach(self) -> int:
        """The farthest node."""
        return max(map(abs, self.nodes))


def order_of(scheme: str | int) -> int:
    """The order p of a scheme.

    Raises:
        ValueError: it is neither "symmetric", "forward" nor a positive integer.
    """
    if isinstance(scheme, str) and scheme in _ORDERS:
        return _ORDERS[scheme]
    if isinstance(scheme, int) and not isinstance(scheme, bool) and scheme >= 1:
        return scheme
    raise ValueError(
        f"FirstOrderCorrected was given scheme={scheme!r}; one of {', '.join(map(repr, reversed(_ORDERS)))}, or the "
        f"order of a stencil as an integer of at least 1, was needed"
    )


@functools.cache
def stencil_of(order: int) -> Stencil:
    """The stencil of order p: central without the middle for an even p, from (1 - p) / 2 to (1 + p) / 2 for an odd one.

    Example:
        >>> stencil_of(2)
        Stencil(nodes=(1, -1), weights=(0.5, -0.5), shares=(0.5, 0.5))
    """
    low, high = (-(order // 2), order // 2) if order % 2 == 0 else ((1 - order) // 2, (1 + order) // 2)
    points = [j for j in range(low, high + 1) if j or order % 2]
    nodes = tuple(sorted(points, key=lambda j: (abs(j), -j)))
    # A polynomial through `points` has one degree less than one through 0 as well, but by symmetry the same derivative.
    through = nodes if 0 in nodes else (0, *nodes)
    return Stencil(
        nodes, tuple(float(_slope(j, through)) for j in nodes), tuple(float(_value(j, nodes)) for j in nodes)
    )


def _value(j: int, nodes: Sequence[int]) -> Fraction:
    """At 0, the polynomial that is 1 at j and 0 at the other nodes."""
    return math.prod((Fraction(-k, j - k) for k in nodes if k != j), start=Fraction(1))


def _slope(j: int, nodes: Sequence[int]) -> Fraction:
    """Its derivative at 0."""
    others = [k for k in nodes if k != j]
    total = Fraction(0)
    for left in others:
        total += math.prod((Fraction(-k, j - k) for k in others if k != left), start=Fraction(1, j - left))
    return total


def default_nu(dtype: torch.dtype, scheme: str | int) -> float:
    """The perturbation that balances truncation and rounding for losses and gradients of order one.

    eps^(1/(p + 1)), rounded to a power of ten: up for the two-point schemes, because noise from an inexact inner solve
    grows faster below than truncation does above, and down for higher orders, whose truncation grows faster. No side is
    farther than 0.1. Symmetric 1e-5 and forward 1e-7 in float64, 1e-2 and 1e-3 in float32, 0.1 in 16 bits; of order 4,
    1e-4, 1e-2 and 0.05. tests/bilevel/test_conformance.py and test_stencils.py hold them to the best of a grid.
    """
    order = order_of(scheme)
    balance = math.log10(torch.finfo(dtype).eps) / (order + 1)
    power = math.ceil(balance) if order <= 2 else math.floor(balance)
    return float(min(Fraction(10) ** power, Fraction(1, 10 * stencil_of(order).reach)))


def best_nu(
    delta: float, scheme: str | int = "symmetric", *, sensitivity: float = 1.0, truncation: float = 1.0
) -> float:
    """The perturbation that balances the accuracy of the inner solves and truncation.

        error <= sum_j |a_j| sensitivity delta / nu + truncation nu^p

    is smallest at nu = (sum_j |a_j| sensitivity delta / (p truncation))^(1 / (p + 1)), where it is of order delta^(p /
    (p + 1)): delta^(1/2) for "forward", delta^(2/3) for "symmetric". It is a bound: sides that start alike and take
    equally many steps share most of their error, and bear a smaller nu (`calibrated_nu` measures).

    Args:
        delta: how far an inner solution is from its minimizer, as a distance: at most |dg/dy| / mu.
        scheme: as for `FirstOrderCorrected`.
        sensitivity: how fast dg/dx changes with y; the strength of the pull on a `proximal` problem.
        truncation: C, where exact sides are off by C nu^p: |d^(p+1) psi / dnu^(p+1)| times 1/2, 1/6, 1/30 for p = 1, 2,
            4. The two constants are of order one where losses and curvatures are.

    Raises:
        ValueError: a number is not positive and finite, or the scheme is none.

    The rate of the symmetric scheme is that of arXiv 2409.03682; the formula follows from the bound, and is not quoted.

    Example:
        >>> import bilevel as bl
        >>> [round(bl.best_nu(1e-6, scheme), 5) for scheme in ("forward", "symmetric", 4)]
        [0.00141, 0.00794, 0.05186]
    """
    for name, value in (("delta", delta), ("sensitivity", sensitivity), ("truncation", truncation)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"best_nu was given {name}={value!r}; a positive number was needed")
    order = order_of(scheme)
    noise = sum(map(abs, stencil_of(order).weights)) * sensitivity * delta
    return float((noise / (order * truncation)) ** (1 / (order + 1)))


DECADES = tuple(10.0**-power for power in range(9))


def calibrated_nu(at: Callable[[float], Hypergradient], candidates: Sequence[float] = DECADES) -> float:
    """The perturbation where the estimate depends on it the least: measured, once, before training.

    Below it rounding and unfinished inner solves show, above it truncation; both move the estimate from one candidate
    to the next. It needs no constants, and knows about the scale of the losses, reduced precision inside of them, and
    the budget of the inner loop, all of which the default does not look at.

    Args:
        at: makes the hypergradient with a given nu. Random numbers must be the same each time (torch.manual_seed).
        candidates: from large to small; the search ends where noise has clearly taken over.

    Returns:
        One of the candidates, by default a power of ten. Candidates at which the estimate fails are passed over.

    Raises:
        ValueError: the candidates do not decrease, or the estimate fails at all but one of them.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: 1e-3 * (y**2 - x * y), lambda y, x, b: y**2 / 2)
        >>> def at(nu):
        ...     return bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=250.0), steps=50), estimator=bl.FirstOrderCorrected(nu))
        >>> nu = bl.calibrated_nu(at)
        >>> nu, round(at(nu).grad.item(), 4), at(1e-2).status.name  # float32's default
        (1e-05, 0.25, 'UNBOUNDED')
    """
    candidates = list(candidates)
    if candidates != sorted(set(candidates), reverse=True) or not all(nu > 0 for nu in candidates):
        raise ValueError(
            f"calibrated_nu was given candidates={candidates!r}; positive numbers from large to small were needed, "
            f"such as [1e-1, 1e-2, 1e-3]"
        )
    best, least, last = None, float("inf"), None
    for nu in candidates:
        found = at(nu)
        if not isinstance(found, Hypergradient):
            raise TypeError(
                f"calibrated_nu was given a function that returned {type(found).__name__}; the result of "
                f"bilevel.hypergradient was needed, whose status is looked at"
            )
        if found.status.failed or not bool(tree.finite(found.grad)):
            last = None
            continue
        grad = tree.tensors(found.grad)
        if last is not None:
            change = _relative(last[1], grad)
            if change < least:
                best, least = last[0], change
            elif change > _TAKEN_OVER * least:
                break  # further down both sides agree to the last digit, and nothing changes any more
        last = nu, grad
    if best is None:
        raise ValueError(
            f"calibrated_nu found no two neighbors among {candidates} at which the hypergradient is sound. Look at "
            f"at(nu).status: the inner loop may need more steps or a proximal term"
        )
    return best


_TAKEN_OVER = 30.0


def _relative(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    space = Space()
    size = torch.maximum(space.norm(one), space.norm(other))
    change = space.norm([a - b for a, b in zip(one, other, strict=True)])
    return float(change / size) if bool(size > 0) else float("inf")
