"""Adaptation by gradient flow in function space, in closed form: Meta-RKHS II.

    f_t(x) = f_0(x) + k(x, X) A^{-1} (I - exp(-t A)) (Y - f_0(X)),     A = K + lam I

the flow from f_0 down 1/2 sum_i |f(x_i) - y_i|^2 + lam/2 |f - f_0|^2 for a time t: gradient descent with step size a
for k steps, with t = a k. With the neural tangent kernel and f_0 the module itself it stands for training the
linearized module; t = inf interpolates (lam = 0), or is the ridge regression (lam > 0).

| | compute | memory |
| --- | --- | --- |
| t finite | one exponential of a matrix of n + c rows (n c + 1 with the NTK) | some of those matrices |
| t = inf | one Cholesky factor | n^2 |

A^{-1} (I - exp(-t A)) R is a block of the exponential of [[-t A, t R], [0, 0]], so neither A is inverted nor its
eigenvectors are taken: values and derivatives are right at repeated and zero eigenvalues.

Reference: Zhou et al. 2021, Meta-Learning with Neural Tangent Kernels, arXiv 2102.03909, whose kernel matrix has no lam
and whose exponential is a Pade approximation.
"""

import dataclasses
import math

import torch
from torch import Tensor

from bilevel.meta.head import Embedded, Variables
from bilevel.meta.kernel_head import KernelHead, arranged
from bilevel.meta.positive import part
from bilevel.meta.solving import cholesky
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class GradientFlow(KernelHead):
    """The gradient flow of squared errors in the function space of a kernel, in float64.

    Args:
        kernel: k.
        time: t, positive; math.inf for the end.
        regularizer: lam, at least 0. With time=math.inf and lam = 0 the kernel matrix must have an inverse.
        classes: how many, if targets are class numbers; None for a regression on targets of shape (n,) or (n, c).
        coding: of class numbers: "one-hot" (0 and 1), "signed" (-1 and 1) or "centered" (one-hot - 1 / classes).
        prior: f_0, as for KernelRidge. For Meta-RKHS II: kernel=NTK(), prior=torch.nn.Identity().
        scale: of the prediction: the inverse temperature of a cross-entropy.
        learn_scale: whether it is an outer variable (`scale`).

    Accuracy: to about 1e-16 t |K|, relative.

    Raises:
        TypeError, ValueError: an argument is not what is needed; (when used) shapes do not fit, or (with t = inf) the
            matrix is singular to working precision: NaN under vmap, which `hypergradient` reports as a failed status.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.meta import Embedded, GradientFlow, Linear
        >>> z = Embedded(lambda parameters, inputs: inputs, {}, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> GradientFlow(Linear(), time=0.5).fit(z, torch.tensor([1.0, 0.0]), {})["weights"]
        tensor([ 0.3275, -0.0789])
    """

    time: float = math.inf
    regularizer: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, low in (("time", self.time, "a positive number"), ("regularizer", self.regularizer, None)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 if low else 0 <= value < math.inf):
                raise ValueError(
                    f"GradientFlow was given {name}={value!r}; {low or 'a number of at least 0'} was needed"
                )

    def combine(self, support: Embedded, residual: Tensor, variables: Variables) -> Tree:
        gram = self.gram(support, residual, variables)
        right = arranged(residual, gram.shape[0])
        matrix = gram + self.regularizer * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solved = cholesky("GradientFlow", matrix, right) if math.isinf(self.time) else flowed(matrix, right, self.time)
        return self.kernel.carry(support, solved.reshape(residual.shape), part(variables, "kernel"))


def flowed(matrix: Tensor, right: Tensor, time: float) -> Tensor:
    """A^{-1} (I - exp(-t A)) R for a symmetric positive semi-definite A, the integral of exp(-s A) R over 0 < s < t."""
    n, count = right.shape
    top = torch.cat([-time * matrix, time * right], dim=1)
    return torch.matrix_exp(torch.cat([top, torch.zeros_like(top[:1]).expand(count, -1)]))[:n, n:]
