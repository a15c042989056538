"""Small bilevel problems whose hypergradient is known: in closed form, or from a program written out by hand.

Inner Hessians have eigenvalues between 0.5 and 2, so that 100 steps of size 0.5 end within rounding of the solution and
a linear solver with its usual budget is exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.space import tree
from bilevel.space.tree import Tree

PROGRAM_STEPS, SOLUTION_STEPS = 6, 100
_RATE = 0.5
_SIZES = P, Q = 4, 3
Hyper = Callable[[Tree], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """One problem with its data.

    Args:
        name: what a failure calls it.
        problem: the two losses.
        outer: x.
        inner: y_0, or None with Problem.init.
        batches: the data; with `tasks`, with a leading task dimension.
        paths: how x acts, all of its tensors taken together.
        rate: the step size, a number or a function of x.
        decay: the weight decay, likewise.
        tasks: how many tasks there are, for use under TaskMean; None for a problem of its own.
        random: whether the losses draw random numbers; then there is no solution.
        closed_form: dF/dx of K steps (None: at the solution), where a formula is known.
    """

    name: str
    problem: bl.Problem
    outer: Tree
    inner: Tree | None
    batches: bl.Batches
    paths: frozenset[bl.Path]
    rate: float | Hyper = _RATE
    decay: float | Hyper = 0.0
    tasks: int | None = None
    random: bool = False
    closed_form: Callable[[int | None], list[Tensor]] | None = None

    def solver(self, steps: int) -> bl.InnerSolver:
        """That many plain steps."""
        return bl.Descent(bl.SGD(lr=self.rate, weight_decay=self.decay), steps)

    def steps(self, target: str | None) -> int:
        """K: few for the K-step program, enough to be at the solution otherwise."""
        return SOLUTION_STEPS if target == "solution" else PROGRAM_STEPS

    def expected(self, target: str) -> list[Tensor]:
        """dF/dx, leaf by leaf."""
        if self.closed_form is not None:
            return self.closed_form(None if target == "solution" else self.steps(target))
        return written_out(self, self.steps(target))


def written_out(probe: Probe, steps: int) -> list[Tensor]:
    """The gradient of the K-step program under seed 0, written as a loop and differentiated once."""
    torch.manual_seed(0)
    x = tree.attach(probe.outer)
    total = torch.zeros((), dtype=tree.tensors(x)[0].dtype)
    for task in range(probe.tasks or 1):
        batches, inner = probe.batches, probe.inner
        if probe.tasks is not None:
            batches, inner = _of_task(batches, task), _row(inner, task)
        y = tree.attach(inner) if probe.problem.init is None else probe.problem.init(x, batches.inner_at(0))
        for step in range(steps):
            # A start may be x itself; the gradient in y must not take in that in x.
            y = tree.tree_map(lambda leaf: leaf.view_as(leaf), y)
            loss = probe.problem.inner_loss(y, x, batches.inner_at(step))
            leaves = tree.tensors(y)
            gradient = autodiff.filled(autodiff.grad([loss], leaves, create_graph=True), leaves)
            rate, decay = (value(x) if callable(value) else value for value in (probe.rate, probe.decay))
            y = tree.like(y, [leaf - rate * (g + decay * leaf) for leaf, g in zip(leaves, gradient, strict=True)])
        total = total + probe.problem.outer_loss(y, x, batches.outer) / (probe.tasks or 1)
    xs = tree.tensors(x)
    return [leaf.detach() for leaf in autodiff.filled(autodiff.grad([total], xs), xs)]


def of_task(probe: Probe, task: int) -> Probe:
    """One task of a probe with tasks, as a problem of its own."""
    name = f"{probe.name}, task {task} alone"
    return dataclasses.replace(
        probe, name=name, inner=_row(probe.inner, task), batches=_of_task(probe.batches, task), tasks=None
    )


def _row(value: Tree, task: int) -> Tree:
    return None if value is None else tree.tree_map(lambda leaf: leaf[task], value)


def _of_task(batches: bl.Batches, task: int) -> bl.Batches:
    return bl.Batches(_row(batches.inner, task), _row(batches.outer, task))


class _Draws:
    """Numbers of one seed, whatever the global generator is at."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self._dtype)

    def definite(self, size: int) -> Tensor:
        """A symmetric matrix with eigenvalues from 0.5 to 1.5."""
        basis = torch.linalg.qr(self(size, size).double())[0]
        return ((basis * torch.linspace(0.5, 1.5, size, dtype=torch.float64)) @ basis.T).to(self._dtype)


INNER, OUTER = bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS


def probes(dtype: torch.dtype) -> list[Probe]:
    """All of them, the simplest first."""
    general = [_quadratic(dtype), _softmax(dtype), _started(dtype), _decayed(dtype), _tasks(dtype), _minibatches(dtype)]
    return [*general, _nested(dtype), _random(dtype), *_single_paths(dtype)]


