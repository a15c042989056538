"""A Case: everything one measurement needs, and the same problem made afresh each time it is asked for."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.space import tree
from bilevel_profiling.cases.parallel import Parallel

Setup = Callable[..., Any]
"""`setup(device)` or `setup(device, seed=...)` -> (problem, outer, inner, batches)."""
STEPS = ("steps", "max_steps")
"""What the field of an inner solver is called that limits its steps."""
OuterOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def adam(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of a case that names none."""
    return torch.optim.Adam(tensors, lr=1e-2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One estimator on one problem, to be measured.

    Args:
        setup: makes the problem, called as `setup(device)`, with `seed=` if it takes one, after torch.manual_seed;
            returns `(problem, outer, inner, batches)`.
        solver: how the inner variable moves.
        estimator: what is measured.
        device: "cpu", "cuda", ...
        seed: of the random numbers before `setup` and before each measured call.
        name: of the case in the record; by default that of `setup`'s module, or of `setup` itself.
        label: of the estimator in the record; by default its class.
        solution: an inner solver that converges, such as `bl.Converge(...)`: where it is given, the error against the
            hypergradient at the solution is measured too.
        outer_optimizer: makes the torch optimizer of the outer tensors; Adam with lr 1e-2 by default. It is part of the
            outer phase.
        engine: how derivatives are computed, such as `bl.Compiled()`; None for operator by operator.
        engine_name: of the engine in the record; by default its class in lower case, "" for None.
        parallel: how the work is split where several ranks do it together.
        ranks: those that do: every one of them measures the same case at the same time. None for this process alone.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import quadratic
        >>> case = Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), steps=5), estimator=bl.Unrolled())
        >>> case.name, case.label
        ('quadratic', 'Unrolled')
    """

    setup: Setup
    solver: bl.InnerSolver
    estimator: bl.Estimator
    device: str = "cpu"
    seed: int = 0
    name: str = ""
    label: str = ""
    solution: bl.InnerSolver | None = None
    outer_optimizer: OuterOptimizer = adam
    engine: bl.Engine | None = None
    engine_name: str = ""
    parallel: Parallel | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        for name, kind, write in (
            ("solver", bl.InnerSolver, "bl.Descent(bl.SGD(lr=0.1), steps=20)"),
            ("estimator", bl.Estimator, "bl.Unrolled()"),
            ("engine", (bl.Engine, type(None)), "None or bl.Compiled()"),
            ("parallel", (Parallel, type(None)), "None, DATA or TASKS of bilevel_profiling"),
            ("ranks", (Ranks, type(None)), "None or bl.distributed.Ranks()"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"Case was given a {type(getattr(self, name)).__name__} as {name}; {write} was needed")
        if not callable(self.setup):
            raise TypeError(
                f"Case was given a {type(self.setup).__name__} as setup; a function setup(device) was needed"
            )
        object.__setattr__(self, "name", self.name or name_of(self.setup))
        object.__setattr__(self, "label", self.label or type(self.estimator).__name__)
        if self.ranks is not None and self.parallel is None:
            raise ValueError(
                f"case {self.name} was given ranks, and it does not say what each of them has a part of; write "
                f"parallel=DATA or parallel=TASKS (of bilevel_profiling), in a case file PARALLEL = DATA"
            )
        known = "" if self.engine is None else type(self.engine).__name__.lower()
        object.__setattr__(self, "engine_name", self.engine_name or known)

    @property
    def title(self) -> str:
        """The label, and the engine where one is named."""
        return f"{self.label} ({self.engine_name})" if self.engine_name else self.label

    def pose(self) -> "Posed":
        """Make the problem; with ranks, this rank's part of it."""
        made = pose(self.setup, self.device, self.seed)
        if self.ranks is None or self.parallel is None:
            return made
        how, ranks = self.parallel, self.ranks
        outer, inner = how.outer(made.outer, ranks), how.inner(made.inner, ranks)
        return Posed(how.problem(made.problem, ranks), outer, inner, how.batches(made.batches, ranks))

    def part(self, batches: bl.Batches) -> bl.Batches:
        """Of the batches of an outer step, those of this rank."""
        return batches if self.ranks is None or self.parallel is None else self.parallel.batches(batches, self.ranks)

    @property
    def at_work(self) -> bl.Estimator:
        """The estimator, with its ranks where it has some."""
        if self.ranks is None or self.parallel is None:
            return self.estimator
        return self.parallel.estimator(self.estimator, self.ranks)


