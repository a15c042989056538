"""What a loop may be told beside the problem: accumulation, clipping, schedulers, when to stop, and its progress."""

import contextlib
import functools
import io
import itertools
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.loop import EarlyStopping, OuterLoop, Step, progress

D = torch.float64


def regression():
    """One weight per feature; 12 rows to validate on."""
    g = torch.Generator().manual_seed(0)
    X, t = torch.randn(24, 4, generator=g, dtype=D), torch.randn(24, generator=g, dtype=D)

    def error(y, rows):
        return (X[rows] @ y - t[rows]).square().mean()

    problem = bl.Problem(
        lambda y, x, rows: error(y, rows) + (x.exp() * y.square()).sum(), lambda y, x, rows: error(y, rows)
    )
    train, valid = torch.arange(12), torch.arange(12, 24)
    return problem, torch.zeros(4, dtype=D), torch.zeros(4, dtype=D), train, valid


def loop_of(loader, *, lr=0.1, optimizer=torch.optim.SGD, scheduler=None, x=None, **options):
    problem, outer, inner, *_ = regression()
    x = (outer if x is None else x).requires_grad_()
    made = optimizer([x], lr=lr)
    if scheduler is not None:
        options["scheduler"] = scheduler(made)
    how = {"solver": bl.Descent(bl.SGD(0.1), 5), "estimator": bl.Unrolled()} | options
    return OuterLoop(problem, x, inner, loader, optimizer=made, **how), x


def halves():
    *_, train, valid = regression()
    return [bl.Batches(train, part) for part in valid.split(3)]


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.Implicit(bl.CG(8)), bl.estimators.Forward()], ids=lambda e: type(e).__name__
)
def test_four_batches_accumulated_are_one_four_times_as_large(estimator):
    *_, train, valid = regression()
    few, x = loop_of(halves(), accumulate=4, carry=False, estimator=estimator)
    one, whole = loop_of([bl.Batches(train, valid)], carry=False, estimator=estimator)
    (step,), (large,) = list(few), list(one)
    torch.testing.assert_close(step.hypergradient.grad, large.hypergradient.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.outer_loss, large.outer_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(x, whole, rtol=1e-12, atol=1e-14)


def test_y_and_the_state_go_on_from_batch_to_batch_as_from_step_to_step():
    """As steps with an optimizer that moves nothing."""
    loader = halves()
    how = {"estimator": bl.MemoryReduced(steps=2, warm_adjoint=True), "solver": bl.Descent(bl.SGD(0.05), 2)}
    group, _ = loop_of(loader, accumulate=4, **how)
    single, _ = loop_of(loader, lr=0.0, **how)
    (step,), steps = list(group), list(single)
    mean = sum(each.hypergradient.grad for each in steps) / 4
    torch.testing.assert_close(step.hypergradient.grad, mean, rtol=1e-13, atol=1e-15)
    assert torch.equal(group.inner, single.inner)
    assert torch.equal(step.hypergradient.inner, steps[-1].hypergradient.inner)
    assert torch.equal(step.hypergradient.inner_loss, sum(each.hypergradient.inner_loss for each in steps) / 4)
    calls = [each.hypergradient.stats["calls"] for each in steps]
    assert step.hypergradient.stats["calls"] == {name: sum(each[name] for each in calls) for name in calls[0]}
    assert step.hypergradient.stats["inner_steps"] == 8


def test_what_is_left_over_is_a_smaller_group():
    loop, _ = loop_of(halves(), accumulate=3, carry=False, lr=0.0)
    alone, _ = loop_of(halves(), carry=False, lr=0.0)
    grouped, single = list(loop), [step.hypergradient.grad for step in alone]
    assert [step.index for step in grouped] == [0, 1]
    torch.testing.assert_close(grouped[0].hypergradient.grad, sum(single[:3]) / 3)
    assert torch.equal(grouped[1].hypergradient.grad, single[3])


def test_the_status_of_a_group_is_its_worst():
    problem = bl.Problem(lambda y, x, b: b * (y - x).square().sum() / 2, lambda y, x, b: y.square().sum())
    x = torch.ones(2, requires_grad=True)
    loader = [bl.Batches(-1.0, None), bl.Batches(1.0, None)]
    loop = OuterLoop(
        problem,
        x,
        torch.zeros(2),
        loader,
        solver=bl.Descent(bl.SGD(0.1), 2),
        estimator=bl.Implicit(bl.CG(3)),
        optimizer=torch.optim.SGD([x], lr=0.1),
        accumulate=2,
    )
    with pytest.warns(UserWarning, match="NEGATIVE_CURVATURE"):
        (step,) = loop
    assert step.hypergradient.status is bl.Status.NEGATIVE_CURVATURE


def test_a_failure_in_a_group_moves_nothing():
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum() / 2, lambda y, x, b: (b / y).sum())
    x = torch.ones(2, requires_grad=True)
    loop = OuterLoop(
        problem,
        x,
        torch.zeros(2),
        [bl.Batches(None, 1.0), bl.Batches(None, float("inf"))],
        solver=bl.Descent(bl.SGD(0.5), 2),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([x], lr=0.1),
        accumulate=2,
    )
    with pytest.raises(bl.BilevelError, match="outer step 0"):
        next(loop)
    assert torch.equal(x.detach(), torch.ones(2))
    assert torch.equal(loop.inner, torch.zeros(2))


