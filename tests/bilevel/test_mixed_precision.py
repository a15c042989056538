"""Autocast in the losses: what is scaled, that scaling changes no number, and that what is lost is said."""

import itertools
import math
import warnings

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.engine import scaling
from bilevel.loop import MixedPrecision, OuterLoop, Precision, PrecisionCheck
from bilevel.loop.computing import usable

S = 2.0**14


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def cosine(a, b):
    a, b = flat(a).double(), flat(b).double()
    return float(a @ b / (a.norm() * b.norm()))


class Scaled:
    """A function whose cotangents inside are S times as large."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *given):
        return scaling.left(self.function(*scaling.entered(given, S)), S)


def curved(tasks=None):
    """Second derivatives that vary: y and x in products and in a fourth power."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(3, 2, generator=g, dtype=torch.float64)
    problem = bl.Problem(
        lambda y, x, b: (
            (y["a"] - (A @ x).tanh() * b).square().sum() + 0.1 * y["a"].pow(4).sum() + x.exp() @ y["b"].square()
        ),
        lambda y, x, b: (y["a"] - 1).square().sum() + (y["b"] * y["a"][:2]).sum() + 0.1 * x.square().sum(),
    )
    inner = {"a": torch.randn(3, generator=g, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    batch = torch.tensor(1.5, dtype=torch.float64)
    if tasks is not None:
        inner = {name: leaf.expand(tasks, *leaf.shape).clone() for name, leaf in inner.items()}
        batch = torch.arange(1.0, tasks + 1, dtype=torch.float64)
    return problem, torch.tensor([0.3, -0.4], dtype=torch.float64), inner, bl.Batches(batch, batch)


def scaled(problem):
    return bl.Problem(Scaled(problem.inner_loss), Scaled(problem.outer_loss))


@pytest.mark.parametrize("label", catalogue.ESTIMATORS)
def test_no_estimator_sees_that_losses_are_scaled_inside(label):
    """No estimator need be linear in f, or in anything."""
    problem, *rest = curved()
    answers = []
    for each in (problem, scaled(problem)):
        torch.manual_seed(0)
        answers.append(
            bl.hypergradient(each, *rest, solver=bl.Descent(bl.SGD(0.05), 3), estimator=catalogue.ESTIMATORS[label])
        )
    plain, inside = answers
    # (S is a power of two, so all that is left is the order of sums in a longer graph.)
    torch.testing.assert_close(inside.grad, plain.grad, rtol=1e-14, atol=1e-15)
    assert torch.equal(flat(plain.inner), flat(inside.inner))
    assert plain.status is inside.status
    assert plain.stats["calls"] == inside.stats["calls"]


@pytest.mark.parametrize("engine", [None, bl.Captured()], ids=["eager", "captured"])
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Implicit(bl.CG(5)), bl.estimators.Forward()], ids=str)
def test_nor_do_tasks_and_engines(estimator, engine):
    problem, *rest = curved(tasks=2)
    how = {"solver": bl.Descent(bl.SGD(0.05), 3), "estimator": bl.TaskMean(estimator), "engine": engine}
    plain, inside = (bl.hypergradient(each, *rest, **how) for each in (problem, scaled(problem)))
    torch.testing.assert_close(inside.grad, plain.grad, rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward mode
def test_derivatives_of_any_order_and_direction_are_the_true_ones():
    def function(x):
        return (x[0] ** 3 * x[1]).sin()

    def within(x):
        return scaling.left(function(scaling.entered(x, S)), S)

    x = torch.tensor([0.7, 0.3], dtype=torch.float64, requires_grad=True)
    derivatives = [
        [torch.func.grad(f)(x), torch.func.hessian(f)(x), torch.func.jacrev(torch.func.hessian(f))(x)]
        for f in (function, within)
    ]
    for plain, inside in zip(*derivatives, strict=True):
        torch.testing.assert_close(inside, plain, rtol=1e-13, atol=0)
    # In plain reverse mode, four times over.
    for f in (function, within):
        value = f(x)
        for _ in range(4):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient[0]
        derivatives.append(gradient.detach())
    torch.testing.assert_close(derivatives[-1], derivatives[-2], rtol=1e-13, atol=0)


def test_cotangents_inside_are_scaled_in_every_order():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.view_as(value)

        @staticmethod
        def backward(ctx, cotangent):
            seen.append(float(cotangent.detach()))
            return Watched.apply(cotangent)

    y = torch.tensor(2.0, requires_grad=True)

    def third(scale):
        seen.clear()
        inside = scaling.entered(y, scale)
        loss = scaling.left(Watched.apply(inside) ** 3, scale)
        (first,) = torch.autograd.grad(loss, y, create_graph=True)
        (second,) = torch.autograd.grad(first, y, create_graph=True)
        assert (first.item(), second.item()) == (12.0, 12.0)
        return list(seen)

    plain, larger = third(1.0), third(8.0)
    assert plain[0] == 12.0
    assert all(b in (a, 8 * a) for a, b in zip(plain, larger, strict=True))
    assert larger[0] == 8 * plain[0]
    # What reaches y in the second derivative went through the inside, too.
    assert larger[-1] == 8 * plain[-1]


def small_residuals(residual):
    """One inner step that brings y to x; f is least squares whose residuals are all small. dF/dx by hand."""
    g = torch.Generator().manual_seed(0)
    # X x is a sum of small integers, which 16 bits hold exactly: the way back is the point here.
    X, x = torch.randint(-1, 2, (4096, 8), generator=g).float(), torch.randint(-2, 3, (8,), generator=g).float()
    t = X @ x - residual * torch.randn(4096, generator=g)
    problem = bl.Problem(
        lambda y, x, b: (y - x).square().sum() / 2, lambda y, x, b: ((X @ y[:, None])[:, 0] - b).square().mean()
    )
    x64, X64 = x.double(), X.double()
    answer = 2 * X64.T @ (X64 @ x64 - t.double()) / 4096
    arguments = (x, torch.zeros(8), bl.Batches(None, t))
    how = {"solver": bl.Descent(bl.SGD(1.0), 1), "estimator": bl.Unrolled()}
    return problem, arguments, how, answer


def test_float16_without_scaling_destroys_what_scaling_keeps():
    problem, arguments, how, answer = small_residuals(0.05)
    # Cotangents of 2 * 0.05 / 4096 are 400 of float16's smallest steps; of a ten-thousandth of the loss none is left.
    problem = bl.Problem(problem.inner_loss, lambda y, x, b, f=problem.outer_loss: 1e-4 * f(y, x, b))
    answer = 1e-4 * answer
    unscaled = MixedPrecision(torch.float16, torch.amp.GradScaler("cpu", init_scale=1.0))
    found = {
        name: bl.hypergradient(each, *arguments, **how)
        for name, each in {
            "full": problem,
            "bfloat16": MixedPrecision(torch.bfloat16).problem(problem),
            "float16": MixedPrecision(torch.float16).problem(problem),
            "float16 without": unscaled.problem(problem),
        }.items()
    }
    assert all(each.grad.dtype == torch.float32 and each.status is bl.Status.OK for each in found.values())
    assert cosine(found["full"].grad, answer) > 1 - 1e-9
    assert cosine(found["bfloat16"].grad, answer) > 0.999
    assert cosine(found["float16"].grad, answer) > 0.999
    assert flat(found["float16 without"].grad).norm() < 0.5 * answer.norm()


def net(dtype=torch.float32, weight=1.0):
    """A small net with weighted examples, its matrix products under autocast's rule; the losses times `weight`."""
    g = torch.Generator().manual_seed(1)
    X, Y = torch.randn(64, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (64,), generator=g)
    y = {"a": torch.randn(6, 8, generator=g, dtype=torch.float64) / 3, "b": torch.randn(8, 3, generator=g).double() / 3}
    X, y = X.to(dtype), {name: leaf.to(dtype) for name, leaf in y.items()}

    def losses(y, rows):
        return torch.nn.functional.cross_entropy((X[rows] @ y["a"]).tanh() @ y["b"], Y[rows], reduction="none")

    train, valid = slice(0, 32), slice(32, 64)
    problem = bl.Problem(
        lambda y, x, b: weight * (x.sigmoid() * losses(y, train)).mean(),
        lambda y, x, b: weight * losses(y, valid).mean(),
    )
    return problem, torch.zeros(32, dtype=dtype), y, bl.Batches(None, None)


@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.Implicit(bl.CG(3, damping=1e-7))], ids=["unrolled", "implicit"]
)
def test_products_of_second_order_survive_float16_too(estimator):
    """Losses of 1e-7: gradients, products with the Hessian and mixed ones all vanish without S."""
    how = {"solver": bl.Descent(bl.SGD(1e6), 3), "estimator": estimator}
    reference = bl.hypergradient(*net(torch.float64, 1e-7), **how).grad
    problem, *rest = net(weight=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = bl.hypergradient(MixedPrecision(torch.float16).problem(problem), *rest, **how)
        unscaled = MixedPrecision(torch.float16, torch.amp.GradScaler("cpu", init_scale=1.0))
        lost = bl.hypergradient(unscaled.problem(problem), *rest, **how)
    assert cosine(kept.grad, reference) > 0.99
    assert 0.9 < flat(kept.grad).norm() / reference.norm() < 1.1
    norm = float(flat(lost.grad).norm())
    assert not norm > 0 or cosine(lost.grad, reference) < 0.9 or not 0.9 < norm / reference.norm() < 1.1


def coupled(device="cpu"):
    """g = |M y - x|^2 / 2, f = |N y - t|^2 / 2: dF/dx = M^-T N' (N M^-1 x - t), by hand in float64."""
    g = torch.Generator().manual_seed(0)
    M = torch.eye(8) + 0.1 * torch.randn(8, 8, generator=g)
    N, t, x = torch.randn(8, 8, generator=g), torch.randn(8, generator=g), torch.randn(8, generator=g)
    M, N, t, x = (each.to(device) for each in (M, N, t, x))
    problem = bl.Problem(
        lambda y, x, b: ((M @ y[:, None])[:, 0] - x).square().sum() / 2,
        lambda y, x, b: ((N @ y[:, None])[:, 0] - t).square().sum() / 2,
    )
    M64, N64 = M.double(), N.double()
    inverse = torch.linalg.inv(M64)
    answer = inverse.T @ N64.T @ (N64 @ inverse @ x.double() - t.double())
    return problem, x, answer


def loop_of(problem, x, inner, steps, **options):
    x = x.clone().requires_grad_()
    options = {"optimizer": torch.optim.SGD([x], lr=0.0)} | options
    return OuterLoop(problem, x, inner, itertools.repeat(bl.Batches(None, None), steps), **options)


def test_the_check_tells_a_destroyed_hypergradient_from_a_sound_one():
    problem, x, answer = coupled()
    how = {"solver": bl.Descent(bl.SGD(0.5), 60), "precision": MixedPrecision(torch.bfloat16)}
    check = PrecisionCheck(every=2)
    destroyed = loop_of(
        problem, x, torch.zeros(8), 3, estimator=bl.FirstOrderCorrected(nu=1e-4), check=check, carry=False, **how
    )
    with pytest.warns(UserWarning, match=r"outer step \d: reduced precision .* cosine .* norm") as caught:
        steps = list(destroyed)
    assert len([each for each in caught if "reduced precision" in str(each.message)]) == 2
    assert [step.precision is None for step in steps] == [False, True, False]
    sound = list(loop_of(problem, x, torch.zeros(8), 1, estimator=bl.Implicit(bl.CG(20)), check=check, **how))
    for step, bad in ((steps[0], True), (sound[0], False)):
        grad = step.hypergradient.grad
        by_hand = cosine(grad, answer), float(grad.double().norm() / answer.norm())
        # (nu = 1e-4 in float32 has three digits.)
        assert step.precision.cosine == pytest.approx(by_hand[0], abs=5e-3)
        assert step.precision.ratio == pytest.approx(by_hand[1], rel=5e-3)
        assert (step.precision.kept < 0.9) == bad
        assert step.precision.seconds > 0


def test_the_check_disturbs_nothing():
    """With random numbers, a state, and a warm y: x, y, state and generators to the bit, with it and without."""

    def run(check):
        problem, x, y, _ = net()
        torch.manual_seed(3)

        def noisy(y, x, b):
            return problem.inner_loss(y, x, b) + 1e-3 * (torch.randn(8, 3) * y["b"]).sum()

        loop = loop_of(
            bl.Problem(noisy, problem.outer_loss),
            x,
            y,
            4,
            solver=bl.Descent(bl.SGD(0.1), 2),
            estimator=bl.estimators.SOBA(rate=0.1),
            precision=MixedPrecision(),
            check=check,
        )
        steps = list(loop)
        return [step.hypergradient.grad for step in steps], loop.inner, steps[-1].hypergradient.state, torch.rand(1)

    plain, checked = run(None), run(PrecisionCheck(every=1, warn_below=0.0))
    assert all(
        torch.equal(a, b) for a, b in zip(pytree.tree_leaves(plain[:2]), pytree.tree_leaves(checked[:2]), strict=True)
    )
    assert torch.equal(plain[3], checked[3])
    assert torch.equal(flat(plain[2].to_dict()["adjoint"]), flat(checked[2].to_dict()["adjoint"]))


def test_the_same_random_numbers_are_compared():
    problem = bl.Problem(
        lambda y, x, b: (y - x * torch.randn(3)).square().sum() / 2, lambda y, x, b: (y * torch.randn(3)).sum()
    )
    loop = loop_of(
        problem,
        torch.ones(3),
        torch.zeros(3),
        5,
        solver=bl.Descent(bl.SGD(0.5), 2),
        estimator=bl.Unrolled(),
        check=PrecisionCheck(every=1, reference=problem),
    )
    assert [step.precision.cosine for step in loop] == [1.0] * 5


def test_losses_that_open_autocast_themselves_are_held_against_a_reference():
    problem, x, _ = coupled()

    def cast(loss):
        def under(*given):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(*given).float()

        return under

    opened = bl.Problem(cast(problem.inner_loss), cast(problem.outer_loss))
    how = {"solver": bl.Descent(bl.SGD(0.5), 60), "estimator": bl.FirstOrderCorrected(nu=1e-4)}
    with pytest.raises(ValueError, match="nothing to compare"):  # rather than the same autocast twice
        list(loop_of(opened, x, torch.zeros(8), 1, check=PrecisionCheck(), **how))
    with pytest.warns(UserWarning, match="reduced precision"):
        list(loop_of(opened, x, torch.zeros(8), 1, check=PrecisionCheck(reference=problem), **how))
    # Around the loop it is closed for the reference.
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="reduced precision"):
        list(loop_of(problem, x, torch.zeros(8), 1, check=PrecisionCheck(), **how))


