"""The empirical neural tangent kernel at the meta-parameters: k(x, x') = J(x) J(x')', J = d module(x) / d parameters.

| | cost | memory |
| --- | --- | --- |
| gram | n c VJPs at once | n c P numbers and the graphs of the VJPs |
| carry | 1 VJP | P |
| evaluate | 1 VJP and its transpose (2 VJPs) | 2 graphs |

n examples, c outputs, P parameters. What is carried to the queries is J(X)' a, a direction in parameters: the adapted
predictor is the module linearized at the meta-parameters and moved along it. All of it is differentiable once more in
the parameters. Where the module mixes the examples of a batch (batch statistics), J is that of the whole batch.

Reference: Jacot et al. 2018, arXiv 1806.07572; in meta-learning Zhou et al. 2021, arXiv 2102.03909.
"""

import dataclasses
from collections.abc import Callable, Collection

from torch import Tensor

from bilevel.engine import jacobian
from bilevel.meta.head import Embedded, Variables
from bilevel.meta.kernels.base import Kernel, own_dtype
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class NTK(Kernel):
    """The kernel of the module's Jacobian, a block of c x c numbers for each pair of examples.

    The outputs of the module must have the shape of the coded targets: (n,) or (n, c).

    Args:
        over: the parameters whose Jacobian is taken: names or prefixes up to a dot, or a function of the name; None for
            all of them. The others are learned, too, through the outer loss alone.

    Raises:
        ValueError: (when used) `over` selects no parameter; the module's outputs do not have the shape of the targets.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.meta import Embedded
        >>> call, parameters = bl.functional(torch.nn.Linear(2, 1, bias=False))
        >>> NTK().gram(Embedded(call, parameters, torch.tensor([[1.0, 0.0], [1.0, 1.0]])), {})
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)
    """

    over: str | Collection[str] | Callable[[str], bool] | None = None

    def gram(self, support: Embedded, variables: Variables) -> Tensor:
        function, at = self._split(support)
        _, rows = jacobian.jacobian(function, at)
        return jacobian.dot(rows, rows)

    def carry(self, support: Embedded, coefficients: Tensor, variables: Variables) -> Tree:
        function, at = self._split(support)
        value, pull = jacobian.pullback(function, at)
        if value.shape != coefficients.shape:
            raise ValueError(_mismatch(value, coefficients))
        return {name: leaf.to(at[name].dtype) for name, leaf in pull(coefficients.to(value.dtype)).items()}

    def evaluate(self, carried: Tree, query: Embedded, variables: Variables) -> Tensor:
        function, at = self._split(query)
        return jacobian.product(function, at, carried).to(own_dtype(query))

    def _split(self, examples: Embedded) -> tuple[Callable[[Tree], Tensor], dict[str, Tensor]]:
        """The module as a function of the parameters that the Jacobian is of, and those."""
        at = {name: leaf for name, leaf in examples.parameters.items() if self._selects(name)}
        if not at:
            raise ValueError(
                f"NTK was given over={self.over!r}, which selects none of the parameters {list(examples.parameters)}"
            )
        rest = {name: leaf for name, leaf in examples.parameters.items() if name not in at}
        return lambda chosen: examples.call({**rest, **chosen}, examples.inputs), at

    def _selects(self, name: str) -> bool:
        if self.over is None:
            return True
        if callable(self.over):
            return bool(self.over(name))
        entries = [self.over] if isinstance(self.over, str) else self.over
        return any(name == entry or name.startswith(entry.rstrip(".") + ".") for entry in entries)


def _mismatch(value: Tensor, coefficients: Tensor) -> str:
    return (
        f"NTK was given a module with outputs of shape {tuple(value.shape)} and targets of shape "
        f"{tuple(coefficients.shape)}; the same shape was needed: one output of the module for each class or target"
    )
