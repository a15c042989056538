"""Which operators DTensor differentiates once, and which twice, when the parameters are sharded.

    python benchmarks/dtensor_operators.py          # to benchmarks/results/dtensor_operators.md

Each operator stands in a small loss of sharded parameters and of inputs that are whole on every rank. Its gradient and
a product with its second derivatives are held against those of plain tensors, on 2 and on 3 ranks (uneven shards), in
float64 under gloo. The parameters come to it as `hypergradient` hands them to a loss.
"""

import pathlib
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.distributed import Ranks
from bilevel.engine.shards import joined, plain
from bilevel.space.shards import Sharding
from bilevel.testing.ranks import Pool

RESULT = pathlib.Path(__file__).parent / "results" / "dtensor_operators.md"
D = torch.float64
TOKENS = torch.tensor([[1, 0, 3], [5, 2, 1]])
Loss = Callable[[dict[str, Any], Callable[[Tensor], Any]], Any]
OPERATORS: dict[str, tuple[dict[str, tuple[int, ...]], Loss]] = {
    "linear": ({"w": (6, 4), "b": (6,)}, lambda y, c: F.linear(c(X), y["w"], y["b"]).tanh().sum()),
    "two linear": (
        {"w": (6, 4), "v": (3, 6)},
        lambda y, c: F.linear(F.linear(c(X), y["w"]).tanh(), y["v"]).square().sum(),
    ),
    "matmul": ({"w": (4, 6)}, lambda y, c: (c(X) @ y["w"]).tanh().sum()),
    "einsum": ({"w": (6, 4)}, lambda y, c: torch.einsum("bi,oi->bo", c(X), y["w"]).tanh().sum()),
    "embedding": ({"w": (6, 4)}, lambda y, c: F.embedding(c(TOKENS), y["w"]).pow(3).sum()),
    "index": ({"w": (6, 4)}, lambda y, c: y["w"][c(TOKENS[0])].pow(3).sum()),
    "cross_entropy": ({"w": (6, 4)}, lambda y, c: F.cross_entropy(F.linear(c(X), y["w"]), c(LABELS))),
    "softmax": ({"w": (6, 4)}, lambda y, c: F.softmax(F.linear(c(X), y["w"]), -1).square().sum()),
    "log_softmax": ({"w": (6, 4)}, lambda y, c: F.log_softmax(F.linear(c(X), y["w"]), -1).square().sum()),
    "logsumexp": ({"w": (6, 4)}, lambda y, c: F.linear(c(X), y["w"]).logsumexp(-1).sum()),
    "gelu": ({"w": (6, 4)}, lambda y, c: F.gelu(F.linear(c(X), y["w"])).sum()),
    "silu": ({"w": (6, 4)}, lambda y, c: F.silu(F.linear(c(X), y["w"])).sum()),
    "relu": ({"w": (6, 4)}, lambda y, c: F.relu(F.linear(c(X), y["w"])).square().sum()),
    "layer_norm": (
        {"w": (6, 4), "g": (6,), "b": (6,)},
        lambda y, c: F.layer_norm(F.linear(c(X), y["w"]), (6,), y["g"], y["b"]).pow(3).sum(),
    ),
    "rms_norm": ({"w": (6, 4), "g": (6,)}, lambda y, c: F.rms_norm(F.linear(c(X), y["w"]), (6,), y["g"]).pow(3).sum()),
    "group_norm": ({"w": (6, 4)}, lambda y, c: F.group_norm(F.linear(c(X), y["w"]), 2).pow(3).sum()),
    "attention, written out": ({"q": (4, 4), "k": (4, 4), "v": (4, 4)}, lambda y, c: attention(y, c, fused=False)),
    "scaled_dot_product_attention": ({"q": (4, 4), "k": (4, 4), "v": (4, 4)}, lambda y, c: attention(y, c, fused=True)),
    "heads (unflatten, transpose)": (
        {"w": (6, 4)},
        lambda y, c: F.linear(c(X), y["w"]).unflatten(-1, (2, 3)).transpose(0, 1).pow(3).sum(),
    ),
    "cat": ({"w": (6, 4), "v": (6, 4)}, lambda y, c: torch.cat([y["w"], y["v"]]).pow(3).sum()),
    "conv2d": ({"w": (6, 2, 2, 2)}, lambda y, c: F.conv2d(c(IMAGE), y["w"]).tanh().sum()),
    "weight decay": ({"w": (6, 4), "b": (6,)}, lambda y, c: sum(leaf.pow(4).sum() for leaf in y.values())),
    "norm": ({"w": (6, 4)}, lambda y, c: torch.linalg.vector_norm(y["w"])),
    "max": ({"w": (6, 4)}, lambda y, c: F.linear(c(X), y["w"]).amax(-1).pow(3).sum()),
    "var": ({"w": (6, 4)}, lambda y, c: F.linear(c(X), y["w"]).var(0).sum()),
    "cumsum": ({"w": (6, 4)}, lambda y, c: F.linear(c(X), y["w"]).cumsum(-1).pow(3).sum()),
    "inverse": ({"w": (4, 4)}, lambda y, c: torch.linalg.inv(y["w"] + 5 * c(torch.eye(4, dtype=D))).pow(2).sum()),
}
G = torch.Generator(device="cpu").manual_seed(0)
X, LABELS = torch.randn(5, 4, generator=G, dtype=D), torch.tensor([0, 1, 2, 5, 4])
IMAGE = torch.randn(2, 2, 5, 5, generator=G, dtype=D)


