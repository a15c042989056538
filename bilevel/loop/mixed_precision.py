"""Autocast in the losses, and float16 scaled so that small derivatives do not vanish.

    f, g  ->  the same under torch.autocast; of float16, every cotangent inside of them times S

What is scaled is the inside of each loss, and not f: a hypergradient is made of gradients, Hessian-vector products and
mixed products of g as well, and S times g would be another inner problem (another step size, another damping). Scaled
inside, each derivative of each loss comes out as it is, for every estimator, to the bit where S is a power of two and
nothing vanishes or overflows. S is torch.amp.GradScaler's: halved when a hypergradient is not finite, which is then not
used, and doubled after 2000 that are.

| | memory | time |
| --- | --- | --- |
| autocast | activations of half the size, copies of the variables in 16 bit | one cast of each variable a call |
| scaling | nothing | one multiplication of each variable's gradient |

Fails: what is lost in the forward pass (a difference of two losses that agree to two digits) stays lost; see
`PrecisionCheck`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import scaling
from bilevel.problem import Problem, Pulled
from bilevel.space import tree
from bilevel.space.tree import Tree


class MixedPrecision:
    """Runs the losses of a problem under torch.autocast; an argument of `OuterLoop`.

    Variables, gradients and results stay in float32. `Problem.init` runs as it is.

    Args:
        dtype: torch.bfloat16, which has the range of float32 and needs no scaling, or torch.float16.
        scaler: of float16, the torch.amp.GradScaler that keeps S; None makes one with its own defaults (S = 65536).

    Raises:
        TypeError, ValueError: another dtype, or a scaler of another kind or for bfloat16.

    Example:
        >>> import torch, bilevel as bl
        >>> loss = lambda y, x, b: 1e-9 * (y * x).square().mean()
        >>> half = bl.loop.MixedPrecision(torch.float16).problem(bl.Problem(loss, loss))
        >>> half.inner(torch.ones(4), torch.ones(4), None).dtype
        torch.float32
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, scaler: torch.amp.GradScaler | None = None) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"MixedPrecision() was given dtype={dtype!r}; torch.bfloat16 or torch.float16 was needed. For float32 "
                f"leave it out"
            )
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"MixedPrecision() was given a {type(scaler).__name__} as scaler; a torch.amp.GradScaler was needed, "
                f'such as torch.amp.GradScaler("cuda", init_scale=2.0**10)'
            )
        if scaler is not None and dtype is torch.bfloat16:
            raise ValueError(
                "MixedPrecision() was given a scaler for bfloat16, whose range is that of float32; leave it out"
            )
        if scaler is not None and not scaler.is_enabled():
            raise ValueError(
                "MixedPrecision() was given a scaler that is disabled (GradScaler of a device that is not there, or "
                "enabled=False); leave it out, or write torch.amp.GradScaler with the device of the variables"
            )
        self.dtype = dtype
        self._given = scaler is not None
        self._scaler = torch.amp.GradScaler("cpu") if scaler is None and dtype is torch.float16 else scaler
        self._made: tuple[Problem, float, Problem] | None = None

    @property
    def scale(self) -> float:
        """S, 1 for bfloat16."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def problem(self, problem: Problem) -> Problem:
        """The same problem, its losses and features under autocast with the present S.

        The same object is returned until S changes, so that what an engine compiled for it stays in use.
        """
        if self._made is None or self._made[0] is not problem or self._made[1] != self.scale:
            self._made = problem, self.scale, self._cast(problem)
        return self._made[2]

    def update(self, sound: bool, device: torch.device | str = "cpu") -> None:
        """Tell the scaler whether a hypergradient was finite.

        Args:
            sound: whether it was.
            device: where the variables are, and the numbers of a scaler that was given.
        """
        scaler, place = self._scaler, device if self._given else "cpu"
        if scaler is None:
            return
        # The scaler looks at the gradients of an optimizer's tensors. It is shown one number of our own: x.grad is
        # not S times too large, and the user's optimizer may hold tensors that are none of x.
        shown = torch.zeros((), device=place, requires_grad=True)
        optimizer = torch.optim.SGD([shown], lr=0.0)
        scaler.scale(shown.detach())
        shown.grad = torch.full_like(shown, 0.0 if sound else math.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """S and what its growth depends on; empty for bfloat16."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is that of another dtype.
        """
        if bool(state) != (self._scaler is not None):
            raise ValueError(
                f"MixedPrecision({self.dtype}) was given the state of one with another dtype; make it with the dtype "
                f"of the run that was saved"
            )
        if self._scaler is not None:
            self._scaler.load_state_dict(dict(state))

    def _cast(self, problem: Problem) -> Problem:
        def cast(function: Callable[..., Any]) -> Callable[..., Any]:
            if isinstance(function, Pulled):
                return dataclasses.replace(function, inner_loss=Cast(function.inner_loss, self.dtype, self.scale))
            return Cast(function, self.dtype, self.scale)

        return dataclasses.replace(
            problem,
            inner_loss=cast(problem.inner_loss),
            outer_loss=cast(problem.outer_loss),
            features=None if problem.features is None else cast(problem.features),
        )


@dataclasses.dataclass(frozen=True)
class Cast:
    """A loss, or features, under autocast, the cotangents inside of it times `scale`."""

    function: Callable[..., Any]
    dtype: torch.dtype
    scale: float

    def __call__(self, *given: Any) -> Any:
        """What the function returns, in the dtype of the variables."""
        first = tree.tensors(given)[0]
        if first.dtype is not torch.float32:
            raise ValueError(
                f"MixedPrecision was given variables of dtype {first.dtype}; torch.autocast acts on float32 alone. "
                f"Convert them with .float(), or leave MixedPrecision out"
            )
        with torch.autocast(first.device.type, dtype=self.dtype):
            value = self.function(*(given if self.scale == 1 else scaling.entered(given, self.scale)))
        value = tree.tree_map(_wide, value)
        return value if self.scale == 1 else scaling.left(value, self.scale)


def _wide(leaf: Tree) -> Tree:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
