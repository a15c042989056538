"""Bilevel descent aggregation, and the grid of inner and outer methods of BOML: methods.md, A7."""

import functools

import pytest
import torch

import bilevel as bl
from bilevel.testing import catalogue

D = torch.float64
KEEPS = ("graph", "iterates", "segments")
OPTIMIZERS = {"sgd": bl.SGD(0.2), "momentum": bl.SGD(0.1, momentum=0.8), "adam": bl.Adam(0.1)}
K, A, C_L, C_U = 6, 0.7, 0.9, 0.4


def case(dtype=D, *, maml=False):
    """A net of two layers as y, weights of the data and a target of f as x; x also starts y in the second form."""
    g = torch.Generator().manual_seed(3)
    inputs, targets = (
        torch.randn(10, 3, generator=g, dtype=D).to(dtype),
        torch.randn(10, generator=g, dtype=D).to(dtype),
    )
    inner = {
        "a": torch.randn(3, 2, generator=g, dtype=D).to(dtype),
        "b": torch.randn(2, generator=g, dtype=D).to(dtype),
    }
    outer = {"weights": 0.3 * torch.randn(6, generator=g, dtype=D).to(dtype), "goal": torch.tensor(0.4, dtype=dtype)}
    outer = outer | {name: leaf.clone() for name, leaf in inner.items()} if maml else outer

    def residual(y, batch):
        return torch.tanh(batch[0] @ y["a"]) @ y["b"] - batch[1]

    def inner_loss(y, x, batch):
        decay = 0.5 * sum(leaf.square().sum() for leaf in y.values())
        return (x["weights"].sigmoid() * residual(y, batch).square()).mean() + decay

    def outer_loss(y, x, batch):
        return (residual(y, batch) - x["goal"]).square().mean()

    start = (lambda x, b: {"a": x["a"], "b": x["b"]}) if maml else None
    batches = bl.Batches([inputs[:6], targets[:6]], [inputs[6:], targets[6:]])
    return bl.Problem(inner_loss, outer_loss, init=start), outer, None if maml else inner, batches


def written_out(problem, outer, inner, batches, optimizer, steps, direction, last=None):
    """The K-step program by hand, from its definition; the gradient through its last steps."""
    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    y = (
        problem.init(x, batches.inner)
        if inner is None
        else {n: leaf.clone().requires_grad_() for n, leaf in inner.items()}
    )
    state = optimizer.init(y)

    def slope(loss, y, batch):
        found = torch.autograd.grad(loss(y, x, batch), list(y.values()), create_graph=True)
        return dict(zip(y, found, strict=True))

    def detached(value):
        return torch.utils._pytree.tree_map(
            lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, torch.Tensor) else leaf, value
        )

    for step in range(steps):
        if last is not None and step == steps - last:
            y, state = detached(y), detached(state)
        g, f = slope(problem.inner_loss, y, batches.inner), slope(problem.outer_loss, y, batches.outer)
        y, state = optimizer.step(direction(step + 1, g, f, x), state, y, x)
    grad = torch.autograd.grad(problem.outer_loss(y, x, batches.outer), list(x.values()), allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in x.values()]
    found = [z if leaf is None else leaf for leaf, z in zip(grad, zeros, strict=True)]
    return dict(zip(x, found, strict=True)), {name: leaf.detach() for name, leaf in y.items()}


def outer_part(problem, outer, inner, batches):
    """The problem of x["goal"] alone, for FirstOrder: it sees f, and refuses what acts through g alone."""
    fixed = bl.Problem(lambda y, x, b: problem.inner_loss(y, outer, b), problem.outer_loss)
    return fixed, {"goal": outer["goal"]}, inner, batches


def along_g(t, g, f, x):
    return g


def bda(t, g, f, x, a=A, c_l=C_L, c_u=C_U):
    return {name: (1 - a / t) * c_l * g[name] + (a / t) * c_u * f[name] for name in g}


def hypergradient(arguments, dynamics, estimator, steps=K, **more):
    return bl.hypergradient(*arguments, solver=bl.Descent(dynamics, steps), estimator=estimator, **more)


