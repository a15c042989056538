"""What the numbers must be, by hand in plain torch: no line of bilevel is used here.

An oracle runs with a `Rounding`. With eta = 0 it is the answer; with eta = a few units of rounding, each iterate, inner
gradient and cotangent is multiplied by 1 + eta xi, and the spread of a few such runs says how many digits any program
in this precision can have (stochastic arithmetic, Vignes 1993). So tolerances follow from the draw.
"""

import dataclasses
from typing import Any

import torch
from fuzzing_problems import Leaves, Named, Program
from torch import Tensor

Partial = list[Tensor | None]


class Rounding:
    """Relative noise of size eta on whatever passes, forwards and backwards."""

    def __init__(self, eta: float = 0.0, seed: int = 0) -> None:
        self.eta, self._generator = eta, torch.Generator().manual_seed(seed)

    def __call__(self, leaf: Tensor) -> Tensor:
        if self.eta == 0.0:
            return leaf
        here, back = (1 + self.eta * torch.randn(2, *leaf.shape, generator=self._generator, dtype=leaf.dtype)).unbind()
        noisy = leaf * here
        if noisy.requires_grad:
            noisy.register_hook(lambda grad: grad * back)
        return noisy


@dataclasses.dataclass(frozen=True)
class Task:
    """One task in float64."""

    program: Program
    xs: Named
    start: Leaves
    inner: list[Any]
    outer: Any
    curvature: Any

    def batch(self, step: int) -> Any:
        """The inner batch of a step."""
        return self.inner[min(step, len(self.inner) - 1)] if len(self.inner) > 1 else self.inner[0]

    def g(self, ys: Leaves, xs: Named, batch: Any, embedded: Any) -> Tensor:
        """The inner loss with its proximal term."""
        value = self.program.g(ys, xs, embedded)
        if self.program.strength:
            assert self.program.init is not None
            pairs = zip(ys, self.program.init(xs, batch), strict=True)
            value = value + 0.5 * self.program.strength * torch.stack([(y - s).square().sum() for y, s in pairs]).sum()
        return value

    def f(self, ys: Leaves, xs: Named) -> Tensor:
        """The outer loss."""
        return self.program.f(ys, xs, self.program.embed(xs, self.outer))


@dataclasses.dataclass(frozen=True)
class Run:
    """Where an inner loop ended; `residual` is the norm of the stationarity condition at the last gradient taken."""

    ys: Leaves
    steps: int
    residual: float


def attached(xs: Named) -> Named:
    """Leaves that require grad."""
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in xs.items()}


def grads(value: Tensor, at: Leaves, *, create: bool = False) -> Partial:
    """Derivatives, None where there is no path."""
    if not value.requires_grad:
        return [None] * len(at)
    return list(torch.autograd.grad(value, at, create_graph=create, retain_graph=True, allow_unused=True))


def descend(
    task: Task,
    xs: Named,
    steps: int,
    rounding: Rounding,
    *,
    graph: bool = False,
    first: int = 0,
    nu: float = 0.0,
    start: Leaves | None = None,
    tol: float | None = None,
) -> Run:
    """The inner loop on g + nu f. What happened before step `first` is a constant; `tol` stops earlier."""
    program = task.program
    ys = start if start is not None else task.start
    if program.init is not None and start is None:
        ys = program.init(xs, task.batch(0))
    ys, state = [rounding(leaf) for leaf in ys], [dict[str, Any]() for _ in ys]
    shared = program.embed(xs, task.inner[0]) if len(task.inner) == 1 else None
    residual = float("nan")
    for step in range(steps + (tol is not None)):
        if not graph or step == first > 0:
            ys = [leaf.detach() for leaf in ys]
            state = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in state]
        ys = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in ys]
        embedded = shared if shared is not None else program.embed(xs, task.batch(step))
        value = task.g(ys, xs, task.batch(step), embedded)
        if nu:
            value = value + nu * task.f(ys, xs)
        found = [None if d is None else rounding(d) for d in grads(value, ys, create=graph)]
        if tol is not None:
            size = [d.detach() for d in condition(program, xs, ys, found) if d is not None]
            residual = float(torch.cat([d.reshape(-1) for d in size]).norm())
            if residual <= tol or step == steps:
                return Run([leaf.detach() for leaf in ys], step, residual)
        hypers = {name: hyper(xs) for name, hyper in program.hyper.items()}
        ys = [
            y if d is None else rounding(one_step(program.optimizer, y, d, s, {n: h[i] for n, h in hypers.items()}))
            for i, (y, d, s) in enumerate(zip(ys, found, state, strict=True))
        ]
    return Run(ys if graph else [leaf.detach() for leaf in ys], steps, residual)


