"""A baseline: somebody else's hypergradient, as an estimator, so that all that measures ours measures it."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import bilevel as bl
from bilevel.engine import spans
from bilevel.space import tree
from bilevel_profiling.baselines.anchored import anchored
from bilevel_profiling.baselines.counting import Counter, counting
from bilevel_profiling.baselines.untouched import Untouched
from bilevel_profiling.records.record import Target

Function = Callable[[bl.Problem, Any, Any, bl.Batches, bl.InnerSolver], Any]
"""`function(problem, outer, inner, batches, solver)` -> a `bl.Hypergradient`, or the gradient alone."""
UNCOUNTED, WITHOUT_INNER = "uncounted", "without_inner"
"""In the stats of a result: why its oracle calls were not counted; that no inner variable came back."""
RESERVED = frozenset({"calls", "tasks", UNCOUNTED, WITHOUT_INNER})
"""Stats that say something of every result, and so not what a function's own result has under these names."""


@dataclasses.dataclass(frozen=True)
class Baseline(bl.Estimator):
    """A function that returns a hypergradient, as an estimator.

    Args:
        function: called as `function(problem, outer, inner, batches, solver)`, with what `bl.hypergradient` was given:
            `outer` as leaves that require grad, `inner` without a graph (None where the problem has an `init`). Over
            tasks it is called for one after another, with one plain problem each. It returns either a
            `bl.Hypergradient` (the gradient, the inner variable y_K, both losses there, and its own `code` where it
            knows one), or the gradient alone, a tree like `outer` with None where nothing arrives (for one bare tensor
            a zero, since None is what a function without a return gives; `bl.Hypergradient(None, ...)` says it too). It
            leaves its arguments as they are. For `compare` it is a function at the top level of a module, or a
            functools.partial of one, so that other processes can import it.
        package: whose it is, as pip calls it; "" for your own.
        version: of the package.
        target: what it gives but for rounding and unmet tolerances: "program", the gradient of the K-step program,
            "solution", that at the solution, or None.
        notes: what a reader of its row must know, a sentence each, such as known defects; text is one sentence.
        sees: the paths of x that it follows; a problem in which x acts along others is refused. All, by default.

    Of the gradient alone y_K is not known: `inner` and the losses of the result are then those at the start, and
    `compare` leaves out the row's outer loop.

    Oracle calls are counted where autograd makes them (see `counting`), and added to those that the library makes
    where the function calls it; `stats["uncounted"]` says why they are not. Stats of the function's own result are
    handed on, but for the names that say such things of every result: "calls", "tasks", "uncounted", "without_inner".

    Raises:
        TypeError, ValueError: it is no function; or (when used) what it returned is no gradient of this `outer`, it
            changed an argument in place, or it was asked for a forecast.

    Example:
        The direct part of the gradient, at the start:

        >>> import torch, bilevel as bl
        >>> def direct(problem, outer, inner, batches, solver):
        ...     return torch.autograd.grad(problem.outer(inner, outer, batches.outer), outer)[0]
        >>> problem = bl.Problem(lambda y, x, b: (y - 1) ** 2, lambda y, x, b: (y - x) ** 2)
        >>> bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=Baseline(direct)).grad
        tensor(2.)
    """

    function: Function
    package: str = ""
    version: str = ""
    target: Target | None = None
    notes: tuple[str, ...] = ()
    sees: frozenset[bl.Path] = frozenset(bl.Path)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"Baseline was given a {type(self.function).__name__}; a function(problem, outer, inner, batches, "
                f"solver) that returns a hypergradient was needed"
            )
        notes: Any = (self.notes,) if isinstance(self.notes, str) else self.notes
        sees: Any = self.sees
        for name, value, fits, needed in (
            ("package", self.package, isinstance(self.package, str), "its name"),
            ("version", self.version, isinstance(self.version, str), 'text such as "1.2"'),
            ("notes", notes, _all(notes, str), 'sentences such as ("It is slow.",)'),
            ("sees", sees, _all(sees, bl.Path), "paths such as {bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS}"),
        ):
            if not fits:
                raise TypeError(f"Baseline was given {name}={value!r}; {needed} was needed")
        object.__setattr__(self, "notes", tuple(notes))
        object.__setattr__(self, "sees", frozenset(sees))
        if self.target is not None and self.target not in list(Target):
            raise ValueError(f"Baseline was given target={self.target!r}; 'program', 'solution' or None was needed")
        object.__setattr__(self, "target", None if self.target is None else Target(self.target))

    def __repr__(self) -> str:
        parts = [self.name, *filter(None, [f"{self.package} {self.version}".strip()])]
        return f"Baseline({', '.join(parts)})"

    @property
    def name(self) -> str:
        """Of the function, as in `module.function`, with the arguments of a functools.partial."""
        return _named(self.function)

    @property
    def said(self) -> tuple[str, ...]:
        """All that its row must say: whose it is, and the notes."""
        whose = f"By {self.package} {self.version}".strip() + "." if self.package else ""
        return tuple(filter(None, [whose, *self.notes]))

    def estimate(self, instance: bl.estimators.Instance, state: Any) -> bl.estimators.Estimate:
        if instance.tasks is not None:
            return self._by_task(instance, instance.tasks)
        if isinstance(tree.tensors(instance.outer)[0], FakeTensor):
            raise ValueError(
                "a baseline needs real numbers, and forecasts have none: measure it, with measure() or bilevel compare"
            )
        counter, untouched = Counter(), Untouched(instance, self.name)
        problem = anchored(instance.problem, instance.batches)
        problem = counter.watched(problem) if counting() else problem
        given = tree.attach(instance.outer), tree.detach(instance.inner), instance.batches, instance.solver
        with spans.span(spans.HYPERGRADIENT):
            found = self.function(problem, *given)
            counter.announce()
            untouched.check()
            why = counter.blind if counting() else "it was not asked for"
            return self._finished(instance, found, {UNCOUNTED: why} if why else {})

    def _by_task(self, instance: bl.estimators.Instance, tasks: int) -> bl.estimators.Estimate:
        each = bl.TaskMean(self, chunk=1)
        mean = each.estimate(dataclasses.replace(instance, tasks=None), None)
        total = tuple(None if leaf is None else leaf * tasks for leaf in mean.grad)
        stats = {name: value for name, value in mean.stats.items() if name != "tasks"}
        return dataclasses.replace(mean, grad=total, stats=stats)

    def _finished(self, instance: bl.estimators.Instance, found: Any, stats: dict[str, Any]) -> bl.estimators.Estimate:
        whole = found if isinstance(found, bl.Hypergradient) and found.inner is not None else None
        if found is None:
            raise ValueError(
                f"baseline {self.name} returned None, where a tree like outer was needed; does it end in a return? "
                f"Where nothing arrives at outer, return torch.zeros_like(outer)"
            )
        grad = self._gradient(instance, found.grad if isinstance(found, bl.Hypergradient) else found)
        if whole is None:
            start, oracles = instance.oracles.start(), instance.oracles
            losses = oracles.outer_loss(start), oracles.inner_loss(start, 0)
            stats = {**stats, WITHOUT_INNER: True}
            return bl.estimators.Estimate(grad, start, *losses, code=0, stats=stats)
        inner = self._inner(instance, whole.inner)
        losses = self._loss(whole, "outer_loss"), self._loss(whole, "inner_loss")
        code = torch.as_tensor(self._code(whole.code), device=losses[0].device)
        code = torch.where(tree.finite(inner).to(code.device), code, bl.Status.DIVERGED.code)
        own = {name: value for name, value in whole.stats.items() if name not in RESERVED}
        return bl.estimators.Estimate(grad, inner, *losses, code=code, stats={**own, **stats})

    def _gradient(self, instance: bl.estimators.Instance, found: Any) -> tuple[Tensor | None, ...]:
        outer, needed = instance.outer, "a tree like outer was needed"
        if isinstance(found, dict) and isinstance(outer, dict):
            if wrong := [
                f"{word} {', '.join(map(repr, names))}"
                for word, names in (("without", outer.keys() - found.keys()), ("with", found.keys() - outer.keys()))
                if names
            ]:
                raise ValueError(
                    f"baseline {self.name} returned a dict {' and '.join(wrong)} as the hypergradient, where {needed}: "
                    f"a dict with {', '.join(map(repr, outer))}"
                )
            found = {name: found[name] for name in outer}
        leaves, structure = tree.flatten(found)
        if structure != tree.flatten(outer)[1]:
            hint = "; write dict(zip(outer, gradients))" if isinstance(found, tuple) and isinstance(outer, dict) else ""
            raise ValueError(
                f"baseline {self.name} returned {_kind(found)} as the hypergradient, where {needed}: "
                f"{_kind(outer)} with {', '.join(tree.names(outer))}{hint}"
            )
        for name, leaf, like in zip(tree.names(outer), leaves, tree.tensors(outer), strict=True):
            if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
                raise ValueError(
                    f"baseline {self.name} returned a sparse tensor ({leaf.layout}) as the hypergradient of outer "
                    f"{name}; write .to_dense()"
                )
            if leaf is not None and _facts(leaf) != _facts(like):
                raise ValueError(
                    f"baseline {self.name} returned {_facts(leaf)} as the hypergradient of outer {name}, where "
                    f"{needed}: {_facts(like)}"
                )
        return tuple(None if leaf is None else leaf.detach() for leaf in leaves)

    def missed(self, acts: str) -> str:
        return (
            f"baseline {self.name} returned None for a part of the hypergradient, but {acts}. Was a graph cut on the "
            f"way there? For a gradient that is zero there, return zeros"
        )

    def _code(self, found: Any) -> Any:
        """The code of a result, which must be that of a status."""
        known, write = len(bl.Status), "write code=bl.Status.MAX_STEPS.code, for one"
        if isinstance(found, bl.Status):
            write = f"write code=bl.{found}.code"
        elif isinstance(found, int) or (
            isinstance(found, Tensor) and not found.dim() and not found.is_floating_point()
        ):
            if isinstance(found, Tensor) and found.device.type != "cpu":
                return found  # to look at it would wait for the device
            if 0 <= int(found) < known:
                return found
        raise ValueError(
            f"baseline {self.name} returned a Hypergradient whose code is {found!r}, where the code of a status was "
            f"needed, 0 to {known - 1}: {write}"
        )

    def _inner(self, instance: bl.estimators.Instance, found: Any) -> Any:
        start = instance.oracles.start()
        if tree.flatten(found)[1] != tree.flatten(start)[1] or [*map(_facts, tree.tensors(found))] != [
            *map(_facts, tree.tensors(start))
        ]:
            raise ValueError(
                f"baseline {self.name} returned a Hypergradient whose inner is {_kind(found)} of "
                f"{_listed(tree.tensors(found))}, where a tree like its start was needed: {_kind(start)} of "
                f"{_listed(tree.tensors(start))}; where y_K is not known, return the gradient alone"
            )
        return tree.detach(found)

    def _loss(self, found: bl.Hypergradient, name: str) -> Tensor:
        value = getattr(found, name)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise ValueError(
                f"baseline {self.name} returned a Hypergradient whose {name} is {_facts(value)}; a 0-dim floating "
                f"tensor was needed"
            )
        return value.detach()


def baseline_of(found: Any) -> Baseline | None:
    """The baseline that an estimator is, itself or over tasks; None for an estimator of another kind."""
    found = found.estimator if isinstance(found, bl.TaskMean) else found
    return found if isinstance(found, Baseline) else None


def _named(function: Any) -> str:
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_named(function.func)}({', '.join(given)})"
    # A script is called so in the processes that it starts.
    module = getattr(function, "__module__", "").rpartition(".")[2].replace("__mp_main__", "__main__")
    own = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{own}" if module else own


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, Collection) and all(isinstance(each, kind) for each in values)


def _kind(value: Any) -> str:
    return "None" if value is None else _facts(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _facts(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"


def _listed(values: Sequence[Any]) -> str:
    most = 3
    return "; ".join([*map(_facts, values[:most]), *(["..."] if len(values) > most else [])]) or "no tensors"
