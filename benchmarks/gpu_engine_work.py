"""The work of benchmarks/gpu_engine.py: for each setting its variants, all of them the same hypergradient."""

import torch
from torch import nn

import bilevel as bl
from bilevel.problems.conv4 import conv4
from bilevel.problems.transformer import Block, Transformer, transformer

CHINCHILLA = {  # name: layers, width, heads (as remembered from the paper's table of models)
    "44M": (8, 512, 8),
    "117M": (12, 768, 12),
    "251M": (16, 1024, 16),
    "587M": (21, 1408, 11),
    "1.4B": (26, 2048, 16),
}
FULL = {
    "sizes": CHINCHILLA,
    "vocabulary": 32_000,
    "context": 1024,
    "sequences": 4,
    "steps": (2, 4, 8),
    "dtypes": ("bfloat16", "float32"),
    "tasks": (4, 32),
    "few_shot_steps": 5,
    "images": (5, 15, 28),  # of a class in support and query, and their side
    "width": 32,
    "rounds": 5,
}
TINY = {
    "sizes": {"tiny": (1, 8, 1)},
    "vocabulary": 32,
    "context": 8,
    "sequences": 2,
    "steps": (2,),
    "dtypes": ("float32", "bfloat16"),
    "tasks": (2,),
    "few_shot_steps": 1,
    "images": (1, 1, 16),
    "width": 2,
    "rounds": 1,
}
LR, FEW_SHOT_LR = 0.05, 0.05


def engines(device, *, smoke):
    """The engines there are. (A compiler is not asked of a rehearsal.)"""
    found = {"eager": bl.Eager(), "compiled": bl.Compiled(backend="graph") if smoke else bl.Compiled()}
    if hasattr(bl, "Captured"):
        found["captured"] = bl.Captured()
    return found


