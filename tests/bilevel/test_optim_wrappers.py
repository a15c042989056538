"""Optimizers that hold others, schedules, Muon: torch's own steps, their derivatives, and what is refused."""

import pytest
import torch
from optim_cases import STEPS, assert_same_path, gradient_of, loss_of, start
from torch.optim import lr_scheduler as rules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bilevel as bl

o = bl.optim
D = torch.float64
NONE = bl.Batches(None, None)


def torch_path(make, *, before=None, after=None, every=1):
    """Steps of a torch optimizer; `before(y)` changes gradients in place, `after()` steps a scheduler."""
    y, path = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}, []
    optimizer = make(y)
    scheduler = after(optimizer) if after else None
    for step in range(STEPS):
        (loss_of(y) * (1 + step) / every).backward()
        if before:
            before(list(y.values()))
        if (step + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        path.append({name: leaf.detach().clone() for name, leaf in y.items()})
    return path


def our_path(optimizer, outer=None):
    y, path = start(), []
    state = optimizer.init(y)
    for step in range(STEPS):
        gradient = {name: leaf * (1 + step) for name, leaf in gradient_of(y).items()}
        y, state = optimizer.step(gradient, state, y, outer)
        path.append(y)
    return path


def adam(lr=0.1):
    return lambda y: torch.optim.Adam(list(y.values()), lr=lr)


def groups_of_torch(y):
    decayed = {"params": [y["w"]], "weight_decay": 0.3, "betas": (0.5, 0.9)}
    return torch.optim.Adam([decayed, {"params": [y["b"], y["scale"]], "lr": 0.01}], lr=0.1)


def sequence(optimizer):
    line = rules.LinearLR(optimizer, start_factor=0.25, total_iters=5)
    return rules.SequentialLR(optimizer, [line, rules.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.01)], [5])


def learned(name):
    return lambda x: x[name]


X = {"lr": torch.tensor(0.1, dtype=D), "table": torch.linspace(0.2, 0.01, STEPS, dtype=D)}
BESIDE_TORCH = {
    "groups": (
        o.Groups({"w": bl.Adam(0.1, betas=(0.5, 0.9), weight_decay=0.3), "": bl.Adam(0.01)}),
        {"make": groups_of_torch},
    ),
    "groups by shape, of two classes": (
        o.Groups([(lambda name, shape: len(shape) > 1, bl.SGD(0.1)), ("", bl.SGD(0.02, momentum=0.9))]),
        {
            "make": lambda y: torch.optim.SGD(
                [{"params": [y["w"]]}, {"params": [y["b"], y["scale"]], "lr": 0.02, "momentum": 0.9}], lr=0.1
            )
        },
    ),
    "step decay": (
        o.Schedules(bl.Adam(), {"lr": o.StepDecay(0.1, 0.5, every=3)}),
        {"make": adam(), "after": lambda opt: rules.StepLR(opt, 3, 0.5)},
    ),
    "exponential": (
        o.Schedules(bl.Adam(), {"lr": o.StepDecay(learned("lr"), 0.9)}),
        {"make": adam(), "after": lambda opt: rules.ExponentialLR(opt, 0.9)},
    ),
    "cosine": (
        o.Schedules(bl.Adam(), {"lr": o.Cosine(0.1, steps=STEPS, low=0.01)}),
        {"make": adam(), "after": lambda opt: rules.CosineAnnealingLR(opt, STEPS, 0.01)},
    ),
    "warm-up and cosine": (
        o.Schedules(bl.Adam(), {"lr": o.WarmUp(o.Cosine(learned("lr"), steps=15, low=0.01), steps=5, start=0.25)}),
        {"make": adam(), "after": sequence},
    ),
    "a table that is outer": (
        o.Schedules(bl.Adam(), {"lr": o.Tabulated(learned("table"))}),
        {"make": adam(1.0), "after": lambda opt: rules.LambdaLR(opt, lambda k: X["table"][min(k, STEPS - 1)].item())},
    ),
    "clipped by norm": (
        o.ClippedByNorm(bl.SGD(0.1, momentum=0.9), 1.5),
        {
            "make": lambda y: torch.optim.SGD(list(y.values()), lr=0.1, momentum=0.9),
            "before": lambda ys: torch.nn.utils.clip_grad_norm_(ys, 1.5),
        },
    ),
    "one norm over all groups": (
        o.ClippedByNorm(o.Groups({"w": bl.Adam(0.1, betas=(0.5, 0.9), weight_decay=0.3), "": bl.Adam(0.01)}), 0.5),
        {"make": groups_of_torch, "before": lambda ys: torch.nn.utils.clip_grad_norm_(ys, 0.5)},
    ),
    "clipped by value": (
        o.ClippedByValue(bl.Adam(0.1), 0.5),
        {"make": adam(), "before": lambda ys: torch.nn.utils.clip_grad_value_(ys, 0.5)},
    ),
    "accumulated": (o.Accumulated(bl.Adam(0.1), 4), {"make": adam(), "every": 4}),
}


