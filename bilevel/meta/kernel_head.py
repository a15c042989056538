"""What heads with a kernel share: targets, prior, scale, and the checks of a kernel matrix.

    f(x) = f_0(x) + sum_i k(x, x_i) a_i,     prediction(x) = scale f(x)

Heads differ in the coefficients a alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.functional import functional
from bilevel.meta.coding import check_coding, coded
from bilevel.meta.head import Embedded, Head, Variables
from bilevel.meta.kernels.base import Kernel
from bilevel.meta.positive import check_positive, fresh, part, prefixed, value_of
from bilevel.outcome import readable
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class KernelHead(Head):
    """A head whose predictor is a prior plus a combination of kernels. A subclass has `combine`.

    Args:
        kernel: k.
        classes: how many, if targets are class numbers; None for a regression on targets of shape (n,) or (n, c).
        coding: of class numbers: "one-hot" (0 and 1), "signed" (-1 and 1) or "centered" (one-hot - 1 / classes).
        prior: f_0, a function of the embeddings with values of the targets' shape, or an nn.Module, whose parameters
            are then outer variables too; None for 0. torch.nn.Identity() where the module's output is f_0 itself.
        scale: of the prediction: the inverse temperature of a cross-entropy. (Squared errors want 1.)
        learn_scale: whether it is an outer variable (`scale`).
    """

    kernel: Kernel
    classes: int | None = dataclasses.field(default=None, kw_only=True)
    coding: str = dataclasses.field(default="one-hot", kw_only=True)
    prior: nn.Module | Callable[[Tensor], Tensor] | None = dataclasses.field(default=None, kw_only=True)
    scale: float = dataclasses.field(default=1.0, kw_only=True)
    learn_scale: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.kernel, Kernel):
            raise TypeError(
                f"{owner} was given kernel={self.kernel!r}; a kernel was needed, such as {owner}(bilevel.meta.RBF())"
            )
        check_coding(owner, self.classes, self.coding)
        if self.prior is not None and not callable(self.prior):
            raise TypeError(f"{owner} was given prior={self.prior!r}; a function, an nn.Module or None was needed")
        check_positive(owner, "scale", self.scale)

    def variables(self, like: Tensor) -> Variables:
        found = prefixed(self.kernel.variables(like), "kernel")
        if self._module is not None:
            own = {name: leaf.detach().to(like).clone() for name, leaf in self._module[1].items()}
            found |= prefixed(own, "prior")
        return found | ({"scale": fresh(self.scale, like)} if self.learn_scale else {})

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _module(self) -> tuple[Callable[..., Any], dict[str, Tensor]] | None:
        return functional(self.prior) if isinstance(self.prior, nn.Module) else None

    @abc.abstractmethod
    def combine(self, support: Embedded, residual: Tensor, variables: Variables) -> Tree:
        """What the kernel carries, for targets less their prior: `residual`, of shape (n,) or (n, c), in float64."""

    def fit(self, support: Embedded, targets: Tensor, variables: Variables) -> Tree:
        """The adapted predictor: what the kernel carries to the queries.

        Raises:
            ValueError: targets or prior are not of the shape or kind that is needed, or the kernel matrix is singular.
        """
        owner = type(self).__name__
        values = support.values
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.dim() == 0:
            raise ValueError(f"{owner} needs a module that returns a floating tensor with a row for each example")
        wanted = coded(owner, targets, self.classes, self.coding)
        if wanted.shape[0] != values.shape[0] or not values.shape[0]:
            raise ValueError(
                f"{owner} was given {values.shape[0]} embeddings and {wanted.shape[0]} targets; as many of one as of "
                f"the other were needed, at least one"
            )
        prior = self._prior(support, variables)
        if prior is not None:
            if prior.shape != wanted.shape:
                raise ValueError(
                    f"{owner} was given a prior with values of shape {tuple(prior.shape)} for targets of shape "
                    f"{tuple(wanted.shape)}; the same shape was needed"
                )
            wanted = wanted - prior.double()
        return self.combine(support, wanted, variables)

    def predict(self, fitted: Tree, query: Embedded, variables: Variables) -> Tensor:
        value = self.kernel.evaluate(fitted, query, part(variables, "kernel"))
        prior = self._prior(query, variables)
        if prior is not None:
            value = value + prior.to(value.dtype)
        if self.learn_scale:
            return value * torch.as_tensor(value_of(self.scale, "scale", variables)).to(value.dtype)
        return value * self.scale if self.scale != 1 else value

    def _prior(self, examples: Embedded, variables: Variables) -> Tensor | None:
        if self.prior is None:
            return None
        if self._module is None:
            return self.prior(examples.values)
        return self._module[0](part(variables, "prior"), examples.values)

    def gram(self, support: Embedded, residual: Tensor, variables: Variables) -> Tensor:
        """The kernel matrix, checked, with a row for each number of the residual or for each example.

        Raises:
            ValueError: the kernel's matrix has neither shape, or an own kernel's is not symmetric.
        """
        gram = self.kernel.gram(support, part(variables, "kernel"))
        sizes = {residual.shape[0], residual.numel()}
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] not in sizes:
            raise ValueError(
                f"{type(self.kernel).__name__}.gram() returned the shape {tuple(gram.shape)} for targets of shape "
                f"{tuple(residual.shape)}; a square matrix with a row for each example, or for each number of the "
                f"targets, was needed"
            )
        gram = gram.double()
        if not type(self.kernel).__module__.startswith("bilevel."):
            known = gram.detach()
            off = (known - known.mT).abs().amax() > 1e-8 * known.abs().amax()
            if readable(off) and bool(off):
                raise ValueError(
                    f"{type(self.kernel).__name__}.gram() is not symmetric, so it is no kernel; k(a, b) = k(b, a) was "
                    f"needed"
                )
            gram = torch.where(off, torch.nan, gram)
        return gram


def arranged(residual: Tensor, size: int) -> Tensor:
    """The residual as a matrix of `size` rows: one for each example, or one for each number."""
    return residual.reshape(size, -1)
