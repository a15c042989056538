"""check(): what is wrong with a Betty program, said before Betty stops on it, or does not."""

import inspect
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bilevel.integrations.betty import release
from bilevel.integrations.betty.hook import Hook
from bilevel.integrations.betty.program import refuse_shared


def check(problems: Sequence[Any], dependencies: Mapping[str, Mapping[Any, Sequence[Any]]]) -> None:
    """Look at a Betty program before `Engine(problems=..., dependencies=...)` is made of it.

    Args:
        problems: as the Engine gets them.
        dependencies: likewise: {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}.

    Raises:
        ValueError: an edge leads to a problem that is not listed; a u2l edge has no way back up, so that there is no
            path for its gradient; the l2u edges make a circle; two problems have one name or share parameters; a
            problem's type is unknown to Betty, or is never used; Betty's cg or neumann is asked for where Betty refuses
            it; a problem is an IterativeProblem, where this release's does not work; an optimizer
            cannot be made as Betty makes it.

    Warns:
        UserWarning: a problem uses a method of Betty's that is wrong in this release, or has settings that Betty loses.
    """
    check_graph(problems, dependencies)
    u2l, l2u = (dependencies.get(key, {}) for key in ("u2l", "l2u"))
    for each in problems:
        _check_optimizer(each)
    _check_types(u2l, l2u)


def check_graph(problems: Sequence[Any], dependencies: Mapping[str, Mapping[Any, Sequence[Any]]]) -> None:
    """The part of `check` that looks at the problems and their edges."""
    _check_shape(dependencies)
    u2l, l2u = (dependencies.get(key, {}) for key in ("u2l", "l2u"))
    _check_names(problems)
    for kind, edges in (("u2l", u2l), ("l2u", l2u)):
        for source, target in _pairs(edges):
            for each in (source, target):
                if not any(each is known for known in problems):
                    raise ValueError(
                        f'an edge of "{kind}" leads from {source.name} to {target.name}, and {each.name} is not among '
                        f"the problems; write Engine(problems=[..., {each.name}], ...)"
                    )
    _check_circles(problems, l2u)
    for upper, lower in _pairs(u2l):
        if not _leads(lower, upper, l2u):
            raise ValueError(
                f'"u2l" says that {upper.name} differentiates through {lower.name}, and no edges of "l2u" lead from '
                f'{lower.name} up to {upper.name}, so there is no path for the gradient. Add "l2u": '
                f"{{{lower.name}: [{upper.name}]}}, or the edges of the problems between them"
            )
    for one, other in itertools.combinations([each for each in problems if each.module is not None], 2):
        refuse_shared(one, other)


def _check_shape(dependencies: Any) -> None:
    needed = 'a dict {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}} of problems and lists of problems was needed'
    if not isinstance(dependencies, Mapping):
        raise TypeError(f"the dependencies are a {type(dependencies).__name__}; {needed}")
    for kind in ("u2l", "l2u"):
        edges = dependencies.get(kind, {})
        if not isinstance(edges, Mapping) or not all(isinstance(each, (list, tuple)) for each in edges.values()):
            raise TypeError(f"the dependencies have {edges!r} as {kind!r}; {needed}")
        for each in itertools.chain(edges, *edges.values()):
            if not hasattr(each, "training_step_exec"):
                raise TypeError(f"the dependencies have {each!r} in {kind!r}, which is no problem; {needed}")


def _check_names(problems: Sequence[Any]) -> None:
    names = [each.name for each in problems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two problems are called {name}; Betty finds them by name, so give each its own")


def _check_circles(problems: Sequence[Any], l2u: Mapping[Any, Sequence[Any]]) -> None:
    for each in problems:
        for above in l2u.get(each, ()):
            if above is each or _leads(above, each, l2u):
                raise ValueError(
                    f'the edges of "l2u" lead from {each.name} back to {each.name}, so no problem is the lowest; leave '
                    f"the edge from {each.name} to {above.name} out, or the one that leads back"
                )


def _check_optimizer(problem: Any) -> None:
    """Betty makes each optimizer anew, from its class and its defaults."""
    optimizer = problem.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer) or callable(getattr(problem, "param_groups", None)):
        return
    name, defaults = type(optimizer).__name__, optimizer.defaults
    try:
        type(optimizer)([torch.zeros(1, 1, requires_grad=True)], **defaults)
    except TypeError as error:
        instead = " Write torch.optim.Adam(..., decoupled_weight_decay=True)" if name == "AdamW" else ""
        raise ValueError(
            f"problem {problem.name} has a {name}, which Betty makes anew from its defaults, and this torch's cannot "
            f"be made so ({error}).{instead}"
        ) from None
    lost = {
        key
        for group in optimizer.param_groups
        for key, value in group.items()
        if key in defaults and (group.get("initial_lr", value) if key == "lr" else value) != defaults[key]
    }
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"problem {problem.name} has a {name}, whose step needs a closure that evaluates the loss again; Betty "
            f"calls it without. Use torch.optim.SGD or Adam"
        )
    _check_scheduler(problem, type(optimizer)([torch.zeros(1, 1, requires_grad=True)], **defaults))
    if lost:
        warnings.warn(
            f"problem {problem.name} has parameter groups with settings of their own ({', '.join(sorted(lost))}), "
            f"which Betty loses: it makes the optimizer anew with its defaults. Define param_groups() on the problem",
            stacklevel=3,
        )