@pytest.mark.parametrize("name", BESIDE_TORCH)
def test_steps_are_those_of_torch(name):
    optimizer, reference = BESIDE_TORCH[name]
    assert_same_path(our_path(optimizer, X), torch_path(**reference))


def test_what_some_of_the_accumulated_losses_do_not_use_counts_as_zero_and_what_none_uses_is_left_alone():
    optimizer, y = o.Accumulated(bl.Adam(0.1, weight_decay=0.2), 2), start()
    theirs, state = {name: leaf.clone() for name, leaf in y.items()}, optimizer.init(y)
    structure, other = (
        torch.utils._pytree.tree_structure(state),
        torch.optim.Adam(theirs.values(), 0.1, weight_decay=0.2),
    )
    for step in range(12):
        left_out = {"b": step % 2 == 0, "scale": step // 2 % 2 == 0}
        g = {k: None if left_out.get(k) else leaf for k, leaf in gradient_of(theirs).items()}
        y, state = optimizer.step(g, state, y, None)
        assert torch.utils._pytree.tree_structure(state) == structure
        for name, leaf in theirs.items():
            if g[name] is not None:
                leaf.grad = g[name] / 2 + (0 if leaf.grad is None else leaf.grad)
        if step % 2:
            other.step()
            other.zero_grad()
        for name, leaf in theirs.items():
            torch.testing.assert_close(y[name], leaf, rtol=1e-12, atol=1e-12)


def test_inside_a_group_hyper_parameters_by_tensor_are_a_dict_by_name():
    y = {"net": [torch.zeros(2), torch.zeros(2)], "b": torch.zeros(1)}
    optimizer = o.Groups({"net": bl.SGD(lr={"net.0": 1.0, "net.1": 2.0}), "b": bl.SGD(lr=lambda x: {"b": x})})
    g = {"net": [torch.ones(2), torch.ones(2)], "b": torch.ones(1)}
    moved, _ = optimizer.step(g, optimizer.init(y), y, torch.tensor(3.0))
    assert [leaf[0].item() for leaf in (*moved["net"], moved["b"])] == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("kind", "arguments", "rule", "reference"),
    [
        (bl.SGD, {"lr": 0.02}, {"momentum": lambda k, x: 0.02 * k}, {"momentum": lambda k: 0.02 * k}),
        (bl.AdamW, {"lr": 0.1}, {"betas": lambda k, x: (0.04 * k, 0.9)}, {"betas": lambda k: (0.04 * k, 0.9)}),
        (bl.AdamW, {"lr": 0.1}, {"weight_decay": lambda k, x: 0.1 * k}, {"weight_decay": lambda k: 0.1 * k}),
    ],
)
def test_any_hyper_parameter_may_have_a_rule(kind, arguments, rule, reference):
    path = our_path(o.Schedules(kind(**arguments), rule))
    y = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}
    optimizer = getattr(torch.optim, kind.__name__)(list(y.values()), **arguments)
    for step in range(STEPS):
        optimizer.param_groups[0].update({name: at(step) for name, at in reference.items()})
        optimizer.zero_grad()
        (loss_of(y) * (1 + step)).backward()
        optimizer.step()
        for name, leaf in y.items():
            torch.testing.assert_close(path[step][name], leaf.detach(), rtol=1e-12, atol=1e-12)


