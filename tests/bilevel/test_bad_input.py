"""What users do wrong, and what they are told; what must not come back as if it were fine; what must not be touched."""

import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel as bl

F64 = torch.float64
NOTHING = bl.Batches(None, None)
DESCENT = bl.Descent(bl.SGD(lr=0.1), steps=3)

ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled, iterates": bl.Unrolled(keep="iterates"),
    "unrolled, segments": bl.Unrolled(keep="segments"),
    "unrolled, last": bl.Unrolled(last=2),
    "implicit, cg": bl.Implicit(bl.CG(max_steps=5)),
    "implicit, neumann": bl.Implicit(bl.Neumann(steps=5, step_size=0.1)),
    "implicit, dense": bl.Implicit(bl.Dense()),
    "memory reduced": bl.MemoryReduced(steps=5),
    "memory reduced, warm": bl.MemoryReduced(steps=5, warm_inner=True, warm_adjoint=True),
    "first order corrected": bl.FirstOrderCorrected(nu=1e-3),
    "first order corrected, forward": bl.FirstOrderCorrected(nu=1e-3, scheme="forward"),
    "first order": bl.FirstOrder(),
}
FIRST_DERIVATIVES_ONLY = {"first order corrected", "first order corrected, forward", "first order"}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def vector(*numbers: float, **kwargs: Any) -> Tensor:
    return torch.tensor(numbers, **{"dtype": F64, **kwargs})


def inner_loss(y: Tensor, x: Tensor, batch: Any) -> Tensor:
    return ((y - x) ** 2).sum() + 0.1 * (y**4).sum()


def outer_loss(y: Tensor, x: Tensor, batch: Any) -> Tensor:
    """x enters directly, so that every estimator has something to say."""
    return ((y - 2) ** 2).sum() + 0.1 * (x**2).sum()


PROBLEM = bl.Problem(inner_loss, outer_loss)