def close(found, expected, rtol=1e-12):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize("maml", [False, True], ids=["start given", "start is x"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", KEEPS)
def test_bda_is_differentiated_exactly(keep, optimizer, maml):
    """A7: (1 - a/t) c_l dg + (a/t) c_u df, then ordinary reverse, against a program written out by hand."""
    arguments = case(maml=maml)
    expected, y = written_out(*arguments, OPTIMIZERS[optimizer], K, bda)
    found = hypergradient(arguments, bl.inner.Aggregated(OPTIMIZERS[optimizer], A, C_L, C_U), bl.Unrolled(keep=keep))
    close(found.grad, expected)
    close(found.inner, y)
    assert found.stats["calls"]["outer_gradient"] >= K + 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "estimator",
    [*(bl.Unrolled(keep=keep) for keep in KEEPS), bl.Unrolled(last=2), bl.FirstOrder(), bl.Implicit(bl.Dense())],
    ids=repr,
)
def test_bda_without_share_is_plain_descent_bit_for_bit(estimator, optimizer):
    """A7: "test that Aggr with a=0 equals Trad"."""
    arguments = case(torch.float32)
    arguments = outer_part(*arguments) if isinstance(estimator, bl.FirstOrder) else arguments
    plain, none = OPTIMIZERS[optimizer], bl.inner.Aggregated(OPTIMIZERS[optimizer], share=0, outer_scale=3.0)
    one, other = (hypergradient(arguments, each, estimator) for each in (plain, none))
    for a, b in ((one.grad, other.grad), (one.inner, other.inner)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.stats["calls"] == other.stats["calls"]
    assert one.status is other.status
    assert torch.equal(one.outer_loss, other.outer_loss)


# --- the grid: inner method x outer method

INNERS = {
    **{name: (optimizer, along_g) for name, optimizer in OPTIMIZERS.items()},
    **{f"bda {name}": (bl.inner.Aggregated(optimizer, A, C_L, C_U), bda) for name, optimizer in OPTIMIZERS.items()},
}


def reversed_(arguments, optimizer, direction, last=None):
    return written_out(*arguments, optimizer, K, direction, last)[0]


def at_solution(arguments, optimizer, direction):
    """df/dx - C H^-1 df/dy at y_K, with matrices."""
    problem, outer, _, batches = arguments
    _, y = written_out(*arguments, optimizer, K, direction)
    names, sizes = list(y), [leaf.numel() for leaf in y.values()]

    def tree_of(flat):
        return {n: part.reshape(y[n].shape) for n, part in zip(names, flat.split(sizes), strict=True)}

    def g(flat, x):
        return problem.inner_loss(tree_of(flat), x, batches.inner)

    flat = torch.cat([leaf.reshape(-1) for leaf in y.values()])
    hessian = torch.func.jacrev(torch.func.grad(g))(flat, outer)
    f_y, f_x = torch.func.grad(lambda y, x: problem.outer_loss(tree_of(y), x, batches.outer), argnums=(0, 1))(
        flat, outer
    )
    mixed = torch.func.jacrev(torch.func.grad(g), argnums=1)(flat, outer)
    v = torch.linalg.solve(hessian, f_y)
    return {name: f_x[name] - torch.tensordot(v, mixed[name], dims=1) for name in outer}


def first_order(arguments, optimizer, direction):
    problem, outer, _, batches = arguments
    _, y = written_out(*arguments, optimizer, K, direction)
    return torch.func.grad(lambda x: problem.outer_loss(y, x, batches.outer))(outer)


def corrected(arguments, optimizer, direction, nu=1e-3):
    """(dl_nu - dl_-nu) / (2 nu) at the ends of K steps on g + nu f and g - nu f."""
    problem, outer, inner, batches = arguments
    sides = []
    for sign in (1, -1):
        loss = functools.partial(
            lambda sign, y, x, b: problem.inner_loss(y, x, b) + sign * nu * problem.outer_loss(y, x, batches.outer),
            sign,
        )
        both = bl.Batches(batches.inner, batches.inner)
        _, y = written_out(bl.Problem(loss, loss), outer, inner, both, optimizer, K, along_g)
        sides.append(torch.func.grad(lambda x, y=y, loss=loss: loss(y, x, batches.inner))(outer))
    return {name: (sides[0][name] - sides[1][name]) / (2 * nu) for name in outer}


OUTERS = {
    # name: estimator, its reference, and the inner methods that it allows
    **{f"reverse {keep}": (bl.Unrolled(keep=keep), reversed_, "all", 1e-12) for keep in KEEPS},
    **{
        f"truncated {keep}": (bl.Unrolled(keep=keep, last=3), functools.partial(reversed_, last=3), "all", 1e-12)
        for keep in KEEPS
    },
    "darts": (bl.Unrolled(last=1), functools.partial(reversed_, last=1), "all", 1e-12),
    "first order": (bl.FirstOrder(), first_order, "all", 1e-12),
    "implicit dense": (bl.Implicit(bl.Dense()), at_solution, "plain", 1e-10),
    "implicit cg": (bl.Implicit(bl.CG(60, 1e-14)), at_solution, "plain", 1e-9),
    "memory reduced": (bl.MemoryReduced(60, 1e-14), at_solution, "plain", 1e-9),
    "corrected": (bl.FirstOrderCorrected(nu=1e-3), corrected, "plain", 1e-8),
    "covariance": (bl.estimators.stochastic.Covariance(), None, "none", 0.0),
    "pathwise": (bl.estimators.stochastic.Pathwise(), None, "none", 0.0),
}


@pytest.mark.filterwarnings("ignore:outer variable")
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("outer", OUTERS)
def test_each_pair_of_the_grid_is_right_or_refused(outer, inner):
    """A7: the split (inner dynamics) x (hypergradient); pairs that have no meaning say why."""
    estimator, reference, allowed, rtol = OUTERS[outer]
    dynamics, direction = INNERS[inner]
    optimizer, arguments = OPTIMIZERS[inner.removeprefix("bda ")], case()
    if allowed == "all" or (allowed == "plain" and direction is along_g):
        arguments = outer_part(*arguments) if outer == "first order" else arguments
        found = hypergradient(arguments, dynamics, estimator)
        close(found.grad, reference(arguments, optimizer, direction), rtol)
        assert not found.status.failed
        return
    reasons = {"plain": "need not follow its gradient|does not say", "none": "samples of a Langevin dynamics"}
    with pytest.raises(ValueError, match=reasons[allowed]):
        hypergradient(arguments, dynamics, estimator)


def test_the_grid_holds_every_kind_of_estimator_of_the_catalogue():
    kinds = {type(estimator) for estimator, *_ in OUTERS.values()}
    assert {type(catalogue.by_label(label).estimator) for label in ("graph", "implicit cg", "memory reduced")} <= kinds
    assert {type(catalogue.by_label(label).estimator) for label in ("corrected", "first order")} <= kinds


def test_darts_is_the_last_step_alone():
    """A7: outer method "Darts": df/dx - lr (dg/dx(y + e v) - dg/dx(y - e v)) / 2e at y_{K-1}, v = df/dy(y_K)."""
    problem, outer, inner, batches = case()
    _, before = written_out(problem, outer, inner, batches, bl.SGD(0.2), K - 1, along_g)
    _, y = written_out(problem, outer, before, batches, bl.SGD(0.2), 1, along_g)
    v, direct = torch.func.grad(problem.outer_loss, argnums=(0, 1))(y, outer, batches.outer)

    def slope(sign, e=1e-4):
        moved = {name: before[name] + sign * e * v[name] for name in v}
        return torch.func.grad(problem.inner_loss, argnums=1)(moved, outer, batches.inner)

    plus, minus = slope(1), slope(-1)
    darts = {name: direct[name] - 0.2 * (plus[name] - minus[name]) / 2e-4 for name in outer}
    close(hypergradient((problem, outer, inner, batches), bl.SGD(0.2), bl.Unrolled(last=1)).grad, darts, 1e-6)


# --- attacks


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("last", [None, 4])
def test_the_multi_step_loss_of_bda(keep, last):
    """F = sum of w_k f(y_k), along a direction, against differences of the program written out."""
    problem, outer, inner, batches = case()
    weights = (0.0, 0.5, 0.0, 1.0, 0.2, 0.7)
    estimator = bl.Unrolled(keep=keep, step_weights=weights, last=last)
    found = hypergradient((problem, outer, inner, batches), bl.inner.Aggregated(OPTIMIZERS["momentum"], A), estimator)

    def total(x):
        x = {name: leaf.requires_grad_() for name, leaf in x.items()}
        y, state, losses = inner, OPTIMIZERS["momentum"].init(inner), []
        for t in range(1, K + 1):
            if last is not None and t == K - last + 1:
                y, state = torch.utils._pytree.tree_map(
                    lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, (y, state)
                )
            g = torch.func.grad(problem.inner_loss)(y, x, batches.inner)
            f = torch.func.grad(problem.outer_loss)(y, x, batches.outer)
            y, state = OPTIMIZERS["momentum"].step(bda(t, g, f, x, c_l=1.0, c_u=1.0), state, y, x)
            at = y if last is None or t > K - last else {name: leaf.detach() for name, leaf in y.items()}
            losses.append(weights[t - 1] * problem.outer_loss(at, x, batches.outer))
        return sum(losses)

    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    expected = torch.autograd.grad(total(x), list(x.values()))
    close(found.grad, dict(zip(x, expected, strict=True)))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_learned_share_is_differentiated(keep):
    problem, outer, inner, batches = case()
    outer = outer | {"share": torch.tensor(-0.3, dtype=D)}
    dynamics = bl.inner.Aggregated(bl.SGD(0.1, momentum=0.5), lambda x: x["share"].sigmoid(), C_L, C_U)

    def direction(t, g, f, x):
        return bda(t, g, f, x, a=x["share"].sigmoid())

    expected, _ = written_out(problem, outer, inner, batches, bl.SGD(0.1, momentum=0.5), K, direction)
    assert expected["share"] != 0
    close(hypergradient((problem, outer, inner, batches), dynamics, bl.Unrolled(keep=keep)).grad, expected)


@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_tasks_follow_their_own_outer_batches(chunk):
    problem = bl.Problem(
        lambda y, x, b: (y["w"] * x["h"] - b).square().sum(), lambda y, x, b: (y["w"].exp() - b).square().sum(),
        init=lambda x, b: {"w": x["w"]},
    )  # fmt: skip
    x = {"h": torch.tensor([0.5, 1.5], dtype=D), "w": torch.tensor([0.2, -0.1], dtype=D)}
    inner, outer = torch.randn(3, 2, dtype=D), torch.randn(3, 2, dtype=D)
    dynamics = bl.inner.Aggregated(bl.SGD(0.05), A, C_L, C_U)
    found = hypergradient((problem, x, None, bl.Batches(inner, outer)), dynamics, bl.TaskMean(bl.Unrolled(), chunk))
    each = [
        written_out(problem, x, None, bl.Batches(a, b), bl.SGD(0.05), K, bda) for a, b in zip(inner, outer, strict=True)
    ]
    close(found.grad, {name: torch.stack([grad[name] for grad, _ in each]).mean(0) for name in x})
    close(found.inner, {"w": torch.stack([y["w"] for _, y in each])})


def test_a_user_optimizer_that_mixes_tasks_is_seen_inside():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Clip(bl.Optimizer):
        def init(self, inner):
            return None

        def step(self, grad, state, inner, outer):
            return inner - 0.1 * grad / grad.norm(), state

    problem = bl.Problem(lambda y, x, b: (y - b).square().sum(), lambda y, x, b: (y - x).square().sum())
    batches = bl.Batches(torch.randn(3, 2, dtype=D), torch.randn(3, 2, dtype=D))
    arguments = problem, torch.tensor(0.5, dtype=D), torch.zeros(3, 2, dtype=D), batches
    with pytest.raises(ValueError, match="mixes tasks"):
        hypergradient(arguments, bl.inner.Aggregated(Clip()), bl.TaskMean(bl.Unrolled()))


def test_random_losses_are_drawn_once():
    """Dropout in g and noise in f: the three ways to keep the trajectory see the same program."""

    def noisy(y, x, b):
        return (torch.nn.functional.dropout(y * x, 0.5) - b).square().sum()

    problem = bl.Problem(noisy, lambda y, x, b: (y * torch.randn(4, dtype=D) - x).square().sum())
    arguments = problem, torch.ones(4, dtype=D), torch.ones(4, dtype=D), bl.Batches(torch.ones(4, dtype=D), None)
    dynamics, found = bl.inner.Aggregated(bl.SGD(0.1), A), []
    for keep in KEEPS:
        torch.manual_seed(0)
        found.append(hypergradient(arguments, dynamics, bl.Unrolled(keep=keep)))
    for other in found[1:]:
        torch.testing.assert_close(other.grad, found[0].grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(other.inner, found[0].inner)


@pytest.mark.parametrize("keep", KEEPS)
def test_features_and_tensors_that_a_loss_does_not_use(keep):
    """x in Problem.features of both batches; y["only f"] moves along f alone, y["none"] rests."""

    def inner_loss(y, x, z):
        return (z @ y["both"]).square().mean() + 0 * x["e"].sum()

    def outer_loss(y, x, z):
        return (z @ y["both"] - y["only f"]).square().mean()

    problem = bl.Problem(inner_loss, outer_loss, features=lambda x, b: torch.tanh(b @ x["e"]))
    plain = bl.Problem(
        lambda y, x, b: inner_loss(y, x, problem.features(x, b)),
        lambda y, x, b: outer_loss(y, x, problem.features(x, b)),
    )
    g = torch.Generator().manual_seed(0)
    x = {"e": torch.randn(3, 2, generator=g, dtype=D)}
    y = {"both": torch.ones(2, dtype=D), "only f": torch.zeros((), dtype=D), "none": torch.ones(1, dtype=D)}
    batches = bl.Batches(torch.randn(4, 3, generator=g, dtype=D), torch.randn(5, 3, generator=g, dtype=D))
    dynamics = bl.inner.Aggregated(bl.SGD(0.1), A)
    found, other = (hypergradient((each, x, y, batches), dynamics, bl.Unrolled(keep=keep)) for each in (problem, plain))
    close(found.grad, other.grad)
    assert torch.equal(found.inner["none"], y["none"])
    assert found.inner["only f"] != 0

    def moved(x):
        w = y
        for t in range(1, K + 1):
            used = {name: w[name] for name in ("both", "only f")}
            g = torch.func.grad(lambda u: plain.inner_loss({**w, **u}, x, batches.inner))(used)  # noqa: B023
            f = torch.func.grad(lambda u: plain.outer_loss({**w, **u}, x, batches.outer))(used)  # noqa: B023
            step = bda(t, g, f, x, c_l=1.0, c_u=1.0)
            w = {name: w[name] - 0.1 * step[name] if name in step else w[name] for name in w}
        return plain.outer_loss(w, x, batches.outer)

    close(found.grad, torch.func.grad(moved)(x))


def test_no_steps_one_step_and_bare_tensors():
    problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: y**2 / 2)
    arguments = problem, torch.tensor(1.0, dtype=D), torch.tensor(2.0, dtype=D), bl.Batches(None, None)
    dynamics = bl.inner.Aggregated(bl.SGD(0.5), share=1.0)
    with pytest.warns(UserWarning, match="influences neither"):
        assert hypergradient(arguments, dynamics, bl.Unrolled(), steps=0).grad == 0
    # The first step is along f alone, y_1 = 2 - 0.5 * 2; the second along both, y_2 = 1 - 0.5 (0.5 (1 - x) + 0.5 * 1).
    found = [hypergradient(arguments, dynamics, bl.Unrolled(), steps=steps) for steps in (1, 2)]
    assert [each.inner.item() for each in found] == [1.0, 0.75]
    assert [each.grad.item() for each in found] == [0.0, 0.75 * 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), share=1.5), "from 0 to 1"),
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), share=-0.1), "from 0 to 1"),
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), share=float("nan")), "from 0 to 1"),
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), share=True), "from 0 to 1"),
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), inner_scale=-1.0), "inner_scale=-1.0"),
        (lambda: bl.inner.Aggregated(bl.SGD(0.1), outer_scale="1"), "outer_scale='1'"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match="optimizer float"):
        bl.inner.Aggregated(0.1)
    with pytest.raises(TypeError, match="final"):
        type("Mine", (bl.inner.Aggregated,), {})
    with pytest.raises(ValueError, match="does not say"):
        bl.adapt(*case(), solver=bl.Converge(bl.inner.Aggregated(bl.SGD(0.1))))
    problem, outer, inner, batches = case()
    wrong = bl.inner.Aggregated(bl.SGD(0.1), share=lambda x: x["weights"])
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(6,\)"):
        hypergradient((problem, outer, inner, batches), wrong, bl.Unrolled())