def test_a_cosine_stays_low_after_its_end_and_a_table_ends_or_goes_on():
    assert o.Cosine(1.0, 4, low=0.1)(9, None) == pytest.approx(0.1)
    assert o.WarmUp(o.Tabulated([1.0, 2.0]), 3).step_limit == 5
    assert o.Tabulated([1.0, 2.0], hold=True)(7, None) == 2.0
    assert o.Tabulated({"a": torch.tensor([1.0, 2.0]), "b": [3.0, 4.0]}["a"])(1, None) == 2.0
    assert o.Accumulated(bl.Scheduled([bl.SGD(0.1)] * 3), 2).step_limit == 7
    table = o.Schedules(bl.SGD(0.1), {"lr": o.Tabulated([0.1, 0.2])})
    bl.Descent(table, 2)
    for solver in (lambda: bl.Descent(table, 3), lambda: bl.Descent(o.Groups({"": table}), 3)):
        with pytest.raises(ValueError, match="made for 2"):
            solver()
    with pytest.raises(ValueError, match="holds 2 values and was asked for step 2"):
        our_path(o.Schedules(bl.SGD(0.1), {"lr": o.Tabulated(lambda x: x["lr"])}), {"lr": torch.ones(2, dtype=D)})


@pytest.mark.parametrize("kind", ["exponential", "plain"])
def test_averages_are_those_of_torch_and_the_gradient_is_taken_where_the_optimizer_is(kind):
    y = {name: leaf.clone().requires_grad_() for name, leaf in start().items()}
    holder = torch.nn.ParameterDict({name: torch.nn.Parameter(leaf.detach()) for name, leaf in y.items()})
    average = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(0.8) if kind == "exponential" else None)
    optimizer = torch.optim.Adam(list(holder.values()), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(holder).backward()
        optimizer.step()
        if step >= 3:
            average.update_parameters(holder)
    averaged = bl.inner.Averaged(bl.Adam(0.1), decay=0.8 if kind == "exponential" else None, start=3)
    problem = bl.Problem(lambda y, x, b: loss_of(y) + 0 * x, lambda y, x, b: y["b"].sum() + x)
    found = bl.adapt(problem, torch.tensor(0.0, dtype=D), start(), NONE, solver=bl.Descent(averaged, STEPS))
    for name in y:
        torch.testing.assert_close(found.inner[name], average.module[name].detach(), rtol=1e-12, atol=1e-12)
    assert (found.inner["w"] - holder["w"]).abs().max() > 1e-3


# Muon


def matrices(dtype=D):
    g = torch.Generator().manual_seed(0)
    shapes = {"tall": (5, 3), "wide": (2, 6), "square": (3, 3)}
    return {name: torch.randn(shape, generator=g, dtype=D).to(dtype) for name, shape in shapes.items()}


def slopes(y):
    return {name: torch.tanh(leaf) + 0.3 * leaf.flip(0) for name, leaf in y.items()}


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"lr": 0.1}, {"lr": 0.1}),
        (
            {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False, "adjust": "match_rms_adamw"},
            {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        ),
        (
            {"lr": 0.1, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 10.0},
            {"lr": 0.1, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 10.0},
        ),
    ],
)
def test_muon_is_that_of_torch_in_its_bfloat16_and_near_it_in_float64(settings, reference):
    y, exact, theirs = matrices(), matrices(), {name: leaf.clone() for name, leaf in matrices().items()}
    same, own = o.Muon(**settings, ns_dtype=torch.bfloat16), o.Muon(**settings)
    state, own_state, other = same.init(y), own.init(y), torch.optim.Muon(list(theirs.values()), **reference)
    for step in range(STEPS):
        for name, leaf in theirs.items():
            leaf.grad = None if name == "wide" and step % 3 == 0 else slopes(theirs)[name]
        g = {name: leaf.grad for name, leaf in theirs.items()}
        y, state = same.step(g, state, y, None)
        exact, own_state = own.step(g, own_state, exact, None)
        other.step()
        for name, leaf in theirs.items():
            torch.testing.assert_close(y[name], leaf, rtol=1e-12, atol=1e-12)
            assert (exact[name] - leaf).abs().max() < 0.02 * (step + 1)
    assert (y["wide"] - matrices()["wide"]).abs().max() > 0.1