def without_addresses(value: Any) -> str:
    """An id that is the same in every process that collects the tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def solve(
    problem: Any = PROBLEM, outer: Any = None, inner: Any = None, batches: Any = NOTHING, **kwargs: Any
) -> bl.Hypergradient:
    """hypergradient() with good defaults for what a test does not say."""
    outer = vector(0.5, -0.3) if outer is None else outer
    inner = vector(0.1, 0.2) if inner is None and getattr(problem, "init", None) is None else inner
    return bl.hypergradient(problem, outer, inner, batches, **{"solver": DESCENT, "estimator": bl.Unrolled(), **kwargs})


# Variables


@pytest.mark.parametrize("variable", ["outer", "inner"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.5, TypeError, r"is a float; a pytree of floating tensors was needed; write torch\.tensor\(0\.5\)"),
        (3, TypeError, r"is a int; .* write torch\.tensor\(3\)"),
        ({"a": vector(1.0), "b": 0.5}, TypeError, r"\['b'\] is a float"),
        ({"a": vector(1.0), "b": None}, TypeError, r"\['b'\] is a NoneType"),
        (nn.Linear(2, 2), TypeError, r"is a Linear; .* write dict\(model\.named_parameters\(\)\)"),
        ([nn.Linear(2, 2)], TypeError, r"\[0\] is a Linear; .* write dict\(model\.named_parameters\(\)\)"),
        (nn.Linear(2, 2).parameters(), TypeError, "is a generator"),
        ("name", TypeError, "is a str"),
        (torch.tensor([1, 2]), TypeError, r"has dtype torch\.int64; only floating tensors .* \.float\(\)"),
        ({"a": torch.tensor([True])}, TypeError, r"\['a'\] has dtype torch\.bool"),
        (torch.tensor([1j]), TypeError, r"has dtype torch\.complex64"),
        ({}, ValueError, r"holds no tensors; .* dict\(model\.named_parameters\(\)\)"),
        ([], ValueError, "holds no tensors"),
    ],
    ids=without_addresses,
)
def test_a_variable_that_holds_no_floating_tensors_is_refused(variable, value, error, message):
    with pytest.raises(error, match=f"{variable}.*{message}"):
        solve(**{variable: value})


@pytest.mark.parametrize("variable", ["outer", "inner"])
def test_a_numpy_array_is_refused_as_a_variable(variable):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=f"{variable}.*is a ndarray; a pytree of floating tensors was needed"):
        solve(**{variable: {"a": numpy.ones(2)}})


def test_no_start_and_two_starts_are_refused():
    with pytest.raises(
        ValueError, match=r"inner=None and a problem without init.*Problem\(\.\.\., init=lambda outer, batch"
    ):
        bl.hypergradient(PROBLEM, vector(1.0), None, NOTHING, solver=DESCENT, estimator=bl.Unrolled())
    with pytest.raises(ValueError, match=r"one start too many.*Pass inner=None"):
        solve(bl.Problem(inner_loss, outer_loss, init=lambda x, b: x), inner=vector(1.0, 2.0))


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        (
            vector(1.0, 2.0, device="meta"),
            vector(1.0, 2.0),
            r"mix devices or dtypes: .*meta.*cpu.*\.to\(device=\.\.\., dtype=\.\.\.\)",
        ),
        (
            vector(1.0, 2.0),
            {"a": vector(1.0), "b": vector(1.0, device="meta")},
            r"inner \['b'\] is torch\.float64 on meta",
        ),
        (
            vector(1.0, 2.0),
            vector(1.0, 2.0, dtype=torch.float32),
            r"outer.*torch\.float64 on cpu; inner.*torch\.float32 on cpu",
        ),
        (
            {"a": vector(1.0), "b": vector(1.0, dtype=torch.float16)},
            vector(1.0, 2.0),
            r"outer \['b'\] is torch\.float16",
        ),
    ],
    ids=["outer on meta", "one inner on meta", "dtypes of outer and inner", "dtypes within outer"],
)
def test_mixed_devices_and_dtypes_are_refused(outer, inner, message):
    with pytest.raises(ValueError, match=message):
        solve(outer=outer, inner=inner)


@pytest.mark.parametrize("name", ["unrolled", "implicit, cg", "first order corrected", "first order"])
@pytest.mark.parametrize(
    "start",
    [
        lambda x, b: None,
        lambda x, b: {},
        lambda x, b: 0.0,
        lambda x, b: torch.zeros(2, dtype=torch.int64),
        lambda x, b: torch.zeros(2, dtype=torch.float32),
    ],
    ids=["None", "empty", "float", "integer", "other dtype"],
)
def test_an_init_that_returns_no_fitting_tensors_is_refused_by_name(start, name):
    problem = bl.Problem(inner_loss, outer_loss, init=start)
    with pytest.raises((TypeError, ValueError), match="init"):
        solve(problem, estimator=ESTIMATORS[name])


# Losses


@every_estimator
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda y, x, b: (y - x) ** 2,
            ValueError,
            r"returned a tensor of shape \(2,\).*0-dim tensor was needed\. Reduce it with \.mean\(\)",
        ),
        (lambda y, x, b: (y - x).sum().reshape(1), ValueError, r"returned a tensor of shape \(1,\)"),
        (lambda y, x, b: None, TypeError, "returned None; a 0-dim tensor was needed. Does it end in a return"),
        (lambda y, x, b: (y - x).sum().item(), TypeError, r"returned float; .* without \.item\(\)"),
        (lambda y, x, b: ((y - x).sum(), y), TypeError, "returned tuple"),
        (lambda y, x, b: y.sum().long(), ValueError, r"returned a tensor .*dtype torch\.int64; a floating 0-dim"),
    ],
    ids=["a vector", "one element", "None", "a float", "a pair", "an integer"],
)
def test_a_loss_that_is_no_scalar_is_refused(wrong, error, message, which, name):
    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss, which: wrong}
    with pytest.raises(error, match=f"{which} {message}"):
        solve(bl.Problem(**losses), estimator=ESTIMATORS[name])


@every_estimator
@pytest.mark.parametrize(
    "wrong", [lambda y, x, b: (x**2).sum(), lambda y, x, b: ((y.detach() - x) ** 2).sum()], ids=["unused", "detached"]
)
def test_an_inner_loss_that_does_not_depend_on_inner_is_refused(wrong, name):
    with pytest.raises(ValueError, match=r"inner_loss does not depend on the inner variable.*without \.detach\(\)"):
        solve(bl.Problem(wrong, outer_loss), estimator=ESTIMATORS[name])


NAN = {
    "inner loss, its gradient too": (lambda y, x, b: inner_loss(y, x, b) * torch.nan, outer_loss, {"DIVERGED"}),
    "inner loss, its gradient fine": (lambda y, x, b: inner_loss(y, x, b) + torch.nan, outer_loss, {"NONFINITE"}),
    "outer loss, its gradient too": (
        inner_loss,
        lambda y, x, b: outer_loss(y, x, b) * torch.nan,
        {"NONFINITE", "DIVERGED"},
    ),
    "outer loss, its gradient fine": (
        inner_loss,
        lambda y, x, b: outer_loss(y, x, b) + torch.nan,
        {"NONFINITE", "DIVERGED"},
    ),
    "outer loss infinite": (inner_loss, lambda y, x, b: outer_loss(y, x, b) + torch.inf, {"NONFINITE", "DIVERGED"}),
}


@every_estimator
@pytest.mark.parametrize("case", NAN)
def test_a_loss_that_is_not_finite_is_a_failure(case, name):
    inner, outer, expected = NAN[case]
    hg = solve(bl.Problem(inner, outer), estimator=ESTIMATORS[name])
    assert hg.status.name in expected
    with pytest.raises(bl.BilevelError, match=hg.status.name):
        hg.raise_if_failed()


@every_estimator
def test_a_finite_outer_loss_whose_gradient_is_not_finite_is_a_failure(name):
    """sqrt at 0: the loss is 0, its gradient 0 * inf. Zeros would look like a stationary point."""
    problem = bl.Problem(
        lambda y, x, b: ((y - 0 * x) ** 2).sum(), lambda y, x, b: (y**2).sum().sqrt() + 0.1 * (x**2).sum()
    )
    hg = solve(problem, inner=vector(0.0, 0.0), estimator=ESTIMATORS[name])
    if name == "first order":
        # df/dx alone is finite, and all that it looks at.
        torch.testing.assert_close(hg.grad, 0.2 * vector(0.5, -0.3))
        return
    assert hg.status.failed
    with pytest.raises(bl.BilevelError):
        hg.raise_if_failed()


@every_estimator
def test_an_inner_loop_that_diverges_is_reported(name):
    # At the last step y, or what is computed from it, overflows; before it everything is finite.
    hg = solve(solver=bl.Descent(bl.SGD(lr=50.0), steps=12), estimator=ESTIMATORS[name])
    assert hg.status is bl.Status.DIVERGED
    with pytest.raises(bl.BilevelError, match=r"DIVERGED: The inner loop diverged.*Lower the step size"):
        hg.raise_if_failed()


@every_estimator
def test_an_inner_loop_that_never_arrives_is_reported(name):
    hg = solve(solver=bl.Converge(bl.SGD(lr=0.05), tol=1e-10, max_steps=4), estimator=ESTIMATORS[name])
    assert hg.status is bl.Status.INNER_MAX_STEPS
    hg.raise_if_failed()
    with pytest.raises(bl.BilevelError, match="INNER_MAX_STEPS"):
        hg.raise_if_failed(strict=True)


@every_estimator
def test_an_inner_loss_that_rises_is_reported(name):
    quadratic = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), outer_loss)
    hg = solve(quadratic, solver=bl.Descent(bl.SGD(lr=1.3), steps=4), estimator=ESTIMATORS[name])
    assert hg.status in {bl.Status.INNER_ROSE, bl.Status.NOT_CONTRACTIVE}


@pytest.mark.parametrize("name", ["implicit, cg", "memory reduced", "memory reduced, warm"])
def test_an_indefinite_hessian_is_reported_and_not_an_exception(name):
    saddle = bl.Problem(
        lambda y, x, b: y[0] ** 2 - 0.5 * y[1] ** 2 - (x * y).sum(), lambda y, x, b: y.sum() + 0.1 * (x**2).sum()
    )
    hg = solve(saddle, estimator=ESTIMATORS[name])
    assert hg.status is bl.Status.NEGATIVE_CURVATURE
    assert torch.isfinite(hg.grad).all()
    with pytest.raises(bl.BilevelError, match=r"NEGATIVE_CURVATURE: .*not a minimizer.*FirstOrderCorrected"):
        hg.raise_if_failed()


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_a_neumann_step_that_is_too_large_is_reported_however_short_the_series(steps):
    hg = solve(estimator=bl.Implicit(bl.Neumann(steps=steps, step_size=1.5)))
    assert hg.status is bl.Status.NOT_CONTRACTIVE
    with pytest.raises(bl.BilevelError, match=r"NOT_CONTRACTIVE: .*Lower it, add damping, or use CG"):
        hg.raise_if_failed()


def test_the_status_of_a_series_that_overflows_still_names_the_cause():
    hg = solve(estimator=bl.Implicit(bl.Neumann(steps=1500, step_size=1.5)))
    assert torch.isfinite(hg.grad).all(), "the last term that was no worse than none"
    assert hg.status is bl.Status.NOT_CONTRACTIVE


def test_the_status_of_a_singular_system_names_the_cause():
    flat = bl.Problem(lambda y, x, b: (y.sum() - x.sum()) ** 2, outer_loss)
    hg = solve(flat, estimator=bl.Implicit(bl.Dense()))
    assert hg.status is bl.Status.BREAKDOWN
    with pytest.raises(bl.BilevelError, match=r"BREAKDOWN: The linear system is singular.*damping"):
        hg.raise_if_failed()


# Batches


@every_estimator
def test_too_few_batches_are_refused(name):
    with pytest.raises(
        ValueError,
        match=r"PerStep holds 2 batches and the inner solver takes 3 steps.*Give it 3 batches, or lower steps",
    ):
        solve(batches=bl.Batches(bl.PerStep([1, 2]), None), estimator=ESTIMATORS[name])


@pytest.mark.parametrize(
    "make",
    [lambda: iter([1, 2, 3]), lambda: (i for i in range(3)), lambda: {1, 2, 3}],
    ids=["iterator", "generator", "set"],
)
def test_per_step_refuses_what_can_be_read_only_once(make):
    with pytest.raises(
        TypeError,
        match=r"PerStep was given a \w+, which can be read only once.*"
        r"Write PerStep\(list\(itertools\.islice\(loader, K\)\)\)",
    ):
        bl.PerStep(make())


def test_an_iterator_as_the_inner_batch_is_refused():
    with pytest.raises(
        TypeError, match=r"Batches\.inner is an iterator.*PerStep\(list\(itertools\.islice\(loader, K\)\)\)"
    ):
        solve(batches=bl.Batches(iter([1, 2, 3]), None))


def test_batches_of_different_shapes_are_refused_unless_they_are_meant():
    batches = [
        [torch.zeros(4, 2), torch.zeros(4)],
        [torch.zeros(4, 2), torch.zeros(4)],
        [torch.zeros(3, 2), torch.zeros(3)],
    ]
    with pytest.raises(
        ValueError, match=r"shapes differ between inner steps: batch 2.*\(3, 2\).*drop_last=True.*ragged=True"
    ):
        bl.PerStep(batches)
    assert len(bl.PerStep(batches, ragged=True)) == 3


def test_converge_refuses_a_batch_a_step():
    with pytest.raises(ValueError, match=r"Converge was given PerStep batches.*Descent"):
        solve(batches=bl.Batches(bl.PerStep([1, 2, 3]), None), solver=bl.Converge(bl.SGD(lr=0.1)))


@every_estimator
def test_no_steps_at_all_are_fine_and_need_a_batch_only_for_the_loss(name):
    hg = solve(solver=bl.Descent(bl.SGD(lr=0.1), steps=0), estimator=ESTIMATORS[name])
    torch.testing.assert_close(hg.inner, vector(0.1, 0.2))
    with pytest.raises(ValueError, match="PerStep holds 0 batches"):
        solve(
            solver=bl.Descent(bl.SGD(lr=0.1), steps=0),
            batches=bl.Batches(bl.PerStep([]), None),
            estimator=ESTIMATORS[name],
        )


# Outer variables that do nothing, or that an estimator cannot see


@every_estimator
def test_an_outer_tensor_that_influences_nothing_has_zero_gradient_and_a_warning_by_name(name):
    problem = bl.Problem(lambda y, x, b: inner_loss(y, x["used"], b), lambda y, x, b: outer_loss(y, x["used"], b))
    outer = {"idle": vector(1.0, 2.0), "used": vector(0.5, -0.3), "also": [vector(3.0)]}
    with pytest.warns(
        UserWarning,
        match=r"outer variable \['idle'\], \['also'\]\[0\] influences neither loss: its hypergradient is zero",
    ):
        hg = solve(problem, outer, estimator=ESTIMATORS[name])
    assert torch.equal(hg.grad["idle"], torch.zeros(2, dtype=F64))
    assert torch.equal(hg.grad["also"][0], torch.zeros(1, dtype=F64))
    torch.testing.assert_close(hg.grad["used"], solve(estimator=ESTIMATORS[name]).grad)


@every_estimator
def test_an_outer_variable_used_as_a_copy_is_warned_about(name):
    held = vector(0.5, -0.3)
    problem = bl.Problem(lambda y, x, b: inner_loss(y, held, b), lambda y, x, b: outer_loss(y, held, b))
    with pytest.warns(UserWarning, match="from the `outer` argument and not from a copy of it"):
        hg = solve(problem, held, estimator=ESTIMATORS[name])
    assert torch.equal(hg.grad, torch.zeros(2, dtype=F64))


@every_estimator
def test_an_outer_tensor_that_shifts_the_inner_loss_alone_has_zero_gradient(name):
    """g + c moves no minimizer: zero is the right answer (a warning is fine), an error is not."""
    if name == "first order":
        return  # it refuses whatever enters through the inner loss alone
    problem = bl.Problem(
        lambda y, x, b: inner_loss(y, x["used"], b) + x["shift"] ** 2, lambda y, x, b: outer_loss(y, x["used"], b)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        hg = solve(
            problem, {"used": vector(0.5, -0.3), "shift": torch.tensor(1.0, dtype=F64)}, estimator=ESTIMATORS[name]
        )
    assert hg.grad["shift"].abs() <= 1e-10
    torch.testing.assert_close(hg.grad["used"], solve(estimator=ESTIMATORS[name]).grad)


BLIND_TO_THE_START = [
    name
    for name in ESTIMATORS
    if name != "first order" and (not name.startswith("unrolled") or name == "unrolled, last")
]


@pytest.mark.parametrize("name", BLIND_TO_THE_START)
def test_an_estimator_that_cannot_see_the_start_refuses_an_outer_variable_that_is_only_there(name):
    maml = bl.Problem(
        lambda y, x, b: ((y - 1) ** 2).sum(), lambda y, x, b: ((y - 2) ** 2).sum(), init=lambda x, b: 2 * x["w"]
    )
    with pytest.raises(
        ValueError,
        match=r"cannot see .*\['w'\] through the start of the inner loop \(Problem\.init\).*"
        r"would be zero, which is wrong",
    ):
        solve(maml, {"w": vector(0.5, -0.3)}, estimator=ESTIMATORS[name])
    proximal = solve(bl.proximal(maml, 2.0), {"w": vector(0.5, -0.3)}, estimator=ESTIMATORS[name])
    assert (proximal.grad["w"] != 0).all()


HYPERS = {
    "lr": lambda: bl.SGD(lr=lambda x: x["h"]),
    "momentum": lambda: bl.SGD(lr=0.1, momentum=lambda x: x["h"]),
    "dampening": lambda: bl.SGD(lr=0.1, momentum=0.5, dampening=lambda x: x["h"]),
    "weight_decay": lambda: bl.SGD(lr=0.1, weight_decay=lambda x: x["h"]),
    "adam lr": lambda: bl.Adam(lr=lambda x: x["h"]),
    "adam beta1": lambda: bl.Adam(lr=0.1, betas=(lambda x: x["h"], 0.999)),
    "adam eps": lambda: bl.Adam(lr=0.1, eps=lambda x: x["h"]),
}


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if not name.startswith("unrolled")])
@pytest.mark.parametrize("hyper", HYPERS)
def test_an_estimator_that_cannot_see_the_inner_optimizer_refuses_an_outer_variable_that_is_only_there(hyper, name):
    problem = bl.Problem(lambda y, x, b: inner_loss(y, x["w"], b), lambda y, x, b: outer_loss(y, x["w"], b))
    if hyper == "weight_decay" and name.startswith(("implicit", "memory reduced")):
        pytest.skip("weight decay moves the solution itself, and these see it: test_wrong_numbers_dynamics.py")
    with pytest.raises(ValueError, match=r"cannot see .*\['h'\] through a hyper-parameter of the inner optimizer"):
        solve(
            problem,
            {"w": vector(0.5, -0.3), "h": torch.tensor(0.1, dtype=F64)},
            solver=bl.Descent(HYPERS[hyper](), steps=3),
            estimator=ESTIMATORS[name],
        )


def test_first_order_refuses_an_outer_variable_that_is_only_in_the_inner_loss():
    with pytest.raises(ValueError, match=r"FirstOrder cannot see .*through the inner loss.*Use Unrolled\(\)"):
        solve(bl.Problem(inner_loss, lambda y, x, b: (y**2).sum()), estimator=bl.FirstOrder())


# Losses that change what they are given


def _add(t: Tensor) -> None:
    t += 1


def _without_graph(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


# `t.data.add_(1)` cannot be caught: .data has a version counter of its own, so nothing short of comparing values would
# notice.
IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "+=": _add,
    "mul_": lambda t: t.mul_(2),
    "assignment": lambda t: t.__setitem__(0, 1.0),
    "detach": lambda t: t.detach().add_(1),
    "no_grad": _without_graph,
}


@every_estimator
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_a_loss_that_changes_inner_in_place_is_refused(how, which, name):
    def loss(y, x, b):
        IN_PLACE[how](y)
        return outer_loss(y, x, b)

    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss, which: loss}
    with pytest.raises(ValueError, match=f"{which} changed the inner variable in place.*write y = y \\+ d"):
        solve(bl.Problem(**losses), estimator=ESTIMATORS[name])


@every_estimator
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize("how", ["+=", "no_grad"])
def test_a_loss_that_changes_outer_in_place_is_refused(how, which, name):
    """Each evaluation would move the caller's x."""

    def loss(y, x, b):
        IN_PLACE[how](x)
        return outer_loss(y, x, b)

    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss, which: loss}
    with pytest.raises(ValueError, match=f"{which} changed the outer variable in place"):
        solve(bl.Problem(**losses), estimator=ESTIMATORS[name])


