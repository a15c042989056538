"""Any torch.optim class as an inner optimizer, where it has a derivative.

    y', s' = a fresh optimizer of that class over copies of y, with its state put back to s, after one step

| | gradients | extra memory |
| --- | --- | --- |
| step | - | the optimizer's state, and a copy of it and of y |

The condition, which is checked when it is made: the class has the option differentiable=True; its step needs no
closure; everything that it remembers from step to step is in its state per tensor (no counters in its attributes or
groups); and on a few numbers three steps are those of the class itself, and have the derivative that central
differences have. LBFGS, SparseAdam, Adafactor and torch's Muon fail it. Where it rests is not known unless `stationary`
says so; what that says is held against a step on the problem itself.

Wins: torch.optim.ASGD, Rprop, and classes of one's own, without a line of code.
Fails: an entry whose gradient is always zero gets NaN from torch's roots, reported as such (the library's own
optimizers have none); every step makes an optimizer; hyper-parameters are constants; a class that reads numbers of its
state (ASGD, NAdam) cannot be forecast.
Reference: torch.optim, option `differentiable`.
Differences from peers: higher, TorchOpt and Betty have copies of some of the classes, by hand. With differentiable=True
torch computes Adam's bias corrections in float32, which is good to five digits; here numbers that belong to no entry
are kept in float64.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.optim import trial
from bilevel.optim.base import Optimizer, gradients
from bilevel.space import tree
from bilevel.space.tree import Tree

_OURS = {"differentiable", "foreach", "fused", "capturable", "maximize"}


@dataclasses.dataclass(frozen=True, init=False)
class FromTorch(Optimizer):
    """Steps of a torch.optim class, out of place and differentiable.

    Args:
        kind: the class, such as torch.optim.ASGD.
        stationary: (grad, inner, outer) -> the tree that is zero where it rests, such as lambda grad, inner, outer:
            grad; None where that is not known.
        **settings: what the class is made with besides parameters; numbers, not tensors.

    Raises:
        TypeError: `kind` is no such class, or a setting is a tensor or a function.
        ValueError: it does not meet the condition.

    Example:
        >>> import torch, bilevel as bl
        >>> asgd = bl.optim.FromTorch(torch.optim.ASGD, lr=0.1)
        >>> y, state = asgd.step(torch.ones(2), asgd.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1000, -0.1000])
    """

    kind: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    stationary: Callable[[Tree, Tree, Tree], Tree | None] | None

    foreign: ClassVar[bool] = True

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        *,
        stationary: Callable[[Tree, Tree, Tree], Tree | None] | None = None,
        **settings: Any,
    ) -> None:
        for name, value in (("kind", kind), ("settings", settings), ("stationary", stationary)):
            object.__setattr__(self, name, value)
        _check_kind(kind, settings)
        if stationary is not None and not callable(stationary):
            raise TypeError(f"FromTorch was given stationary={stationary!r}; a function or None was needed")
        self._compare()
        trial.check("FromTorch", self)

    def init(self, inner: Tree) -> Any:
        count = len(tree.tensors(inner))
        return {"used": [0] * count, **{name: [None] * count for name in _looked_up(self.kind, self.settings)[0]}}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        moved, places = list(tree.tensors(inner)), {name: list(each) for name, each in state.items()}
        leaves = gradients(grad, inner)
        used = [i for i, g in enumerate(leaves) if g is not None]
        if not used:
            return inner, state
        copies = {i: _copy(moved[i]) for i in used}
        for i, leaf in copies.items():
            if leaf.requires_grad:
                leaf.retain_grad()  # whose .grad torch then reads without a warning
            g = leaves[i]
            assert g is not None
            leaf.grad = g if torch.is_grad_enabled() else g.detach()
        optimizer = self._made(list(copies.values()))
        _, numbers, counters = _looked_up(self.kind, self.settings)
        for i, leaf in copies.items():
            count, kept = places["used"][i], _Wide(numbers)
            if count:
                past = {name: each[i] for name, each in places.items() if name != "used"}
                past |= dict.fromkeys(counters, torch.tensor(float(count), dtype=torch.float64))
                kept.update({name: _copy(value) for name, value in past.items()})
            optimizer.state[leaf] = kept
        optimizer.step()
        for i, leaf in copies.items():
            moved[i], places["used"][i] = leaf, places["used"][i] + 1
            for name in places:
                if name != "used":
                    places[name][i] = None if name in counters else optimizer.state[leaf].get(name)
        return tree.like(inner, moved), places

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return None if self.stationary is None else self.stationary(grad, inner, outer)

    def _made(self, tensors: list[Tensor], *, differentiable: bool = True) -> torch.optim.Optimizer:
        kind: Any = self.kind
        made: torch.optim.Optimizer = kind(tensors, **self.settings, differentiable=differentiable)
        return made

    def _compare(self) -> None:
        """The steps must be those of the class itself, kept alive."""
        with torch.device("cpu"), torch.no_grad():
            start, slopes = trial.numbers()
            alive = [leaf.clone() for leaf in start]
            optimizer = self._made(alive, differentiable=False)
            y, state = start, self.init(start)
            for g in slopes:
                for leaf, slope in zip(alive, g, strict=True):
                    leaf.grad = slope.clone()
                optimizer.step()
                y, state = self.step(g, state, y, None)
                for a, b in zip(y, alive, strict=True):
                    # (torch's NAdam keeps a product of momenta in float32.)
                    if not torch.allclose(a, b, rtol=1e-7, atol=1e-8):
                        raise ValueError(
                            f"FromTorch was given {self.kind.__name__}, whose steps are others when its state per "
                            f"tensor is all that goes on from step to step; it keeps something elsewhere"
                        )


class _Wide(dict[str, Any]):
    """One tensor's state, where numbers that belong to no entry are put in as float64."""

    def __init__(self, numbers: frozenset[str]) -> None:
        super().__init__()
        self._numbers = numbers

    def __setitem__(self, name: str, value: Any) -> None:
        wide = name in self._numbers and isinstance(value, Tensor) and value.is_floating_point()
        super().__setitem__(name, value.double() if wide else value)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if torch.is_grad_enabled() else value.detach().clone()


