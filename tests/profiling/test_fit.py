"""largest_fit, fit and recommend: exact, honest about what was looked at, and sentences that are true. And forecasts as
users meet them."""

import dataclasses
import functools
import math

import pytest
import torch
from bilevel_profiling import Case, ForecastError, forecast, largest_fit, measure, recommend
from bilevel_profiling.forecasting import NotMonotone, fit, search
from bilevel_profiling.forecasting.search import needed, with_value
from bilevel_profiling.records import sizes
from bilevel_profiling.records.record import Record
from torch.nn import functional as F

import bilevel as bl
from bilevel.problems import hypercleaning

WIDTH = 8


def setup(device, batch=4, width: int = WIDTH):
    """A least-squares problem of `width` numbers on `batch` examples."""
    data = torch.randn(batch, width, device=device)
    problem = bl.Problem(lambda y, x, b: ((b @ y - x.sum()) ** 2).sum(), lambda y, x, b: (y**2).sum() + 0 * x.sum())
    return problem, torch.zeros(3, device=device), torch.ones(width, device=device), bl.Batches(data, None)


def case(**changes):
    given = {"setup": setup, "solver": bl.Descent(bl.SGD(lr=0.1), 3), "estimator": bl.Unrolled()} | changes
    return Case(given.pop("setup"), **given)


@functools.cache
def need(over, value):
    return needed(forecast(with_value(case(), over, value)))


@pytest.mark.parametrize("over", ["inner_steps", "batch", "width"])
@pytest.mark.parametrize("slack", [0, -1])
@pytest.mark.parametrize("value", [1, 5])
def test_exact_to_the_byte(over, slack, value):
    """A budget of just what a value needs fits it, and one byte less does not."""
    found = fit(case(), need(over, value) + slack, over, at_most=32)
    assert found.value == (value if slack >= 0 else value - 1)
    if found.value:
        assert need(over, found.value) <= found.budget_bytes
    assert need(over, found.value + 1) > found.budget_bytes
    assert found.forecasts.keys() >= {found.value, found.value + 1} - {0}


def test_largest_fit_is_the_value_of_the_fit():
    assert (
        largest_fit(case(), need("batch", 5), "batch", at_most=8)
        == fit(case(), need("batch", 5), "batch", at_most=8).value
        == 5
    )


@pytest.fixture
def searched(monkeypatch):
    """fit() over inner steps that need what a curve says, in KiB: the search alone, without forecasts."""

    def run(needs, limit, at_most):
        def told(made):
            steps = made.solver.max_steps
            assert 1 <= steps <= at_most
            return Record(case="curve", estimator="", base_tensor_bytes=1024 * needs(steps), peak_tensor_bytes=0)

        monkeypatch.setattr(search, "forecast", told)
        return fit(case(), limit, at_most=at_most)

    return run


@pytest.mark.parametrize("at_most", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5])
def test_short_ranges(searched, at_most, value):
    found = searched(lambda steps: steps, value * 1024 + 1, at_most)
    assert found.value == min(value, at_most)
    assert found.capped == (value >= at_most)
    assert_true(found)


@pytest.mark.parametrize(
    ("needs", "most"),
    [
        (lambda k: 7 + 3 * k, 7),
        (lambda k: 7, 7),
        (lambda k: k**2, 40),
        (lambda k: 2 ** min(k, 60), 40),
        (math.isqrt, 40),
    ],
)
@pytest.mark.parametrize("value", [200, 999_999])
def test_few_forecasts_find_a_far_value(searched, needs, most, value):
    found = searched(needs, 1024 * needs(value), 1_000_000)
    assert needs(found.value) <= needs(value)
    assert found.value == 1_000_000 or needs(found.value + 1) > needs(value)
    assert len(found.forecasts) <= most
    assert_true(found)