@pytest.mark.parametrize(
    ("ours", "full", "expected"),
    [
        ([1.0, 0.0], [3.0, 4.0], Precision(0.6, 0.2)),
        ([0.0, 0.0], [3.0, 4.0], Precision(0.0, 0.0)),
        ([0.0, 0.0], [0.0, 0.0], Precision(1.0, 1.0)),
        ([1.0, 0.0], [0.0, 0.0], Precision(0.0, math.inf)),
        ([1e30, 0.0], [1e-30, 0.0], Precision(1.0, 1e60)),
    ],
)
def test_cosine_and_ratio(ours, full, expected):
    found = PrecisionCheck().compare(torch.tensor(ours), torch.tensor(full))
    assert found.cosine == expected.cosine
    assert found.ratio == pytest.approx(expected.ratio)
    assert (found.kept >= 0.9) == (expected == Precision(1.0, 1.0))


def test_what_is_not_finite_is_warned_of():
    found = PrecisionCheck().compare(torch.tensor([math.nan]), torch.ones(1))
    with pytest.warns(UserWarning, match="nan"):
        PrecisionCheck().warn(3, found)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    problem, x, y, batches = net()
    x = x.requires_grad_()
    optimizer = torch.optim.SGD([x], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    precision = MixedPrecision(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3))
    loop = OuterLoop(
        problem,
        x,
        y,
        [batches] * 20,
        solver=bl.Descent(bl.SGD(0.5), 3),
        estimator=bl.Unrolled(),
        optimizer=optimizer,
        scheduler=scheduler,
        precision=precision,
    )
    skipped, scales, moved = [], [], []
    before = x.detach().clone()
    for step in loop:
        scales.append(precision.scale)
        skipped.append(step.skipped)
        moved.append(not torch.equal(before, x))
        assert loop.inner["a"].isfinite().all()
        before = x.detach().clone()
    count = skipped.index(False)
    assert 0 < count < 12
    assert skipped[:count] == [True] * count
    assert scales[:count] == [2.0 ** (21 - i) for i in range(count)]
    assert moved == [not each for each in skipped]
    assert len(skipped) == 20, "a skipped step is a step"
    assert max(scales[count:]) > scales[count], "it grows again after three"
    assert optimizer.param_groups[0]["lr"] == 0.5 ** skipped.count(False), "a skipped step is none to a scheduler"


