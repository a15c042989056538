"""The torch optimizer of a Betty problem, in the words of this library: where it rests, and how it steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl

Named = dict[str, Tensor]
_COUPLED = (torch.optim.SGD, torch.optim.Adam)
_SETTINGS = {
    torch.optim.SGD: ("lr", "momentum", "dampening", "weight_decay"),
    torch.optim.Adam: ("lr", "eps", "weight_decay"),
    torch.optim.AdamW: ("lr", "eps", "weight_decay"),
}
_REST = (
    "Say how the problem moves in the library's words, such as solver=bilevel.Descent(bilevel.SGD(lr=0.1), 0), or "
    "write a bilevel.inner.Dynamics whose stationarity() is zero where it rests"
)


@dataclasses.dataclass(frozen=True)
class Continued(bl.Optimizer):
    """An optimizer that goes on from a state it already has.

    Args:
        optimizer: whose steps.
        state: as its `init` would return, of an earlier step.
    """

    optimizer: bl.Optimizer
    state: Any

    def init(self, inner: Any) -> Any:
        return self.state

    def step(self, grad: Any, state: Any, inner: Any, outer: Any) -> tuple[Any, Any]:
        return self.optimizer.step(grad, state, inner, outer)

    def stationarity(self, grad: Any, inner: Any, outer: Any) -> Any:
        return self.optimizer.stationarity(grad, inner, outer)

    @property
    def plain_rate(self) -> float | None:
        return self.optimizer.plain_rate

    @property
    def step_limit(self) -> int | None:
        return self.optimizer.step_limit


def at_rest(name: str, optimizer: Any, parameters: Mapping[str, Tensor]) -> bl.Optimizer:
    """An optimizer that rests where the torch optimizer of problem `name` does: at dg/dy + weight_decay y = 0.

    Args:
        name: of the problem, for messages.
        optimizer: of the problem.
        parameters: those that the upper gradient goes through, by name.

    Raises:
        ValueError: it rests elsewhere, or that cannot be found out.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"problem {name} has {'no optimizer' if optimizer is None else f'a {type(optimizer).__name__}'}, so where "
            f"its parameters come to rest is not known. {_REST}"
        )
    decay = _by_name(name, optimizer, "weight_decay", parameters, missing=0.0)
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        raise ValueError(
            f"problem {name} is moved by {kind.__name__}, of which nothing is known: it may project, centralize or "
            f"decay what it moves, and rest elsewhere than where the gradient is zero. {_REST}"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"problem {name} is moved by {kind.__name__}(maximize=True); negate its loss, and leave it out"
        )
    rates = _by_name(name, optimizer, "lr", parameters, missing=1.0)
    # (Of a schedule that has ended, all are 0: it rests where it came to rest.)
    if isinstance(rates, dict) and (fixed := [each for each, rate in rates.items() if rate == 0]):
        raise ValueError(
            f"problem {name} has the step size 0 for {', '.join(fixed)}, which therefore rests anywhere. Let "
            f"meta_trainable_parameters() return what moves"
        )
    if kind is torch.optim.LBFGS or (kind in _COUPLED and not _decoupled(optimizer)):
        return bl.SGD(lr=1.0, weight_decay=decay)
    if moved := _moves_at_rest(optimizer, decay, parameters):
        raise ValueError(
            f"problem {name} is moved by {kind.__name__}, which does not rest where gradient + weight_decay * "
            f"parameter is zero ({moved}), so the implicit function theorem does not hold there: with decoupled "
            f"weight decay (AdamW) it rests where the moments say. Use weight_decay=0 and write the decay into "
            f"training_step, or bilevel.integrations.betty.use(problem, bilevel.Unrolled()). {_REST}"
        )
    return bl.SGD(lr=1.0, weight_decay=decay)


def require_decay(name: str, optimizer: Any, parameters: Mapping[str, Tensor], said: bl.Optimizer | None) -> None:
    """Raise ValueError unless an optimizer that is given in the place of a problem's own decays as it does.

    Where the problem's decay is not known (no torch optimizer), or `said` is None or has none, nothing is compared.
    """
    given = getattr(said, "weight_decay", None)
    if not isinstance(optimizer, torch.optim.Optimizer) or given is None:
        return
    decay = _by_name(name, optimizer, "weight_decay", parameters, missing=0.0)
    decoupled = type(optimizer).__name__ == "AdamW" or _decoupled(optimizer)
    same = decay == given or (isinstance(decay, float) and isinstance(given, dict) and set(given.values()) == {decay})
    if not same or (decoupled and decay != 0.0 and not isinstance(said, bl.AdamW)):
        kind = "AdamW" if decoupled else type(said).__name__
        raise ValueError(
            f"problem {name} is moved with weight_decay={decay}{' (decoupled)' if decoupled else ''}, and "
            f"{said!r} was given in the place of its optimizer, which rests elsewhere. Write "
            f"bilevel.{kind}(..., weight_decay={decay})"
        )


