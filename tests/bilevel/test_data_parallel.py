"""Data in parallel: the examples split over ranks give what one process gives with all of them, for every estimator;
what cannot be right is refused, by every rank; a rank that fails is everyone's error.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import warnings

import pytest
import torch
import torch.distributed as dist
from catalogue import ENTRIES
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.space import bits
from bilevel.testing.ranks import Pool

D = torch.float64
SEED = 0


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def labels(count):
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(1))


def sgd(steps, rate=0.5):
    return bl.Descent(bl.SGD(rate), steps)


def split_problem(problem, ranks, **more):
    return problem if ranks is None else bl.distributed.data_parallel(problem, ranks, **more)


def part(batches, ranks, dim=0):
    return batches if ranks is None else bl.distributed.split(batches, ranks, dim)


def call(problem, outer, inner, batches, solver, estimator, **more):
    """A result as a tree of tensors and words."""
    torch.manual_seed(SEED)
    hg = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator, **more)
    state = None if hg.state is None else hg.state.to_dict()
    return {
        "grad": hg.grad,
        "inner": hg.inner,
        "losses": [hg.outer_loss, hg.inner_loss],
        "status": hg.status.name,
        "calls": hg.stats["calls"],
        "state": state,
    }, hg.state


def close(found, expected, where, *, rtol=1e-10):
    """Trees of tensors to rounding, relative to the largest entry; everything else exactly."""
    ours, theirs = (pytree.tree_flatten_with_path(value)[0] for value in (found, expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs], where
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        name = f"{where}{pytree.keystr(path)}"
        if isinstance(other, torch.Tensor) and other.is_floating_point():
            bound = rtol * (other.abs().max().item() if other.numel() else 0.0)
            torch.testing.assert_close(one, other, rtol=0, atol=max(bound, 1e-13), msg=lambda m, n=name: f"{n}: {m}")
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), name
        else:
            assert one == other, name


def same_bits(found):
    """What every rank has is the same to the bit."""
    first, *others = (pytree.tree_leaves(each) for each in found)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


# --- every estimator


def reweighted():
    """One weight for each training example by its index, and a decay: strongly convex in y."""

    def inner_loss(y, x, batch):
        losses = cross_entropy(batch[0] @ y["w"] + y["b"], batch[1], reduction="none")
        ridge = (0.3 + x["decay"].exp()) * (y["w"].square().sum() + y["b"].square().sum()) / 2
        return (x["weights"][batch[2]].sigmoid() * losses).mean() + ridge

    def outer_loss(y, x, batch):
        return cross_entropy(batch[0] @ y["w"] + y["b"], batch[1]) + 0.01 * x["weights"].square().sum()

    return bl.Problem(inner_loss, outer_loss)


def posed():
    """7 inner and 5 outer rows: 2, 2, 2, 1 and 2, 1, 1, 1 on four ranks."""
    inputs, targets = draws(12, 3), labels(12)
    outer = {"weights": 0.5 * draws(7, seed=2), "decay": torch.tensor(-1.0, dtype=D)}
    inner = {"w": 0.3 * draws(3, 2, seed=3), "b": torch.zeros(2, dtype=D)}
    train = (inputs[:7], targets[:7], torch.arange(7))
    return outer, inner, bl.Batches(train, (inputs[7:], targets[7:]), index=(0, 0))


def started():
    """x is the start: for an estimator that sees no inner loss."""
    _, inner, batches = posed()

    def loss(y, x, batch):
        return cross_entropy(batch[0] @ y["w"] + y["b"], batch[1])

    return bl.Problem(loss, loss, init=lambda x, b: x), inner, None, dataclasses.replace(batches, inner=batches.outer)


def every_estimator(ranks):
    """Each at a small budget, and once more with the state that it left."""
    outer, inner, batches = posed()
    problem, found = split_problem(reweighted(), ranks), {}
    for label, entry in ENTRIES.items():
        arguments = problem, outer, inner, part(batches, ranks)
        if bl.Path.INNER_LOSS not in entry.sees:
            whole, *variables, data = started()
            arguments = split_problem(whole, ranks), *variables, part(data, ranks)
        first, state = call(*arguments, sgd(2), entry.at(3))
        found[label] = [first]
        if state is not None:
            found[label].append(call(*arguments, sgd(2), entry.at(3), state=state)[0])
    return found


@functools.cache
def alone(function):
    """What one process finds, with the whole data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(None)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_estimator_gives_what_one_process_gives(ranks, count):
    expected, found = alone(every_estimator), ranks.run(count, every_estimator)
    same_bits(found)
    for label, one in expected.items():
        # A difference quotient over nu takes rounding with it.
        close(found[0][label], one, label, rtol=1e-7 if ENTRIES[label].bias in ("nu", "nu^2", "nu^4") else 1e-10)


