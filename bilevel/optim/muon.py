"""Muon, differentiable: the momentum of a matrix, made nearly orthogonal by Newton-Schulz steps.

    m <- b m + (1 - b) g;   d = (1 - b) g + b m  (nesterov)  or  m;   X = d / max(|d|, eps)
    ns_steps times:  X <- a X + (b' A + c A A) X,  A = X X';      y <- (1 - lr weight_decay) y - lr s X

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P; its graph holds three matrices a Newton-Schulz step |

(a, b', c) = ns_coefficients; s = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) with
adjust="match_rms_adamw". Every tensor of y is a matrix; hand the others to another optimizer with `Groups`. Without
weight decay it rests where g = 0; with it, it does not say.

Wins: hidden layers: all directions of a matrix move alike.
Fails: steps do not get shorter near a solution (the length of X does not depend on that of d): schedule lr. Where g is
zero for a whole matrix, the derivative of a step is a^ns_steps / eps, 5e9: a loop that starts there is reported
NONFINITE in float32.
Reference: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982; equal to
torch.optim.Muon (torch 2.13) in float64 to 1e-12 where the iteration is in bfloat16, as torch's.
Differences from peers: the iteration runs in the dtype of y, in float32 where that has 16 bits, where torch's always
takes bfloat16: a derivative through eight bits is worth two digits, or none where it cancels. Write
ns_dtype=torch.bfloat16 for torch's own numbers.
"""

import dataclasses
import math
from typing import Any, Literal, Self

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest, minus, off, plus
from bilevel.optim.entrywise import average, fresh, shrunk, stepped
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalized by Newton-Schulz steps, with decoupled weight decay; for matrices.

    Args:
        lr: step size.
        weight_decay: y is first multiplied by 1 - lr * weight_decay.
        momentum: decay rate of the mean gradient.
        nesterov: look ahead along it.
        ns_coefficients: of the odd polynomial of degree 5.
        eps: the smallest norm that d is divided by.
        ns_steps: Newton-Schulz steps.
        adjust: how lr is scaled by the shape of a matrix, as in torch.optim.Muon.
        ns_dtype: what the iteration is computed in; None for the dtype of y, float32 for one of 16 bits. Within an open
            autocast, which would make 16 bits of float32, None is float64.
        tasks: whether y has a leading dimension of tasks; `TaskMean` says so, nobody else needs to.

    Each of lr, weight_decay and momentum is a number, a tree of numbers like inner, or a function of outer that returns
    a number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `init`, a tensor is no matrix; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> muon, y = bl.optim.Muon(lr=0.1, weight_decay=0.0), torch.zeros(2, 2)
        >>> y, state = muon.step(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), muon.init(y), y, None)
        >>> y  # one length in both directions, nearly
        tensor([[-0.0753,  0.0000],
                [ 0.0000, -0.1134]])
    """

    lr: Hyper = 1e-3
    weight_decay: Hyper = 0.1
    momentum: Hyper = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust: Literal["original", "match_rms_adamw"] = "original"
    ns_dtype: torch.dtype | None = None
    tasks: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            check_hyper("Muon", name, getattr(self, name), 0.0)
        check_hyper("Muon", "momentum", self.momentum, 0.0, 1.0)
        if callable(self.eps) or off(self.eps) or not isinstance(self.eps, (int, float)):
            raise ValueError(f"Muon was given eps={self.eps!r}; a positive number was needed")
        if not isinstance(self.ns_coefficients, tuple) or len(self.ns_coefficients) != 3:
            raise ValueError(
                f"Muon was given ns_coefficients={self.ns_coefficients!r}; three numbers were needed, such as "
                f"(3.4445, -4.775, 2.0315)"
            )
        if not isinstance(self.ns_steps, int) or isinstance(self.ns_steps, bool) or not 0 <= self.ns_steps < 100:
            raise ValueError(f"Muon was given ns_steps={self.ns_steps!r}; an integer from 0 to 99 was needed")
        if self.adjust not in ("original", "match_rms_adamw"):
            raise ValueError(f'Muon was given adjust={self.adjust!r}; "original" or "match_rms_adamw" was needed')
        if self.ns_dtype is not None and not (
            isinstance(self.ns_dtype, torch.dtype) and self.ns_dtype.is_floating_point
        ):
            raise ValueError(f"Muon was given ns_dtype={self.ns_dtype!r}; a floating dtype was needed, or None")

    def over(self, tasks: int) -> Self:
        return dataclasses.replace(self, tasks=True)

    def init(self, inner: Tree) -> Any:
        for name, leaf in zip(tree.names(inner), tree.tensors(inner), strict=True):
            shape = leaf.shape[1:] if self.tasks else leaf.shape
            if len(shape) != 2:
                raise ValueError(
                    f"Muon was given inner{name} of shape {tuple(shape)}; matrices were needed. Hand the others to "
                    f"another optimizer: Groups([(lambda name, shape: len(shape) == 2, Muon()), ('', AdamW())])"
                )
        return fresh(inner, "first")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {name: getattr(self, name) for name in ("lr", "weight_decay", "momentum")}
        return stepped(self._update, grad, state, inner, outer, hypers)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, 0.0, inner, outer) if off(self.weight_decay) else None

    def _update(self, y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
        lr, momentum = h["lr"], h["momentum"]
        m = past["first"] = average(past["first"], momentum, g)
        d = plus((1 - momentum) * g, momentum, m) if self.nesterov else m
        rows, columns = y.shape[-2:]
        scale = 0.2 * max(rows, columns) ** 0.5 if self.adjust != "original" else math.sqrt(max(1, rows / columns))
        return minus(shrunk(y, lr, h["weight_decay"]), lr * scale, self._orthogonal(d).to(y.dtype))

    def _orthogonal(self, d: Tensor) -> Tensor:
        a, b, c = self.ns_coefficients
        tall = d.shape[-2] > d.shape[-1]
        x = d.to(self.ns_dtype or (torch.float64 if _cast(d) else d.dtype))
        x = x.mT if tall else x
        # One norm a matrix: the first dimension may be that of tasks.
        length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x = x / length.clamp_min(self.eps)
        combined = torch.baddbmm if x.dim() == 3 else torch.addmm
        for _ in range(self.ns_steps):
            gram = x @ x.mT
            x = combined(x, combined(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def _cast(d: Tensor) -> bool:
    """Whether an open autocast would multiply matrices in 16 bits, now or in the backward."""
    kind = d.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
