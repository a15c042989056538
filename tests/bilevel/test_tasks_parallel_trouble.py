"""TaskMean(group=) in trouble: failures, ranks at odds, ranks without tasks, states, groups of every kind."""

import copy
import dataclasses
import os
import pathlib
import pickle
import warnings
from typing import Any

import pytest
import torch
from tasks_of_ranks import (
    GOALS,
    SMALL,
    STEPPING,
    D,
    Found,
    T,
    ask,
    goals,
    outcome,
    parted,
    point,
    posed,
    pull,
    same,
    square,
    stacked,
)
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.engine import spans
from bilevel.testing.ranks import Pool


class Unlucky:
    """A loss that fails for the last goal."""

    def __call__(self, y: Tensor, x: dict[str, Tensor], batch: Tensor) -> Tensor:
        if batch[0] == 0.1:
            raise KeyError("the last")
        return pull(y, x, batch)


def failing(ranks: Ranks) -> list[tuple[str, str]]:
    last = ranks.rank == ranks.size - 1
    mine = goals(ranks)
    found = [
        outcome(lambda: ask(ranks, problem=bl.Problem(square, Unlucky(), init=SMALL.init), chunk=1)),
        outcome(lambda: ask(ranks, bl.Batches(mine.inner.float(), mine.outer.tolist()) if last else mine)),
        outcome(lambda: ask(ranks, inner=point()["start"] if last else None)),
        outcome(lambda: ask(ranks, state=3 if last else None)),
        outcome(lambda: ask(ranks, {"inner": 1} if last else mine)),
        outcome(lambda: ask(ranks, bl.Batches(mine.inner, mine.outer[:1].expand(3, 2)) if last else mine)),
        outcome(lambda: ask(ranks, solver=None if last else STEPPING)),
    ]
    return [*found, outcome(lambda: ask(ranks))]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_fails_on_one_rank_fails_on_all_and_the_next_call_is_sound(ranks: Any, count: int) -> None:
    answers = ranks.run(count, failing)
    kinds = ["KeyError", "Exception", "ValueError", "ValueError", "TypeError", "ValueError", "TypeError"]
    for i, kind in enumerate(kinds):
        own, words = answers[-1][i]
        assert own == kind or kind == "Exception", (i, own, words)
        assert own != "RankError"
        for other, said in (answer[i] for answer in answers[:-1]):
            assert other == "RankError", (i, other, said)
            assert f"rank {count - 1} ({own}: {words}" in said
    assert [answer[-1] for answer in answers] == [("", "OK")] * count


def one_bad_status(ranks: Ranks) -> tuple[str, Found]:
    batches = goals(ranks, torch.cat([GOALS[:4], GOALS[4:] * float("inf")]))
    hg = ask(ranks, batches)
    return hg.status.name, Found.of(hg)


def test_the_status_is_the_worst_of_all_ranks(ranks: Any) -> None:
    plain = ask(None, goals(None, torch.cat([GOALS[:4], GOALS[4:] * float("inf")])))
    answers = ranks.run(2, one_bad_status)
    assert plain.status.failed
    assert [status for status, _ in answers] == [plain.status.name] * 2
    assert same(answers[0][1].agreed, answers[1][1].agreed)


def at_odds(ranks: Ranks) -> list[tuple[str, str]]:
    first, x = ranks.rank == 0, point()
    swapped = {"start": x["start"].flip(0), "shift": x["shift"]} if first else x
    rounded = {"start": x["start"] * (1 + 1e-15), "shift": x["shift"]} if first else x
    more = {**x, "another": torch.zeros(3, dtype=D)} if first else x
    single = {name: leaf.float() for name, leaf in x.items()} if first else x
    narrow = parted(bl.Batches(GOALS.float(), GOALS.float()), ranks)
    return [
        outcome(lambda: ask(ranks, outer=swapped)),
        outcome(lambda: ask(ranks, outer=rounded)),
        outcome(lambda: ask(ranks, outer=more)),
        outcome(lambda: ask(ranks, narrow if first else None, outer=single)),
        outcome(lambda: ask(ranks, of=bl.estimators.Forward() if first else bl.Unrolled())),
        outcome(lambda: ask(ranks, solver=bl.Descent(bl.SGD(0.5), 3) if first else STEPPING)),
        outcome(lambda: ask(ranks, weights=bl.GradientSimilarity() if first else None)),
        outcome(lambda: ask(ranks, goals(ranks, GOALS[:0]))),
        outcome(lambda: ask(ranks, chunk=1 if first else 2)),
    ]