def _quadratic(dtype: torch.dtype) -> Probe:
    """G = y'Hy/2 - y'Cx, f = |y - a|^2/2 + |x|^2/10; with R = I - lr H, y_K = R^K y_0 + (I - R^K) H^-1 C x."""
    draw = _Draws(dtype)
    hessian, coupling, target, x, y = draw.definite(P), draw(P, Q), draw(P), draw(Q), draw(P)

    def closed_form(steps: int | None) -> list[Tensor]:
        h, c, a, x_, y_ = (each.double() for each in (hessian, coupling, target, x, y))
        identity = torch.eye(P, dtype=torch.float64)
        power = torch.zeros_like(h) if steps is None else torch.linalg.matrix_power(identity - _RATE * h, steps)
        solution = torch.linalg.solve(h, c @ x_)
        end = power @ y_ + (identity - power) @ solution
        through = c.T @ torch.linalg.solve(h, (identity - power) @ (end - a))
        return [(0.2 * x_ + through).to(dtype)]

    return Probe(
        "a strongly convex quadratic",
        bl.Problem(
            lambda y, x, b: 0.5 * y @ b[0] @ y - y @ b[1] @ x,
            lambda y, x, b: 0.5 * (y - b).square().sum() + 0.1 * x.square().sum(),
        ),
        x,
        y,
        bl.Batches([hessian, coupling], target),
        frozenset({INNER, OUTER}),
        closed_form=closed_form,
    )


def _softmax(dtype: torch.dtype) -> Probe:
    """Weighted softmax regression: x are the logarithms of the data's weights and a penalty."""
    draw = _Draws(dtype, 1)
    rows, classes = 8, 3
    inputs, targets = 0.7 * draw(2, rows, P), draw(2, rows, classes).softmax(-1)
    outer = {"weights": 0.3 * draw(rows), "penalty": 0.1 * draw()}

    def losses(y: Tree, batch: Any) -> Tensor:
        return -(batch[1] * (batch[0] @ y["w"] + y["b"]).log_softmax(-1)).sum(-1)

    def inner_loss(y: Tree, x: Tree, batch: Any) -> Tensor:
        ridge = 0.4 * x["penalty"].exp() * (y["w"].square().sum() + y["b"].square().sum())
        return (x["weights"].exp() * losses(y, batch)).mean() + ridge

    return Probe(
        "weighted softmax regression",
        bl.Problem(inner_loss, lambda y, x, batch: losses(y, batch).mean() + 0.05 * x["weights"].square().sum()),
        outer,
        {"w": 0.3 * draw(P, classes), "b": 0.3 * draw(classes)},
        bl.Batches((inputs[0], targets[0]), (inputs[1], targets[1])),
        frozenset({INNER, OUTER}),
    )


def _smooth(y: Tensor, shift: Tensor) -> Tensor:
    """A smooth strongly convex loss that is not quadratic: curvature from 0.7 to 1.7."""
    return 0.35 * y.square().sum() + (1 + (y - shift).square()).sqrt().sum()


def _start(problem: bl.Problem, x: Tensor, batches: bl.Batches) -> tuple[bl.Problem, Tensor, None, bl.Batches]:
    return dataclasses.replace(problem, init=lambda x, b: x), x, None, batches


def _started(dtype: torch.dtype) -> Probe:
    draw = _Draws(dtype, 2)
    problem = bl.Problem(
        lambda y, x, b: _smooth(y, b) + 0.1 * (y - x).square().sum(), lambda y, x, b: (y - b).square().sum()
    )
    paths = frozenset({INNER, bl.Path.START})
    return Probe("a problem whose start is x", *_start(problem, draw(P), bl.Batches(draw(P), draw(P))), paths)


def _decayed(dtype: torch.dtype) -> Probe:
    draw = _Draws(dtype, 3)
    problem = bl.Problem(lambda y, x, b: _smooth(y, x), lambda y, x, b: (y - b).square().sum())
    return Probe(
        "an optimizer with weight decay",
        problem,
        draw(P),
        draw(P),
        bl.Batches(None, draw(P)),
        frozenset({INNER}),
        decay=0.3,
    )


def _tasks(dtype: torch.dtype) -> Probe:
    draw = _Draws(dtype, 4)
    problem = bl.Problem(
        lambda y, x, b: _smooth(y, b + x), lambda y, x, b: (y - b).square().sum() + 0.1 * x.square().sum()
    )
    paths = frozenset({INNER, OUTER, bl.Path.START})
    batches = bl.Batches(draw(2, P), draw(2, P))
    return Probe("two tasks under TaskMean", *_start(problem, draw(P), batches), paths, tasks=2)


