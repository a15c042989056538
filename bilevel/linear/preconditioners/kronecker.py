"""K-FAC and EKFAC: layer by layer a Kronecker product, from curvlinops.

    M = inverse of (A_l (x) S_l + damping I) for each layer l;   A_l of inputs, S_l of gradients at the outputs

| | products with A | memory |
| --- | --- | --- |
| made once per operator | none; a forward and a backward per batch of `data` | P, and in^2 + out^2 per layer |
| each r -> M r | none | 2 P |

Wins: nets of linear and convolutional layers, whose Hessian's scales differ by layer.
Fails: y that is no module's parameters; layers that curvlinops does not know (it says so); what lies between layers.
References: Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884. Differences from peers:
curvlinops gives the factors; here they precondition the true Hessian's solve, whose residual decides.
"""

import copy
import dataclasses
import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.linear.base import check_positive
from bilevel.linear.operator import LinearOperator
from bilevel.linear.preconditioners.base import Apply, Preconditioner
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class KFAC(Preconditioner):
    """K-FAC of a model, at the y of the linear system. Needs curvlinops (pip install curvlinops-for-pytorch).

    Args:
        model: whose parameters, in their order, y is made of; it is copied, and keeps its own parameters.
        loss: torch.nn.MSELoss, CrossEntropyLoss or BCEWithLogitsLoss, as in the inner loss.
        data: batches (inputs, targets) of the inner loss, gone through once per operator.
        damping: added to the model of A; relative to its scale, 1e-3 is a beginning.
        corrected: EKFAC, whose eigenvalues are measured in the basis of K-FAC.
        fisher_type: of curvlinops: "type-2" (exact in the outputs), "mc", "empirical" or "forward-only".
        seed: of curvlinops' draws.

    Raises:
        ImportError: (when used) curvlinops is not installed.
        ValueError: an argument is out of range; (when used) y is not the model's parameters, or there are tasks.
    """

    model: nn.Module
    loss: nn.Module
    data: Iterable[tuple[Tensor, Tensor]]
    damping: float = 1e-3
    corrected: bool = False
    fisher_type: str = "type-2"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) or not isinstance(self.loss, nn.Module):
            raise TypeError(
                f"KFAC was given model={type(self.model).__name__} and loss={type(self.loss).__name__}; a "
                f"torch.nn.Module and a loss such as torch.nn.CrossEntropyLoss() were needed"
            )
        check_positive("KFAC", "damping", self.damping)

    def prepare(self, operator: LinearOperator, space: Space, like: Leaves) -> Apply:
        curvlinops = _curvlinops()
        if space.tasks is not None:
            raise ValueError("KFAC was given a system with tasks; its factors are of one model. Use Jacobi(probes=20)")
        model = self._at(operator.point, like)
        make = curvlinops.EKFACLinearOperator if self.corrected else curvlinops.KFACLinearOperator
        parameters = [each for each in model.parameters() if each.requires_grad]
        with torch.enable_grad():
            options = {"fisher_type": self.fisher_type, "check_deterministic": False, "seed": self.seed}
            factors = make(model, self.loss, parameters, self.data, **options)
            inverse = curvlinops.KFACInverseLinearOperator(factors, damping=self.damping, use_exact_damping=True)
            # (The factors are made at the first product.)
            _ = inverse @ [torch.zeros_like(each) for each in parameters]

        def apply(r: Leaves) -> Leaves:
            with torch.no_grad():
                return tuple(inverse @ list(r))

        return apply

    def _at(self, point: Leaves | None, like: Leaves) -> nn.Module:
        """A copy of the model with y in the place of its parameters; its own where y is not known."""
        model = copy.deepcopy(self.model)
        given = [each for each in model.parameters() if each.requires_grad]
        if [tuple(each.shape) for each in given] != [tuple(leaf.shape) for leaf in like]:
            raise ValueError(
                f"KFAC was given a model whose parameters have the shapes {[tuple(each.shape) for each in given]}, "
                f"while those of y are {[tuple(leaf.shape) for leaf in like]}; y must be the model's parameters in "
                f"their order, such as dict(model.named_parameters())"
            )
        if point is not None:
            with torch.no_grad():
                for each, leaf in zip(given, point, strict=True):
                    each.copy_(leaf)
        return model


def _curvlinops() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
            return importlib.import_module("curvlinops")
    except ImportError as error:
        raise ImportError(
            "KFAC needs curvlinops, which is not installed: pip install curvlinops-for-pytorch, or use "
            "Jacobi(probes=20) or NystromPreconditioner(rank=20), which need torch alone"
        ) from error
