"""TorchOpt: its functional optimizers unrolled, and its implicit differentiation by `custom_root`.

| | memory |
| --- | --- |
| torchopt unrolled | K graphs |
| torchopt implicit CG | one linearization at y_K and the vectors of CG |

"unrolled" takes `FuncOptimizer` over `sgd`, `adam` or `adamw`, the engine of its MetaSGD and MetaAdam. "implicit CG"
solves with 10 steps of `solve_cg`, without damping; for others write in the case file
`BASELINES = {"torchopt CG, 20": torchopt.baseline(torchopt.implicit, steps=20, damping=0.1)}`.

Where a second moment of Adam is exactly zero its hypergradient is NaN, where ours is not.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.baselines.baseline import Baseline, Function
from bilevel_profiling.baselines.unrolling import descent, finished, number, start
from bilevel_profiling.records.record import Target

BIAS_CORRECTION = (
    "Its Adam and AdamW round 1 - beta^t to torch's default dtype; of float32, with beta = 0.999, five digits are left."
)


def baselines() -> dict[str, Baseline]:
    """Its rows.

    Raises:
        ImportError: it is not installed.
    """
    return {"torchopt unrolled": baseline(unrolled), "torchopt implicit CG": baseline(implicit)}


def baseline(method: Function, **settings: Any) -> Baseline:
    """A method with settings of your own as a row that says whose it is.

    Args:
        method: `unrolled` or `implicit` of this module.
        settings: of `implicit`: `steps`, `tol`, `damping`.

    Raises:
        ImportError: it is not installed.
        TypeError, ValueError: it has no such method, or that no such setting.

    Example:
        >>> if importlib.util.find_spec("torchopt"):
        ...     print(baseline(implicit, steps=20, damping=0.1).notes[0])
        It takes at most 20 steps of conjugate gradients, to a relative residual of 1e-05, with damping 0.1.
    """
    try:
        version = importlib.metadata.version("torchopt")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError('the baselines of torchopt need it installed: pip install "bilevel[peers]"') from None
    if method not in (unrolled, implicit):
        raise ValueError(f"torchopt was asked for {method!r}; torchopt.unrolled or torchopt.implicit was needed")
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"torchopt {method.__name__} has no setting {unknown[0]}; it has {', '.join(known) or 'none'}")
    if method is unrolled:
        return Baseline(unrolled, "torchopt", version, Target.PROGRAM, (BIAS_CORRECTION,))
    used = known | settings
    damped = f"with damping {used['damping']:g}" if used["damping"] else "without damping"
    solve = (
        f"It takes at most {used['steps']} steps of conjugate gradients, to a relative residual of {used['tol']:g}, "
        f"{damped}."
    )
    return Baseline(
        functools.partial(implicit, **settings) if settings else implicit,
        "torchopt",
        version,
        None if used["damping"] else Target.SOLUTION,
        (solve, BIAS_CORRECTION),
        sees=frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS}),
    )


def unrolled(
    problem: bl.Problem, outer: Any, inner: Any, batches: bl.Batches, solver: bl.InnerSolver
) -> bl.Hypergradient:
    """K differentiable steps of SGD, Adam or AdamW, and one backward pass.

    Raises:
        ValueError: it has no such inner solver.
    """
    import torchopt

    transform, steps = _transform(solver)
    y = start(problem, outer, inner, batches)
    optimizer = torchopt.FuncOptimizer(transform)
    leaves: Any = tuple(tree.tensors(y))
    for step in range(steps):
        leaves = optimizer.step(problem.inner(tree.like(y, leaves), outer, batches.inner_at(step)), leaves)
    return finished(problem, outer, batches, tree.like(y, leaves), steps)


def implicit(
    problem: bl.Problem,
    outer: Any,
    inner: Any,
    batches: bl.Batches,
    solver: bl.InnerSolver,
    *,
    steps: int = 10,
    tol: float = 1e-5,
    damping: float = 0.0,
) -> bl.Hypergradient:
    """K plain steps, and the adjoint system at y_K by `custom_root`, differentiated by torch.func.

    Raises:
        ValueError: it has no such inner solver.
    """
    import torchopt

    transform, moves = _transform(solver)
    decay = getattr(solver.dynamics.update, "weight_decay", 0.0)
    if isinstance(solver.dynamics.update, bl.AdamW) and decay:
        raise ValueError("where bl.AdamW with weight decay rests is not known, so no implicit estimate is defined")
    begun = tree.detach(start(problem, outer, inner, batches))
    batch = batches.curvature_at(max(moves - 1, 0))

    def stationarity(leaves: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def loss(at: tuple[Tensor, ...]) -> Tensor:
            decayed = 0.5 * decay * sum(leaf.square().sum() for leaf in at) if decay else 0.0
            return problem.inner(tree.like(begun, at), tree.like(outer, xs), batch) + decayed

        return torch.func.grad(loss)(leaves)

    solve = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=tol, atol=0.0, ridge=damping or None)

    @torchopt.diff.implicit.custom_root(stationarity, argnums=1, solve=solve)
    @torch.enable_grad()
    def solved(leaves: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y: Any = [leaf.clone().requires_grad_() for leaf in leaves]
        optimizer = torchopt.Optimizer(y, transform)
        for step in range(moves):
            loss = problem.inner(tree.like(begun, y), tree.like(outer, xs), batches.inner_at(step))
            optimizer.zero_grad()
            loss.backward(inputs=y)
            optimizer.step()
        return tuple(y)

    found: Any = solved(tuple(tree.tensors(begun)), tuple(tree.tensors(outer)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*integrated functorch")  # it calls functorch.vjp
        return finished(problem, outer, batches, tree.like(begun, found), moves)


def _transform(solver: bl.InnerSolver) -> tuple[Any, int]:
    """Its optimizer as a gradient transformation, and the number of steps."""
    import torchopt

    optimizer, steps = descent("torchopt", solver, bl.SGD, bl.Adam, bl.AdamW)

    def at(name: str) -> float:
        return number("torchopt", optimizer, name, getattr(optimizer, name))

    settings: dict[str, Any] = {name: at(name) for name in ("lr", "weight_decay")}
    if isinstance(optimizer, bl.SGD):
        settings |= {name: at(name) for name in ("momentum", "dampening")} | {"nesterov": optimizer.nesterov}
        return torchopt.sgd(**settings), steps
    settings |= {
        "betas": tuple(number("torchopt", optimizer, "betas", beta) for beta in optimizer.betas),
        "eps": at("eps"),
    }
    made = torchopt.adam if isinstance(optimizer, bl.Adam) else torchopt.adamw
    return made(**settings), steps