CURVES = {
    "steps": [1, 1, 1, 1, 5, 5, 5, 9, 9, 9, 9, 9, 12, 20],
    "flat, then steep": [2] * 12 + [50, 60],
    "flat, then a little": [2] * 13 + [3],
    "squares": [n**2 for n in range(1, 15)],
    "steep, then flat": [1, 10, 20, 30] + [31] * 10,
    "powers": [2**n for n in range(14)],
    "roots": [math.isqrt(100 * n) for n in range(1, 15)],
}


@pytest.mark.parametrize("budget", [0.5, 1.2, 2.5, 9.5, 30.5, 31.5, 55, 10000])
@pytest.mark.parametrize("shape", CURVES)
def test_any_growth_is_searched_exactly(searched, shape, budget):
    needs = CURVES[shape]
    for at_most in range(1, len(needs) + 1):
        found = searched(lambda steps: needs[steps - 1], int(budget * 1024), at_most)
        assert found.value == max((n for n, kib in enumerate(needs[:at_most], 1) if kib <= budget), default=0)
        assert_true(found)


def assert_true(found):
    """What the sentence of a fit says, checked against its forecasts."""
    text = found.text
    if found.value == 0:
        assert text.startswith(f"does not fit: {found.over} = 1 needs {sizes.text(needed(found.forecasts[1]))}")
        return
    assert (
        f"{found.over} = {found.value:,} fits ({sizes.text(needed(found.record))} of {sizes.text(found.budget_bytes)})"
        in text
    )
    if "does not grow" in text:
        assert len({needed(record) for value, record in found.forecasts.items() if value > 1}) == 1
    elif "was looked at" in text:
        assert found.value == found.at_most
    else:
        more = needed(found.forecasts[found.value + 1])
        told = f"{found.value + 1:,} would need {sizes.text(more)}" in text
        assert told or f"{found.value + 1:,} is {more - found.budget_bytes:,} bytes too many" in text
        assert needed(found.forecasts[found.value + 1]) > found.budget_bytes


def test_a_budget_that_is_too_small_says_what_one_would_need():
    found = fit(case(), 1)
    assert (found.value, found.record) == (0, None)
    assert found.text == f"does not fit: inner_steps = 1 needs {need('inner_steps', 1)} B of 1 B"


@pytest.mark.parametrize(
    "estimator",
    [bl.Implicit(bl.CG(3)), bl.MemoryReduced(), bl.FirstOrderCorrected(), bl.Unrolled("iterates", last=2)],
    ids=repr,
)
def test_memory_that_does_not_grow_says_so(estimator):
    found = fit(case(estimator=estimator), "1MiB", at_most=8)
    assert (found.value, found.capped) == (8, True)
    assert_true(found)
    assert ("does not grow" in found.text) == found.constant


def test_what_grows_but_fits_is_capped():
    found = fit(case(), "1GiB", at_most=20)
    assert (found.value, found.capped, found.constant) == (20, True, False)
    assert "no more than 20 was looked at" in found.text


def test_the_three_sizes_of_a_sentence_can_be_told_apart():
    found = fit(case(), need("inner_steps", 50) - 1, at_most=64)
    assert found.value == 49
    assert "bytes too many" in found.text
    assert_true(found)


def test_memory_that_falls_is_no_question_of_a_largest_value(searched):
    with pytest.raises(NotMonotone, match=r"memory falls as inner_steps grows: .*one by one"):
        searched(lambda steps: (1, 2, 3, 1, 1, 1, 1, 1)[steps - 1], 3000, 8)


def tasks(device, count=3):
    problem = bl.Problem(lambda y, x, b: ((b @ y - x.sum()) ** 2).sum(), lambda y, x, b: ((b @ y) ** 2).sum())
    data = torch.randn(count, 64, 32)
    return problem, torch.zeros(3), torch.ones(count, 32), bl.Batches(data, data)


