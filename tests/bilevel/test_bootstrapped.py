"""Bootstrapped hypergradients (papers.md 5.4 d, 5.5, 5.2 E), held against written-out programs and finite
differences."""

import contextlib
import dataclasses
import warnings

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.estimators import KL, Bregman, FurtherSteps, Matching, OneStep, SquaredDistance, Target
from bilevel.problems import quadratic
from bilevel.testing import check_estimator

D = torch.float64
OPTIMIZERS = {
    "sgd": bl.SGD(0.3),
    "momentum": bl.SGD(0.1, momentum=0.8),
    "adam": bl.Adam(0.05),
    "learned lr": bl.SGD(lr=lambda x: x["log_lr"].exp(), momentum=0.5),
}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def path(problem, x, inner, batches, optimizer, steps):
    """y after each step, from a loop written out with torch.func."""
    y = inner if problem.init is None else problem.init(x, batches.inner_at(0))
    state, found = optimizer.init(y), [y]
    for step in range(steps):
        gradient = torch.func.grad(problem.inner_loss)(y, x, batches.inner_at(step))
        y, state = optimizer.step(gradient, state, y, x)
        found.append(y)
    return found


def half_square(z, y):
    return 0.5 * (flat(z) - flat(y)).square().sum()


def by_hand(problem, x, inner, batches, optimizer, steps, z, mu):
    """The derivative of mu(z, y_K(x)) + (f(sg(y_K), x)) by torch.func.grad, z a constant."""

    def program(at):
        y = path(problem, at, inner, batches, optimizer, steps)[-1]
        still = pytree.tree_map(torch.detach, path(problem, x, inner, batches, optimizer, steps)[-1])
        return mu(z, y) + problem.outer_loss(still, at, batches.outer)

    return flat(torch.func.grad(program)(x))


def found(problem, x, inner, batches, optimizer, steps, target, matching=None, base=None):
    estimator = bl.Bootstrapped(base or bl.Unrolled(), target, matching or SquaredDistance())
    with quietly():
        return bl.hypergradient(problem, x, inner, batches, solver=bl.Descent(optimizer, steps), estimator=estimator)


@contextlib.contextmanager
def quietly():
    """log_lr is part of x for all optimizers, and influences nothing for most of them: that warning is tested
    elsewhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable .*log_lr")
        yield


@pytest.mark.parametrize("further", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_more_steps_of_the_same_loop_with_its_momentum(optimizer, further):
    """papers.md 5.5, steps 1 to 3: the state of momentum and of Adam goes on."""
    problem, x, inner, batches = catalogue.weighted_net()
    rule = OPTIMIZERS[optimizer]
    z = path(problem, x, inner, batches, rule, 5 + further)[-1]
    expected = by_hand(problem, x, inner, batches, rule, 5, z, half_square)
    hg = found(problem, x, inner, batches, rule, 5, FurtherSteps(further))
    assert hg.status is bl.Status.OK
    torch.testing.assert_close(flat(hg.grad), expected, rtol=1e-11, atol=1e-13)
    y = path(problem, x, inner, batches, rule, 5)[-1]
    torch.testing.assert_close(flat(hg.inner), flat(y), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hg.stats["matching_loss"], half_square(z, y), rtol=1e-10, atol=0)
    torch.testing.assert_close(hg.outer_loss, problem.outer_loss(y, x, batches.outer), rtol=1e-12, atol=0)


@pytest.mark.parametrize("base", ["graph", "iterates", "segments"])
@pytest.mark.parametrize("name", catalogue.PROBLEMS)
def test_a_gradient_step_as_target_is_the_plain_hypergradient(name, base):
    """papers.md 5.4 d: |z - y|^2 with z = y - df/dy / 2 gives exactly D'df/dy (and the direct part is kept)."""
    problem, x, inner, batches = catalogue.PROBLEMS[name]()
    plain = found_plain(problem, x, inner, batches, bl.Unrolled(base))
    target, matching = OneStep(bl.SGD(lr=0.5)), SquaredDistance(1.0)
    hg = found(problem, x, inner, batches, bl.SGD(0.3), 5, target, matching, bl.Unrolled(base))
    torch.testing.assert_close(flat(hg.grad), flat(plain.grad), rtol=0, atol=1e-15)
    assert torch.equal(hg.outer_loss, plain.outer_loss)


