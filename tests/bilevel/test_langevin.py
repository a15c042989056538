"""Langevin dynamics and the gradient of an expectation: methods.md, A1 and TP4."""

import collections
import dataclasses
import gc
import math

import pytest
import torch
from bilevel_profiling import forecast
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel.estimators.stochastic import Covariance, Pathwise

D = torch.float64
LAM, TAU = 0.3, 0.5
A = math.exp(LAM)
EXACT = -TAU / (2 * A)
KEEPS = ("graph", "iterates", "segments")


def identity(**more):
    return Pathwise("identity", window=more.pop("window", 5), **more)


# --- TP4: g = e^lam y^2 / 2, f = y^2 / 2 at temperature tau; dE[f]/dlam = -tau e^-lam / 2

GROUPS = 8
"""Independent estimates in one call: chain c uses the number of its group, x @ one-hot; their spread is the error."""


def gibbs(estimator, step_size, steps, chains, seed=0):
    """The mean over GROUPS estimates, each of `chains` chains that start at rest, and its standard error."""
    torch.manual_seed(seed)
    variance = TAU / (A * (1 - step_size * A / 2))  # of the chain itself, whose steps are not small
    problem = bl.Problem(lambda y, x, b: (x * b).sum().exp() * y**2 / 2, lambda y, x, b: y**2 / 2)
    rows = torch.eye(GROUPS, dtype=D).repeat_interleave(chains, 0)
    hg = bl.hypergradient(
        problem,
        torch.full((GROUPS,), LAM, dtype=D),
        variance**0.5 * torch.randn(len(rows), dtype=D),
        bl.Batches(rows, rows),
        solver=bl.Descent(bl.inner.Langevin(step_size, TAU), steps),
        estimator=bl.TaskMean(estimator),
    )
    assert hg.status is bl.Status.OK
    found = hg.grad * GROUPS
    return found.mean().item(), found.std().item() / GROUPS**0.5, hg


def holds(found, error, expected, relative):
    """Within four standard errors, which are small."""
    assert error < relative * abs(expected)
    assert abs(found - expected) < 4 * error


def lost(step_size, samples, thinning):
    """The part of a covariance that its own mean takes, of correlated samples: the mean of r^2k over pairs."""
    r = (1 - step_size * A) ** (2 * thinning)
    return 2 * sum((samples - k) * r**k for k in range(1, samples)) / (samples * (samples - 1))


@pytest.mark.parametrize(
    ("step_size", "thinning", "limit"), [(0.1, 1, -0.2129842), (0.1, 5, -0.2129842), (0.02, 20, -0.1903076)]
)
def test_tp4_covariance(step_size, thinning, limit):
    """TP4: -tau/(2a) / (1 - eps a/2)^2 at a step of eps, which goes to the exact -0.1852046."""
    assert limit == pytest.approx(EXACT / (1 - step_size * A / 2) ** 2, abs=1e-7)
    samples = 40
    found, error, _ = gibbs(
        Covariance(thinning=thinning), step_size, samples * thinning, chains=1600 if thinning == 1 else 800
    )
    holds(found, error, limit * (1 - lost(step_size, samples, thinning)), 0.02)


def test_tp4_pathwise_exact():
    """TP4: "its own discretised answer is -0.18423" at a step of 0.1, next to the exact -0.1852046."""
    limit = EXACT * (1 - 0.1 * A) / (1 - 0.1 * A / 2) ** 2
    assert limit == pytest.approx(-0.18423, abs=5e-6)
    found, error, hg = gibbs(Pathwise(burn_in=60), 0.1, 300, chains=800)
    holds(found, error, limit, 0.01)
    assert hg.outer_loss.item() == pytest.approx(TAU / (2 * A * (1 - 0.1 * A / 2)), rel=0.02)


def test_tp4_decay():
    """A1.2: gamma = (1 - eps a)^2 has the limit -tau/(2a) / (1 - eps a/2)^2 = -0.1903, at a step of 0.02."""
    limit = EXACT / (1 - 0.02 * A / 2) ** 2
    assert limit == pytest.approx(-0.1903, abs=1e-5)
    found, error, _ = gibbs(Pathwise("decay", gamma=(1 - 0.02 * A) ** 2, burn_in=300), 0.02, 500, chains=400)
    holds(found, error, limit, 0.02)


