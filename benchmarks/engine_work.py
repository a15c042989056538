"""The work of benchmarks/engine.py: one list of variants for each cell, all of them the same quantity.

| cell | what |
| --- | --- |
| hvp N | one product with the Hessian and the mixed derivatives of a transformer of N blocks |
| P1, P2, P3 K | the hypergradient through K steps: few-shot conv net, hyper-cleaning, learned loss weighting |
| cg K | P2 after K steps, implicit: ten products of conjugate gradients |

The problems are those of ../shared/bench (common.py), which is on the path of the process that imports this. What is
in a batch is a tensor of the batch, so that one trace serves every step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from common import TF, Block, Problem
from torch.nn.functional import cross_entropy, linear

import bilevel as bl

DAMPING = 0.5
"""Makes H + damping I of P2 definite, so that ours makes ten products as the others do (undamped, it stops at the
negative curvature)."""


@dataclasses.dataclass
class Variant:
    """One way to do the work of a cell.

    Attributes:
        label: for the table.
        kind: "hand-written", "ours" or "peer".
        step: returns the list of results.
        compiled: whether the dispatch mode cannot see its memory.
        optional: left out: its graph takes many minutes to compile (`--peak` runs it).
        engine: what the last call said of its engine.
        status: and of its status.
    """

    label: str
    kind: str
    step: Callable[[], Any]
    compiled: bool = False
    optional: bool = False
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    status: str = ""

    def __call__(self) -> list[torch.Tensor]:
        found = self.step()
        if isinstance(found, bl.Hypergradient):
            self.engine, self.status = found.stats.get("engine", {}), found.status.name
            found = torch.utils._pytree.tree_leaves(found.grad)
        return list(found)


def variants(work: str, size: int) -> list[Variant]:
    """What a cell compares; the first is what the others are divided by."""
    return {"hvp": _hvp, "P1": _unrolled, "P2": _unrolled, "P3": _unrolled, "cg": _implicit}[work](work, size)


def reference(work: str, size: int) -> list[torch.Tensor] | None:
    """The same quantity in float64, by the hand-written recomputing sweep; None where there is none."""
    import plain_ref

    if work == "hvp":
        return None
    if work == "cg":
        return _damped_cg(Problem("P2", size, torch.float64))
    return plain_ref.mixed(Problem(work, size, torch.float64), plain_ref.back_rr)


# --- products


def _hvp(work: str, blocks: int) -> list[Variant]:
    torch.manual_seed(0)
    module = TF(n=blocks)
    tokens, labels = torch.randint(0, 64, (16, 64)), torch.randint(0, 64, (16, 64))
    x = torch.randn(16, requires_grad=True)
    plain = bl.functional(module, requires_grad=True)
    blocked = bl.functional(module, requires_grad=True, rematerialize=Block)
    v = [torch.randn_like(leaf) for leaf in plain[1].values()]

    def loss(call, params, x, batch):
        losses = cross_entropy(call(params, batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")
        return (x.sigmoid() * losses.view(16, -1).mean(1)).mean()

    def product(call, params):
        leaves = list(params.values())
        gradient = torch.autograd.grad(loss(call, params, x, (tokens, labels)), leaves, create_graph=True)
        roots = [torch.autograd.graph.get_gradient_edge(g) for g in gradient]
        del gradient
        return torch.autograd.grad(roots, [*leaves, x], v)

    def compiled(label, call, params, **options):
        """The engine's own product, as a recomputing sweep asks for it."""
        from bilevel.engine.evaluation import Evaluation, Pure

        def inner(y, x, batch):
            return loss(call, y, x, batch)

        evaluated, engine = Pure(Evaluation(bl.Problem(inner, inner), None), "inner_loss"), bl.Compiled()
        leaves, batch = list(params.values()), (tokens, labels)

        def step():
            session = engine.open()
            _, gradient = session.differentiable_gradient(evaluated, params, x, batch, numbers=False)
            roots = [torch.autograd.graph.get_gradient_edge(g) for g in gradient]
            del gradient
            found = torch.autograd.grad(roots, [*leaves, x], v)
            made.engine = session.report()
            return found

        made = Variant(label, "ours", step, compiled=True, **options)
        return made

    def gradient():
        return torch.autograd.grad(loss(*plain, x, (tokens, labels)), list(plain[1].values()))

    return [
        Variant("double backward", "hand-written", lambda: product(*plain)),
        Variant("a plain gradient", "hand-written", gradient),
        Variant("rematerialized", "ours", lambda: product(*blocked)),
        compiled("compiled", *plain, optional=True),
        compiled("compiled, rematerialized", *blocked),
    ]