@every_estimator
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
def test_a_loss_that_changes_its_batch_in_place_is_refused(which, name):
    """A batch normalized in place is normalized again at every step, and recomputing estimators see other data than
    they saw first."""

    def loss(y, x, b):
        b -= 0.5
        return outer_loss(y, x, None) + (b * y).sum()

    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss, which: loss}
    with pytest.raises(ValueError, match=f"{which} changed .*batch.* in place"):
        solve(bl.Problem(**losses), batches=bl.Batches(vector(1.0, 2.0), vector(3.0, 4.0)), estimator=ESTIMATORS[name])


class Counter(nn.Module):
    """Writes a buffer that is no running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)], ids=["BatchNorm1d", "InstanceNorm1d"]
)
def test_functional_refuses_running_statistics_in_training_mode(layer):
    layer.train()
    module = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(
        ValueError,
        match=rf"{type(layer).__name__} 1 is in training mode .*track_running_stats=False.*module\.eval\(\).*GroupNorm",
    ):
        bl.functional(module)
    with pytest.raises(ValueError, match=r"\(the module itself\) is in training mode"):
        bl.functional(layer)
    call, params = bl.functional(module.eval())
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    call(params, torch.randn(3, 2, 2) if isinstance(layer, nn.InstanceNorm1d) else torch.randn(4, 2))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    module.train()
    with pytest.raises(ValueError, match="is in training mode"):
        call(params, torch.randn(4, 2))


def test_functional_accepts_batch_statistics():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    call, params = bl.functional(module)
    assert call(params, torch.randn(4, 2)).shape == (4, 2)


def test_functional_reports_a_forward_that_writes_a_buffer():
    call, params = bl.functional(Counter())
    with pytest.raises(ValueError, match=r"the module wrote its buffers \['calls'\] in its forward.*pure function"):
        call(params, torch.ones(1, 2))


def test_functional_shares_storage_and_neither_parameters_nor_flags_change():
    module = nn.Linear(2, 2)
    call, params = bl.functional(module)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    moved = {name: (parameter + 1).requires_grad_() for name, parameter in params.items()}
    call(moved, torch.ones(1, 2)).sum().backward()
    for name, parameter in module.named_parameters():
        assert params[name].data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


# Operators without a second derivative


def attention_problem() -> tuple[bl.Problem, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 2, 5, 4, generator=generator)

    def loss(y, x, batch):
        queries, keys, values = (tokens @ y[name] for name in ("q", "k", "v"))
        return (F.scaled_dot_product_attention(queries, keys, values) - x).pow(2).mean()

    names = ("q", "k", "v")
    inner = {name: 0.1 * torch.randn(4, 4, generator=generator) for name in names}
    return (
        bl.Problem(loss, lambda y, x, b: loss(y, x, b) + sum((y[name] ** 2).sum() for name in names)),
        torch.ones(4),
        inner,
    )


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in FIRST_DERIVATIVES_ONLY])
def test_fused_attention_is_explained_and_the_printed_remedy_works(name):
    problem, outer, inner = attention_problem()

    def run(*_):
        return solve(problem, outer, inner, estimator=ESTIMATORS[name])

    with pytest.raises(bl.NotTwiceDifferentiableError, match=r"scaled_dot_product.*no second derivative") as caught:
        run()
    assert "bilevel.FirstOrderCorrected() or bilevel.FirstOrder()" in str(caught.value)
    remedy = textwrap.dedent("\n".join(str(caught.value).splitlines()[-2:]))
    assert remedy.startswith("from torch.nn.attention import")
    scope = {"run": run}
    exec(re.sub(r"bilevel\.hypergradient\(\.\.\.\)", "run()", remedy), scope)
    assert torch.isfinite(scope["hg"].grad).all()
    assert (scope["hg"].grad != 0).all()


@pytest.mark.parametrize("name", sorted(FIRST_DERIVATIVES_ONLY))
def test_fused_attention_works_with_estimators_that_need_no_second_derivative(name):
    problem, outer, inner = attention_problem()
    hg = solve(problem, outer, inner, estimator=ESTIMATORS[name])
    hg.raise_if_failed()
    assert (hg.grad != 0).all()


# Wrong kinds


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "problem",
            (inner_loss, outer_loss),
            r"a tuple as problem; bilevel\.Problem\(inner_loss, outer_loss\) was needed",
        ),
        ("problem", bl.Problem, r"the class Problem itself as problem"),
        ("batches", (1, 2), r"a tuple as batches; bilevel\.Batches\(inner=\.\.\., outer=\.\.\.\)"),
        ("batches", None, "a NoneType as batches"),
        ("batches", bl.PerStep([1, 2, 3]), "a PerStep as batches"),
        ("solver", bl.Descent, r"the class Descent itself as solver; bilevel\.Descent\("),
        ("solver", bl.SGD(lr=0.1), "a SGD as solver"),
        ("solver", torch.optim.SGD([torch.zeros(1)], lr=0.1), "a SGD as solver"),
        ("solver", 20, "a int as solver"),
        ("estimator", bl.Implicit, r"the class Implicit itself as estimator; bilevel\.Implicit\("),
        ("estimator", bl.CG(), "a CG as estimator"),
        ("estimator", "implicit", "a str as estimator"),
    ],
    ids=without_addresses,
)
def test_a_wrong_kind_is_refused_with_what_to_write(argument, value, message):
    with pytest.raises(TypeError, match=rf"hypergradient\(\) was given {message}"):
        solve(**{argument: value})


@pytest.mark.parametrize(
    "arguments",
    [(None, outer_loss), (inner_loss, 0.5), (inner_loss, outer_loss, vector(1.0)), (inner_loss, outer_loss, None, 3)],
)
def test_a_problem_of_things_that_cannot_be_called_is_refused(arguments):
    with pytest.raises(TypeError, match=r"Problem was given|inner_loss|outer_loss|init|features"):
        bl.Problem(*arguments)


torch_optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: bl.SGD(lr=-0.1),
            ValueError,
            r"SGD was given lr=-0\.1; a number in \[0\.0, inf\) or a function of outer",
        ),
        (lambda: bl.SGD(lr=float("nan")), ValueError, "lr=nan"),
        (lambda: bl.SGD(lr=float("inf")), ValueError, "lr=inf"),
        (lambda: bl.SGD(lr="0.1"), ValueError, "lr='0.1'"),
        (lambda: bl.SGD(lr=torch.tensor(0.1)), ValueError, r"lr=tensor\(0\.1000\).*function of outer"),
        (lambda: bl.SGD(lr=0.1, momentum=-1), ValueError, "momentum=-1"),
        (lambda: bl.SGD(lr=0.1, weight_decay=-1), ValueError, "weight_decay=-1"),
        (
            lambda: bl.SGD(lr=0.1, nesterov=True),
            ValueError,
            r"nesterov=True, which needs a momentum.*SGD\(lr, momentum=0\.9, nesterov=True\)",
        ),
        (lambda: bl.SGD(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), ValueError, "no dampening"),
        (lambda: bl.Adam(lr=-1), ValueError, "Adam was given lr=-1"),
        (lambda: bl.Adam(betas=0.9), ValueError, r"betas=0\.9; a pair was needed"),
        (lambda: bl.Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\]=1\.0; a number in \[0\.0, 1\.0\)"),
        (lambda: bl.Adam(betas=(-0.1, 0.9)), ValueError, r"betas\[0\]=-0\.1"),
        (lambda: bl.Adam(eps=-1e-8), ValueError, "eps=-1e-08"),
        (lambda: bl.AdamW(weight_decay=-1), ValueError, "AdamW was given weight_decay=-1"),
        (lambda: bl.CG(max_steps=0), ValueError, "CG was given max_steps=0; an integer of at least 1"),
        (lambda: bl.CG(max_steps=2.5), ValueError, r"max_steps=2\.5"),
        (lambda: bl.CG(tol=-1e-6), ValueError, "tol=-1e-06; a number of at least 0"),
        (lambda: bl.CG(tol=float("nan")), ValueError, "tol=nan"),
        (lambda: bl.CG(damping=-1), ValueError, "damping=-1"),
        (lambda: bl.Neumann(steps=0), ValueError, "Neumann was given steps=0"),
        (lambda: bl.Neumann(step_size=0), ValueError, "step_size=0; a positive number"),
        (lambda: bl.Neumann(step_size="0.1"), ValueError, "step_size='0.1'"),
        (lambda: bl.Neumann(damping=-1), ValueError, "damping=-1"),
        (lambda: bl.Dense(damping=-1), ValueError, "Dense was given damping=-1"),
        (lambda: bl.Dense(tol=-1), ValueError, "tol=-1"),
        (
            lambda: bl.Descent(torch_optimizer, steps=3),
            TypeError,
            r"Descent was given the optimizer SGD; .*bilevel\.SGD\(lr=0\.1\).*torch\.optim optimizers work in place",
        ),
        (lambda: bl.Descent(bl.SGD, steps=3), TypeError, "Descent was given the optimizer"),
        (lambda: bl.Descent(0.1, 3), TypeError, "Descent was given the optimizer float"),
        (lambda: bl.Descent(bl.SGD(0.1), steps=-1), ValueError, "Descent was given steps=-1; an integer of at least 0"),
        (lambda: bl.Descent(bl.SGD(0.1), steps=1.5), ValueError, r"steps=1\.5"),
        (lambda: bl.Converge(torch_optimizer), TypeError, "Converge was given the optimizer SGD"),
        (lambda: bl.Converge(bl.SGD(0.1), tol=0.0), ValueError, r"Converge was given tol=0\.0; a positive number"),
        (lambda: bl.Converge(bl.SGD(0.1), tol="small"), ValueError, "tol='small'"),
        (lambda: bl.Converge(bl.SGD(0.1), max_steps=0), ValueError, "max_steps=0"),
        (
            lambda: bl.Implicit(5),
            TypeError,
            r"Implicit was given int; a linear solver was needed, such as Implicit\(bilevel\.CG\(max_steps=10\)\)",
        ),
        (lambda: bl.Implicit(bl.CG), TypeError, "Implicit was given .*a linear solver was needed"),
        (lambda: bl.MemoryReduced(steps=0), ValueError, "MemoryReduced was given steps=0"),
        (lambda: bl.MemoryReduced(tol=-1), ValueError, "tol=-1"),
        (lambda: bl.MemoryReduced(damping=-1), ValueError, "damping=-1"),
        (
            lambda: bl.FirstOrderCorrected(nu=0),
            ValueError,
            "FirstOrderCorrected was given nu=0; None or a positive number",
        ),
        (lambda: bl.FirstOrderCorrected(nu="small"), ValueError, "nu='small'"),
        (lambda: bl.FirstOrderCorrected(nu=float("inf")), ValueError, "nu=inf"),
        (
            lambda: bl.FirstOrderCorrected(scheme="backward"),
            ValueError,
            "scheme='backward'; one of 'symmetric', 'forward'",
        ),
        (lambda: bl.Unrolled(keep="all"), ValueError, "keep='all'; one of 'graph', 'iterates', 'segments'"),
        (lambda: bl.Unrolled(last=0), ValueError, "last=0; None or an integer of at least 1"),
        (lambda: bl.Unrolled(keep="segments", segment=0), ValueError, "segment=0"),
        (
            lambda: bl.Unrolled(segment=4),
            ValueError,
            r"segment=4 with keep='graph'; write Unrolled\(keep=\"segments\", segment",
        ),
        (
            lambda: bl.TaskMean(bl.Unrolled),
            TypeError,
            r"TaskMean was given .*an estimator for one task was needed, such as TaskMean\(Unrolled\(\)\)",
        ),
        (lambda: bl.TaskMean(bl.TaskMean(bl.Unrolled())), TypeError, "TaskMean was given TaskMean"),
        (lambda: bl.TaskMean(bl.Unrolled(), chunk=0), ValueError, "chunk=0; None or an integer of at least 1"),
        (lambda: bl.TaskMean(bl.Unrolled(), chunk=1.5), ValueError, r"chunk=1\.5"),
        (lambda: bl.PerStep(5), TypeError, "PerStep was given a int"),
        (lambda: bl.proximal(PROBLEM, 1.0), ValueError, r"a problem without init.*init=lambda x, batch: x"),
        (
            lambda: bl.proximal(bl.Problem(inner_loss, outer_loss, init=lambda x, b: x), 0.0),
            ValueError,
            r"strength=0\.0; a positive number",
        ),
    ],
)
def test_a_constructor_refuses_what_is_out_of_range(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("final", [bl.SGD, bl.Adam, bl.CG, bl.Descent, bl.Unrolled, bl.Implicit, bl.TaskMean])
def test_a_concrete_strategy_cannot_be_subclassed(final):
    with pytest.raises(TypeError, match=f"{final.__name__} is final: wrap it"):
        type("Mine", (final,), {})


@every_estimator
def test_a_hyper_parameter_that_broadcasts_the_inner_variable_is_refused(name):
    problem = bl.Problem(lambda y, x, b: inner_loss(y, x["w"], b), lambda y, x, b: outer_loss(y, x["w"], b))
    outer = {"w": torch.ones(3, 1, dtype=F64), "lr": torch.full((3,), 0.1, dtype=F64)}
    with pytest.raises(
        ValueError,
        match=r"lr of inner.* has the shape \(3,\), which does not broadcast to that of its tensor, \(3, 1\)",
    ):
        solve(
            problem,
            outer,
            torch.zeros(3, 1, dtype=F64),
            solver=bl.Descent(bl.SGD(lr=lambda x: x["lr"]), 3),
            estimator=ESTIMATORS[name],
        )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("warm", "a state of type str"),
        ({"inner": vector(1.0, 2.0)}, "a state of type dict; the state of its own last call was needed"),
        ({"inner": vector(1.0, 2.0), "adjoint": vector(1.0)}, "'adjoint' does not have the shapes.*state=None"),
        ({"inner": vector(1.0, 2.0, 3.0), "adjoint": vector(1.0, 2.0)}, "'inner' does not have the shapes"),
    ],
    ids=["str", "half", "adjoint of another size", "inner of another size"],
)
def test_a_warm_start_from_something_else_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        solve(estimator=ESTIMATORS["memory reduced, warm"], state=state)


# set_grad and iterate


@pytest.mark.parametrize(
    ("outer", "grad", "message"),
    [
        (
            torch.zeros(2, requires_grad=True),
            torch.ones(3),
            r"shapes \[\(2,\)\] and gradients of shapes \[\(3,\)\].*set_grad\(outer, hg\.grad\)",
        ),
        ({"a": torch.zeros(2, requires_grad=True)}, {}, "and gradients of shapes"),
        (torch.zeros(2), torch.ones(2), r"is no leaf that requires grad.*requires_grad=True"),
        ({"a": torch.zeros(2, requires_grad=True) * 2}, {"a": torch.ones(2)}, r"outer \['a'\] is no leaf"),
        ({"a": torch.zeros(2, requires_grad=True)}, {"b": torch.ones(2)}, "set_grad was given"),
    ],
    ids=["shape", "structure", "no grad", "no leaf", "names"],
)
def test_set_grad_refuses_what_no_optimizer_could_use(outer, grad, message):
    with pytest.raises(ValueError, match=message):
        bl.set_grad(outer, grad)


def test_set_grad_puts_each_gradient_where_its_name_is_or_refuses():
    outer = {name: torch.tensor(0.0, requires_grad=True) for name in ("a", "b")}
    try:
        bl.set_grad(outer, {"b": torch.tensor(2.0), "a": torch.tensor(1.0)})
    except ValueError:
        return
    assert (outer["a"].grad.item(), outer["b"].grad.item()) == (1.0, 2.0)


def test_set_grad_replaces_and_detaches():
    x = torch.zeros(2, requires_grad=True)
    bl.set_grad(x, torch.ones(2))
    bl.set_grad(x, torch.full((2,), 3.0, requires_grad=True) * 2)
    assert torch.equal(x.grad, torch.full((2,), 6.0))
    assert not x.grad.requires_grad


@every_estimator
def test_gradients_of_set_grad_can_be_changed_in_place_one_by_one(name):
    """torch's clipping and scaling work in place: gradients must own their memory, each its own."""
    problem = bl.Problem(
        lambda y, x, b: inner_loss(y, x["a"] + x["b"], b),
        lambda y, x, b: ((y + x["a"] + x["b"]) ** 2).sum() + x["a"].sum() + x["b"].sum() + 3 * x["c"].sum(),
    )
    outer = {key: vector(0.5, -0.3).requires_grad_() for key in "abc"}
    hg = solve(problem, outer, estimator=ESTIMATORS[name])
    kept = {key: leaf.clone() for key, leaf in hg.grad.items()}
    bl.set_grad(outer, hg.grad)
    norm = torch.nn.utils.clip_grad_norm_(outer.values(), 0.5)
    for key, x in outer.items():
        torch.testing.assert_close(x.grad, kept[key] * (0.5 / (norm + 1e-6)))