@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.FirstOrderCorrected()], ids=lambda estimator: type(estimator).__name__
)
def test_the_chunk_of_a_task_mean(estimator):
    mean = case(setup=tasks, solver=bl.Descent(bl.SGD(0.1), 1), estimator=bl.TaskMean(estimator))
    needs = [needed(forecast(with_value(mean, "chunk", chunk))) for chunk in range(1, 4)]
    assert needs == sorted(needs)
    found = fit(mean, needs[1], "chunk", at_most=3)
    assert found.value == max(chunk for chunk, size in enumerate(needs, 1) if size <= needs[1])
    assert fit(mean, needs[-1], "chunk", at_most=4).value == 4
    assert_true(found)


@pytest.mark.parametrize(
    ("made", "over", "said"),
    [
        (case(), "apples", "it can be over inner_steps, batch, width"),
        (case(), "chunk", "it can be over inner_steps, batch, width"),
        (case(setup=tasks, estimator=bl.TaskMean(bl.Unrolled())), "steps", "it can be over inner_steps, chunk, count"),
        (case(solver=bl.Converge(bl.SGD(lr=0.1), max_steps=3)), "steps", "it can be over inner_steps, batch, width"),
        (case(setup=functools.partial(setup, batch=2)), "seed", "it can be over inner_steps, batch, width"),
    ],
)
def test_an_unknown_quantity_is_told_what_there_is(made, over, said):
    with pytest.raises(ValueError) as error:
        fit(made, "1MiB", over)
    assert said in str(error.value)


@dataclasses.dataclass(frozen=True)
class Unlimited(bl.InnerSolver):
    """A rule of the user's own, without a limit of steps that could be set."""

    dynamics = optimizer = bl.SGD(lr=0.1)
    max_steps = 2
    fixed = True


Unlimited.__abstractmethods__ = frozenset()  # it is never run


def test_a_case_with_nothing_to_vary_says_so():
    made = case(setup=lambda device: setup(device), solver=Unlimited())
    with pytest.raises(ValueError) as error:
        fit(made, "1MiB")
    assert "nothing in it can" in str(error.value)


@pytest.mark.parametrize(
    "budget",
    [
        "12 apples",
        0,
        "0",
        "-1GiB",
        -5,
        True,
        False,
        None,
        "",
        "1e9",
        "inf",
        math.nan,
        math.inf,
        "24G",
        "GiB",
        [],
        "0x10",
        "1.GiB",
    ],
)
def test_a_budget_that_is_no_size(budget):
    with pytest.raises(ValueError, match=r"is no size; write bytes, or a number with KiB"):
        fit(case(), budget)


def test_a_budget_below_a_byte():
    with pytest.raises(ValueError):
        sizes.parse("0.4")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("1 tib", 2**40),
        ("1.5kB", 1500),
        (2**80, 2**80),
        (" 7 B ", 7),
        ("80GB", 80 * 10**9),
        (3, 3),
    ],
)
def test_sizes(text, size):
    assert sizes.parse(text) == size


@pytest.mark.parametrize("at_most", [0, -1, 1.5, "3", None])
def test_a_bad_end_of_the_search(at_most):
    with pytest.raises(ValueError, match="at_most is"):
        fit(case(), 1000, at_most=at_most)


def test_everything_that_is_forecast_is_told():
    told = {}
    found = fit(case(), 2000, told=told.__setitem__)
    assert told == found.forecasts
    assert list(found.forecasts) == sorted(found.forecasts)


ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "iterates": bl.Unrolled("iterates"),
    "cg": bl.Implicit(bl.CG(3)),
    "last": bl.Unrolled(last=1),
    "corrected": bl.FirstOrderCorrected(),
}


def measured(label, error, **changes):
    known = case(estimator=ESTIMATORS[label], label=label)
    given = {"settings": repr(known.estimator), "inner_steps": 3, "program_relative_error": error} | changes
    return Record(case=known.name, estimator=label, **given)


def labels(found, fits=True):
    return [advice.label for advice in found if advice.fits == fits]