# --- hypergradients


@dataclasses.dataclass(frozen=True)
class Ours:
    """A problem of the bench folder as ours: `problem(call)` with `call(y, inputs)`."""

    problem: Callable[[Any], bl.Problem]
    call: Callable[..., Any]
    start: Any
    blocked: Callable[..., Any] | None
    outer: list[torch.Tensor]
    batches: bl.Batches


def _ours(p: Problem) -> Ours:
    outer = [leaf.detach() for leaf in p.upper]
    call, start = bl.functional(p.init_module, requires_grad=False)
    if p.name == "P1":
        support, labels, query, answers = p.tasks[0]
        names = list(start)

        def few(call):
            def loss(y, x, batch):
                return cross_entropy(call(y, batch[0]), batch[1])

            return bl.Problem(loss, loss, init=lambda x, batch: dict(zip(names, x, strict=True)))

        return Ours(few, call, None, None, outer, bl.Batches((support, labels), (query, answers)))
    if p.name == "P2":
        every = [torch.arange(k * 500, k * 500 + 500) for k in range(10)]
        batches = [(p.X[i[0] : i[0] + 500], p.Y[i[0] : i[0] + 500], i) for i in every]

        def cleaning(call):
            def inner(y, x, batch):
                inputs, labels, index = batch
                losses = cross_entropy(call(y, inputs), labels, reduction="none")
                return (x[0][index].sigmoid() * losses).mean() + 0.5 * p.wd * sum((w * w).sum() for w in y.values())

            return bl.Problem(inner, lambda y, x, batch: cross_entropy(call(y, batch[0]), batch[1]))

        steps = bl.PerStep([batches[k % 10] for k in range(p.K)])
        return Ours(cleaning, call, start, None, outer, bl.Batches(steps, (p.XV, p.YV), curvature=batches[0]))

    def weighting(call):
        def inner(y, x, batch):
            tokens, labels = batch
            losses = cross_entropy(call(y, tokens).flatten(0, 1), labels.flatten(), reduction="none").view(16, -1)
            losses, (a, b, c, d) = losses.mean(1), x
            weights = linear(torch.relu(linear(losses.detach()[:, None] - 4.0, a, b)), c, d).sigmoid()[:, 0]
            return (weights * losses).mean()

        return bl.Problem(inner, lambda y, x, batch: cross_entropy(call(y, batch[0]).flatten(0, 1), batch[1].flatten()))

    blocked, _ = bl.functional(p.init_module, requires_grad=False, rematerialize=Block)
    return Ours(weighting, call, start, blocked, outer, bl.Batches((p.X, p.Y), (p.XV, p.YV)))


def _step(p: Problem, ours: Ours, problem: bl.Problem, estimator: Any, engine: Any) -> Callable[[], Any]:
    solver = bl.Descent(bl.SGD(lr=p.lr), steps=p.K)
    return functools.partial(
        bl.hypergradient,
        problem,
        ours.outer,
        ours.start,
        ours.batches,
        solver=solver,
        estimator=estimator,
        engine=engine,
    )


