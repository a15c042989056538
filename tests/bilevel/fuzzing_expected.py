"""What a draw must give: the number with its tolerance, or which refusals and failed statuses are legitimate."""

import dataclasses
from typing import Any

import fuzzing_oracle as oracle
import torch
from fuzzing_oracle import Partial, Rounding, Run, System, Task
from fuzzing_problems import Built, Choices, Leaves, Named
from torch import Tensor
from torch.utils import _pytree as pytree

AT_SOLUTION = ("implicit", "reduced", "corrected")
UNROLLED = ("graph", "iterates", "segments")
MAX_STEPS = 1200  # of Converge


def solve_tol(c: Choices) -> float:
    """Of conjugate gradients."""
    return 1e-5 if c.float32 else 1e-12


def inner_tol(c: Choices) -> float:
    """Of Converge."""
    return 1e-3 if c.float32 or c.estimator in UNROLLED else 1e-6


def nu_of(c: Choices) -> float:
    """The perturbation; None is the documented default."""
    default = {(False, "symmetric"): 1e-5, (False, "forward"): 1e-7, (True, "symmetric"): 1e-2, (True, "forward"): 1e-3}
    return default[c.float32, c.scheme] if c.nu is None else c.nu


def neumann_of(c: Choices) -> tuple[int, float]:
    """Products and step size; the wild one does not contract."""
    return 1 + c.seed % 6, 2.5 if c.linear == "wild" else 0.3


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one task. `others`: further numbers that are right where the linear system has no solution."""

    grads: Partial
    run: Run
    v: Tensor | None = None
    others: list[Partial] = dataclasses.field(default_factory=list)
    slack: list[float] | float = 0.0
    ys_slack: float = 0.0
    residual: float | None = None
    may_fail: bool = False
    must_fail: bool = False


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of a draw; `number` says whether `grads` is asked for at all."""

    number: bool
    grads: Partial
    tolerance: list[float]
    scale: float
    ys: Leaves
    ys_tolerance: float
    answers: list[Answer]
    must_refuse: str
    may_refuse: str

    @property
    def may_fail(self) -> bool:
        """A failed status is right."""
        return any(answer.may_fail for answer in self.answers)

    @property
    def must_fail(self) -> bool:
        """Only a failed status is right."""
        return any(answer.must_fail for answer in self.answers)