def test_muon_refuses_what_is_no_matrix_and_says_to_whom_to_hand_it():
    with pytest.raises(ValueError, match=r"inner\['b'\] of shape \(2,\); matrices were needed.*Groups"):
        o.Muon().init(start())


def test_the_derivative_of_muon_at_a_gradient_of_zero_is_what_its_eps_says():
    muon, g = o.Muon(lr=1.0, weight_decay=0.0, momentum=0.0), torch.zeros(2, 2, dtype=D, requires_grad=True)
    moved, _ = muon.step(g, muon.init(g), torch.zeros(2, 2, dtype=D), None)
    (slope,) = torch.autograd.grad(moved[0, 0], g)
    torch.testing.assert_close(slope[0, 0].item(), -(3.4445**5) / 1e-7, rtol=1e-6, atol=0.0)


# Derivatives


def chained(optimizer, names, tree, count=3):
    def steps(*tensors):
        x, y = dict(zip(names, tensors, strict=False)), list(tensors[len(names) : len(names) + len(tree)])
        gradients, state = tensors[len(names) + len(tree) :], optimizer.init(y)
        for k in range(count):
            y, state = optimizer.step(list(gradients[k * len(tree) : (k + 1) * len(tree)]), state, y, x)
        return tuple(y)

    return steps


DIFFERENTIATED = {
    "clip by a learned norm": (o.ClippedByNorm(bl.SGD(0.1, momentum=0.5), learned("a")), {"a": 0.7}),
    "a clip that does not clip": (o.ClippedByNorm(bl.SGD(learned("a")), 50.0), {"a": 0.7}),
    "clip of entries": (o.ClippedByValue(bl.Adam(0.1), learned("a")), {"a": 0.7}),
    "muon": (o.Muon(lr=learned("a"), weight_decay=learned("b"), momentum=learned("c")), {"a": 0.1, "b": 0.2, "c": 0.6}),
    "smooth lion": (o.Lion(lr=0.1, weight_decay=0.1, smooth=learned("a")), {"a": 0.4}),
    "cosine": (o.Schedules(bl.Adam(), {"lr": o.Cosine(learned("a"), 4, low=0.01)}), {"a": 0.2}),
    "accumulated": (o.Accumulated(bl.Adam(learned("a")), 2), {"a": 0.2}),
    "groups": (o.Groups({"0": bl.SGD(learned("a"), 0.5), "1": o.RMSprop(learned("b"))}), {"a": 0.2, "b": 0.1}),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_pass_gradcheck_in_hyper_parameters_start_and_gradients(name):
    optimizer, x = DIFFERENTIATED[name]
    g = torch.Generator().manual_seed(4)
    tree = [torch.randn(shape, generator=g, dtype=D) for shape in ((3, 2), (2, 2))]
    gradients = [torch.rand(leaf.shape, generator=g, dtype=D) + 0.2 for _ in range(3) for leaf in tree]
    tensors = [*(torch.tensor(value, dtype=D) for value in x.values()), *tree, *gradients]
    inputs = [leaf.clone().requires_grad_() for leaf in tensors]
    assert torch.autograd.gradcheck(chained(optimizer, list(x), tree), inputs, atol=1e-6, fast_mode=name == "muon")


def test_lion_has_the_derivative_of_its_steps_which_is_zero_unless_they_are_smooth():
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 4).sum(), lambda y, x, b: (y**2).sum())
    x, y = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
    for smooth in (0.0, 0.5):
        lion = bl.Descent(o.Lion(0.1, smooth=smooth), 4)
        found = bl.hypergradient(problem, x, y, NONE, solver=lion, estimator=bl.Unrolled())
        assert bool((found.grad != 0).all()) == (smooth > 0)


# Tasks that come to rest by themselves, each with what a wrapper keeps

WITH_STATE = {
    "accumulated": o.Accumulated(bl.SGD(0.5), 3),
    "clipped": o.ClippedByNorm(bl.SGD(0.5), 0.4),
    "groups": o.Groups({"a": bl.SGD(0.5, momentum=0.2), "b": o.ClippedByNorm(bl.SGD(0.5), 1.0)}),
    "schedules": o.Schedules(bl.SGD(0.5), {"lr": o.StepDecay(0.6, 0.995)}),
    "averaged": bl.inner.Averaged(bl.SGD(0.5), decay=0.5),
    "element-wise product": o.NAdam(
        lr=0.4, betas=(lambda x: {"a": x.new_tensor([0.1, 0.2, 0.3]), "b": x.new_tensor([0.3, 0.2, 0.1])}, 0.3), eps=1.0
    ),
}