def _unrolled(work: str, K: int) -> list[Variant]:
    import plain_ref

    p = Problem(work, K)
    ours = _ours(p)
    found = [Variant("hand-written tape", "hand-written", plain_ref.make_step(p, "unroll"))]
    problem, engine = ours.problem(ours.call), bl.Compiled()
    for keep in ("graph", "iterates", "segments"):
        found.append(Variant(f"eager, {keep}", "ours", _step(p, ours, problem, bl.Unrolled(keep), bl.Eager())))
    for keep in ("iterates", "segments"):
        step = _step(p, ours, problem, bl.Unrolled(keep), engine)
        found.append(Variant(f"compiled, {keep}", "ours", step, compiled=True))
    if ours.blocked is not None:
        problem = ours.problem(ours.blocked)
        for keep in ("iterates", "segments"):
            step = _step(p, ours, problem, bl.Unrolled(keep), bl.Eager())
            found.append(Variant(f"rematerialized, {keep}", "ours", step))
        for keep in ("iterates", "segments"):
            step = _step(p, ours, problem, bl.Unrolled(keep), engine)
            found.append(Variant(f"compiled, rematerialized, {keep}", "ours", step, compiled=True))
    return found + [_peer(p, library, "unroll") for library in ("higher", "torchopt", "betty")]


class _Damped(Problem):
    """P2 with DAMPING / 2 |y - y'|^2 at y' = y: no gradient, and a Hessian of DAMPING I. For peers."""

    def inner(self, fwd, params, upper, k=0, t=0):
        loss = super().inner(fwd, params, upper, k, t)
        if k == 0:  # the batch that curvature is taken of
            loss = loss + DAMPING / 2 * sum((w - w.detach()).square().sum() for w in params)
        return loss


def _implicit(work: str, K: int) -> list[Variant]:
    p = Problem("P2", K)
    ours, estimator = _ours(p), bl.Implicit(bl.CG(10, tol=0.0, damping=DAMPING))
    problem = ours.problem(ours.call)
    damped = _Damped("P2", K)
    return [
        Variant("hand-written CG", "hand-written", lambda: _damped_cg(p)),
        Variant("eager", "ours", _step(p, ours, problem, estimator, bl.Eager())),
        Variant("compiled", "ours", _step(p, ours, problem, estimator, bl.Compiled()), compiled=True),
        _peer(damped, "torchopt", "cg"),
        _peer(damped, "betty", "cg"),
    ]


def _damped_cg(p: Problem) -> list[torch.Tensor]:
    """plain_ref.implicit(p, "cg") of (H + DAMPING I) v = b."""
    import plain_ref

    y = plain_ref.plain_inner(p, plain_ref.start(p), 0, p.K, 0)
    b = plain_ref.outer_grad(p, y, 0)
    y = [leaf.detach().requires_grad_() for leaf in y]
    g = plain_ref.gstep(p, y, p.upper, 0, 0, True)
    v, r, d = [torch.zeros_like(leaf) for leaf in b], list(b), list(b)
    rr = sum((leaf * leaf).sum() for leaf in r)
    for _ in range(10):
        product = torch.autograd.grad(g, y, grad_outputs=d, retain_graph=True)
        product = [a + DAMPING * c for a, c in zip(product, d, strict=True)]
        alpha = rr / sum((a * c).sum() for a, c in zip(d, product, strict=True))
        v = [a + alpha * c for a, c in zip(v, d, strict=True)]
        r = [a - alpha * c for a, c in zip(r, product, strict=True)]
        new = sum((leaf * leaf).sum() for leaf in r)
        d = [a + new / rr * c for a, c in zip(r, d, strict=True)]
        rr = new
    return [-leaf for leaf in torch.autograd.grad(g, p.upper, grad_outputs=v)]


def _peer(p: Problem, library: str, method: str) -> Variant:
    """peer_<library>.py of the bench folder; it is imported, and fails, when it is first called."""

    @functools.cache
    def made():
        import importlib

        return importlib.import_module(f"peer_{library}").make(p, method)

    return Variant(f"{library}, {method}", "peer", lambda: made()())
