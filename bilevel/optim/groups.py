"""Parameter groups: each part of the inner variable moves by an optimizer of its own.

    y = (y_1, ..., y_G);      y_i <- optimizer_i.step(g_i, y_i)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | that of the optimizers, each for its part |

A tensor is named by its path: {"body": [w, b]} has body.0 and body.1, and what `bilevel.functional` returns has the
module's names. At rest: all of them together; one that does not say, or that holds its part fixed (lr=0), says nothing
for all.

Wins: heads and bodies at their own rates, Muon for matrices and AdamW for the rest, no decay for norms.
Fails: nothing that mixes groups, such as one norm to clip by; clip outside: ClippedByNorm(Groups(...)).
Reference: parameter groups of torch.optim, which it equals in float64 to 1e-12.
Differences from peers: groups may be of different classes, and a rule may be a function of name and shape. A tree of
hyper-parameters inside a group is a dict by these names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.optim.base import Optimizer, gradients, held, off, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree

Which = str | Callable[[str, tuple[int, ...]], bool]
"""A name, the beginning of one up to a dot ("" for all), or a function of (name, shape) that says yes or no."""


@dataclasses.dataclass(frozen=True)
class Groups(Optimizer):
    """An optimizer for each part of the inner variable; a tensor moves by the first rule that it meets.

    Args:
        rules: {name or its beginning: optimizer}, or a sequence of pairs (which, optimizer), where `which` may also be
            a function of the tensor's name and shape (without the dimension of tasks).
        tasks: whether y has a leading dimension of tasks; `TaskMean` says so, nobody else needs to.

    Raises:
        TypeError: the rules are of another kind.
        ValueError: there are none; in `init`, a tensor meets no rule, or a rule no tensor.

    Example:
        >>> import torch, bilevel as bl
        >>> groups = bl.optim.Groups({"head": bl.SGD(lr=1.0), "": bl.SGD(lr=0.1)})
        >>> y = {"body": {"w": torch.zeros(1)}, "head": {"w": torch.zeros(1)}}
        >>> g = {"body": {"w": torch.ones(1)}, "head": {"w": torch.ones(1)}}
        >>> groups.step(g, groups.init(y), y, None)[0]
        {'body': {'w': tensor([-0.1000])}, 'head': {'w': tensor([-1.])}}
    """

    rules: tuple[tuple[Which, Optimizer], ...] | Mapping[str, Optimizer]
    tasks: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self) -> None:
        write = "write Groups({'head': SGD(lr=0.1), '': Adam()}), or a sequence of such pairs"
        rules = tuple(self.rules.items()) if isinstance(self.rules, Mapping) else self.rules
        if not isinstance(rules, (tuple, list)) or not all(isinstance(rule, (tuple, list)) for rule in rules):
            raise TypeError(f"Groups was given {type(rules).__name__}; optimizers by name were needed: {write}")
        if not rules:
            raise ValueError(f"Groups was given no rules; at least one was needed: {write}")
        for rule in rules:
            if (
                len(rule) != 2
                or not isinstance(rule[1], Optimizer)
                or not (isinstance(rule[0], str) or callable(rule[0]))
            ):
                raise TypeError(
                    f"Groups was given the rule {rule!r}; a name or a function of (name, shape), and an inner "
                    f"optimizer, were needed: {write}"
                )
        object.__setattr__(self, "rules", tuple((which, optimizer) for which, optimizer in rules))

    @property
    def sharded(self) -> bool:  # type: ignore[override]
        # (A function would be told the shape of a part.)
        return not any(callable(which) for which, _ in self._pairs)

    @property
    def step_limit(self) -> int | None:
        limits = [optimizer.step_limit for optimizer in self._optimizers]
        return min((limit for limit in limits if limit is not None), default=None)

    def over(self, tasks: int) -> Self:
        rules = tuple((which, optimizer.over(tasks)) for which, optimizer in self._pairs)
        return dataclasses.replace(self, rules=rules, tasks=True)

    def init(self, inner: Tree) -> Any:
        places = self._places(inner)
        names, leaves = _names(inner), tree.tensors(inner)
        return [
            optimizer.init({names[i]: leaves[i] for i in places[group]})
            for group, optimizer in enumerate(self._optimizers)
        ]

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        moved, states = list(tree.tensors(inner)), list[Any]()
        for (optimizer, g, y), places, past in zip(self.parts(grad, inner), self._places(inner), state, strict=True):
            part, now = optimizer.step(g, past, y, outer)
            states.append(now)
            for i, name in zip(places, y, strict=True):
                moved[i] = part[name]
        return tree.like(inner, moved), states

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        found: list[Tensor | None] = [None] * len(tree.tensors(inner))
        for (optimizer, g, y), places in zip(self.parts(grad, inner), self._places(inner), strict=True):
            rest = optimizer.stationarity(g, y, outer)
            if rest is None or _fixed(optimizer, outer):
                return None
            for i, name in zip(places, y, strict=True):
                found[i] = rest[name]
        return tree.like(inner, found)

    def parts(self, grad: Tree, inner: Tree) -> list[tuple[Optimizer, Tree, Tree]]:
        """Each group's optimizer, its gradient and its part of `inner`: dicts by name."""
        leaves, y, names = gradients(grad, inner), tree.tensors(inner), _names(inner)
        return [
            (optimizer, {names[i]: leaves[i] for i in places}, {names[i]: y[i] for i in places})
            for optimizer, places in zip(self._optimizers, self._places(inner), strict=True)
        ]

    @property
    def _pairs(self) -> tuple[tuple[Which, Optimizer], ...]:
        assert isinstance(self.rules, tuple), "what was given is made into pairs"
        return self.rules

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [optimizer for _, optimizer in self._pairs]

    def _places(self, inner: Tree) -> list[list[int]]:
        """The places of each group's tensors in `inner`."""
        names, places = _names(inner), [list[int]() for _ in self._pairs]
        met = [False] * len(self._pairs)
        for i, (name, leaf) in enumerate(zip(names, tree.tensors(inner), strict=True)):
            shape = tuple(leaf.shape[1:] if self.tasks else leaf.shape)
            answers = [_meets(which, name, shape) for which, _ in self._pairs]
            if not any(answers):
                raise ValueError(
                    f"Groups has no rule for inner tensor {name!r}; give it one, or a last rule '' for all that are "
                    f"left"
                )
            places[answers.index(True)].append(i)
            met = [a or b for a, b in zip(met, answers, strict=True)]
        if not all(met):
            which = self._pairs[met.index(False)][0]
            raise ValueError(
                f"Groups has the rule {which!r}, which is the name of no tensor of the inner variable and no beginning "
                f"of one up to a dot; it has {names}"
            )
        return places


def _meets(which: Which, name: str, shape: tuple[int, ...]) -> bool:
    if callable(which):
        return bool(which(name, shape))
    return not which or name == which or name.startswith(which.rstrip(".") + ".")


def _names(inner: Tree) -> list[str]:
    """The path of each tensor, its steps joined by dots."""
    names = [".".join(map(_key, path)) for path, _ in pytree.tree_flatten_with_path(inner)[0]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Groups was given an inner variable with two tensors named {twice!r}; rename one of them")
    return names


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _fixed(optimizer: Optimizer, outer: Tree) -> bool:
    """Whether its step size is the number 0, so that its part rests anywhere."""
    return off(value_of(getattr(optimizer, "lr", None), outer)) or any(_fixed(each, outer) for each in held(optimizer))