@pytest.mark.parametrize(("steps", "dossier"), [(19, -0.190), (400, -4.05)])
def test_tp4_identity_grows_with_the_chain(steps, dossier):
    """A1.2: after i steps of 0.02 the identity closure is at -i eps tau / (1 - eps a/2): right at i = 19 alone."""
    limit = -steps * 0.02 * TAU / (1 - 0.02 * A / 2)
    assert limit == pytest.approx(dossier, rel=0.015)
    with pytest.warns(UserWarning, match="grows with the length of the chain"):
        estimator = Pathwise("identity", burn_in=steps)
    found, error, _ = gibbs(estimator, 0.02, steps + 1, chains=800)
    holds(found, error, limit, 0.03)


def test_tp4_a_window_holds_the_identity_closure():
    limit = -19 * 0.02 * TAU / (1 - 0.02 * A / 2)
    found, error, _ = gibbs(identity(window=19, burn_in=100), 0.02, 200, chains=800)
    holds(found, error, limit, 0.02)


@pytest.mark.parametrize(
    "estimator",
    [*(bl.Unrolled(keep=keep) for keep in KEEPS), bl.Implicit(bl.CG()), bl.MemoryReduced(), bl.FirstOrderCorrected()],
    ids=repr,
)
def test_tp4_deterministic_methods_return_exactly_zero(estimator):
    problem = bl.Problem(lambda y, x, b: x.exp() * y**2 / 2, lambda y, x, b: y**2 / 2)
    zero = torch.tensor(0.0, dtype=D)
    hg = bl.hypergradient(
        problem, torch.tensor(LAM, dtype=D), zero, bl.Batches(None, None), solver=bl.Descent(bl.SGD(0.1), 50),
        estimator=estimator,
    )  # fmt: skip
    assert hg.grad == 0


# --- against chains written out by hand


def net(dtype=D, *, steps=None, features=False):
    """Weights of data and a decay as x, a two-layer net as y; one batch, or one a step."""
    g = torch.Generator().manual_seed(1)
    inputs, targets = (
        torch.randn(24, 3, generator=g, dtype=D).to(dtype),
        torch.randn(24, generator=g, dtype=D).to(dtype),
    )
    inner = {
        "a": torch.randn(3, 2, generator=g, dtype=D).to(dtype),
        "b": torch.randn(2, generator=g, dtype=D).to(dtype),
    }
    outer = {
        "weights": 0.3 * torch.randn(4, generator=g, dtype=D).to(dtype),
        "decay": torch.tensor(-1.0, dtype=dtype),
        "mix": torch.eye(3, dtype=dtype),
        "goal": torch.tensor(0.3, dtype=dtype),
    }

    def mixed(x, b):
        return [b[0] @ x["mix"], b[1]]

    def residual(y, b):
        return torch.tanh(b[0] @ y["a"]) @ y["b"] - b[1]

    def inner_loss(y, x, b):
        decay = x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())
        return (x["weights"].sigmoid() * residual(y, b).square()).mean() + decay

    def outer_loss(y, x, b):
        return (residual(y, b) - x["goal"]).square().mean()

    outer_batch = [inputs[20:], targets[20:]]
    each = [[inputs[4 * k : 4 * k + 4], targets[4 * k : 4 * k + 4]] for k in range(5)]
    batches = bl.Batches(each[0] if steps is None else bl.PerStep([each[k % 5] for k in range(steps)]), outer_batch)
    whole = bl.Problem(lambda y, x, b: inner_loss(y, x, mixed(x, b)), lambda y, x, b: outer_loss(y, x, mixed(x, b)))
    apart = bl.Problem(inner_loss, outer_loss, features=mixed)
    return (apart if features else whole), outer, inner, batches


EPS, T, K = 0.05, 0.3, 12


def chain(problem, x, y, batches, steps=K, step_size=EPS, tau=T):
    """The iterates y_0 ... y_K, each with the noise that torch's generator gives next."""
    rate = step_size if callable(step_size) else lambda step: step_size
    iterates = [y]
    for step in range(steps):
        slope = torch.autograd.grad(problem.inner(y, x, batches.inner_at(step)), list(y.values()), create_graph=True)
        spread = math.sqrt(2 * rate(step) * tau)
        y = {
            name: leaf - rate(step) * g + spread * torch.randn_like(leaf)
            for (name, leaf), g in zip(y.items(), slope, strict=True)
        }
        iterates.append(y)
    return iterates


def attached(tree):
    return {name: leaf.clone().requires_grad_() for name, leaf in tree.items()}


def found_by(estimator, arguments, steps=K, step_size=EPS, tau=T, seed=0, **more):
    torch.manual_seed(seed)
    solver = bl.Descent(bl.inner.Langevin(step_size, tau), steps)
    return bl.hypergradient(*arguments, solver=solver, estimator=estimator, **more)