def steps_as(name: str, optimizer: Any, parameters: Mapping[str, Tensor]) -> bl.Optimizer:
    """The optimizer of the library that makes the same steps, with its settings as they are now.

    Raises:
        ValueError: there is none.
    """
    kind = type(optimizer)
    if kind not in _SETTINGS:
        raise ValueError(
            f"problem {name} is moved by {kind.__name__}, whose steps cannot be differentiated here; SGD, Adam or "
            f"AdamW was needed. Use an estimator at the solution, such as bilevel.Implicit(bilevel.CG(10))"
        )
    for flag in ("amsgrad", "maximize"):
        if any(group.get(flag) for group in optimizer.param_groups):
            raise ValueError(
                f"problem {name} is moved by {kind.__name__}({flag}=True), whose steps cannot be differentiated here; "
                f"leave {flag} out{', and negate the loss' if flag == 'maximize' else ''}"
            )
    settings = {each: _by_name(name, optimizer, each, parameters) for each in _SETTINGS[kind]}
    if kind is torch.optim.SGD:
        nesterov = {bool(group["nesterov"]) for group in optimizer.param_groups}
        if len(nesterov) > 1:
            raise ValueError(
                f"problem {name} has nesterov=True in one parameter group only; the same was needed in all"
            )
        return bl.SGD(nesterov=nesterov.pop(), **settings)
    betas = [_by_name(name, optimizer, "betas", parameters, part=part) for part in (0, 1)]
    decoupled = kind is torch.optim.AdamW or _decoupled(optimizer)
    return (bl.AdamW if decoupled else bl.Adam)(betas=(betas[0], betas[1]), **settings)


def state_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Any:
    """The optimizer's state, as a copy, in the form in which the library's optimizers keep theirs."""
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]

    def copies(key: str) -> list[Tensor | None]:
        return [None if state.get(key) is None else state[key].detach().clone() for state in states]

    if type(optimizer) is torch.optim.SGD:
        plain = all(group["momentum"] == 0 for group in optimizer.param_groups)
        return None if plain else copies("momentum_buffer")
    return {
        "step": [int(state.get("step", 0)) for state in states],
        "first": copies("exp_avg"),
        "second": copies("exp_avg_sq"),
    }


def _decoupled(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)


def _by_name(
    problem: str,
    optimizer: torch.optim.Optimizer,
    key: str,
    parameters: Mapping[str, Tensor],
    *,
    part: int | None = None,
    missing: float | None = None,
) -> Any:
    """A setting: one number where all parameters share it, else a number for each name."""
    found: dict[str, float] = {}
    for name, parameter in parameters.items():
        group = _group_of(optimizer, parameter)
        if group is None:
            raise ValueError(
                f"the optimizer of problem {problem} does not hold the parameter {name}, through which the upper "
                f"gradient goes, so it never comes to rest. Give the optimizer all of trainable_parameters(), or let "
                f"meta_trainable_parameters() return those that it moves"
            )
        value = group[key] if missing is None else group.get(key, missing)
        found[name] = float(value if part is None else value[part])
    return next(iter(found.values())) if len(set(found.values())) == 1 else found


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    return next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)


def _moves_at_rest(optimizer: torch.optim.Optimizer, decay: Any, parameters: Mapping[str, Tensor]) -> str:
    """How a fresh optimizer of that kind moves copies of the parameters at a gradient of -decay y; "" if not at all."""
    copies = {
        name: (leaf.detach().to(torch.float64, copy=True) + 1).requires_grad_() for name, leaf in parameters.items()
    }
    for name, leaf in copies.items():
        leaf.grad = -(decay[name] if isinstance(decay, dict) else decay) * leaf.detach()
    before = [leaf.detach().clone() for leaf in copies.values()]
    try:
        for name, leaf in copies.items():
            group = _group_of(optimizer, parameters[name]) or {}
            settings = {key: value for key, value in group.items() if key in optimizer.defaults}
            kind: Any = type(optimizer)
            first = kind([leaf], lr=settings["lr"]) if "lr" in settings else kind([leaf])
            first.param_groups[0].update(settings)
            first.step()
    except Exception as error:  # an optimizer of the user's own may raise anything
        return f"a fresh one could not make a step: {type(error).__name__}: {error}"
    moved = sum(float((a.detach() - b).square().sum()) for a, b in zip(copies.values(), before, strict=True)) ** 0.5
    size = sum(float(b.square().sum()) for b in before) ** 0.5
    return f"it moved them by {moved / size:.1e} of their norm there" if moved > 1e-13 * size else ""
