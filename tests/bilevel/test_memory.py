"""Memory as a contract: how the peak of each estimator grows with K.

The net of ../shared/bench P2 at a quarter of each size: an MLP 196-75-10 (15,535 numbers), 1250 data weights, minibatch
125, K = 10, 50, 200. Peaks are the same multiples of P there to within a tenth. Bytes are counted, not timed: one run
is exact. Which law each estimator is held to stands in its entry of bilevel.testing.
"""

import dataclasses
import functools
import gc
import math

import catalogue
import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel.estimators import Estimate, Estimator, Instance
from bilevel.estimators.reverse.unrolled import shrinking

STEPS = (10, 50, 200)
FLAT = (20, 32)
"""Twelve steps more: one y kept in each would be twelve, and a peak may differ by a hundredth."""
PRODUCTS = 10
"""Of linear solvers."""
FEATURES, HIDDEN, ROWS, BATCH = 196, 75, 1250, 125


def mlp(y, inputs):
    return torch.nn.functional.linear(torch.nn.functional.linear(inputs, y["a"], y["b"]).relu(), y["c"], y["d"])


@functools.cache
def data():
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(ROWS, FEATURES, generator=g), torch.randint(0, 10, (ROWS,), generator=g)
    y = {"a": (HIDDEN, FEATURES), "b": (HIDDEN,), "c": (10, HIDDEN), "d": (10,)}
    return inputs, labels, {name: 0.03 * torch.randn(shape, generator=g) for name, shape in y.items()}


def cleaning():
    """Hyper-cleaning: x = a weight for each row of data."""
    inputs, labels, y = data()

    def inner_loss(y, x, rows):
        losses = torch.nn.functional.cross_entropy(mlp(y, inputs[rows]), labels[rows], reduction="none")
        return (x[rows].sigmoid() * losses).mean() + 5e-4 * sum(leaf.square().sum() for leaf in y.values())

    problem = bl.Problem(
        inner_loss, lambda y, x, rows: torch.nn.functional.cross_entropy(mlp(y, inputs[rows]), labels[rows])
    )
    return problem, torch.zeros(ROWS), y


def maml():
    """The same net with x = its initialization, for FirstOrder, which cannot see data weights."""
    problem, _, y = cleaning()
    ones = torch.zeros(ROWS)
    return (
        bl.Problem(lambda y, x, rows: problem.inner_loss(y, ones, rows), problem.outer_loss, init=lambda x, rows: x),
        y,
        None,
    )


class Cycle:
    """Minibatch k, for ever."""

    def __len__(self):
        return 10**6

    def __getitem__(self, step):
        return slice(step * BATCH % ROWS, step * BATCH % ROWS + BATCH)


@functools.cache
def peak(estimator, steps, setup=cleaning):
    problem, outer, inner = setup()
    batches = bl.Batches(bl.PerStep(Cycle()), slice(0, BATCH))
    gc.collect()
    with Tensors() as meter:
        found = bl.hypergradient(
            problem, outer, inner, batches, solver=bl.Descent(bl.SGD(0.1), steps), estimator=estimator
        )
    del found
    assert meter.live_bytes == 0, "something outlives the result"
    return meter.peak_bytes


def params_bytes():
    return sum(leaf.nbytes for leaf in data()[2].values())


@dataclasses.dataclass(frozen=True)
class Leaking(Estimator):
    """The positive control: an estimator that keeps every iterate for nothing."""

    estimator: Estimator
    sees = frozenset(bl.Path)

    def estimate(self, instance: Instance, state: object) -> Estimate:
        kept = []
        instance.solve(visit=lambda step, y, s: kept.append(y))
        return self.estimator.estimate(instance, state)


def growth(estimator, setup=cleaning):
    """Peak at K = 200 over peak at K = 10."""
    return peak(estimator, 200, setup) / peak(estimator, 10, setup)


def small():
    """Ridge regression on 40 numbers, for what holds P x P."""
    g = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(ROWS, 40, generator=g), torch.randn(ROWS, generator=g)

    def loss(y, x, rows):
        return (inputs[rows] @ y - targets[rows]).square().mean() + (x.exp() * y.square()).sum()

    return bl.Problem(loss, lambda y, x, rows: loss(y, x.detach(), rows)), torch.zeros(40), torch.zeros(40)