def found_plain(problem, x, inner, batches, estimator):
    with quietly():
        return bl.hypergradient(problem, x, inner, batches, solver=bl.Descent(bl.SGD(0.3), 5), estimator=estimator)


def test_a_gradient_step_as_target_in_closed_form():
    """papers.md 5.4 d on TP1: z = y - g / 2, D' g = 0.2197265625, to the bit."""
    problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
    x, y = torch.tensor(1.0, dtype=D), torch.tensor(0.0, dtype=D)
    hg = found(problem, x, y, bl.Batches(None, None), bl.SGD(0.25), 4, OneStep(bl.SGD(0.5)), SquaredDistance(1.0))
    assert hg.grad.item() == 0.2197265625


@pytest.mark.parametrize("of", ["outer", "inner"])
@pytest.mark.parametrize("optimizer", [bl.SGD(0.7), bl.Adam(0.1)], ids=["sgd", "adam"])
def test_the_last_step_of_a_target_may_be_another_optimizers_along_either_loss(optimizer, of):
    """papers.md 5.5 step 2: L - 1 further steps, then one step along a plain gradient."""
    problem, x, inner, batches = catalogue.weighted_net()
    end = path(problem, x, inner, batches, bl.SGD(0.3), 5 + 2)[-1]
    loss, batch = (problem.outer_loss, batches.outer) if of == "outer" else (problem.inner_loss, batches.inner)
    z, _ = optimizer.step(torch.func.grad(loss)(end, x, batch), optimizer.init(end), end, x)
    expected = by_hand(problem, x, inner, batches, bl.SGD(0.3), 5, z, half_square)
    hg = found(problem, x, inner, batches, bl.SGD(0.3), 5, OneStep(optimizer, of=of, after=2))
    torch.testing.assert_close(flat(hg.grad), expected, rtol=1e-11, atol=1e-13)


def predict(y, x, batch):
    return torch.tanh(batch[0] @ y["a"]) @ y["b"]


def kl(first):
    def divergence(z, y, batch):
        p, q = (predict(point, None, batch).log_softmax(-1) for point in ((z, y) if first == "target" else (y, z)))
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")

    return divergence


@pytest.mark.parametrize("first", ["target", "inner"])
def test_matching_predictions_both_ways(first):
    """papers.md 5.5 step 3: KL(target, K-step) and KL(K-step, target), against torch's own kl_div."""
    problem, x, inner, batches = catalogue.weighted_net()
    z = path(problem, x, inner, batches, bl.SGD(0.3), 9)[-1]
    expected = by_hand(problem, x, inner, batches, bl.SGD(0.3), 5, z, lambda z, y: kl(first)(z, y, batches.outer))
    hg = found(problem, x, inner, batches, bl.SGD(0.3), 5, FurtherSteps(4), KL(predict, first))
    torch.testing.assert_close(flat(hg.grad), expected, rtol=1e-10, atol=1e-13)
    other = found(problem, x, inner, batches, bl.SGD(0.3), 5, FurtherSteps(4), KL(predict, first, temperature=3.0))
    assert not torch.allclose(flat(other.grad), expected, rtol=1e-3)


def potential(y):
    return sum(leaf.exp().sum() + leaf.square().sum() for leaf in pytree.tree_leaves(y))


def test_a_bregman_divergence_compares_slopes():
    """papers.md 5.2 E in mirror coordinates: dmu/dy = grad h(y) - grad h(z)."""
    problem, x, inner, batches = catalogue.weighted_net()
    z = path(problem, x, inner, batches, bl.SGD(0.3), 8)[-1]
    slope = torch.func.grad(potential)(z)

    def mu(z, y):
        return potential(y) - potential(z) - (flat(slope) * (flat(y) - flat(z))).sum()

    expected = by_hand(problem, x, inner, batches, bl.SGD(0.3), 5, z, mu)
    hg = found(problem, x, inner, batches, bl.SGD(0.3), 5, FurtherSteps(3), Bregman(potential))
    torch.testing.assert_close(flat(hg.grad), expected, rtol=1e-11, atol=1e-13)
    y = path(problem, x, inner, batches, bl.SGD(0.3), 5)[-1]
    torch.testing.assert_close(hg.stats["matching_loss"], mu(z, y), rtol=1e-8, atol=1e-14)
    square = Bregman(lambda y: 0.5 * sum(leaf.square().sum() for leaf in pytree.tree_leaves(y)))
    a, b = (found(problem, x, inner, batches, bl.SGD(0.3), 5, FurtherSteps(3), m) for m in (square, None))
    torch.testing.assert_close(flat(a.grad), flat(b.grad), rtol=1e-11, atol=1e-14)


