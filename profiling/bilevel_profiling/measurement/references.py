"""Float64 hypergradients to measure errors against. There are two, and an estimator may be right about one and wrong
about the other:

    program:   the gradient of the K-step program, d/dx f(y_K(x), x), by Unrolled(keep="iterates")
    solution:  the hypergradient at a converged inner solution, dF/dx, by Implicit with a tight linear solve

Unrolling is exact for the first; implicit estimators aim at the second. The error against the program says how an
estimator changes what K steps do; the error against the solution says how far it is, K included, from the problem as
posed.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.cases.case import Case, Posed
from bilevel_profiling.measurement.noise import Draws

_DENSE_SIZE = 256
"""Up to this many inner numbers (of one task) the adjoint system is solved directly."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A float64 hypergradient, or None with a note on why there is none."""

    grad: tuple[Tensor, ...] | None
    note: str
    random: bool = False
    """Whether the losses drew random numbers, those of eager code."""


@dataclasses.dataclass(frozen=True)
class References:
    """Both references of a case at one K."""

    program: Reference
    solution: Reference

    @property
    def note(self) -> str:
        """How they were made."""
        return f"Program: {self.program.note} Solution: {self.solution.note}"

    def of_compiled(self) -> "References":
        """Those that hold for compiled losses, which draw other random numbers than eager ones."""
        if not self.program.random:
            return self
        why = "none, because the losses draw random numbers, and compiled code draws others than the reference."
        return References(Reference(None, why), self.solution)


NONE = Reference(None, "not asked for.")


def of_case(case: Case) -> References:
    """Both references, made here and now."""
    return References(program(case), solution(case))


def program(case: Case) -> Reference:
    """The gradient of the K-step program.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import quadratic
        >>> case = Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), steps=5), estimator=bl.Implicit(bl.CG(6)))
        >>> program(case).note
        'float64, Unrolled(keep="iterates").'
    """
    how = 'float64, Unrolled(keep="iterates")'
    how += "" if case.solver.fixed else ", of the steps that the tolerance takes in float64"
    return _made(case, case.solver, bl.Unrolled(keep="iterates"), how)


def solution(case: Case) -> Reference:
    """The hypergradient at the solution that `case.solution` converges to; none where it does not converge."""
    if case.solution is None:
        return Reference(None, "the case declares no solver for it.")
    posed = case.pose()
    start = posed.inner if posed.inner is not None else posed.outer
    small = tree.size(start) / _tasks(case, posed) <= _DENSE_SIZE
    linear: bl.LinearSolver = bl.Dense() if small else bl.CG(max_steps=2000, tol=1e-12)
    return _made(
        case, case.solution, bl.Implicit(linear), f"float64, {case.solution!r} and Implicit({linear!r})", strict=True
    )


def errors(grad: Sequence[Tensor], reference: Reference) -> tuple[float | None, float | None]:
    """Relative error |grad - reference| / |reference| and cosine, over all outer tensors as one vector.

    Example:
        >>> import torch
        >>> errors([torch.tensor([0.0, 2.0])], Reference((torch.tensor([0.0, 1.0]).double(),), ""))
        (1.0, 1.0)
    """
    if reference.grad is None:
        return None, None
    ours, exact = _flat(grad), _flat(reference.grad)
    if ours.shape != exact.shape:
        return None, None
    difference, size, own = (float(torch.linalg.vector_norm(v)) for v in (ours - exact, exact, ours))
    relative = difference / size if size > 0 else 0.0 if difference == 0 else float("inf")
    return relative, float(ours @ exact) / (size * own) if size > 0 and own > 0 else None


