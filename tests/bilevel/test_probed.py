"""Whether lost digits are seen: kinks, growth, cancellation, an ill-conditioned system; and that sound ones pass."""

import math

import pytest
import torch

import bilevel as bl

Probed = bl.estimators.Probed


def flat(hg):
    return torch.cat([leaf.reshape(-1).double() for leaf in torch.utils._pytree.tree_leaves(hg.grad)])


def few_shot(dtype, steps, estimator):
    """P1 of the house's benchmarks: a conv net with batch norm and max pooling, 5-way 5-shot, x is the start."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = []
    for channels in (1, 32, 32, 32):
        layers += [
            torch.nn.Conv2d(channels, 32, 3, padding=1),
            torch.nn.BatchNorm2d(32, track_running_stats=False),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        ]
    torch.manual_seed(2)
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32, 5)).to(dtype)
    centers = normal(5, 1, 28, 28)
    labels = [torch.arange(5).repeat_interleave(count) for count in (5, 15)]
    images = [(centers[each] + 0.7 * normal(len(each), 1, 28, 28)).to(dtype) for each in labels]
    batches = bl.Batches(*zip(images, labels, strict=True))

    def loss(y, x, batch):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, y, (batch[0],)), batch[1])

    start = {name: value.detach() for name, value in net.named_parameters()}
    return bl.hypergradient(
        bl.Problem(loss, loss, init=lambda x, b: x),
        start,
        None,
        batches,
        solver=bl.Descent(bl.SGD(0.05), steps),
        estimator=estimator,
    )


def test_kinks_that_a_rounding_error_crosses():
    """No cotangent grows here, and one run alone looks sound, yet float32 keeps one digit of it."""
    probed = few_shot(torch.float32, 20, Probed(bl.Unrolled("iterates"), probes=2))
    double = few_shot(torch.float64, 20, bl.Unrolled("iterates"))
    error = float((flat(probed) - flat(double)).norm() / flat(double).norm())
    assert error > 0.01
    assert probed.stats["cotangent_growth"] == 1
    assert probed.status is bl.Status.DIGITS_LOST
    assert not probed.status.failed
    assert probed.digits < 2


def quadratic(dtype, estimator):
    h = torch.tensor([2.0, 1.0, 0.5], dtype=dtype)
    problem = bl.Problem(lambda y, x, b: (h * y * y / 2 - x * y).sum(), lambda y, x, b: (y**2).sum() / 2)
    x = torch.tensor([1.0, -0.7, 0.3], dtype=dtype)
    batches, solver = bl.Batches(None, None), bl.Descent(bl.SGD(0.4), 200)
    return bl.hypergradient(problem, x, torch.zeros_like(x), batches, solver=solver, estimator=estimator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [bl.Unrolled(), bl.Implicit(bl.CG(10, tol=1e-6)), bl.FirstOrderCorrected()],
    ids=lambda e: type(e).__name__,
)
def test_the_digits_of_a_sound_problem(dtype, estimator):
    """Never more than the digits that are right, up to one."""
    hg = quadratic(dtype, Probed(estimator))
    exact = torch.tensor([1.0, -0.7, 0.3], dtype=dtype).double() / torch.tensor([4.0, 1.0, 0.25]).double()
    error = float((flat(hg) - exact).norm() / exact.norm())
    if not isinstance(estimator, bl.FirstOrderCorrected):  # (whose bias moves alike)
        assert hg.digits <= -math.log10(max(error, 1e-16)) + 1.3
    assert hg.status is bl.Status.OK or dtype is torch.bfloat16
    assert hg.digits > {torch.float64: 8, torch.float32: 2, torch.bfloat16: -1}[dtype]


def test_cancellation_and_chaos():
    assert quadratic(torch.float32, Probed(bl.FirstOrderCorrected(1e-6))).status is bl.Status.DIGITS_LOST
    assert quadratic(torch.float64, Probed(bl.FirstOrderCorrected(1e-6))).status is bl.Status.OK
    logistic = bl.Problem(lambda y, x, b: (y**2 / 2 - 1.95 * x * (y**2 - 2 * y**3 / 3)).sum(), lambda y, x, b: y.sum())
    found = bl.hypergradient(
        logistic,
        torch.ones(1),
        torch.full((1,), 0.3),
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(1.0), 60),
        estimator=Probed(bl.Unrolled()),
    )
    assert found.digits < 1, "the logistic map at 3.9 forgets float32 within forty steps"


def test_random_numbers_states_and_tasks_are_those_of_the_estimator():
    def inner_loss(y, x, b):
        return (torch.nn.functional.dropout(y - x, 0.3) ** 2).sum()

    problem = bl.Problem(inner_loss, lambda y, x, b: (y**2).sum())
    x = torch.ones(4, dtype=torch.float64)
    arguments = (problem, x, 0 * x, bl.Batches(None, None))
    found = []
    for estimator in (bl.MemoryReduced(warm_inner=True), Probed(bl.MemoryReduced(warm_inner=True))):
        torch.manual_seed(0)
        solver = bl.Descent(bl.SGD(0.1), 3)
        first = bl.hypergradient(*arguments, solver=solver, estimator=estimator)
        again = bl.hypergradient(*arguments, solver=solver, estimator=estimator, state=first.state)
        found.append((first.grad, again.grad, again.state.inner, torch.rand(1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    tasks = bl.Problem(lambda y, x, b: ((y - b * x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    hg = bl.hypergradient(
        tasks,
        x,
        torch.zeros(2, 4, dtype=torch.float64),
        bl.Batches(b, b),
        solver=bl.Descent(bl.SGD(0.1), 3),
        estimator=bl.TaskMean(Probed(bl.Unrolled())),
    )
    assert hg.digits > 10


def test_what_the_estimator_cannot_see_is_refused():
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    with pytest.raises(ValueError, match="FirstOrder cannot see"):
        bl.hypergradient(
            problem,
            torch.ones(2),
            torch.zeros(2),
            bl.Batches(None, None),
            solver=bl.Descent(bl.SGD(0.1), 2),
            estimator=Probed(bl.FirstOrder()),
        )
    with pytest.raises(TypeError, match="an estimator was needed"):
        Probed(bl.SGD(0.1))
    with pytest.raises(ValueError, match="probes=0"):
        Probed(bl.Unrolled(), probes=0)