def test_without_records_those_without_bias_come_first_and_among_them_the_cheaper():
    found = recommend(case(), "1MiB", estimators=ESTIMATORS)
    assert labels(found)[:2] == ["unrolled", "iterates"]
    work = {advice.label: advice.forecast.matmul_flops or advice.forecast.moved_bytes for advice in found}
    assert work["unrolled"] <= work["iterates"]
    assert [work[label] for label in labels(found)[2:]] == sorted(work[label] for label in labels(found)[2:])
    assert all(advice.sentence.startswith("Fits (") and advice.error is None for advice in found)
    assert "the exact gradient of the K-step program" in found[0].sentence
    assert "truncated to the last 1 steps" in next(advice.sentence for advice in found if advice.label == "last")
    (least,) = (advice for advice in found if "the least" in advice.sentence and "x the least" not in advice.sentence)
    assert work[least.label] == min(work.values())


def test_with_records_of_all_the_more_exact_comes_first_by_powers_of_ten():
    errors = {"unrolled": 3e-3, "iterates": 5e-3, "cg": 2e-9, "last": 0.7, "corrected": 0.0}
    records = [measured(label, error) for label, error in errors.items()]
    found = recommend(case(), "1MiB", estimators=ESTIMATORS, records=records)
    assert labels(found) == ["corrected", "cg", "unrolled", "iterates", "last"]
    assert all(f"measured error {errors[advice.label]:.1e}" in advice.sentence for advice in found)


@pytest.mark.parametrize("change", [{"inner_steps": 4}, {"settings": "Unrolled()"}, {"case": "other"}])
def test_records_of_something_else_are_not_taken(change):
    records = [dataclasses.replace(measured(label, 1e-3), **change) for label in ("cg", "corrected")]
    assert all(
        advice.error is None
        for advice in recommend(case(), "1MiB", estimators={"cg": ESTIMATORS["cg"]}, records=records)
    )


def test_the_error_at_the_solution_goes_before_that_of_the_program():
    record = measured("cg", 0.5, solution_relative_error=1e-6)
    (advice,) = recommend(case(), "1MiB", estimators={"cg": ESTIMATORS["cg"]}, records=[record])
    assert advice.error == 1e-6


def test_an_error_that_is_no_number_comes_last():
    records = [measured("unrolled", math.nan), measured("cg", 0.5)]
    found = recommend(
        case(), "1MiB", estimators={label: ESTIMATORS[label] for label in ("unrolled", "cg")}, records=records
    )
    assert labels(found) == ["cg", "unrolled"]


def test_an_infinite_error_comes_last():
    records = [measured("unrolled", math.inf), measured("cg", 0.5)]
    found = recommend(
        case(), "1MiB", estimators={label: ESTIMATORS[label] for label in ("unrolled", "cg")}, records=records
    )
    assert labels(found) == ["cg", "unrolled"]


def test_what_does_not_fit_comes_after_by_what_it_needs():
    found = recommend(case(solver=bl.Descent(bl.SGD(0.1), 30)), 600, estimators=ESTIMATORS)
    assert labels(found)
    late = [advice for advice in found if not advice.fits]
    assert [advice.label for advice in found] == labels(found) + [advice.label for advice in late]
    assert [advice.needed_bytes for advice in late] == sorted(advice.needed_bytes for advice in late)
    assert all(advice.sentence == f"Does not fit: needs {sizes.text(advice.needed_bytes)} of 600 B." for advice in late)
    assert all(advice.needed_bytes <= 600 for advice in found if advice.fits)


def test_an_estimator_that_refuses_the_problem_is_a_row():
    made = Case(hypercleaning.setup, solver=bl.Descent(bl.SGD(lr=0.1), 1), estimator=bl.Unrolled())
    found = recommend(made, "1GiB", estimators={"first-order": bl.FirstOrder(), "unrolled": bl.Unrolled()})
    assert [advice.label for advice in found] == ["unrolled", "first-order"]
    refusing = found[-1]
    assert (refusing.fits, refusing.needed_bytes, refusing.forecast) == (False, None, None)
    assert refusing.sentence.startswith("Refuses the problem: FirstOrder cannot see")