def attention(y: dict[str, Any], c: Any, *, fused: bool) -> Any:
    q, k, v = (F.linear(c(X), y[name]).unflatten(-1, (2, 2)).transpose(0, 1) for name in "qkv")
    if fused:
        return F.scaled_dot_product_attention(q[None], k[None], v[None]).pow(2).sum()
    return (torch.softmax(q @ k.mT * 2**-0.5, -1) @ v).pow(2).sum()


def derivatives(loss: Any, leaves: list[Tensor], along: list[Tensor]) -> list[Any]:
    """The gradient, and its product with a vector, or what was raised."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found: list[Any] = []
    try:
        gradient = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
        found.append([leaf.detach() for leaf in gradient])
        products = torch.autograd.grad(gradient, leaves, along, allow_unused=True)
        found.append([torch.zeros_like(a) if b is None else b for a, b in zip(leaves, products, strict=True)])
    except Exception as error:
        said = (str(error).strip() or "(without a word)").splitlines()[0]
        found.append(f"{type(error).__name__}: {said[:110]}")
    return [*found, "not reached"][:2]


def looked_at(ranks: Ranks) -> dict[str, list[str]]:
    """Of each operator: the gradient and the product, "right", "WRONG" or what was raised."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, said = DeviceMesh.from_group(ranks.group, "cpu"), {}
    for name, (shapes, loss) in OPERATORS.items():
        generator = torch.Generator(device="cpu").manual_seed(1)
        full = {key: torch.randn(shape, generator=generator, dtype=D) for key, shape in shapes.items()}
        along = {key: torch.randn(shape, generator=generator, dtype=D) for key, shape in shapes.items()}
        cut = {key: distribute_tensor(leaf, mesh, [Shard(0)]) for key, leaf in full.items()}
        sharding = Sharding.of("this", cut)
        assert sharding is not None
        parts = [
            list(sharding.parts({k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in each.items()}).values())
            for each in (full, along)
        ]

        def on_parts(leaves: list[Tensor], keys: Any = tuple(full), loss: Any = loss, s: Any = sharding) -> Tensor:
            value = loss(
                joined(s, dict(zip(keys, leaves, strict=True))), lambda t: distribute_tensor(t, mesh, [Replicate()])
            )
            return plain(value)

        def alone(leaves: list[Tensor], keys: Any = tuple(full), loss: Any = loss) -> Tensor:
            return loss(dict(zip(keys, leaves, strict=True)), lambda t: t)

        expected = derivatives(alone, list(full.values()), list(along.values()))
        found = derivatives(on_parts, *parts)
        said[name] = []
        for one, other in zip(found, expected, strict=True):
            if isinstance(one, str):
                said[name].append(one)
            elif isinstance(other, str):
                said[name].append(f"of plain tensors: {other}")
            else:
                whole = sharding.joined(dict(zip(full, one, strict=True))).values()
                same = all(
                    torch.allclose(a.full_tensor(), b, rtol=1e-9, atol=1e-9) for a, b in zip(whole, other, strict=True)
                )
                said[name].append("right" if same else "WRONG")
    return said


def table(pool: Pool) -> str:
    counts = (2, 3)
    answers = {count: pool.run(count, looked_at) for count in counts}
    for found in answers.values():
        assert all(isinstance(each, dict) for each in found), found
    lines = ["| operator | gradient | product with second derivatives |", "| --- | --- | --- |"]
    for name in OPERATORS:
        cells = []
        for order in range(2):
            seen = {answers[count][rank][name][order]: count for count in counts for rank in range(count)}
            cells.append(
                "; ".join(sorted(seen))
                if len(seen) == 1
                else "; ".join(f"{word} ({count} ranks)" for word, count in sorted(seen.items()))
            )
        lines.append(f"| {name} | " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    pool = Pool(300)
    try:
        found = table(pool)
    finally:
        pool.close()
    RESULT.write_text(
        f"# Operators on sharded parameters (DTensor)\n\nMade by benchmarks/{pathlib.Path(__file__).name} with torch "
        f"{torch.__version__}, Python {platform.python_version()}, gloo, on 2 and 3 ranks.\n\n{found}"
    )
    print(found)


if __name__ == "__main__":
    main()
