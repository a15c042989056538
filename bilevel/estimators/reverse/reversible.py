"""SGD with momentum run backwards: no iterate is kept, each is computed again from the next, to the last bit.

    forward     v <- mu v + (1 - dampening) d,    y <- y - lr v,           d = dg/dy + weight_decay y
    backward    y <- y + lr v,    v <- (v - (1 - dampening) d) / mu,       and the step's VJP at the y that was

All of y and v are whole numbers, round(a 2^bits); mu is a fraction n / d, and what the multiplication by it leaves over
goes into a store of log2(d / n) bits a weight and step (bilevel.estimators.reverse.fixed_point): 0.152 for mu = 0.9,
210 times less than a float32 iterate a step. The start must come back bit by bit, which is looked at in every call.

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| Reversible() | 3 K | K, each with its mixed product | - | 24 P bytes + 0.125 log2(1 / mu) P K bytes + one tape |

Wins: SGD with a large momentum and K in the thousands: 16 P bytes of history for K = 1000 steps of mu = 0.9.
Fails: Adam, clipping, plain SGD, Nesterov's form (refused); gradients that differ from call to call in their last bit
(Status.IRREVERSIBLE); numbers out of +-2^(62 - bits).
Reference: Maclaurin, Duvenaud and Adams 2015, arXiv 1502.03492, sections 2.3 and 2.4, whose step has (1 - mu) on the
gradient: SGD(dampening=mu) here.
Differences from peers: the authors' code holds a Python number per weight; here a store is a tensor of 64-bit tops and
16-bit words, the digit is taken before the multiplication, so that no rounding is larger than one unit, and the
hyper-parameters' derivatives are those of the step itself, by its VJP.
"""

import dataclasses
import fractions
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.cotangents import Cotangents
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.replay import State as Random
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.reverse.fixed_point import Scale, Store, ratio
from bilevel.estimators.reverse.growth import Growth
from bilevel.estimators.state import State
from bilevel.inner.loop import run
from bilevel.optim.base import coupled, gradients, off, spread, value_of
from bilevel.optim.sgd import SGD
from bilevel.outcome import Status, code_if
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Reversible(Estimator):
    """Backpropagate through SGD with momentum by running it backwards.

    Args:
        bits: after the point, of the whole numbers that stand for y and its momentum: their resolution is 2^-bits,
            their range +-2^(62 - bits). y, its momentum and every step must lie in it.

    lr, dampening and weight decay may be functions of outer, momentum too, one number per tensor: it is taken as the
    nearest fraction with a denominator d of at most 2^30, 0.9 as 9 / 10.

    Stats: `history_bits`, bits kept a weight and step; `history_bytes`, in all; `cotangent_growth`, `digits` and
        `cotangent_left` as of `Unrolled`.

    Bias: none; the gradient of the K-step program at iterates that are rounded to 2^-bits at every step.

    Memory: three 64-bit numbers a weight, log2(1 / momentum) bits a weight and step (the first 62, less some 2 log2(d),
        are in the third number), some five P for the step, and one tape; linear in T. Where losses draw random numbers,
        one state of the generator (5 KB) a step.

    Status: IRREVERSIBLE where the start did not come back bit by bit, or a number left the range.

    Raises:
        ValueError: `bits` is out of range; (when used) the inner solver is no `Descent` of `SGD` with a momentum
            between 0 and 1 and without nesterov.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> arguments = problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None)
        >>> solver = bl.Descent(bl.SGD(lr=0.05, momentum=0.9), steps=100)
        >>> hg = bl.hypergradient(*arguments, solver=solver, estimator=bl.estimators.Reversible())
        >>> exact = bl.hypergradient(*arguments, solver=solver, estimator=bl.Unrolled())
        >>> torch.allclose(hg.grad, exact.grad, rtol=1e-4), hg.status.name
        (True, 'OK')
    """

    bits: int = 48

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 16 <= self.bits <= 56:
            raise ValueError(f"Reversible was given bits={self.bits!r}; an integer from 16 to 56 was needed")

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "linear"

    @property
    def bias(self) -> str:
        return ""

    def estimate(self, instance: Instance, state: State | None) -> Estimate:
        optimizer = _checked(instance)
        oracles, steps = instance.oracles, instance.solver.max_steps
        start = oracles.start()
        if steps and not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn before the first step, which is rebuilt without drawing it again
        with spans.span(spans.INNER):
            machine = _Machine(oracles, optimizer, self.bits, start)
            before = oracles.generators.peek()
            found = run(instance.solver, machine, machine.inner(), oracles.point, steady=instance.steady)
            found = instance.seen(found, drew=not oracles.generators.same(before, oracles.generators.peek()))
        with spans.span(spans.HYPERGRADIENT):
            loss, slope, direct = oracles.outer_gradient(found.inner)
            growth = Growth(oracles.space, steps)
            growth.enter(steps, list(slope))
            bits, held = machine.history()
            after = oracles.generators.peek()
            grad = tree.accumulate(direct, self._back(instance, machine, Cotangents(list(slope), None), growth))
            oracles.generators.set(after)
            figures = growth.figures() | {"history_bits": bits / max(steps, 1), "history_bytes": held}
            codes = [growth.code(forgets=None), machine.code(start)]
            return instance.finish(found, grad, loss, codes=codes, stats=figures)

    def _back(self, instance: Instance, machine: "_Machine", cotangents: Cotangents, growth: Growth) -> PartialLeaves:
        oracles, steps = instance.oracles, instance.solver.max_steps
        through_init, shared = oracles.problem.init is not None, not isinstance(instance.batches.inner, PerStep)
        total: PartialLeaves = (None,) * len(tree.tensors(oracles.attached))
        pending: PartialLeaves | None = None
        for step in reversed(range(steps)):
            y, s, random = machine.undo(step)
            oracles.generators.set(random)
            embedding = oracles.embedding(step)
            cotangents, in_outer, in_batch = oracles.step_vjp(
                y, s, step, embedding, cotangents, to_inner=step > 0 or through_init
            )
            total = tree.accumulate(total, in_outer)
            if shared:
                pending = in_batch if pending is None else tree.accumulate(pending, in_batch)
            else:
                total = tree.accumulate(total, embedding.pull(in_batch))
            if growth.wanted(step):
                growth.look(step, cotangents.inner)
        if pending is not None:
            total = tree.accumulate(total, oracles.embedding(0).pull(pending))
        if through_init:
            total = tree.accumulate(total, oracles.start_vjp(cotangents.inner))
        return total