# ----------------------------------------------------------------------------------------------------- clipping


def test_clipping_is_torchs_and_reports_what_was_estimated():
    bare, _ = loop_of(halves()[:1], lr=1.0)
    (plain,) = list(bare)
    norm = plain.hypergradient.grad.norm()
    limit = float(norm) / 3
    loop, x = loop_of(halves()[:1], lr=1.0, clip=limit)
    (step,) = list(loop)
    assert torch.equal(step.hypergradient.grad, plain.hypergradient.grad)
    assert bl.loop.values(step)["hypergradient_norm"] == pytest.approx(float(norm))
    expected = plain.hypergradient.grad * (limit / (norm + 1e-6))  # as clip_grad_norm_ has it
    torch.testing.assert_close(-x.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(x.grad, -x.detach())


def test_one_norm_over_all_tensors_of_x_and_one_gradient_for_a_tensor_that_stands_in_it_twice():
    x = torch.tensor(1.0, requires_grad=True)
    outer = {"a": x, "again": x, "b": torch.tensor([1.0, 1.0], requires_grad=True)}
    problem = bl.Problem(
        lambda y, x, b: (y - x["a"]).square() / 2, lambda y, x, b: 3 * y + 0 * x["again"] + 2 * x["b"].sum()
    )
    loop = OuterLoop(
        problem,
        outer,
        torch.tensor(0.0),
        [bl.Batches(None, None)],
        solver=bl.Descent(bl.SGD(1.0), 1),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([x, outer["b"]], lr=1.0),
        clip=1.0,
    )
    list(loop)
    length = (9 + 4 + 4) ** 0.5
    torch.testing.assert_close(x.grad, torch.tensor(3 / length), rtol=1e-5, atol=0)
    torch.testing.assert_close(outer["b"].grad, torch.full((2,), 2 / length), rtol=1e-5, atol=0)


def test_any_function_of_the_tensors_clips():
    clip = functools.partial(torch.nn.utils.clip_grad_value_, clip_value=1e-3)
    loop, x = loop_of(halves()[:1], lr=1.0, clip=clip)
    (step,) = list(loop)
    assert torch.equal(x.grad, step.hypergradient.grad.clamp(-1e-3, 1e-3))
    assert not torch.equal(x.grad, step.hypergradient.grad)


def test_clipping_comes_after_the_mean():
    bare, _ = loop_of(halves(), accumulate=4)
    (plain,) = list(bare)
    limit = float(plain.hypergradient.grad.norm()) * 1.01
    loop, x = loop_of(halves(), accumulate=4, clip=limit)
    (step,) = list(loop)
    assert max(float(each.hypergradient.grad.norm()) for each in loop_of(halves(), lr=0.0)[0]) > limit
    assert torch.equal(x.grad, step.hypergradient.grad)


# --------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
    ],
    ids=["step", "cosine", "one cycle", "sequential"],
)
def test_a_scheduler_steps_after_each_outer_step(make):
    loader = list(itertools.islice(itertools.cycle(halves()), 8))
    loop, _ = loop_of(loader, scheduler=make)
    rates = [step.lr for step in loop]
    probe = torch.zeros(1, requires_grad=True)
    alone = torch.optim.SGD([probe], lr=0.1)
    scheduler, expected = make(alone), []
    for _ in loader:
        expected.append((alone.param_groups[0]["lr"],))
        alone.step()
        scheduler.step()
    assert rates == expected


