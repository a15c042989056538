"""A deep equilibrium layer as the inner problem: z with z = f(z, parameters, inputs), for each example by itself.

    z_n = f(z_n, x, inputs_n)        forward: Anderson or Broyden, per example        backward: Implicit

| | calls of f | memory |
| --- | --- | --- |
| step | 1, on all examples at once | the method's: 2 m + 2 times z |

The inner variable is z, the outer one holds the layer's parameters (and the head's), the inner batch is what the layer
is fed. The backward is whatever estimator is chosen: `Implicit` keeps one call of f, however many steps were taken;
`Unrolled` keeps them all, and gives the same at the equilibrium.

Wins: the memory of one layer at the depth of many. Fails: layers that do not contract, and whose equilibrium need not
exist: the status says so.
Reference: Bai, Kolter and Koltun 2019, arXiv 1909.01377. Differences from peers: torchdeq and the paper's code
differentiate an inexact solution as if it were exact; here the residual has a tolerance, and missing it a status.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.inner.closed_form.base import check_function
from bilevel.inner.dynamics import Dynamics, Point, Products
from bilevel.inner.root.base import Method, check_method, difference, residual_of
from bilevel.space import tree
from bilevel.space.inner_product import Leaves, Space
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class DeepEquilibrium(Dynamics):
    """Steps to the equilibrium of a layer.

    Every tensor of z has the examples as its leading dimension (after that of tasks, where there are tasks), and no
    example may depend on another: batch normalization in f mixes them, for which take `FixedPoint`. The method mixes
    iterates example by example, as one alone would be.

    Args:
        layer: f, called as `layer(z, outer, inputs)` for one task, with the inner batch as inputs; returns a tree like
            z. `call, parameters = bilevel.functional(module)` makes one of a module: `lambda z, x, inputs: call(x, z,
            inputs)`.
        method: `Anderson`, `Broyden` or `Plain` of `bilevel.inner.root`.

    `Converge` looks at |z - f(z)| over all examples of a task.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; (when used) f returned something that is not like z, or
            z has no examples.

    Example:
        >>> import torch, bilevel as bl
        >>> deq = bl.inner.DeepEquilibrium(lambda z, x, inputs: torch.tanh(x * z + inputs),
        ...     bl.inner.root.Anderson(memory=3))
        >>> problem = bl.Problem(bl.inner.half_square(deq.residual), lambda z, x, b: z.sum())
        >>> inputs = torch.tensor([[0.1], [0.5]])
        >>> hg = bl.hypergradient(problem, torch.tensor(0.5), torch.zeros(2, 1), bl.Batches(inputs, None),
        ...     solver=bl.Converge(deq, tol=1e-5), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner.squeeze(1), hg.grad, hg.status.name
        (tensor([0.1949, 0.6879]), tensor(0.8533), 'OK')
    """

    layer: Callable[[Tree, Tree, Any], Tree]
    method: Method

    def __post_init__(self) -> None:
        check_function("DeepEquilibrium", "layer", self.layer)
        check_method("DeepEquilibrium", self.method, jacobian=False)

    @property
    def autonomous(self) -> bool:
        return True

    def residual(self, inner: Tree, outer: Tree, batch: Any) -> Tree:
        """z - f(z), for one task: `half_square` of it is an inner loss to report."""
        return difference(self.layer)(inner, outer, batch)

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.method.init(tuple(tree.tensors(inner)))

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        found, size = residual_of("DeepEquilibrium", self.residual, inner, at)
        at.report(size, vanishing=True)
        rows = _Rows.of(tuple(tree.tensors(inner)), at.space)
        y, residual = (rows.apart(tuple(each)) for each in (tree.tensors(inner), found))
        moved, after = self.method.step(y, residual, rows.apart(state), Space(rows.total), _no_jacobian)
        return tree.like(inner, rows.together(moved)), rows.together(after)

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        found, size = residual_of("DeepEquilibrium", self.residual, inner, at)
        at.report(size, vanishing=True)
        return tree.like(inner, found)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Examples in the place of tasks: tensors (T, N, ...) as (T N, ...), and back."""

    tasks: int | None
    examples: int

    @classmethod
    def of(cls, y: Leaves, space: Space) -> "_Rows":
        place = 0 if space.tasks is None else 1
        counts = {leaf.shape[place] if leaf.dim() > place else None for leaf in y}
        if len(counts) != 1 or None in counts:
            raise ValueError(
                f"DeepEquilibrium was given an inner variable of shapes {[tuple(leaf.shape[place:]) for leaf in y]} "
                f"for one task; tensors whose leading dimension is that of the examples were needed"
            )
        (count,) = counts
        assert count is not None
        return cls(space.tasks, count)

    @property
    def total(self) -> int:
        """How many examples there are in all tasks."""
        return self.examples * (1 if self.tasks is None else self.tasks)

    def apart(self, value: Any) -> Any:
        """Each example by itself."""
        return tree.tree_map(lambda leaf: leaf.flatten(0, 1) if self._stacked(leaf) else leaf, value)

    def together(self, value: Any) -> Any:
        """Examples by task."""
        if self.tasks is None:
            return value
        shape = self.tasks, self.examples
        return tree.tree_map(lambda leaf: leaf.unflatten(0, shape) if isinstance(leaf, Tensor) else leaf, value)

    def _stacked(self, leaf: Any) -> bool:
        return self.tasks is not None and isinstance(leaf, Tensor) and leaf.dim() >= 2


def _no_jacobian() -> Products:
    raise AssertionError("a method that takes products is refused when the layer is made")
