"""Multi-step MAML (arXiv 2002.07836): known answers of papers.md, section 2, and the resampling case."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl

D = torch.float64
NONE = bl.Batches(None, None)
KEEPS = ("graph", "iterates", "segments")
RESAMPLED = {keep: bl.Unrolled(keep, resampled=True) for keep in ("iterates", "segments")}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def logistic():
    """Logistic regression with support and query rows; x is the start. L = |Z|^2 / (4 n)."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 30, 4, generator=g, dtype=D)
    signs = torch.randint(0, 2, (2, 30), generator=g).to(D) * 2 - 1

    def loss(y, x, b):
        return torch.nn.functional.softplus(-b[1] * (b[0] @ y)).mean()

    smoothness = torch.linalg.matrix_norm(rows[0], 2).square().item() / (4 * 30)
    problem = bl.Problem(loss, loss, init=lambda x, b: x)
    return (
        problem,
        torch.randn(4, generator=g, dtype=D),
        bl.Batches((rows[0], signs[0]), (rows[1], signs[1])),
        smoothness,
    )


@pytest.mark.parametrize("steps", [1, 3, 5, 10])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_ordered_product_of_2_2_equals_the_hypergradient_papers_md_2_7_a(keep, steps):
    """prod_{j = 0..N-1} (I - alpha H(w_j)) grad l_T(w_N), j = 0 leftmost; alpha = 1 / (8 N L). The Hessians do not
    commute: the product in the other order differs."""
    problem, w, batches, smoothness = logistic()
    alpha = 1 / (8 * steps * smoothness)
    path = [w]
    for _ in range(steps):
        path.append(path[-1] - alpha * torch.func.grad(problem.inner_loss)(path[-1], None, batches.inner))
    expected = backwards = torch.func.grad(problem.outer_loss)(path[-1], None, batches.outer)
    factors = [
        torch.eye(4, dtype=D) - alpha * torch.func.jacrev(torch.func.grad(problem.inner_loss))(y, None, batches.inner)
        for y in path[:-1]
    ]
    for factor in reversed(factors):
        expected = factor @ expected
    for factor in factors:
        backwards = factor @ backwards
    found = bl.hypergradient(
        problem, w, None, batches, solver=bl.Descent(bl.SGD(alpha), steps), estimator=bl.Unrolled(keep)
    )
    torch.testing.assert_close(found.grad, expected, rtol=1e-13, atol=1e-16)
    assert (steps == 1) == torch.allclose(expected, backwards, rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [0, 1, 5, 40])
@pytest.mark.parametrize("keep", KEEPS)
def test_quadratic_closed_form_papers_md_2_7_b(keep, steps):
    """l_S = (w - c)' H (w - c) / 2, l_T = |w - q|^2 / 2, P = (I - alpha H)^N: grad = P (c + P (w - c) - q)."""
    g = torch.Generator().manual_seed(1)
    H = torch.randn(5, 5, generator=g, dtype=D)
    H, (w, c, q) = H @ H.T / 5 + 0.1 * torch.eye(5, dtype=D), torch.randn(3, 5, generator=g, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (y - c) @ H @ (y - c) / 2, lambda y, x, b: (y - q).square().sum() / 2, init=lambda x, b: x
    )
    alpha = 0.9 / torch.linalg.matrix_norm(H, 2).item()
    P = torch.linalg.matrix_power(torch.eye(5, dtype=D) - alpha * H, steps)
    found = bl.hypergradient(
        problem, w, None, NONE, solver=bl.Descent(bl.SGD(alpha), steps), estimator=bl.Unrolled(keep)
    )
    torch.testing.assert_close(found.inner, c + P @ (w - c), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.grad, P @ (c + P @ (w - c) - q), rtol=1e-12, atol=1e-13)


# The resampling case


SAMPLES = (0.5, 1.5)
"""h of l(w; h) = h w^2 / 2, with equal probability: papers.md 2.7 e."""


def plug_in():
    return bl.Problem(lambda y, x, h: h * y**2 / 2, lambda y, x, h: h * y**2 / 2, init=lambda x, b: x)


def mean_over_samples(w, alpha, steps, estimate):
    """The exact expectation: every sequence of samples, of the steps and of their Hessians, and of the outer one."""
    total, count = torch.zeros((), dtype=D), 0
    for draws in itertools.product(SAMPLES, repeat=2 * steps + 1):
        inner, curvature, outer = draws[:steps], draws[steps : 2 * steps], draws[-1]
        total, count = total + estimate(w, alpha, inner, curvature, outer), count + 1
    return total / count