def close(found, expected, rtol=1e-11):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol * 0.1)


def schedule(step):
    return 0.1 / (1 + step) ** 0.55


@pytest.mark.parametrize("per_step", [False, True], ids=["one batch", "a batch a step"])
@pytest.mark.parametrize("features", [False, True], ids=["whole", "features"])
@pytest.mark.parametrize(("burn_in", "thinning", "step_size"), [(0, 1, EPS), (5, 3, EPS), (11, 1, schedule)])
def test_the_exact_closure_is_the_gradient_of_the_mean_over_the_chain(burn_in, thinning, step_size, features, per_step):
    """A1.2: Z_{i+1} = (I - eps H) Z - eps C', against backpropagation through the same chain."""
    arguments = net(steps=K if per_step else None, features=features)
    problem, outer, inner, batches = arguments
    found = found_by(Pathwise(burn_in=burn_in, thinning=thinning), arguments, step_size=step_size)
    torch.manual_seed(0)
    x = attached(outer)
    iterates = chain(problem, x, attached(inner), batches, step_size=step_size)
    losses = [problem.outer(y, x, batches.outer) for y in iterates[burn_in:K:thinning]]
    mean = torch.stack(losses).mean()
    close(found.grad, dict(zip(x, torch.autograd.grad(mean, list(x.values())), strict=True)))
    torch.testing.assert_close(found.outer_loss, mean.detach(), rtol=1e-12, atol=0)
    close(found.inner, {name: leaf.detach() for name, leaf in iterates[-1].items()}, 1e-12)
    assert found.stats["samples"] == len(losses)
    if len(losses) > 1:
        torch.testing.assert_close(found.stats["outer_loss_std"], torch.stack(losses).std().detach())


@pytest.mark.parametrize(
    ("closure", "gamma", "window"), [("decay", 0.8, None), ("decay", 0.8, 3), ("identity", None, 4), ("decay", 1.0, 1)]
)
@pytest.mark.parametrize(("burn_in", "thinning"), [(0, 1), (4, 3)])
def test_decay_and_identity_are_the_recursion(closure, gamma, window, burn_in, thinning):
    """A1.2: r_{i+1} = gamma r_i - eps d/dx <dg/dy, df/dy>, step by step; in a window, the last increments alone."""
    arguments = net(steps=K, features=True)
    problem, outer, inner, batches = arguments
    found = found_by(Pathwise(closure, gamma, window, burn_in=burn_in, thinning=thinning), arguments)
    torch.manual_seed(0)
    iterates = chain(problem, outer, attached(inner), batches)
    total, increments = dict.fromkeys(outer, 0.0), []
    kept = range(burn_in, K, thinning)
    for step in range(K):
        y, x = attached(iterates[step]), attached(outer)
        if step in kept:
            f_x = torch.autograd.grad(problem.outer(y, x, batches.outer), list(x.values()), allow_unused=True)
            recent = increments if window is None else increments[-window:]
            for i, name in enumerate(x):
                r = sum((gamma or 1.0) ** age * each[i] for age, each in enumerate(reversed(recent)))
                total[name] = total[name] + (r + (0.0 if f_x[i] is None else f_x[i])) / len(kept)
        slope = torch.autograd.grad(problem.outer(y, x, batches.outer), list(y.values()))
        g = torch.autograd.grad(problem.inner(y, x, batches.inner_at(step)), list(y.values()), create_graph=True)
        product = sum((a * b).sum() for a, b in zip(g, slope, strict=True))
        pulled = torch.autograd.grad(product, list(x.values()), allow_unused=True)
        increments.append([torch.zeros(()) if leaf is None else -EPS * leaf for leaf in pulled])
    close(found.grad, total)


def by_covariance(problem, outer, iterates, batches, kept):
    """E[df/dx] - Cov(f, dg/dx) / tau over given samples."""
    f, direct, scores = [], [], []
    for step in kept:
        y, x = iterates[step], attached(outer)
        loss = problem.outer(y, x, batches.outer)
        f.append(loss.detach())
        for into, value in ((direct, loss), (scores, problem.inner(y, x, batches.inner_at(step)))):
            pulled = torch.autograd.grad(value, list(x.values()), allow_unused=True)
            into.append(
                [torch.zeros_like(a) if leaf is None else leaf for leaf, a in zip(pulled, x.values(), strict=True)]
            )
    f = torch.stack(f)
    off = (f - f.mean()) / (len(f) - 1)
    found = {}
    for i, name in enumerate(outer):
        s, d = torch.stack([each[i] for each in scores]), torch.stack([each[i] for each in direct])
        found[name] = d.mean(0) - torch.tensordot(off, s, dims=1) / T
    return found