def test_ranks_that_do_not_compute_one_thing_are_refused_on_all(ranks: Any) -> None:
    one, other = ranks.run(2, at_odds)
    needed = [
        "outer ['start'] is not the same on all ranks",
        "outer ['start'] is not the same on all ranks",
        "different tensors: rank 0 ['start'] (2,) torch.float64; ['shift'] (2,) torch.float64; ['another'] (3,)",
        "torch.float32",
        "Forward in Descent",
        "solver.steps 3",
        "GradientSimilarity",
        "no tasks: the leading size is 0 on every rank",
    ]
    for i, words in enumerate(needed):
        assert one[i] == other[i]
        assert one[i][0] == "ValueError"
        assert words in one[i][1]
    assert one[-1] == other[-1] == ("", "OK")  # parts of another size are the same mean


def not_split(ranks: Ranks) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg = ask(ranks, goals(None))
        ask(ranks, goals(None, GOALS[:1].expand(3, 2)))  # tasks that are alike say nothing
    return hg.grad, [str(each.message) for each in caught]


def test_who_forgets_to_split_is_told(ranks: Any) -> None:
    plain = ask(None).grad
    for grad, said in ranks.run(2, not_split):
        torch.testing.assert_close(grad, plain, rtol=1e-14, atol=1e-15)
        assert len(said) == 1
        assert "bilevel.distributed.split(batches, ranks)" in said[0]


# --- gradients


class Touchy:
    """An outer loss that uses x["shift"] for the goal 4 alone."""

    def __call__(self, y: Tensor, x: dict[str, Tensor], batch: Tensor) -> Tensor:
        return pull(y, x, batch) + (x["shift"].sum() if batch[0] == 4 else 0.0)


TOUCHY = bl.Problem(lambda y, x, b: (y**2).sum() / 2, Touchy(), init=SMALL.init)