def test_a_tensor_under_two_names_gets_the_sum_of_both_gradients_or_is_refused():
    """Tied weights: torch's own backward would add them."""
    w = vector(0.5, -0.3).requires_grad_()
    problem = bl.Problem(lambda y, x, b: inner_loss(y, x["a"], b), lambda y, x, b: (y * x["b"]).sum())
    whole = bl.Problem(inner_loss, lambda y, x, b: (y * x).sum())
    expected = solve(whole, w).grad
    try:
        hg = solve(problem, {"a": w, "b": w})
        bl.set_grad({"a": w, "b": w}, hg.grad)
    except ValueError:
        return
    torch.testing.assert_close(w.grad, expected)


def stream(count: int, bad: int) -> Iterator[bl.Batches]:
    for index in range(count):
        yield bl.Batches(None, torch.tensor(torch.nan if index == bad else 1.0, dtype=F64))


@every_estimator
def test_iterate_keeps_finished_steps_and_does_not_move_on_a_hypergradient_that_is_not_finite(name):
    problem = bl.Problem(inner_loss, lambda y, x, b: b * outer_loss(y, x, b))
    x = vector(0.5, -0.3).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9)
    loop = bl.iterate(
        problem, x, vector(0.1, 0.2), stream(5, bad=2), solver=DESCENT, estimator=ESTIMATORS[name], optimizer=optimizer
    )
    steps, positions = [], []

    def follow():
        for step in loop:
            steps.append(step.index)
            positions.append(x.detach().clone())

    with pytest.raises(
        bl.BilevelError, match=r"outer step 2: (NONFINITE|DIVERGED): .*The outer variable was not moved by this step"
    ):
        follow()
    assert steps == [0, 1]
    assert torch.equal(x.detach(), positions[-1])
    assert not torch.equal(positions[0], positions[1])