def few():
    """The same net with two outer numbers, for what takes a product of every step for each."""
    problem, _, y = cleaning()
    ones = torch.zeros(ROWS)
    return (
        bl.Problem(
            lambda y, x, rows: (
                problem.inner_loss(y, ones, rows) + x[0].exp() * y["a"].square().sum() + x[1] * y["d"].sum()
            ),
            problem.outer_loss,
        ),
        torch.tensor([-6.0, 0.01]),
        y,
    )


def setup_of(entry):
    """A problem that the estimator of an entry can see and hold."""
    if entry.few_outer:
        return few
    if entry.quadratic_in_inner:
        return small
    return cleaning if bl.Path.INNER_LOSS in entry.sees else maml


def entries(memory):
    return [label for label, entry in catalogue.ENTRIES.items() if entry.memory == memory]


@pytest.mark.parametrize("label", entries("constant"))
def test_estimators_without_a_trajectory_are_flat_in_the_number_of_steps(label):
    entry = catalogue.ENTRIES[label]
    peaks = [peak(entry.at(PRODUCTS), steps, setup_of(entry)) for steps in FLAT]
    assert max(peaks) <= 1.01 * min(peaks)


@pytest.mark.parametrize("label", [*entries("sqrt"), *entries("linear")])
def test_kept_trajectories_grow_no_faster_than_promised(label):
    """The growth from K = 50 to 200 over that from 10 to 50: 3.75 for a linear law, 1.8 for a square root."""
    entry = catalogue.ENTRIES[label]
    a, b, c = (peak(entry.at(PRODUCTS), steps, setup_of(entry)) for steps in STEPS)
    law = {"sqrt": math.sqrt, "linear": float}[entry.memory]
    promised = (law(STEPS[2]) - law(STEPS[1])) / (law(STEPS[1]) - law(STEPS[0]))
    assert b > 1.1 * a, "it keeps no trajectory: promise less"
    assert (c - b) / (b - a) <= 1.15 * promised


def test_the_meter_catches_a_leaking_twin():
    honest, leaking = bl.Implicit(bl.CG(10, tol=0.0)), Leaking(bl.Implicit(bl.CG(10, tol=0.0)))
    assert growth(honest) <= 1.01
    assert growth(leaking) > 10
    # and measures the leak exactly: one iterate a step
    assert peak(leaking, 50) - peak(leaking, 10) == pytest.approx(40 * params_bytes(), rel=0.001)


def test_a_kept_graph_grows_linearly():
    slopes = [
        (peak(bl.Unrolled("graph"), b) - peak(bl.Unrolled("graph"), a)) / (b - a) for a, b in ((10, 50), (50, 200))
    ]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.01)
    assert slopes[0] > 0.5 * params_bytes()


def test_kept_iterates_grow_by_one_iterate_a_step():
    for a, b in ((10, 50), (50, 200)):
        grown = peak(bl.Unrolled("iterates"), b) - peak(bl.Unrolled("iterates"), a)
        assert grown == pytest.approx((b - a) * params_bytes(), rel=0.01)


def test_segments_grow_like_the_square_root_of_twice_the_steps():
    def alive(steps):
        return shrinking(steps)[0]

    for a, b in ((10, 50), (50, 200)):
        grown = peak(bl.Unrolled("segments"), b) - peak(bl.Unrolled("segments"), a)
        assert grown <= (alive(b) - alive(a)) * params_bytes() * 1.01
    assert peak(bl.Unrolled("segments"), 200) < 0.2 * peak(bl.Unrolled("graph"), 200)
    assert alive(200) == 20


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_tasks_cost_by_the_chunk(chunk):
    """Peak = chunk x (one task) + one adapted variable a task."""
    problem, outer, _ = maml()
    rows = torch.arange(ROWS)[:1000].reshape(8, 125)

    def measured(chunk):
        batches = bl.Batches(rows, rows)
        gc.collect()
        with Tensors() as meter:
            found = bl.hypergradient(
                problem,
                outer,
                None,
                batches,
                solver=bl.Descent(bl.SGD(0.1), 3),
                estimator=bl.TaskMean(bl.FirstOrder(), chunk),
            )
        del found
        return meter.peak_bytes - 8 * params_bytes()

    assert measured(chunk) <= 1.1 * chunk * measured(1)


def test_a_larger_linear_budget_costs_no_memory():
    peaks = [peak(bl.Implicit(bl.CG(steps, tol=0.0)), 10) for steps in (3, 30)]
    assert peaks[1] <= 1.001 * peaks[0]
