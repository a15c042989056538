"""The lists that the conformance matrix runs over. Estimators are the entries of bilevel.testing; adding an
optimizer or a problem adds one line here."""

import torch

import bilevel as bl
from bilevel import testing

D = torch.float64

ENTRIES = {entry.label: entry for entry in testing.ENTRIES}
EXACT = {label: entry.estimator for label, entry in ENTRIES.items() if entry.exact}
"""The gradient of the K-step program."""
AT_SOLUTION = {
    label: entry.estimator
    for label, entry in ENTRIES.items()
    if entry.target == "solution" and entry.settles == 1 and entry.on_quadratic is None
}
"""Estimates of the hypergradient at the inner solution, with accurate linear solves, in one call."""
BY_ROUNDS = {label for label, entry in ENTRIES.items() if entry.settles > 1}
"""Those that carry what others solve for: at the first round v is 0 and the estimate that of f alone."""
RANDOM = {label: entry.estimator for label, entry in ENTRIES.items() if entry.variance is not None}
"""Those that draw: another chunk of tasks is another draw."""
ALIKE = {
    *("implicit gmres", "implicit bicgstab", "implicit normal cg", "implicit chebyshev", "T1-T2, half"),
    *("implicit cg, nystrom preconditioner", "forward gradient, normal", "gamma decay, running", "iterates last 2"),
    *("saba", "fsla", "meha", "lv-hba", "persistent evolution", "pbgd, gradient norm", "segments last 4"),
}
"""Those that share their code with another entry, left out of wide matrices (engines, tasks, states, blocks,
forecasts); values, calls, memory and contract of all of them are tested."""
ESTIMATORS = {
    **{label: entry.estimator for label, entry in ENTRIES.items() if label not in ALIKE},
    # The accurate series takes 2,500 products: too many for a matrix of forecasts.
    "implicit neumann": bl.Implicit(bl.Neumann(steps=30, step_size=0.5)),
    # (Where GMRES stops is not seen without numbers.)
    "fixed point": bl.estimators.FixedPoint(bl.Neumann(steps=30, step_size=1.0)),
}
OPTIMIZERS = {
    "sgd": bl.SGD(0.3),
    "momentum": bl.SGD(0.1, momentum=0.8),
    "nesterov": bl.SGD(0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adam": bl.Adam(0.05),
    "adamw": bl.AdamW(0.05, weight_decay=0.1),
    "learned lr": bl.SGD(lr=lambda x: x["log_lr"].exp(), momentum=0.5),
}


def weighted_net(dtype=D, device="cpu"):
    """Data weights and a learned decay on a two-layer net; x enters the inner loss, y_0 is given."""
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(24, 5, generator=g, dtype=D), torch.randint(0, 3, (24,), generator=g)
    outer = {
        "weights": 0.1 * torch.randn(24, generator=g, dtype=D),
        "decay": torch.tensor(-3.0, dtype=D),
        "log_lr": torch.tensor(-1.5, dtype=D),
    }
    inner = {"a": 0.5 * torch.randn(5, 4, generator=g, dtype=D), "b": 0.5 * torch.randn(4, 3, generator=g, dtype=D)}

    def logits(y, inputs):
        return torch.tanh(inputs @ y["a"]) @ y["b"]

    def inner_loss(y, x, batch):
        inputs, labels = batch
        losses = torch.nn.functional.cross_entropy(logits(y, inputs), labels, reduction="none")
        return (x["weights"][: len(labels)].sigmoid() * losses).mean() + x["decay"].exp() * sum(
            leaf.square().sum() for leaf in y.values()
        )

    def outer_loss(y, x, batch):
        return torch.nn.functional.cross_entropy(logits(y, batch[0]), batch[1]) + 0.01 * x["weights"].square().sum()

    X, move = X.to(device, dtype), {"device": device, "dtype": dtype}
    Y = Y.to(device)
    batches = bl.Batches(inner=[X[:16], Y[:16]], outer=[X[16:], Y[16:]])
    to = {k: v.to(**move) for k, v in outer.items()}
    return bl.Problem(inner_loss, outer_loss), to, {k: v.to(**move) for k, v in inner.items()}, batches


def meta_start(dtype=D, device="cpu"):
    """MAML-like: x is the start and also enters through a proximal term."""
    problem, _, inner, batches = weighted_net(dtype, device)
    cross_entropy = torch.nn.functional.cross_entropy

    def logits(y, inputs):
        return torch.tanh(inputs @ y["a"]) @ y["b"]

    problem = bl.Problem(
        lambda y, x, b: cross_entropy(logits(y, b[0]), b[1]),
        lambda y, x, b: cross_entropy(logits(y, b[0]), b[1]),
        init=lambda x, b: x,
    )
    return bl.proximal(problem, 0.7), inner, None, batches


PROBLEMS = {"weighted net": weighted_net, "meta start": meta_start}
