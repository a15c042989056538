"""check_estimator(): is an estimator what it says it is? On small problems whose answers are known."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.estimators import State
from bilevel.space import tree
from bilevel.testing import probes
from bilevel.testing.catalogue import GROWTHS, TARGETS
from bilevel.testing.probes import PROGRAM_STEPS, Probe
from bilevel.testing.result_checks import misstated
from bilevel.testing.storages import Storages

_TOLERANCE = {"program": (1e-10, 1e-4), "solution": (2e-6, 5e-3)}
"""In float64, and in less."""
_ALIKE = (1e-7, 1e-3)
"""Between one task at a time and all at once; a difference quotient has its rounding divided by its width."""
_MEMORY_STEPS = (16, 64, 256)
_ROOM = 1.02
"""What a peak may grow by without being growth."""


def check_estimator(
    estimator: bl.Estimator,
    *,
    target: str | None,
    memory_growth: str | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
) -> None:
    """Hold an estimator to its contract on small problems whose hypergradient is known.

    The problems: a strongly convex quadratic, weighted softmax regression, a start that is x, weight decay, two tasks
    under `TaskMean`, a batch for each step, nested trees of variables, a loss with random numbers, and for each `Path`
    one in which x acts only there. Inner Hessians have eigenvalues between 0.5 and 2.

    Checked in each: the value and the status; that `inner` is where the inner loop ends, and the losses those there (if
    there is a target, and no random numbers are in the losses); structure, dtype and ownership of what comes back; that
    no argument is changed; the same seed, the same answer; that state survives being saved, and that another's is
    refused; that tasks one by one equal tasks at once and the mean of problems of their own. Besides: a solver that
    stops by itself, begun at the solution; how peak memory grows with K. A problem may be refused (ValueError) if x
    acts there along a path that `sees` leaves out.

    Args:
        estimator: of one task (it is put into TaskMean here).
        target: "program" if it is the gradient of the K-step program, "solution" if it is that of the inner solution,
            None if it is biased: then all but the value and the status is checked.
        memory_growth: "constant", "sqrt" or "linear"; None for what the estimator says itself, where ""
            promises nothing.
        dtype: of all variables.
        tolerance: on |found - expected| / max(1, |expected|); None for 1e-10 (program) and 2e-6 (solution) in float64,
            1e-4 and 5e-3 in less.

    Raises:
        AssertionError: a property does not hold; the message names it, the problem, and the numbers.
        TypeError, ValueError: an argument is not what is needed.

    Example:
        >>> import dataclasses, bilevel as bl
        >>> check_estimator(bl.Implicit(bl.CG(max_steps=10, tol=1e-12)), target="solution")
        >>> @dataclasses.dataclass(frozen=True)
        ... class Direct(bl.Estimator):
        ...     sees = frozenset({bl.Path.OUTER_LOSS, bl.Path.INNER_LOSS})
        ...     def estimate(self, instance, state):
        ...         found = instance.solve()
        ...         loss, _, direct = instance.oracles.outer_gradient(found.inner)
        ...         return instance.finish(found, direct, loss)
        >>> try:
        ...     check_estimator(Direct(), target="program")
        ... except AssertionError as failure:
        ...     print(str(failure).split(":")[0])
        Direct() is not right for its target (program), on a strongly convex quadratic
    """
    if not isinstance(estimator, bl.Estimator) or isinstance(estimator, bl.TaskMean):
        raise TypeError(
            f"check_estimator was given a {type(estimator).__name__}; an estimator of one task was needed, such as "
            f"Unrolled() (it is put into TaskMean here)"
        )
    growth = estimator.memory_growth if memory_growth is None else memory_growth
    for name, value, words in (("target", target, (None, *TARGETS)), ("memory_growth", growth, ("", *GROWTHS))):
        if value not in words:
            raise ValueError(f"check_estimator was given {name}={value!r}; one of {words} was needed")
    if tolerance is None:
        tolerance = 0.0 if target is None else _TOLERANCE[target][dtype.itemsize < 8]
    checks = _Checks(estimator, target, tolerance)
    posed = [probe for probe in probes.probes(dtype) if not (probe.random and target == "solution")]
    answered = [probe.name for probe in posed if checks.answers(probe)]
    if not answered:
        raise AssertionError(
            f"{estimator} refused every problem, so nothing could be checked; it sees {_seen(estimator)}"
        )
    if target == "solution":
        checks.solved_start(dtype)
    if growth:
        checks.memory(growth, dtype)


def _seen(estimator: bl.Estimator) -> str:
    return ", ".join(path.value for path in bl.Path if path in estimator.sees) or "nothing"


@dataclasses.dataclass(frozen=True)
class _Checks:
    estimator: bl.Estimator
    target: str | None
    tolerance: float

    def answers(self, probe: Probe) -> bool:
        """Check everything on one problem; whether it was answered and not refused."""
        steps = probe.steps(self.target)
        arguments = _Arguments(probe)
        try:
            first = self.run(probe, steps)
            after = torch.get_rng_state()
        except ValueError as refusal:
            hidden = probe.paths - self.estimator.sees_after(steps)
            if hidden or arguments.changed():
                self.hold(
                    not arguments.changed(), "changes its arguments before it refuses", probe, arguments.changed()
                )
                return False
            raise AssertionError(
                f"{self.estimator} does not see what it says, on {probe.name}: `sees` names {_seen(self.estimator)}, "
                f"and x acts through no more there, and it raised {type(refusal).__name__}: {refusal}"
            ) from refusal
        self.hold(not arguments.changed(), "changes its arguments", probe, arguments.changed())
        self.value(first, probe)
        self.form(first, probe)
        if self.target is not None and not probe.random and first.next_inner is None:
            wrong = misstated(first, probe, steps)
            self.hold(not wrong, "returns another inner variable or loss than it says", probe, wrong)
        self.repeats(first, probe, steps, after)
        self.state(first, probe, steps)
        if probe.tasks is not None:
            self.tasks(first, probe, steps)
        return True

    def hold(self, condition: bool, failing: str, probe: Probe, numbers: str) -> None:
        """Raise AssertionError with what fails, where, and the numbers."""
        if not condition:
            raise AssertionError(f"{self.estimator} {failing}, on {probe.name}: {numbers}")

    def run(self, probe: Probe, steps: int, state: Any = None, *, chunk: int | None = None) -> bl.Hypergradient:
        """The hypergradient under seed 0."""
        estimator = self.estimator if probe.tasks is None else bl.TaskMean(self.estimator, chunk)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            # An estimator may be blind to the only path; whether that is right is seen in the value.
            warnings.filterwarnings("ignore", message="outer variable .* influences neither loss")
            return bl.hypergradient(
                probe.problem,
                probe.outer,
                probe.inner,
                probe.batches,
                solver=probe.solver(steps),
                estimator=estimator,
                state=state,
            )

    def value(self, found: bl.Hypergradient, probe: Probe) -> None:
        """The number, and that the status does not call it a failure."""
        if self.target is None:
            return
        expected, grad = probe.expected(self.target), tree.tensors(found.grad)
        error, size = _distance(grad, expected), _norm(expected)
        where = f"right for its target ({self.target})"
        numbers = (
            f"relative error {error / max(1.0, size):.2e}, at most {self.tolerance:.0e} was allowed (|found| = "
            f"{_norm(grad):.6g}, |expected| = {size:.6g}, |difference| = {error:.3g}, status {found.status.name}). "
            f"If x acts along a path that the estimator does not follow, leave that out of `sees`"
        )
        self.hold(error <= self.tolerance * max(1.0, size), f"is not {where}", probe, numbers)
        self.hold(not found.status.failed, f"is {where} but says that it failed", probe, found.status.name)

    def form(self, found: bl.Hypergradient, probe: Probe) -> None:
        """Structure, shapes, dtype, and whose memory it is."""
        for name, value, wanted in (("grad", found.grad, probe.outer), ("inner", found.inner, probe.inner)):
            wanted = probe.outer if wanted is None and probe.tasks is None else wanted
            if wanted is None:
                continue
            same = pytree.tree_structure(value) == pytree.tree_structure(wanted)
            self.hold(same, f"returns hg.{name} of another structure", probe, f"{_shape(value)} for {_shape(wanted)}")
            pairs = list(zip(tree.tensors(value), tree.tensors(wanted), strict=True))
            fits = all(a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in pairs)
            self.hold(
                fits, f"returns hg.{name} of another shape or dtype", probe, f"{_shape(value)} for {_shape(wanted)}"
            )
        for name, value in (("outer_loss", found.outer_loss), ("inner_loss", found.inner_loss)):
            self.hold(value.dim() == 0, f"returns hg.{name} of another shape", probe, _shape(value))
        results = list(_results(found))
        attached = [name for name, leaf in results if leaf.requires_grad]
        self.hold(not attached, "returns tensors with a graph", probe, ", ".join(attached))
        owners = {leaf.untyped_storage()._cdata: name for name, leaf in _Arguments.of(probe)}
        for name, leaf in results:
            storage = leaf.untyped_storage()._cdata
            shared = f"{name} has the storage of {owners.get(storage)}"
            self.hold(storage not in owners or not leaf.numel(), "shares memory with its results", probe, shared)
            owners[storage] = name

    def repeats(self, first: bl.Hypergradient, probe: Probe, steps: int, after: Tensor) -> None:
        """The same seed gives the same answer, and leaves the same random state."""
        again = self.run(probe, steps)
        pairs = list(zip(tree.tensors(first.grad), tree.tensors(again.grad), strict=True))
        apart = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
        same = all(torch.equal(a, b) for a, b in pairs)
        self.hold(same, "gives another answer under the same seed", probe, f"largest difference {apart:.3g}")
        moved = "the global random state after two equal calls differs"
        self.hold(torch.equal(after, torch.get_rng_state()), "draws differently under the same seed", probe, moved)

    def state(self, first: bl.Hypergradient, probe: Probe, steps: int) -> None:
        """State survives being saved; another's is refused."""
        state = first.state
        self._refuses(probe, steps, _Foreign(torch.zeros(1)), "of another class")
        if state is None:
            return
        self.hold(isinstance(state, State), "returns a state that is no bl.estimators.State", probe, str(type(state)))
        saved = state.to_dict()
        odd = [
            leaf for leaf in pytree.tree_leaves(saved) if not isinstance(leaf, Tensor | int | float | str | bool | None)
        ]
        self.hold(not odd, "returns a state that holds more than tensors and numbers", probe, str(odd[:1])[:80])
        again = type(state).from_dict(saved)
        kept = pytree.tree_leaves(again.to_dict()), pytree.tree_leaves(saved)
        lost = len(kept[0]) != len(kept[1]) or any(not _equal(a, b) for a, b in zip(*kept, strict=True))
        self.hold(not lost, "loses numbers of its state in to_dict and from_dict", probe, f"{kept[1]} became {kept[0]}")
        before = [leaf.clone() for leaf in tree.tensors(saved)]
        one, other = (self.run(probe, steps, each) for each in (state, saved))
        self.value(one, probe)
        changed = any(not torch.equal(a, b) for a, b in zip(before, tree.tensors(saved), strict=True))
        self.hold(not changed, "changes the state that it is given", probe, "state= was written to")
        error = _distance(tree.tensors(one.grad), tree.tensors(other.grad))
        self.hold(error == 0, "goes on differently from a saved state", probe, f"difference {error:.3g}")
        if any(leaf.dim() for leaf in tree.tensors(saved)):
            wrong = {key: _grown(value) for key, value in saved.items()}
            self._refuses(probe, steps, wrong, "of another problem (one row more)")
        self._refuses(probe, steps, saved | {"owner": "Somebody"}, "of another owner")

    def _refuses(self, probe: Probe, steps: int, state: Any, which: str) -> None:
        try:
            self.run(probe, steps, state)
        except ValueError:
            return
        self.hold(False, f"accepts a state {which}", probe, "no ValueError was raised")

    def tasks(self, first: bl.Hypergradient, probe: Probe, steps: int) -> None:
        """One after another, all at once, and each as a problem of its own."""
        torch.manual_seed(0)
        before = torch.get_rng_state()
        single = [self.run(probes.of_task(probe, task), steps) for task in range(probe.tasks or 1)]
        if not torch.equal(before, torch.get_rng_state()):
            return  # it draws random numbers of its own, and other ones for other chunks
        mean = [
            torch.stack(leaves).mean(0) for leaves in zip(*(tree.tensors(each.grad) for each in single), strict=True)
        ]
        bound = _ALIKE[mean[0].dtype.itemsize < 8]
        loop = self.run(probe, steps, chunk=1)
        for name, found in (("chunk=1", loop), ("chunk=None", first)):
            error = _distance(tree.tensors(found.grad), mean) / max(1.0, _norm(mean))
            numbers = f"relative difference {error:.2e}, at most {bound:.0e} was allowed"
            self.hold(error <= bound, f"under TaskMean({name}) is not the mean of single tasks", probe, numbers)
        if first.state is not None:
            warm = [self.run(probe, steps, first.state, chunk=chunk) for chunk in (None, 1)]
            error = _distance(*(tree.tensors(each.grad) for each in warm)) / max(1.0, _norm(mean))
            numbers = f"relative difference {error:.2e} between chunk=None and chunk=1"
            self.hold(error <= bound, "mixes the states of tasks", probe, numbers)

    def solved_start(self, dtype: torch.dtype) -> None:
        """A solver that stops by itself, begun where it stops: the solution moves with x although no step is taken."""
        probe = probes.probes(dtype)[0]
        solver, tol = probe.solver(probes.SOLUTION_STEPS), 1e-9 if dtype.itemsize >= 8 else 1e-4
        solution = bl.adapt(probe.problem, probe.outer, probe.inner, probe.batches, solver=solver).inner
        for where, start in (("its start", probe.inner), ("its solution", solution)):
            changed = {"name": f"{probe.name}, with Converge from {where}", "inner": start, "tol": tol}
            again = _Stopping(**(_fields(probe) | changed))
            self.value(self.run(again, 0), again)

    def memory(self, growth: str, dtype: torch.dtype) -> None:
        """Peak bytes against K."""
        probe = probes.separable(dtype, self.estimator)
        self.run(probe, PROGRAM_STEPS)  # what is looked at once per problem, is
        peaks = []
        for steps in _MEMORY_STEPS:
            with Storages() as storages:
                self.run(probe, steps)
            peaks.append(storages.peak)
        numbers = ", ".join(f"K = {k}: {peak:,} bytes" for k, peak in zip(_MEMORY_STEPS, peaks, strict=True))
        early, late = peaks[1] - peaks[0], peaks[2] - peaks[1]
        flat = max(peaks) <= _ROOM * min(peaks)
        # K quadruples twice: the growth doubles for a square root, quadruples for a linear law. Between those is 2.8.
        most = {"constant": 0.0, "sqrt": 2.8, "linear": 5.6}[growth]
        self.hold(flat or late <= most * early, f"grows in memory faster than promised ({growth})", probe, numbers)