def _check_kind(kind: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise TypeError(
            f"FromTorch was given {kind!r}; a class of torch.optim was needed: FromTorch(torch.optim.ASGD, lr=0.1)"
        )
    for name, value in settings.items():
        if name in _OURS:
            raise ValueError(
                f"FromTorch was given {name}={value!r}; leave it out (a step is differentiable, tensor by tensor, and "
                f"goes down: for an inner maximum write -inner_loss)"
            )
        if isinstance(value, Tensor) or callable(value):
            raise TypeError(
                f"FromTorch was given {name}={value!r}; a number was needed, since torch takes it as a constant. For a "
                f"learned one use an optimizer of bilevel.optim"
            )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"FromTorch was given {kind.__name__}, whose step needs a closure that evaluates the loss; an optimizer of "
            f"gradients was needed. What moves otherwise is a bilevel.inner.Dynamics"
        )
    if "differentiable" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(
            f"FromTorch was given {kind.__name__}, which has no option differentiable=True: its steps have no "
            f"derivative. bilevel.optim has optimizers that have one: {_like(kind)}"
        )


def _like(kind: type) -> str:
    return "bilevel.optim.Muon" if kind.__name__ == "Muon" else "SGD, Adam, AdamW, RMSprop, Adagrad, ..."


_Kept = tuple[tuple[str, ...], frozenset[str], frozenset[str]]
_found: dict[Any, _Kept] = {}


def _looked_up(kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> _Kept:
    key = (kind, repr(sorted(settings.items())))
    if key not in _found:
        _found[key] = _look(kind, settings)
    return _found[key]


def _look(kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> _Kept:
    """What the class keeps per tensor, which of that are single numbers, and which of these count the steps."""
    with torch.device("cpu"), torch.no_grad():
        one = torch.ones(2, dtype=torch.float64)
        optimizer = kind([one], **settings)
        counts, before = [], _attributes(optimizer)
        for _ in range(2):
            one.grad = torch.full((2,), 0.5, dtype=torch.float64)
            optimizer.step()
            counts.append({name: _number(value) for name, value in optimizer.state[one].items()})
        if _attributes(optimizer) != before:
            raise ValueError(
                f"FromTorch was given {kind.__name__}, which counts in its own attributes or groups; everything that "
                f"goes on from step to step must be in its state per tensor"
            )
        if any(not isinstance(key, Tensor) for key in optimizer.state):
            raise ValueError(f"FromTorch was given {kind.__name__}, which keeps state that is no tensor's")
    names = tuple(optimizer.state[one])
    numbers = frozenset(name for name in names if counts[-1][name] is not None)
    return names, numbers, frozenset(name for name in numbers if [count[name] for count in counts] == [1.0, 2.0])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Tensor) and value.dim() == 0 else None


def _attributes(optimizer: torch.optim.Optimizer) -> str:
    """Everything it holds but parameters, their state and hooks, as text."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    others = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("state", "param_groups") and "hook" not in name and not callable(value)
    }
    return repr((copy.deepcopy(groups), others))
