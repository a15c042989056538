"""The methods of the few-shot table: one `Learner` each, that differ by an argument or two."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl

HEAD = "17"  # the linear layer of conv4
STEPS = 5
PULL = 2.0


def is_body(name: str) -> bool:
    return not name.startswith(f"{HEAD}.")


def descent(lr: float, steps: int = STEPS) -> bl.Descent:
    return bl.Descent(bl.SGD(lr=lr), steps)


def adam(lr: float) -> Callable[..., Any]:
    return functools.partial(torch.optim.Adam, lr=lr)


def methods() -> dict[str, dict[str, Any]]:
    """The arguments of each method's Learner, besides module, loss and chunk."""
    maml = {"solver": descent(0.1), "optimizer": adam(2e-3)}
    pulled = {"start": bl.meta.Shared(pull=PULL), "solver": descent(0.1, 10), "optimizer": adam(2e-3)}
    fitted = {"classes": 5, "learn_regularizer": True, "scale": 5.0, "learn_scale": True}
    ridge = bl.meta.KernelRidge(bl.meta.Linear(), regularizer=1.0, **fitted)
    amfs = bl.meta.KernelRidge(bl.meta.RBF(), regularizer=0.1, **fitted)
    similar = bl.GradientSimilarity(temperature=0.5)
    return {
        "MAML": maml,
        "MAML, weighted tasks (O-AMFS)": maml | {"weights": similar},
        "MAML, multi-step loss": maml | {"estimator": bl.Unrolled(step_weights=(0.1, 0.1, 0.1, 0.1, 0.6))},
        "FOMAML": maml | {"estimator": bl.FirstOrder()},
        "Reptile": maml | {"estimator": bl.meta.Reptile()},
        "ANIL": maml | {"adapts": HEAD},
        "BOIL": maml | {"adapts": is_body},
        "Meta-SGD": maml | {"rates": bl.meta.Rates(per="element")},
        "iMAML": pulled | {"estimator": bl.Implicit(bl.CG(max_steps=5, tol=0.1))},
        "first-order corrected": pulled | {"estimator": bl.FirstOrderCorrected(nu=0.1)},
        "memory-reduced": {
            "adapts": HEAD,
            "start": bl.meta.Fixed(),
            "solver": descent(0.05, 20),
            "estimator": bl.MemoryReduced(steps=20, damping=1e-2),
            "optimizer": adam(2e-3),
        },
        "ridge head": {"adapts": ridge, "optimizer": adam(2e-3)},
        "RBF head (I-AMFS)": {"adapts": amfs, "optimizer": adam(2e-3)},
        "RBF head, weighted tasks (I- and O-AMFS)": {"adapts": amfs, "optimizer": adam(2e-3), "weights": similar},
    }


UNTRAINED = "MAML, untrained start"


def learner(name: str, module: nn.Module, chunk: int | None) -> bl.meta.Learner:
    """The method of that name, on a module."""
    arguments = methods()["MAML" if name == UNTRAINED else name]
    if isinstance(arguments.get("adapts"), bl.meta.Head):
        module = nn.Sequential(*list(module)[:-1])  # features in the place of the linear layer
    if arguments.get("weights") is not None:
        chunk = 1
    return bl.meta.Learner(module, cross_entropy, chunk=chunk, **arguments)
