"""SGD with momentum in whole numbers, which can be undone to the last bit.

A number a is held as round(a 2^bits) in 64 bits. Sums of whole numbers are undone by differences. The momentum n / d is
multiplied exactly: with a digit t taken from a store (base n) and one, r, given back to it (base d)

    v n + t = v' d + r,    0 <= t < n,  0 <= r < d

so that v' = floor((v n + t) / d), and (v', r) gives (v, t) again. The store is one large whole number per weight; it
grows by log2(d / n) bits a step, which is what the momentum forgets.
"""

import fractions
import math
from typing import Any

import torch
from torch import Tensor

_WORD = 16
"""Bits that leave the top of a store at once."""
_TOP = 1 << 62
_LARGEST = 1 << 30
"""Of a denominator."""


def ratio(momentum: float) -> fractions.Fraction:
    """n / d, the nearest fraction with d <= 2^30: the decimal that was meant, or close to it (2^-53, nearly always).

    Example:
        >>> ratio(0.9), abs(float(ratio(0.2**0.5)) - 0.2**0.5) < 1e-16
        (Fraction(9, 10), True)
    """
    return fractions.Fraction(momentum).limit_denominator(_LARGEST)


class Store:
    """What multiplications by n / d leave over, digit by digit, for each number of a tensor.

    Args:
        like: a tensor of whole numbers, of the shape of what is multiplied.
    """

    def __init__(self, like: Tensor) -> None:
        self._top, self._bound = torch.zeros_like(like), 1
        self._words: list[Tensor] = []
        self._past: list[tuple[int, bool]] = []

    @property
    def bits(self) -> float:
        """Bits that are held for each number."""
        return _WORD * len(self._words) + math.log2(self._bound)

    @property
    def nbytes(self) -> int:
        """Bytes that are held in all."""
        return sum(word.nbytes for word in self._words) + self._top.nbytes

    def multiply(self, v: Tensor, factor: fractions.Fraction) -> Tensor:
        """v n / d, rounded."""
        n, d = factor.numerator, factor.denominator
        before, bound = self._bound, -(-self._bound // n)
        low = (v % d).mul_(n).add_(self._top % n)
        top = self._top.floor_divide_(n)
        full = bound * d > _TOP
        if full:
            self._words.append(((top & 0xFFFF) - 0x8000).to(torch.int16))
            top, bound = top.bitwise_right_shift_(_WORD), -(-bound >> _WORD)
        self._top, self._bound = top.mul_(d).add_(low % d), bound * d
        self._past.append((before, full))
        return (v // d).mul_(n).add_(low.floor_divide_(d))

    def divide(self, v: Tensor, factor: fractions.Fraction) -> Tensor:
        """What was multiplied last."""
        n, d = factor.numerator, factor.denominator
        before, full = self._past.pop()
        low = (v % n).mul_(d).add_(self._top % d)
        top = self._top.floor_divide_(d)
        if full:
            top = top.bitwise_left_shift_(_WORD).bitwise_or_(self._words.pop().long() + 0x8000)
        self._top, self._bound = top.mul_(n).add_(low % n), before
        return (v // n).mul_(d).add_(low.floor_divide_(n))


class Scale:
    """Numbers as whole ones, and what became of those that do not fit.

    Args:
        bits: after the point.
    """

    def __init__(self, bits: int) -> None:
        self._factor, self._most = 2.0**bits, float(_TOP)
        self.lost: Any = False
        """Whether a number was not finite, or out of range: a 0-dim tensor once one was looked at."""

    def fixed(self, number: Tensor) -> Tensor:
        """round(a 2^bits)."""
        scaled = number.detach().double() * self._factor
        fits = scaled.abs() < self._most  # (not so of NaN)
        self._look(fits)
        return torch.where(fits, scaled, 0.0).round().to(torch.int64)

    def number(self, whole: Tensor) -> Tensor:
        """a in float64."""
        return whole.double() / self._factor

    def watched(self, whole: Tensor) -> Tensor:
        """The same whole numbers, which must lie in the range; sums of two that do never overflow."""
        self._look((whole < _TOP) & (whole > -_TOP))
        return whole

    def _look(self, fits: Tensor) -> None:
        self.lost = ~fits.all() | self.lost