def _minibatches(dtype: torch.dtype) -> Probe:
    """Every step has its own batch. After the first steps these are one loss, its rows in another order, so that there
    is a solution, also of a perturbed loss.
    """
    draw = _Draws(dtype, 5)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (b * (y - x).square()).sum(-1).mean(), lambda y, x, b: (y - b).square().sum() + x.sum()
    )
    rows = draw(6, P).sigmoid()
    first = [0.5 + draw(6, P).sigmoid() for _ in range(PROGRAM_STEPS)]
    steps = [*first, *(0.5 + rows.roll(step, 0) for step in range(SOLUTION_STEPS - PROGRAM_STEPS))]
    batches = bl.Batches(bl.PerStep(steps), draw(P))
    return Probe("a batch for each step", problem, draw(P), draw(P), batches, frozenset({INNER, OUTER}))


def _nested(dtype: torch.dtype) -> Probe:
    draw = _Draws(dtype, 6)
    outer = {"deep": [draw(P), (draw(),)], "flat": draw(2)}
    inner = [{"a": draw(P)}, (draw(2), draw())]

    def inner_loss(y: Tree, x: Tree, batch: Any) -> Tensor:
        (head,), (pair, single) = y[0].values(), y[1]
        return (
            _smooth(head, x["deep"][0]) + _smooth(pair, x["flat"]) + _smooth(single, x["deep"][1][0] * pair.sum() / 4)
        )

    def outer_loss(y: Tree, x: Tree, batch: Any) -> Tensor:
        return (y[0]["a"] - 1).square().sum() + (y[1][0] * x["flat"]).sum() + y[1][1] ** 2

    problem, batches = bl.Problem(inner_loss, outer_loss), bl.Batches(None, None)
    return Probe("nested trees of variables", problem, outer, inner, batches, frozenset({INNER, OUTER}))


def _random(dtype: torch.dtype) -> Probe:
    """A mask is drawn at every evaluation; whoever evaluates once more must draw the same."""
    draw = _Draws(dtype, 8)

    def masked(y: Tensor) -> Tensor:
        return y * torch.bernoulli(torch.full_like(y, 0.5))

    problem = bl.Problem(
        lambda y, x, b: _smooth(masked(y), x), lambda y, x, b: (masked(y) - b).square().sum() + x.sum()
    )
    batches = bl.Batches(None, draw(P))
    return Probe(
        "a loss with random numbers", problem, draw(P), draw(P), batches, frozenset({INNER, OUTER}), random=True
    )


def _single_paths(dtype: torch.dtype) -> list[Probe]:
    """For each path a problem in which x acts only there."""
    draw = _Draws(dtype, 7)
    shift, target, x, y = draw(P), draw(P), 0.5 * draw(P), draw(P)
    batches = bl.Batches(shift, target)

    def apart(y: Tree, x: Tree, b: Tensor) -> Tensor:
        return (y - b).square().sum()

    def alone(y: Tree, x: Tree, b: Tensor) -> Tensor:
        return _smooth(y, b)

    def made(path: bl.Path, problem: bl.Problem, outer: Tensor = x, inner: Tree | None = y, **more: Any) -> Probe:
        name = f"x acts only through {path.value}"
        # A weight decay that depends on x is a hyper-parameter and moves the solution.
        extra = {bl.Path.HYPERPARAMETER} if path is bl.Path.STATIONARITY else set[bl.Path]()
        return Probe(name, problem, outer, inner, batches, frozenset({path, *extra}), **more)

    number = torch.tensor(-1.0, dtype=dtype)
    return [
        made(INNER, bl.Problem(lambda y, x, b: _smooth(y, x), apart)),
        made(OUTER, bl.Problem(alone, lambda y, x, b: (y * x - b).square().sum())),
        made(bl.Path.START, bl.Problem(alone, apart, init=lambda x, b: x), inner=None),
        made(bl.Path.HYPERPARAMETER, bl.Problem(alone, apart), number, rate=lambda x: x.exp()),
        made(bl.Path.STATIONARITY, bl.Problem(alone, apart), number, decay=lambda x: x.exp()),
    ]


def separable(dtype: torch.dtype, estimator: bl.Estimator) -> Probe:
    """A problem on which a kept iterate shows, and that the estimator can see."""
    y = torch.linspace(-1, 1, 256, dtype=dtype)
    batches = bl.Batches(0.5 + y.sigmoid(), y.flip(0))
    started = bl.Path.INNER_LOSS not in estimator.sees
    x = y if started else y[::32].clone()  # (few: forward mode takes a product for each)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (b * (y if started else y - x.repeat(32)).square()).sum(),
        lambda y, x, b: (y - b).square().sum() + x.square().sum(),
        init=(lambda x, b: x + 1) if started and bl.Path.START in estimator.sees else None,
    )
    seen = frozenset({bl.Path.OUTER_LOSS}) if problem.init is None and started else frozenset[bl.Path]()
    return Probe("256 numbers", problem, x, None if problem.init else y.cos(), batches, seen)