# --- programs


def featured():
    """A network of x embeds the rows; y is the head."""
    outer = {"net": draws(3, 3, seed=4), "decay": torch.tensor(-1.0, dtype=D)}

    def loss(y, x, batch):
        return cross_entropy(batch[0] @ y["w"], batch[1]) + x["decay"].exp() * y["w"].square().sum()

    problem = bl.Problem(loss, loss, features=lambda x, batch: (torch.tanh(batch[0] @ x["net"]), batch[1]))
    return problem, outer, {"w": draws(3, 2, seed=5)}


SOME = {
    "unrolled": bl.Unrolled("graph"),
    "iterates": bl.Unrolled("iterates"),
    "implicit": bl.Implicit(bl.CG(4)),
    "memory reduced": bl.MemoryReduced(4),
    "forward": bl.estimators.Forward(),
    "corrected": bl.FirstOrderCorrected(),
    "evolution": ENTRIES["evolution"].estimator,
}


def features_and_ranks_without_rows(ranks):
    problem, outer, inner = featured()
    inputs, targets = draws(12, 3), labels(12)
    problem, found = split_problem(problem, ranks), {}
    for rows in (7, 3):
        batches = part(bl.Batches((inputs[:rows], targets[:rows]), (inputs[-2:], targets[-2:])), ranks)
        for name, each in SOME.items():
            found[f"{name}, {rows} rows"] = call(problem, outer, inner, batches, sgd(3), each)[0]
    return found


def losses_of_another_dtype(ranks):
    """float32 losses of float64 variables, where some ranks have no row to learn it from."""
    outer, inner, batches = posed()
    whole = reweighted()
    problem = bl.Problem(
        lambda *given: whole.inner_loss(*given).float(), lambda *given: whole.outer_loss(*given).float()
    )
    rows = bl.Batches(tuple(each[:1] for each in batches.inner), batches.outer)
    found = call(split_problem(problem, ranks), outer, inner, part(rows, ranks), sgd(3), SOME["unrolled"])[0]
    return {name: found[name] for name in ("status", "losses", "inner")}


def minibatches_of_other_sizes(ranks):
    outer, inner, batches = posed()
    x, y, index = batches.inner
    steps = bl.PerStep([(x[a:b], y[a:b], index[a:b]) for a, b in ((0, 3), (3, 4), (0, 7))], ragged=True)
    batches = part(bl.Batches(steps, batches.outer), ranks)
    problem = split_problem(reweighted(), ranks)
    return {name: call(problem, outer, inner, batches, sgd(3), SOME[name])[0] for name in ("iterates", "implicit")}


def pulled_to_the_start(ranks):
    problem, outer, _, batches = started()
    both = {
        "before": split_problem(bl.proximal(problem, 0.7), ranks),
        "after": bl.proximal(split_problem(problem, ranks), 0.7),
    }
    bootstrapped = bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(2))
    each = {**{name: SOME[name] for name in ("unrolled", "implicit", "corrected")}, "bootstrapped": bootstrapped}
    return {
        f"{name}, {when}": call(made, outer, None, part(batches, ranks), sgd(3), each[name])[0]
        for name in each
        for when, made in both.items()
    }


def many_tasks(ranks):
    """Each task's rows split: dimension 1."""
    rows, goals = draws(3, 7, 2), draws(3, 7, seed=1)

    def loss(y, x, batch):
        return (batch[0] @ y["w"] - batch[1]).square().mean() + 0.1 * x["l"].exp() * (y["w"] - x["w"]).square().sum()

    problem = split_problem(bl.Problem(loss, loss, init=lambda x, b: {"w": x["w"]}), ranks)
    outer = {"w": draws(2, seed=2), "l": torch.tensor(0.3, dtype=D)}
    batches = part(bl.Batches((rows[:, :4], goals[:, :4]), (rows[:, 4:], goals[:, 4:])), ranks, 1)
    converge = bl.Converge(bl.SGD(0.2), tol=1e-6, max_steps=300)
    return {
        f"{name}, {chunk}": call(problem, outer, None, batches, solver, bl.TaskMean(SOME[name], chunk=chunk))[0]
        for chunk, name, solver in (
            (None, "unrolled", sgd(2, 0.2)),
            (2, "implicit", converge),
            (1, "corrected", sgd(2, 0.2)),
        )
    }


