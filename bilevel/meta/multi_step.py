"""How smooth the losses of tasks are where they start, and what that says about step sizes of multi-step MAML.

| | cost per task | memory |
| --- | --- | --- |
| smoothness | 1 gradient and one product per step of the iteration | one graph, and 3 P |
| start_norms | 2 gradients | one graph |
| MultiStep | arithmetic | - |

Ji, Yang and Liang 2022, "Theoretical Convergence of Multi-Step Model-Agnostic Meta-Learning", JMLR 23, arXiv
2002.07836. No printed copy was at hand: what is recalled of the paper and what is derived here is marked so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.engine import autodiff
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.run import estimated
from bilevel.hypergradient import check_arguments, prepared
from bilevel.inner.descent import Descent
from bilevel.linear.lanczos import Spectrum, spectrum
from bilevel.optim.sgd import SGD
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree
from bilevel.tasks.mean import TaskMean

Figures = dict[str, Any]


def smoothness(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    tasks: bool = False,
    chunk: int | None = None,
    tol: float = 1e-2,
    max_steps: int = 50,
) -> Spectrum:
    """The ends of the spectrum of the inner loss's Hessian, d2g/dy2 at the start: `.largest` is L of each task there.

    For alpha = 1 / (8 N L) take the largest over tasks, rarely: the smoothness of a net changes on its way, and what is
    found is a lower bound at one point (see `bilevel.linear.spectrum`). The factor of 8 leaves room.

    Args:
        problem: the two losses; the outer one is not called.
        outer: x; not changed.
        inner: y, where the Hessian is taken; None with Problem.init, which says.
        batches: the data, of which only `inner` is looked at (the first batch of a PerStep).
        tasks: whether batches (and `inner`) have a leading task dimension, as for `TaskMean`.
        chunk: with `tasks`, how many at once, as for `TaskMean`.
        tol: relative accuracy of L where the iteration has seen it.
        max_steps: the most Hessian-vector products.

    Returns:
        A `bilevel.linear.Spectrum`, with tensors of shape (T,) for tasks.

    Raises:
        TypeError, ValueError: an argument is not what is needed.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (b * y**2).sum() / 2, lambda y, x, b: y.sum(), init=lambda x, b: x)
        >>> batches = bl.Batches(torch.tensor([[1.0, 3.0], [2.0, -4.0]]), None)
        >>> bl.meta.smoothness(problem, torch.ones(2), None, batches, tasks=True).largest
        tensor([3.0000, 4.0000], dtype=torch.float64)
    """

    def look(instance: Instance, y: Tree) -> Figures:
        oracles = instance.oracles
        found = spectrum(
            oracles.linearize(y, 0), tuple(tree.tensors(y)), space=oracles.space, tol=tol, max_steps=max_steps
        )
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}

    at = dataclasses.replace(batches, curvature=None) if isinstance(batches, Batches) else batches
    found = _looked_at("smoothness", look, problem, outer, inner, at, tasks=tasks, chunk=chunk)
    steps = found.pop("steps")
    return Spectrum(**found, steps=max(steps) if isinstance(steps, list) else steps)


@dataclasses.dataclass(frozen=True)
class StartNorms:
    """Norms of gradients at the start, per task: 0-dim tensors in float64, or of shape (T,).

    Attributes:
        support: |dg/dy|.
        query: |df/dy|.
        difference: |dg/dy - df/dy|, whose mean is the b of the finite-sum case.
    """

    support: Tensor
    query: Tensor
    difference: Tensor


def start_norms(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    tasks: bool = False,
    chunk: int | None = None,
) -> StartNorms:
    """The norms of both losses' gradients in y at the start, of which the meta-objective's local smoothness is made.

    For the outer step size of Ji et al. they come from a batch of tasks that is independent of the one stepped on.

    Args:
        problem: the two losses.
        outer: x; not changed.
        inner: y; None with Problem.init.
        batches: the data.
        tasks: whether batches (and `inner`) have a leading task dimension.
        chunk: with `tasks`, how many at once.

    Raises:
        TypeError, ValueError: an argument is not what is needed.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 / 2, lambda y, x, b: b * y, init=lambda x, b: x)
        >>> bl.meta.start_norms(problem, torch.tensor(1.0), None, bl.Batches(None, torch.tensor(3.0))).query
        tensor(3., dtype=torch.float64)
    """

    def look(instance: Instance, y: Tree) -> Figures:
        oracles, ys = instance.oracles, tree.tensors(y)
        support = autodiff.filled(oracles.inner_gradient(y, 0)[1], ys)
        query = autodiff.filled(oracles.outer_gradient_in_inner(y)[1], ys)
        difference = oracles.space.axpy(-1.0, query, support)
        names = ("support", "query", "difference")
        return {name: oracles.space.norm(each) for name, each in zip(names, (support, query, difference), strict=True)}

    return StartNorms(**_looked_at("start_norms", look, problem, outer, inner, batches, tasks=tasks, chunk=chunk))


@dataclasses.dataclass(frozen=True)
class MultiStep:
    """The constants of multi-step MAML with N steps of size alpha, and the step sizes that they give.

    Let a = alpha L. All are numbers; L and rho are of the worst task.

    Args:
        steps: N >= 1.
        smoothness: L, the Lipschitz constant of the gradients of the tasks' losses (see `smoothness`).
        hessian_lipschitz: rho, that of their Hessians; 0 for quadratics. It is not known for nets.
        step_size: alpha; None for 1 / (8 N L), that of both corollaries of the paper (recalled, not re-read).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import bilevel as bl
        >>> constants = bl.meta.MultiStep(steps=5, smoothness=2.0, hessian_lipschitz=1.0)
        >>> constants.alpha, round(constants.growth, 3), round(constants.gradient_weight, 4)
        (0.0125, 1.28, 0.0821)
    """

    steps: int
    smoothness: float
    hessian_lipschitz: float
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"MultiStep was given steps={self.steps!r}; an integer of at least 1 was needed")
        for name, low, needed in (
            ("smoothness", False, "a positive number, such as float(smoothness(...).largest.max())"),
            ("hessian_lipschitz", True, "a number of at least 0"),
            ("step_size", False, "None or a positive number"),
        ):
            value = getattr(self, name)
            if value is None and name == "step_size":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 < value < float("inf") or (low and value == 0)):
                raise ValueError(f"MultiStep was given {name}={value!r}; {needed} was needed")

    @property
    def alpha(self) -> float:
        """The inner step size; by default 1 / (8 N L): N times smaller for N steps, so no constant grows with N."""
        return 1 / (8 * self.steps * self.smoothness) if self.step_size is None else float(self.step_size)

    @property
    def product(self) -> float:
        """(1 + a)^N, which bounds the norm of the product of I - alpha H: at most e^(1/8) = 1.133 at 1 / (8 N L)."""
        return self._power(self.steps)

    @property
    def growth(self) -> float:
        """(1 + a)^(2 N), the factor of L in the smoothness of the meta-objective (recalled)."""
        return self._power(2 * self.steps)

    @property
    def gradient_weight(self) -> float:
        """C_L = (rho / L) (1 + a)^(2 N - 1) ((1 + a)^N - 1): what gradients at the start add to the smoothness.

        Recalled as ((1 + a)^(N - 1) alpha rho + (rho / L) (1 + a)^N ((1 + a)^(N - 1) - 1)) (1 + a)^N, which is the same
        (inferred).
        """
        return self._rho(self._power(2 * self.steps - 1) * (self.product - 1))

    @property
    def difference_weight(self) -> float:
        """C_b = (rho / L) (1 + a)^(N - 1) ((1 + a)^N - 1)^2, of the mean |grad l_S - grad l_T| in the finite-sum case.

        A valid constant (inferred); the paper's own may be larger.
        """
        return self._rho(self._power(self.steps - 1) * (self.product - 1) ** 2)

    def local_smoothness(self, norms: Tensor, differences: Tensor | None = None) -> Tensor:
        """The smoothness of the meta-objective near x, estimated from a batch of tasks (recalled).

            Lhat = (1 + a)^(2 N) L + C_L mean |grad l_i(x)|      (+ C_b mean |grad l_S - grad l_T|: finite-sum case)

        Args:
            norms: |grad l_i(x)| per task, of the query losses: `start_norms(...).query`, on tasks that are independent
                of those of the hypergradient.
            differences: `start_norms(...).difference` for the finite-sum case, in which support and query losses are
                given; None for the resampling case.

        Returns:
            a 0-dim tensor.
        """
        found = self.growth * self.smoothness + self.gradient_weight * norms.mean()
        return found if differences is None else found + self.difference_weight * differences.mean()

    def outer_step(self, norms: Tensor, differences: Tensor | None = None, *, divisor: float | None = None) -> Tensor:
        """The step size of x, 1 / (C Lhat), for plain descent along the hypergradient.

        Args:
            norms: as for `local_smoothness`.
            differences: likewise.
            divisor: C; None for 100 in the resampling and 80 in the finite-sum case (recalled with medium confidence;
                any C >= 1 descends where Lhat bounds the smoothness and gradients are exact).

        Raises:
            ValueError: the divisor is not positive.
        """
        chosen = (100.0 if differences is None else 80.0) if divisor is None else divisor
        if not chosen > 0:
            raise ValueError(f"outer_step was given divisor={divisor!r}; None or a positive number was needed")
        return 1 / (chosen * self.local_smoothness(norms, differences))

    def _power(self, exponent: int) -> float:
        try:
            return (1 + self.alpha * self.smoothness) ** exponent
        except OverflowError:
            return float("inf")

    def _rho(self, factor: float) -> float:
        # (0 times infinity is nothing: a quadratic has no third derivative.)
        return self.hessian_lipschitz / self.smoothness * factor if self.hessian_lipschitz else 0.0


@dataclasses.dataclass(frozen=True)
class _Look(Estimator):
    """No estimate: figures of the losses at the start, per task."""

    figures: Callable[[Instance, Tree], Figures]
    sees = EVERYWHERE

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        y, unknown = instance.oracles.start(), (None,) * len(tree.tensors(instance.outer))
        figures = self.figures(instance, y)
        some = next(value for value in figures.values() if isinstance(value, Tensor))
        return Estimate(unknown, y, some, some, 0, figures, unused=frozenset(range(len(unknown))))


def _looked_at(
    who: str,
    look: Callable[[Instance, Tree], Figures],
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    tasks: bool,
    chunk: int | None,
) -> Figures:
    """The figures of one problem, or of each task."""
    solver = Descent(SGD(lr=1.0), 0)  # whose stationarity is the inner gradient
    check_arguments(who, problem, outer, inner, batches, solver)
    if chunk is not None and not tasks:
        raise ValueError(f"{who}() was given chunk={chunk} without tasks=True; chunks are of tasks")
    instance = Instance(problem, tree.detach(outer), None if inner is None else tree.detach(inner), batches, solver)
    estimator: Estimator = TaskMean(_Look(look), chunk) if tasks else _Look(look)
    with prepared():
        stats = dict(estimated(estimator, instance, None).stats)
    stats.pop("tasks", None)
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in stats.items()}
