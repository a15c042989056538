"""A projection after each step of any torch optimizer.

    x <- P(optimizer's step from x)

With plain gradient steps this is projected gradient descent, which rests where no direction into the set goes down.
Optimizers with a memory (momentum, Adam) keep it as it is: their averages do not know of the projection. With rates
that differ from number to number (Adam) a nearest point in the Euclidean norm is no longer the nearest in theirs:
inside boxes that makes no difference, on a simplex or a ball the point of rest is another unless it is inside.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]


class Projected(torch.optim.Optimizer):
    """An optimizer whose tensors are put back on their sets after each step.

    It has the parameter groups, the state and the defaults of the optimizer that it holds, so that learning rate
    schedulers, `state_dict`, gradient scalers and closures see one optimizer.

    Args:
        optimizer: any torch.optim optimizer.
        projections: one for every tensor of the optimizer, or a dict of some of its tensors, or of their names where
            the optimizer was made with names: `NonNegative()`, `Box(0, 1)`, `Simplex()`, `Ball(1.0)`, or a function of
            a tensor that returns the nearest point of a set as a new tensor.

    Raises:
        TypeError: the arguments are of the wrong kind.
        ValueError: a key is no tensor of the optimizer, a projection is none (applied twice it moves a point again,
            or it changes shape, dtype or its argument), or a tensor does not start on its set.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([0.5, 0.5], requires_grad=True)
        >>> optimizer = bl.outer.Projected(torch.optim.SGD([x], lr=1.0), {x: bl.outer.Simplex()})
        >>> x.grad = torch.tensor([0.25, -0.25])
        >>> optimizer.step(); x.data
        tensor([0.2500, 0.7500])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, projections: Projection | Mapping[Any, Projection]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Projected was given a {type(optimizer).__name__}; a torch.optim optimizer was needed, such as "
                f"Projected(torch.optim.SGD([x], lr=0.1), NonNegative())"
            )
        self.optimizer = optimizer
        self.projections = projections
        super().__setstate__({})  # what torch sets up for an optimizer whose groups are there already
        for name, x, project in self._pairs():
            _check(name, x, project)

    # (torch's base class sets these, and reads them everywhere.)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "projections": self.projections}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"Projected({self.optimizer!r}, {self.projections!r})"

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what the optimizer saved."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer, its tensors checked where they have a projection."""
        self.optimizer.add_param_group(param_group)
        new = {id(x) for x in self.optimizer.param_groups[-1]["params"]}
        for name, x, project in self._pairs():
            if id(x) in new:
                _check(name, x, project)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the optimizer, and the projections."""
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        with torch.no_grad():
            for _, x, project in self._pairs():
                x.copy_(project(x))
        return loss

    def _pairs(self) -> list[tuple[str, Tensor, Projection]]:
        """(name, tensor, projection) of every tensor that has one."""
        named: list[tuple[str, Tensor]] = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{place} of group {index}" for place in range(len(group["params"]))]
            named += zip(names, group["params"], strict=True)
        if not isinstance(self.projections, Mapping):
            if not callable(self.projections):
                raise TypeError(
                    f"Projected was given projections={self.projections!r}; a projection, or a dict from tensors of "
                    f"the optimizer to projections, was needed"
                )
            return [(name, x, self.projections) for name, x in named]
        found = []
        for key, project in self.projections.items():
            if not callable(project):
                raise TypeError(f"Projected was given the projection {project!r}; a function of a tensor was needed")
            held = [(name, x) for name, x in named if (x is key if isinstance(key, Tensor) else name == key)]
            if not held:
                given = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
                raise ValueError(
                    f"Projected was given a projection for {given}, which the optimizer does not hold; one of its "
                    f"tensors was needed (or a name, where it was made with named parameters)"
                )
            found += [(name, x, project) for name, x in held]
        return found


@torch.no_grad()
def _check(name: str, x: Tensor, project: Projection) -> None:
    """Raise ValueError unless a projection leaves its own points, and the start, where they are."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    far = x + (1 + x.abs()) * noise
    version = far._version
    once = project(far)
    who = f"the projection {project!r} of parameter {name}"
    if not isinstance(once, Tensor) or once.shape != x.shape or once.dtype != x.dtype:
        given = f"{tuple(once.shape)} {once.dtype}" if isinstance(once, Tensor) else type(once).__name__
        raise ValueError(f"{who} returned {given}; a tensor of {tuple(x.shape)} {x.dtype} was needed")
    if far._version != version:
        raise ValueError(f"{who} changed its argument in place; a new tensor was needed")
    twice = project(once)
    if not _same(once, twice):
        raise ValueError(f"{who} moves a point that it has returned, so it is no projection: apply it to the end")
    if not _same(project(x), x):
        raise ValueError(
            f"parameter {name} does not start on its set; write x.data = projection(x.data), or start at another point"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """To rounding of a few operations, and of sums over all numbers."""
    if type(one) is not Tensor or not one.numel():  # (tensors without data)
        return True
    eps = torch.finfo(one.dtype).eps
    size = one.abs().max().double()
    return bool((one.double() - other.double()).abs().max() <= 8 * eps * max(1.0, one.numel() ** 0.5) * (1 + size))
