"""What derivatives show, against differences: second derivatives, the K-step program, and the digits of a dtype."""

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.inner.dynamics import Dynamics
from bilevel.space import tree
from bilevel.testing.case import SEED, Case, copied

Found = list[tuple[str, str]]
_STEPS = 3
"""Of the program whose gradient is held against differences."""
_OFF = 0.01
"""A relative difference that is a defect."""
_STEADY = 0.25
"""Two widths must agree to this part of what is lacking, or a kink lies between."""


class CannotTellError(Exception):
    """A check has nothing to say of this problem; the message says why."""


def in_float64(case: Case) -> Case:
    """The case in float64.

    Raises:
        CannotTellError: a loss does not work there.
    """
    double = case if case.dtype == torch.float64 else case.cast(torch.float64)
    try:
        inner, outer = (tree.attach(value) for value in double.variables())
        torch.manual_seed(SEED)
        losses = double.losses(inner, outer)
    except Exception as error:  # whatever a loss that holds tensors of its own dtype raises
        raise CannotTellError(f"the losses do not work in float64 ({type(error).__name__}: {error})") from error
    if any(loss.dtype != torch.float64 for loss in [*losses, *tree.tensors([inner, outer])]):
        raise CannotTellError("in float64 the losses still return another dtype")
    return double


