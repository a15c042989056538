"""Forward mode: the exact gradient of the K-step program, a tangent for each number of x, and no trajectory.

    Z_{k+1} = A_k Z_k + B_k,    A_k = d step_k / d(y, s),  B_k = d step_k / dx,    dF/dx = df/dx + Z_K' df/dy(y_K)

Z holds Q columns; each is pushed through a step by one backward of a gradient (see bilevel.engine.step_forward).

| | inner gradients | HVPs | mixed | memory, S = P + optimizer state |
| --- | --- | --- | --- | --- |
| Forward() | K | K (Q + 1), each with its mixed product | - | (Q + 1) S + one tape |
| Forward(chunk=c) | K Q / c | K (Q + 1) | - | (c + 1) S + one tape |

Q counts the numbers of x that act through the inner loop; those of f alone cost nothing. The one product more a step
follows a perturbation of the start.

Wins: few outer numbers (rates, decays, a temperature) and any K: the memory is that of a few copies of y; a
hypergradient after every step, while the run goes on (online=True).
Fails: Q in the hundreds, where Unrolled or Revolve are exact at one product a step.
Reference: Williams and Zipser 1989 (real-time recurrent learning); Franceschi et al. 2017, arXiv 1703.01785 (forward
mode, and RTHO: x updated during the run). Both recalled.
Differences from peers: no forward-mode operators are asked for, so that every loss with a second derivative serves;
products forward are held against those backward once per problem; random numbers are replayed between chunks.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.engine.step_forward import Tangent, leaves
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.forward.base import Carried, Direction, acting, pushforward
from bilevel.estimators.state import State, per_task
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import PartialLeaves


@dataclasses.dataclass(frozen=True)
class RunningTangents(State):
    """Where a run of `Forward(online=True)` stands.

    Args:
        kinds: what each leaf of the optimizer's state is: 0 for None, 1 for a tensor, 2 for a plain number.
        inner: for each tensor of y its tangents, of shape (Q, *shape); after the task dimension where there is one.
        state: the same for each floating tensor of the optimizer's state.
        optimizer: the optimizer's state, leaf by leaf, plain numbers as tensors, without those that are None.
        norm: of y, to know it again; per task.
    """

    kinds: list[int]
    inner: list[Tensor] = per_task()
    state: list[Tensor] = per_task()
    optimizer: list[Tensor] = per_task()
    norm: Tensor = per_task()


@dataclasses.dataclass(frozen=True)
class Forward(Estimator):
    """Carry dy/dx along with y.

    Args:
        chunk: tangents at once: the inner loop is run Q / chunk times. None for all at once.
        online: whether tangents and optimizer go on from the last call's, with the state that it returned. Call it with
            a solver of few steps (`Descent(optimizer, 1)` for a hypergradient after every step), `inner=hg.inner` and
            `state=hg.state`, as `iterate(..., carry=True)` does. x may change between calls: tangents then are those of
            the run as it was (RTHO). Every call counts its steps, and takes its batches, from 0.

    Stats: `tangent_growth`, the largest norm of a perturbation of the start on its way over the one that it began with;
        `tangent_left`, what is left of it at the end; `digits`, the decimal digits that rounding leaves by it.

    Bias: none; the gradient of the K-step program to rounding. Online with a changing x, of first order in its changes.

    Memory: (chunk + 1) S + one tape: constant in K, linear in chunk and T. A state of online holds Q S more.

    Raises:
        ValueError: an argument is out of range; (when used) online with Problem.init, with a state of another y, or
            with an optimizer's state that tasks share; products forward and backward disagree.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.estimators.Forward())
        >>> hg.grad
        tensor(0.2197)

        A hypergradient after each of four steps:

        >>> y, state, found = torch.tensor(0.0), None, []
        >>> for _ in range(4):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), y, bl.Batches(None, None), state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.estimators.Forward(online=True))
        ...     y, state = hg.inner, hg.state
        ...     found.append(round(hg.grad.item(), 4))
        >>> found
        [0.0625, 0.1406, 0.1914, 0.2197]
    """

    chunk: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and (
            not isinstance(self.chunk, int) or isinstance(self.chunk, bool) or self.chunk < 1
        ):
            raise ValueError(f"Forward was given chunk={self.chunk!r}; None or an integer of at least 1 was needed")
        if not isinstance(self.online, bool):
            raise ValueError(f"Forward was given online={self.online!r}; True or False was needed")
        if self.online and self.chunk is not None:
            raise ValueError(
                f"Forward was given online=True and chunk={self.chunk}; a run that goes on carries all tangents at "
                f"once. Leave chunk out"
            )

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return ""

    def init_state(self, instance: Instance) -> State | None:
        if not self.online:
            return None
        oracles = instance.oracles
        before = oracles.generators.peek()
        with spans.unheard():
            y = oracles.start()
            y, s = oracles.step(y, oracles.begin(y), oracles.point(0))
        oracles.generators.set(before)
        count = len(_directions(instance))
        zeros = Tangent([None] * len(tree.tensors(y)), [None] * len(leaves(s)))
        return _packed(Carried(s, [zeros] * count), tree.tensors(y), oracles.space)

    def estimate(self, instance: Instance, state: RunningTangents | None) -> Estimate:
        if self.online:
            self._check(instance, state)
        directions = _directions(instance)
        found = pushforward(
            instance,
            directions,
            chunk=self.chunk,
            carried=None if state is None else _unpacked(state, instance, len(directions)),
        )
        with spans.span(spans.HYPERGRADIENT):
            grad = tree.accumulate(found.direct, _gathered(found.numbers, instance))
            after = None
            if self.online and instance.solver.max_steps:
                assert found.carried is not None
                after = _packed(found.carried, tree.tensors(found.found.inner), instance.oracles.space)
            return instance.finish(
                found.found, grad, found.loss, codes=[found.code], stats=found.stats, state=after or state
            )

    def _check(self, instance: Instance, state: RunningTangents | None) -> None:
        if instance.problem.init is not None:
            raise ValueError(
                "Forward(online=True) goes on from inner=hg.inner, and Problem.init begins anew at every call. Leave "
                "init out and give inner, or write Forward()"
            )
        if state is None:
            return
        norm = instance.oracles.space.norm(tree.tensors(instance.oracles.start()))
        if readable(norm) and not torch.equal(norm, state.norm.to(norm)):
            raise ValueError(
                "Forward(online=True) was given a state whose tangents belong to another inner variable; pass "
                "inner=hg.inner with state=hg.state, or state=None to start afresh"
            )


def _directions(instance: Instance) -> list[Direction]:
    """A unit vector for each number of x that acts through the inner loop."""
    xs, found = tree.tensors(instance.outer), list[Direction]()
    for i, acts in enumerate(acting(instance)):
        found += [_Unit(xs, i, j) for j in range(xs[i].numel())] if acts else []
    return found


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One number of one tensor."""

    xs: list[Tensor]
    tensor: int
    number: int

    def __call__(self) -> list[Tensor | None]:
        x = self.xs[self.tensor]
        unit = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        unit[self.number] = 1.0
        found: list[Tensor | None] = [None] * len(self.xs)
        found[self.tensor] = unit.reshape(x.shape)
        return found