@pytest.mark.parametrize(
    ("name", "keep"), [*((name, "iterates") for name in WITH_STATE), ("accumulated", "graph"), ("averaged", "graph")]
)
def test_tasks_that_come_to_rest_by_themselves_are_those_solved_alone(name, keep):
    problem = bl.Problem(
        lambda y, x, b: (b[1] * ((y["a"] - b[0] * x) ** 2 + (y["b"] - y["a"]) ** 2)).sum() / 2,
        lambda y, x, b: ((y["b"] - 1) ** 2).sum(),
    )
    x, tasks = torch.tensor(1.5, dtype=D), torch.tensor([[1.0, 1.0], [-2.0, 0.4], [0.5, 0.8]], dtype=D)
    solver = bl.Converge(WITH_STATE[name], tol=5e-2, max_steps=200)

    def solved(y, batch, estimator):
        batches = bl.Batches(batch, None)
        return bl.hypergradient(problem, x, {"a": y, "b": y}, batches, solver=solver, estimator=estimator)

    alone = [solved(torch.zeros(3, dtype=D), tuple(task), bl.Unrolled(keep)) for task in tasks]
    assert len({each.stats["inner_steps"] for each in alone}) > 1
    found = solved(torch.zeros(3, 3, dtype=D), tuple(tasks.T), bl.TaskMean(bl.Unrolled(keep)))
    torch.testing.assert_close(found.grad, torch.stack([each.grad for each in alone]).mean(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.inner["b"], torch.stack([each.inner["b"] for each in alone]), rtol=1e-10, atol=0)


# Rests that differ


def test_schedules_of_wrappers_agree_only_where_they_are_equal():
    y = torch.ones(2, dtype=D)
    one, other = (o.Accumulated(bl.SGD(0.1, weight_decay=decay), 2) for decay in (0.1, 0.2))
    assert bl.Scheduled([one, one]).stationarity(y, y, None) is not None
    assert bl.Scheduled([one, other]).stationarity(y, y, None) is None
    fixed = o.Groups({"a": bl.SGD(0.0), "b": bl.SGD(0.1)})
    assert fixed.stationarity({"a": y, "b": y}, {"a": y, "b": y}, None) is None
    assert o.Groups({"": bl.SGD(0.1, weight_decay=0.5)}).stationarity(y, y, None).eq(1.5).all()


def test_the_paths_of_x_through_a_late_step_are_found():
    """eps acts from the sixth step of RAdam on, and what is accumulated from the n-th."""
    problem = bl.Problem(lambda y, x, b: ((y - x["a"]) ** 2).sum(), lambda y, x, b: (y**2).sum())
    x, y = {"a": torch.ones(2, dtype=D), "h": torch.tensor(0.3, dtype=D)}, torch.zeros(2, dtype=D)
    late = [
        o.RAdam(eps=learned("h")),
        o.Accumulated(bl.SGD(learned("h")), 4),
        o.Schedules(bl.SGD(0.1), {"lr": lambda step, x: x["h"] if step == 5 else 0.1}),
        o.Groups({"": o.Accumulated(bl.SGD(learned("h")), 4)}),
        bl.inner.Averaged(o.RAdam(eps=learned("h"))),
    ]
    for optimizer in late:
        with pytest.raises(ValueError, match=r"\['h'\] through a hyper-parameter"):
            bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(optimizer, 10), estimator=bl.Implicit(bl.CG(3)))


# Refusals