FAILING = {
    "NEGATIVE_CURVATURE": (bl.Problem(lambda y, x, b: -(y**2).sum() - (x * y).sum(), outer_loss), bl.Implicit(bl.CG())),
    "NOT_CONTRACTIVE": (PROBLEM, bl.Implicit(bl.Neumann(steps=20, step_size=1.5))),
    "BREAKDOWN or NONFINITE": (
        bl.Problem(lambda y, x, b: (y.sum() - x.sum()) ** 2, outer_loss),
        bl.Implicit(bl.Dense()),
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_iterate_does_not_move_on_a_hypergradient_that_must_not_be_used(case):
    """Status.failed means that the result must not be used, so a loop must not use it quietly."""
    problem, estimator = FAILING[case]
    x = vector(0.5, -0.3).requires_grad_()
    kwargs = {"solver": DESCENT, "estimator": estimator, "optimizer": torch.optim.SGD([x], lr=0.1)}
    with pytest.raises(bl.BilevelError, match="outer step 0"):
        list(bl.iterate(problem, x, vector(0.1, 0.2), [NOTHING] * 3, tolerate=(), **kwargs))
    assert torch.equal(x.detach(), vector(0.5, -0.3))


def test_iterate_steps_through_negative_curvature_with_a_warning():
    problem, estimator = FAILING["NEGATIVE_CURVATURE"]
    x = vector(0.5, -0.3).requires_grad_()
    loop = bl.iterate(
        problem,
        x,
        vector(0.1, 0.2),
        [NOTHING],
        solver=DESCENT,
        estimator=estimator,
        optimizer=torch.optim.SGD([x], lr=0.1),
    )
    with pytest.warns(UserWarning, match="stepped through NEGATIVE_CURVATURE"):
        assert len(list(loop)) == 1


def looped(outer: Any, loader: Any, optimizer: Any = None, **kwargs: Any) -> list[bl.Step]:
    optimizer = torch.optim.SGD([outer], lr=0.1) if optimizer is None else optimizer
    arguments = {"solver": DESCENT, "estimator": bl.Unrolled(), **kwargs}
    return list(bl.iterate(PROBLEM, outer, vector(0.1, 0.2), loader, optimizer=optimizer, **arguments))


def test_iterate_refuses_a_loader_of_something_else():
    with pytest.raises(
        TypeError,
        match=r"loader yielded a tuple; write \(bilevel\.Batches\(inner=a, outer=b\) for a, b in zip\(train, valid\)\)",
    ):
        looped(vector(1.0, 2.0).requires_grad_(), [(1, 2)])


def test_iterate_refuses_an_outer_variable_that_cannot_be_moved():
    with pytest.raises(ValueError, match="is no leaf that requires grad"):
        looped(vector(1.0, 2.0), [NOTHING], torch.optim.SGD([vector(1.0).requires_grad_()], lr=0.1))


def test_iterate_refuses_an_optimizer_of_other_tensors():
    """Otherwise x never moves, and nothing says so."""
    with pytest.raises(ValueError, match="optimizer"):
        looped(
            vector(1.0, 2.0).requires_grad_(),
            [NOTHING] * 2,
            torch.optim.SGD([vector(1.0, 2.0).requires_grad_()], lr=0.1),
        )


def test_iterate_refuses_an_inner_optimizer_as_outer_optimizer():
    with pytest.raises(TypeError, match=r"torch\.optim"):
        looped(vector(1.0, 2.0).requires_grad_(), [NOTHING], bl.SGD(lr=0.1))


# Tasks


@pytest.mark.parametrize(
    ("batches", "inner", "message"),
    [
        (
            bl.Batches(torch.zeros(3, 2), torch.zeros(4, 2)),
            torch.zeros(3, 2),
            r"'Batches\.inner': \[3\], 'Batches\.outer': \[4\]",
        ),
        (
            bl.Batches(torch.zeros(3, 2), torch.zeros(3, 2)),
            torch.zeros(2),
            r"'inner': \[2\].*y\.expand\(T, \*y\.shape\)",
        ),
        (
            bl.Batches([torch.zeros(3, 2), torch.zeros(2)], torch.zeros(3, 2)),
            torch.zeros(3, 2),
            r"'Batches\.inner': \[2, 3\]",
        ),
        (bl.Batches(torch.zeros(3, 2), torch.tensor(1.0)), torch.zeros(3, 2), r"'Batches\.outer': \[0\]"),
        (
            bl.Batches(bl.PerStep([torch.zeros(2, 2)] * 3), torch.zeros(3, 2)),
            torch.zeros(3, 2),
            r"'Batches\.inner': \[2\]",
        ),
        (
            bl.Batches(
                bl.PerStep([torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 2)], ragged=True), torch.zeros(3, 2)
            ),
            torch.zeros(3, 2),
            "leading",
        ),
        (bl.Batches(torch.zeros(3, 2), torch.zeros(3, 2), curvature=torch.zeros(2, 2)), torch.zeros(3, 2), "leading"),
    ],
    ids=["batches", "inner", "within a batch", "a scalar", "per step", "a later step", "curvature"],
)
def test_task_mean_refuses_leading_dimensions_that_disagree(batches, inner, message):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    with pytest.raises(ValueError, match=message):
        solve(problem, torch.ones(2), inner, batches, estimator=bl.TaskMean(bl.Unrolled()))


@pytest.mark.parametrize("chunk", [None, 2, 1])
@every_estimator
def test_task_mean_passes_failures_and_refusals_on(name, chunk):
    tasks = bl.Batches(vector(1.0, torch.nan, 2.0), vector(1.0, 2.0, 3.0))
    problem = bl.Problem(
        lambda y, x, b: ((y - b * x) ** 2).sum(), lambda y, x, b: (b * y**2).sum() + 0.1 * (x**2).sum()
    )
    inner = torch.zeros(3, 2, dtype=F64)
    hg = solve(problem, inner=inner, batches=tasks, estimator=bl.TaskMean(ESTIMATORS[name], chunk=chunk))
    assert hg.status is bl.Status.DIVERGED
    wrong = bl.Problem(lambda y, x, b: (y - b * x) ** 2, outer_loss)
    with pytest.raises(ValueError, match=r"inner_loss returned a tensor of shape \(2,\)"):
        solve(wrong, inner=inner, batches=tasks, estimator=bl.TaskMean(ESTIMATORS[name], chunk=chunk))


@pytest.mark.parametrize("chunk", [None, 2, 1])
@pytest.mark.parametrize("tasks", [2, 5])
def test_task_mean_refuses_the_state_of_another_number_of_tasks(tasks, chunk):
    """Tasks are matched by position: with fewer or more of them the warm start of one would be given to another."""
    estimator = bl.TaskMean(ESTIMATORS["memory reduced, warm"], chunk=chunk)
    problem = bl.Problem(lambda y, x, b: ((y - b * x) ** 2).sum(), lambda y, x, b: (b * y**2).sum())

    def run(count, state):
        b = torch.arange(1, count + 1, dtype=F64)
        return solve(
            problem, inner=torch.zeros(count, 2, dtype=F64), batches=bl.Batches(b, b), estimator=estimator, state=state
        )

    state = run(3, None).state
    run(3, state)
    with pytest.raises(ValueError, match="state"):
        run(tasks, state)


# What must not be touched, and what comes back


def snapshot(tensors: list[Tensor]) -> list[tuple]:
    grads = [t.grad if t.is_leaf else None for t in tensors]
    return [
        (t.detach().clone(), t._version, t.requires_grad, None if g is None else g.clone(), t.grad_fn)
        for t, g in zip(tensors, grads, strict=True)
    ]


def assert_untouched(tensors: list[Tensor], before: list[tuple]) -> None:
    for tensor, (value, version, requires_grad, grad, grad_fn) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), value)
        assert tensor._version == version
        assert tensor.requires_grad == requires_grad
        assert tensor.grad_fn is grad_fn
        found = tensor.grad if tensor.is_leaf else None
        assert (found is None) == (grad is None)
        assert grad is None or torch.equal(found, grad)