def one_step(kind: str, y: Tensor, d: Tensor, state: dict[str, Any], h: dict[str, Any]) -> Tensor:
    """The textbook step of one leaf; `state` is replaced entry by entry."""
    if kind == "adamw":
        y = y * (1 - h["lr"] * h["decay"])
    else:
        d = d + h["decay"] * y
    if kind in ("sgd", "nesterov"):
        past = state.get("buffer")
        state["buffer"] = buffer = d if past is None else h["momentum"] * past + (1 - h["dampening"]) * d
        return y - h["lr"] * (d + h["momentum"] * buffer if kind == "nesterov" else buffer)
    beta1, beta2, eps = h["momentum"], 0.99, 1e-3
    count = state["count"] = state.get("count", 0) + 1
    state["m"] = m = beta1 * state.get("m", 0.0) + (1 - beta1) * d
    state["v"] = v = beta2 * state.get("v", 0.0) + (1 - beta2) * d * d
    # A root whose derivative at exactly zero is zero: that entry of y does not move, whatever x does.
    root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
    return y - h["lr"] * (m / (1 - beta1**count)) / (root / (1 - beta2**count) ** 0.5 + eps)


def condition(program: Program, xs: Named, ys: Leaves, found: Partial) -> Partial:
    """What is zero at a solution: the gradient and coupled decay. A leaf that the loss does not use stays as it is."""
    decay = program.hyper["decay"](xs)
    return [None if d is None else d + c * y for d, c, y in zip(found, decay, ys, strict=True)]


def unrolled(task: Task, steps: int, rounding: Rounding, last: int | None = None) -> tuple[Partial, Run]:
    """The gradient of the K-step program, or of its last steps."""
    xs = attached(task.xs)
    run = descend(task, xs, steps, rounding, graph=True, first=0 if last is None else max(steps - last, 0))
    return grads(task.f(run.ys, xs), list(xs.values())), run


def first_order(task: Task, steps: int, rounding: Rounding, tol: float | None = None) -> tuple[Partial, Run]:
    """df/dx + (dy_0/dx)' df/dy(y_K)."""
    run = descend(task, task.xs, steps, rounding, tol=tol)
    xs, ys = attached(task.xs), [leaf.detach().requires_grad_() for leaf in run.ys]
    value = task.f(ys, xs)
    if task.program.init is not None:
        start = task.program.init(xs, task.batch(0))
        moved = [s * b for s, b in zip(start, grads(value, ys), strict=True) if b is not None]
        value = value + (torch.stack([part.sum() for part in moved]).sum() if moved else 0.0)
    return grads(value, list(xs.values())), run


def corrected(
    task: Task, steps: int, rounding: Rounding, nu: float, scheme: str, tol: float | None = None
) -> tuple[Partial, Run]:
    """The finite difference of the perturbed value function; both sides start alike."""
    sides = []
    for weight in (nu, -nu) if scheme == "symmetric" else (0.0, nu):
        run = descend(task, task.xs, steps, rounding, nu=weight, tol=tol)
        xs = attached(task.xs)
        at = task.batch(max(steps - 1, 0))  # it differentiates the loss that it perturbed, at no other batch
        g_x = grads(task.g(run.ys, xs, at, task.program.embed(xs, at)), list(xs.values()))
        f_x = grads(task.f(run.ys, xs), list(xs.values()))
        sides.append((run, [None if d is None else rounding(d) for d in g_x], f_x))
    (one, one_g, one_f), (two, two_g, two_f) = sides
    difference = combine([(1 / (2 * nu), one_g), (-1 / (2 * nu), two_g), (0.5, one_f), (0.5, two_f)])
    if scheme == "forward":
        return combine([(-1 / nu, one_g), (1 / nu, two_g), (1.0, two_f)]), one
    middle = [(a + b) / 2 for a, b in zip(one.ys, two.ys, strict=True)]
    return difference, Run(middle, one.steps, one.residual)