Y = {"a": {"w": torch.zeros(2, 2)}, "b": torch.zeros(2)}
REFUSED = {
    "complex": (
        lambda: bl.SGD(0.1).step(torch.zeros(2, dtype=torch.cfloat), None, torch.zeros(2), None),
        "real tensors",
    ),
    "alpha": (lambda: o.RMSprop(alpha=1.0), r"RMSprop was given alpha=1.0; a number in \[0.0, 1.0\)"),
    "rho": (lambda: o.Adadelta(rho=-0.1), "Adadelta was given rho"),
    "betas": (lambda: o.NAdam(betas=0.9), "NAdam was given betas=0.9; a pair"),
    "beta": (lambda: o.Lion(betas=(0.9, 1.0)), r"Lion was given betas\[1\]=1.0"),
    "ns_steps": (lambda: o.Muon(ns_steps=100), "Muon was given ns_steps=100; an integer from 0 to 99"),
    "adjust": (lambda: o.Muon(adjust="rms"), "Muon was given adjust='rms'"),
    "ns_dtype": (lambda: o.Muon(ns_dtype=torch.int32), "a floating dtype"),
    "coefficients": (lambda: o.Muon(ns_coefficients=(1.0, 2.0)), "three numbers"),
    "eps": (lambda: o.Muon(eps=0.0), "Muon was given eps=0.0; a positive number"),
    "no rules": (lambda: o.Groups({}), "no rules"),
    "one optimizer": (lambda: o.Groups(bl.SGD(0.1)), "Groups was given SGD; optimizers by name"),
    "a rule": (lambda: o.Groups({"a": 0.1}), r"Groups was given the rule \('a', 0.1\)"),
    "no tensor": (
        lambda: o.Groups({"c": bl.SGD(0.1), "": bl.SGD(0.1)}).init(Y),
        r"'c', which is the name of no tensor",
    ),
    "half a name": (
        lambda: o.Groups({"a.": bl.SGD(0.1), "b": bl.SGD(0.1)}).init({"ab": Y["b"], **Y}),
        "no rule for.*'ab'",
    ),
    "one name twice": (
        lambda: o.Groups({"": bl.SGD(0.1)}).init({"a": {"b": Y["b"]}, "a.b": Y["b"]}),
        "two tensors named 'a.b'",
    ),
    "no rule": (lambda: o.Schedules(bl.SGD(0.1), {}), "functions of"),
    "a number": (lambda: o.Schedules(bl.SGD(0.1), {"lr": 0.1}), r"functions of \(step, outer\)"),
    "no field": (lambda: o.Schedules(o.ClippedByNorm(bl.SGD(0.1), 1.0), {"lr": o.Cosine(1.0, 3)}), "'lr', which is no"),
    "a negative rate": (lambda: our_path(o.Schedules(bl.SGD(0.1), {"lr": lambda k, x: -0.1})), "SGD was given lr=-0.1"),
    "a table that requires grad": (lambda: o.Tabulated(torch.ones(2, requires_grad=True)), "no hypergradient"),
    "an empty table": (lambda: o.Tabulated([]), "a number for each step"),
    "steps": (lambda: o.Cosine(0.1, 0), "Cosine was given steps=0"),
    "warm-up of a number": (lambda: o.WarmUp(0.1, 3), "WarmUp was given 0.1"),
    "limit": (lambda: o.ClippedByNorm(bl.SGD(0.1), 0.0), "one positive number"),
    "a limit per tensor": (lambda: o.ClippedByNorm(bl.SGD(0.1), {"a": 1.0}), "one positive number"),
    "a limit of 0": (lambda: o.ClippedByValue(bl.SGD(0.1), {"a": 0.0}), "positive numbers"),
    "a limit of many": (
        lambda: our_path(o.ClippedByNorm(bl.SGD(0.1), lambda x: torch.ones(2))),
        r"returned a tensor of shape \(2,\)",
    ),
    "no optimizer": (lambda: o.ClippedByNorm(0.1, 1.0), "an inner optimizer was needed"),
    "no optimizer to clip": (lambda: o.ClippedByValue(0.1, 1.0), "an inner optimizer was needed"),
    "no optimizer to hold": (lambda: o.Accumulated(0.1, 1), "an inner optimizer was needed"),
    "no optimizer to average": (lambda: bl.inner.Averaged(0.1), "an inner optimizer was needed"),
    "every": (lambda: o.Accumulated(bl.SGD(0.1), 0), "every=0"),
    "decay": (lambda: bl.inner.Averaged(bl.SGD(0.1), decay=1.0), "Averaged was given decay=1.0"),
    "start": (lambda: bl.inner.Averaged(bl.SGD(0.1), start=-1), "start=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_with_what_to_write(name):
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()
