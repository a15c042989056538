"""One step of a dynamics, pushed forward: how (y', s') change along directions of (y, s, x).

    an optimizer, y', s' = U(g_y, y, s, x):   dg_y = d/dy (<g_y, z> + <g_x, e>)          = H z + M' e, by symmetry
                                              (dy', ds') = d/dw <dU' w, (dg_y, z, r, e)>    as dU' w is linear in w
    another dynamics:                         the second line for the whole step

(g_y, g_x) are dg/dy and dg/dx; (z, r, e) is the direction in y, s and x.

| | cost | memory |
| --- | --- | --- |
| the step | 1 gradient of g in y and x at once, with its graph | one graph, kept while the object lives |
| a push | 1 product (H z + M' e), by a backward through that graph | P + state |

No forward-mode formula of torch is asked for: operators without one serve as well as those that write their tangents
in place, and what a loss keeps from autograd (detach, no_grad) is constant here too. A push is the transpose of
`Oracles.step_vjp`; the two are held against each other once per problem (`check`).
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.cotangents import Cotangents
from bilevel.engine.embedding import Embedding
from bilevel.engine.point import At
from bilevel.engine.refusals import check_step, step_of
from bilevel.engine.replay import Generators
from bilevel.inner.dynamics import Dynamics
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

Gradients = Callable[[Tree, Any], tuple[Tensor, PartialLeaves, PartialLeaves]]
"""(inner, embedded batch) -> g, dg/dy and dg/dx of arguments as they come, with a graph."""


@dataclasses.dataclass(frozen=True)
class Tangent:
    """A direction of (y, s): one entry for each tensor of y, and for each leaf of s; None where it is zero."""

    inner: list[Tensor | None]
    state: list[Tensor | None]


class Linear:
    """The Jacobian of outputs in inputs, as a map of directions: w -> J' w is linear, and its transpose is J."""

    def __init__(self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> None:
        self._moving = [out is not None and out.requires_grad for out in outputs]
        moved = [out for out, moving in zip(outputs, self._moving, strict=True) if moving and out is not None]
        given = [leaf for leaf in inputs if leaf is not None]
        self._weights = [torch.zeros_like(out).requires_grad_() for out in moved]
        pulled = iter(autodiff.grad(moved, given, self._weights, create_graph=True))
        self._pulled = [None if leaf is None else next(pulled) for leaf in inputs]

    def __call__(self, directions: Sequence[Tensor | None]) -> list[Tensor | None]:
        """How the outputs change; None where they do not."""
        pairs = [(root, d) for root, d in zip(self._pulled, directions, strict=True) if root is not None]
        pairs = [(root, d) for root, d in pairs if d is not None]
        roots = [root for root, _ in pairs]
        found = iter(autodiff.grad(roots, self._weights, [d for _, d in pairs if d is not None], retain_graph=True))
        return [next(found) if moving else None for moving in self._moving]


class Pushed(abc.ABC):
    """A step that was made, and its derivative. `moved`, `state` and `loss` are without a graph; `shown` and `code` are
    what the loop is judged by, see `bilevel.engine.point.At`.
    """

    moved: Tree
    state: Any
    loss: Tensor | None
    shown: Tensor | None
    code: Tensor | int = 0
    reported = vanishing = False

    @abc.abstractmethod
    def gradient(self) -> Tree:
        """dg/dy where the step began, without a graph."""

    @abc.abstractmethod
    def push(self, tangent: Tangent, outer: Sequence[Tensor | None]) -> Tangent:
        """The tangent of (y', s') along one of (y, s) and a direction of x (None where it is zero)."""


class OfOptimizer(Pushed):
    """A step of an optimizer on dg/dy.

    Args:
        dynamics: with an `update`.
        attached: x, as graph leaves.
        gradients: g and its gradients, with a graph.
        inner: y.
        state: s.
        embedded: the step's batch, with its graph in x.
        symmetric: whether second derivatives are taken as symmetric, which saves a derivative.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        attached: Tree,
        gradients: Gradients,
        inner: Tree,
        state: Any,
        embedded: Any,
        *,
        symmetric: bool,
    ) -> None:
        optimizer, y = dynamics.update, tree.attach(inner)
        assert optimizer is not None, "a dynamics without an optimizer is pushed as a whole"
        self._ys, self._xs, self._symmetric = tree.tensors(y), tree.tensors(attached), symmetric
        self.loss, self._in_inner, self._in_outer = gradients(y, embedded)
        self.shown = self.loss
        numbers = [None if leaf is None else leaf.detach() for leaf in self._in_inner]
        self._numbers = tree.like(inner, numbers)
        self._slope = None if symmetric else Linear(self._in_inner, [*self._ys, *self._xs])
        self._rate, self._update = optimizer.plain_rate, None
        if self._rate is not None:
            with torch.no_grad():
                moved, self.state = optimizer.step(self._numbers, state, inner, attached)
            self.moved = check_step(dynamics, inner, moved)
            return
        g = [None if leaf is None else leaf.detach().requires_grad_() for leaf in numbers]
        y, s = tree.attach(inner), tree.attach(state)
        with torch.enable_grad():
            stepped, after = optimizer.step(tree.like(inner, g), s, y, attached)
        stepped = check_step(dynamics, inner, stepped)
        outputs = [*tree.tensors(stepped), *leaves(after)]
        self._update = Linear(outputs, [*g, *tree.tensors(y), *leaves(s), *self._xs])
        self.moved, self.state = tree.detach(stepped), tree.detach(after)

    def gradient(self) -> Tree:
        return self._numbers

    def push(self, tangent: Tangent, outer: Sequence[Tensor | None]) -> Tangent:
        with spans.span(spans.HVP):
            slope = self._slope_along(tangent.inner, outer)
        if self._update is None:
            assert self._rate is not None
            return Tangent(
                [_minus(z, self._rate, d) for z, d in zip(tangent.inner, slope, strict=True)], list(tangent.state)
            )
        found = self._update([*slope, *tangent.inner, *tangent.state, *outer])
        count = len(self._ys)
        return Tangent(found[:count], found[count:])

    def _slope_along(self, inner: Sequence[Tensor | None], outer: Sequence[Tensor | None]) -> list[Tensor | None]:
        """H z + M' e; None for tensors that the loss does not use."""
        if self._slope is not None:
            return self._slope([*inner, *outer])
        roots, directions = (*self._in_inner, *self._in_outer), (*inner, *outer)
        pairs = [(g, d) for g, d in zip(roots, directions, strict=True) if g is not None and d is not None]
        found = autodiff.grad([g for g, _ in pairs], self._ys, [d for _, d in pairs], retain_graph=True)
        return [None if g is None else d for g, d in zip(self._in_inner, found, strict=True)]


class OfDynamics(Pushed):
    """A step of any dynamics.

    Args:
        dynamics: how y moves.
        attached: x, as graph leaves.
        at: the inner problem of the step, with graphs.
        inner: y.
        state: s.
    """

    def __init__(self, dynamics: Dynamics, attached: Tree, at: At, inner: Tree, state: Any) -> None:
        y, s = tree.attach(inner), tree.attach(state)
        with torch.enable_grad():
            stepped, after = step_of(dynamics, y, s, attached, at)
        stepped = check_step(dynamics, inner, stepped)
        self._count, self.loss, self._y, self._at = len(tree.tensors(y)), at.loss, y, at
        self.shown, self.reported, self.vanishing, self.code = at.shown, at.reported, at.vanishing, at.code
        outputs = [*tree.tensors(stepped), *leaves(after)]
        self._step = Linear(outputs, [*tree.tensors(y), *leaves(s), *tree.tensors(attached)])
        self.moved, self.state = tree.detach(stepped), tree.detach(after)

    def gradient(self) -> Tree:
        return tree.detach(self._at.gradient(self._y))

    def push(self, tangent: Tangent, outer: Sequence[Tensor | None]) -> Tangent:
        with spans.span(spans.HVP):
            found = self._step([*tangent.inner, *tangent.state, *outer])
        return Tangent(found[: self._count], found[self._count :])


def leaves(state: Any) -> list[Tensor | None]:
    """The leaves of a state, None for those that are not floating tensors."""
    return [leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None for leaf in tree.flatten(state)[0]]


def _minus(z: Tensor | None, rate: float, d: Tensor | None) -> Tensor | None:
    if d is None:
        return z
    return d * -rate if z is None else torch.add(z, d, alpha=-rate)


# --- the transpose


class Transposed:
    """What a step's vector-Jacobian product says about its pushes, at random directions and cotangents.

    Args:
        inner: y.
        state: s.
        outer: x.
        after: (y', s').
        pull: cotangents of (y', s') to those of (y, s) and x.
    """

    def __init__(
        self,
        inner: Tree,
        state: Any,
        outer: Tree,
        after: tuple[Tree, Any],
        pull: Callable[[Cotangents], tuple[Cotangents, PartialLeaves]],
    ) -> None:
        seed = torch.Generator(device="cpu").manual_seed(0)

        def random(leaf: Tensor | None) -> Tensor | None:
            return None if leaf is None else torch.randn(leaf.shape, generator=seed, dtype=torch.float64).to(leaf)

        self._directions = (
            [random(leaf) for leaf in tree.tensors(inner)],
            [random(leaf) for leaf in leaves(state)],
            [random(leaf) for leaf in tree.tensors(outer)],
        )
        self._weights = [random(leaf) for leaf in tree.tensors(after[0])], [random(leaf) for leaf in leaves(after[1])]
        back, in_outer = pull(Cotangents(list(self._weights[0]), list(self._weights[1])))
        states = back.state or [None] * len(self._directions[1])
        self._expected = [
            _dot(found, direction)
            for found, direction in zip((back.inner, states, in_outer), self._directions, strict=True)
        ]

    def agrees(self, pushed: Pushed) -> bool:
        """Whether <w, J d> = <J' w, d>, for a direction of y, one of s and one of x."""
        z, r, e = self._directions
        no_z, no_r, no_e = ([None] * len(each) for each in self._directions)
        along: list[tuple[Tangent, Sequence[Tensor | None]]] = [
            (Tangent(z, list(no_r)), no_e),
            (Tangent(list(no_z), r), no_e),
            (Tangent(list(no_z), list(no_r)), e),
        ]
        eps = max(torch.finfo(leaf.dtype).eps for leaf in z if leaf is not None)
        differences, sizes = list[Tensor](), list[Tensor]()
        for expected, (tangent, outer) in zip(self._expected, along, strict=True):
            found = pushed.push(tangent, outer)
            joined = [*found.inner, *found.state]
            differences.append((_dot(joined, [*self._weights[0], *self._weights[1]]) - expected).abs())
            sizes.append(_dot(joined, joined).sqrt() + expected.abs())
        difference, size = torch.stack(differences), torch.stack(sizes)
        # (What cancels to rounding in one of them is as large as rounding of the others.)
        allowed = min(0.3, 50 * eps**0.5) * size + 1e3 * eps * size.sum()
        apart = (difference > allowed).any()
        return not readable(apart) or not bool(apart)


def _dot(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Tensor:
    parts = [
        (a.double() * b.double()).sum() for a, b in zip(one, other, strict=True) if a is not None and b is not None
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


# --- which of the ways is right

_REMEMBERED = 8
"""Optimizers of a problem."""


class Source(Protocol):
    """What is needed of the oracles."""

    dynamics: Dynamics
    generators: Generators
    x: Tree
    attached: Tree

    def gradients(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves, PartialLeaves]: ...

    def differentiable_point(self, step: int, embedded: Any) -> At: ...

    def step(self, inner: Tree, state: Any, at: At) -> tuple[Tree, Any]: ...

    def step_vjp(
        self, inner: Tree, state: Any, step: int, embedding: Embedding, cotangents: Cotangents
    ) -> tuple[Cotangents, PartialLeaves, PartialLeaves]: ...


class StepForward:
    """Steps with their derivative, by whichever way agrees with the products backwards.

    Args:
        oracles: of the instance.
        known: what is remembered with the problem: pairs of an optimizer, or a dynamics, and whether symmetry serves.
    """

    def __init__(self, oracles: Source, known: list[tuple[Any, bool]]) -> None:
        self._oracles, self._known = oracles, known

    def step(self, inner: Tree, state: Any, at: At, embedded: Any, embedding: Embedding) -> Pushed:
        """A step and its derivative.

        Args:
            inner: y.
            state: s.
            at: the inner problem of the step, without a graph.
            embedded: its batch, with its graph in x.
            embedding: the same without.

        Raises:
            ValueError: no way agrees.
        """
        oracles, dynamics = self._oracles, self._oracles.dynamics
        symmetric = next((way for seen, way in self._known if seen is dynamics.update or seen is dynamics), None)
        if symmetric is not None:
            return self._made(inner, state, at.step, embedded, symmetric=symmetric)
        before = oracles.generators.peek()
        with spans.unheard():
            after = oracles.step(inner, state, at)

            def pull(cotangents: Cotangents) -> tuple[Cotangents, PartialLeaves]:
                oracles.generators.set(before)
                back, in_outer, in_batch = oracles.step_vjp(inner, state, at.step, embedding, cotangents)
                return back, tree.accumulate(in_outer, embedding.pull(in_batch))

            transposed = Transposed(inner, state, oracles.x, after, pull)
            del after
        for symmetric in (True, False) if dynamics.update is not None else (False,):
            oracles.generators.set(before)
            pushed = self._made(inner, state, at.step, embedded, symmetric=symmetric)
            with spans.unheard():
                agrees = transposed.agrees(pushed)
            if agrees:
                self._known.append((dynamics.update or dynamics, symmetric))
                del self._known[:-_REMEMBERED]
                return pushed
            del pushed
        raise ValueError(
            f"the derivative of a step of {type(dynamics.update or dynamics).__name__} forward is not the transpose of "
            f"that backward, so one of them is wrong: a torch.autograd.Function in a loss whose backward is not "
            f"linear, or an operator whose third derivative torch gets wrong. Use Unrolled(), which needs no more than "
            f"the second, or write the loss with torch's own operators"
        )

    def _made(self, inner: Tree, state: Any, step: int, embedded: Any, *, symmetric: bool) -> Pushed:
        oracles = self._oracles
        if oracles.dynamics.update is None:
            at = oracles.differentiable_point(step, embedded)
            return OfDynamics(oracles.dynamics, oracles.attached, at, inner, state)
        return OfOptimizer(
            oracles.dynamics,
            oracles.attached,
            oracles.gradients,
            inner,
            state,
            embedded,
            symmetric=symmetric,
        )