def weighting(spec, name, steps, dtype, device, smoke):
    """{variant: function that returns the hypergradient} of MixFlow-MG's setting, and the number of parameters."""
    layers, width, heads = spec["sizes"][name]
    shape = {"vocabulary": spec["vocabulary"], "context": spec["context"], "layers": layers, "width": width}
    _, params = transformer(**shape, heads=heads, dtype=getattr(torch, dtype), device=device)
    with torch.device("meta"):
        module = Transformer(**shape, heads=heads)
    draw = torch.Generator().manual_seed(0)
    places = (steps + 1, spec["sequences"], spec["context"] + 1)
    tokens = torch.randint(spec["vocabulary"], places, generator=draw).to(device)
    x = torch.zeros(spec["sequences"], dtype=getattr(torch, dtype), device=device)

    def losses(call, y, sequences):
        scores = call(y, sequences[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(scores, sequences[:, 1:].flatten(), reduction="none").unflatten(
            0, sequences[:, 1:].shape
        )

    def inner(call):
        return lambda y, x, batch: (x.sigmoid() * losses(call, y, batch).mean(1)).mean()

    def ours(engine, **options):
        call, _ = bl.functional(module, requires_grad=False, **options)
        problem = bl.Problem(inner(call), lambda y, x, batch: losses(call, y, batch).mean())
        batches = bl.Batches(inner=bl.PerStep(list(tokens[:-1])), outer=tokens[-1])
        solver, estimator = bl.Descent(bl.SGD(lr=LR), steps=steps), bl.Unrolled("iterates")

        def step():
            found = bl.hypergradient(problem, x, params, batches, solver=solver, estimator=estimator, engine=engine)
            step.engine = found.stats.get("engine", {})
            return [found.grad]

        return step

    call, _ = bl.functional(module)
    loss = inner(call)

    def gradient(y, x, batch, **options):
        return torch.autograd.grad(loss(y, x, batch), list(y.values()), **options)

    def outer_gradient(y, **options):
        return torch.autograd.grad(losses(call, y, tokens[-1]).mean(), list(y.values()), **options)

    def moved(y, g):
        return {key: leaf - LR * part for (key, leaf), part in zip(y.items(), g, strict=True)}

    def attached(y):
        return {key: leaf.detach().requires_grad_() for key, leaf in y.items()}

    def tape():
        y, leaf = attached(params), x.detach().requires_grad_()
        for batch in tokens[:-1]:
            y = moved(y, gradient(y, leaf, batch, create_graph=True))
        return torch.autograd.grad(losses(call, y, tokens[-1]).mean(), [leaf])

    def stepwise():
        y, leaf, kept, total = params, x.detach().requires_grad_(), [], torch.zeros_like(x)
        for batch in tokens[:-1]:
            kept.append(y)
            y = attached(y)
            y = {key: each.detach() for key, each in moved(y, gradient(y, leaf.detach(), batch)).items()}
        cotangent = outer_gradient(attached(y))
        del y
        for batch in reversed(tokens[:-1]):
            y = attached(kept.pop())
            g = gradient(y, leaf, batch, create_graph=True)
            *products, mixed = torch.autograd.grad(g, [*y.values(), leaf], cotangent)
            del g, y
            cotangent = [each - LR * part for each, part in zip(cotangent, products, strict=True)]
            total = total - LR * mixed
        return [total]

    known = engines(device, smoke=smoke)
    found = {
        "double backward, step by step": stepwise,
        "double backward, kept tape": tape,
        "eager": ours(known["eager"]),
        "rematerialized": ours(known["eager"], rematerialize=Block),
        "compiled": ours(known["compiled"]),
        "compiled, rematerialized": ours(known["compiled"], rematerialize=Block),
    }
    return found, sum(leaf.numel() for leaf in params.values())


def few_shot(spec, tasks, steps, dtype, device, smoke):
    """The same of MAML with some tasks."""
    shot, asked, side = spec["images"]
    module = conv4(5, width=spec["width"], side=side)
    call, start = bl.functional(module)
    start = {name: leaf.to(device=device, dtype=getattr(torch, dtype)) for name, leaf in start.items()}
    draw = torch.Generator().manual_seed(0)

    def images(each):
        labels = torch.arange(5).repeat_interleave(each).repeat(tasks, 1)
        drawn = torch.randn(tasks, 5 * each, 1, side, side, generator=draw) + labels[:, :, None, None, None] / 5
        return drawn.to(device=device, dtype=getattr(torch, dtype)), labels.to(device)

    support, query = images(shot), images(asked)

    def loss(y, x, batch):
        return nn.functional.cross_entropy(call(y, batch[0]), batch[1])

    problem = bl.Problem(loss, loss, init=lambda x, batch: x)
    outer = {name: leaf.detach() for name, leaf in start.items()}

    def ours(engine, keep):
        solver, estimator = bl.Descent(bl.SGD(lr=FEW_SHOT_LR), steps=steps), bl.TaskMean(bl.Unrolled(keep))
        batches = bl.Batches(inner=support, outer=query)

        def step():
            found = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=estimator, engine=engine)
            step.engine = found.stats.get("engine", {})
            return list(found.grad.values())

        return step

    def by_hand():
        x = {name: leaf.detach().requires_grad_() for name, leaf in start.items()}
        total = [torch.zeros_like(leaf) for leaf in x.values()]
        for task in range(tasks):
            y = x
            for _ in range(steps):
                value = loss(y, x, (support[0][task], support[1][task]))
                g = torch.autograd.grad(value, list(y.values()), create_graph=True)
                y = {name: leaf - FEW_SHOT_LR * part for (name, leaf), part in zip(y.items(), g, strict=True)}
            value = loss(y, x, (query[0][task], query[1][task])) / tasks
            found = torch.autograd.grad(value, list(x.values()))
            total = [each + part for each, part in zip(total, found, strict=True)]
        return total

    known = engines(device, smoke=smoke)
    found = {"torch by hand, task after task": by_hand, "eager, graph": ours(known["eager"], "graph")}
    found |= {name: ours(engine, "iterates") for name, engine in known.items()}
    return found, sum(leaf.numel() for leaf in start.values())
