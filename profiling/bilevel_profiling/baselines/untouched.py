"""Whether somebody else's code left its arguments as they were."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import bilevel as bl
from bilevel.space import tree


class Untouched:
    """The arguments of a call as they are now, to be held against what they are after it.

    Each call is watched by torch's own count of changes in place, which costs nothing; it does not see changes made
    through `.data`, so the first call with a problem is watched by the numbers too.

    Args:
        instance: the arguments.
        name: of whoever is called, for the message.
    """

    def __init__(self, instance: bl.estimators.Instance, name: str) -> None:
        self._name, self._given = name, _given(instance)
        self._versions = {role: [leaf._version for leaf in leaves] for role, leaves in self._given.items()}
        first = instance.problem.memo.setdefault(("left alone by", name), True)
        instance.problem.memo["left alone by", name] = False
        self._sums = {role: _sums(leaves) for role, leaves in self._given.items()} if first else {}

    def check(self) -> None:
        """Raise ValueError if an argument was changed in place."""
        for role, leaves in self._given.items():
            if self._versions[role] != [leaf._version for leaf in leaves] or (
                role in self._sums and self._sums[role] != _sums(leaves)
            ):
                raise ValueError(
                    f"baseline {self._name} changed the {role} in place, and what is measured after it would be "
                    f"another problem: let it work on copies (leaf.clone())"
                )


def _given(instance: bl.estimators.Instance) -> dict[str, list[Tensor]]:
    batches, steps = instance.batches, instance.batches.inner
    inner: Any = steps
    if isinstance(steps, bl.PerStep):
        # Batches that are made when asked for cannot be spoiled.
        first, again = (tree.tensors(steps[0]) for _ in range(2))
        kept = [leaf.data_ptr() for leaf in first] == [leaf.data_ptr() for leaf in again]
        inner = [steps[step] for step in range(instance.solver.max_steps)] if kept else []
    roles = {
        "outer variable": instance.outer,
        "inner variable": instance.inner,
        "inner batch": inner,
        "outer batch": batches.outer,
    }
    return {role: tree.tensors(value) for role, value in roles.items()}


def _sums(leaves: list[Tensor]) -> list[str]:
    """Sums and norms, unseen by meters; as text, so that nan equals nan."""
    with _disable_current_modes(), torch.no_grad():
        strided = [leaf for leaf in leaves if leaf.layout is torch.strided]
        sums = [leaf.sum(dtype=None if leaf.is_complex() else torch.float64) for leaf in strided]
        norms = [torch.linalg.vector_norm(leaf, dtype=torch.float64) for leaf in strided if leaf.is_floating_point()]
        return [str(value.item()) for value in (*sums, *norms)]
