"""What the tests of the inner optimizers share: configurations beside torch.optim's, a start and a loss."""

import torch
from torch import Tensor

import bilevel as bl

STEPS = 20

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
        if name == "nesterov":
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


TORCH = {bl.SGD: torch.optim.SGD, bl.Adam: torch.optim.Adam, bl.AdamW: torch.optim.AdamW}