@pytest.mark.parametrize("features", [False, True], ids=["whole", "features"])
@pytest.mark.parametrize(("burn_in", "thinning"), [(0, 1), (3, 4)])
def test_the_covariance_of_one_chain(burn_in, thinning, features):
    """A1.3: dF/dx = E[df/dx] - Cov(f, dg/dx) / tau."""
    arguments = net(steps=K, features=features)
    problem, outer, inner, batches = arguments
    found = found_by(Covariance(burn_in, thinning), arguments)
    torch.manual_seed(0)
    iterates = [
        {name: leaf.detach() for name, leaf in y.items()} for y in chain(problem, outer, attached(inner), batches)
    ]
    close(found.grad, by_covariance(problem, outer, iterates, batches, range(burn_in, K, thinning)))
    close(found.inner, iterates[-1], 1e-12)
    assert found.stats["calls"]["hvp"] == found.stats["calls"]["mixed"] == 0


# --- tasks


def tasks_of_nets(count):
    """Tasks that share x and have data of their own."""
    problem, outer, inner, _ = net()
    g = torch.Generator().manual_seed(7)
    inputs, targets = (torch.randn(count, 4, *shape, generator=g, dtype=D) for shape in ((3,), ()))
    start = {name: leaf.expand(count, *leaf.shape) for name, leaf in inner.items()}
    return problem, outer, start, bl.Batches([inputs, targets], [inputs.flip(0), targets])


