"""The contract of a kernel, and kernels that compare embeddings.

    f(x) = sum_i k(x, x_i) a_i

A kernel gives the matrix of a support set, and turns coefficients a into tensors that are carried to the queries. Both
are in float64 inside: n is small, and a kernel matrix is often ill-conditioned.
"""

import abc

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.meta.head import Embedded, Variables
from bilevel.space.tree import Tree


class Kernel(Strategy):
    """A positive semi-definite kernel on examples of one task.

    Own kernels derive from `FeatureKernel` (compare two sets of embeddings) or `ExplicitKernel` (a feature map). All
    methods are pure and run under torch.func.vmap.
    """

    def variables(self, like: Tensor) -> Variables:
        """Fresh outer tensors of the kernel, of the dtype and device of `like`, by name; without any, {}."""
        return {}

    @abc.abstractmethod
    def gram(self, support: Embedded, variables: Variables) -> Tensor:
        """The kernel matrix of the support, in float64: (n, n), the same for every output, or (n c, n c) with the
        outputs of an example next to each other.
        """

    @abc.abstractmethod
    def carry(self, support: Embedded, coefficients: Tensor, variables: Variables) -> Tree:
        """What is needed to evaluate sum_i k(., x_i) a_i: floating tensors of the dtype `own_dtype(support)`.

        Args:
            support: the n examples x_i.
            coefficients: a, of shape (n,) or (n, c), in float64.
            variables: those of the kernel.
        """

    @abc.abstractmethod
    def evaluate(self, carried: Tree, query: Embedded, variables: Variables) -> Tensor:
        """sum_i k(x, x_i) a_i at the m queries, of shape (m,) or (m, c), from what `carry` returned."""

    def factor(self, support: Embedded, variables: Variables) -> Tensor | None:
        """A matrix Z of shape (n, d), in float64, with gram = Z Z', where `carry` returns Z' a; None without one."""
        return None


def own_dtype(support: Embedded) -> torch.dtype:
    """The dtype of x: that of the parameters, also where the embeddings come out of an autocast."""
    return next(iter(support.parameters.values()), support.values).dtype


def rows(support: Embedded) -> Tensor:
    """The embeddings as a float64 matrix, one row per example."""
    return support.values.double().flatten(1) if support.values.dim() > 1 else support.values.double()[:, None]


def matched(query: Tensor, carried: Tensor) -> Tensor:
    """The rows of the queries, refused unless they have as many columns as what the support left.

    Raises:
        ValueError: they have not.
    """
    if query.shape[-1] != carried.shape[-1]:
        raise ValueError(
            f"the queries' embeddings have {query.shape[-1]} columns, those of the support had {carried.shape[-1]}; "
            f"the same module was needed for both"
        )
    return query


class FeatureKernel(Kernel):
    """A kernel on embeddings. A subclass is a frozen dataclass with `between`.

    Memory: the support's embeddings and coefficients are carried, n d + n c numbers per task.

    Example:
        >>> import dataclasses, torch
        >>> @dataclasses.dataclass(frozen=True)
        ... class Quadratic(FeatureKernel):
        ...     def between(self, a, b, variables):
        ...         return (a @ b.mT + 1) ** 2
    """

    @abc.abstractmethod
    def between(self, a: Tensor, b: Tensor, variables: Variables) -> Tensor:
        """k of every pair, of shape (m, n), for a of shape (m, d) and b of shape (n, d), in float64.

        b are the support's embeddings; what depends on the data, such as a median, depends on them alone.
        """

    def gram(self, support: Embedded, variables: Variables) -> Tensor:
        z = rows(support)
        return self.between(z, z, variables)

    def carry(self, support: Embedded, coefficients: Tensor, variables: Variables) -> Tree:
        dtype = own_dtype(support)
        return {"points": rows(support).to(dtype), "coefficients": coefficients.to(dtype)}

    def evaluate(self, carried: Tree, query: Embedded, variables: Variables) -> Tensor:
        points, coefficients = carried["points"].double(), carried["coefficients"].double()
        values = self.between(matched(rows(query), points), points, variables) @ coefficients
        return values.to(own_dtype(query))


class ExplicitKernel(Kernel):
    """The kernel of a feature map of finite dimension, k(x, x') = phi(x)' phi(x'). A subclass has `map`.

    Memory: the weights Z' a are carried, D c numbers per task.
    """

    @abc.abstractmethod
    def map(self, z: Tensor, variables: Variables) -> Tensor:
        """phi of every row: from (n, d) to (n, D), in float64."""

    def gram(self, support: Embedded, variables: Variables) -> Tensor:
        features = self.map(rows(support), variables)
        return features @ features.mT

    def carry(self, support: Embedded, coefficients: Tensor, variables: Variables) -> Tree:
        weights = self.map(rows(support), variables).mT @ coefficients
        return {"weights": weights.to(own_dtype(support))}

    def evaluate(self, carried: Tree, query: Embedded, variables: Variables) -> Tensor:
        weights = carried["weights"].double()
        features = matched(self.map(rows(query), variables), weights.mT if weights.dim() > 1 else weights)
        return (features @ weights).to(own_dtype(query))

    def factor(self, support: Embedded, variables: Variables) -> Tensor | None:
        return self.map(rows(support), variables)