@pytest.mark.parametrize("label", catalogue.ESTIMATORS)
def test_an_overflow_is_seen_whatever_the_estimator(label):
    """A scale at which some derivative leaves float16's range, and one at which all do."""
    g = torch.Generator().manual_seed(0)
    M = torch.eye(4) + 0.1 * torch.randn(4, 4, generator=g)
    M, C, t = M @ M.T, torch.randn(4, 3, generator=g), torch.randn(4, generator=g)
    problem = bl.Problem(
        lambda y, x, b: (M @ y[:, None])[:, 0] @ y / 2 - (C @ x[:, None])[:, 0] @ y,
        lambda y, x, b: ((M @ y[:, None])[:, 0] - t).square().sum() / 2 + x.sum(),
    )
    arguments = torch.randn(3, generator=g), torch.zeros(4), bl.Batches(None, None)
    how = {"solver": bl.Descent(bl.SGD(0.2), 10), "estimator": catalogue.ENTRIES[label].usual}
    found = []
    for scale in (None, 2.0**4, 2.0**14, 2.0**20):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        each = problem if scale is None else MixedPrecision(torch.float16, scaler).problem(problem)
        torch.manual_seed(0)
        found.append(bl.hypergradient(each, *arguments, **how))
    assert [usable(each) for each in found[:2]] == [True, True]
    assert not usable(found[3])
    for each in found[1:]:
        assert not usable(each) or cosine(each.grad, found[0].grad) > 0.95


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scaler", [None, "cuda"])
def test_the_same_on_a_gpu(scaler):
    problem, x, _ = coupled("cuda")
    made = None if scaler is None else torch.amp.GradScaler(scaler, init_scale=2.0**8)
    loop = loop_of(
        problem,
        x,
        torch.zeros(8, device="cuda"),
        12,
        solver=bl.Descent(bl.SGD(0.5), 30),
        estimator=bl.Unrolled(),
        precision=MixedPrecision(torch.float16, made),
        check=PrecisionCheck(every=11),
        carry=False,
    )
    assert list(loop)[-1].precision.cosine > 0.99


