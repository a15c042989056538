"""Random bilevel problems in plain torch: what a draw is made of. Nothing of bilevel is imported here.

A draw is a `Choices`, a flat record of plain values, so that a failing one can be simplified field by field and
written as one line. `build` turns it into tensors and functions over a list of inner leaves `ys` and a dict of outer
leaves `xs`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

Leaves = list[Tensor]
Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Choices:
    """One draw. The defaults are the simplest value of each field."""

    seed: int = 0
    estimator: str = "graph"  # graph iterates segments implicit reduced corrected first
    steps: int = 2
    model: str = "quadratic"  # quadratic softmax tanh relu
    enters: tuple[str, ...] = ("reg",)  # of weights reg shift features direct both
    start: str = "given"  # given init proximal
    optimizer: str = "sgd"  # sgd nesterov adam adamw
    lr: str = "float"  # float learned leaf number tree
    momentum: str = "none"  # none float learned leaf; of Adam: beta1, "none" being a float too
    decay: str = "none"  # none float learned leaf
    dampening: bool = False
    unused: bool = False
    f_only: bool = False
    heads: bool = False
    regularized: bool = True
    random: str = "none"  # none dropout randn features
    inner_tree: str = "dict"  # bare dict nested
    outer_tree: str = "dict"
    layout: str = "plain"  # plain transposed strided expanded views
    float32: bool = False
    per_step: bool = False
    curvature: bool = False
    converge: bool = False
    solved: bool = False  # the given start is the inner solution already
    segment: int | None = None
    last: int | None = None
    linear: str = "cg"  # cg short neumann dense
    damping: float = 0.0
    warm: str = "cold"  # cold inner adjoint both
    scheme: str = "symmetric"
    nu: float | None = None
    tasks: int = 0  # 0: no TaskMean
    chunk: int | None = None
    requires_grad: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of all floating tensors."""
        return torch.float32 if self.float32 else torch.float64

    def brief(self) -> str:
        """The fields that differ from the defaults, as a program."""
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return "Choices(" + ", ".join(f"{f.name}={value!r}" for f, value in fields if value != f.default) + ")"


@dataclasses.dataclass(frozen=True)
class Program:
    """The problem of one task, on leaves. `embed` stands for Problem.features, `hyper` gives one value per leaf."""

    g: Callable[[Leaves, Named, Any], Tensor]
    f: Callable[[Leaves, Named, Any], Tensor]
    embed: Callable[[Named, Any], Any]
    init: Callable[[Named, Any], Leaves] | None
    strength: float
    optimizer: str
    hyper: dict[str, Callable[[Named], list[Any]]]


@dataclasses.dataclass(frozen=True)
class Built:
    """The tensors and functions of a draw; inner leaves and batches have a leading dimension if `choices.tasks`."""

    choices: Choices
    program: Program
    outer: Named
    inner: Leaves
    inner_spec: Any
    outer_spec: Any
    inner_batches: list[Any]
    outer_batch: Any
    curvature: Any

    def pack_inner(self, leaves: list[Any]) -> Any:
        """The tree that the library gets."""
        return pytree.tree_unflatten(leaves, self.inner_spec)

    def pack_outer(self, xs: Named) -> Any:
        """Likewise."""
        return pytree.tree_unflatten(list(xs.values()), self.outer_spec)

    def named(self, outer: Any) -> Named:
        """The outer leaves by name."""
        return dict(zip(self.outer, pytree.tree_leaves(outer), strict=True))


def template(kind: str, count: int) -> Any:
    """A tree with `count` leaves."""
    leaves = list(range(count))
    if kind == "bare" and count == 1:
        return 0
    if kind != "nested":
        return {f"n{i}": i for i in leaves}
    rest: Any = {"deep": {f"n{i}": i for i in leaves[2:]}} if count > 2 else ()
    return [{"p": leaves[0]}, (leaves[1],) if count > 1 else (), rest]