def features_of_tasks(ranks):
    """Embeddings of each task's rows, of which one rank has one row and the other two."""
    rows, goals = draws(3, 7, 2), draws(3, 7, seed=1)

    def loss(y, x, batch):
        return (batch[0] @ y["w"] - batch[1]).square().mean() + 0.1 * (y["w"] - x["w"]).square().sum()

    def features(x, batch):
        return torch.tanh(batch[0] @ x["net"]), batch[1]

    problem = split_problem(bl.Problem(loss, loss, init=lambda x, b: {"w": x["w"]}, features=features), ranks)
    outer = {"w": draws(2, seed=2), "net": draws(2, 2, seed=3)}
    batches = part(bl.Batches((rows[:, :3], goals[:, :3]), (rows[:, 4:], goals[:, 4:])), ranks, 1)
    return {
        f"{name}, {chunk}": call(problem, outer, None, batches, sgd(2, 0.2), bl.TaskMean(SOME[name], chunk=chunk))[0]
        for chunk, name in ((None, "iterates"), (2, "memory reduced"), (1, "corrected"))
    }


def other_loops(ranks):
    """Loops that stop by themselves, learned hyper-parameters, searches along a line, no step at all."""
    outer, inner, batches = posed()
    rates = {**outer, "lr": torch.tensor(-1.0, dtype=D), "wd": torch.tensor(-2.0, dtype=D)}
    learned = bl.SGD(lr=lambda x: x["lr"].exp(), momentum=0.5, weight_decay=lambda x: x["wd"].exp())
    problem, batches = split_problem(reweighted(), ranks), part(batches, ranks)
    converge = bl.Converge(bl.SGD(0.5), tol=1e-8, max_steps=200)
    wolfe = bl.inner.LBFGS(memory=3, search=bl.inner.Wolfe())
    cases = {
        "converge": (outer, converge, SOME["implicit"]),
        "converge, unrolled": (outer, converge, SOME["iterates"]),
        "learned": (rates, bl.Descent(learned, 3), SOME["unrolled"]),
        "learned, forward": (rates, bl.Descent(learned, 3), SOME["forward"]),
        "adamw": (outer, bl.Descent(bl.AdamW(0.1, weight_decay=0.1), 3), bl.Unrolled("segments")),
        "wolfe": (outer, bl.Descent(wolfe, 3), SOME["unrolled"]),
        "newton": (outer, bl.Descent(bl.inner.Newton(bl.CG(4)), 2), SOME["implicit"]),
        "no step": (outer, sgd(0), SOME["unrolled"]),
        "no step, implicit": (outer, sgd(0), SOME["implicit"]),
        "a budget": (outer, sgd(6), bl.Unrolled("auto", budget=20_000)),
    }
    return {name: call(problem, x, inner, batches, solver, each)[0] for name, (x, solver, each) in cases.items()}


def unused_tensors(ranks):
    """None stays None: a warning for an outer tensor that nothing uses, and none for an inner one."""
    outer, inner, batches = posed()
    outer, inner = {**outer, "nothing": torch.ones(2, dtype=D)}, {**inner, "frozen": torch.ones(3, dtype=D)}
    problem, said = split_problem(reweighted(), ranks), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("unrolled", "implicit"):
            said.append(call(problem, outer, inner, part(batches, ranks), sgd(3), SOME[name])[0])
    said += [str(each.message) for each in caught if "influences neither" in str(each.message)]
    assert len(said) == 4
    return said


def used_on_one_rank_alone(ranks):
    """Parts of x and y, and all curvature, that the rows of one rank alone use."""
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-1.0, 1.0], [-2.0, 3.0]], dtype=D)

    def one(y, x, row):
        if row[0] > 0:
            return (row @ y["p"] - x["a"]).square() * x["a"].exp() + y["p"].pow(4).sum()
        return 0.1 * y["n"].sum()

    def inner_loss(y, x, batch):
        return torch.stack([one(y, x, row) for row in batch]).mean()

    def outer_loss(y, x, batch):
        return (y["p"] - 1).square().sum() + y["n"].square().sum() + 0 * batch.mean()

    problem = split_problem(bl.Problem(inner_loss, outer_loss), ranks)
    outer, inner = {"a": torch.tensor(0.3, dtype=D)}, {"p": draws(2), "n": draws(2, seed=1)}
    each = {name: SOME[name] for name in SOME if name != "implicit"} | {"dense": bl.Implicit(bl.CG(2, damping=0.1))}
    batches = part(bl.Batches(rows, rows), ranks)
    return {name: call(problem, outer, inner, batches, sgd(3, 0.05), each[name])[0] for name in each}


