"""Found by an outsider's attack on many processes: losses that are means where the first step begins and nowhere else,
settings that differ between ranks, data that end on one rank.
"""

import pytest
import torch
from torch.nn.functional import batch_norm, cross_entropy

import bilevel as bl

D = torch.float64
COUNT = 12


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


ROWS, LABELS = draws(COUNT, 4), torch.randint(0, 3, (COUNT,), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=D)
MASK = (torch.rand(COUNT, generator=torch.Generator().manual_seed(2)) < 0.6).to(D)
BATCH = {"rows": ROWS, "labels": LABELS, "mask": MASK, "index": torch.arange(COUNT)}


def each(y, batch):
    return cross_entropy(batch["rows"] @ y, batch["labels"], reduction="none")


def plain(y, x, batch):
    return (x[batch["index"]].sigmoid() * each(y, batch)).mean() + 0.1 * y.square().sum()


def by_class(y, x, batch):
    return cross_entropy(batch["rows"] @ y, batch["labels"], weight=WEIGHTS) + plain(y, x, batch)


def masked(y, x, batch):
    return (batch["mask"] * x[batch["index"]].exp() * each(y, batch)).sum() / batch["mask"].sum()


def a_share_of_a_penalty(y, x, batch):
    return plain(y, x, batch) + y.square().sum() / len(batch["labels"])


def normalized_weights(y, x, batch):
    weights = x[batch["index"]].sigmoid()
    return (weights * each(y, batch)).sum() / weights.sum()


def normalized_rows(y, x, batch):
    normal = batch_norm(batch["rows"], None, None, training=True)
    return cross_entropy(normal @ y, batch["labels"]) + plain(y, x, batch)


def summed(y, x, batch):
    return (x[batch["index"]].sigmoid() * each(y, batch)).sum()


def prototypes(x, batch):
    z = batch["rows"] @ x[:4, None]
    return torch.stack([z[batch["labels"] == k].sum() / ((batch["labels"] == k).sum() + 1) for k in range(3)])


def to_prototypes(y, x, found):
    return (y * found).sum().square() + (y - x[0]).square().mean()


def gram(x, batch):
    """Of no row, and as large as a batch of three rows."""
    z = batch["rows"] @ x.reshape(4, 3)
    return {"gram": z.T @ z / len(z), "cross": (z * batch["labels"][:, None]).mean(0)}


def quadratic(y, x, found):
    w = y[0]
    return w @ found["gram"] @ w - 2 * w @ found["cross"] + y.square().sum()


NO_MEANS = {
    "class weights": (by_class, COUNT, {}),
    "a mask": (masked, COUNT, {}),
    "a share of a penalty": (a_share_of_a_penalty, COUNT, {}),
    "normalized weights": (normalized_weights, COUNT, {}),
    "normalized rows": (normalized_rows, COUNT, {}),
    "prototypes": (to_prototypes, COUNT, {"features": prototypes}),
    "a sum of one row": (summed, 2, {}),
    "class weights of one row": (by_class, 2, {}),
}


def hypergradient(ranks, loss, rows=COUNT, *, count=None, check=True, x=None, **more):
    batch = {name: leaf[:rows] for name, leaf in BATCH.items()}
    problem = bl.Problem(loss, loss if more or count else lambda y, x, b: each(y, b).mean(), **more)
    batches = bl.Batches(batch, batch)
    if ranks is not None:
        problem = bl.distributed.data_parallel(problem, ranks, count, check=check)
        batches = bl.distributed.split(batches, ranks)
    outer, inner = torch.zeros(COUNT, dtype=D) if x is None else x, torch.zeros(4, 3, dtype=D)
    solver = bl.Descent(bl.SGD(0.1), 3)
    return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())


