"""Kernel ridge regression as the adaptation: one linear solve, differentiated exactly.

    f = argmin over f in f_0 + H of  sum_i |f(x_i) - y_i|^2 + lam |f - f_0|_H^2
    f(x) = f_0(x) + k(x, X) (K + lam I)^{-1} (Y - f_0(X))

| | compute | memory |
| --- | --- | --- |
| kernel with a feature map of D < n dimensions (primal) | n D^2 + D^3 | D^2 |
| others (dual) | n^2 d + n^3 | n^2 |
| CG | n^2 for each product | n^2 |

n = way x shot is 25 in 5-way 5-shot, so this is a small part of the embedding's cost; no trajectory is kept. With the
linear kernel it is the ridge head of R2D2 (Bertinetto et al. 2019, arXiv 1805.08136). It is our reading of the
abstract of Park and Kang, arXiv 2411.00404 (I-AMFS), whose formulas are not public to us. Closed forms are for squared
errors; a cross-entropy enters through the outer loss of scale * f.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver
from bilevel.meta.head import Embedded, Variables
from bilevel.meta.kernel_head import KernelHead, arranged
from bilevel.meta.kernels.base import own_dtype
from bilevel.meta.positive import check_positive, fresh, part, value_of
from bilevel.meta.solving import cholesky, iterative
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class KernelRidge(KernelHead):
    """A ridge regression in the function space of a kernel, in float64.

    Args:
        kernel: k.
        regularizer: lam, positive.
        learn_regularizer: whether it is an outer variable (`regularizer`), by a softplus.
        mean: whether the squared errors are averaged over the n examples in place of summed: n lam in place of lam.
        jitter: added to the diagonal, as a part of its mean; what it adds to lam is in `report`. 0 for none.
        primal: whether the D x D system of a kernel's feature map is solved in place of the n x n one; None for the
            smaller one. The answer is the same.
        solver: None for a Cholesky factor; a linear solver such as bilevel.CG(200, tol=1e-10) where n is thousands.
            Its answer, and the gradient, is as accurate as its tolerance.
        classes: how many, if targets are class numbers; None for a regression on targets of shape (n,) or (n, c).
        coding: of class numbers: "one-hot" (0 and 1), "signed" (-1 and 1) or "centered" (one-hot - 1 / classes).
        prior: f_0, a function of the embeddings with values of the targets' shape, or an nn.Module, whose parameters
            are then outer variables too; None for 0.
        scale: of the prediction: the inverse temperature of a cross-entropy.
        learn_scale: whether it is an outer variable (`scale`).

    Raises:
        TypeError, ValueError: an argument is not what is needed; (when used) shapes do not fit, the matrix is singular
            to working precision, or the solver does not meet its tolerance. Under vmap those two give NaN, which
            `hypergradient` reports as a failed status.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.meta import Embedded, KernelRidge, Linear
        >>> z = Embedded(lambda parameters, inputs: inputs, {}, torch.tensor([[1.0], [2.0]]))
        >>> head = KernelRidge(Linear(), regularizer=5.0)
        >>> fitted = head.fit(z, torch.tensor([1.0, 2.0]), {})
        >>> fitted["weights"], head.predict(fitted, z, {})  # 5 / (5 + 5)
        (tensor([0.5000]), tensor([0.5000, 1.0000]))
    """

    regularizer: float = 1.0
    learn_regularizer: bool = dataclasses.field(default=False, kw_only=True)
    mean: bool = dataclasses.field(default=False, kw_only=True)
    jitter: float = dataclasses.field(default=0.0, kw_only=True)
    primal: bool | None = dataclasses.field(default=None, kw_only=True)
    solver: LinearSolver | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("KernelRidge", "regularizer", self.regularizer)
        if isinstance(self.jitter, bool) or not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter < 1:
            raise ValueError(f"KernelRidge was given jitter={self.jitter!r}; a number from 0 to below 1 was needed")
        if self.solver is not None and not isinstance(self.solver, LinearSolver):
            raise TypeError(f"KernelRidge was given solver={self.solver!r}; None or bilevel.CG(200) was needed")
        if self.solver is not None and self.solver.damping:
            raise ValueError(
                f"KernelRidge was given {self.solver!r}, whose damping would be a second regularizer; leave it out, "
                f"and write a larger regularizer=..."
            )

    def variables(self, like: Tensor) -> Variables:
        own = {"regularizer": fresh(self.regularizer, like)} if self.learn_regularizer else {}
        return super().variables(like) | own

    def combine(self, support: Embedded, residual: Tensor, variables: Variables) -> Tree:
        own = part(variables, "kernel")
        factor = None if self.primal is False else self.kernel.factor(support, own)
        if self.primal and factor is None:
            raise ValueError(
                f"KernelRidge was given primal=True and {type(self.kernel).__name__}, which has no feature map of "
                f"finite dimension; leave primal out"
            )
        if factor is not None and (self.primal or factor.shape[1] < factor.shape[0]):
            lam = self._shift(factor.square().sum() / factor.shape[0], residual, variables)
            right = factor.mT @ arranged(residual, residual.shape[0])
            weights = self._solved(factor.mT @ factor, lam, right).reshape(-1, *residual.shape[1:])
            return {"weights": weights.to(own_dtype(support))}
        gram = self.gram(support, residual, variables)
        lam = self._shift(gram.diagonal().mean(), residual, variables)
        solved = self._solved(gram, lam, arranged(residual, gram.shape[0])).reshape(residual.shape)
        return self.kernel.carry(support, solved, own)

    def _shift(self, diagonal: Tensor, residual: Tensor, variables: Variables) -> Tensor:
        """What is added to the diagonal."""
        lam = value_of(self.regularizer, "regularizer", variables) * (residual.shape[0] if self.mean else 1)
        return lam + self.jitter * diagonal

    def _solved(self, gram: Tensor, shift: Tensor, right: Tensor) -> Tensor:
        matrix = gram + shift * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        if self.solver is None:
            return cholesky("KernelRidge", matrix, right)
        return iterative("KernelRidge", matrix, right, self.solver)

    def report(self, support: Embedded, targets: Tensor, variables: Variables) -> dict[str, float]:
        """Figures of one task's fit, for a look at a matrix that is hard to solve.

        Returns:
            `regularizer`: lam, n-fold with `mean`. `jitter`: what is added to it. `condition`: largest over smallest
            eigenvalue of K + (lam + jitter) I. `rank`: how many eigenvalues of K are above its rounding errors.
        """
        with torch.no_grad():
            count = targets.shape[0]
            like = targets if self.classes is None else torch.zeros(count, self.classes)
            gram = self.gram(support, like, variables)
            lam = float(value_of(self.regularizer, "regularizer", variables)) * (count if self.mean else 1)
            jitter = self.jitter * float(gram.diagonal().mean())
            spectrum = torch.linalg.eigvalsh(gram)
            floor = len(gram) * torch.finfo(gram.dtype).eps * float(spectrum.abs().amax())
            shifted = spectrum + lam + jitter
            return {
                "regularizer": lam,
                "jitter": jitter,
                "condition": float(shifted.amax() / shifted.amin()),
                "rank": float((spectrum > floor).sum()),
            }