# Stop-gradient through the target


@dataclasses.dataclass(frozen=True, eq=False)
class Attached(Target):
    """A target made of a tensor that requires grad, and of x."""

    weight: torch.Tensor

    def point(self, ahead):
        with torch.enable_grad():
            return ahead.inner * self.weight


@dataclasses.dataclass(frozen=True)
class Looking(Matching):
    """Half the squared distance, which looks at what it is given."""

    def distance(self, target, inner, outer, batch):
        leaves = [*pytree.tree_leaves(target.inner), *pytree.tree_leaves(outer), *pytree.tree_leaves(batch)]
        assert not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
        return SquaredDistance().distance(target, inner, outer, batch)


def test_no_gradient_passes_through_the_target():
    """papers.md 5.8: the gradient with respect to the target is exactly 0, whatever it was made of."""
    problem, outer, inner, batches = quadratic.setup()
    weight = torch.tensor(0.7, dtype=D, requires_grad=True)
    hg = found(problem, outer, inner, batches, bl.SGD(0.3), 5, Attached(weight), Looking())
    assert weight.grad is None
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((hg.grad, hg.inner, hg.stats["matching_loss"])))
    detached = found(problem, outer, inner, batches, bl.SGD(0.3), 5, Attached(weight.detach()))
    assert torch.equal(hg.grad, detached.grad)


def test_the_found_gradient_holds_the_target_fixed_and_not_the_target_that_moves_with_x():
    """papers.md 5.8, numerically: central differences of mu(z, y_K(x)) with z frozen, and with z(x)."""
    hessian = torch.diag(torch.tensor([2.0, 0.7], dtype=D))
    problem = bl.Problem(lambda y, x, b: 0.5 * y @ hessian @ y - (x**2) @ y, lambda y, x, b: ((y - 1) ** 2).sum())
    x, y0, batches = torch.tensor([0.8, -0.4], dtype=D), torch.zeros(2, dtype=D), bl.Batches(None, None)
    hg = found(problem, x, y0, batches, bl.SGD(0.2), 3, FurtherSteps(4))

    def mu(at, z):
        return half_square(z, path(problem, at, y0, batches, bl.SGD(0.2), 3)[-1])

    def differences(moving):
        columns = []
        for i in range(2):
            step = 1e-5 * torch.eye(2, dtype=D)[i]
            ends = []
            for at in (x + step, x - step):
                ends.append(mu(at, path(problem, at if moving else x, y0, batches, bl.SGD(0.2), 7)[-1]))
            columns.append((ends[0] - ends[1]) / 2e-5)
        return torch.stack(columns)

    torch.testing.assert_close(hg.grad, differences(moving=False), rtol=1e-8, atol=1e-10)
    assert (hg.grad - differences(moving=True)).norm() > 0.1 * hg.grad.norm()


# Optimism


@dataclasses.dataclass(frozen=True, eq=False)
class Hinted(Target):
    """z = y - [alpha_next hint_next + alpha (df/dy - hint)], all guesses of df/dy."""

    alpha: float
    alpha_next: float
    hint: torch.Tensor
    hint_next: torch.Tensor

    def point(self, ahead):
        gradient = ahead.outer_gradient()
        return ahead.inner - (self.alpha_next * self.hint_next + self.alpha * (gradient - self.hint))


def test_a_target_with_a_guess_of_the_next_gradient_is_the_optimistic_step():
    """papers.md 5.2 E: D'(y - z) is the increment alpha g + alpha_next hint_next - alpha hint of algorithm C."""
    generator = torch.Generator().manual_seed(0)
    d, hint, hint_next = (torch.randn(*s, generator=generator, dtype=D) for s in ((4, 3), (4,), (4,)))
    before = torch.randn(4, generator=generator, dtype=D)
    problem = bl.Problem(lambda y, w, b: -y @ (d @ w), lambda y, w, b: y.cosh().sum())  # one step of 1 adds phi = D w
    w = torch.randn(3, generator=generator, dtype=D)
    target = Hinted(3.0, 4.0, hint, hint_next)
    hg = found(problem, w, before, bl.Batches(None, None), bl.SGD(1.0), 1, target)
    gradient = (before + d @ w).sinh()
    expected = 3.0 * (d.mT @ gradient) + 4.0 * (d.mT @ hint_next) - 3.0 * (d.mT @ hint)
    torch.testing.assert_close(hg.grad, expected, rtol=1e-13, atol=1e-14)
    # in mirror coordinates: grad h(z) = grad h(y) - v, for h = sum exp
    v = torch.tensor([0.1, -0.2, 0.05, 0.0], dtype=D)
    mirrored = found(problem, w, before, bl.Batches(None, None), bl.SGD(1.0), 1, _Mirrored(v), Bregman(_sum_exp))
    torch.testing.assert_close(mirrored.grad, d.mT @ v, rtol=1e-12, atol=1e-14)