def by_library(estimator):
    def estimate(w, alpha, inner, curvature, outer):
        batches = bl.Batches(bl.PerStep(inner), outer, curvature=bl.PerStep(curvature) if estimator.resampled else None)
        return bl.hypergradient(
            plug_in(), w, None, batches, solver=bl.Descent(bl.SGD(alpha), len(inner)), estimator=estimator
        ).grad

    return estimate


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_bias_of_reused_samples_and_none_of_fresh_ones_papers_md_2_7_e(steps):
    """True (1 - a)^2N w; fresh Hessian samples: that; reused ones: ((1 - a)^2 + a^2 / 4)^N w. By enumeration."""
    w, alpha = torch.tensor(1.7, dtype=D), 0.4
    true = (1 - alpha) ** (2 * steps) * w
    reused = ((1 - alpha) ** 2 + alpha**2 / 4) ** steps * w
    fresh = mean_over_samples(w, alpha, steps, by_library(bl.Unrolled("iterates", resampled=True)))
    torch.testing.assert_close(fresh, true, rtol=1e-13, atol=0)
    again = mean_over_samples(w, alpha, steps, by_library(bl.Unrolled("iterates")))
    torch.testing.assert_close(again, reused, rtol=1e-13, atol=0)
    assert abs(reused - true) > 0.03 * true


def test_the_true_meta_gradient_of_2_7_e_is_that_of_the_mean_loss():
    """L(w) = E_h l(w; h) = w^2 / 2, whose steps are w (1 - a): the finite-sum estimator on it."""
    w, alpha = torch.tensor(1.7, dtype=D), 0.4
    found = bl.hypergradient(
        plug_in(), w, None, bl.Batches(1.0, 1.0), solver=bl.Descent(bl.SGD(alpha), 6), estimator=bl.Unrolled()
    )
    torch.testing.assert_close(found.grad, (1 - alpha) ** 12 * w, rtol=1e-13, atol=0)


def net_problem():
    """A small net with data weights in x, features, and a start that is x: batches of rows and targets."""
    g = torch.Generator().manual_seed(5)

    def features(x, b):
        return torch.tanh(b[0] @ x["embed"]), b[1]

    def inner_loss(y, x, b):
        return ((torch.tanh(b[0] @ y["a"]) @ y["b"] - b[1]) ** 2).mean() + x["decay"].exp() * y["a"].square().sum()

    def outer_loss(y, x, b):
        return ((torch.tanh(b[0] @ y["a"]) @ y["b"] - b[1]) ** 2).mean() + 0.1 * x["embed"].square().sum()

    x = {
        "embed": torch.randn(4, 3, generator=g, dtype=D),
        "decay": torch.tensor(-2.0, dtype=D),
        "rate": torch.tensor(-2.0, dtype=D),
        "a": torch.randn(3, 5, generator=g, dtype=D),
        "b": torch.randn(5, generator=g, dtype=D),
    }
    problem = bl.Problem(inner_loss, outer_loss, init=lambda x, b: {"a": x["a"], "b": x["b"]}, features=features)

    def batch(*lead):
        return torch.randn(*lead, 7, 4, generator=g, dtype=D), torch.randn(*lead, 7, generator=g, dtype=D)

    return problem, x, batch


def resampled_by_hand(problem, x, batches, optimizer, steps):
    """The same sweep in plain torch: the step's gradient has the value of one batch and the derivatives of another,
    g(inner) + (g(curvature) - constant), so that autograd does the rest."""
    leaves = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), x)
    y = problem.init(leaves, None)
    state = optimizer.init(y)

    def slope(at, b):
        found = torch.autograd.grad(
            problem.inner_loss(at, leaves, problem.features(leaves, b)),
            list(at.values()),
            create_graph=True,
            allow_unused=True,
        )
        return dict(zip(at, found, strict=True))

    for step in range(steps):
        ran, fresh = slope(y, batches.inner_at(step)), slope(y, batches.curvature_at(step))
        g = {name: ran[name].detach() + fresh[name] - fresh[name].detach() for name in y}
        y, state = optimizer.step(g, state, y, leaves)
    loss = problem.outer_loss(y, leaves, problem.features(leaves, batches.outer))
    names, tensors = zip(*leaves.items(), strict=True)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return {n: torch.zeros_like(t) if f is None else f for n, t, f in zip(names, tensors, found, strict=True)}


