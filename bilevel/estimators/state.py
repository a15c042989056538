"""What a stateful estimator carries from one call to the next, typed, so that it can be checked, sliced and saved."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from bilevel.space import tree


def per_task(*, host: bool = False, **options: Any) -> Any:
    """A field of a state whose tensors have a leading task dimension under `TaskMean`; other fields are shared.

    `host` says that they are on the CPU wherever the problem is, as counters are that nobody should wait for.
    """
    return dataclasses.field(metadata={"per_task": True, "host": host}, **options)


@dataclasses.dataclass(frozen=True)
class State:
    """Base of the states. Subclasses are frozen dataclasses whose fields are trees of tensors and plain numbers.

    Example:
        >>> import torch
        >>> @dataclasses.dataclass(frozen=True)
        ... class Average(State):
        ...     mean: torch.Tensor = per_task()
        >>> saved = Average(torch.ones(2)).to_dict()
        >>> saved["owner"], Average.from_dict(saved).mean
        ('Average', tensor([1., 1.]))
    """

    def to_dict(self) -> dict[str, Any]:
        """A dict of trees of tensors, for torch.save; `state=` of hypergradient() takes it as well."""
        return {"owner": type(self).__name__} | {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The state that `to_dict` wrote.

        Raises:
            ValueError: it is another estimator's, or not complete.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(saved) - {"owner"} != names or saved.get("owner", cls.__name__) != cls.__name__:
            raise ValueError(
                f"a state of type {type(saved).__name__}; the state of its own last call was needed (hg.state, or "
                f"hg.state.to_dict() of {cls.__name__!r} with the entries {sorted(names)}), not one with "
                f"{sorted(map(str, saved))} of {saved.get('owner')!r}. Pass state=None to start afresh"
            )
        return cls(**{name: saved[name] for name in names})


def checked(owner: str, state: Any, template: State | None) -> Any:
    """`state` if it is one like `template`.

    Raises:
        ValueError: another kind, structure, shape, dtype or device.
    """
    if template is None:
        raise ValueError(f"{owner} was given a state, but it carries nothing from call to call; pass state=None")
    kind = type(template)
    if isinstance(state, Mapping):
        state = kind.from_dict(state)
    if type(state) is not kind:
        raise ValueError(
            f"{owner} was given a state of type {type(state).__name__}; the {kind.__name__} of its own last call was "
            f"needed (hg.state), or state=None to start afresh"
        )
    for field in dataclasses.fields(kind):
        given, wanted = getattr(state, field.name), getattr(template, field.name)
        if _described(given) != _described(wanted):
            raise ValueError(
                f"{owner} was given a state whose {field.name!r} does not have the shapes and dtypes of this problem: "
                f"it "
                f"is {_described(given)}, where {_described(wanted)} was needed. Pass state=None to start afresh"
            )
    return state


def _described(value: Any) -> dict[str, Any]:
    leaves, names = tree.flatten(value)[0], tree.names(value)
    return {
        name: f"{tuple(leaf.shape)} {leaf.dtype} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf).__name__
        for name, leaf in zip(names, leaves, strict=True)
    }