def _sum_exp(y):
    return y.exp().sum()


@dataclasses.dataclass(frozen=True, eq=False)
class _Mirrored(Target):
    shift: torch.Tensor

    def point(self, ahead):
        return (ahead.inner.exp() - self.shift).log()


def test_a_small_step_gains_what_the_theorem_says():
    """papers.md 5.5, Theorem 1 type (recalled): with z = y - a G g, a step of b along the gradient of |z - y|^2 / 2
    lowers f by b / a |z - y|^2, to first order."""
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(4, 3, generator=generator, dtype=D)
    problem = bl.Problem(lambda y, w, b: -y @ (d @ w), lambda y, w, b: ((y - 1) ** 2).sum())
    w, y0 = torch.randn(3, generator=generator, dtype=D), torch.zeros(4, dtype=D)
    a, b = 1e-3, 1e-6
    gradient = 2 * (d @ w - 1)
    z = d @ w - a * (d @ (d.mT @ gradient))
    hg = found(problem, w, y0, bl.Batches(None, None), bl.SGD(1.0), 1, _Fixed(z))
    moved = w - b * hg.grad
    change = problem.outer_loss(d @ moved, None, None) - problem.outer_loss(d @ w, None, None)
    predicted = -b / a * (z - d @ w).square().sum()
    assert change.item() == pytest.approx(predicted.item(), rel=1e-3)


@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed(Target):
    z: torch.Tensor

    def point(self, ahead):
        return self.z


# With the rest of the library


def tasks(count=3):
    """MAML on vectors: x is the start, tasks differ by their targets."""
    generator = torch.Generator().manual_seed(2)
    scales, ends = (torch.rand(count, 4, generator=generator, dtype=D) + 0.5 for _ in range(2))
    problem = bl.Problem(
        lambda y, x, b: (b[0] * (y["v"] - b[1]) ** 2).sum(),
        lambda y, x, b: ((y["v"] - b[1]) ** 4).sum(),
        init=lambda x, b: {"v": x},
    )
    return problem, torch.zeros(4, dtype=D), [(scales[i], ends[i]) for i in range(count)]