def test_what_is_not_finite_at_scale_one_is_an_error():
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: (y - x).sum() / 0.0)
    precision = MixedPrecision(torch.float16, torch.amp.GradScaler("cpu", init_scale=4.0))
    loop = loop_of(
        problem,
        torch.ones(2),
        torch.zeros(2),
        9,
        solver=bl.Descent(bl.SGD(0.5), 1),
        estimator=bl.Unrolled(),
        precision=precision,
    )
    with pytest.raises(bl.BilevelError, match="outer step 2"):
        list(loop)
    assert precision.scale == 1.0


def test_the_scale_is_saved_and_loaded():
    ran = MixedPrecision(torch.float16)
    ran.update(False)
    ran.update(True)
    other = MixedPrecision(torch.float16)
    other.load_state_dict(ran.state_dict())
    assert other.scale == ran.scale == 32768.0
    other.update(True)
    ran.update(True)
    assert other.state_dict() == ran.state_dict()
    assert ran.state_dict()["_growth_tracker"] == 2
    with pytest.raises(ValueError, match="another dtype"):
        MixedPrecision(torch.bfloat16).load_state_dict(ran.state_dict())


def test_a_problem_is_the_same_until_the_scale_changes():
    precision, problem = MixedPrecision(torch.float16), net()[0]
    first = precision.problem(problem)
    assert precision.problem(problem) is first
    precision.update(True)
    assert precision.problem(problem) is first
    precision.update(False)
    assert precision.problem(problem) is not first