class _Machine:
    """The loop in whole numbers, forwards (as the inner loop sees the oracles) and backwards.

    Args:
        oracles: of the instance.
        optimizer: SGD with momentum.
        bits: after the point.
        start: y_0.
    """

    def __init__(self, oracles: Oracles, optimizer: SGD, bits: int, start: Tree) -> None:
        self.space, self.dynamics = oracles.space, oracles.dynamics
        self._oracles, self._optimizer, self._like, self._scale = oracles, optimizer, start, Scale(bits)
        x, ys = oracles.x, tree.tensors(start)
        self._rates = spread(value_of(optimizer.lr, x), start, "lr")
        self._decay = value_of(optimizer.weight_decay, x)
        self._momenta = _momenta(optimizer, x, start)
        self._shares = [1 - each for each in spread(value_of(optimizer.dampening, x), start, "dampening")]
        self._y = [self._scale.fixed(y) for y in ys]
        self._v: list[Tensor | None] = [None] * len(ys)
        self._stores = [Store(y) for y in self._y]
        self._used: list[Sequence[bool]] = []
        self._fresh: list[dict[int, bool]] = []
        self._random: list[Random] = []
        self._astray: Any = False

    def inner(self) -> Tree:
        """y, in its own dtype."""
        leaves = zip(self._y, tree.tensors(self._like), strict=True)
        return tree.like(self._like, [self._scale.number(whole).to(like.dtype) for whole, like in leaves])

    def state(self) -> list[Tensor | None]:
        """The momentum as `SGD` holds it."""
        pairs = zip(self._v, tree.tensors(self._like), strict=True)
        return [None if v is None else self._scale.number(v).to(like.dtype) for v, like in pairs]

    def begin(self, inner: Tree) -> Any:
        return self.dynamics.init(inner, self._oracles.x)

    def stationarity(self, inner: Tree, at: Any) -> list[Tensor]:
        raise AssertionError("a fixed number of steps does not ask")

    def step(self, inner: Tree, state: Any, at: At) -> tuple[Tree, Any]:
        """One step forward."""
        self._random.append(self._oracles.generators.state(self._random[-1] if self._random else None))
        with torch.no_grad():
            directions = self._directions(at.gradient(inner), inner)
            fresh = {i: self._v[i] is None for i, d in enumerate(directions) if d is not None}
            # (All tensors in use, as nearly always, are one object.)
            self._fresh.append(self._fresh[-1] if self._fresh and self._fresh[-1] == fresh else fresh)
            for i, d in enumerate(directions):
                if d is not None:
                    self._forward(i, d, fresh=fresh[i])
            return self.inner(), self.state()

    def _directions(self, gradient: Tree, inner: Tree) -> PartialLeaves:
        """dg/dy + weight_decay y."""
        return coupled(gradients(gradient, inner), self._decay, inner)

    def _forward(self, i: int, d: Tensor, *, fresh: bool) -> None:
        v = self._v[i]
        if v is None:
            v = self._scale.fixed(d)
        else:
            v = self._stores[i].multiply(v, self._momenta[i]) + self._scale.fixed(self._shares[i] * d)
        self._v[i] = self._scale.watched(v)
        self._y[i] = self._scale.watched(self._y[i] - self._moved(i, v))

    def _moved(self, i: int, v: Tensor) -> Tensor:
        return self._scale.fixed(self._rates[i] * self._scale.number(v))

    def undo(self, step: int) -> tuple[Tree, list[Tensor | None], Random]:
        """One step back: y, the momentum and the random numbers that it began with."""
        fresh, random = self._fresh.pop(), self._random.pop()
        for i in fresh:
            v = self._v[i]
            assert v is not None, "a tensor that was moved has a momentum"
            self._y[i] = self._y[i] + self._moved(i, v)
        inner = self.inner()
        self._oracles.generators.set(random)
        gradient = self._oracles.inner_gradient(inner, step)[1]
        with torch.no_grad():
            directions = self._directions(tree.like(inner, gradient), inner)
            for i, first in fresh.items():
                d, v = directions[i], self._v[i]
                if d is None or v is None:  # the loss did use it
                    self._astray = True
                elif first:
                    self._astray = (v != self._scale.fixed(d)).any() | self._astray
                    self._v[i] = None
                else:
                    v = v - self._scale.fixed(self._shares[i] * d)
                    self._v[i] = self._stores[i].divide(v, self._momenta[i])
        return inner, self.state(), random

    def history(self) -> tuple[float, int]:
        """Bits held a weight, on average, and bytes in all."""
        sizes = [y.numel() for y in self._y]
        bits = sum(store.bits * size for store, size in zip(self._stores, sizes, strict=True))
        return bits / max(sum(sizes), 1), sum(store.nbytes for store in self._stores)

    def code(self, start: Tree) -> Tensor:
        """IRREVERSIBLE unless y is at its start again, bit by bit, and nothing left the range."""
        astray = torch.as_tensor(self._astray | torch.as_tensor(self._scale.lost, device=self._y[0].device))
        for whole, leaf in zip(self._y, tree.tensors(start), strict=True):
            astray = astray | (whole != self._scale.fixed(leaf)).any()
        return code_if(astray, Status.IRREVERSIBLE)


