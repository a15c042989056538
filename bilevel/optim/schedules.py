"""Hyper-parameters that change from step to step.

    y_{k+1}, s_{k+1} = optimizer(lr = rate(k, x)).step(g_k, s_k, y_k, x),   k = 0, 1, ...

| | gradients | extra memory |
| --- | --- | --- |
| step | - | that of the optimizer, and the number of the step |

A rule is a function of the step's number and of outer. The shapes in `bilevel.optim.Cosine` and its siblings are such
functions; so is `lambda step, outer: outer["rates"][step]`. The state goes on from step to step, as in torch.optim when
a scheduler changes a setting. The step's number counts the steps of one call: a loop that is carried on starts anew.

Wins: one optimizer and a rule, for any number of steps. `Scheduled` holds one optimizer for each step instead.
Fails: rules of the number alone; a rule that looks at the loss (reduce on plateau) has none to look at.
Reference: torch.optim.lr_scheduler, whose StepLR, ExponentialLR, CosineAnnealingLR and LinearLR it equals in float64 to
1e-12.
Differences from peers: any hyper-parameter may have a rule; a rule may be learned, a tensor of K rates included.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.tree import Tree

Rule = Callable[[int, Tree], Any]
"""(number of the step from 0, outer) -> a number, a 0-dim tensor or a tree like inner."""


@dataclasses.dataclass(frozen=True)
class Schedules(Optimizer):
    """Another optimizer, with hyper-parameters that are functions of the step's number.

    Args:
        optimizer: a dataclass, such as those of the library.
        rules: {name of a field: function of (step, outer)}. For "betas" it returns a pair.

    At rest: that of the optimizer, where the rules leave it where it is (rates, momenta); else it does not say.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, a field is not there; in `step`, a rule's number is out
            of the field's range.

    Example:
        >>> import torch, bilevel as bl
        >>> schedules = bl.optim.Schedules(bl.SGD(lr=0.1), {"lr": lambda step, outer: outer["rates"][step]})
        >>> y, x = torch.zeros(1), {"rates": torch.tensor([1.0, 0.5])}
        >>> state = schedules.init(y)
        >>> for _ in range(2):
        ...     y, state = schedules.step(torch.ones(1), state, y, x)
        >>> y
        tensor([-1.5000])
    """

    optimizer: Optimizer
    rules: Mapping[str, Rule]

    late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        write = "write Schedules(SGD(lr=0.1), {'lr': Cosine(0.1, steps=100)})"
        if not isinstance(self.optimizer, Optimizer) or not dataclasses.is_dataclass(self.optimizer):
            raise TypeError(
                f"Schedules was given the optimizer {type(self.optimizer).__name__}; an inner optimizer that is a "
                f"dataclass was needed: {write}"
            )
        if not isinstance(self.rules, Mapping) or not self.rules or not all(map(callable, self.rules.values())):
            raise TypeError(
                f"Schedules was given the rules {self.rules!r}; functions of (step, outer) by the names of fields were "
                f"needed: {write}"
            )
        names = [field.name for field in dataclasses.fields(self.optimizer)]
        for name in self.rules:
            if name not in names:
                raise ValueError(
                    f"Schedules was given a rule for {name!r}, which is no field of {type(self.optimizer).__name__}; "
                    f"it has {names}. The hyper-parameters of an optimizer inside it are scheduled there"
                )

    @property
    def step_limit(self) -> int | None:
        limits = [self.optimizer.step_limit, *(getattr(rule, "step_limit", None) for rule in self.rules.values())]
        return min((limit for limit in limits if limit is not None), default=None)

    def init(self, inner: Tree) -> Any:
        # A momentum that a rule gives is there, whatever the field's own value says.
        given = {name: _constant(rule) for name, rule in self.rules.items() if name == "momentum"}
        return {"step": 0, "inside": self._with(given).init(inner)}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        now = self._at(state["step"], outer)
        moved, inside = now.step(grad, state["inside"], inner, outer)
        return moved, {"step": state["step"] + 1, "inside": inside}

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        ours = type(self.optimizer).__module__.startswith("bilevel.optim.")
        if not ours or not _ON_THE_WAY.issuperset(self.rules) or _is_tree(self.rules.get("lr"), outer):
            return None
        return self.optimizer.stationarity(grad, inner, outer)

    def _at(self, step: int, outer: Tree) -> Optimizer:
        return self._with({name: _settable(rule(step, outer)) for name, rule in self.rules.items()})

    def _with(self, values: Mapping[str, Any]) -> Optimizer:
        optimizer: Any = self.optimizer
        made: Optimizer = dataclasses.replace(optimizer, **values)
        return made


_ON_THE_WAY = frozenset(
    {"lr", "momentum", "dampening", "betas", "alpha", "rho", "eps", "lr_decay", "momentum_decay", "limit", "smooth"}
)
"""Hyper-parameters that say how y comes to its rest, not where that is."""


def _settable(value: Any) -> Any:
    """What an optimizer takes: numbers as they are, so that they are checked; tensors as functions of outer."""
    if isinstance(value, tuple) and len(value) == 2:  # betas
        return tuple(map(_settable, value))
    if any(isinstance(leaf, Tensor) for leaf in tree.flatten(value)[0]):
        return lambda outer: value
    return value


def _constant(rule: Rule) -> Callable[[Tree], Any]:
    return lambda outer: rule(0, outer)


def _is_tree(rule: Rule | None, outer: Tree) -> bool:
    """Whether a rule gives tensors rates of their own, of which some may be 0."""
    if rule is None:
        return False
    value = rule(0, outer)
    return not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.dim() == 0)