def rematerialized(ranks):
    outer, inner, batches = posed()
    block = bl.rematerialize(lambda y, rows: torch.tanh(rows @ y["w"]) + y["b"])

    def inner_loss(y, x, batch):
        losses = cross_entropy(block(y, batch[0]), batch[1], reduction="none")
        return (x["weights"][batch[2]].sigmoid() * losses).mean() + x["decay"].exp() * y["w"].square().sum()

    problem = split_problem(bl.Problem(inner_loss, reweighted().outer_loss), ranks)
    each = {name: SOME[name] for name in ("unrolled", "iterates", "implicit")}
    return {name: call(problem, outer, inner, part(batches, ranks), sgd(3), each[name])[0] for name in each}


def outer_steps(ranks):
    """Steps of an outer loop with a warm state, then calls without grad and inside of autocast, and `adapt`."""
    outer, inner, batches = posed()
    outer = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    problem, batches = split_problem(reweighted(), ranks), part(batches, ranks)
    warm = bl.MemoryReduced(4, warm_inner=True, warm_adjoint=True)
    optimizer = torch.optim.Adam(outer.values(), lr=0.1)
    loop = bl.iterate(problem, outer, inner, [batches] * 3, solver=sgd(3), estimator=warm, optimizer=optimizer)
    found = {"losses": [step.outer_loss for step in loop], "outer": {k: v.detach() for k, v in outer.items()}}
    with torch.no_grad():
        found["no grad"] = call(problem, outer, inner, batches, sgd(3), SOME["unrolled"])[0]
    moved = bl.adapt(problem, outer, inner, batches, solver=sgd(3))
    return {**found, "adapted": moved.inner, "there": moved.outer_loss}