def _check_scheduler(problem: Any, optimizer: torch.optim.Optimizer) -> None:
    """Betty makes each scheduler anew, too, and steps it without an argument."""
    scheduler = problem.scheduler
    if scheduler is None or release.installed_version() < (0, 2):
        return
    name = type(scheduler).__name__
    with release.importing():
        from betty.patch.scheduler import patch_scheduler
    step = inspect.signature(scheduler.step).parameters.values()
    if any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in step):
        raise ValueError(
            f"problem {problem.name} has a {name}, whose step needs an argument; Betty gives it none. Use a scheduler "
            f"of the number of steps, such as StepLR"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch_scheduler(scheduler, optimizer)
    except Exception as error:  # whatever its constructor raises
        raise ValueError(
            f"problem {problem.name} has a {name}, which Betty makes anew from its attributes and cannot "
            f"({type(error).__name__}: {error}). Use another, such as StepLR or LambdaLR"
        ) from None


def _check_types(u2l: Mapping[Any, Sequence[Any]], l2u: Mapping[Any, Sequence[Any]]) -> None:
    found = release.installed()
    with release.importing():
        from betty.hypergradient import jvp_fn_mapping
        from betty.problems import IterativeProblem
    through = [lower for _, lower in _pairs(u2l)]
    for upper, lower in _pairs(u2l):
        kind = lower.config.type
        if isinstance(lower, IterativeProblem):
            if "iterative" in found.defects:
                raise ValueError(f"problem {lower.name}: {found.defects['iterative']}")
            continue
        if not upper.config.first_order:
            raise ValueError(
                f"problem {upper.name} has first_order=False, so Betty never asks for the hypergradient through "
                f"{lower.name}, an ImplicitProblem, and the part through it would be missing. Write "
                f"Config(first_order=True), its default"
            )
        if kind not in jvp_fn_mapping:
            raise ValueError(
                f"problem {lower.name} has type={kind!r}, which Betty does not know; it knows "
                f"{', '.join(jvp_fn_mapping)}. Write "
                f"type=bilevel.integrations.betty.register(bilevel.Implicit(bilevel.CG(10)))"
            )
        if kind == "reinforce":
            raise ValueError(
                f"problem {lower.name} has type='reinforce', which is an empty function in Betty; choose another"
            )
        if kind in ("cg", "neumann") and lower in u2l:
            raise ValueError(
                f"problem {lower.name} has type={kind!r} and is itself above {u2l[lower][0].name}, where Betty's "
                f"{kind} refuses to work. Write "
                f"type=bilevel.integrations.betty.register(bilevel.Implicit(bilevel.CG(10)), below=K)"
            )
        if kind in found.defects:
            warnings.warn(f"problem {lower.name}: {found.defects[kind]}", stacklevel=3)
        if kind == "cg" and lower.config.cg_alpha != 1.0 and "cg_alpha" in found.defects:
            warnings.warn(f"problem {lower.name}: {found.defects['cg_alpha']}", stacklevel=3)
    for lower in {id(each): each for each in l2u}.values():
        if isinstance(jvp_fn_mapping.get(lower.config.type), Hook) and not _on_a_path(lower, u2l, l2u):
            raise ValueError(
                f"problem {lower.name} was given an estimator, and no path of a gradient leads through it: "
                f'"u2l" names {", ".join(each.name for each in through) or "none"}. Add "u2l": {{...: [{lower.name}]}}'
            )


def _on_a_path(problem: Any, u2l: Mapping[Any, Sequence[Any]], l2u: Mapping[Any, Sequence[Any]]) -> bool:
    """Whether some upper problem's gradient passes a problem: it lies between a u2l edge's two ends."""
    return any(
        (problem is lower or _leads(lower, problem, l2u)) and problem is not upper and _leads(problem, upper, l2u)
        for upper, lower in _pairs(u2l)
    )


def _pairs(edges: Mapping[Any, Sequence[Any]]) -> list[tuple[Any, Any]]:
    return [(source, target) for source, targets in edges.items() for target in targets]


def _leads(start: Any, end: Any, edges: Mapping[Any, Sequence[Any]]) -> bool:
    """Whether edges lead from one problem to another."""
    seen: list[Any] = []
    queue = list(edges.get(start, ()))
    while queue:
        each = queue.pop()
        if each is end:
            return True
        if not any(each is other for other in seen):
            seen.append(each)
            queue += edges.get(each, ())
    return False