def said(call):
    try:
        return call()
    except (ValueError, RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def refusals(ranks):
    return {
        name: str(said(lambda loss=loss, rows=rows, more=more: hypergradient(ranks, loss, rows, **more).status))
        for name, (loss, rows, more) in NO_MEANS.items()
    }


def test_what_is_a_mean_at_the_start_alone_is_refused(ranks):
    for found in ranks.run(2, refusals):
        for name in NO_MEANS:
            assert "loss is no mean over the examples" in found[name], (name, found[name])


def dropped(y, x, batch):
    keep = torch.bernoulli(torch.full((len(batch["rows"]),), 0.5, dtype=D))
    return (keep * x[batch["index"]].sigmoid() * each(y, batch)).mean()


def accepted(ranks):
    weighed = lambda batch: int(batch["mask"].sum())  # noqa: E731
    return [
        hypergradient(ranks, quadratic, features=gram, x=draws(COUNT, seed=3)).grad,
        hypergradient(ranks, masked, count=weighed).grad,
        hypergradient(ranks, dropped).grad.shape,  # (not refused for another mask at each call)
    ]


def test_means_of_other_kinds_are_accepted(ranks):
    expected = accepted(None)
    for found in ranks.run(4, accepted):
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
        assert found[2] == (COUNT,)


SETTINGS = {
    "estimator.nu": lambda last: {"estimator": bl.FirstOrderCorrected((0.1, 0.01)[last])},
    "estimator.last": lambda last: {"estimator": bl.Unrolled(last=1 + last)},
    "estimator.linear.max_steps": lambda last: {"estimator": bl.Implicit(bl.CG(3 + last))},
    "solver.optimizer.lr": lambda last: {"solver": bl.Descent(bl.SGD((0.1, 0.2)[last]), 3)},
    "weights.weights[0]": lambda last: {"weights": bl.GivenWeights([1 + last, 2, 2, 1])},
}


def tasks_with_settings(ranks):
    problem = bl.Problem(lambda y, x, b: (y - x * b) ** 2 + 0.1 * y**4, lambda y, x, b: (y - b) ** 2)
    goals, found = torch.arange(2, dtype=D) + ranks.rank, {}
    for name, setting in SETTINGS.items():
        given = {
            "estimator": bl.Unrolled(),
            "solver": bl.Descent(bl.SGD(0.1), 3),
            "weights": None,
            **setting(ranks.rank),
        }
        estimator = bl.TaskMean(given["estimator"], weights=given["weights"], group=ranks)
        found[name] = said(
            lambda given=given, estimator=estimator: str(
                bl.hypergradient(
                    problem,
                    torch.tensor(0.3, dtype=D),
                    torch.zeros(2, dtype=D),
                    bl.Batches(goals, goals),
                    solver=given["solver"],
                    estimator=estimator,
                ).status
            )
        )
    return found


def test_settings_that_differ_between_the_ranks_of_tasks_are_refused(ranks):
    for found in ranks.run(2, tasks_with_settings):
        for name in SETTINGS:
            assert "do different things" in found[name], (name, found[name])
            assert f"rank 0 has {name} " in found[name]


def loops(ranks, what):
    """Rank 1 has two batches; the other has three."""
    problem = bl.distributed.data_parallel(bl.Problem(plain, plain), ranks)
    batches = bl.distributed.split(bl.Batches(BATCH, BATCH), ranks)

    def loader():
        for k in range(3):
            if k == 2 and ranks.rank == 1:
                if what == "ends":
                    return
                raise KeyError("no such file")
            yield batches

    x = torch.zeros(COUNT, dtype=D, requires_grad=True)
    steps = bl.iterate(
        problem,
        x,
        torch.zeros(4, 3, dtype=D),
        loader(),
        solver=bl.Descent(bl.SGD(0.1), 2),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([x], 0.1),
    )
    error = said(lambda: sum(1 for _ in steps))
    return str(error)


@pytest.mark.parametrize(
    ("what", "needed"),
    [
        ("ends", ("RankError: the data of another rank", "RankError: this rank's data have ended")),
        ("fails", ("RankError: another rank failed", "KeyError")),
    ],
)
def test_data_that_end_or_fail_on_one_rank_do_so_on_all(ranks, what, needed):
    for words, found in zip(needed, ranks.run(2, loops, what), strict=True):
        assert found.startswith(words), found


def drawing(ranks, kind):
    """A loop of an estimator that draws, each rank with a seed of its own, its losses inside something else."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    torch.manual_seed(ranks.rank)

    def off(y, x, rows):
        return (rows[0] @ y - rows[1]).square().mean() + (x.exp() * y.square()).sum()

    split = bl.distributed.data_parallel(bl.Problem(off, off), ranks)
    if kind == "a function":
        split = bl.Problem(lambda y, x, rows: split_loss(y, x, rows) + 0, off)
        split_loss = bl.distributed.data_parallel(bl.Problem(off, off), ranks).inner_loss
    x = torch.zeros(3, requires_grad=True)
    loop = bl.OuterLoop(
        split,
        x,
        torch.zeros(3),
        [bl.distributed.split(bl.Batches(whole, whole), ranks)] * 3,
        solver=bl.Descent(bl.SGD(0.1), 5),
        estimator=bl.estimators.ForwardGradient(),
        optimizer=torch.optim.SGD([x], 0.1),
        precision=bl.loop.MixedPrecision(torch.bfloat16) if kind == "precision" else None,
    )
    try:
        assert len(list(loop)) == 3
    except ValueError as error:
        return str(error)
    return x.tolist()


@pytest.mark.parametrize("kind", ["precision", "a function"])
def test_split_losses_inside_of_something_are_seen_or_refused(ranks, kind):
    """Once each rank drew its own directions there, and x differed between ranks with status OK."""
    first, second = ranks.run(2, drawing, kind)
    assert first == second
    assert isinstance(first, str) == (kind == "a function"), first
    assert isinstance(first, list) or "Put data_parallel() outside" in first