@pytest.mark.parametrize("matching", [SquaredDistance(), Bregman(potential), KL(lambda y, x, b: y["v"] * b[0])])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_mean_over_tasks_is_the_mean_of_single_tasks(chunk, matching):
    problem, x, each = tasks()
    estimator = bl.Bootstrapped(bl.Unrolled(), OneStep(bl.Adam(0.1), after=2), matching)
    solver = bl.Descent(bl.SGD(0.05, momentum=0.5), 3)
    single = [bl.hypergradient(problem, x, None, bl.Batches(b, b), solver=solver, estimator=estimator) for b in each]
    together = tuple(torch.stack(leaves) for leaves in zip(*each, strict=True))
    hg = bl.hypergradient(
        problem, x, None, bl.Batches(together, together), solver=solver, estimator=bl.TaskMean(estimator, chunk)
    )
    torch.testing.assert_close(hg.grad, torch.stack([s.grad for s in single]).mean(0), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(hg.outer_loss, torch.stack([s.outer_loss for s in single]).mean())
    losses = torch.stack([s.stats["matching_loss"] for s in single])
    torch.testing.assert_close(hg.stats["matching_loss"], losses, rtol=1e-9, atol=1e-14)


@dataclasses.dataclass(frozen=True)
class UnitStep(bl.Optimizer):
    """A step of length one: its norm is over all of y."""

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        norm = flat(grad).norm()
        return pytree.tree_map(lambda y, g: y - g / norm, inner, grad), state


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_an_optimizer_of_ones_own_in_a_target_does_not_mix_tasks(chunk):
    problem, x, each = tasks()
    estimator = bl.Bootstrapped(bl.Unrolled(), OneStep(UnitStep()))
    solver = bl.Descent(bl.SGD(0.05), 3)
    single = [
        bl.hypergradient(problem, x, None, bl.Batches(b, b), solver=solver, estimator=estimator).grad for b in each
    ]
    together = tuple(torch.stack(leaves) for leaves in zip(*each, strict=True))
    hg = bl.hypergradient(
        problem, x, None, bl.Batches(together, together), solver=solver, estimator=bl.TaskMean(estimator, chunk)
    )
    torch.testing.assert_close(hg.grad, torch.stack(single).mean(0), rtol=1e-12, atol=1e-14)


def test_every_further_step_sees_its_own_batch_and_too_few_are_refused():
    problem = bl.Problem(lambda y, x, b: (b * (y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    x, y0 = torch.tensor([1.0, 2.0], dtype=D), torch.zeros(2, dtype=D)
    steps = [torch.tensor([0.1 * k + 0.1, 0.3], dtype=D) for k in range(7)]
    batches = bl.Batches(bl.PerStep(steps), None)
    z = path(problem, x, y0, batches, bl.SGD(0.3), 7)[-1]
    expected = by_hand(problem, x, y0, batches, bl.SGD(0.3), 4, z, half_square)
    hg = found(problem, x, y0, batches, bl.SGD(0.3), 4, FurtherSteps(3))
    torch.testing.assert_close(hg.grad, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="PerStep holds 7 batches; the inner solver takes 4 steps and the target of"):
        found(problem, x, y0, batches, bl.SGD(0.3), 4, FurtherSteps(4))


def test_a_loop_that_stops_by_itself_goes_on_from_where_it_stopped():
    problem, x, inner, batches = catalogue.meta_start()
    solver = bl.Converge(bl.SGD(0.5), tol=1e-2, max_steps=500)
    estimator = bl.Bootstrapped(bl.Unrolled(), FurtherSteps(5))
    hg = bl.hypergradient(problem, x, inner, batches, solver=solver, estimator=estimator)
    fixed = found(problem, x, inner, batches, bl.SGD(0.5), hg.stats["inner_steps"], FurtherSteps(5))
    torch.testing.assert_close(flat(hg.grad), flat(fixed.grad), rtol=1e-11, atol=1e-14)


def test_features_run_for_the_matching_too():
    """A head on an extractor: predictions are compared, and x acts through y_K and directly through f."""
    generator = torch.Generator().manual_seed(3)
    inputs, labels = torch.randn(12, 5, generator=generator, dtype=D), torch.randint(0, 3, (12,), generator=generator)
    x, y0 = (torch.randn(*s, generator=generator, dtype=D) for s in ((5, 4), (4, 3)))

    def embed(x, b):
        return torch.tanh(b[0] @ x), b[1]

    def head_loss(y, x, b):
        return torch.nn.functional.cross_entropy(b[0] @ y, b[1])

    batches = bl.Batches((inputs[:6], labels[:6]), (inputs[6:], labels[6:]))
    split = bl.Problem(head_loss, head_loss, features=embed)
    whole = bl.Problem(*[lambda y, x, b: head_loss(y, x, embed(x, b))] * 2)
    a = found(split, x, y0, batches, bl.SGD(0.3), 4, FurtherSteps(3), KL(lambda y, x, b: b[0] @ y))
    b = found(whole, x, y0, batches, bl.SGD(0.3), 4, FurtherSteps(3), KL(lambda y, x, b: embed(x, b)[0] @ y))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)


def test_random_numbers_of_the_target_are_those_of_the_program():
    """With dropout, a gradient step is still exactly the plain hypergradient: z lies ahead of the very same y_K."""
    p, x, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(lambda y, x, b: p.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])), p.outer_loss)
    grads = []
    for estimator in (bl.Unrolled(), bl.Bootstrapped(bl.Unrolled(), OneStep(bl.SGD(1.0)))):
        torch.manual_seed(4)
        grads.append(flat(found_plain(noisy, x, inner, batches, estimator).grad))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