def check_second_derivative(case: Case) -> Found:
    """Products with the second derivatives of g against differences of its first, along one random direction."""
    double = in_float64(case)
    inner, outer = double.variables()
    ys, xs = tree.tensors(inner), tree.tensors(outer)
    draw = torch.Generator().manual_seed(SEED)
    direction = [torch.randn(leaf.shape, generator=draw, dtype=torch.float64).to(leaf.device) for leaf in ys]
    size = sum(float(leaf.square().sum()) for leaf in direction) ** 0.5
    direction = [leaf / max(size, 1e-300) for leaf in direction]

    def gradient(length: float, *, graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        moved = [(leaf + length * v).requires_grad_() for leaf, v in zip(ys, direction, strict=True)]
        here = [*moved, *(leaf.detach().clone().requires_grad_() for leaf in xs)]
        torch.manual_seed(SEED)
        loss = double.inner_loss(tree.like(inner, here[: len(ys)]), tree.like(outer, here[len(ys) :]))
        return here, list(autodiff.filled(autodiff.grad([loss], here, create_graph=graph), here))

    try:
        here, first = gradient(0.0, graph=True)
        products = autodiff.filled(autodiff.grad(first[: len(ys)], here, direction), here)
    except bl.NotTwiceDifferentiableError as error:
        return [("NOT_TWICE_DIFFERENTIABLE", f"inner_loss: {str(error).splitlines()[0]}")]
    width = 1e-5 * max(1.0, max(float(leaf.abs().max()) for leaf in ys if leaf.numel()))
    coarse, fine = (_difference(gradient(h)[1], gradient(-h)[1], h) for h in (width, width / 2))
    names = [f"inner {name}" for name in tree.names(inner)] + [f"outer {name}" for name in tree.names(outer)]
    floor = 1e-6 * max(1.0, max(float(leaf.detach().norm()) for leaf in first))
    found: Found = []
    for name, product, wide, narrow in zip(names, products, coarse, fine, strict=True):
        lacking, wanted = float((wide - product).norm()), float(wide.norm())
        if lacking > max(_OFF * wanted, floor) and float((wide - narrow).norm()) < _STEADY * lacking:
            sentence = (
                f"the second derivative of inner_loss in (inner, {name}) along a random direction has norm "
                f"{float(product.norm()):.6g}, and differences of the gradient have {wanted:.6g}: autograd lacks some "
                f"(a backward that computes with detached tensors, a .detach() or .item() in a factor)"
            )
            found.append(("NOT_TWICE_DIFFERENTIABLE", sentence))
    return found


def _difference(above: Sequence[Tensor], below: Sequence[Tensor], width: float) -> list[Tensor]:
    return [((a - b) / (2 * width)).detach() for a, b in zip(above, below, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Few(bl.InnerSolver):
    """A few steps of another solver's dynamics."""

    moves: Dynamics
    count: int

    @property
    def dynamics(self) -> Dynamics:
        return self.moves

    @property
    def max_steps(self) -> int:
        return self.count

    @property
    def fixed(self) -> bool:
        return True


def _hypergradient(case: Case, solver: bl.InnerSolver, estimator: bl.Estimator) -> bl.Hypergradient:
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable .* influences neither loss")
        return bl.hypergradient(case.problem, case.outer, case.inner, case.batches, solver=solver, estimator=estimator)


def check_program(case: Case) -> Found:
    """The gradient of at most 3 steps, along one random direction of x, against differences of the outer loss."""
    double = in_float64(case)
    solver = _Few(case.solver.dynamics, min(case.solver.max_steps, _STEPS))
    try:
        grad = tree.tensors(_hypergradient(double, solver, bl.Unrolled()).grad)
    except bl.NotTwiceDifferentiableError as error:
        raise CannotTellError("a second derivative is missing") from error
    xs = tree.tensors(double.outer)
    draw = torch.Generator().manual_seed(SEED)
    direction = [torch.randn(leaf.shape, generator=draw, dtype=torch.float64).to(leaf.device) for leaf in xs]
    size = sum(float(leaf.square().sum()) for leaf in direction) ** 0.5
    direction = [leaf / max(size, 1e-300) for leaf in direction]

    def value(length: float) -> float:
        moved = [leaf.detach() + length * v for leaf, v in zip(xs, direction, strict=True)]
        torch.manual_seed(SEED)
        outer = tree.like(double.outer, moved)
        end = bl.adapt(double.problem, outer, double.inner, copied_batches(double), solver=solver)
        assert end.outer_loss is not None
        return float(end.outer_loss)

    width = 1e-4 * max(1.0, max(float(leaf.abs().max()) for leaf in xs if leaf.numel()))
    coarse, fine = ((value(h) - value(-h)) / (2 * h) for h in (width, width / 2))
    slope = sum(float((g * v).sum()) for g, v in zip(grad, direction, strict=True))
    lacking = abs(slope - fine)
    # What a difference cannot know better: rounding of the values over its width.
    noise = 1e-14 * max(1.0, abs(value(0.0))) / width + 1e-6 * sum(float(leaf.norm()) for leaf in grad)
    if lacking > max(_OFF * abs(fine), 10 * noise):
        if abs(coarse - fine) >= _STEADY * lacking:
            raise CannotTellError("finite differences of two widths disagree: the program is not smooth here")
        sentence = (
            f"along a direction of x the gradient of the program of {solver.count} steps is {slope:.6g}, and its "
            f"finite difference is {fine:.6g}: a path is cut (.detach(), .item(), torch.no_grad(), numpy, a custom "
            f"backward), or x is used from a closure"
        )
        return [("WRONG_GRADIENT", sentence)]
    return []


def copied_batches(case: Case) -> bl.Batches:
    """The batches of a case, with copies of the tensors that every step shares."""
    inner = case.batches.inner if isinstance(case.batches.inner, bl.PerStep) else copied(case.batches.inner)
    return dataclasses.replace(case.batches, inner=inner, outer=copied(case.batches.outer))


def check_digits(case: Case) -> Found:
    """The hypergradient in the dtype that was given against that in float64."""
    if case.dtype == torch.float64:
        return []
    if case.random:
        raise CannotTellError("the losses draw random numbers, which are others in float64")
    double = in_float64(case)
    try:
        estimator = bl.Unrolled("segments")
        single, exact = (tree.tensors(_hypergradient(each, each.solver, estimator).grad) for each in (case, double))
    except bl.NotTwiceDifferentiableError as error:
        raise CannotTellError("a second derivative is missing") from error
    size = sum(float(leaf.square().sum()) for leaf in exact) ** 0.5
    off = sum(float((a.double() - b).square().sum()) for a, b in zip(single, exact, strict=True)) ** 0.5
    if off <= _OFF * size or size == 0:
        return []
    sentence = (
        f"the hypergradient in {case.dtype} is {off / size:.2g} (relative) off that in float64, of norm {size:.3g}. "
        f"Use float64, take fewer steps or a smaller step size, or look for differences of large numbers in the losses"
    )
    return [("DIGITS_LOST", sentence)]
