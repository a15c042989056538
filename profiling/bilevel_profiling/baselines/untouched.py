"""Whether somebody else's code left its arguments as they were."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.baselines.counting import counting

_MOST = 100
"""Tasks of a problem whose numbers are compared."""


class Untouched:
    """The arguments of a call as they are now, to be held against what they are after it.

    Each call is watched by torch's own count of changes in place, and by which tensors and other entries its containers
    hold, which costs next to nothing. That does not see changes made through `.data`, so the first call with a problem,
    and with each of its first hundred tasks, is watched by the numbers too; and in these alone the batches of a PerStep
    are asked for, which may have to be loaded.

    Args:
        instance: the arguments.
        name: of whoever is called, for the message.
    """

    def __init__(self, instance: bl.estimators.Instance, name: str) -> None:
        self._name, self._instance = name, instance
        self._first = _first(instance, name)
        self._kept = self._first and _keeps(instance)
        self._given = self._now()
        self._leaves = {role: [leaf for leaf in found[0] if isinstance(leaf, Tensor)] for role, found in self._given}
        self._versions = self._counts()
        self._sums = self._numbers()

    def check(self) -> None:
        """Raise ValueError if an argument was changed in place."""
        counts, numbers = self._counts(), self._numbers()
        for (role, before), (_, after) in zip(self._given, self._now(), strict=True):
            same = before[1] == after[1] and all(map(_same, before[0], after[0]))
            if not same or self._versions[role] != counts[role] or self._sums.get(role) != numbers.get(role):
                raise ValueError(
                    f"baseline {self._name} changed the {role} in place, and what is measured after it would be "
                    f"another problem: let it work on copies "
                    f"({'leaf.clone()' if same else 'dict(batch), list(batch)'})"
                )

    def _now(self) -> list[tuple[str, tuple[list[Any], Any]]]:
        """The entries of each argument, and how they are nested."""
        instance, steps, curvature = self._instance, self._instance.batches.inner, self._instance.batches.curvature
        inner: Any = None if isinstance(steps, bl.PerStep) else steps
        if isinstance(steps, bl.PerStep) and self._kept:
            inner = [steps[step] for step in range(instance.solver.max_steps)]
        roles = {
            "outer variable": instance.outer,
            "inner variable": instance.inner,
            "inner batch": inner,
            "outer batch": instance.batches.outer,
            "batch of the curvature": None if isinstance(curvature, bl.PerStep) else curvature,
        }
        return [(role, tree.flatten(value)) for role, value in roles.items()]

    def _counts(self) -> dict[str, list[int]]:
        return {role: [leaf._version for leaf in leaves] for role, leaves in self._leaves.items()}

    def _numbers(self) -> dict[str, list[str]]:
        return {role: _sums(leaves) for role, leaves in self._leaves.items()} if self._first else {}


def _first(instance: bl.estimators.Instance, name: str) -> bool:
    """Whether this is the first call with this problem, or with a task of it: tasks are slices of one tensor. (In the
    passes that measure time, where nothing is counted, slices may be those of minibatches.)
    """
    inner = instance.batches.inner
    given = tree.tensors((instance.inner, instance.batches.outer, None if isinstance(inner, bl.PerStep) else inner))
    place = tuple(leaf.storage_offset() for leaf in given if leaf.layout is torch.strided)
    seen = instance.problem.memo.setdefault(("left alone by", name), set())
    new = place not in seen and (not seen or (counting() and len(seen) < _MOST))
    seen.add(place)
    return new


def _keeps(instance: bl.estimators.Instance) -> bool:
    """Whether the batches of a PerStep are the same each time: those that are made when asked for cannot be spoiled."""
    steps = instance.batches.inner
    if not isinstance(steps, bl.PerStep) or not instance.solver.max_steps:
        return False
    first, again = (tree.flatten(steps[0])[0] for _ in range(2))
    return len(first) == len(again) and all(map(_same, first, again))


def _same(one: Any, other: Any) -> bool:
    """Whether two entries are one, or views of the same memory."""
    if one is other or not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other or (type(one) in (int, float, bool, str) and one == other)
    facts = [(leaf.shape, leaf.dtype, leaf.layout is torch.strided and leaf.data_ptr()) for leaf in (one, other)]
    return facts[0] == facts[1]


def _sums(leaves: list[Tensor]) -> list[str]:
    """Sums and norms, unseen by meters; as text, so that nan equals nan."""
    with _disable_current_modes(), torch.no_grad():
        strided = [leaf for leaf in leaves if leaf.layout is torch.strided]
        sums = [leaf.sum(dtype=None if leaf.is_complex() else torch.float64) for leaf in strided]
        norms = [torch.linalg.vector_norm(leaf, dtype=torch.float64) for leaf in strided if leaf.is_floating_point()]
        return [str(value.item()) for value in (*sums, *norms)]