@pytest.mark.parametrize("base", [bl.Implicit(bl.CG(60, tol=1e-13)), bl.FirstOrderCorrected(), bl.MemoryReduced(60)])
def test_estimators_at_the_solution_follow_a_target_too(base):
    """At y*, the gradient of 1/2 |z - y*(x)|^2 is C' H^-1 (y* - z)."""
    q = quadratic.scalar()
    problem = bl.Problem(quadratic.inner_loss, quadratic.outer_loss)
    batches = bl.Batches((q.hessian, q.coupling), (q.target, q.penalty))
    estimator = bl.Bootstrapped(base, OneStep(bl.SGD(0.1)))
    solver = bl.Descent(bl.SGD(0.25), 60)
    hg = bl.hypergradient(problem, q.outer, torch.zeros(1, dtype=D), batches, solver=solver, estimator=estimator)
    assert hg.status is bl.Status.OK
    torch.testing.assert_close(hg.grad, 0.1 * q.hypergradient(q.outer), rtol=1e-6, atol=0)


def test_first_order_and_zero_steps():
    problem, x, each = tasks(1)
    batches = bl.Batches(each[0], each[0])
    arguments = problem, x, None, batches
    for base, steps in ((bl.FirstOrder(), 3), (bl.Unrolled(), 0)):
        estimator = bl.Bootstrapped(base, OneStep(bl.SGD(1.0)))
        plain, aimed = (
            bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.05), steps), estimator=e) for e in (base, estimator)
        )
        torch.testing.assert_close(plain.grad, aimed.grad, rtol=1e-14, atol=1e-15)