@dataclasses.dataclass(frozen=True)
class Posed:
    """What `setup` returned."""

    problem: bl.Problem
    outer: Any
    inner: Any
    batches: bl.Batches

    @property
    def dtype(self) -> torch.dtype:
        """Of the outer variable."""
        return tree.tensors(self.outer)[0].dtype

    def tensors(self, steps: int) -> Any:
        """A tree of outer, inner, and the batches that `steps` inner steps see."""
        return self.outer, self.inner, *_seen(self.batches, steps)

    def double(self) -> "Posed":
        """The same in float64: the floating tensors of outer, inner and batches; what a loss captured stays what it
        is.
        """
        inner = self.batches.inner
        cast = bl.PerStep(_DoubleSteps(inner)) if isinstance(inner, bl.PerStep) else _double(inner)
        batches = bl.Batches(cast, _double(self.batches.outer), _double(self.batches.curvature))
        return Posed(self.problem, _double(self.outer), _double(self.inner), batches)


def pose(setup: Setup, device: str, seed: int) -> Posed:
    """Call a setup function.

    Raises:
        TypeError: it did not return what was needed.
    """
    torch.manual_seed(seed)
    made = seeded(setup, device, seed=seed)
    if not (
        isinstance(made, tuple)
        and len(made) == 4
        and isinstance(made[0], bl.Problem)
        and isinstance(made[3], bl.Batches)
    ):
        got = (
            f"({', '.join(type(part).__name__ for part in made)})"
            if isinstance(made, tuple)
            else f"a {type(made).__name__}"
        )
        raise TypeError(
            f"setup() returned {got}; (problem, outer, inner, batches) was needed: a bl.Problem, two trees of tensors, "
            f"and a bl.Batches"
        )
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if any(
        isinstance(leaf, FakeTensor) and leaf.fake_mode is not mode
        for leaf in tree.tensors((made[1], made[2], _seen(made[3])))
    ):
        raise TypeError(
            "setup() returned tensors that it kept from a forecast, which have no data: is there a functools.cache in "
            "it, or a module's global? Make them anew in each call, or forecast in a process of its own"
        )
    if not tree.tensors(made[1]):
        raise TypeError("setup() returned an outer variable without tensors")
    return Posed(*made)


def in_steps(moves: Any, steps: int) -> bl.InnerSolver:
    """An inner solver that takes `steps` steps: of an optimizer or a dynamics as many, of a solver at most.

    Raises:
        ValueError: a solver of the user's own that has no field for them.

    Example:
        >>> import bilevel as bl
        >>> in_steps(bl.SGD(lr=0.1), 3).max_steps, in_steps(bl.Converge(bl.SGD(lr=0.1), tol=1e-3), 7).max_steps
        (3, 7)
    """
    if not isinstance(moves, bl.InnerSolver):
        return bl.Descent(moves, steps)
    name = limit_of(moves)
    if name is None:
        raise ValueError(
            f"{type(moves).__name__} cannot be given a number of steps; give it a field called {' or '.join(STEPS)}"
        )
    solver: Any = moves
    return dataclasses.replace(solver, **{name: steps})


def limit_of(solver: Any) -> str | None:
    """The field of an inner solver that limits its steps; None if it has none that is known as such."""
    fields = {field.name for field in dataclasses.fields(solver)}
    return next((name for name in STEPS if name in fields), None)


def leaves_of(outer: Any) -> Any:
    """A copy of the outer variable that an optimizer can move without touching what `setup` returned."""
    return tree.tree_map(
        lambda leaf: leaf.detach().clone().requires_grad_() if isinstance(leaf, Tensor) else leaf, outer
    )


def name_of(function: Callable[..., Any]) -> str:
    """A name for what a function measures: its module's last part for a `setup`, else its own."""
    own = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", "").rpartition(".")[2]
    return module if own == "setup" and module not in ("", "__main__") else own


def seeded(function: Callable[..., Any], *arguments: Any, seed: int) -> Any:
    """Call a function of a case with `seed=`, if it takes one."""
    return function(*arguments, seed=seed) if _takes_seed(function) else function(*arguments)


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables have no signature to look at
        return False
    return "seed" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _seen(batches: bl.Batches, steps: int = 1) -> tuple[Any, Any, Any]:
    """The batches that `steps` inner steps and the rest see."""
    inner = batches.inner
    first = [inner[step] for step in range(min(len(inner), max(steps, 1)))] if isinstance(inner, bl.PerStep) else inner
    return first, batches.outer, batches.curvature


class _DoubleSteps(Sequence[Any]):
    """The batches of a PerStep, cast when asked for: it may be endless."""

    def __init__(self, steps: bl.PerStep) -> None:
        self._steps = steps

    def __getitem__(self, step: Any) -> Any:
        return _double(self._steps[step])

    def __len__(self) -> int:
        return len(self._steps)


def _double(value: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.detach().to(torch.float64) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree.tree_map(cast, value)