def _checked(instance: Instance) -> SGD:
    """The optimizer.

    Raises:
        ValueError: it cannot be run backwards, or the number of steps is not known.
    """
    update = instance.solver.dynamics.update
    name = type(update or instance.solver.dynamics).__name__
    instead = 'Use bl.estimators.Revolve(snapshots), or Unrolled("segments")'
    if type(update) is not SGD:
        raise ValueError(
            f"Reversible runs SGD with momentum backwards, and was given {name}, whose step does not say what came "
            f"before it (moments that are squared, a clip, a rule of your own). {instead}"
        )
    if update.nesterov:
        raise ValueError(
            f"Reversible was given SGD(nesterov=True), whose last move depends on a gradient where it began, which is "
            f"not known any more. Leave nesterov out. {instead}"
        )
    if off(update.momentum):
        raise ValueError(
            f"Reversible was given SGD without momentum, whose step cannot be undone: it forgets the gradient that it "
            f"was made with. Give it a momentum such as SGD(lr, momentum=0.9). {instead}"
        )
    if not instance.solver.fixed:
        raise ValueError(
            f"Reversible was given {type(instance.solver).__name__}, which takes as many steps as it needs; a fixed "
            f"number was needed: Descent(optimizer, steps). {instead}"
        )
    return update


def _momenta(optimizer: SGD, outer: Tree, inner: Tree) -> list[fractions.Fraction]:
    """The momentum of each tensor, as a fraction.

    Raises:
        ValueError: one is not a number between 0 and 1.
    """
    found = []
    for value in spread(value_of(optimizer.momentum, outer), inner, "momentum"):
        number = value
        if isinstance(value, Tensor):
            if value.dim():
                raise ValueError(
                    f"Reversible was given a momentum of shape {tuple(value.shape)}; one number for each tensor of y "
                    f"was needed"
                )
            # (A tensor without data has no number; the bits of the history then are those of 0.9.)
            number = float(value) if type(value) is Tensor else 0.9
        fraction = ratio(number) if 0 < number < 1 else fractions.Fraction(0)
        if not 0 < fraction < 1:
            raise ValueError(
                f"Reversible was given the momentum {number}; a number above 2^-30 and below 1 was needed, such as 0.9"
            )
        found.append(fraction)
    return found
