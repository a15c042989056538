"""Learned step sizes of the adaptation: Meta-SGD's per element, MAML++'s per layer and step.

    y_{k+1} = y_k - r_k * d_k,   r part of x

| per | per_step | numbers in x | known as |
| --- | --- | --- | --- |
| "element" | False | P | Meta-SGD (Li et al. 2017, arXiv 1707.09835) |
| "tensor" | False | one a tensor | |
| "tensor" | True | K a tensor | LSLR of MAML++ (Antoniou et al. 2019, arXiv 1810.09502) |
| "all" | False | 1 | |

Differences from those papers: MAML++ has one rate a layer, here a layer's weight and bias have one each; rates may be
kept positive by `log`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.inner.base import InnerSolver
from bilevel.inner.descent import Descent
from bilevel.optim.base import Optimizer
from bilevel.optim.scheduled import Scheduled
from bilevel.space.tree import Tree

_PER = ("element", "tensor", "all")


@dataclasses.dataclass(frozen=True)
class Rates(Strategy):
    """Step sizes that are part of x, in place of the inner optimizer's `lr`.

    Args:
        per: "element" for one a number of y, "tensor" for one a tensor, "all" for a single one.
        per_step: another one for every inner step; the solver must then be `Descent`.
        initial: where they start; None for the `lr` of the solver's optimizer.
        log: x holds their logarithms, so that they stay positive. Without it they may become negative, as in Meta-SGD.

    Raises:
        ValueError: an argument is out of range, or (when used) the solver has no `lr` to put them into.

    Example:
        >>> import torch, bilevel as bl
        >>> net, rates = torch.nn.Linear(3, 2), bl.meta.Rates(per="tensor", per_step=True)
        >>> learner = bl.meta.Learner(net, torch.nn.functional.mse_loss, rates=rates)
        >>> learner.outer()["rates"]["weight"].tolist()
        [0.10000000149011612, 0.10000000149011612, 0.10000000149011612, 0.10000000149011612, 0.10000000149011612]
    """

    per: str = "tensor"
    per_step: bool = False
    initial: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.per not in _PER:
            raise ValueError(f"Rates was given per={self.per!r}; one of {', '.join(map(repr, _PER))} was needed")
        if self.initial is not None and (
            isinstance(self.initial, bool)
            or not isinstance(self.initial, (int, float))
            or not 0 < self.initial < float("inf")
        ):
            raise ValueError(f"Rates was given initial={self.initial!r}; None or a positive number was needed")

    def variables(self, adapted: dict[str, Tensor], solver: InnerSolver) -> dict[str, Tensor]:
        """The part of x: a tensor for each name that adapts ("all": one entry of that name).

        Args:
            adapted: what adapts, by name.
            solver: whose `lr` is the initial value unless `initial` says another.

        Raises:
            ValueError: the solver has no `lr` that is a number, or no fixed number of steps for `per_step`.
        """
        value = self._initial(solver)
        value = torch.tensor(value, dtype=torch.float64).log().item() if self.log else value
        steps = (solver.max_steps,) if self.per_step else ()
        if self.per == "all":
            like = next(iter(adapted.values()))
            return {"all": torch.full(steps, value, dtype=like.dtype, device=like.device)}
        return {
            name: torch.full(
                (*steps, *(y.shape if self.per == "element" else ())), value, dtype=y.dtype, device=y.device
            )
            for name, y in adapted.items()
        }

    def applied(self, solver: InnerSolver) -> InnerSolver:
        """The solver with these rates in place of its own."""
        optimizer = _optimizer(solver)
        if not self.per_step:
            return _with(solver, optimizer=_with(optimizer, lr=self._at(None)))
        made = [_with(optimizer, lr=self._at(step)) for step in range(solver.max_steps)]
        return _with(solver, optimizer=Scheduled(tuple(made)))

    def _at(self, step: int | None) -> "_Rate":
        return _Rate(self.per == "all", self.log, step)

    def _initial(self, solver: InnerSolver) -> float:
        optimizer = _optimizer(solver)
        if self.per_step and not isinstance(solver, Descent):
            raise ValueError(
                f"Rates(per_step=True) was used with {type(solver).__name__}, whose number of steps is not known "
                f"beforehand; write Descent(optimizer, steps)"
            )
        if self.initial is not None:
            return float(self.initial)
        lr: Any = getattr(optimizer, "lr", None)
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not lr > 0:
            raise ValueError(
                f"Rates was used with an inner optimizer whose lr is {lr!r}, which says nothing about where the "
                f"learned ones start; write Rates(initial=0.1)"
            )
        return float(lr)


@dataclasses.dataclass(frozen=True)
class _Rate:
    """The step size as a function of x: what an optimizer takes for `lr`."""

    single: bool
    log: bool
    step: int | None

    def __call__(self, outer: Tree) -> Any:
        values = {name: self._one(rate) for name, rate in outer["rates"].items()}
        return values["all"] if self.single else values

    def _one(self, rate: Tensor) -> Tensor:
        if self.step is not None and self.step >= len(rate):
            raise ValueError(
                f"Rates(per_step=True) has learned the rates of {len(rate)} steps, and the solver takes more; give it "
                f"steps={len(rate)} at most, or learn rates that are the same at every step"
            )
        rate = rate if self.step is None else rate[self.step]
        return rate.exp() if self.log else rate


def _with(strategy: Any, **changes: Any) -> Any:
    return dataclasses.replace(strategy, **changes)


def _optimizer(solver: InnerSolver) -> Optimizer:
    optimizer = getattr(solver, "optimizer", None)
    if not (isinstance(optimizer, Optimizer) and dataclasses.is_dataclass(optimizer) and hasattr(optimizer, "lr")):
        raise ValueError(
            f"Rates was used with a {type(solver).__name__} of {type(optimizer).__name__}, which has no lr to learn; "
            f"write Descent(SGD(lr=0.1), steps=5)"
        )
    return optimizer
