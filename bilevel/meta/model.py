"""A module with what adapts taken apart: the functions of (y, x, batch) that a `Learner` makes a problem of.

| | y | x["parameters"] |
| --- | --- | --- |
| `InParameters` | the parameters that adapt, by name | all that require grad, without those of a fixed start |
| `InFunctionSpace` | what a head fits: coefficients, points | all that require grad; x["head"]: its own variables |
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.functional import Trainable, functional
from bilevel.meta.head import Embedded, Head
from bilevel.meta.start import Start
from bilevel.space.tree import Tree

Loss = Callable[[Any, Any], Tensor]
Groups = dict[str, dict[str, Tensor]]


class Model(abc.ABC):
    """How predictions and losses come of y and x, and where y begins."""

    features: Callable[[Tree, Any], Any] | None = None
    """What `Problem.features` is; the losses then receive its result for the batch."""

    @abc.abstractmethod
    def outer(self) -> Groups:
        """The module's own values of x, by group."""

    @abc.abstractmethod
    def adapted(self) -> dict[str, Tensor]:
        """The module's own values of the parameters that adapt."""

    @abc.abstractmethod
    def begin(self, outer: Tree, batch: Any) -> Tree:
        """y_0 of one task, from its support."""

    @abc.abstractmethod
    def predict(self, inner: Tree, outer: Tree, inputs: Any) -> Any:
        """The prediction for inputs as they come in a batch."""

    @abc.abstractmethod
    def inner_loss(self, loss: Loss, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """g at a batch as the losses receive it."""

    @abc.abstractmethod
    def outer_loss(self, loss: Loss, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """f likewise."""

    @abc.abstractmethod
    def state_dict(self, inner: Tree, outer: Tree) -> dict[str, Tensor]:
        """The module's state_dict with x and y in it."""


class InParameters(Model):
    """Some of the module's parameters adapt.

    Args:
        module: the whole.
        adapts: which.
        start: where they begin.
        reuse_features: take the layers below all that adapt as `Problem.features`, where the module is a Sequential.
    """

    def __init__(self, module: nn.Module, adapts: Trainable, start: Start, *, reuse_features: bool) -> None:
        _, everything = functional(module, trainable=True, requires_grad=False)
        _, chosen = functional(module, trainable=None if adapts is True else adapts, requires_grad=False)
        if not chosen:
            raise ValueError(
                f"Learner was given a module none of whose parameters {list(everything)} requires grad, so nothing "
                f"adapts. Write adapts=[...] with the names of those that shall"
            )
        if adapts is not True and len(chosen) == len(everything):
            raise ValueError(
                f"Learner was given adapts={adapts!r}, which matches every parameter of the module, "
                f"{list(everything)}, as no mask would. Write adapts=True if that is meant"
            )
        _, free = functional(module, requires_grad=False)
        self._module, self._start, self._adapts = module, start, tuple(chosen)
        learned = {name for name in free if start.learned or name not in chosen}
        learned |= set(chosen) if start.learned else set()
        self._learned = tuple(name for name in everything if name in learned)
        used = learned | set(chosen)
        depth = _shared_depth(module, self._adapts) if reuse_features else 0
        below, above = (
            (module[:depth], module[depth:]) if depth and isinstance(module, nn.Sequential) else (None, module)
        )
        self._above, self._upper = _part(above, used)
        self._whole, _ = _part(module, used)
        self._layers = tuple(module) if isinstance(module, nn.Sequential) else ()
        if below is not None:
            self._below, self._lower = _part(below, used)
            self.features = self._features

    def outer(self) -> Groups:
        return {"parameters": _own(self._module, self._learned)}

    def adapted(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in _own(self._module, self._adapts).items()}

    def begin(self, outer: Tree, batch: Any) -> Tree:
        own = self.adapted() | {name: outer["parameters"][name] for name in self._adapts if self._start.learned}
        versions = [value._version for value in own.values()]
        begun = self._start.begin(own, outer, batch)
        if versions != [value._version for value in own.values()]:
            raise ValueError(
                f"{type(self._start).__name__}.begin() changed its parameters in place, which are x's or the module's; "
                f"write value = value + d instead of value += d or value.add_(d)"
            )
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        if (
            not isinstance(begun, dict)
            or {name: getattr(leaf, "shape", None) for name, leaf in begun.items()} != shapes
        ):
            raise ValueError(
                f"{type(self._start).__name__}.begin() returned "
                f"{list(begun) if isinstance(begun, dict) else type(begun).__name__}; a dict with the names and shapes "
                f"of what adapts was needed: {shapes}"
            )
        return begun

    def predict(self, inner: Tree, outer: Tree, inputs: Any) -> Any:
        return self._whole({**outer.get("parameters", {}), **inner}, inputs)

    def inner_loss(self, loss: Loss, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        inputs, targets = _pair(batch)
        values = {**outer.get("parameters", {}), **inner}
        return loss(self._above({name: values[name] for name in self._upper}, inputs), targets)

    outer_loss = inner_loss

    def _features(self, outer: Tree, batch: Any) -> Any:
        if not isinstance(self._module, nn.Sequential) or self._layers != tuple(self._module) or _wrapped(self._module):
            raise ValueError(
                "the layers or the hooks of the module were changed after the Learner was made, which runs its first "
                "layers by themselves; make a Learner of the module as it is now, or write reuse_features=False"
            )
        inputs, targets = _pair(batch)
        values = outer.get("parameters", {})
        return self._below({name: values[name] for name in self._lower}, inputs), targets

    def state_dict(self, inner: Tree, outer: Tree) -> dict[str, Tensor]:
        return _state_dict(self._module, {**outer.get("parameters", {}), **inner})


class InFunctionSpace(Model):
    """A head on the module's output adapts, in closed form.

    Args:
        module: makes the features.
        head: what is fitted to them.
    """

    def __init__(self, module: nn.Module, head: Head) -> None:
        self._module, self._head = module, head
        self._call, self._learned = functional(module, requires_grad=False)

    def outer(self) -> Groups:
        like = next(iter(self._module.parameters()), torch.zeros(()))
        return {"parameters": _own(self._module, self._learned), "head": self._head.variables(like)}

    def adapted(self) -> dict[str, Tensor]:
        return {}

    def _embedded(self, outer: Tree, inputs: Any) -> Embedded:
        return Embedded(self._call, outer.get("parameters", {}), inputs)

    def begin(self, outer: Tree, batch: Any) -> Tree:
        inputs, targets = _pair(batch)
        return self._head.fit(self._embedded(outer, inputs), targets, outer.get("head", {}))

    def predict(self, inner: Tree, outer: Tree, inputs: Any) -> Any:
        return self._head.predict(inner, self._embedded(outer, inputs), outer.get("head", {}))

    def inner_loss(self, loss: Loss, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        inputs, targets = _pair(batch)
        return loss(self.predict(inner, outer, inputs), targets)

    outer_loss = inner_loss

    def state_dict(self, inner: Tree, outer: Tree) -> dict[str, Tensor]:
        raise ValueError(
            f"adapt() was called on a learner whose {type(self._head).__name__} adapts in function space: what it fits "
            f"has no place in the module's state_dict. Write learner.predict(x, support, inputs)"
        )


def _own(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    own = dict(module.named_parameters())
    if missing := [name for name in names if name not in own]:
        raise ValueError(
            f"the module has no parameters {missing} any more, which it had when the Learner was made; make a Learner "
            f"of the module as it is now"
        )
    return {name: own[name] for name in names}


def _pair(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        given = f"{len(batch)} things" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise ValueError(
            f"a Learner was given {given} as a batch; a pair was needed, Batches(inner=(inputs, targets), "
            f"outer=(inputs, targets)). Put several inputs into one dict or tuple"
        )
    if isinstance(batch[1], Tensor) and batch[1].dim() == 0:
        # One task's examples would be taken for tasks of one example each, and give a number.
        raise ValueError(
            "a Learner was given targets that are a single number for each task. Their first dimension counts tasks, "
            "the second examples: write inputs.unsqueeze(0), targets.unsqueeze(0) for a batch of one task, "
            "targets.unsqueeze(1) for tasks of one example"
        )
    return batch


def _wrapped(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _part(module: nn.Module, used: set[str]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A part of the module as a function of those of its parameters that are used."""
    names = tuple(name for name, _ in module.named_parameters() if name in used)
    call, _ = functional(module, trainable=(lambda name: name in names) if names else None, requires_grad=False)
    return (lambda params, *inputs: call({name: params[name] for name in names}, *inputs)), names


def _shared_depth(module: nn.Module, adapts: tuple[str, ...]) -> int:
    """How many of the first layers of a Sequential neither adapt nor share a parameter with the others."""
    if type(module) is not nn.Sequential or _wrapped(module):
        return 0
    adapting = {id(parameter) for name, parameter in module.named_parameters() if name in adapts}
    owned = [{id(parameter) for parameter in layer.parameters()} for layer in module]
    depth = next((i for i, own in enumerate(owned) if own & adapting), len(owned))
    above = set[int]().union(*owned[depth:])
    # (Without a parameter there is nothing to share the work of.)
    if any(own & above for own in owned[:depth]):
        return 0
    return depth if any(owned[:depth]) else 0


def _state_dict(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The module's state_dict with these values in it, in every place where a parameter stands."""
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    everywhere = {
        name: values[own[id(parameter)]]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if own[id(parameter)] in values
    }
    given = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return {name: everywhere[name].detach().clone() if name in everywhere else value for name, value in given.items()}
