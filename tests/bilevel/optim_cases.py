"""What the tests of the inner optimizers share: configurations beside torch.optim's, a start and a loss."""

import contextlib

import torch
from torch import Tensor

import bilevel as bl

STEPS = 20


class LionByHand(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675, in place; torch has none."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = (beta1 * m + (1 - beta1) * p.grad).sign()
                p -= lr * (direction + group["weight_decay"] * p)
                m.mul_(beta2).add_((1 - beta2) * p.grad)


CONFIGURATIONS = {
    "sgd": (bl.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "sgd-decay": (bl.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "sgd-all": (bl.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd-nesterov-decay": (
        bl.SGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.1, "nesterov": True},
    ),
    "adam": (bl.Adam, torch.optim.Adam, {"lr": 0.1}),
    "adam-betas": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.8)}),
    "adam-no-averaging": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.0)}),
    "adam-eps": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "eps": 0.3}),
    "adam-decay": (bl.Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.2}),
    "adamw": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adamw-all": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.3, "weight_decay": 0.5}),
    "adamw-no-decay": (bl.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    "rmsprop": (bl.optim.RMSprop, torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop-all": (
        bl.optim.RMSprop,
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.7, "centered": True},
    ),
    "adagrad": (bl.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad-all": (
        bl.optim.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.2, "initial_accumulator_value": 0.5, "eps": 0.1},
    ),
    "adadelta": (bl.optim.Adadelta, torch.optim.Adadelta, {"lr": 1.0}),
    "adadelta-all": (
        bl.optim.Adadelta,
        torch.optim.Adadelta,
        {"lr": 0.7, "rho": 0.6, "eps": 0.01, "weight_decay": 0.2},
    ),
    "adamax": (bl.optim.Adamax, torch.optim.Adamax, {"lr": 0.1}),
    "adamax-all": (
        bl.optim.Adamax,
        torch.optim.Adamax,
        {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.2},
    ),
    "nadam": (bl.optim.NAdam, torch.optim.NAdam, {"lr": 0.05}),
    "nadam-all": (
        bl.optim.NAdam,
        torch.optim.NAdam,
        {"lr": 0.05, "betas": (0.6, 0.9), "eps": 0.1, "weight_decay": 0.2, "momentum_decay": 0.3},
    ),
    "nadam-decoupled": (
        bl.optim.NAdam,
        torch.optim.NAdam,
        {"lr": 0.05, "weight_decay": 0.2, "decoupled_weight_decay": True},
    ),
    "radam": (bl.optim.RAdam, torch.optim.RAdam, {"lr": 0.1}),
    "radam-all": (
        bl.optim.RAdam,
        torch.optim.RAdam,
        {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.2},
    ),
    "radam-decoupled": (
        bl.optim.RAdam,
        torch.optim.RAdam,
        {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "decoupled_weight_decay": True},
    ),
    "lion": (bl.optim.Lion, LionByHand, {"lr": 0.05}),
    "lion-all": (bl.optim.Lion, LionByHand, {"lr": 0.05, "betas": (0.6, 0.8), "weight_decay": 0.3}),
}


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("w", (3, 2)), ("b", (2,)), ("scale", ()))
    }


def loss_of(y: dict[str, Tensor]) -> Tensor:
    """Nonquadratic, coupled over the leaves."""
    return (
        (1 + (y["w"].tanh() + y["b"]).pow(2)).log().sum()
        + (y["scale"] + 0.3 * y["w"].sum()).cos()
        + (0.3 * y["scale"]).exp()
    )


def gradient_of(y: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in y.items()}
    return dict(zip(leaves, torch.autograd.grad(loss_of(leaves), list(leaves.values())), strict=True))


def ours(optimizer: bl.Optimizer, outer: object) -> list[dict[str, Tensor]]:
    y, path = start(), []
    state = optimizer.init(y)
    for _ in range(STEPS):
        y, state = optimizer.step(gradient_of(y), state, y, outer)
        path.append(y)
    return path


@contextlib.contextmanager
def numbers_in_float64():
    """torch.optim keeps numbers that belong to no entry (NAdam's product) in the default dtype, float32 elsewhere."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@numbers_in_float64()
def theirs(kind: type[torch.optim.Optimizer], arguments: dict) -> list[dict[str, Tensor]]:
    y, path = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}, []
    optimizer = kind(list(y.values()), **arguments)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(y).backward()
        optimizer.step()
        path.append({name: leaf.detach().clone() for name, leaf in y.items()})
    return path


def assert_same_path(path: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert (expected[-1]["w"] - start()["w"]).abs().max() > 1e-2, "the reference did not move"
    for step, (a, b) in enumerate(zip(path, expected, strict=True)):
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-12, atol=1e-12, msg=lambda text, at=f"step {step}, {name}": f"{at}: {text}"
            )


def as_functions(arguments: dict) -> tuple[dict, dict[str, Tensor]]:
    """The same hyper-parameters as functions of an outer variable that holds them."""
    outer, functions = {}, {}
    for name, value in arguments.items():
        if isinstance(value, bool):
            functions[name] = value
        elif name == "betas":
            outer |= {
                "beta1": torch.tensor(value[0], dtype=torch.float64),
                "beta2": torch.tensor(value[1], dtype=torch.float64),
            }
            functions[name] = (lambda outer: outer["beta1"], lambda outer: outer["beta2"])
        else:
            outer[name] = torch.tensor(value, dtype=torch.float64)
            functions[name] = lambda outer, name=name: outer[name]
    return functions, outer


TORCH = {ours: reference for ours, reference, _ in CONFIGURATIONS.values()}
