"""What evaluations alone can show: are the losses functions of their arguments, and do they use them?"""

import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.estimators import Instance, paths
from bilevel.space import tree
from bilevel.testing.case import SEED, Case, copied

Found = list[tuple[str, str]]
_DEPTH = 4
"""How far into closures and objects is looked for modules and tensors."""


def check_evaluations(case: Case) -> Found:
    """Arguments unchanged, the same numbers again, nothing kept."""
    found: Found = []
    for name, function in _functions(case):
        before = {label: (tensor, tensor.detach().clone()) for label, tensor in held(function)}
        found += _edited(name, function, case)
        moved = [
            label
            for label, (tensor, value) in before.items()
            if not torch.equal(tensor.detach(), value) and not (value.isnan() & tensor.isnan()).any()
        ]
        if moved:
            found.append(
                (
                    "KEEPS_STATE",
                    f"{name} changes {', '.join(moved)}, which it holds. Pass it in the batch, or switch off what "
                    f"writes it (BatchNorm's running statistics: track_running_stats=False, or eval mode)",
                )
            )
        found += _repeated(name, function, case, keeps=bool(moved))
    return found


def _functions(case: Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in ("init", "features", "inner_loss", "outer_loss"):
        function = getattr(case.problem, name)
        if function is not None:
            yield name, function


def _arguments(name: str, case: Case) -> dict[str, Any]:
    """Copies of what a function of the problem is called with."""
    inner, outer = case.variables()
    batch = copied(case.batches.outer if name == "outer_loss" else case.batches.inner_at(0))
    if name in ("init", "features"):
        return {"the outer variable": outer, "the batch": batch}
    return {"the inner variable": inner, "the outer variable": outer, "the batch": case.embedded(outer, batch)}


def _edited(name: str, function: Callable[..., Any], case: Case) -> Found:
    torch.manual_seed(SEED)
    given = _arguments(name, case)
    leaves = [(role, leaf, leaf._version) for role, value in given.items() for leaf in tree.tensors(value)]
    with torch.no_grad():
        _called(function, given)
    edited = sorted({role for role, leaf, version in leaves if leaf._version != version})
    return [("EDITED_IN_PLACE", f"{name} writes to {role}. Write y = y + d in place of y += d") for role in edited]


def _called(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The value of a function, which may take gradients inside."""
    try:
        return function(*given.values())
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        with torch.enable_grad():
            return function(*(tree.attach(value) for value in given.values()))


def _repeated(name: str, function: Callable[..., Any], case: Case, *, keeps: bool) -> Found:
    """Two evaluations under one seed of torch; where they differ, which generator is to blame."""

    def value() -> list[Tensor]:
        torch.manual_seed(SEED)
        given = _arguments(name, case)
        torch.manual_seed(SEED)
        with torch.no_grad():
            return [leaf.detach().clone() for leaf in tree.tensors(_called(function, given))]

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.allclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True) for a, b in zip(one, other, strict=True))

    first, second = value(), value()
    if same(first, second):
        return []
    apart = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.numel())
    numbers = f"two evaluations of {name} under one seed of torch differ by {apart:.3g}"
    for library, state, put_back in _generators():
        one = value()
        put_back(state)
        other = value()
        put_back(state)
        if same(one, other):
            sentence = f"{numbers}: it draws from {library}. Draw with torch, whose generator is replayed"
            return [("NOT_DETERMINISTIC", sentence)]
    if keeps:
        return []  # said already, by name
    return [
        (
            "KEEPS_STATE",
            f"{numbers}, and neither Python's random numbers nor numpy's explain it: it keeps something (a counter, "
            f"running statistics, a generator of its own), or reads a clock. Pass it in the batch",
        )
    ]


def _generators() -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """The generators that nobody replays, with their states and how to go back to them."""
    yield "Python's random module", random.getstate(), random.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield "numpy's global generator", numpy.random.get_state(), numpy.random.set_state


def held(function: Any, depth: int = _DEPTH) -> list[tuple[str, Tensor]]:
    """The tensors that a function holds in its closure, its globals and the modules there, by name."""
    found: dict[int, tuple[str, Tensor]] = {}
    seen: set[int] = set()

    def visit(label: str, value: Any, left: int) -> None:
        if id(value) in seen or left < 0:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = (label, value)
        elif isinstance(value, torch.nn.Module):
            for name, tensor in [*value.named_buffers(), *value.named_parameters()]:
                visit(f"{label}.{name}", tensor, left)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                visit(label, part, left - 1)
        elif isinstance(value, dict | list | tuple) and len(value) < 1000:
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{label}[{key!r}]", part, left - 1)
        elif inspect.ismethod(value):
            visit(label, value.__self__, left - 1)
            visit(label, value.__func__, left - 1)
        elif inspect.isfunction(value) and not (value.__module__ or "").startswith("torch"):
            free = inspect.getclosurevars(value)
            for name, part in {**free.globals, **free.nonlocals}.items():
                visit(name, part, left - 1)
            visit(label, getattr(value, "__wrapped__", None), left - 1)
        elif hasattr(value, "__dict__") and callable(value) and not isinstance(value, type):
            for name, part in vars(value).items():
                visit(f"{label}.{name}", part, left - 1)

    visit(getattr(function, "__name__", type(function).__name__), function, depth)
    return list(found.values())


def check_use(case: Case) -> Found:
    """Tensors that nothing uses."""
    found: Found = []
    instance = Instance(
        case.problem,
        copied(case.outer),
        None if case.inner is None else copied(case.inner),
        case.batches,
        case.solver,
    )
    used = paths.of(instance) or ()
    for name, taken in zip(tree.names(case.outer), used, strict=False):
        if not taken:
            found.append(("UNUSED", f"outer variable {name} influences neither loss nor the inner loop"))
    inner, outer = (tree.attach(value) for value in case.variables())
    leaves = tree.tensors(inner)
    torch.manual_seed(SEED)
    in_inner = [False] * len(leaves)
    for step in case.steps():
        gradient = autodiff.grad([case.inner_loss(inner, outer, step)], leaves)
        in_inner = [seen or g is not None for seen, g in zip(in_inner, gradient, strict=True)]
    in_outer = [g is not None for g in autodiff.grad([case.outer_loss(inner, outer)], leaves)]
    for name, by_inner, by_outer in zip(tree.names(inner), in_inner, in_outer, strict=True):
        if not by_inner:
            where = "outer_loss uses it, at its start" if by_outer else "nor does outer_loss"
            found.append(("UNUSED", f"inner_loss does not use inner variable {name} ({where}), so it is never moved"))
    return found


def check_finite(case: Case) -> Found:
    """Losses and their gradients at the start, and the losses after the inner loop."""
    inner, outer = (tree.attach(value) for value in case.variables())
    torch.manual_seed(SEED)
    found: Found = []
    for name, loss in zip(("inner_loss", "outer_loss"), case.losses(inner, outer), strict=True):
        gradient = [g for g in autodiff.grad([loss], [*tree.tensors(inner), *tree.tensors(outer)]) if g is not None]
        if not bool(loss.isfinite()):
            found.append(("NOT_FINITE", f"{name} is {loss.item()} at the start"))
        elif not bool(tree.finite(gradient)):
            found.append(("NOT_FINITE", f"{name} is {loss.item():.3g} at the start, and its gradient is not finite"))
    if found:
        return found
    torch.manual_seed(SEED)
    end = bl.adapt(case.problem, case.outer, case.inner, case.batches, solver=case.solver)
    if end.status in (bl.Status.DIVERGED, bl.Status.NONFINITE):
        numbers = f"inner_loss is {end.inner_loss.item()}" + (
            "" if end.outer_loss is None else f", outer_loss {end.outer_loss.item()}"
        )
        steps = end.stats["inner_steps"]
        found.append(("NOT_FINITE", f"after {steps} inner steps {numbers}. {end.status.name}: {end.status.value}"))
    return found
