"""Ridge regression with one penalty per feature, learned on validation data; everything in closed form.

    g(w, x) = 1/(2n) |A w - b|^2 + 1/2 sum_j exp(x_j) w_j^2        f(w) = 1/(2m) |V w - u|^2

    w*(x) = H^-1 A'b / n     with  H = A'A / n + diag(exp(x))
    dF/dx = -exp(x) * w* * H^-1 V'(V w* - u) / m

Data: the diabetes study. x = log-penalties is the textbook hyper-parameter: one number per feature, and the exact
hypergradient to compare every estimator with.
"""

import torch
from torch import Tensor

import bilevel as bl
from bilevel.data.diabetes import Diabetes as Diabetes
from bilevel.data.diabetes import Labelled
from bilevel.data.diabetes import load as load


def inner_loss(inner: Tensor, outer: dict[str, Tensor], batch: Labelled) -> Tensor:
    """g: half the mean squared error plus the penalty."""
    return outer_loss(inner, outer, batch) + 0.5 * torch.dot(outer["log_penalty"].exp(), inner.pow(2))


def outer_loss(inner: Tensor, outer: dict[str, Tensor], batch: Labelled) -> Tensor:
    """f: half the mean squared error."""
    features, responses = batch
    return 0.5 * (features @ inner - responses).pow(2).mean()


def solution(outer: dict[str, Tensor], train: Labelled) -> Tensor:
    """w*(x), shape [10]."""
    features, responses = train
    return torch.linalg.solve(_hessian(outer, train), features.mT @ responses / len(responses))


def hypergradient(outer: dict[str, Tensor], train: Labelled, valid: Labelled) -> dict[str, Tensor]:
    """The exact dF/dx, in the tree of `outer`.

    Example:
        >>> problem, outer, inner, batches = setup()
        >>> hg = bl.hypergradient(problem, outer, inner, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.4), steps=2000), estimator=bl.Implicit(bl.CG(10)))
        >>> exact = hypergradient(outer, batches.inner, batches.outer)
        >>> bool((hg.grad["log_penalty"] - exact["log_penalty"]).abs().max() < 1e-9)
        True
    """
    return {"log_penalty": solve_hypergradient(outer, solution(outer, train), train, valid)}


def solve_hypergradient(outer: dict[str, Tensor], inner: Tensor, train: Labelled, valid: Labelled) -> Tensor:
    """What implicit differentiation with an exact linear solve returns at a w that need not be w*, shape [10]."""
    features, responses = valid
    with torch.no_grad():
        error = features.mT @ (features @ inner - responses) / len(responses)
        return -outer["log_penalty"].exp() * inner * torch.linalg.solve(_hessian(outer, train), error)


def step_size(outer: dict[str, Tensor]) -> Tensor:
    """A stable step size for each weight, 1.5 / (5 + exp(x)), shape [10]: for `SGD(lr=ridge.step_size)`.

    A fixed one fails in a long outer loop: the penalty of a useless feature grows without bound, and 2 / exp(x) falls
    below any number. A'A / n stays below 5 for these data, so the preconditioned Hessian's eigenvalues stay below 1.
    """
    return 1.5 / (5.0 + outer["log_penalty"].exp())


def setup(
    device: torch.device | str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float64, *, log_penalty: float = -2.0
) -> tuple[bl.Problem, dict[str, Tensor], Tensor, bl.Batches]:
    """`(problem, outer, inner, batches)`: outer {"log_penalty": [10]}, inner w = 0 of shape [10], the full training and
    validation parts.

    The inner Hessian's eigenvalues lie between about 0.14 and 4.4 at the default penalty, so SGD(lr=0.4) converges
    there; see `step_size` for outer loops.

    Args:
        device: of all tensors.
        seed: of the split.
        dtype: of all tensors.
        log_penalty: the value to begin with, the same for every feature.

    Raises:
        ImportError: scikit-learn is missing.
    """
    data = load(seed, dtype, device)
    outer = {
        "log_penalty": torch.full((len(data.features),), log_penalty, dtype=dtype, device=device, requires_grad=True)
    }
    inner = torch.zeros(len(data.features), dtype=dtype, device=device)
    return bl.Problem(inner_loss, outer_loss), outer, inner, bl.Batches(inner=data.train, outer=data.valid)


def _hessian(outer: dict[str, Tensor], train: Labelled) -> Tensor:
    features, responses = train
    return features.mT @ features / len(responses) + torch.diag(outer["log_penalty"].detach().exp())
