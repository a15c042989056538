"""Does a result say where the inner loop ended, and what the losses are there?"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import bilevel as bl
from bilevel.space import tree
from bilevel.testing.probes import Probe

_EQUAL = (1e-9, 1e-3)
"""Between two evaluations of one loss, in float64 and in less."""
_NEAR = (1e-2, 5e-2)
"""Between y_K and hg.inner, which may lie between perturbed sides."""


def misstated(found: bl.Hypergradient, probe: Probe, steps: int) -> str:
    """What of hg.inner, hg.outer_loss and hg.inner_loss is another number, as a clause; "" for nothing.

    Args:
        found: by an estimator that moves y by the given solver.
        probe: the problem.
        steps: K.
    """
    ended = _evaluated(probe, probe.problem, probe.inner, probe.batches, steps)
    batches = probe.batches
    if isinstance(batches.inner, bl.PerStep):
        batches = bl.Batches(batches.inner[min(steps, len(batches.inner)) - 1], batches.outer)
    there = _evaluated(probe, dataclasses.replace(probe.problem, init=None), found.inner, batches, 0)
    assert there.outer_loss is not None, "adapt evaluates f"
    narrow = tree.tensors(found.inner)[0].dtype.itemsize < 8
    outer_loss = found.stats.get("final_outer_loss", found.outer_loss)  # f(y_K), where F is of many iterates
    for name, said, wanted, bound in (
        ("hg.inner", tree.tensors(found.inner), tree.tensors(ended.inner), _NEAR),
        ("hg.outer_loss", [outer_loss.mean()], [there.outer_loss.mean()], _EQUAL),
        ("hg.inner_loss", [found.inner_loss], [there.inner_loss.mean()], _EQUAL),
    ):
        apart = _norm([a.double() - b.double() for a, b in zip(said, wanted, strict=True)])
        if not apart <= bound[narrow] * max(1.0, _norm(wanted)):
            what = "where the inner loop ends" if name == "hg.inner" else "the loss at hg.inner"
            return f"{name} is {apart:.3g} from {what}"
    return ""


def _evaluated(probe: Probe, problem: bl.Problem, inner: tree.Tree, batches: bl.Batches, steps: int) -> bl.Adapted:
    torch.manual_seed(0)
    return bl.adapt(problem, probe.outer, inner, batches, solver=probe.solver(steps), tasks=probe.tasks is not None)


def _norm(leaves: Sequence[Tensor]) -> float:
    return sum(float(leaf.double().square().sum()) for leaf in leaves) ** 0.5