def tree_loss(y: dict, x: dict, batch: tuple) -> Tensor:
    inputs, targets = batch
    return (
        (inputs @ y["w"] + y["b"] - targets).pow(2).mean()
        + (x["decay"].exp() * y["w"] ** 2).sum()
        + (x["shift"] * y["b"]).sum()
    )


@pytest.mark.parametrize("start", ["inner", "init"])
@pytest.mark.parametrize("optimizer", [bl.SGD(lr=0.1, momentum=0.5), bl.Adam(lr=0.1)], ids=["sgd", "adam"])
@every_estimator
def test_no_argument_is_changed_and_results_are_detached(name, optimizer, start):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    outer = {"decay": random(2).requires_grad_(), "shift": random(1).requires_grad_(), "w": random(2).requires_grad_()}
    outer["decay"].grad = random(2)
    inner = {"w": random(2).requires_grad_(), "b": random(1) * outer["shift"]}  # one leaf with a graph behind it
    inner["w"].grad = random(2)
    batches = bl.Batches((random(5, 2), random(5)), (random(5, 2), random(5)))
    init = None if start == "inner" else lambda x, b: {"w": x["w"], "b": x["shift"]}

    def outer_loss(y, x, b):
        return tree_loss(y, x, b) + (x["w"] * y["w"]).sum()

    tensors = [*outer.values(), *inner.values(), *batches.inner, *batches.outer]
    before = snapshot(tensors)
    hg = solve(
        bl.Problem(tree_loss, outer_loss, init=init),
        outer,
        inner if init is None else None,
        batches,
        solver=bl.Descent(optimizer, steps=4),
        estimator=ESTIMATORS[name],
    )
    assert_untouched(tensors, before)
    results = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(
            (hg.grad, hg.inner, hg.outer_loss, hg.inner_loss, hg.state, hg.stats)
        )
        if isinstance(leaf, Tensor)
    ]
    assert all(not leaf.requires_grad and leaf.grad_fn is None for leaf in results)
    assert hg.outer_loss.shape == hg.inner_loss.shape == ()
    assert list(hg.grad) == list(outer)
    assert list(hg.inner) == list(inner)
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert not given & {leaf.untyped_storage().data_ptr() for leaf in results}


