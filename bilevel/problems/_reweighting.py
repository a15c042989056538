"""What problems that learn a weight for each training example have in common: how the weights are judged.

A weight is sigmoid(logit). Weights are worth something if corrupted examples have smaller ones, and if a fresh network
that is trained with them does better on clean data than one that is trained with equal weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.problems._nets import Params


def squares(params: Params) -> Tensor:
    """|y|^2."""
    return torch.stack([tensor.pow(2).sum() for tensor in params.values()]).sum()


def rivals(logits: Tensor, corrupted: Tensor) -> dict[str, Tensor]:
    """The learned weights (prefix ""), equal ones of the same mean ("baseline_"), and those of one who knows which
    examples are corrupted ("ideal_").

    Raises:
        ValueError: there is not one logit for each example.
    """
    if logits.shape != corrupted.shape:
        raise ValueError(
            f"evaluate() was given logits of shape {tuple(logits.shape)}; one for each of the {len(corrupted)} "
            f"training examples was needed"
        )
    weights = torch.sigmoid(logits)
    return {"": weights, "baseline_": weights.mean().expand_as(weights), "ideal_": (~corrupted).to(weights)}


def fit(params: Params, loss: Callable[[Params], Tensor], *, steps: int, lr: float) -> Params:
    """The parameters after `steps` steps of full-batch Adam."""
    moving = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(moving.values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(moving).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in moving.items()}


def auc(logits: Tensor, corrupted: Tensor) -> float:
    """The probability that a corrupted example weighs less than a clean one, ties half; NaN without either kind.

    Example:
        >>> auc(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([True, True, False, False]))
        0.875
    """
    clean, wrong = logits[~corrupted].double().sort().values, logits[corrupted].double()
    if not len(clean) or not len(wrong):
        return float("nan")
    below, upto = (torch.searchsorted(clean, wrong, right=right).double() for right in (False, True))
    return 1 - ((below + upto) / 2).mean().item() / len(clean)