PROGRAMS = [
    *(features_and_ranks_without_rows, minibatches_of_other_sizes, pulled_to_the_start, many_tasks, features_of_tasks),
    *(losses_of_another_dtype, other_loops, unused_tensors, used_on_one_rank_alone, rematerialized, outer_steps),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_gives_what_one_process_gives(ranks, program):
    count = 4 if program is features_and_ranks_without_rows else 2
    expected, found = alone(program), ranks.run(count, program)
    assert not any(type(each).__name__ == "Failure" for each in found), found
    same_bits(found)
    close(found[0], expected, program.__name__, rtol=1e-7)


def in_a_dtype(ranks, dtype):
    *variables, batches = posed()
    outer, inner = pytree.tree_map(lambda leaf: leaf.to(dtype), variables)
    train, valid = batches.inner, batches.outer
    batches = bl.Batches((train[0].to(dtype), *train[1:]), (valid[0].to(dtype), valid[1]))
    problem = split_problem(reweighted(), ranks)
    return [
        call(problem, outer, inner, part(batches, ranks), sgd(3), SOME[name])[0]["grad"]
        for name in ("unrolled", "implicit")
    ]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_narrow_numbers_lose_rounding_only(ranks, dtype, rtol):
    found = ranks.run(2, in_a_dtype, dtype)
    same_bits(found)
    close(found[0], in_a_dtype(None, dtype), str(dtype), rtol=rtol)


def tasks_and_examples(ranks):
    """A mesh of two by two: tasks over its rows, the examples of a task over its columns."""
    rows, goals = draws(3, 7, 2), draws(3, 7, seed=1)

    def loss(y, x, batch):
        return (batch[0] @ y["w"] - batch[1]).square().mean() + 0.1 * (y["w"] - x["w"]).square().sum()

    problem = bl.Problem(loss, loss, init=lambda x, b: {"w": x["w"]})
    outer, batches = {"w": draws(2, seed=2)}, bl.Batches((rows[:, :4], goals[:, :4]), (rows[:, 4:], goals[:, 4:]))
    if ranks is None:
        return bl.hypergradient(
            problem, outer, None, batches, solver=sgd(2), estimator=bl.TaskMean(SOME["unrolled"])
        ).grad
    groups = {members: dist.new_group(list(members)) for members in ((0, 1), (2, 3), (0, 2), (1, 3))}
    mine = [bl.distributed.Ranks(group) for members, group in groups.items() if ranks.rank in members]
    examples, tasks = mine
    estimator = bl.TaskMean(SOME["unrolled"], group=tasks)
    own = part(part(batches, tasks), examples, 1)
    return bl.hypergradient(split_problem(problem, examples), outer, None, own, solver=sgd(2), estimator=estimator).grad


def test_tasks_and_examples_are_split_over_a_mesh(ranks):
    found = ranks.run(4, tasks_and_examples)
    same_bits(found)
    close(found[0], tasks_and_examples(None), "mesh")


# --- what it costs


def sums_taken(ranks):
    """How many numbers each all-reduce of each oracle carries."""
    outer, inner, batches = posed()
    from bilevel.estimators.base import Instance

    problem, sizes, taken = split_problem(reweighted(), ranks), [], dist.all_reduce

    def counted(tensor, *arguments, **keywords):
        sizes.append(tensor.numel())
        return taken(tensor, *arguments, **keywords)

    instance = Instance(problem, outer, inner, part(batches, ranks), sgd(1))
    oracles, found = instance.oracles, {}
    dist.all_reduce = counted
    try:

        def asked(name, oracle):
            sizes.clear()
            answer = oracle()
            found[name] = list(sizes)
            return answer

        asked("inner loss", lambda: oracles.inner_loss(inner, 1))
        asked("inner gradient", lambda: oracles.inner_gradient(inner, 0))
        asked("outer gradient", lambda: oracles.outer_gradient(inner))
        linear = asked("linearize", lambda: oracles.linearize(inner, 1))
        v = tuple(inner.values())
        asked("product", lambda: linear.matvec(v))
        asked("dot product", lambda: oracles.space.dot(v, v))
        asked("mixed", lambda: linear.mixed(v))
    finally:
        dist.all_reduce = taken
    return found


def test_a_gradient_takes_one_sum_of_p_numbers_and_a_dot_product_none(ranks):
    p = q = 8 + 1 + 3  # y and x have 8 numbers in 2 tensors each; a tie, and a flag for each of the three
    for found in ranks.run(2, sums_taken):
        assert found == {
            "inner loss": [7],
            "inner gradient": [7, p],
            "outer gradient": [7, q, p],
            "linearize": [7, p],
            "product": [p],
            "dot product": [],
            "mixed": [q, p],
        }


def sums_of_a_step(ranks):
    """What one inner step more sends: the sizes of its all-reduces but those of losses."""
    outer, inner, batches = posed()
    outer["weights"] = outer["weights"].repeat(3)  # so that P and Q differ
    problem, sizes, taken, found = split_problem(reweighted(), ranks), [], dist.all_reduce, {}

    def counted(tensor, *arguments, **keywords):
        sizes.append(tensor.numel())
        return taken(tensor, *arguments, **keywords)

    dist.all_reduce = counted
    try:
        for name in ("unrolled", "iterates", "implicit", "corrected"):
            seen = []
            for steps in (2, 2, 3):  # (the first call learns what there is to know of the problem)
                sizes.clear()
                call(problem, outer, inner, part(batches, ranks), sgd(steps), SOME[name])
                seen.append(collections.Counter(size for size in sizes if size != 7))
            found[name] = dict(seen[2] - seen[1])
    finally:
        dist.all_reduce = taken
    return found


def test_a_step_sends_what_the_page_on_many_gpus_says(ranks):
    p, q = 8 + 1 + 3, 22 + 1 + 3
    for found in ranks.run(2, sums_of_a_step):
        assert found == {
            "unrolled": {p: 2, q: 1},
            "iterates": {p: 3, q: 1},
            "implicit": {p: 1},
            "corrected": {p: 4},
        }


# --- random numbers


def masked(ranks, seed):
    """A loss that draws, on streams that differ between ranks."""
    outer, inner, batches = posed()
    outer = {"weights": outer["weights"]}
    drawn = []

    def inner_loss(y, x, batch):
        mask = torch.bernoulli(torch.full((len(batch[0]), 1000), 0.5))
        drawn.append(mask.mean().item())
        rows = batch[0] * mask[:, :3]
        return cross_entropy(rows @ y["w"], batch[1]) + x["weights"][batch[2]].mean() * y["w"].square().sum()

    problem, found = split_problem(bl.Problem(inner_loss, reweighted().outer_loss), ranks), {}
    for name in ("unrolled", "iterates", "forward"):
        torch.manual_seed(seed + ranks.rank)
        hg = bl.hypergradient(problem, outer, inner, part(batches, ranks), solver=sgd(3), estimator=SOME[name])
        found[name] = hg.grad
    return found, drawn[-1]


def test_masks_are_each_ranks_own_and_drawn_again_where_a_step_is_rebuilt(ranks):
    (one, mask), (other, other_mask) = ranks.run(2, masked, SEED)
    assert mask != other_mask
    same_bits([one, other])
    for name in ("iterates", "forward"):
        close(one[name], one["unrolled"], name)


def estimators_draw(ranks, seed):
    """Directions, and a start, drawn where every rank is at another point of its stream."""
    outer, inner, batches = posed()
    torch.manual_seed(seed + ranks.rank)
    before = torch.get_rng_state()
    whole = reweighted()
    problem = split_problem(whole, ranks)
    bl.hypergradient(problem, outer, inner, part(batches, ranks), solver=sgd(2), estimator=SOME["unrolled"])
    untouched = torch.equal(before, torch.get_rng_state())
    random = dataclasses.replace(
        whole, init=lambda x, b: {"w": torch.randn(3, 2, dtype=D), "b": torch.zeros(2, dtype=D)}
    )
    estimator = bl.estimators.ForwardGradient(3)
    drawn = [
        bl.hypergradient(problem, outer, inner, part(batches, ranks), solver=sgd(2), estimator=estimator).grad,
        bl.hypergradient(
            split_problem(random, ranks), outer, None, part(batches, ranks), solver=sgd(2), estimator=SOME["unrolled"]
        ).inner,
    ]
    return drawn, untouched, torch.rand(1).item()


def test_estimators_and_starts_draw_alike_whatever_the_seeds(ranks):
    (one, untouched, after), (other, _, other_after) = ranks.run(2, estimators_draw, SEED)
    same_bits([one, other])
    assert untouched
    assert after != other_after, "the ranks' own streams go on by themselves"


# --- what is refused


def attempt(ranks, name):
    """A call that must be refused."""
    outer, inner, batches = posed()
    problem, solver, estimator, more = reweighted(), sgd(3), SOME["unrolled"], {}
    rows, last = batches.inner[0], ranks.rank
    cube = bl.Problem(lambda y, x, b: (b @ y - x).square().mean(), lambda y, x, b: (b @ y).mean())
    vector = torch.ones((), dtype=D), torch.ones(3, dtype=D), bl.Batches(rows, rows)
    replace = functools.partial(dataclasses.replace, problem)
    if name == "a sum":
        problem = replace(outer_loss=lambda y, x, b: cross_entropy(b[0] @ y["w"], b[1], reduction="sum"))
    elif name == "weights by place":
        problem = replace(inner_loss=lambda y, x, b: (x["weights"][: len(b[1])] * (b[0] @ y["w"]).sum(1)).mean())
    elif name == "batch normalization":
        norm = torch.nn.BatchNorm1d(2, track_running_stats=False, dtype=D)
        problem = replace(inner_loss=lambda y, x, b: cross_entropy(norm(b[0] @ y["w"]), b[1]))
        batches = dataclasses.replace(batches, inner=tuple(torch.cat([each] * 2) for each in batches.inner))
    elif name == "features that mix rows":
        problem = replace(features=lambda x, b: (b[0] - b[0].mean(0), *b[1:]))
    elif name == "another x":
        outer["weights"][3] += 1e-15 * last
    elif name == "another start":
        inner["w"][0, 0] += 1e-15 * last
    elif name == "another estimator":
        estimator = bl.Unrolled(last=1 + last)
    elif name == "another solver":
        solver = sgd(3 + last)
    elif name == "another state":
        estimator = bl.MemoryReduced(3, warm_inner=True, warm_adjoint=True)
        made, own = split_problem(problem, ranks), part(batches, ranks)
        more["state"] = bl.hypergradient(made, outer, inner, own, solver=solver, estimator=estimator).state
        more["state"].inner["w"].add_(last)
    elif name == "another generator":
        estimator = bl.estimators.ForwardGradient(2, generator=torch.Generator().manual_seed(last))
    elif name == "another number of batches":
        batches = dataclasses.replace(batches, inner=bl.PerStep([batches.inner] * (3 + last)))
    elif name == "a rate that is a rank's own":
        solver = bl.Descent(bl.SGD(lr=Rate(0.1 + 0.1 * last)), 3)
    elif name == "a start from the batch":
        problem, inner = replace(init=lambda x, b: {"w": b[0][:3, :2] * 0, "b": torch.zeros(2, dtype=D)}), None
    elif name == "Gauss-Newton":
        problem, (outer, inner, batches) = cube, vector
        estimator = bl.estimators.GaussNewton(
            bl.CG(3), outputs=lambda y, x, b: b @ y - x, loss=lambda z, x, b: z.square().mean()
        )
    elif name == "least squares":
        problem, (outer, inner, batches) = cube, vector
        solver = bl.Descent(bl.inner.LeastSquares(lambda y, x, b: b @ y - x), 1)
    elif name == "a closed form":
        problem, (outer, inner, batches) = cube, vector
        solver = bl.Descent(bl.inner.ClosedForm(lambda y, x, b: torch.linalg.lstsq(b, x.expand(len(b))).solution), 1)
    elif name == "a constraint on the batch":
        estimator = dataclasses.replace(
            ENTRIES["lv-hba"].estimator, constraint=lambda y, x, b: y["w"].square().sum() * b[0].mean() - 1
        )
    elif name == "a traced loss":
        more["engine"] = bl.Compiled(backend="graph")
    elif name == "no rows to count":
        problem, batches = bl.Problem(lambda y, x, b: y["w"].sum(), problem.outer_loss), bl.Batches(None, batches.outer)
    elif name == "columns of two lengths":
        batches = dataclasses.replace(batches, outer=(batches.outer[0], batches.outer[1][:3]))
    elif name == "no loss":
        problem = replace(inner_loss=lambda y, x, b: None)
    elif name == "a change in place":
        problem = replace(inner_loss=lambda y, x, b: y["w"].mul_(2).sum())
    elif name == "a layer":
        made, own = split_problem(problem, ranks), part(batches, ranks)
        return bl.solution(made, outer, inner, own, solver=solver, estimator=estimator)
    elif name == "tasks over the same ranks":
        estimator = bl.TaskMean(estimator, group=ranks)
    elif name == "twice":
        return split_problem(split_problem(problem, ranks), ranks)
    own = batches if name == "columns of two lengths" else part(batches, ranks)
    return call(split_problem(problem, ranks), outer, inner, own, solver, estimator, **more)


class Rate:
    """Written alike on every rank."""

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return torch.tensor(self.value, dtype=D)

    def __repr__(self):
        return "Rate"


REFUSED = {
    "a sum": "outer_loss is no mean",
    "weights by place": "inner_loss is no mean",
    "batch normalization": "inner_loss is no mean",
    "features that mix rows": "features mix",
    "another x": "given outer that differ",
    "another start": "given inner that differ",
    "another estimator": "given estimator that differ",
    "another solver": "given solver that differ",
    "another state": "given state that differ",
    "another generator": "given estimator that differ",
    "another number of batches": "number of PerStep batches",
    "a rate that is a rank's own": "the result of hypergradient() differs",
    "a start from the batch": "Problem.init looks at the batch",
    "Gauss-Newton": "looks at the batch",
    "least squares": "looks at the batch",
    "a closed form": "looks at the batch",
    "a constraint on the batch": "looks at the batch",
    "a traced loss": "engine that traces",
    "no rows to count": "count=lambda batch",
    "columns of two lengths": "count=lambda batch",
    "no loss": "inner_loss returned None",
    "a change in place": "changed the inner variable in place",
    "a layer": "solution() was given a problem whose data are split",
    "tasks over the same ranks": "split over the same ranks",
    "twice": "split already",
}


def attempts(ranks):
    said = {}
    for name in REFUSED:
        try:
            attempt(ranks, name)
            said[name] = None
        except (ValueError, TypeError, bl.distributed.RankError) as error:
            said[name] = str(error)
    return said


def test_what_cannot_be_right_is_refused_by_every_rank(ranks):
    found = ranks.run(2, attempts)
    for said in found:
        for name, words in REFUSED.items():
            assert said[name] is not None, f"{name} was accepted"
            assert words in said[name], name


def test_arguments_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="Ranks"):
        bl.distributed.data_parallel(reweighted(), None)
    with pytest.raises(TypeError, match="count"):
        bl.distributed.data_parallel(reweighted(), bl.distributed.Ranks(), count=3)