def touching(ranks: Ranks | None) -> tuple[Found, int]:
    x = {**point(), "nothing": torch.zeros(2, dtype=D)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg = ask(ranks, problem=TOUCHY, outer=x, chunk=1)
    return Found.of(hg), [str(each.message) for each in caught]


def test_what_one_task_of_one_rank_uses_is_used(ranks: Any) -> None:
    plain, said = touching(None)
    assert plain.grad["shift"].any()
    assert len(said) == 1
    assert "['nothing'] influences neither loss" in said[0]
    for found, warned in ranks.run(2, touching):
        torch.testing.assert_close(found.grad, plain.grad, rtol=1e-14, atol=1e-15)
        assert warned == said


@dataclasses.dataclass(frozen=True)
class Lots(bl.TaskWeights):
    """Weights by lot: another draw on each rank."""

    def weigh(self, tasks: Any) -> Tensor:
        return torch.rand(len(tasks), dtype=D).softmax(0)


@dataclasses.dataclass(frozen=True)
class Broken(bl.TaskWeights):
    """Weights that fail on one rank alone."""

    rank: int

    def weigh(self, tasks: Any) -> Tensor:
        if torch.distributed.get_rank() == self.rank:
            raise ZeroDivisionError("no weight")
        return torch.full((len(tasks),), 1 / len(tasks))


def weighted(ranks: Ranks | None) -> list[Any]:
    ids = [f"task {i}" for i in range(T)]
    by_id = bl.GivenWeights({task: i + 1.0 for i, task in enumerate(ids)})
    kinds = [
        bl.GradientSimilarity(0.5),
        bl.GradientSimilarity(None, pairwise=True),
        by_id,
        bl.GivenWeights(range(1, 6)),
    ]
    return [Found.of(ask(ranks, goals(ranks, task_ids=ids), weights=each)) for each in kinds]


def weighted_badly(ranks: Ranks) -> list[Any]:
    torch.manual_seed(ranks.rank)
    return [
        Found.of(ask(ranks, weights=Lots())),
        outcome(lambda: ask(ranks, weights=Broken(1))),
        outcome(lambda: ask(ranks)),
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_weights_see_the_tasks_of_all_ranks(ranks: Any, count: int) -> None:
    plain = weighted(None)
    answers = ranks.run(count, weighted)
    for i, wanted in enumerate(plain):
        for answer in answers:
            assert same(answer[i].agreed, answers[0][i].agreed)
            # Summed task by task, as one process does.
            assert same((answer[i].grad, answer[i].stats["task_weights"]), (wanted.grad, wanted.stats["task_weights"]))


def test_weights_are_one_ranks_for_all(ranks: Any) -> None:
    (one, failed, sound), (other, own, again) = ranks.run(2, weighted_badly)
    assert same(one.agreed, other.agreed)
    assert own == ("ZeroDivisionError", "no weight")
    assert failed[0] == "RankError"
    assert "rank 1 (ZeroDivisionError: no weight)" in failed[1]
    assert sound == again == ("", "OK")


# --- few tasks, states


def few(ranks: Ranks | None) -> list[Any]:
    """Three tasks: on four ranks the last has none. With init, with a start, and a state carried on."""
    answers = [Found.of(ask(ranks, goals(ranks, GOALS[:3])))]
    answers.append(Found.of(ask(ranks, goals(ranks, GOALS[:3]), weights=bl.GradientSimilarity())))
    given = posed(ranks, 3)
    hg = bl.hypergradient(**given, estimator=bl.TaskMean(bl.estimators.SOBA(0.5), group=ranks))
    given["inner"] = hg.inner
    again = bl.hypergradient(**given, estimator=bl.TaskMean(bl.estimators.SOBA(0.5), group=ranks), state=hg.state)
    return [*answers, Found.of(hg), Found.of(again)]


def test_a_rank_without_tasks_takes_part(ranks: Any) -> None:
    plain, answers = few(None), ranks.run(4, few)
    for i, wanted in enumerate(plain):
        for answer in answers:
            torch.testing.assert_close(answer[i].grad, wanted.grad, rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(answer[i].losses, wanted.losses, rtol=1e-13, atol=1e-14)
            assert same(answer[i].agreed, answers[0][i].agreed)
        torch.testing.assert_close(stacked([answer[i].inner for answer in answers]), wanted.inner)
    assert answers[3][0].inner.shape == (0, 2)
    assert answers[3][-1].state is None


def carried(ranks: Ranks, saved: Any) -> list[Any]:
    """A state goes with the tasks of its rank, in any order; not with others."""
    estimator, given = bl.TaskMean(bl.estimators.SOBA(0.5), group=ranks), posed(ranks, ids=True)
    one = bl.hypergradient(**given, estimator=estimator)
    turned = dataclasses.replace(
        given["batches"], outer=given["batches"].outer.flip(0), task_ids=given["batches"].task_ids[::-1]
    )
    inner = pytree.tree_map(lambda leaf: leaf.flip(0), one.inner)
    there = bl.hypergradient(**given | {"inner": one.inner}, estimator=estimator, state=one.state)
    back = bl.hypergradient(
        **given | {"batches": turned, "inner": inner}, estimator=estimator, state=one.state.to_dict()
    )
    plain = posed(ranks)
    return [
        Found.of(there),
        Found.of(back),
        outcome(lambda: bl.hypergradient(**plain, estimator=estimator, state=saved)),
        outcome(lambda: bl.hypergradient(**given, estimator=estimator, state=saved)),
    ]


def test_a_state_goes_with_the_tasks_of_its_rank(ranks: Any) -> None:
    saved = bl.hypergradient(**posed(None), estimator=bl.TaskMean(bl.estimators.SOBA(0.5))).state
    for there, back, other_size, other_kind in ranks.run(2, carried, saved):
        torch.testing.assert_close(there.grad, back.grad, rtol=1e-13, atol=1e-14)
        for kind, words in (other_size, other_kind):
            assert kind in ("ValueError", "RankError")
            assert "these are the rank's own tasks" in words


@dataclasses.dataclass(frozen=True)
class Shared(bl.estimators.State):
    """A number that tasks share."""

    number: Any


@dataclasses.dataclass(frozen=True)
class Sharing(bl.Estimator):
    """Carries what `kind` says: a constant, a count of calls, or the last loss."""

    kind: str
    sees = frozenset(bl.Path)

    def init_state(self, instance: Any) -> Shared:
        return Shared(torch.zeros((), dtype=D))

    def estimate(self, instance: Any, state: Any) -> Any:
        found = instance.solve()
        loss, _, _ = instance.oracles.outer_gradient(found.inner)
        before = torch.zeros((), dtype=D) if state is None else state.number
        kept = {"constant": before, "calls": before + 1, "loss": loss.detach().sum()}[self.kind]
        zeros = tuple(torch.zeros_like(leaf) for leaf in instance.outer.values())
        return instance.finish(found, zeros, loss, state=Shared(kept))


def sharing(ranks: Ranks) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for kind in ("constant", "calls", "loss"):
        states: list[Any] = [None]

        def call(kind: str = kind, states: list[Any] = states) -> Any:
            hg = ask(ranks, of=Sharing(kind), state=states[-1])
            states.append(hg.state)
            return hg

        found[kind] = [outcome(call), outcome(call)]
    return found


def test_what_tasks_share_may_not_change_on_several_ranks(ranks: Any) -> None:
    """The library's own shared fields are constants; a running average over tasks would go its own way on each rank."""
    (alone,) = ranks.run(1, sharing)
    assert {each for calls in alone.values() for each in calls} == {("", "OK")}
    for found in ranks.run(2, sharing):
        assert found["constant"] == [("", "OK")] * 2
        assert found["calls"][1][0] == "ValueError"
        assert found["loss"][0][0] == "ValueError"
        assert "Declare them as per_task()" in found["loss"][0][1]


# --- groups


def groups(ranks: Ranks) -> dict[str, Any]:
    """A group of torch's own, one that is no group, and what is done with a TaskMean that has one."""
    estimator = bl.TaskMean(bl.Unrolled(), group=ranks.group)
    of_all = bl.TaskMean(bl.Unrolled(), group=Ranks())
    return {
        "same": bl.TaskMean(bl.Unrolled(), group=ranks) == estimator,
        "shown": repr(estimator),
        "found": Found.of(ask(ranks, group=ranks.group)),
        "copied": copy.deepcopy(estimator) == estimator,
        "pickled": pickle.loads(pickle.dumps(of_all)) == of_all,
        "refused": outcome(lambda: pickle.dumps(estimator)),
        "mesh": outcome(lambda: bl.TaskMean(bl.Unrolled(), group=torch.distributed.device_mesh.DeviceMesh)),
        "number": outcome(lambda: bl.TaskMean(bl.Unrolled(), group=2)),
        "outside": outcome(lambda: bl.TaskMean(bl.Unrolled(), group=torch.distributed.GroupMember.NON_GROUP_MEMBER)),
        "layer": outcome(
            lambda: bl.solution(
                SMALL,
                {name: leaf.requires_grad_() for name, leaf in point().items()},
                None,
                goals(ranks),
                solver=STEPPING,
                estimator=estimator,
            )
        ),
    }


def test_a_process_group_is_a_group(ranks: Any) -> None:
    plain = Found.of(ask(None))
    for found in ranks.run(2, groups):
        assert found["same"]
        assert found["copied"]
        assert found["pickled"]
        assert found["shown"].endswith("group=Ranks([0, 1]))")
        torch.testing.assert_close(found["found"].grad, plain.grad, rtol=1e-14, atol=1e-15)
        for name, kind, words in (
            ("refused", "TypeError", "cannot be pickled"),
            ("mesh", "TypeError", "mesh.get_group('name')"),
            ("number", "TypeError", "group=2; None, bilevel.distributed.Ranks() or a process group"),
            ("outside", "ValueError", "no member of"),
            ("layer", "ValueError", "summed over the tasks of all ranks"),
        ):
            assert found[name][0] == kind
            assert words in found[name][1]


def test_a_group_needs_processes() -> None:
    kind, words = outcome(lambda: ask(None, group=Ranks()))
    assert kind == "RuntimeError"
    assert "torchrun --nproc-per-node" in words


class Heard:
    """Collectives that are called."""

    def __init__(self) -> None:
        self.count = 0

    def enter(self, name: str, count: int) -> None:
        self.count += name == "bilevel.collective"

    def exit(self, name: str) -> None:
        pass


def collectives(ranks: Ranks) -> list[int]:
    found = []
    for weights in (None, bl.GradientSimilarity()):
        heard = Heard()
        with spans.listen(heard):
            ask(ranks, weights=weights)
        found.append(heard.count)
    return found


def test_a_call_is_one_gather_and_one_sum(ranks: Any) -> None:
    assert ranks.run(2, collectives) == [[2, 3]] * 2


def probed(ranks: Ranks) -> Found:
    estimator = bl.estimators.Probed(bl.TaskMean(bl.Unrolled(), group=ranks), probes=1)
    return Found.of(bl.hypergradient(SMALL, point(), None, goals(ranks), solver=STEPPING, estimator=estimator))


def test_what_holds_a_task_mean_meets_too(ranks: Any) -> None:
    one, other = ranks.run(2, probed)
    assert same(one.agreed, other.agreed)
    assert one.stats["digits"] > 12


# --- loops


def loops(ranks: Ranks | None) -> list[Any]:
    """Fifty steps of Adam, and where x is."""
    x = {name: leaf.requires_grad_() for name, leaf in point().items()}
    shuffled = [GOALS[torch.randperm(T, generator=torch.Generator().manual_seed(i))] for i in range(50)]
    loader = [goals(ranks, each) for each in shuffled]
    estimator = bl.TaskMean(bl.Unrolled(), group=ranks)
    steps = bl.iterate(
        SMALL, x, None, loader, solver=STEPPING, estimator=estimator, optimizer=torch.optim.Adam(x.values(), lr=0.1)
    )
    losses = [step.outer_loss for step in steps]
    return [torch.stack(losses), *(leaf.detach() for leaf in x.values())]


def test_ranks_make_the_same_steps_to_the_bit(ranks: Any) -> None:
    answers = ranks.run(2, loops)
    assert all(same(answer, answers[0]) for answer in answers)
    torch.testing.assert_close(answers[0], loops(None), rtol=1e-11, atol=1e-12)


def stopping(ranks: Ranks) -> list[Any]:
    """Loaders of two and three batches, one that fails at its second, one that yields a list; then a sound one."""
    first, found = ranks.rank == 0, []

    def falls(mine: bl.Batches) -> Any:
        yield mine
        if first:
            raise OSError("no such file")
        yield mine

    mine = goals(ranks)
    for loader in ([mine] * (2 if first else 3), falls(mine), [mine, 3 if first else mine], [mine] * 3):
        x = {name: leaf.requires_grad_() for name, leaf in point().items()}
        estimator, optimizer = bl.TaskMean(bl.Unrolled(), group=ranks), torch.optim.SGD(x.values(), lr=0.1)
        steps: list[int] = []
        try:
            for step in bl.iterate(SMALL, x, None, loader, solver=STEPPING, estimator=estimator, optimizer=optimizer):
                steps.append(step.index)
        except Exception as error:
            found.append((type(error).__name__, str(error), len(steps)))
        else:
            found.append(("", "", len(steps)))
    return found


def test_loaders_end_and_fail_on_all_ranks(ranks: Any) -> None:
    one, other = ranks.run(2, stopping)
    assert [(kind, count) for kind, _, count in one] == [("RankError", 2), ("OSError", 1), ("TypeError", 1), ("", 3)]
    assert [(kind, count) for kind, _, count in other] == [("RankError", 2), *[("RankError", 1)] * 2, ("", 3)]
    assert "rank 0 at the end of the data, rank 1 at tasks" in one[0][1] == other[0][1]
    assert "rank 0 (OSError: no such file)" in other[1][1]


def images(seed: int) -> bl.Batches:
    g = torch.Generator().manual_seed(seed)
    return bl.Batches(
        [torch.randn(T, 6, 3, generator=g, dtype=D), torch.randint(0, 2, (T, 6), generator=g)],
        [torch.randn(T, 4, 3, generator=g, dtype=D), torch.randint(0, 2, (T, 4), generator=g)],
    )


def learning(ranks: Ranks | None) -> list[Any]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).to(D)
    learner = bl.meta.Learner(net, torch.nn.functional.cross_entropy, group=ranks)
    x = learner.outer()
    steps = list(learner.train(x, [parted(images(i), ranks) for i in range(3)]))
    judged = learner.evaluate(x, [parted(images(7), ranks), parted(images(8), ranks)])
    return [
        torch.stack([step.outer_loss for step in steps]),
        [leaf.detach() for leaf in x["parameters"].values()],
        learner.hypergradient(x, parted(images(9), ranks)).grad,
        [judged.score, judged.interval, judged.loss, judged.tasks],
    ]


def learning_badly(ranks: Ranks) -> list[tuple[str, str]]:
    learner = bl.meta.Learner(torch.nn.Linear(3, 2).to(D), torch.nn.functional.cross_entropy, group=ranks)
    torch.manual_seed(ranks.rank)
    other = bl.meta.Learner(torch.nn.Linear(3, 2).to(D), torch.nn.functional.cross_entropy, group=ranks)
    mine = parted(images(1), ranks)
    x = {name: leaf.detach() * 0 for name, leaf in learner.outer()["parameters"].items()}
    broken = {"parameters": {}} if ranks.rank else {"parameters": x}
    return [
        outcome(lambda: learner.hypergradient(broken, mine)),
        outcome(lambda: learner.evaluate(broken, [mine])),
        outcome(lambda: learner.evaluate({"parameters": x}, [mine] if ranks.rank else [3])),
        outcome(lambda: other.evaluate(other.outer(), [mine])),
    ]


def test_a_learner_learns_and_judges_on_all_ranks(ranks: Any) -> None:
    plain = learning(None)
    answers = ranks.run(2, learning)
    assert same(answers[0], answers[1])
    torch.testing.assert_close(answers[0][:3], plain[:3], rtol=1e-11, atol=1e-13)
    assert answers[0][3] == pytest.approx(plain[3], rel=1e-12)
    assert plain[3][3] == 2 * T


def test_a_learner_in_trouble_says_so_on_all_ranks(ranks: Any) -> None:
    one, other = ranks.run(2, learning_badly)
    assert [kind for kind, _ in one] == ["RankError", "RankError", "TypeError", "ValueError"]
    assert [kind for kind, _ in other] == ["ValueError", "ValueError", "RankError", "ValueError"]


def lost(ranks: Ranks, path: str) -> None:
    """The last rank dies; what the others are told stands in a file."""
    if ranks.rank == ranks.size - 1:
        os._exit(1)
    pathlib.Path(path).write_text(" ".join(outcome(lambda: ask(ranks))))


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: pathlib.Path) -> None:
    pool, path = Pool(), tmp_path / "said"
    with pytest.raises((EOFError, ConnectionError)):
        pool.run(2, lost, str(path))
    assert path.read_text().startswith("RankError ")
    assert "another process of the group has ended" in path.read_text()