def test_carried_inner_variables_go_on_from_the_last_step_and_not_from_the_target():
    problem = bl.Problem(lambda y, x, b: ((y - 3) ** 2).sum(), lambda y, x, b: ((y - 3) ** 2).sum())
    x = torch.tensor([-3.0], dtype=D, requires_grad=True)
    loop = bl.iterate(
        problem,
        {"log_lr": x},
        torch.zeros(1, dtype=D),
        [bl.Batches(None, None)] * 2,
        solver=bl.Descent(bl.SGD(lr=lambda outer: outer["log_lr"].exp()), 1),
        estimator=bl.Bootstrapped(bl.Unrolled(), FurtherSteps(5)),
        optimizer=torch.optim.SGD([x], lr=1.0),
    )
    before = x.item()
    first = next(loop)
    assert x.item() > before  # the target is nearer to 3: longer steps
    second = next(loop)
    rate = 2 * torch.exp(torch.tensor(before, dtype=D))
    assert first.hypergradient.inner.item() == pytest.approx(3 * rate.item(), rel=1e-12)
    assert second.hypergradient.inner.item() > first.hypergradient.inner.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_target_that_is_not_finite_is_reported(dtype):
    problem = bl.Problem(lambda y, x, b: (y * x).sum(), lambda y, x, b: (y**2).sum())
    x, y0 = torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)
    hg = found(problem, x, y0, bl.Batches(None, None), bl.SGD(0.1), 1, _Fixed(torch.tensor([1.0, float("inf")])))
    assert hg.status.failed
    assert hg.grad.dtype == dtype
    kl = KL(lambda y, x, b: torch.zeros(2, dtype=dtype) + 0 * y)
    hidden = found(problem, x, y0, bl.Batches(None, None), bl.SGD(0.1), 1, _Fixed(torch.full((2,), torch.nan)), kl)
    assert hidden.status.failed


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FurtherSteps(0), ValueError, "FurtherSteps was given steps=0; an integer of at least 1"),
        (lambda: FurtherSteps(True), ValueError, "steps=True"),
        (lambda: OneStep(torch.optim.SGD), TypeError, "an inner optimizer such as bilevel.SGD"),
        (lambda: OneStep(bl.SGD(0.1), of="both"), ValueError, "of='both'; one of 'outer', 'inner'"),
        (lambda: OneStep(bl.SGD(0.1), after=-1), ValueError, "after=-1; an integer of at least 0"),
        (lambda: SquaredDistance(0.0), ValueError, r"scale=0\.0; a positive number"),
        (lambda: KL(None), TypeError, "a function \\(inner, outer, batch\\) -> logits"),
        (lambda: KL(predict, "first"), ValueError, "first='first'; one of 'target', 'inner'"),
        (lambda: KL(predict, temperature=-1.0), ValueError, r"temperature=-1\.0"),
        (lambda: Bregman(2.0), TypeError, r"Bregman was given 2\.0; a function of the inner variable"),
        (lambda: bl.Bootstrapped(bl.Unrolled(), FurtherSteps), TypeError, "the class FurtherSteps as target"),
        (lambda: bl.Bootstrapped(FurtherSteps(1), bl.Unrolled()), TypeError, "a FurtherSteps as estimator"),
        (
            lambda: bl.Bootstrapped(bl.TaskMean(bl.Unrolled()), FurtherSteps(1)),
            TypeError,
            r"TaskMean\(Bootstrapped\(estimator, target\)\)",
        ),
        (lambda: bl.Bootstrapped(bl.Unrolled(), FurtherSteps(1), kl), TypeError, "a function as matching"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@dataclasses.dataclass(frozen=True)
class Several(Matching):
    def distance(self, target, inner, outer, batch):
        return inner - target.inner


def test_a_target_of_another_shape_and_an_estimator_with_a_state_are_refused():
    problem, outer, inner, batches = quadratic.setup()
    with pytest.raises(ValueError, match=r"_Fixed.point\(\) returned tensors of shapes \[\(2,\)\]; a tree like the"):
        found(problem, outer, inner, batches, bl.SGD(0.1), 2, _Fixed(torch.zeros(2, dtype=D)))
    with pytest.raises(ValueError, match="carries a state from call to call"):
        found(
            problem, outer, inner, batches, bl.SGD(0.1), 2, FurtherSteps(1), base=bl.MemoryReduced(5, warm_inner=True)
        )
    for matching, message in (
        (Bregman(lambda y: y**2), r"the potential of Bregman returned a tensor of shape \(6,\); a floating 0-dim"),
        (Several(), r"Several.distance\(\) returned a tensor of shape \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            found(problem, outer, inner, batches, bl.SGD(0.1), 2, FurtherSteps(1), matching)
    with pytest.raises(ValueError, match="KL's predict returned a tensor of shape \\(\\)"):
        found(problem, outer, inner, batches, bl.SGD(0.1), 2, FurtherSteps(1), KL(lambda y, x, b: y.sum()))


@dataclasses.dataclass(frozen=True)
class InPlace(Target):
    def point(self, ahead):
        return ahead.inner.mul_(2)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_target_that_changes_what_it_is_given_is_refused(steps):
    problem, outer, inner, batches = quadratic.setup()
    with pytest.raises(ValueError, match=r"InPlace.point\(\) changed its arguments in place"):
        found(problem, outer, inner, batches, bl.SGD(0.1), steps, InPlace())


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_learner_takes_it(chunk):
    """One argument of the Learner: a gradient step as target is MAML."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    support, query = (
        (torch.randn(3, n, 4, generator=generator, dtype=D), torch.randint(0, 3, (3, n), generator=generator))
        for n in (5, 6)
    )
    grads = []
    for estimator in (bl.Unrolled(), bl.Bootstrapped(bl.Unrolled(), OneStep(bl.SGD(lr=1.0)))):
        learner = bl.meta.Learner(
            net,
            torch.nn.functional.cross_entropy,
            solver=bl.Descent(bl.SGD(lr=0.1), 3),
            estimator=estimator,
            chunk=chunk,
        )
        grads.append(flat(learner.hypergradient(learner.outer(), bl.Batches(support, query)).grad))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-15)


def test_a_path_that_its_estimator_does_not_see_is_refused():
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    x, y = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
    with pytest.raises(ValueError, match="cannot see how the outer variable acts"):
        found(problem, x, y, bl.Batches(None, None), bl.SGD(0.1), 2, FurtherSteps(1), base=bl.FirstOrder())


@pytest.mark.parametrize(
    ("base", "target"), [(bl.Unrolled("iterates"), "program"), (bl.Implicit(bl.CG(60, tol=1e-13)), "solution")]
)
def test_a_gradient_step_as_target_passes_the_checks_of_its_estimator(base, target):
    """papers.md 5.4 d, on all problems of check_estimator: tasks, batches per step, random numbers, trees, paths."""
    check_estimator(bl.Bootstrapped(base, OneStep(bl.SGD(lr=2.0)), SquaredDistance(0.25)), target=target)


def test_it_says_what_it_returns():
    estimator = bl.Bootstrapped(bl.Unrolled(last=2), FurtherSteps(1))
    assert "the matching loss" in estimator.bias
    assert "truncated to the last 2 steps" in estimator.bias
    assert estimator.sees_after(5) == bl.Unrolled(last=2).sees_after(5)
    assert estimator.memory_growth == "constant"