ESTIMATORS = {
    "covariance": Covariance(2, 2),
    "exact": Pathwise(burn_in=2),
    "decay": Pathwise("decay", gamma=0.8),
    "identity": identity(),
}
EVERY = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The noise that was drawn, in order."""

    def __init__(self):
        super().__init__()
        self.noise = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if "randn_like" in str(function):
            self.noise.append(found.clone())
        return found


def give_noise(monkeypatch, noise):
    """Let chains draw this noise (looks at tensors without data take none of it)."""
    drawn = iter(noise)

    def randn_like(leaf):
        return next(drawn).reshape(leaf.shape).to(leaf) if type(leaf) is torch.Tensor else torch.zeros_like(leaf)

    monkeypatch.setattr(torch, "randn_like", randn_like)


@dataclasses.dataclass(frozen=True)
class Given(bl.inner.Dynamics):
    """Langevin steps whose noise is a batch: what one task of many did, alone."""

    noise: object

    def step(self, inner, state, outer, at):
        g = at.gradient(inner)
        z = self.noise[at.step]
        return {k: inner[k] - EPS * g[k] + math.sqrt(2 * EPS * T) * z[k] for k in inner}, state


@EVERY
def test_a_mean_over_tasks_is_that_of_their_own_chains(estimator, monkeypatch):
    """Each task has its own noise; estimates are per task, and then averaged."""
    problem, outer, start, batches = tasks_of_nets(3)
    names = list(start)
    with Recorded() as recorded:
        found = found_by(bl.TaskMean(estimator), (problem, outer, start, batches))
    noise = recorded.noise[-len(names) * K :]
    if isinstance(estimator, Covariance):  # the second pass drew what the first had drawn
        first = recorded.noise[: len(names) * K]
        assert len(recorded.noise) == 2 * len(names) * K
        assert all(torch.equal(a, b) for a, b in zip(first, noise, strict=True))
    assert not any(torch.equal(noise[0][0], noise[0][task]) for task in (1, 2))
    total, losses = dict.fromkeys(outer, 0.0), []
    for task in range(3):
        give_noise(monkeypatch, [z[task] for z in noise])
        one = bl.Batches([leaf[task] for leaf in batches.inner], [leaf[task] for leaf in batches.outer])
        each = found_by(estimator, (problem, outer, {name: leaf[task] for name, leaf in start.items()}, one))
        monkeypatch.undo()
        total = {name: total[name] + each.grad[name] / 3 for name in total}
        losses.append(each.outer_loss)
        close({name: leaf[task] for name, leaf in found.inner.items()}, each.inner, 1e-10)
    close(found.grad, total, 1e-9)
    torch.testing.assert_close(found.outer_loss, torch.stack(losses).mean())
    torch.testing.assert_close(found.stats["outer_loss_std"].shape, torch.Size([3]))


@EVERY
@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_a_seed_gives_the_same_number_again(estimator, chunk):
    problem, outer, start, batches = tasks_of_nets(3)
    one, again, other = (
        found_by(bl.TaskMean(estimator, chunk), (problem, outer, start, batches), seed=seed) for seed in (4, 4, 5)
    )
    assert all(torch.equal(one.grad[name], again.grad[name]) for name in outer)
    assert not all(torch.equal(one.grad[name], other.grad[name]) for name in outer)
    assert not torch.equal(one.inner["b"][0], one.inner["b"][1])


# --- the dynamics under other estimators


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("last", [None, 5])
def test_unrolled_replays_the_noise(keep, last):
    arguments = problem, outer, inner, batches = net(steps=K)
    found = found_by(bl.Unrolled(keep=keep, last=last), arguments)
    torch.manual_seed(0)
    x = attached(outer)
    y = attached(inner)
    if last is not None:
        y = attached({k: leaf.detach() for k, leaf in chain(problem, x, y, batches, K - last)[-1].items()})
        batches = bl.Batches(bl.PerStep([batches.inner_at(K - last + k) for k in range(last)]), batches.outer)
    end = chain(problem, x, y, batches, last or K)[-1]
    expected = torch.autograd.grad(problem.outer(end, x, batches.outer), list(x.values()))
    close(found.grad, dict(zip(x, expected, strict=True)))


@pytest.mark.parametrize(
    "dynamics",
    [bl.SGD(0.1), bl.inner.Langevin(0.1, 0.1), bl.inner.Aggregated(bl.SGD(0.1, momentum=0.5), 0.7)],
    ids=["sgd", "langevin", "aggregated"],
)
@pytest.mark.parametrize("per_step", [False, True], ids=["one batch", "a batch a step"])
def test_random_features_do_not_move_what_a_rebuilt_step_draws(dynamics, per_step):
    """A shared embedding was drawn inside of the first step, which was then rebuilt with other numbers."""
    drop = torch.nn.functional.dropout
    problem = bl.Problem(
        lambda y, x, z: (drop(y) * z).square().sum() / 20 + (y - x).square().sum() / 5,
        lambda y, x, z: (y * z).sum().sin() + (drop(y) * x).square().sum(),
        features=lambda x, b: drop(b * x),
    )
    x, y, b = torch.linspace(0.5, 1, 6, dtype=D), torch.ones(6, dtype=D), torch.linspace(1, 2, 6, dtype=D)
    batches = bl.Batches(bl.PerStep([b * (1 + 0.1 * step) for step in range(5)]) if per_step else b, b)
    for seed in range(4):
        found = []
        for keep in KEEPS:
            torch.manual_seed(seed)
            hg = bl.hypergradient(
                problem, x, y, batches, solver=bl.Descent(dynamics, 5), estimator=bl.Unrolled(keep=keep)
            )
            found.append(hg)
        for other in found[1:]:
            assert torch.equal(other.inner, found[0].inner)
            torch.testing.assert_close(other.grad, found[0].grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), Covariance(), Pathwise()], ids=repr)
def test_a_chain_that_leaves_the_minimum_is_no_failure(estimator):
    """g rises from 0 to P tau / 2: where a chain rests is above the minimum."""
    problem = bl.Problem(lambda y, x, b: (x * y.square()).sum() / 2, lambda y, x, b: y.square().sum())
    arguments = problem, torch.tensor(1.0), torch.zeros(5), bl.Batches(None, None)
    assert found_by(estimator, arguments, 40, 0.1).status is bl.Status.OK


def test_no_temperature_is_gradient_descent_and_draws_nothing():
    arguments = net()
    before = torch.get_rng_state()
    cold = bl.hypergradient(*arguments, solver=bl.Descent(bl.inner.Langevin(EPS, 0.0), K), estimator=bl.Unrolled())
    assert torch.equal(torch.get_rng_state(), before)
    plain = bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(EPS), K), estimator=bl.Unrolled())
    close(cold.grad, plain.grad, 1e-13)
    close(cold.inner, plain.inner, 1e-13)
    # The last sample of a cold chain is the end of one step less.
    path = bl.hypergradient(
        *arguments, solver=bl.Descent(bl.inner.Langevin(EPS, 0.0), K + 1), estimator=Pathwise(burn_in=K)
    )
    close(path.grad, plain.grad, 1e-12)


def test_adapt_draws_a_sample():
    """Two moments of many numbers at once: the chain's own, tau / (h (1 - eps h / 2)), within their errors."""
    torch.manual_seed(0)
    problem = bl.Problem(lambda y, x, b: (x * (y - 1).square()).sum() / 2, lambda y, x, b: y.sum())
    solver = bl.Descent(bl.inner.Langevin(0.2, TAU), 60)
    y = bl.adapt(problem, torch.tensor(2.0), torch.zeros(40_000), bl.Batches(None, None), solver=solver).inner
    variance = TAU / (2 * (1 - 0.2))
    assert abs(y.mean() - 1) < 4 * (variance / 40_000) ** 0.5
    assert abs(y.var() - variance) < 4 * variance * (2 / 40_000) ** 0.5


