"""higher: its differentiable optimizers, by `innerloop_ctx` as its users write it.

| | memory |
| --- | --- |
| higher unrolled | K graphs and K + 1 inner variables |

Its patched module keeps the parameters of all steps (`parameters(time=k)`), also those that no graph needs: with 50
steps on a perceptron of 784-300-10 that is 47 MB above our 147.

Its Adam adds eps before the bias correction and ours, as torch.optim's, after it; here its eps is set in each step so
that the two agree. It has no AdamW.
"""

import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.baselines.baseline import Baseline
from bilevel_profiling.baselines.unrolling import descent, finished, start, value
from bilevel_profiling.records.record import Target


def baselines() -> dict[str, Baseline]:
    """Its rows.

    Raises:
        ImportError: it is not installed.
    """
    return {"higher unrolled": baseline()}


def baseline() -> Baseline:
    """Its one row, for a label of your own.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> if importlib.util.find_spec("higher"):  # BASELINES = {"theirs": higher.baseline()} in a case file
        ...     assert baseline().package == "higher"
    """
    try:
        version = importlib.metadata.version("higher")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError('the baselines of higher need it installed: pip install "bilevel[peers]"') from None
    return Baseline(unrolled, "higher", version, target=Target.PROGRAM)


class Variables(nn.Module):
    """An inner variable as the module that higher patches."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.leaves = nn.ParameterList([nn.Parameter(leaf.detach()) for leaf in tree.tensors(inner)])


def unrolled(
    problem: bl.Problem, outer: Any, inner: Any, batches: bl.Batches, solver: bl.InnerSolver
) -> bl.Hypergradient:
    """K differentiable steps of SGD or Adam, and one backward pass.

    Learned step sizes are followed: hyper-parameters may be functions of outer that return a 0-dim tensor.

    Raises:
        ValueError: it has no such inner solver.
    """
    import higher

    optimizer, steps = descent("higher", solver, bl.SGD, bl.Adam)
    begun = start(problem, outer, inner, batches)
    module = Variables(begun)
    settings = _settings(optimizer, outer)
    kind: Any = torch.optim.Adam if isinstance(optimizer, bl.Adam) else torch.optim.SGD
    context = higher.innerloop_ctx(
        module,
        kind(module.parameters(), lr=0.1),
        copy_initial_weights=False,
        override={name: [each] for name, each in settings.items()},
    )
    with context as (patched, moving):
        if problem.init is not None:
            patched.update_params(tree.tensors(begun))
        for step in range(steps):
            y = tree.like(begun, list(patched.parameters()))
            each = {"eps": [_eps(settings, step)]} if isinstance(optimizer, bl.Adam) else None
            moving.step(problem.inner(y, outer, batches.inner_at(step)), override=each)
        return finished(problem, outer, batches, tree.like(begun, list(patched.parameters())), steps)


def _settings(optimizer: bl.SGD | bl.Adam, outer: Any) -> dict[str, Any]:
    def at(name: str, hyper: Any) -> float | Tensor:
        return value("higher", optimizer, name, hyper, outer)

    found: dict[str, Any] = {name: at(name, getattr(optimizer, name)) for name in ("lr", "weight_decay")}
    if isinstance(optimizer, bl.Adam):
        betas = tuple(at("betas", beta) for beta in optimizer.betas)
        return {**found, "betas": betas, "eps": at("eps", optimizer.eps)}
    names = ("momentum", "dampening")
    return {**found, **{name: at(name, getattr(optimizer, name)) for name in names}, "nesterov": optimizer.nesterov}


def _eps(settings: dict[str, Any], step: int) -> Any:
    """What it must be given to add eps to the corrected root: sqrt(v) + eps' over sqrt(1 - b^t)."""
    return settings["eps"] * (1 - settings["betas"][1] ** (step + 1)) ** 0.5