@dataclasses.dataclass(frozen=True)
class _Foreign(State):
    """Nobody's state."""

    number: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Stopping(Probe):
    """A probe whose solver stops by itself."""

    tol: float = 0.0

    def solver(self, steps: int) -> bl.InnerSolver:
        return bl.Converge(bl.SGD(lr=self.rate), tol=self.tol, max_steps=500)


def _fields(probe: Probe) -> dict[str, Any]:
    return {field.name: getattr(probe, field.name) for field in dataclasses.fields(probe)}


class _Arguments:
    """What the arguments were before a call."""

    def __init__(self, probe: Probe) -> None:
        self._before = [(name, leaf, leaf.clone(), leaf._version, leaf.requires_grad) for name, leaf in self.of(probe)]

    @staticmethod
    def of(probe: Probe) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name."""
        inner = probe.batches.inner
        steps = [inner[step] for step in range(PROGRAM_STEPS)] if isinstance(inner, bl.PerStep) else inner
        for role, value in (
            ("outer", probe.outer),
            ("inner", probe.inner),
            ("Batches.inner", steps),
            ("Batches.outer", probe.batches.outer),
        ):
            if value is not None:
                for name, leaf in zip(tree.names(value), tree.flatten(value)[0], strict=True):
                    if isinstance(leaf, Tensor):
                        yield f"{role} {name}", leaf

    def changed(self) -> str:
        """What differs now, as a clause; "" for nothing."""
        for name, leaf, value, version, required in self._before:
            if not torch.equal(leaf, value):
                return f"{name} moved by {float((leaf - value).abs().max()):.3g}"
            if leaf._version != version or leaf.requires_grad != required or leaf.grad is not None:
                return f"{name} was written to, or given a .grad"
        return ""


def _results(found: bl.Hypergradient) -> Iterator[tuple[str, Tensor]]:
    state = None if found.state is None else found.state.to_dict() if isinstance(found.state, State) else found.state
    for role, value in (
        ("hg.grad", found.grad),
        ("hg.inner", found.inner),
        ("hg.outer_loss", found.outer_loss),
        ("hg.inner_loss", found.inner_loss),
        ("hg.state", state),
        ("hg.next_inner", found.next_inner),
    ):
        for leaf in tree.tensors(value):
            yield role, leaf


def _grown(value: Any) -> Any:
    """Every tensor with a row more."""
    return pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf[:1]]) if isinstance(leaf, Tensor) and leaf.dim() else leaf, value
    )


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _shape(value: Any) -> str:
    return str(
        pytree.tree_map(lambda leaf: (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, value)
    )


def _norm(leaves: Sequence[Tensor]) -> float:
    return sum(float(leaf.double().square().sum()) for leaf in leaves) ** 0.5


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return _norm([a.double() - b.double() for a, b in zip(one, other, strict=True)])