@EVERY
def test_a_forward_pass_alone_is_the_same_chain(estimator):
    """The samples draw nothing of their own: the chain ends where adapt ends."""
    arguments = problem, outer, inner, batches = net()
    found = found_by(estimator, arguments)
    torch.manual_seed(0)
    solver = bl.Descent(bl.inner.Langevin(EPS, T), K)
    close(found.inner, bl.adapt(problem, outer, inner, batches, solver=solver).inner, 1e-13)


# --- attacks


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(estimator, dtype):
    reference, found = (found_by(estimator, net(each)) for each in (torch.float32, dtype))
    for name, leaf in found.grad.items():
        assert leaf.dtype == dtype
        assert leaf.isfinite().all()
        if dtype is torch.float32:
            torch.testing.assert_close(leaf, reference.grad[name])


@EVERY
def test_float32_follows_float64(estimator, monkeypatch):
    """The same noise in both: what is left is rounding."""
    g = torch.Generator().manual_seed(2)
    noise = [torch.randn(n, generator=g, dtype=D) for _ in range(K) for n in (6, 2)]
    found = []
    for dtype in (D, torch.float32):
        give_noise(monkeypatch, noise)
        found.append(found_by(estimator, net(dtype)).grad)
        monkeypatch.undo()
    for name in found[0]:
        torch.testing.assert_close(found[1][name].double(), found[0][name], rtol=2e-4, atol=1e-6)


def test_the_mean_over_the_samples_is_what_is_differentiated():
    """The exact closure agrees with a difference of the mean of f over the same noise."""
    estimator = Pathwise(burn_in=2)
    problem, outer, inner, batches = net()
    found = found_by(estimator, (problem, outer, inner, batches))
    direction = {
        name: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=D)
        for name, leaf in outer.items()
    }
    sides = []
    for sign in (1, -1):
        x = {name: leaf + sign * 1e-5 * direction[name] for name, leaf in outer.items()}
        sides.append(found_by(estimator, (problem, x, inner, batches)).outer_loss)
    slope = sum((found.grad[name] * direction[name]).sum() for name in outer)
    torch.testing.assert_close((sides[0] - sides[1]) / 2e-5, slope, rtol=1e-6, atol=1e-9)


@EVERY
def test_x_in_one_loss_alone_and_unused_tensors(estimator):
    """x["f"] is in f alone, x["g"] in g alone; y["rest"] in neither."""
    problem = bl.Problem(
        lambda y, x, b: (y["y"] - x["g"]).square().sum(), lambda y, x, b: (y["y"].sin() * x["f"]).sum()
    )
    x = {"f": torch.tensor(0.7, dtype=D), "g": torch.tensor([0.1, 0.2], dtype=D)}
    y = {"rest": torch.ones(3, dtype=D), "y": torch.zeros(2, dtype=D)}
    found = found_by(estimator, (problem, x, y, bl.Batches(None, None)))
    assert torch.equal(found.inner["rest"], y["rest"])
    assert found.grad["f"] != 0
    assert (found.grad["g"] != 0).all()
    with pytest.warns(UserWarning, match="'none'.* influences neither"):
        more = found_by(estimator, (problem, x | {"none": torch.ones(2, dtype=D)}, y, bl.Batches(None, None)))
    close({name: more.grad[name] for name in x}, found.grad, 1e-13)


@EVERY
def test_a_start_that_is_x_alone_is_refused(estimator):
    problem = bl.Problem(lambda y, x, b: y.square().sum(), lambda y, x, b: y.sum(), init=lambda x, b: x)
    with pytest.raises(ValueError, match="the start of the inner loop"):
        found_by(estimator, (problem, torch.ones(2, dtype=D), None, bl.Batches(None, None)))