def double(value: Any) -> Any:
    """Every floating tensor in float64, without a graph."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
    )


def tasks_of(built: Built, outer: Named) -> list[Task]:
    """The draw as one problem a task, in float64."""
    c = built.choices

    def row(value: Any, t: int) -> Any:
        return pytree.tree_map(lambda leaf: leaf[t] if isinstance(leaf, Tensor) and c.tasks else leaf, double(value))

    return [
        Task(
            built.program,
            double(outer),
            row(built.inner, t),
            [row(batch, t) for batch in built.inner_batches],
            row(built.outer_batch, t),
            row(built.curvature, t),
        )
        for t in range(max(c.tasks, 1))
    ]


def moved(outer: Named) -> Named:
    """Where the second call of a warm start is made."""
    return {name: leaf.detach() * 1.01 + 0.01 for name, leaf in outer.items()}


def has_number(c: Choices) -> bool:
    """Whether the order of random draws is fixed by the program, so that there is one right number."""
    return c.random == "none" or (c.tasks == 0 and c.estimator in (*UNROLLED, "first"))


def expect(built: Built) -> Expected:
    """Run the oracle once as it is and twice (long runs: once) with noise of a few units of rounding."""
    c = built.choices
    eps = torch.finfo(c.dtype).eps
    runs = 1 if c.converge or c.steps > 8 else 2
    clean, *noisy = [answers_of(built, Rounding(4 * eps * (k > 0), k)) for k in range(1 + runs)]
    mean, *others = [_mean([answer.grads for answer in answers]) for answers in (clean, *noisy)]
    scale = float(torch.stack([d.norm() for d in mean if d is not None] or [torch.zeros(())]).norm())
    tolerance = []
    for i, d in enumerate(mean):
        spread = 0.0 if d is None else max(_largest(d - other[i]) for other in others if other[i] is not None)
        slack = [a.slack[i] if isinstance(a.slack, list) else a.slack for a in clean]
        tolerance.append(60 / runs * spread + 1e3 * eps * scale + sum(slack) / len(slack))
    ys = [torch.stack(leaves) if c.tasks else leaves[0] for leaves in zip(*[a.run.ys for a in clean], strict=True)]
    away = max(_largest(a - b) for runs in noisy for x, y in zip(clean, runs, strict=True)
               for a, b in zip(x.run.ys, y.run.ys, strict=True))  # fmt: skip
    must, may = _refusals(built, mean)
    return Expected(
        number=has_number(c),
        grads=mean,
        tolerance=tolerance,
        scale=scale,
        ys=ys,
        ys_tolerance=60 / runs * away + max(a.ys_slack for a in clean) + 1e3 * eps * max(_largest(leaf) for leaf in ys),
        answers=clean,
        must_refuse=must,
        may_refuse=may,
    )


def _largest(leaf: Tensor) -> float:
    return float(leaf.detach().abs().max()) if leaf.numel() else 0.0


def _mean(parts: list[Partial]) -> Partial:
    return oracle.combine([(1 / len(parts), part) for part in parts])


def answers_of(built: Built, rounding: Rounding) -> list[Answer]:
    """One answer a task, of the second call where the first makes the warm start."""
    c = built.choices
    torch.manual_seed(c.seed + 1)
    cold = [answer(c, task, rounding, None) for task in tasks_of(built, built.outer)]
    if c.warm == "cold":
        return cold
    return [answer(c, t, rounding, past) for t, past in zip(tasks_of(built, moved(built.outer)), cold, strict=True)]


def answer(c: Choices, task: Task, rounding: Rounding, past: Answer | None) -> Answer:
    """The estimator of this draw by hand."""
    tol = inner_tol(c) if c.converge else None
    steps = MAX_STEPS if c.converge else c.steps
    if c.estimator in UNROLLED:
        if c.converge:
            steps = oracle.descend(task, task.xs, steps, Rounding(), tol=tol).steps
        found, run = oracle.unrolled(task, steps, rounding, c.last)
        if c.converge and c.solved:  # no step is taken: the gradient of that program says nothing about the solution
            system = oracle.linearized(task, run.ys, 0, 0.0, rounding)
            return Answer(system.gradient(torch.linalg.solve(system.matrix, system.b)), run, may_fail=True)
        return Answer(found, run)
    if c.estimator == "first":
        return Answer(*oracle.first_order(task, steps, rounding, tol))
    if c.estimator == "corrected":
        found, run = oracle.corrected(task, steps, rounding, nu_of(c), c.scheme, tol)
        slack = ys_slack = 0.0
        if tol is not None:  # when a side stops is the library's choice, as long as both have converged
            system = oracle.linearized(task, run.ys, 0, 0.0, Rounding())
            curvature = float(torch.linalg.eigvalsh(system.matrix).min())
            ys_slack = 2 * tol / curvature
            slack = ys_slack / nu_of(c) * max([_largest(m) for m in system.mixed if m is not None] or [0.0])
        return Answer(found, run, slack=slack, ys_slack=ys_slack)
    warm_inner = past is not None and c.warm in ("inner", "both")
    run = oracle.descend(task, task.xs, steps, rounding, tol=tol, start=past.run.ys if past and warm_inner else None)
    system = oracle.linearized(task, run.ys, 0 if c.converge else steps, c.damping, rounding)
    return _adjoint(c, system, run, past.v if past is not None and c.warm in ("adjoint", "both") else None)


def _adjoint(c: Choices, system: System, run: Run, start: Tensor | None) -> Answer:
    matrix, b = (system.matrix + system.matrix.T) / 2, system.b
    curvatures = torch.linalg.eigvalsh(matrix)
    top = float(curvatures.abs().max())
    small = top * (1e-4 if c.float32 else 1e-9)
    definite, singular = float(curvatures.min()) > small, float(curvatures.abs().min()) <= small
    size = float(b.norm())

    def done(v: Tensor | None, **facts: Any) -> Answer:
        grads = system.gradient(torch.zeros_like(b) if v is None else v)
        residual = None if v is None else float((b - matrix @ v).norm()) / (size or 1.0)
        if residual is not None and size > 0 and c.linear in ("short", "neumann", "wild"):
            facts["must_fail"] = residual > 1.05
            facts["may_fail"] = facts.get("may_fail", False) or residual > 0.9
        return Answer(grads, run, v, residual=residual, **facts)

    if c.linear in ("neumann", "wild"):
        return done(oracle.neumann(matrix, b, *neumann_of(c)), may_fail=not definite)
    if size == 0 and start is None:
        return done(torch.zeros_like(b), may_fail=c.linear == "dense" and singular)
    pseudo = torch.linalg.pinv(matrix, hermitian=True, rtol=small / top if top else 0.0) @ b
    consistent = float((b - matrix @ pseudo).norm()) <= 1e-6 * size
    if c.linear == "dense":
        return done(pseudo, may_fail=singular, must_fail=singular and not consistent)
    begin = torch.zeros_like(b) if start is None else start
    path = oracle.krylov(matrix, b, begin, 2 if c.linear == "short" else 60)
    if definite:
        error = 10 * solve_tol(c) * size / float(curvatures.min())
        slack = [0.0 if m is None else error * float(m.norm()) for m in system.mixed]
        return done(path[-1] if c.linear == "short" else pseudo, slack=slack)
    ends = [pseudo] if not singular or consistent else []
    return done(None, may_fail=True, others=[system.gradient(v) for v in (*path, *ends)])


def _refusals(built: Built, found: Partial) -> tuple[str, str]:
    """Why the library must refuse, and why it may."""
    c = built.choices
    if c.optimizer == "adamw" and c.decay != "none" and c.estimator in AT_SOLUTION:
        return "decoupled decay has no stationarity condition", ""
    may = ""
    if c.optimizer == "adamw" and c.converge:
        may = "Converge under decoupled decay"
    if c.converge and c.solved and c.estimator in UNROLLED:
        may = "no step to unroll"
    if c.decay in ("learned", "leaf") and c.estimator in ("implicit", "reduced"):
        may = "a learned decay is a hyper-parameter"
    if all(d is not None for d in found):
        return "", may
    torch.manual_seed(c.seed + 1)
    names: list[list[str]] = []
    for steps in (20 if c.converge else c.steps, max(c.steps, 2)):
        full = _mean([oracle.unrolled(task, steps, Rounding())[0] for task in tasks_of(built, built.outer)])
        pairs = zip(built.outer, found, full, strict=True)
        names.append([name for name, seen, there in pairs if seen is None and there is not None])
        if len(names) == 1:
            nonzero = [n for n, d in zip(built.outer, full, strict=True) if n in names[0] and d is not None and d.any()]
    if nonzero:
        return f"cannot see {', '.join(nonzero)}", ""
    # A path along which exactly nothing comes (dead units), or which a longer run has: either answer will do.
    hidden = [*names[0], *names[1]]
    return "", may or (f"cannot see {', '.join(hidden)}" if hidden else "")