# --- a rank that fails


def failing(ranks, where):
    """Rank 1 raises at its n-th call."""
    outer, inner, batches = posed()
    whole, called = reweighted(), []

    def broken(function, at):
        def inside(*arguments):
            called.append(None)
            if ranks.rank == 1 and len(called) >= at:
                raise KeyError("no such label")
            return function(*arguments)

        return inside

    estimator, dim = SOME["iterates"], 0
    if where == "features":
        problem = dataclasses.replace(whole, features=broken(lambda x, b: b, 1))
    elif where == "tasks":
        problem, estimator, dim = (
            dataclasses.replace(whole, outer_loss=broken(whole.outer_loss, 1)),
            bl.TaskMean(estimator),
            1,
        )
        batches = bl.Batches(*pytree.tree_map(lambda leaf: torch.stack([leaf] * 2), (batches.inner, batches.outer)))
        inner = {name: leaf.expand(2, *leaf.shape) for name, leaf in inner.items()}
    elif where == "an argument":
        problem = whole
        inner = None if ranks.rank == 1 else inner
    else:
        problem = dataclasses.replace(whole, inner_loss=broken(whole.inner_loss, int(where)))
    own = part(batches, ranks, dim)
    bl.hypergradient(split_problem(problem, ranks), outer, inner, own, solver=sgd(3), estimator=estimator)