def build(c: Choices) -> Built:
    """The tensors and functions of a draw; the same ones each time."""
    gen = torch.Generator().manual_seed(c.seed)
    flip = torch.randint(0, 2, (8,), generator=gen).tolist()

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=gen, dtype=torch.float64)).to(c.dtype)

    shapes = _inner_shapes(c, flip)
    names, count = list(shapes), max(c.tasks, 1)
    width = sum(torch.Size(s).numel() for name, s in shapes.items() if name.startswith("t")) or 3
    rows = 7 if c.regularized else 3

    def batch(step: int) -> Any:
        targets = normal(count, rows) if c.model == "quadratic" else torch.randint(0, 2, (count, rows), generator=gen)
        inputs = _laid_out(normal(count, rows, width, scale=0.7), c.layout if c.layout != "views" else "plain")
        data = (inputs, targets) if c.tasks else (inputs[0], targets[0])
        return [*data, (step + flip[0]) % 2] if c.heads else data

    inner = [normal(*((c.tasks,) if c.tasks else ()), *shape, scale=0.5) for shape in shapes.values()]
    outer: Named = {}
    if c.start != "given":
        outer |= {f"start.{i}": normal(*shape, scale=0.5) for i, shape in enumerate(shapes.values())}
    entering = {
        "weights": (rows,),
        "reg": () if flip[1] else (1,),
        "shift": shapes[names[0]],
        "features": (width, width),
        "direct": () if flip[2] else (2,),
        "both": (),
    }
    outer |= {name: normal(*entering[name], scale=0.5) for name in c.enters}
    if c.unused:
        outer["unused"] = normal(2)
    outer |= _hyper_leaves(c, shapes, normal)
    inner = _views(inner) if c.layout == "views" else [_laid_out(leaf, c.layout) for leaf in inner]
    outer = {name: _laid_out(leaf, c.layout if c.layout != "views" else "plain") for name, leaf in outer.items()}
    for leaf in (*inner, *outer.values()):
        leaf.requires_grad_(c.requires_grad)
    return Built(
        choices=c,
        program=_program(c, names, flip),
        outer=outer,
        inner=inner,
        inner_spec=pytree.tree_structure(template(c.inner_tree, len(inner))),
        outer_spec=pytree.tree_structure(template(c.outer_tree, len(outer))),
        inner_batches=[batch(k) for k in range(max(c.steps, 1) if c.per_step else 1)],
        outer_batch=batch(c.steps + flip[3]),
        curvature=batch(c.steps + flip[4]) if c.curvature else None,
    )


def _inner_shapes(c: Choices, flip: list[int]) -> dict[str, tuple[int, ...]]:
    if c.model == "quadratic":
        split = [(4,)] if c.inner_tree == "bare" else [(), (1,), (2,)] if flip[5] else [(2, 1), (2,)]
        shapes: dict[str, tuple[int, ...]] = {f"t{i}": shape for i, shape in enumerate(split)}
    elif c.model == "softmax":
        shapes = {"w": (3, 2)} | ({} if c.inner_tree == "bare" else {"b": (2,)})
    else:
        shapes = {"w1": (3, 3), "b1": (3,), "w2": (3, 2)}
    if c.heads:
        shapes |= {"head0": () if c.model == "quadratic" else (2,), "head1": () if c.model == "quadratic" else (2,)}
    return shapes | ({"z": (2,)} if c.f_only else {})


def _hyper_leaves(c: Choices, shapes: dict[str, tuple[int, ...]], normal: Callable[..., Tensor]) -> Named:
    leaves: Named = {}
    for name, kind, middle in (("lr", c.lr, -2.0), ("decay", c.decay, -1.5), ("momentum", c.momentum, 0.3)):
        if kind == "learned":
            leaves[name] = middle + normal(scale=0.3)
        elif kind == "leaf":
            leaves[name] = middle + normal(len(shapes), scale=0.3)
        elif kind == "number":
            leaves |= {f"{name}.{i}": middle + normal(*shape, scale=0.3) for i, shape in enumerate(shapes.values())}
    return leaves


def _laid_out(leaf: Tensor, layout: str) -> Tensor:
    """The same shape in another memory layout; "expanded" repeats one slice without memory of its own."""
    if layout == "transposed" and leaf.dim() >= 2:
        return leaf.mT.contiguous().mT
    if layout == "strided" and leaf.dim() >= 1:
        return leaf.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded" and leaf.dim() >= 1:
        return leaf[:1].clone().expand_as(leaf)
    return leaf


def _views(leaves: Leaves) -> Leaves:
    """All leaves as views of one buffer."""
    buffer = torch.cat([leaf.reshape(-1) for leaf in leaves])
    return [part.view(leaf.shape) for part, leaf in zip(buffer.split([x.numel() for x in leaves]), leaves, strict=True)]