def attending(device):
    q = torch.randn(2, 2, 16, 8)
    inner = lambda y, x, b: F.scaled_dot_product_attention(q * y, q * x, q).pow(2).sum()  # noqa: E731
    return bl.Problem(inner, lambda y, x, b: (y**2).sum()), torch.ones(8), torch.ones(8), bl.Batches(None, None)


def test_an_estimator_that_cannot_differentiate_twice_is_a_row_too():
    found = recommend(
        case(setup=attending), "1GiB", estimators={"unrolled": bl.Unrolled(), "corrected": bl.FirstOrderCorrected()}
    )
    assert [advice.label for advice in found] == ["corrected", "unrolled"]


def test_an_error_in_setup_is_no_refusal():
    def broken(device):
        raise ValueError("my data file is broken")

    with pytest.raises(ValueError, match="my data file"):
        recommend(case(setup=broken), "1GiB")


def elementwise(device):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 4).sum(), lambda y, x, b: (y**2).sum())
    return problem, torch.zeros(50), torch.ones(50), bl.Batches(None, None)


def test_compute_is_compared_in_one_unit():
    found = recommend(
        case(setup=elementwise), "1MiB", estimators={"dense": bl.Implicit(bl.Dense()), "cg": bl.Implicit(bl.CG(3))}
    )
    moved = {advice.label: advice.forecast.moved_bytes for advice in found}
    assert moved["dense"] > 5 * moved["cg"]
    assert labels(found) == ["cg", "dense"]


def test_rooflines_rank_by_time():
    found = recommend(
        case(setup=elementwise),
        "1MiB",
        estimators={"dense": bl.Implicit(bl.Dense()), "cg": bl.Implicit(bl.CG(3))},
        on="a100",
    )
    assert labels(found) == ["cg", "dense"]
    assert "the least time at best of those that fit" in found[0].sentence


def test_a_task_mean_is_recommended_task_means():
    found = recommend(
        case(setup=tasks, solver=bl.Descent(bl.SGD(0.1), 1), estimator=bl.TaskMean(bl.Unrolled(), 3)), "1MiB"
    )
    assert all(isinstance(advice.estimator, bl.TaskMean) and advice.estimator.chunk == 3 for advice in found)


# --- forecasts as users meet them
# -----------------------------------------------------------------------------------------------------------------


def posed(loss, size=3, dtype=torch.float32):
    def made(device):
        return (
            bl.Problem(loss, lambda y, x, b: (y**2).sum()),
            torch.zeros(size, dtype=dtype),
            torch.ones(size, dtype=dtype),
            bl.Batches(None, None),
        )

    return case(setup=made)


def squares(y, x):
    return (y - x) ** 2


def formatted(y, x, b):
    loss = squares(y, x).sum()
    f"{loss:.3f}"  # READS
    return loss


def looping(y, x, b):
    loss, steps = squares(y, x).sum(), 0
    while loss > steps and steps < 5:  # READS
        steps += 1
    return loss


def ranging(y, x, b):
    return sum(squares(y, x).sum() for _ in range(x.argmax() + 1))  # READS


def one_hot(y, x, b):
    return (squares(y, x) * F.one_hot(torch.tensor([0, 1, 2]))).sum()  # READS


def unique(y, x, b):
    return squares(y, x).sum() * len(torch.unique(x.detach()))  # READS


def nonzero(y, x, b):
    return squares(y, x)[torch.nonzero(y.detach() > 0)].sum()  # READS


def listed(y, x, b):
    return squares(y, x).sum() * y.tolist()[0]  # READS


def numbers(y, x, b):
    return squares(y, x).sum() * math.exp(y.sum())  # READS


def asserted(y, x, b):
    assert torch.isfinite(y).all()  # READS
    return squares(y, x).sum()