def test_with_accumulation_it_steps_once_a_group():
    loop, _ = loop_of(halves(), accumulate=2, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert [step.lr for step in loop] == [(0.1,), (0.05,)]


def test_a_plateau_is_one_of_the_outer_loss():
    batch = halves()[0]

    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2)

    # An lr of 1e-6 moves too little to make the loss better by 1e-4 of itself.
    still, _ = loop_of([batch] * 8, lr=1e-6, carry=False, scheduler=plateau)
    rates = [round(step.lr[0], 12) for step in still]
    assert rates == [1e-6] * 4 + [1e-7] * 3 + [1e-8], "the first is the best, three are no better, then 0.1"
    falling, _ = loop_of([batch] * 8, lr=0.05, carry=False, scheduler=plateau)
    steps = list(falling)
    assert all(b.outer_loss < a.outer_loss for a, b in itertools.pairwise(steps))
    assert {step.lr for step in steps} == {(0.05,)}


def test_several_schedulers_step_one_after_another():
    def two(o):
        return [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5), torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1)]

    loop, _ = loop_of(halves()[:3], scheduler=two)
    assert [round(step.lr[0], 9) for step in loop] == [0.1, 0.05, 0.0025]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": 0.0}, ValueError, "norm above 0"),
        ({"clip": float("nan")}, ValueError, "norm above 0"),
        ({"clip": "1"}, ValueError, "norm above 0"),
        ({"clip": True}, ValueError, "norm above 0"),
        ({"scheduler": lambda o: lambda step: 1.0}, TypeError, "lr_scheduler was needed"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1)},
            ValueError,
            "another optimizer",
        ),
        ({"precision": torch.float16}, TypeError, "MixedPrecision"),
        ({"check": 100}, TypeError, "PrecisionCheck"),
        ({"stop": 3}, TypeError, "EarlyStopping"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"accumulate": 1.5}, ValueError, "accumulate"),
    ],
)
def test_bad_options_are_said_before_the_first_step(options, error, message):
    with pytest.raises(error, match=message):
        loop_of(halves(), **options)


# ----------------------------------------------------------------------------------------------- early stopping


def test_the_loop_ends_when_the_outer_loss_is_no_better():
    loop, _ = loop_of([halves()[0]] * 50, carry=False, lr=0.0, stop=EarlyStopping(patience=3))
    assert len(list(loop)) == 4, "the best one, and three that are no better"
    assert list(loop) == [], "and it stays ended"


def test_other_processes_are_told_that_it_stopped(monkeypatch):
    class Company:
        told = 0

        def guarded(self):
            return contextlib.nullcontext()

        def ended(self):
            self.told += 1

    estimator, company = bl.Unrolled(), Company()
    monkeypatch.setattr(bl.Unrolled, "company", company)
    loop, _ = loop_of([halves()[0]] * 50, carry=False, lr=0.0, stop=EarlyStopping(patience=3), estimator=estimator)
    assert (len(list(loop)), list(loop), company.told) == (4, [], 1)


def test_the_best_x_is_that_of_the_best_loss():
    """Each loss belongs to x before its step. The rates overshoot: the second x is the best."""
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum() / 2, lambda y, x, b: y.square().sum() / 2)
    x = torch.tensor([2.0], requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.75)
    stop = EarlyStopping(patience=2, best_of=x)
    loop = OuterLoop(
        problem,
        x,
        torch.zeros(1),
        [bl.Batches(None, None)] * 9,
        solver=bl.Descent(bl.SGD(1.0), 1),
        estimator=bl.Unrolled(),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k == 0 else 4.0),
        stop=stop,
    )
    losses = [float(step.outer_loss) for step in loop]
    # x: 2, 0.5 (the best), -1, 2, ...: f is x^2 / 2
    assert losses == [2.0, 0.125, 0.5, 2.0]
    assert (stop.best, stop.best_index) == (0.125, 1)
    assert not torch.equal(x.detach(), torch.tensor([0.5])), "nothing is restored by itself"
    stop.restore()
    assert torch.equal(x.detach(), torch.tensor([0.5]))
    assert x.requires_grad


