"""The contract of an inner solver: it says when the dynamics has moved y far enough, and never moves y itself."""

import abc
from typing import Any

from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.inner.dynamics import Dynamics
from bilevel.inner.gradient import GradientDynamics
from bilevel.optim.base import Optimizer


class InnerSolver(Strategy):
    """A dynamics under a stopping rule. The loop is `bilevel.inner.loop.run`, for all of them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "solve" in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines solve(), but an inner solver does not move y: what it did there would be "
                f"differentiated by no estimator. Write how y moves as a bilevel.inner.Dynamics with step(), and pass "
                f"it as Descent(dynamics, steps) or Converge(dynamics, tol)"
            )

    @property
    @abc.abstractmethod
    def dynamics(self) -> Dynamics:
        """How y moves."""

    @property
    @abc.abstractmethod
    def max_steps(self) -> int:
        """The most steps it may take; a PerStep must hold that many batches."""

    @property
    @abc.abstractmethod
    def fixed(self) -> bool:
        """Whether it always takes `max_steps` steps, so that the K-step program is known beforehand."""

    def solved(self, residual: Tensor) -> Tensor:
        """For a solver that is not `fixed`: which tasks are solved, given the norm of the stationarity per task."""
        raise ValueError(f"{type(self).__name__} has fixed=False and no solved(residual); define when it is content")

    def tightened(self, factor: float, floor: float) -> "InnerSolver":
        """The same rule with its tolerance times `factor`, where that is above `floor`; a number of steps has none."""
        if not self.fixed:
            raise ValueError(
                f"{type(self).__name__} has fixed=False and no tightened(factor, floor), which FirstOrderCorrected "
                f"needs to "
                f"solve both sides to a tolerance that dividing by nu leaves meaningful. Define it, or use Converge"
            )
        return self


def check_limit(owner: str, dynamics: Dynamics, steps: int) -> None:
    """Raise ValueError if the optimizer is made for fewer steps."""
    limit = None if dynamics.update is None else dynamics.update.step_limit
    if limit is not None and steps > limit:
        raise ValueError(
            f"{owner} was given {steps} steps of a {type(dynamics.update).__name__} that is made for {limit}; one "
            f"optimizer per step was needed. Give it more, take fewer steps, or write Scheduled(optimizers, "
            f"hold=True) (Tabulated(values, hold=True)), with which the last one goes on"
        )


def as_dynamics(owner: str, value: object) -> Dynamics:
    """An optimizer as the gradient dynamics, a dynamics as it is.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Dynamics):
        return value
    if isinstance(value, Optimizer):
        return GradientDynamics(value)
    raise TypeError(
        f"{owner} was given the optimizer {type(value).__name__}; an inner optimizer such as bilevel.SGD(lr=0.1), or a "
        f"bilevel.inner.Dynamics, was needed (torch.optim optimizers work in place and are for the outer variable)"
    )
