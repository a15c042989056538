"""A loop that stops and goes on makes the steps of one that never stopped, to the bit."""

import random

import pytest
from catalogue import ENTRIES
from loop_runs import Draws, bits, made, seeded

import bilevel as bl

STEPS = 4
STATEFUL = {
    "memory reduced, warm": bl.MemoryReduced(steps=3, warm_inner=True, warm_adjoint=True),
    "warm sides": bl.FirstOrderCorrected(0.1, warm_sides=True),
    "warm sides, four": bl.FirstOrderCorrected(0.1, scheme=4, warm_sides=True),
    "tangents": bl.estimators.Forward(online=True),
}
ALL = {label: entry.usual for label, entry in ENTRIES.items()} | STATEFUL


def stopped_and_whole(tmp_path, make, at):
    """The bits after all steps, of a run that was saved and made anew at one of them, and of one that was not."""
    seeded(1)
    whole = make()
    for step in whole:
        if step.index == at:
            file = whole.save(tmp_path)
    seeded(2)
    again = make()
    assert again.load(tmp_path) == file
    assert [step.index for step in again] == list(range(at + 1, whole.index))
    return bits(again.state_dict()), bits(whole.state_dict())


@pytest.mark.parametrize("label", ALL)
@pytest.mark.filterwarnings("ignore:OuterLoop\\(\\) stepped through", "ignore:outer variable")
def test_every_estimator_goes_on_to_the_bit(tmp_path, label):
    carry = bool(len(label) % 2) or label in STATEFUL
    at = random.Random(label).randrange(STEPS - 1)
    again, whole = stopped_and_whole(tmp_path, lambda: made(ALL[label], Draws(STEPS), carry=carry), at)
    assert again == whole


TASKS = ("soba", "saba", "fsla", "fdehbo", "f2sa", "meha", "lv-hba", "bome", "persistent evolution", *STATEFUL)


@pytest.mark.parametrize("label", [label for label in TASKS if label != "tangents"])
@pytest.mark.filterwarnings("ignore:OuterLoop\\(\\) stepped through", "ignore:outer variable")
def test_memories_of_tasks_that_come_in_another_order_each_time_go_on_to_the_bit(tmp_path, label):
    estimator = bl.TaskMean(ALL[label], chunk=2)
    at = random.Random(label).randrange(STEPS - 1)
    again, whole = stopped_and_whole(tmp_path, lambda: made(estimator, Draws(STEPS, 3), tasks=3), at)
    assert again == whole
    assert again["state"] is not None