@every_estimator
def test_without_inner_steps_the_result_does_not_share_memory_with_the_arguments(name):
    """An optimizer moves x in place; hg.inner must not move with it."""
    maml = bl.proximal(bl.Problem(lambda y, x, b: (y**2).sum(), outer_loss, init=lambda x, b: x), 1.0)
    x = vector(0.5, -0.3).requires_grad_()
    hg = solve(maml, x, solver=bl.Descent(bl.SGD(lr=0.1), steps=0), estimator=ESTIMATORS[name])
    with torch.no_grad():
        x.add_(1.0)
    torch.testing.assert_close(hg.inner, vector(0.5, -0.3))


@every_estimator
def test_it_works_with_gradients_switched_off_and_leaves_the_switch_alone(name):
    expected = solve(estimator=ESTIMATORS[name])
    with torch.no_grad():
        hg = solve(estimator=ESTIMATORS[name])
        assert not torch.is_grad_enabled()
    assert torch.equal(hg.grad, expected.grad)
    assert torch.equal(hg.inner, expected.inner)
    with torch.set_grad_enabled(True):
        solve(estimator=ESTIMATORS[name])
        assert torch.is_grad_enabled()


@every_estimator
def test_the_mode_is_restored_when_a_loss_raises(name):
    def broken(y, x, b):
        raise KeyError("mine")

    with torch.no_grad():
        with pytest.raises(KeyError, match="mine"):
            solve(bl.Problem(broken, outer_loss), estimator=ESTIMATORS[name])
        assert not torch.is_grad_enabled()