def cached(case: Case, kind: str, path: Path) -> Reference:
    """`program` or `solution` (the kind), from `path` if it was made there from the same problem, else made and written
    there.
    """
    mark = _fingerprint(case, kind)
    if path.exists():
        found = load(path)
        if found is not None and found[0] == mark:
            return found[1]
    made = program(case) if kind == "program" else solution(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    grad = None if made.grad is None else [leaf.cpu() for leaf in made.grad]
    torch.save({"mark": mark, "grad": grad, "note": made.note, "random": made.random}, draft)
    draft.replace(path)
    return made


def load(path: Path) -> tuple[str, Reference] | None:
    """What `cached` wrote, with the mark of what it was made from; None if it is not readable."""
    try:
        found = torch.load(path, weights_only=True)
        grad = None if found["grad"] is None else tuple(found["grad"])
        return found["mark"], Reference(grad, found["note"], found["random"])
    except (OSError, EOFError, RuntimeError, KeyError, ValueError):
        return None


def _tasks(case: Case, posed: Posed) -> int:
    many = isinstance(case.estimator, bl.TaskMean)
    return max(1, tree.tensors(posed.batches.outer)[0].shape[0]) if many else 1


def _made(case: Case, solver: bl.InnerSolver, estimator: bl.Estimator, how: str, *, strict: bool = False) -> Reference:
    """The estimate in float64; whatever goes wrong is a note, because a row without an error is still a row."""
    try:
        posed, draws = case.pose(), Draws()
        hg = _run(case, posed.double(), solver, _over_tasks(case, estimator, 1), draws)
        if why := _unrepeatable(draws, strict):
            return Reference(None, f"none, because {why}.")
        if draws.log:
            estimator = _over_tasks(case, estimator, None)
            _run(case, posed, solver, estimator, own := Draws())
            hg = _run(case, posed.double(), solver, estimator, draws := Draws(like=own))
            if not draws.same_as(own):
                return Reference(None, "none, because in float64 the losses draw other random numbers.")
            how += f", with the random numbers of a {str(posed.dtype).removeprefix('torch.')} run"
    except Exception as error:
        text = " ".join(str(error).split())
        mixed = isinstance(error, RuntimeError) and any(word in text for word in ("dtype", "Double", "double"))
        hint = " A loss holds tensors of its own; pass them in the batches, which are cast." if mixed else ""
        return Reference(None, f"none, because in float64 it raised {type(error).__name__}: {text[:300]}{hint}")
    if hg.status.failed or (strict and hg.status is not bl.Status.OK):
        return Reference(None, f"none, because {how} ended with {hg.status.name}.")
    if hg.outer_loss.dtype != torch.float64:
        return Reference(
            None, f"none, because the outer loss of float64 arguments is {hg.outer_loss.dtype}: a loss casts."
        )
    return Reference(tuple(leaf.detach() for leaf in tree.tensors(hg.grad)), f"{how}.", bool(draws.log))


def _run(case: Case, posed: Posed, solver: bl.InnerSolver, estimator: bl.Estimator, draws: Draws) -> bl.Hypergradient:
    torch.manual_seed(case.seed)
    with draws:
        return bl.hypergradient(
            posed.problem, posed.outer, posed.inner, posed.batches, solver=solver, estimator=estimator
        )


def _over_tasks(case: Case, estimator: bl.Estimator, chunk: int | None) -> bl.Estimator:
    """`estimator` over the case's tasks, `chunk` at a time; None for as many as the case takes, which draw together."""
    if not isinstance(case.estimator, bl.TaskMean):
        return estimator
    return dataclasses.replace(case.estimator, estimator=estimator, chunk=chunk or case.estimator.chunk)


def _unrepeatable(draws: Draws, strict: bool) -> str:
    """Why a reference cannot be given the noise that a run had, or ""."""
    if draws.elsewhere:
        return (
            "the losses draw random numbers from a generator of their own, or from numpy's or Python's, which cannot "
            "be put back; draw from torch's global generator"
        )
    if strict and draws.log:
        return "the losses draw random numbers, so that there is no one solution"
    return ""


def _fingerprint(case: Case, kind: str) -> str:
    """Tells two problems apart: by their data, their solver, and what one inner step of them does to the outer loss."""
    posed = case.pose().double()
    solver = case.solver if kind == "program" else case.solution
    found = program(dataclasses.replace(case, solver=_cut(case.solver, 1)))
    parts = tree.tensors((posed.tensors(case.solver.max_steps), found.grad))
    stream = io.BytesIO()
    torch.save([leaf.detach().cpu().contiguous() for leaf in parts], stream)
    over_tasks = repr(_over_tasks(case, bl.Unrolled(), None if found.random else 1))
    words = f"{kind} {solver!r} {over_tasks} {found.note} {torch.__version__} {bl.__version__}"
    return hashlib.sha256(stream.getvalue() + words.encode()).hexdigest()


def _cut(solver: bl.InnerSolver, most: int) -> bl.InnerSolver:
    """As many steps as `solver` may take, and at most `most`, of what it moves y by."""
    return bl.Descent(solver.dynamics, min(solver.max_steps, most))


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1).to("cpu", torch.float64) for leaf in leaves])
