"""Ridge regression with one penalty a feature, learned on validation data; everything in closed form.

    g(w, x) = 1/(2n) |A w - b|^2 + 1/2 sum_j exp(x_j) w_j^2        f(w) = 1/(2m) |V w - u|^2

    w*(x) = H^-1 A'b / n     with  H = A'A / n + diag(exp(x))
    dF/dx = -exp(x) * w* * H^-1 V'(V w* - u) / m

Data: the diabetes study bundled with scikit-learn, 442 patients, 10 features (Efron et al. 2004, Least Angle
    Regression, Annals of Statistics
32:407). x = log-penalties is the textbook hyper-parameter: one number a feature, and the exact hypergradient to compare
every estimator with.
"""

import dataclasses
import random

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.problem import Problem
from bilevel.problems._optional import optional

Labelled = tuple[Tensor, Tensor]
"""Features [n, 10] and responses [n]."""

SIZES = (222, 110, 110)
"""Patients for training, validation and test: a half and two quarters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Diabetes:
    """The three parts of the data. Features and responses are standardised by the training part's mean and
    deviation.
    """

    train: Labelled
    valid: Labelled
    test: Labelled
    features: tuple[str, ...]


def load(seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Diabetes:
    """Load and split the diabetes data.

    Args:
        seed: of the random split; the same one gives the same split.
        dtype: of the tensors.
        device: of the tensors.

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> data = load()
        >>> tuple(data.train[0].shape), tuple(data.valid[1].shape), data.features[:3]
        ((222, 10), (110,), ('age', 'sex', 'bmi'))
    """
    bundle = optional("sklearn.datasets").load_diabetes(scaled=False)
    order = list(range(sum(SIZES)))
    random.Random(seed).shuffle(order)
    rows = order[: SIZES[0]], order[SIZES[0] : SIZES[0] + SIZES[1]], order[SIZES[0] + SIZES[1] :]

    def part(chosen: list[int]) -> Labelled:
        pair = [
            (values[chosen] - values[rows[0]].mean(0)) / values[rows[0]].std(0)
            for values in (bundle.data, bundle.target)
        ]
        return torch.tensor(pair[0], dtype=dtype, device=device), torch.tensor(pair[1], dtype=dtype, device=device)

    return Diabetes(train=part(rows[0]), valid=part(rows[1]), test=part(rows[2]), features=tuple(bundle.feature_names))


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
        >>> import bilevel as bl
        >>> problem, outer, inner, batches = setup()
        >>> hg = bl.hypergradient(problem, outer, inner, batches, solver=bl.Descent(bl.SGD(lr=0.4), steps=2000), estimator=bl.Implicit(bl.CG(10)))
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
        below any number.
    A'A / n stays below 5 for these data, so the preconditioned Hessian's eigenvalues stay below 1.
    """
    return 1.5 / (5.0 + outer["log_penalty"].exp())


def setup(
    device: torch.device | str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float64, *, log_penalty: float = -2.0
) -> tuple[Problem, dict[str, Tensor], Tensor, Batches]:
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
    return Problem(inner_loss, outer_loss), outer, inner, Batches(inner=data.train, outer=data.valid)


def _hessian(outer: dict[str, Tensor], train: Labelled) -> Tensor:
    features, responses = train
    return features.mT @ features / len(responses) + torch.diag(outer["log_penalty"].detach().exp())