def _program(c: Choices, names: list[str], flip: list[int]) -> Program:
    def outputs(y: Named, inputs: Tensor) -> Tensor:
        if c.model == "quadratic":
            return inputs @ torch.cat([leaf.reshape(-1) for name, leaf in y.items() if name.startswith("t")])
        if c.model == "softmax":
            return inputs @ y["w"] + y.get("b", 0.0)
        hidden = inputs @ y["w1"] + y["b1"]
        return (hidden.tanh() if c.model == "tanh" else hidden.relu()) @ y["w2"]

    def fit(y: Named, batch: Any, random: str) -> Tensor:
        inputs, targets = batch[0], batch[1]
        if random == "dropout":
            inputs = F.dropout(inputs, 0.3)
        out = outputs(y, inputs)
        if c.heads:
            out = out + y[f"head{batch[2]}"]
        if random == "randn":
            out = out + 0.1 * torch.randn_like(out)
        return 0.5 * (out - targets) ** 2 if c.model == "quadratic" else F.cross_entropy(out, targets, reduction="none")

    def g(ys: Leaves, xs: Named, batch: Any) -> Tensor:
        y = dict(zip(names, ys, strict=True))
        losses = fit(y, batch, c.random)
        value = (2 * xs["weights"].sigmoid() * losses if "weights" in xs else losses).mean()
        idle = {"z", f"head{1 - batch[2]}" if c.heads else "z"}
        size = torch.stack([leaf.square().sum() for name, leaf in y.items() if name not in idle]).sum()
        value = value + 0.1 * size if c.regularized else value
        if "reg" in xs:
            value = value + 0.1 * xs["reg"].exp().sum() * size
        if "both" in xs:
            value = value + 0.05 * xs["both"].exp() * size
        return value + 0.3 * (xs["shift"] * ys[0]).sum() if "shift" in xs else value

    def f(ys: Leaves, xs: Named, batch: Any) -> Tensor:
        y = dict(zip(names, ys, strict=True))
        value = fit(y, batch, c.random if flip[6] else "none").mean()
        if "direct" in xs:
            value = value + 0.3 * xs["direct"].square().sum() + 0.2 * xs["direct"].sum() * ys[0].sum()
        if "both" in xs:
            value = value + 0.2 * (xs["both"] - 1).square() + 0.1 * xs["both"] * ys[0].square().sum()
        return value + 0.5 * (y["z"] - 1).square().sum() if c.f_only else value

    def embed(xs: Named, batch: Any) -> Any:
        if "features" not in xs:
            return batch
        mapped = (batch[0] @ xs["features"]).tanh()
        return [F.dropout(mapped, 0.3) if c.random == "features" else mapped, *batch[1:]]

    def init(xs: Named, batch: Any) -> Leaves:
        start = [leaf for name, leaf in xs.items() if name.startswith("start.")]
        if flip[7]:  # the very tensors of x
            return start
        # A proximal term asks for init at every batch; only the first batch's is documented.
        return [0.9 * leaf + (0.1 * batch[0].mean() if c.start == "init" else 0.0) for leaf in start]

    return Program(
        g, f, embed, None if c.start == "given" else init, 0.5 if c.start == "proximal" else 0.0, c.optimizer,
        {name: _hyper(c, name, len(names)) for name in ("lr", "decay", "momentum", "dampening")},
    )  # fmt: skip


def _hyper(c: Choices, name: str, count: int) -> Callable[[Named], list[Any]]:
    """The value of a hyper-parameter for each leaf."""
    adam = c.optimizer.startswith("adam")
    rate = 0.05 if adam else 0.5 if c.converge or c.solved else 0.15
    values = {"lr": rate, "decay": 0.2, "momentum": 0.6, "dampening": 0.3 if c.dampening else 0.0}
    fixed = values[name]
    kind = getattr(c, name) if name != "dampening" else "float"
    squash: Callable[[Tensor], Tensor] = torch.sigmoid if name == "momentum" else torch.exp
    if kind == "tree":
        return lambda xs: [fixed * (1 + 0.2 * i) for i in range(count)]
    if kind == "learned":
        return lambda xs: [squash(xs[name])] * count
    if kind == "leaf":
        return lambda xs: [squash(xs[name][i]) for i in range(count)]
    if kind == "number":
        return lambda xs: [squash(xs[f"{name}.{i}"]) for i in range(count)]
    return lambda xs: [fixed if kind == "float" or (adam and name == "momentum") else 0.0] * count