def compared(y, x, b):
    assert not torch.equal(y, x)  # READS
    return squares(y, x).sum()


def indexed(y, x, b):
    return squares(y, x)[y.argmax()]  # READS


def repeated(y, x, b):
    return squares(y, x).repeat_interleave(torch.tensor([1, 2, 3])).sum()  # READS


def contained(y, x, b):
    return squares(y, x).sum() * (2.0 if 1.0 in y else 1.0)  # READS


def sorted_out(y, x, b):
    return max(squares(y, x))  # READS


def numpied(y, x, b):
    return squares(y, x).sum() * float(y.detach().cpu().numpy().sum())  # READS


READING = [
    formatted,
    looping,
    ranging,
    one_hot,
    unique,
    nonzero,
    listed,
    numbers,
    asserted,
    compared,
    indexed,
    repeated,
    contained,
    sorted_out,
    numpied,
]


@pytest.mark.parametrize("loss", READING)
def test_a_loss_that_reads_is_told_its_line_and_a_remedy(loss):
    with pytest.raises(ForecastError) as error:
        forecast(posed(loss))
    text = str(error.value)
    assert "test_fit.py:" in text
    assert "# READS" in text
    assert "runs on tensors without data" in text
    assert "measure()" in text
    assert measure(posed(loss), repeats=1, errors=False).peak_tensor_bytes > 0


@pytest.mark.parametrize(
    ("loss", "remedy"), [(one_hot, "num_classes"), (repeated, "output_size")], ids=["one_hot", "repeat_interleave"]
)
def test_a_remedy_fits_the_operator(loss, remedy):
    with pytest.raises(ForecastError, match=remedy):
        forecast(posed(loss))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, x, b: (squares(y, x).sum(), f"{squares(y, x).sum()}")[0],
        lambda y, x, b: torch.where(y > 0, squares(y, x), 0.0).sum(),
        pytest.param(
            lambda y, x, b: (squares(y, x) * F.one_hot(torch.tensor([0, 1, 2]), 3)).sum(),
            marks=pytest.mark.xfail(
                strict=True,
                reason="without data torch makes a one_hot by comparing, with a mask of 1 byte a number on top",
            ),
            id="one_hot",
        ),
        lambda y, x, b: squares(y, x).sum() * torch.rand(()),
        lambda y, x, b: F.dropout(squares(y, x), 0.5).sum(),
        lambda y, x, b: squares(y, x).topk(2).values.sum(),
        lambda y, x, b: squares(y, x).sort().values[0],
        lambda y, x, b: squares(y, x).masked_fill(y > 1, 0.0).sum(),
        lambda y, x, b: squares(y, x).to(torch.bfloat16).float().sum(),
        lambda y, x, b: torch.fft.fft(squares(y, x)).abs().sum(),
        lambda y, x, b: squares(y, x).sum() * len(y) * y.numel() * y.shape[0],
    ],
)
def test_what_reads_nothing_is_forecast_to_the_byte(loss):
    assert forecast(posed(loss)).peak_tensor_bytes == measure(posed(loss), repeats=1, errors=False).peak_tensor_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_dtypes_and_empty_tensors(dtype, size):
    made = posed(lambda y, x, b: squares(y, x).sum(), size, dtype)
    assert forecast(made).peak_tensor_bytes == measure(made, repeats=1, errors=False).peak_tensor_bytes


def test_no_inner_steps_are_forecast():
    for estimator in ESTIMATORS.values():
        made = case(solver=bl.Descent(bl.SGD(0.1), 0), estimator=estimator)
        assert forecast(made).peak_tensor_bytes == measure(made, repeats=1, errors=False).peak_tensor_bytes


def test_sizes_that_no_machine_has_do_not_overflow():
    found = forecast(posed(lambda y, x, b: squares(y, x).sum(), 2**50))
    assert found.base_tensor_bytes == 4 * 2**52 + 4  # x, y, Adam's two moments of x and its step
    assert found.peak_tensor_bytes > 4 * 2**52


