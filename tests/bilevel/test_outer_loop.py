"""A loop that stops and goes on makes the steps of one that never stopped, to the bit."""

import random

import pytest
import torch
from catalogue import ENTRIES
from loop_runs import FROM_X, Draws, bits, made, seeded

import bilevel as bl

STEPS = 3
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


class SomeTasks:
    """Two of five tasks at a time, so that a memory begins late in the run."""

    def __iter__(self):
        for _ in range(6):
            yield bl.Batches(
                torch.randn(2, 4), torch.randn(2, 4), task_ids=random.sample(["a", "b", 3, (4, "d"), 5], 2)
            )


@pytest.mark.parametrize("form", ["paper", "released"])
def test_memories_of_all_tasks_ever_met_go_on_to_the_bit(tmp_path, form):
    estimator = bl.meta.MOML(blend=0.5, form=form)
    again, whole = stopped_and_whole(tmp_path, lambda: made(estimator, SomeTasks(), problem=FROM_X, inner=None), 2)
    assert again == whole
    assert len(whole["state"]["of"]) > 3


@pytest.mark.parametrize("engine", [bl.Captured()])
def test_engines_that_trace_go_on_to_the_bit(tmp_path, engine):
    estimator = ALL["memory reduced, warm"]
    again, whole = stopped_and_whole(tmp_path, lambda: made(estimator, Draws(STEPS), engine=engine), 1)
    assert again == whole


def at_step_two(tmp_path, optimizer=torch.optim.Adam, scheduler=None, **options):
    def make():
        x = (torch.tensor([0.5, -0.4, 0.3]), torch.tensor([0.2]))
        moved = optimizer([leaf.requires_grad_() for leaf in x], lr=0.05)
        return made(
            ESTIMATOR,
            Draws(4),
            outer=dict(zip("uv", x, strict=True)),
            optimizer=lambda xs, lr: moved,
            scheduler=[] if scheduler is None else scheduler(moved),
            **options,
        )

    again, whole = stopped_and_whole(tmp_path, make, 2)
    assert again == whole


ESTIMATOR = bl.FirstOrder()
RATES = torch.optim.lr_scheduler
SCHEDULERS = {
    "LambdaLR": lambda o: RATES.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: RATES.MultiplicativeLR(o, lambda step: 0.95),
    "MultiStepLR": lambda o: RATES.MultiStepLR(o, [1, 4]),
    "CosineAnnealingWarmRestarts": lambda o: RATES.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: RATES.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: RATES.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "PolynomialLR": lambda o: RATES.PolynomialLR(o, 6),
    "ReduceLROnPlateau": lambda o: RATES.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: RATES.SequentialLR(o, [RATES.ConstantLR(o), RATES.ExponentialLR(o, 0.8)], [3]),
    "ChainedScheduler": lambda o: RATES.ChainedScheduler([RATES.LinearLR(o), RATES.ExponentialLR(o, 0.8)], o),
    "two": lambda o: [RATES.LinearLR(o), RATES.StepLR(o, 2)],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_of_scheduler_goes_on_to_the_bit(tmp_path, name):
    at_step_two(tmp_path, scheduler=SCHEDULERS[name])


def of_torch(name, **options):
    return lambda xs, lr: getattr(torch.optim, name)(xs, lr=lr, **options)


OPTIMIZERS = {
    **{
        name: of_torch(name)
        for name in ("Adadelta", "Adafactor", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
    },
    "Adam, amsgrad": of_torch("Adam", amsgrad=True),
    "Adam, fused": of_torch("Adam", fused=True),
    "SGD, momentum": of_torch("SGD", momentum=0.9, nesterov=True),
    "Adam, a tensor as rate": lambda xs, lr: torch.optim.Adam(xs, lr=torch.tensor(lr)),
    "ClippedSGD": lambda xs, lr: bl.ClippedSGD(xs, lr=lr, radius=0.1),
    "NormalizedSGD": lambda xs, lr: bl.NormalizedSGD(xs, lr=lr, momentum=0.5),
    "DualAveraging": lambda xs, lr: bl.DualAveraging(xs, lr=lr),
    "OptimisticSGD": lambda xs, lr: bl.OptimisticSGD(xs, lr=lr),
    "Projected": lambda xs, lr: bl.outer.Projected(torch.optim.Adam(xs, lr=lr), bl.outer.Box(-1, 1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_goes_on_to_the_bit(tmp_path, name):
    at_step_two(tmp_path, optimizer=OPTIMIZERS[name])