@EVERY
def test_random_losses_leave_the_noise_alone(estimator):
    """Dropout in g: s and the step see the same mask; the mean over two tasks runs the chain twice alike."""
    problem = bl.Problem(
        lambda y, x, b: (torch.nn.functional.dropout(y, 0.5) - x * b).square().sum(),
        lambda y, x, b: (y * b).sum().sin(),
    )
    x, ones = torch.tensor([0.5, 1.0], dtype=D), torch.ones(2, 2, dtype=D)
    one, again = (found_by(bl.TaskMean(estimator), (problem, x, ones, bl.Batches(ones, ones))) for _ in range(2))
    assert torch.equal(one.grad, again.grad)
    assert one.status is bl.Status.OK


@EVERY
def test_a_chain_that_runs_away_says_so(estimator):
    """A step beyond 2 / L: the variance grows and never comes to rest."""
    problem = bl.Problem(lambda y, x, b: (x * y).square().sum() / 2, lambda y, x, b: y.square().sum() / 2)
    arguments = problem, torch.tensor(1.0, dtype=D), torch.zeros(3, dtype=D), bl.Batches(None, None)
    assert found_by(estimator, arguments, 60, 2.2).status is bl.Status.INNER_UNSTABLE
    assert found_by(estimator, arguments, 60, 0.5).status is bl.Status.OK
    assert found_by(estimator, arguments, 400, 8.0).status.failed


@EVERY
def test_a_start_far_from_rest_is_no_failure(estimator):
    problem = bl.Problem(lambda y, x, b: (x * y).square().sum() / 2, lambda y, x, b: y.square().sum() / 2)
    arguments = problem, torch.tensor(1.0, dtype=D), torch.full((3,), 50.0, dtype=D), bl.Batches(None, None)
    assert found_by(estimator, arguments, 60, 0.1).status is bl.Status.OK


@EVERY
def test_a_burn_in_that_is_too_short_shows(estimator):
    """The descent to where the chain rests is no sample; a covariance takes it for one."""
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: y.square().sum())
    arguments = problem, torch.ones(5, dtype=D), torch.zeros(5, dtype=D), bl.Batches(None, None)
    drifts = []
    for burn_in in (0, 60):
        found = found_by(dataclasses.replace(estimator, burn_in=burn_in, thinning=1), arguments, 460, 0.05, 0.01)
        drifts.append(found.stats["drift"].item())
    assert drifts[0] > 5
    assert abs(drifts[1]) < 1.5


def test_drift_is_per_task():
    problem, outer, start, batches = tasks_of_nets(3)
    found = found_by(bl.TaskMean(Covariance()), (problem, outer, start, batches))
    assert found.stats["drift"].shape == (3,)


def test_the_outer_loop_finds_the_minimum_of_an_expectation():
    """F(x) = tau e^-x / 2 + k x has its minimum at log(tau / 2k), that over chains of steps of 0.2 near it."""
    torch.manual_seed(0)
    problem = bl.Problem(
        lambda y, x, b: x.exp() * y.square().sum() / 2, lambda y, x, b: y.square().mean() / 2 + 0.2 * x
    )
    x = torch.tensor(-0.5, dtype=D, requires_grad=True)
    size = 0.2
    loop = bl.iterate(
        problem, x, torch.zeros(2000, dtype=D), [bl.Batches(None, None)] * 30,
        solver=bl.Descent(bl.inner.Langevin(size, TAU), 30), estimator=Pathwise(burn_in=15),
        optimizer=torch.optim.SGD([x], lr=1.5),
    )  # fmt: skip
    for step in loop:
        assert step.hypergradient.status is bl.Status.OK

    def slope(x):
        a = math.exp(x)
        return 0.2 - TAU / (2 * a) * (1 - size * a) / (1 - size * a / 2) ** 2

    low, high = -2.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    assert abs(low - math.log(TAU / 0.4)) < 0.1
    assert abs(x.item() - low) < 0.03


def test_counts_of_oracles():
    arguments = net()
    calls = {label: found_by(each, arguments).stats["calls"] for label, each in ESTIMATORS.items()}
    q = sum(leaf.numel() for leaf in arguments[1].values())
    assert calls["covariance"] == {"inner_gradient": K + 5, "outer_gradient": 5, "hvp": 0, "mixed": 0}
    assert calls["exact"] == {"inner_gradient": K, "outer_gradient": K - 2, "hvp": q * (K - 1), "mixed": 0}
    assert calls["decay"] == {"inner_gradient": K, "outer_gradient": K, "hvp": 0, "mixed": K - 1}
    # Increments that no window reaches cost a plain step.
    late = found_by(Pathwise("decay", gamma=0.5, window=2, burn_in=K - 1), arguments).stats["calls"]
    assert late == {"inner_gradient": K, "outer_gradient": 3, "hvp": 0, "mixed": 2}