OPTIMIZERS = {
    "sgd": bl.SGD(0.1),
    "momentum": bl.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "adam": bl.Adam(0.05),
    "learned rate": bl.SGD(lr=lambda x: x["rate"].exp()),
    "a schedule": bl.Scheduled([bl.SGD(0.1 / (k + 1)) for k in range(5)]),
}


@pytest.mark.filterwarnings("ignore:outer variable .*rate")
@pytest.mark.parametrize("one", [False, True], ids=["fresh at each step", "one batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", RESAMPLED)
def test_derivatives_of_the_steps_at_other_samples_equal_a_surrogate_by_hand(keep, optimizer, one):
    problem, x, batch = net_problem()
    inner = bl.PerStep([batch() for _ in range(5)])
    batches = bl.Batches(inner, batch(), curvature=batch() if one else bl.PerStep([batch() for _ in range(5)]))
    optimizer = OPTIMIZERS[optimizer]
    solver = bl.Descent(optimizer, 5)
    found = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=RESAMPLED[keep])
    expected = resampled_by_hand(problem, x, batches, optimizer, 5)
    torch.testing.assert_close(flat(found.grad), flat(expected), rtol=1e-12, atol=1e-13)
    plain = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.Unrolled(keep))
    torch.testing.assert_close(found.inner, plain.inner)
    torch.testing.assert_close(found.outer_loss, plain.outer_loss)
    assert (flat(found.grad) - flat(plain.grad)).norm() > 1e-2 * flat(plain.grad).norm()