def _gathered(numbers: list[Tensor | None], instance: Instance) -> PartialLeaves:
    """The numbers of unit vectors in the places of x; None for a tensor at which none arrived."""
    rest, found = iter(numbers), list[Tensor | None]()
    for x, acts in zip(tree.tensors(instance.outer), acting(instance), strict=True):
        column = [next(rest) for _ in range(x.numel())] if acts else []
        if all(number is None for number in column):
            found.append(None)
            continue
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        found.append(torch.stack([zero if z is None else z.to(x) for z in column]).reshape(x.shape))
    return tuple(found)


def _packed(carried: Carried, ys: list[Tensor], space: Space) -> RunningTangents:
    """The state of a run.

    Raises:
        ValueError: tasks share a number of the optimizer's.
    """
    dim, optimizer = 0 if space.tasks is None else 1, tree.flatten(carried.state)[0]
    if space.tasks is not None and any(leaf is not None and not getattr(leaf, "ndim", 0) for leaf in optimizer):
        raise ValueError(
            "Forward(online=True) was given an optimizer whose state tasks share (a count of steps). Write "
            "TaskMean(estimator, chunk=1), which takes one task after another"
        )

    def stacked(like: Tensor, columns: list[Tensor | None]) -> Tensor:
        zero = torch.zeros_like(like)
        if not columns:
            return like.new_zeros([*like.shape[:dim], 0, *like.shape[dim:]])
        return torch.stack([zero if z is None else z.to(zero.dtype) for z in columns], dim)

    def kept(leaf: Any) -> Tensor:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else torch.as_tensor(leaf, device=ys[0].device)

    return RunningTangents(
        [0 if leaf is None else 1 if isinstance(leaf, Tensor) else 2 for leaf in optimizer],
        [stacked(y, [each.inner[i] for each in carried.tangents]) for i, y in enumerate(ys)],
        [
            stacked(leaf, [each.state[i] for each in carried.tangents])
            for i, leaf in enumerate(leaves(carried.state))
            if leaf is not None
        ],
        [kept(leaf) for leaf in optimizer if leaf is not None],
        space.norm(ys),
    )


def _unpacked(state: RunningTangents, instance: Instance, count: int) -> Carried:
    dim, oracles = 0 if instance.tasks is None else 1, instance.oracles
    structure = tree.flatten(oracles.begin(oracles.start()))[1]
    rest = iter(state.optimizer)
    optimizer = [None if not kind else next(rest) if kind == 1 else next(rest).item() for kind in state.kinds]
    after = tree.unflatten(optimizer, structure)
    floating = leaves(after)

    def tangent(i: int) -> Tangent:
        columns = iter(state.state)
        return Tangent(
            [leaf.select(dim, i) for leaf in state.inner],
            [None if leaf is None else next(columns).select(dim, i) for leaf in floating],
        )

    return Carried(after, [tangent(i) for i in range(count)])