@pytest.mark.parametrize("where", ["1", "9", "features", "tasks"])
def test_a_loss_that_fails_on_one_rank_is_an_error_on_all(ranks, where):
    first, second = ranks.run(2, failing, where)
    assert (first.kind, second.kind) == ("RankError", "KeyError")
    assert "rank 1 (KeyError: 'no such label')" in first.message


def test_an_argument_that_one_rank_refuses_is_an_error_on_all(ranks):
    first, second = ranks.run(2, failing, "an argument")
    assert (first.kind, second.kind) == ("RankError", "ValueError")
    assert "another rank failed before the arguments were compared" in first.message


def nonfinite(ranks):
    outer, inner, batches = posed()
    rows = batches.inner[0].clone()
    rows[6] = torch.nan  # the last row, which the last rank has
    batches = part(dataclasses.replace(batches, inner=(rows, *batches.inner[1:])), ranks)
    problem, converge = split_problem(reweighted(), ranks), bl.Converge(bl.SGD(0.5), tol=1e-6, max_steps=20)
    return [
        call(problem, outer, inner, batches, solver, each)[0]["status"]
        for solver, each in ((sgd(3), SOME["unrolled"]), (converge, SOME["implicit"]))
    ]


def test_numbers_that_are_not_finite_on_one_rank_are_the_status_of_all(ranks):
    found = ranks.run(2, nonfinite)
    assert found[0] == found[1] == nonfinite(None)
    assert all(bl.Status[name].failed for name in found[0])