CACHED = {}


def caching(device):
    if "data" not in CACHED:
        CACHED["data"] = torch.ones(3)
    problem = bl.Problem(lambda y, x, b: ((y - b) * x).pow(2).sum(), lambda y, x, b: (y**2).sum())
    return problem, torch.ones(3), torch.ones(3), bl.Batches(CACHED["data"], None)


def test_a_setup_that_caches_can_be_measured_after_a_forecast_or_is_told_why_not():
    CACHED.clear()
    forecast(case(setup=caching))
    try:
        measure(case(setup=caching), repeats=1)
    except Exception as error:
        assert "cache" in str(error) or "forecast" in str(error)  # noqa: PT017


def test_a_setup_that_caches_can_be_forecast_after_it_was_measured():
    CACHED.clear()
    real = measure(case(setup=caching), repeats=1, errors=False)
    assert type(CACHED["data"]) is torch.Tensor
    found = forecast(case(setup=caching))
    assert (found.base_tensor_bytes, found.peak_tensor_bytes) == (real.base_tensor_bytes, real.peak_tensor_bytes)


def test_a_forecast_of_everything_has_what_a_loss_captured():
    def capturing(device):
        data = torch.ones(1000, 3)
        problem = bl.Problem(lambda y, x, b: (data @ y - x.sum()).pow(2).sum(), lambda y, x, b: (y**2).sum())
        return problem, torch.zeros(3), torch.ones(3), bl.Batches(None, None)

    assert forecast(case(setup=capturing)).base_tensor_bytes >= 12000


def test_a_compiled_function_says_that_its_memory_was_metered_without_compilation():
    @torch.compile(backend="eager")
    def compiled(x):
        return (x.sin() + x.cos()).sum()

    x = torch.ones(1000)
    assert any("compile" in note for note in measure(lambda: compiled(x), repeats=3).notes)


def test_a_custom_operator_without_shapes_is_told_so():
    @torch.library.custom_op("bilevel_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(ForecastError, match="register_fake"):
        forecast(lambda: doubled(torch.ones(3)))


def test_any_solver_is_fitted_over_its_limit_of_steps():
    solver = bl.Converge(bl.SGD(lr=1.0), tol=1e-6, max_steps=3)
    found = fit(dataclasses.replace(case(), solver=solver, estimator=bl.Unrolled()), "1 MiB", at_most=8)
    assert found.value == found.at_most == 8
    assert found.forecasts[8].inner_steps == 8


def test_what_the_problem_lacks_comes_last_and_is_said():
    from bilevel.testing import Need

    plain = recommend(case(), "1GiB", estimators=ESTIMATORS)
    assert not any(advice.unmet for advice in plain)
    found = recommend(case(), "1GiB", estimators=ESTIMATORS, lacks={Need.SOLUTION})
    unmet = [bool(advice.unmet) for advice in found if advice.fits]
    assert unmet == sorted(unmet)
    assert any(unmet)
    assert not all(unmet)
    for advice in found:
        assert ("needs inner steps that reach the solution" in advice.sentence) == bool(advice.unmet)
        assert bool(advice.unmet) == isinstance(
            advice.estimator, (bl.Implicit, bl.MemoryReduced, bl.FirstOrderCorrected)
        )


def test_all_estimators_of_the_library_are_recommended_or_refuse():
    from bilevel.testing import ENTRIES, Need

    found = recommend(case(), "1GiB", estimators="all", lacks={Need.SECOND_DERIVATIVES})
    kinds = {type(advice.estimator) for advice in found}
    assert kinds == {type(entry.estimator) for entry in ENTRIES}
    assert all(advice.sentence for advice in found)
    first = next(advice for advice in found if advice.fits)
    assert isinstance(first.estimator, bl.FirstOrderCorrected) or not first.unmet
    with pytest.raises(ValueError, match="'all' was needed"):
        recommend(case(), "1GiB", estimators="some")
