"""Targets: more steps of the same inner loop, or a step of an optimizer along the outer or the inner gradient.

| target | z | further cost |
| --- | --- | --- |
| FurtherSteps(L) | y_{K+L} | L inner gradients |
| OneStep(SGD(c)) | y_K - c df/dy(y_K) | 1 outer gradient |
| OneStep(optimizer, of="inner", after=L) | one step of it along dg/dy from y_{K+L} | L + 1 inner gradients |

Reference: Flennerhag et al. 2022, Bootstrapped Meta-Learning, arXiv 2109.04504: L - 1 further steps of the learned
rule, then a step along the plain gradient, is OneStep(SGD(c), after=L - 1).
"""

import dataclasses

import torch

from bilevel.estimators.bootstrapped.base import Ahead, Target
from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.tree import Tree

_OF = ("outer", "inner")


@dataclasses.dataclass(frozen=True)
class FurtherSteps(Target):
    """Where the inner loop is after more steps of its own; momentum and other state go on.

    Args:
        steps: L >= 1. With PerStep batches, K + L of them are needed.

    Raises:
        ValueError: steps is out of range.

    Example:
        >>> import bilevel as bl
        >>> bl.estimators.FurtherSteps(3).further
        3
    """

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"FurtherSteps was given steps={self.steps!r}; an integer of at least 1 was needed")

    @property
    def further(self) -> int:
        return self.steps

    def point(self, ahead: Ahead) -> Tree:
        return ahead.inner


@dataclasses.dataclass(frozen=True)
class OneStep(Target):
    """One step of an optimizer, begun afresh, along the gradient of a loss; SGD for a gradient step.

    Args:
        optimizer: an inner optimizer. Hyper-parameters that are functions of outer are taken as they are now.
        of: "outer" for the outer loss f, at the outer batch; "inner" for g, at the batch of the last step.
        after: further steps of the inner loop before it.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import bilevel as bl
        >>> bl.estimators.OneStep(bl.SGD(lr=0.5), after=4).further
        4
    """

    optimizer: Optimizer
    of: str = "outer"
    after: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"OneStep was given a {type(self.optimizer).__name__} as optimizer; an inner optimizer such as "
                f"bilevel.SGD(lr=0.5) was needed (torch.optim optimizers work in place and are for the outer variable)"
            )
        if self.of not in _OF:
            raise ValueError(f"OneStep was given of={self.of!r}; one of {', '.join(map(repr, _OF))} was needed")
        if not isinstance(self.after, int) or isinstance(self.after, bool) or self.after < 0:
            raise ValueError(f"OneStep was given after={self.after!r}; an integer of at least 0 was needed")

    @property
    def further(self) -> int:
        return self.after

    def point(self, ahead: Ahead) -> Tree:
        gradient = ahead.outer_gradient() if self.of == "outer" else ahead.inner_gradient()
        tasks = ahead.instance.tasks
        if tasks is None or type(self.optimizer).__module__.startswith("bilevel.optim"):
            return self._moved(gradient, ahead.inner, ahead.outer)
        # An optimizer of the user's own may look at all of y at once (a norm): one task after another.
        rows = [self._moved(_row(gradient, i), _row(ahead.inner, i), ahead.outer) for i in range(tasks)]
        return tree.tree_map(lambda *leaves: torch.stack(leaves), *rows)

    def _moved(self, gradient: Tree, inner: Tree, outer: Tree) -> Tree:
        return self.optimizer.step(gradient, self.optimizer.init(inner), inner, outer)[0]


def _row(value: Tree, task: int) -> Tree:
    return tree.tree_map(lambda leaf: None if leaf is None else leaf[task], value)