def dying(ranks, folder):
    """Rank 1 ends in the middle; rank 0 writes what it is told."""
    outer, inner, batches = posed()
    whole, called = reweighted(), []

    def inner_loss(*arguments):
        called.append(None)
        if ranks.rank == 1 and len(called) == 7:
            os._exit(3)
        return whole.inner_loss(*arguments)

    problem = split_problem(dataclasses.replace(whole, inner_loss=inner_loss), ranks)
    try:
        bl.hypergradient(problem, outer, inner, part(batches, ranks), solver=sgd(9), estimator=SOME["unrolled"])
    except bl.distributed.RankError as error:
        pathlib.Path(folder, "told").write_text(str(error))


def test_a_process_that_ends_is_an_error_on_the_others(tmp_path):
    pool = Pool(20.0)
    try:
        with pytest.raises((EOFError, ConnectionError)):
            pool.run(2, dying, str(tmp_path))
    finally:
        pool.close()
    assert "another process of the group has ended" in (tmp_path / "told").read_text()


# --- the pieces


def shares(ranks):
    batches = bl.Batches(
        inner=bl.PerStep([torch.arange(6).reshape(2, 3), torch.arange(10).reshape(2, 5)], ragged=True),
        outer={"rows": torch.arange(7), "temperature": torch.tensor(2.0), "name": "whole"},
        curvature=torch.arange(3),
        task_ids=list("abcdefg"),
    )
    rows, columns = bl.distributed.split(batches, ranks), bl.distributed.split(batches, ranks, 1)
    return {
        "share": bl.distributed.share(7, ranks),
        "outer": rows.outer,
        "curvature": rows.curvature,
        "ids": rows.task_ids,
        "steps": [each.shape[1] for each in (columns.inner[0], columns.inner[1])],
        "whole": (columns.outer["rows"], columns.task_ids),
    }


def test_split_gives_each_rank_its_rows_and_loses_none(ranks):
    found = ranks.run(4, shares)
    assert [each["share"] for each in found] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert torch.equal(torch.cat([each["outer"]["rows"] for each in found]), torch.arange(7))
    assert [name for each in found for name in each["ids"]] == list("abcdefg")
    assert [each["curvature"].tolist() for each in found] == [[0], [1], [2], []]
    assert [each["steps"] for each in found] == [[1, 2], [1, 1], [1, 1], [0, 1]]
    for each in found:
        assert each["outer"]["temperature"] == 2
        assert each["outer"]["name"] == "whole"
        assert torch.equal(each["whole"][0], torch.arange(7))
        assert each["whole"][1] == list("abcdefg")


def uneven(ranks):
    try:
        bl.distributed.split(bl.Batches((torch.zeros(3), torch.zeros(4)), None), ranks)
    except ValueError as error:
        return str(error)


def test_split_refuses_columns_of_different_lengths(ranks):
    assert all("share(count, ranks)" in said for said in ranks.run(2, uneven))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_fingerprint_tells_bits_apart(dtype):
    base = torch.arange(5000).remainder(7).to(dtype)
    known = [
        *(base, base.roll(2), base[:-1], base.roll(1), base.new_zeros(5000), base.new_ones(4096), base.new_ones(5000)),
        *([] if dtype is torch.bool else [base.new_full((4096,), 2), base.new_full((4096,), 4)]),
    ]
    found = {int(bits.of(leaf)) for leaf in known}
    assert len(found) == len(known)
    assert int(bits.of(base.clone())) == int(bits.of(base))
    assert min(found) >= 0


def test_a_fingerprint_sees_one_bit_of_a_million_numbers():
    leaf = torch.zeros((1 << 20) + 3, dtype=D)
    for place in (0, 40_000, -1):
        changed = leaf.clone()
        changed[place] = 5e-324
        assert int(bits.of(leaf)) != int(bits.of(changed))