def combine(terms: list[tuple[float, Partial]]) -> Partial:
    """A weighted sum in which None is nothing."""
    total: Partial = [None] * len(terms[0][1])
    for weight, leaves in terms:
        parts = zip(total, leaves, strict=True)
        total = [t if d is None else weight * d if t is None else t + weight * d for t, d in parts]
    return total


@dataclasses.dataclass(frozen=True)
class System:
    """The implicit function theorem at a point, in dense matrices: A v = b, dF/dx = f_x - M' v."""

    matrix: Tensor
    mixed: list[Tensor | None]
    b: Tensor
    direct: Partial
    like: Leaves

    def gradient(self, v: Tensor) -> Partial:
        """The hypergradient of an adjoint."""
        through: Partial = [
            None if m is None else (m.T @ v).view(x.shape) for m, x in zip(self.mixed, self.like, strict=True)
        ]
        return combine([(1.0, self.direct), (-1.0, through)])


def linearized(task: Task, ys: Leaves, steps: int, damping: float, rounding: Rounding) -> System:
    """The system of the stationarity condition, coupled decay included."""
    xs, ys = attached(task.xs), [leaf.detach().requires_grad_() for leaf in ys]
    at = task.curvature if task.curvature is not None else task.batch(max(steps - 1, 0))
    found = grads(task.g(ys, xs, at, task.program.embed(xs, at)), ys, create=True)
    still = condition(task.program, xs, ys, found)
    rows = torch.cat([(torch.zeros_like(y) if d is None else d).reshape(-1) for d, y in zip(still, ys, strict=True)])
    jacobian = [grads(row, [*ys, *xs.values()]) for row in rows]

    def block(i: int, like: Tensor) -> Tensor:
        return torch.stack([(torch.zeros_like(like) if r[i] is None else r[i]).reshape(-1) for r in jacobian])

    matrix = torch.cat([block(i, y) for i, y in enumerate(ys)], dim=1)
    mixed = [
        block(i, x) if any(r[i] is not None for r in jacobian) else None for i, x in enumerate(xs.values(), len(ys))
    ]
    value = task.f(ys, xs)
    f_y = zip(grads(value, ys), ys, strict=True)
    b = torch.cat([(torch.zeros_like(y) if d is None else d).reshape(-1) for d, y in f_y])
    return System(
        rounding(matrix + damping * torch.eye(len(b), dtype=b.dtype)),
        [None if m is None else rounding(m) for m in mixed],
        rounding(b),
        grads(value, list(xs.values())),
        list(task.xs.values()),
    )


def krylov(matrix: Tensor, b: Tensor, start: Tensor, steps: int) -> list[Tensor]:
    """What conjugate gradients return after 0, 1, ... products: Galerkin solutions in an orthonormal Krylov basis."""
    residual, basis = b - matrix @ start, list[Tensor]()
    answers, new = [start], residual
    scale = residual.norm()
    for _ in range(min(steps, len(b))):
        for _ in range(2):
            for q in basis:
                new = new - (q @ new) * q
        if not new.norm() > 1e-11 * scale:
            break
        basis.append(new / new.norm())
        Q = torch.stack(basis, dim=1)
        small = Q.T @ matrix @ Q
        if not torch.linalg.eigvalsh(small + small.T).min() > 0:
            break
        answers.append(start + Q @ torch.linalg.solve(small, Q.T @ residual))
        new = matrix @ basis[-1]
        scale = new.norm()
    return answers


def neumann(matrix: Tensor, b: Tensor, steps: int, size: float) -> Tensor:
    """A sum_{j=0..J} (I - a A)^j b times a."""
    term, total = b, b
    for _ in range(steps):
        term = term - size * (matrix @ term)
        total = total + term
    return size * total