@every_estimator
def test_the_call_draws_no_random_numbers_of_its_own(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    solve(estimator=ESTIMATORS[name])
    assert torch.equal(torch.get_rng_state(), before)


# Wrong numbers that came back quietly once


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
@pytest.mark.parametrize(
    ("inner", "init"),
    [
        (lambda y, x, b: ((y * x - 1) ** 2).sum(), lambda x, b: x),
        (lambda y, x, b: ((2 * y[0] + y[1] - 1) ** 2).sum() + (x * y[0]).sum(), lambda x, b: [x, x]),
    ],
    ids=["the start is x itself", "two leaves of the start are one tensor"],
)
def test_an_initialization_that_is_the_outer_variable_is_not_confused_with_it(inner, init, keep):
    """g may depend on x and on y_0 = x at once; dg/dy must not take in dg/dx."""
    problem = bl.Problem(
        inner,
        lambda y, x, b: torch.stack([((leaf - 2) ** 2).sum() for leaf in (y if isinstance(y, list) else [y])]).sum(),
        init=init,
    )

    def value(x):
        y = [leaf.clone() for leaf in (init(x, None) if isinstance(init(x, None), list) else [init(x, None)])]
        for _ in range(3):
            y = [leaf.detach().requires_grad_() for leaf in y]
            inner(y if len(y) > 1 else y[0], x, None).backward()
            y = [leaf.detach() - 0.1 * leaf.grad for leaf in y]
        return sum(((leaf - 2) ** 2).sum() for leaf in y)

    x = vector(0.7, 0.4)
    hg = solve(problem, x, estimator=bl.Unrolled(keep=keep))
    differences = torch.stack([(value(x + d) - value(x - d)) / 2e-6 for d in 1e-6 * torch.eye(2, dtype=F64)])
    torch.testing.assert_close(hg.outer_loss, value(x))
    torch.testing.assert_close(hg.grad, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["first order corrected", "first order corrected, forward"])
def test_random_features_are_common_to_both_sides_of_the_finite_difference(name):
    """Draws that differ between the sides are divided by nu."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(20, 3, generator=generator, dtype=F64)
    problem = bl.Problem(
        lambda y, x, z: ((z @ y - 1) ** 2).mean() + (y**2).sum(),
        lambda y, x, z: ((z @ y - 2) ** 2).mean(),
        features=lambda x, b: F.dropout(b * x, 0.3),
    )
    scheme = ESTIMATORS[name].scheme
    grads = []
    for nu in (1e-3, 1e-5):
        torch.manual_seed(1)
        hg = solve(
            problem,
            torch.ones(3, dtype=F64),
            torch.zeros(3, dtype=F64),
            bl.Batches(data, data),
            solver=bl.Descent(bl.SGD(lr=0.1), steps=100),
            estimator=bl.FirstOrderCorrected(nu=nu, scheme=scheme),
        )
        grads.append(hg.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["unrolled, iterates", "unrolled, segments"])
def test_a_random_start_is_replayed(name):
    problem = bl.Problem(inner_loss, outer_loss, init=lambda x, b: F.dropout(x, 0.5))
    grads = []
    for estimator in (bl.Unrolled(), ESTIMATORS[name]):
        torch.manual_seed(3)
        grads.append(solve(problem, torch.linspace(-1, 1, 8, dtype=F64), estimator=estimator).grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["first order corrected", "first order corrected, forward"])
def test_both_sides_of_the_finite_difference_take_the_same_number_of_steps(name):
    """With this tolerance one side meets it a step before the other; that step's length divided by nu is not a
    hypergradient."""
    problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
    hg = solve(
        problem,
        torch.tensor(1.0, dtype=F64),
        torch.tensor(0.0, dtype=F64),
        solver=bl.Converge(bl.SGD(lr=0.25), tol=0.5**10),
        estimator=bl.FirstOrderCorrected(scheme=ESTIMATORS[name].scheme),
    )
    assert hg.inner.item() == pytest.approx(0.5, abs=1e-3)
    assert hg.grad.item() == pytest.approx(0.25, abs=5e-3)


@pytest.mark.parametrize(
    "name", ["implicit, cg", "memory reduced", "first order corrected", "first order corrected, forward"]
)
def test_the_inner_loss_is_reported_on_the_inner_batch_not_on_the_curvature_batch(name):
    problem = bl.Problem(lambda y, x, b: ((y - b * x) ** 2).sum(), outer_loss)
    hg = solve(problem, batches=bl.Batches(vector(1.0), None, curvature=vector(50.0)), estimator=ESTIMATORS[name])
    torch.testing.assert_close(
        hg.inner_loss, problem.inner(hg.inner, vector(0.5, -0.3), vector(1.0)), rtol=1e-5, atol=1e-8
    )
    assert hg.status is not bl.Status.INNER_ROSE


def test_a_sparse_matrix_in_a_batch_is_no_bad_input():
    """A design matrix of mostly zeros: the same numbers as the dense one."""
    rows = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    problem = bl.Problem(
        lambda y, x, X: ((X @ y - 1) ** 2).mean() + x.exp() * (y**2).sum(), lambda y, x, X: ((X @ y - 1) ** 2).mean()
    )
    found = [
        bl.hypergradient(
            problem,
            torch.zeros((), dtype=torch.float64),
            torch.zeros(3, 1, dtype=torch.float64),
            bl.Batches(inner=each, outer=each),
            solver=bl.Descent(bl.SGD(0.1), 5),
            estimator=estimator,
        ).grad
        for estimator in (bl.Unrolled(), bl.Implicit(bl.CG(3)))
        for each in (rows, rows.to_sparse())
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