@pytest.mark.filterwarnings("ignore:outer variable .*rate")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", RESAMPLED)
def test_with_the_steps_own_batches_it_is_todays_hypergradient(keep, optimizer):
    problem, x, batch = net_problem()
    inner = bl.PerStep([batch() for _ in range(5)])
    for batches in (
        bl.Batches(inner, batch(), curvature=inner),
        (lambda b: bl.Batches(b, batch(), curvature=b))(batch()),
    ):
        solver = bl.Descent(OPTIMIZERS[optimizer], 5)
        a, b = (
            bl.hypergradient(problem, x, None, batches, solver=solver, estimator=estimator)
            for estimator in (RESAMPLED[keep], bl.Unrolled(keep))
        )
        torch.testing.assert_close(flat(a.grad), flat(b.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("keep", RESAMPLED)
def test_the_mean_over_tasks_each_with_its_own_samples(keep, chunk):
    problem, x, batch = net_problem()
    inner, curvature, outer = [batch(3) for _ in range(4)], [batch(3) for _ in range(4)], batch(3)
    optimizer, gradients = bl.SGD(0.1, momentum=0.5), []

    def task(stacked, i):
        return tuple(leaf[i] for leaf in stacked)

    for i in range(3):
        alone = bl.Batches(
            bl.PerStep([task(b, i) for b in inner]),
            task(outer, i),
            curvature=bl.PerStep([task(b, i) for b in curvature]),
        )
        gradients.append(flat(resampled_by_hand(problem, x, alone, optimizer, 4)))
    with pytest.warns(UserWarning, match="rate"):
        found = bl.hypergradient(
            problem,
            x,
            None,
            bl.Batches(bl.PerStep(inner), outer, curvature=bl.PerStep(curvature)),
            solver=bl.Descent(optimizer, 4),
            estimator=bl.TaskMean(RESAMPLED[keep], chunk=chunk),
        )
    torch.testing.assert_close(flat(found.grad), torch.stack(gradients).mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keep", RESAMPLED)
def test_tasks_that_rest_by_themselves(keep):
    """l = h (y - c)^2 / 2 with steps r = 1 - a h: Converge stops each task alone; factors are 1 - a d of its d."""
    problem = bl.Problem(
        lambda y, x, b: b["h"] * (y - b["c"]) ** 2 / 2, lambda y, x, b: (y - 2) ** 2 / 2, init=lambda x, b: x
    )
    x, c = torch.tensor(0.3, dtype=D), torch.tensor([1.0, -1.0, 5.0], dtype=D)
    h, d = torch.tensor([1.0, 0.4, 2.0], dtype=D), torch.tensor([0.5, 0.6, 1.7], dtype=D)
    batches = bl.Batches({"h": h, "c": c}, {"h": h, "c": c}, curvature={"h": d, "c": c})
    solver = bl.Converge(bl.SGD(0.3), tol=0.2, max_steps=60)
    found = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.TaskMean(RESAMPLED[keep]))
    expected, counts = [], []
    for i in range(3):
        y, count = x.clone(), 0
        while (h[i] * (y - c[i])).abs() > 0.2:
            y, count = y - 0.3 * h[i] * (y - c[i]), count + 1
        expected.append((1 - 0.3 * d[i]) ** count * (y - 2))
        counts.append(count)
    assert len(set(counts)) == 3
    torch.testing.assert_close(found.grad, torch.stack(expected).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("last", [1, 2, 5])
def test_truncation_and_step_weights_go_with_it(last):
    """1-d: steps h_k, derivatives d_k; a_k = w_k (y_k - q) + (1 - a d_k) a_{k+1}, cut at the last steps."""
    h, d, alpha, q = (0.5, 1.5, 1.0, 0.7, 1.2), (1.1, 0.4, 1.6, 0.9, 0.2), 0.3, 2.0
    weights, w = (0.1, 0.0, 0.4, 0.2, 1.0), torch.tensor(1.7, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: b * (y - x["c"]) ** 2 / 2,
        lambda y, x, b: (y - q) ** 2 / 2,
        init=lambda x, b: x["w"] if last == 5 else w,
    )
    x = {"c": torch.tensor(0.6, dtype=D)} | ({"w": w} if last == 5 else {})
    path = [w]
    for k in range(5):
        path.append(path[-1] - alpha * h[k] * (path[-1] - 0.6))
    a, to_c = torch.zeros((), dtype=D), torch.zeros((), dtype=D)
    for k in reversed(range(5 - last, 5)):
        a = a + weights[k] * (path[k + 1] - q)
        a, to_c = (1 - alpha * d[k]) * a, to_c + alpha * d[k] * a
    batches = bl.Batches(bl.PerStep(h), None, curvature=bl.PerStep(d))
    for keep in RESAMPLED:
        estimator = bl.Unrolled(keep, resampled=True, step_weights=weights, last=last)
        found = bl.hypergradient(problem, x, None, batches, solver=bl.Descent(bl.SGD(alpha), 5), estimator=estimator)
        if last == 5:
            torch.testing.assert_close(found.grad["w"], a, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.grad["c"], to_c, rtol=1e-13, atol=0)


def test_noise_in_the_loss_is_drawn_anew_and_alike_by_both_ways_of_keeping():
    """g = u y^2 / 2 with u in {1/2, 3/2} drawn at each evaluation: the mean over seeds is that of independent draws."""
    problem = bl.Problem(
        lambda y, x, b: (0.5 + torch.randint(0, 2, (2000,)).to(D)) @ y.square() / 2,
        lambda y, x, b: y.square().sum() / 2,
        init=lambda x, b: x,
    )
    x, alpha, steps = torch.ones(2000, dtype=D), 0.4, 3
    batches = bl.Batches(None, None, curvature=bl.PerStep([0, 1, 2]))

    def found(estimator):
        torch.manual_seed(3)
        hg = bl.hypergradient(problem, x, None, batches, solver=bl.Descent(bl.SGD(alpha), steps), estimator=estimator)
        return hg.grad, torch.rand(1)

    (one, after), (other, also_after) = (found(RESAMPLED[keep]) for keep in ("iterates", "segments"))
    assert torch.equal(one, other)
    assert torch.equal(after, also_after)
    fresh, reused = 0.6 ** (2 * steps), (0.36 + alpha**2 / 4) ** steps
    deviation = one.std() / 2000**0.5
    assert abs(one.mean() - fresh) < 4 * deviation
    assert abs(found(bl.Unrolled("iterates"))[0].mean() - reused) < 4 * deviation
    assert reused - fresh > 8 * deviation, "the test tells one from the other"


@pytest.mark.parametrize(("optimizer", "more"), [(bl.SGD(0.1), 0), (bl.SGD(0.1, momentum=0.9), 4)])
def test_oracle_calls(optimizer, more):
    """K steps, K gradients at the fresh samples; K more for what an optimizer does with the gradient as it ran."""
    problem, x, batch = net_problem()
    batches = bl.Batches(bl.PerStep([batch() for _ in range(4)]), batch(), curvature=batch())
    with pytest.warns(UserWarning, match="rate"):
        found = bl.hypergradient(
            problem, x, None, batches, solver=bl.Descent(optimizer, 4), estimator=RESAMPLED["iterates"]
        )
    assert found.stats["calls"] == {"inner_gradient": 8 + more, "outer_gradient": 1, "hvp": 4, "mixed": 0}


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_no_steps_and_one_task_and_float32(dtype):
    w = torch.tensor(1.5, dtype=dtype)
    for keep, estimator in RESAMPLED.items():
        none = bl.hypergradient(
            plug_in(),
            w,
            None,
            bl.Batches(1.0, 1.0, curvature=0.5),
            solver=bl.Descent(bl.SGD(0.4), 0),
            estimator=estimator,
        )
        torch.testing.assert_close(none.grad, w)
        one = bl.hypergradient(
            plug_in(),
            w,
            None,
            bl.Batches(*torch.tensor([[1.0], [1.0], [0.5]], dtype=dtype)),
            solver=bl.Descent(bl.SGD(0.4), 1),
            estimator=bl.TaskMean(estimator),
        )
        assert one.grad.dtype == dtype, keep
        torch.testing.assert_close(one.grad, w * 0.6 * 0.8)


@dataclasses.dataclass(frozen=True)
class Map(bl.inner.Dynamics):
    def step(self, inner, state, outer, at):
        return inner - 0.1 * at.gradient(inner), state


REFUSED = {
    "no curvature": (bl.Batches(1.0, 1.0), bl.Descent(bl.SGD(0.1), 2), "no Batches.curvature"),
    "too few": (
        bl.Batches(1.0, 1.0, curvature=bl.PerStep([1.0])),
        bl.Descent(bl.SGD(0.1), 2),
        "holds 1 batches and the inner solver takes 2 steps",
    ),
    "none": (bl.Batches(1.0, 1.0, curvature=bl.PerStep([])), bl.Descent(bl.SGD(0.1), 0), "holds 0 batches"),
    "no optimizer": (bl.Batches(1.0, 1.0, curvature=1.0), bl.Descent(Map(), 2), "was given a Map; an inner optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resampled_is_refused(name):
    batches, solver, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(
            plug_in(),
            torch.tensor(1.0),
            None,
            batches,
            solver=solver,
            estimator=bl.Unrolled("iterates", resampled=True),
        )


def test_the_graph_of_the_steps_as_they_ran_cannot_be_resampled():
    with pytest.raises(ValueError, match=r'Unrolled\("iterates", resampled=True\)'):
        bl.Unrolled(resampled=True)
    with pytest.raises(ValueError, match="True or False was needed"):
        bl.Unrolled("iterates", resampled=1)


# Smoothness and step sizes: papers.md 2.4, 2.7 c and d


def waves(count=6, size=5, seed=0):
    """l_i(w) = sum_j a_ij cos(w_j - p_ij): L = rho = the largest a, negative curvature everywhere else."""
    g = torch.Generator().manual_seed(seed)
    height = 0.2 + 0.8 * torch.rand(count, size, generator=g, dtype=D)
    phase = 6.28 * torch.rand(2, count, size, generator=g, dtype=D)
    height = height / height.max()
    problem = bl.Problem(
        lambda y, x, b: (b[0] * (y - b[1]).cos()).sum(),
        lambda y, x, b: (b[0] * (y - b[1]).cos()).sum(),
        init=lambda x, b: x,
    )
    return problem, height, phase, g


@pytest.mark.parametrize("alpha", [None, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("finite", [False, True], ids=["resampling", "finite-sum"])
def test_the_lipschitz_bound_of_2_4_holds_at_random_pairs_papers_md_2_7_c(steps, alpha, finite):
    problem, height, phase, g = waves()
    batches = bl.Batches((height, phase[0]), (height, phase[1 if finite else 0]))
    constants = bl.meta.MultiStep(steps, 1.0, 1.0, alpha)
    solver, ratios = bl.Descent(bl.SGD(constants.alpha), steps), []

    def meta_gradient(w):
        return bl.hypergradient(
            problem, w, None, batches, solver=solver, estimator=bl.TaskMean(bl.Unrolled("iterates"))
        ).grad

    for size in (1e-3, 0.1, 1.0, 3.0):
        for _ in range(5):
            w = 6.28 * torch.rand(5, generator=g, dtype=D)
            u = w + size * torch.randn(5, generator=g, dtype=D)
            norms = bl.meta.start_norms(problem, w, None, batches, tasks=True)
            bound = constants.local_smoothness(norms.query, norms.difference if finite else None)
            ratios.append((meta_gradient(w) - meta_gradient(u)).norm() / (bound * (w - u).norm()))
    assert max(ratios) <= 1
    assert max(ratios) > (0.05 if alpha is None else 1e-7), "the bound is not so loose that the test could not fail"


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_the_norm_of_the_product_papers_md_2_7_d(steps):
    """|P| <= (1 + a)^N <= e^(1/8) at alpha = 1 / (8 N L); at alpha = 1 / L and a maximum of cos it is 2^N."""
    problem, height, phase, g = waves(count=1)
    linear = bl.Problem(problem.inner_loss, lambda y, x, v: v @ y, init=problem.init)

    def product(w, alpha, crest):
        batch = (torch.ones(5, dtype=D) if crest else height[0]), phase[0, 0]
        rows = [
            bl.hypergradient(
                linear,
                w,
                None,
                bl.Batches(batch, v),
                solver=bl.Descent(bl.SGD(alpha), steps),
                estimator=bl.Unrolled("iterates"),
            ).grad
            for v in torch.eye(5, dtype=D)
        ]
        return torch.linalg.matrix_norm(torch.stack(rows), 2).item()

    constants = bl.meta.MultiStep(steps, 1.0, 1.0)
    for _ in range(5):
        w = 6.28 * torch.rand(5, generator=g, dtype=D)
        assert product(w, constants.alpha, crest=False) <= constants.product <= 1.1332
    crest = phase[0, 0]  # every cosine at its maximum
    assert product(crest, constants.alpha, crest=True) == pytest.approx(constants.product, rel=1e-10)
    assert product(crest, 1.0, crest=True) == pytest.approx(2.0**steps, rel=1e-10)


def descend(problem, w, batches, alpha, steps, rate, count):
    """The meta-loss along plain descent with the adaptive step of 2.4 (rate None) or a fixed one."""
    losses, constants = [], bl.meta.MultiStep(steps, 1.1, 1.1, alpha)
    for _ in range(count):
        hg = bl.hypergradient(
            problem,
            w,
            None,
            batches,
            solver=bl.Descent(bl.SGD(constants.alpha), steps),
            estimator=bl.TaskMean(bl.Unrolled("iterates")),
        )
        if rate is None:
            norms = bl.meta.start_norms(problem, w, None, batches, tasks=True)
            step = constants.outer_step(norms.query, norms.difference, divisor=1)
        else:
            step = rate
        losses.append(hg.outer_loss.item())
        w = w - step * hg.grad
    return losses


def crests(start):
    """l = cos(w - c) + 0.05 w^2, c near 0: a crest between two valleys, L = rho = 1.1, on a bowl that no start leaves
    for free."""
    c = torch.tensor([0.0, 0.01, -0.02], dtype=D)

    def loss(y, x, b):
        return (y - b).cos() + 0.05 * y**2

    problem = bl.Problem(loss, loss, init=lambda x, b: x)
    return problem, torch.tensor(start, dtype=D), bl.Batches(0 * c, c)


OUTER_STEP = 0.5
"""Below 1 / (1.29 L + 0.17 (rho / L) |grad|) for every |grad| that is met here."""


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("start", [0.3, -1.0])
def test_with_alpha_divided_by_n_the_loss_falls_at_one_outer_step_size_for_all_n_papers_md_2_7_d(start, steps):
    problem, w, batches = crests(start)
    for rate in (None, OUTER_STEP):
        losses = descend(problem, w, batches, None, steps, rate, 8)
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
        assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_with_a_fixed_alpha_that_outer_step_size_blows_up_papers_md_2_7_d(steps):
    """A start that N steps carry off the crest: its meta-gradient is of the order of 1.82^N, and the step flies off.
    From the same start, alpha = 1 / (8 N L) descends."""
    problem, w, batches = crests(0.5 * (1 + 0.9 / 1.1) ** -steps)
    blown = descend(problem, w, batches, 1 / 1.1, steps, OUTER_STEP, 2)
    assert blown[1] > blown[0] + 10
    calm = descend(problem, w, batches, None, steps, OUTER_STEP, 5)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(calm))


def test_l_from_products_gives_the_step_size_of_the_paper():
    problem, height, phase, _ = waves()
    batches = bl.Batches((height, phase[0]), (height, phase[1]))
    w = torch.zeros(5, dtype=D)
    found = bl.meta.smoothness(problem, w, None, batches, tasks=True, tol=1e-8)
    dense = (height * (w - phase[0]).cos()).abs().amax(1)
    torch.testing.assert_close(found.largest, dense, rtol=1e-6, atol=0)
    assert found.largest.max() <= 1.0