@pytest.mark.parametrize("estimator", [Covariance(), Pathwise("decay", gamma=0.9)], ids=["covariance", "decay"])
def test_memory_does_not_grow_with_the_chain(estimator):
    """A1: "memory 2q" for the covariance, P + Q for the first-order closures; and a forecast that is exact."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 30, generator=g)
    problem = bl.Problem(
        lambda y, x, b: (x.sigmoid() * (torch.tanh(inputs @ y["a"]) @ y["b"]).square()).mean() + y["a"].square().sum(),
        lambda y, x, b: (torch.tanh(inputs @ y["a"]) @ y["b"] - 1).square().mean(),
    )
    x, y = torch.zeros(64), {"a": torch.zeros(30, 40), "b": torch.zeros(40)}

    def run(steps):
        solver = bl.Descent(bl.inner.Langevin(0.01, 0.01), steps)
        return bl.hypergradient(problem, x, y, bl.Batches(None, None), solver=solver, estimator=estimator)

    peaks = []
    for steps in (10, 60):
        run(steps)  # what is remembered of the problem
        gc.collect()
        with Tensors() as meter:
            run(steps)
        peaks.append(meter.peak_bytes)
    assert peaks[1] == peaks[0]
    assert forecast(lambda: run(10)).peak_tensor_bytes == peaks[0]


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.inner.Langevin(0.0), "step_size=0.0"),
        (lambda: bl.inner.Langevin(-0.1), "step_size=-0.1"),
        (lambda: bl.inner.Langevin(math.nan), "step_size=nan"),
        (lambda: bl.inner.Langevin(True), "step_size=True"),
        (lambda: bl.inner.Langevin(0.1, -1.0), "temperature=-1.0"),
        (lambda: bl.inner.Langevin(0.1, math.inf), "temperature=inf"),
        (lambda: Covariance(burn_in=-1), "burn_in=-1"),
        (lambda: Covariance(thinning=0), "thinning=0"),
        (lambda: Pathwise(thinning=1.5), "thinning=1.5"),
        (lambda: Pathwise("none"), "'exact', 'decay', 'identity'"),
        (lambda: Pathwise("decay"), "gamma=None"),
        (lambda: Pathwise("decay", gamma=1.5), "gamma=1.5"),
        (lambda: Pathwise("decay", gamma=0.0), "gamma=0.0"),
        (lambda: Pathwise("exact", gamma=0.5), "gamma=0.5 with closure='exact'"),
        (lambda: Pathwise("exact", window=3), "forgets by itself"),
        (lambda: Pathwise("identity", window=0), "window=0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (bl.Descent(bl.SGD(0.1), 10), "samples of a Langevin dynamics, and the inner solver is Descent of SGD"),
        (bl.Converge(bl.SGD(0.1)), "Converge of SGD"),
        (bl.Converge(bl.inner.Langevin(0.1)), "Converge of Langevin"),
        (bl.Descent(Given(collections.defaultdict(lambda: collections.defaultdict(float))), 10), "Descent of Given"),
        (bl.Descent(bl.inner.Langevin(0.1), 0), "keeps 0 samples of a chain of 0 steps"),
        (bl.Descent(bl.inner.Langevin(lambda step: -0.1), 10), "step_size=-0.1 at step 0"),
    ],
)
def test_other_loops_are_refused(estimator, solver, message):
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(*net(), solver=solver, estimator=estimator)


def test_what_a_covariance_cannot_do_is_refused():
    with pytest.raises(ValueError, match="divides by the temperature"):
        found_by(Covariance(), net(), tau=0.0)
    with pytest.raises(ValueError, match=r"keeps 1 samples.*at least 2"):
        found_by(Covariance(burn_in=K - 1), net())
    assert found_by(Pathwise(burn_in=K - 1), net()).stats["samples"] == 1
    with pytest.raises(ValueError, match="carries nothing"):
        found_by(Covariance(), net(), state={"owner": "Covariance"})
    for estimator in (bl.Implicit(bl.CG()), bl.FirstOrderCorrected()):
        with pytest.raises(ValueError, match=r"does not say|need not follow"):
            found_by(estimator, net())


def test_a_matrix_that_is_too_large_is_refused():
    problem = bl.Problem(lambda y, x, b: (x.mean() * y).square().sum(), lambda y, x, b: y.sum())
    arguments = problem, torch.ones(40_000), torch.ones(40_000), bl.Batches(None, None)
    with pytest.raises(ValueError, match="1600000000 numbers"):
        found_by(Pathwise(), arguments, 2)
