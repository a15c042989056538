"""Memory as a contract: how the peak of each estimator grows with K, at the size of ../shared/bench P2.

An MLP 784-300-10 (238,510 numbers, P = 0.91 MiB), 5000 data weights, minibatch 500, K = 10, 50, 200. Bytes are counted,
not timed: one run is exact.
"""

import dataclasses
import functools
import gc

import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel.estimators import Estimate, Estimator, Instance
from bilevel.estimators.reverse.unrolled import shrinking

STEPS = (10, 50, 200)
NU = 1e-2


def mlp(y, inputs):
    return torch.nn.functional.linear(torch.nn.functional.linear(inputs, y["a"], y["b"]).relu(), y["c"], y["d"])


@functools.cache
def data():
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(5000, 784, generator=g), torch.randint(0, 10, (5000,), generator=g)
    y = {"a": (300, 784), "b": (300,), "c": (10, 300), "d": (10,)}
    return inputs, labels, {name: 0.03 * torch.randn(shape, generator=g) for name, shape in y.items()}


def cleaning():
    """Hyper-cleaning: x = 5000 data weights."""
    inputs, labels, y = data()

    def inner_loss(y, x, rows):
        losses = torch.nn.functional.cross_entropy(mlp(y, inputs[rows]), labels[rows], reduction="none")
        return (x[rows].sigmoid() * losses).mean() + 5e-4 * sum(leaf.square().sum() for leaf in y.values())

    problem = bl.Problem(
        inner_loss, lambda y, x, rows: torch.nn.functional.cross_entropy(mlp(y, inputs[rows]), labels[rows])
    )
    return problem, torch.zeros(5000), y


def maml():
    """The same net with x = its initialization, for FirstOrder, which cannot see data weights."""
    problem, _, y = cleaning()
    ones = torch.zeros(5000)
    return (
        bl.Problem(lambda y, x, rows: problem.inner_loss(y, ones, rows), problem.outer_loss, init=lambda x, rows: x),
        y,
        None,
    )


class Cycle:
    """Minibatch k of 500, for ever."""

    def __len__(self):
        return 10**6

    def __getitem__(self, step):
        return slice(step * 500 % 5000, step * 500 % 5000 + 500)


@functools.cache
def peak(estimator, steps, setup=cleaning):
    problem, outer, inner = setup()
    batches = bl.Batches(bl.PerStep(Cycle()), slice(0, 500))
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


@pytest.mark.parametrize(
    ("estimator", "setup"),
    [
        (bl.Implicit(bl.CG(10, tol=0.0)), cleaning),
        (bl.Implicit(bl.Neumann(10, 0.1)), cleaning),
        (bl.MemoryReduced(steps=10), cleaning),
        (bl.FirstOrderCorrected(NU), cleaning),
        (bl.FirstOrderCorrected(NU, "forward"), cleaning),
        (bl.FirstOrder(), maml),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_estimators_without_a_trajectory_are_flat_in_the_number_of_steps(estimator, setup):
    peaks = [peak(estimator, steps, setup) for steps in STEPS]
    assert max(peaks) <= 1.01 * min(peaks)


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
    rows = torch.arange(2000).reshape(8, 250)

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