def test_features_and_a_proximal_term_stay_what_they_are():
    """Under autocast with S, and without: the same to bfloat16's digits, and a pull to init(x) is still one."""
    g = torch.Generator().manual_seed(0)
    X, t = torch.randn(16, 5, generator=g), torch.randn(16, generator=g)
    with_features = bl.Problem(
        lambda y, x, b: (b @ y - t).square().mean() + 0.1 * y.square().sum(),
        lambda y, x, b: (b @ y - 2 * t).square().mean(),
        features=lambda x, b: (b @ x).tanh(),
    )
    pulled = bl.proximal(
        bl.Problem(lambda y, x, b: (X @ y - t).square().mean(), lambda y, x, b: y.sum(), init=lambda x, b: x), 1.0
    )
    for problem, x, inner, batch in (
        (with_features, torch.randn(5, 4, generator=g), torch.zeros(4), X),
        (pulled, torch.randn(5, generator=g), None, None),
    ):
        how = {"solver": bl.Descent(bl.SGD(0.2), 200), "estimator": bl.Implicit(bl.CG(10))}
        plain = bl.hypergradient(problem, x, inner, bl.Batches(batch, batch), **how)
        for dtype, scaler in ((torch.bfloat16, None), (torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**8))):
            low = MixedPrecision(dtype, scaler).problem(problem)
            found = bl.hypergradient(low, x, inner, bl.Batches(batch, batch), **how)
            assert cosine(found.grad, plain.grad) > 0.99
            assert found.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixedPrecision(torch.float32), ValueError, "leave it out"),
        (lambda: MixedPrecision(torch.float16, 3.0), TypeError, "GradScaler was needed"),
        (lambda: MixedPrecision(torch.bfloat16, torch.amp.GradScaler("cpu")), ValueError, "leave it out"),
        (lambda: MixedPrecision(torch.float16, torch.amp.GradScaler("cpu", enabled=False)), ValueError, "disabled"),
        (lambda: PrecisionCheck(every=0), ValueError, "at least 1"),
        (lambda: PrecisionCheck(warn_below=2.0), ValueError, r"\[0, 1\]"),
        (lambda: PrecisionCheck(reference=lambda: 0), TypeError, "bilevel.Problem"),
    ],
)
def test_bad_arguments_are_said(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_float64_variables_are_refused():
    problem, *rest = net(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        bl.hypergradient(
            MixedPrecision().problem(problem), *rest, solver=bl.Descent(bl.SGD(0.5), 1), estimator=bl.Unrolled()
        )
