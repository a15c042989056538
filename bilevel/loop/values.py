"""The numbers of a step, for a sink."""

from bilevel.loop.computing import status_seen
from bilevel.loop.step import Step
from bilevel.space import tree
from bilevel.space.inner_product import Space


def values(step: Step) -> dict[str, float]:
    """What there is to log of a step; reading it waits for the GPU.

    Args:
        step: of an `OuterLoop`, or of `iterate`.

    Returns:
        `outer_loss` and `inner_loss`, before the step; `hypergradient_norm`, before it was clipped; `status`, a number
        that is 0 for OK (`list(bilevel.Status)[number]`); `lr` (with several parameter groups `lr/0`, `lr/1`, ...) and
        `seconds`; `skipped` is 1 where x was not moved; `precision_cosine` and `precision_ratio` where `PrecisionCheck`
        looked.

    Example:
        >>> import torch, bilevel as bl
        >>> found = bl.Hypergradient(torch.tensor([3.0, 4.0]), torch.zeros(1), torch.tensor(2.0), torch.tensor(1.0))
        >>> numbers = bl.loop.values(bl.loop.Step(0, found, lr=(0.5,), seconds=0.25))
        >>> numbers["outer_loss"], numbers["hypergradient_norm"], numbers["lr"], numbers["status"]
        (2.0, 5.0, 0.5, 0)
    """
    found = step.hypergradient
    numbers: dict[str, float] = {
        "outer_loss": float(found.outer_loss),
        "inner_loss": float(found.inner_loss),
        "hypergradient_norm": float(Space().norm(tree.tensors(found.grad))),
        "status": status_seen(found).code,
        "seconds": step.seconds,
        "skipped": int(step.skipped),
    }
    if len(step.lr) == 1:
        numbers["lr"] = step.lr[0]
    else:
        numbers |= {f"lr/{group}": lr for group, lr in enumerate(step.lr)}
    if step.precision is not None:
        numbers["precision_cosine"], numbers["precision_ratio"] = step.precision.cosine, step.precision.ratio
    return numbers