def test_any_value_in_the_body():
    stop, seen = EarlyStopping(patience=2, least=0.1), []
    loop, _ = loop_of([halves()[0]] * 50)
    for step in loop:
        value = [5.0, 4.0, 3.95, 3.89, 3.7, 3.69, float("nan")][step.index]
        seen.append(value)
        if stop.see(torch.tensor(value)):
            break
    assert seen[-1] != seen[-1], "3.89 is better than 4.0 by more than 0.1, 3.7 too; then 3.69 and NaN are not"
    assert stop.best == pytest.approx(3.7)


@pytest.mark.parametrize("values", [[float("nan")] * 9, [float("inf")] * 9, [1.0] * 9, [1, 2, 3, 4]])
def test_patience_is_counted_from_the_best_or_the_first(values):
    stop = EarlyStopping(patience=3)
    assert [stop.see(value) for value in values].index(True) == 3


def test_the_state_goes_on():
    values = [3.0, 2.0, 2.5, 2.4, 1.0, 2.0, 2.0, 2.0]
    x = torch.zeros(2, requires_grad=True)
    for cut in range(len(values)):
        whole, first, second = (EarlyStopping(3, best_of=x) for _ in range(3))
        ends = []
        for index, value in enumerate(values):
            x.data.fill_(index)
            if index == cut:
                second.load_state_dict(first.state_dict())
            ends.append((whole.see(value), (first if index < cut else second).see(value)))
        assert all(a == b for a, b in ends)
        second.restore()
        assert torch.equal(x.detach(), torch.full((2,), 4.0))
        assert (second.best, second.best_index) == (whole.best, whole.best_index) == (1.0, 4)


def test_what_was_kept_is_a_copy():
    x = torch.zeros(1, requires_grad=True)
    stop = EarlyStopping(1, best_of=x)
    stop.see(1.0)
    saved = stop.state_dict()
    saved["kept"][0].fill_(7)
    x.data.fill_(9)
    stop.restore()
    assert float(x.detach()) == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EarlyStopping(0), ValueError, "at least 1"),
        (lambda: EarlyStopping(2.0), ValueError, "at least 1"),
        (lambda: EarlyStopping(2, least=-1.0), ValueError, "at least 0"),
        (lambda: EarlyStopping(2).restore(), RuntimeError, "best_of=outer"),
        (lambda: EarlyStopping(2).load_state_dict({"best": 1.0}), ValueError, "state_dict"),
        (
            lambda: EarlyStopping(2, best_of=torch.zeros(2)).load_state_dict(
                {"best": 1.0, "best_index": 0, "seen": 1, "kept": [torch.zeros(3)]}
            ),
            ValueError,
            "another problem",
        ),
    ],
)
def test_bad_uses_of_early_stopping_are_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ----------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps_of(count):
    found = bl.Hypergradient(torch.zeros(1), torch.zeros(1), torch.tensor(0.25), torch.tensor(1.0))
    return [Step(index, found) for index in range(count)]


def test_progress_is_one_line_on_a_terminal():
    stream = Terminal()
    assert [step.index for step in progress(steps_of(4), total=10, stream=stream, seconds=0.0)] == [0, 1, 2, 3]
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("\n")
    lines = [line.strip() for line in written.strip().split("\r") if line]
    assert lines[-1].startswith("step 4/10, outer loss 0.25, ")
    assert "steps/s" in lines[-1]
    assert lines[-1].endswith("left")


def test_progress_is_quiet_elsewhere_and_waits_between_lines():
    stream = io.StringIO()
    assert len(list(progress(steps_of(3), stream=stream))) == 3
    assert stream.getvalue() == ""
    stream = Terminal()
    assert len(list(progress(iter(steps_of(100)), stream=stream, seconds=60.0))) == 100
    assert stream.getvalue().count("\r") == 2, "the first and the last"
    assert "left" not in stream.getvalue(), "nobody knows of a generator how long it is"


