"""register() and use(): how a Betty program comes to one of our estimators."""

import dataclasses
from collections.abc import Collection
from typing import Any

import bilevel as bl
from bilevel.integrations.betty import release
from bilevel.integrations.betty.graph import check_graph
from bilevel.integrations.betty.hook import Hook


def register(
    estimator: bl.Estimator,
    solver: bl.InnerSolver | None = None,
    *,
    name: str | None = None,
    below: int | bl.Descent | None = None,
    tolerate: Collection[bl.Status] = (bl.Status.NEGATIVE_CURVATURE,),
) -> str:
    """Put an estimator beside Betty's own hypergradients, under a name for `Config(type=...)`.

    From then on a Betty Engine looks at the edges of a program that uses one of ours, as `check` does.

    Args:
        estimator: how the hypergradient is estimated.
        solver: see `Hook`.
        name: under which Betty finds it; by default that of its class and a number.
        below: see `Hook`.
        tolerate: see `Hook`.

    Returns:
        The name.

    Raises:
        ImportError: Betty is not installed.
        TypeError: `estimator` or `solver` is none.
        ValueError: the name is taken, or the estimator needs more than it was given.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.integrations import betty
        >>> if betty.release.available():
        ...     betty.register(bl.Implicit(bl.CG(max_steps=10)), name="cg that converges")
        ... else:
        ...     "cg that converges"
        'cg that converges'
    """
    return _registered(Hook(estimator, solver, below=below, tolerate=tolerate), name)


def use(
    problem: Any,
    estimator: bl.Estimator,
    solver: bl.InnerSolver | None = None,
    *,
    below: int | bl.Descent | None = None,
    tolerate: Collection[bl.Status] = (bl.Status.NEGATIVE_CURVATURE,),
) -> str:
    """Let a Betty problem use an estimator from now on: `register`, and the name put into its configuration.

    An estimator that differentiates steps (Unrolled) needs those that Betty makes: they are kept, from now on, by
    listening to this problem's get_batch. Memory: 2 P, and what the optimizer keeps; the batches of `unroll_steps`.

    Args:
        problem: an ImplicitProblem that is below another, before the engine runs.
        estimator: how the hypergradient is estimated.
        solver: see `Hook`.
        below: see `Hook`.
        tolerate: see `Hook`.

    Returns:
        The name under which it is registered.

    Raises:
        ImportError, TypeError, ValueError: see `register`.
    """
    if not hasattr(problem, "training_step_exec") or not hasattr(problem, "_config"):
        raise TypeError(f"use() was given a {type(problem).__name__} as problem; one of betty.problems was needed")
    hook = Hook(estimator, solver, below=below, tolerate=tolerate)
    if hook.differentiates_steps and solver is None:
        hook.record(problem)
    name = _registered(hook, None)
    # (A Config may be shared by several problems.)
    problem._config = dataclasses.replace(problem.config, type=name)
    return name


def _registered(hook: Hook, name: str | None) -> str:
    if not release.available():
        raise ImportError(release.MISSING)
    with release.importing():
        from betty.hypergradient import jvp_fn_mapping

    if name is None:
        stem = f"bilevel {type(hook.estimator).__name__}"
        name = next(each for number in range(1, 1_000_000) if (each := f"{stem} {number}") not in jvp_fn_mapping)
    if name in jvp_fn_mapping:
        whose = "that of an estimator registered before" if isinstance(jvp_fn_mapping[name], Hook) else "Betty's own"
        raise ValueError(f"register() was given name={name!r}, which is {whose}; another was needed")
    jvp_fn_mapping[name] = hook
    _look_first()
    return name


def _look_first() -> None:
    """Let Betty's Engine look at the graph of programs with one of ours before it parses it; once in a process."""
    with release.importing():
        from betty.engine import Engine
        from betty.hypergradient import jvp_fn_mapping
    parse = Engine.parse_dependency
    if getattr(parse, "looks_first", False):
        return

    def parse_dependency(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if any(isinstance(jvp_fn_mapping.get(each.config.type), Hook) for each in self.problems):
            check_graph(self.problems, self.dependencies)
        return parse(self, *arguments, **keywords)

    parse_dependency.looks_first = True  # type: ignore[attr-defined]
    Engine.parse_dependency = parse_dependency