def test_a_loop_says_how_many_steps_there_are():
    stream = Terminal()
    loop, _ = loop_of(halves(), accumulate=3, epochs=2)
    assert loop.total == 4
    assert len(list(progress(loop, stream=stream))) == 4
    assert "step 4/4" in stream.getvalue()
    assert loop_of(halves(), epochs=None)[0].total is None
    assert loop_of(iter(halves()))[0].total is None


def test_progress_passes_on_what_ends_the_loop():
    def failing():
        yield from steps_of(2)
        raise bl.BilevelError("diverged")

    stream = Terminal()
    with pytest.raises(bl.BilevelError, match="diverged"):
        list(progress(failing(), stream=stream, seconds=0.0))
    assert stream.getvalue().endswith("\n"), "the message begins on a line of its own"
    stream, seen = Terminal(), []
    for step in progress(steps_of(9), stream=stream, seconds=0.0):
        seen.append(step.index)
        if step.index == 3:
            break
    assert seen == [0, 1, 2, 3]


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
    from bilevel.loop.progress import _write

    stream = Terminal()
    width = _write(stream, "a long line", 0)
    _write(stream, "short", width)
    assert stream.getvalue().split("\r")[-1] == "short      "


def test_time_left_is_that_of_this_process_rate():
    from bilevel.loop.progress import line

    resumed = steps_of(1001)[-1]
    assert line(resumed, 1, 2.0, 2000) == "step 1001/2000, outer loss 0.25, 2 s/step, 33:18 left"
    assert line(resumed, 100, 10.0, None) == "step 1001, outer loss 0.25, 10 steps/s"
    assert line(resumed, 1, 20.0, 2000).endswith("5:33:00 left")


# ------------------------------------------------------------------------------------------- all of it at once


def test_options_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop, _ = loop_of(
            list(itertools.islice(itertools.cycle(halves()), 23)),
            x=torch.zeros(4, dtype=D),
            optimizer=torch.optim.AdamW,
            accumulate=2,
            clip=0.1,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
            stop=EarlyStopping(50),
            check=bl.loop.PrecisionCheck(every=5, reference=regression()[0]),
        )
        steps = list(loop)
    assert [step.index for step in steps] == list(range(12))
    assert [step.index for step in steps if step.precision] == [0, 5, 10]
    assert {step.precision.cosine for step in steps if step.precision} == {1.0}
    assert steps[-1].outer_loss < steps[0].outer_loss
    assert all(step.seconds > 0 and not step.skipped for step in steps)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_all_of_it_goes_on_to_the_bit(cut):
    """Scale and growth of float16, plateau, best x and patience: from a state, as if nothing had happened."""
    g = torch.Generator().manual_seed(0)
    X, t = torch.randn(24, 4, generator=g), torch.randn(24, generator=g)
    problem = bl.Problem(
        lambda y, x, b: ((X[b] @ y[:, None])[:, 0] - t[b]).square().mean() + (x.exp() * y.square()).sum(),
        lambda y, x, b: ((X[b] @ y[:, None])[:, 0] - t[b]).square().mean(),
    )

    def made():
        x = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        return OuterLoop(
            problem,
            x,
            torch.zeros(4),
            [bl.Batches(torch.arange(12), part) for part in torch.arange(12, 24).split(2)],
            solver=bl.Descent(bl.SGD(0.05), 3),
            estimator=bl.MemoryReduced(steps=2, warm_adjoint=True),
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5),
            epochs=None,
            accumulate=2,
            clip=0.5,
            precision=bl.loop.MixedPrecision(torch.float16, scaler),
            check=bl.loop.PrecisionCheck(every=3, warn_below=0.0),
            stop=EarlyStopping(5, best_of=x),
            tolerate=list(bl.Status),
        )

    def story(loop, count=None):
        return [
            (
                step.index,
                step.lr,
                step.skipped,
                step.precision and step.precision.cosine,
                *step.hypergradient.grad.tolist(),
            )
            for step in itertools.islice(loop, count)
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = made()
        expected = story(whole)
        first = made()
        before = story(first, cut)
        second = made()
        second.load_state_dict(first.state_dict())
        after = story(second)
    assert repr(before + after) == repr(expected), "(NaN is not itself)"
    assert torch.equal(second.outer, whole.outer)
    assert any(step[2] for step in expected)
    assert len(expected) < 60, "it stopped"
    assert len({step[1] for step in expected}) > 1
    assert story(second) == []
