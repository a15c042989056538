"""Adaptation in function space: papers.md 4.5 and methods.md A5, then kernels and heads as a stranger meets them."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.meta import NTK, RBF, Cosine, Embedded, FeatureKernel, GradientFlow, KernelRidge, Linear, Sum
from bilevel.meta.gradient_flow import flowed
from bilevel.meta.kernels import ExplicitKernel
from bilevel.meta.solving import cholesky

D = torch.float64


def draw(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def given(z):
    """Embeddings as they are, without a module."""
    return Embedded(lambda parameters, inputs: inputs, {}, z)


def embedded(module, inputs):
    call, parameters = bl.functional(module, trainable=True)
    return Embedded(call, parameters, inputs)


def net(outputs=2, width=4, seed=0, dtype=D):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def fitted_values(head, support, targets, query, variables=None):
    variables = {} if variables is None else variables
    return head.predict(head.fit(support, targets, variables), query, variables)


# --- papers.md 4.5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_papers_4_5_a_the_linear_kernels_dual_is_primal_ridge(shape):
    """papers.md 4.5 a: k(x, Z)(K + lam I)^-1 Y = x (Z'Z + lam I)^-1 Z'Y, to 9e-15 there."""
    z, y, q, lam = draw(*shape), draw(shape[0], 2, seed=1), draw(5, shape[1], seed=2), 0.3
    ridge = q @ torch.linalg.solve(z.mT @ z + lam * torch.eye(shape[1], dtype=D), z.mT @ y)
    for primal in (None, True, False):
        found = fitted_values(KernelRidge(Linear(), lam, primal=primal), given(z), y, given(q))
        assert float((found - ridge).abs().max()) < 2e-14


@dataclasses.dataclass(frozen=True)
class Quadratic(FeatureKernel):
    """A user's own."""

    def between(self, a, b, variables):
        return (a @ b.mT + 1) ** 2


def test_papers_4_5_b_functional_gradient_descent_ends_at_the_closed_form():
    """papers.md 4.5 b: a <- a - rate (K a - Y + lam a) is descent in the function space; 3e-15 there."""
    z, y, lam = draw(5, 2), draw(5, 1, seed=1), 0.5
    for kernel in (RBF(0.7), Cosine(), Quadratic()):
        gram = kernel.gram(given(z), {})
        a = torch.zeros_like(y)
        for _ in range(4000):
            a = a - (gram @ a - y + lam * a) / (torch.linalg.matrix_norm(gram, 2) + lam)
        found = fitted_values(KernelRidge(kernel, lam), given(z), y, given(z))
        torch.testing.assert_close(found, gram @ a, rtol=1e-13, atol=1e-13)


def test_papers_4_5_c_a_large_regularizer_returns_the_prior_and_a_small_one_interpolates():
    """papers.md 4.5 c."""
    z, y, q = draw(5, 3), draw(5, 2, seed=1), draw(4, 3, seed=2)
    prior = nn.Linear(3, 2).double()
    head = KernelRidge(RBF(), 1e12, prior=prior)
    variables = head.variables(torch.zeros((), dtype=D))
    assert set(variables) == {"prior.weight", "prior.bias"}
    torch.testing.assert_close(
        fitted_values(head, given(z), y, given(q), variables), prior(q).detach(), rtol=0, atol=1e-11
    )
    head = KernelRidge(RBF(), 1e-12, prior=prior)
    torch.testing.assert_close(fitted_values(head, given(z), y, given(z), variables), y, rtol=0, atol=1e-10)


def test_papers_4_5_d_two_points_and_a_gaussian_kernel():
    """papers.md 4.5 d: coefficients +-1 / (1 + lam - k) for y = (1, -1)."""
    z, y, lam, gamma = torch.tensor([[0.0], [1.0]], dtype=D), torch.tensor([1.0, -1.0], dtype=D), 0.2, 0.7
    carried = KernelRidge(RBF(gamma), lam).fit(given(z), y, {})
    expected = 1 / (1 + lam - math.exp(-gamma))
    torch.testing.assert_close(carried["coefficients"], expected * y, rtol=1e-15, atol=0)


def test_papers_4_5_e_the_gradient_flow_is_the_limit_of_euler_steps():
    """papers.md 4.5 e: 1.4e-5 at step 1e-4 there; the error is of the order of the step."""
    z, y, time = draw(4, 2), draw(4, seed=1), 1.0
    gram = RBF(0.5).gram(given(z), {})
    errors = []
    for step in (1e-3, 1e-4):
        a = torch.zeros_like(y)
        for _ in range(round(time / step)):
            a = a + step * (y - gram @ a)
        found = GradientFlow(RBF(0.5), time).fit(given(z), y, {})["coefficients"]
        errors.append(float((found - a).abs().max()))
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.01)


# --- methods.md A5

X, Y = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=D), torch.tensor([1.0, 0.0], dtype=D)


@pytest.mark.parametrize(
    ("time", "theta"), [(0.5, (0.327545, -0.078867)), (1.0, (0.485963, -0.213354)), (math.inf, (1.0, -1.0))]
)
def test_methods_a5_meta_rkhs_two_on_a_linear_function(time, theta):
    """methods.md A5: f = theta . x from theta = 0, as a linear kernel and as the tangent kernel of a linear module."""
    theta = torch.tensor(theta, dtype=D)
    weights = GradientFlow(Linear(), time).fit(given(X), Y, {})["weights"]
    torch.testing.assert_close(weights, theta, rtol=0, atol=5e-7)

    module = nn.Linear(2, 1, bias=False).double()
    call, parameters = bl.functional(module)
    parameters = {"weight": torch.zeros_like(parameters["weight"])}
    head = GradientFlow(NTK(), time, prior=nn.Identity())
    moved = head.fit(Embedded(call, parameters, X), Y[:, None], {})
    torch.testing.assert_close(moved["weight"], theta[None], rtol=0, atol=5e-7)
    query = draw(3, 2)
    torch.testing.assert_close(
        head.predict(moved, Embedded(call, parameters, query), {}), query @ theta[:, None], rtol=0, atol=5e-6
    )


def test_methods_a5_the_formula_of_meta_rkhs_two():
    """methods.md A5: f_t = f + K(x, X) Kn^-1 (exp(-t Kn) - I)(f(X) - Y) and f_inf, for a net and its full kernel."""
    module, x, q, y = net(), draw(3, 3), draw(4, 3, seed=1), draw(3, 2, seed=2)
    support, query = embedded(module, x), embedded(module, q)
    rows = [torch.func.jacrev(lambda p, e=e: e.call(p, e.inputs))(e.parameters) for e in (support, query)]
    jx, jq = (torch.cat([leaf.flatten(2) for leaf in j.values()], 2).flatten(0, 1) for j in rows)
    gram, residual = jx @ jx.mT, (support.values - y).reshape(-1)
    for time in (0.1, 1.0, 10.0, math.inf):
        decay = torch.zeros_like(gram) if math.isinf(time) else torch.matrix_exp(-time * gram)
        step = jq @ jx.mT @ torch.linalg.solve(gram, (decay - torch.eye(6, dtype=D)) @ residual)
        found = fitted_values(GradientFlow(NTK(), time, prior=nn.Identity()), support, y, query)
        torch.testing.assert_close(found, query.values + step.reshape(4, 2), rtol=1e-9, atol=1e-10)


def test_methods_a5_the_infinite_time_with_a_regularizer_is_kernel_ridge():
    z, y, q = draw(5, 3), draw(5, 2, seed=1), draw(2, 3, seed=2)
    flow, ridge = GradientFlow(RBF(), regularizer=0.3), KernelRidge(RBF(), 0.3)
    late = GradientFlow(RBF(), 200.0, regularizer=0.3)
    expected = fitted_values(ridge, given(z), y, given(q))
    torch.testing.assert_close(fitted_values(flow, given(z), y, given(q)), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(fitted_values(late, given(z), y, given(q)), expected, rtol=1e-12, atol=1e-13)


def test_methods_a5_meta_rkhs_one():
    """methods.md A5: L = (x - a)^2 / 2, a = +-1: (1 - 2 alpha) x, against (1 - alpha)^2 x of MAML; .8 and .81."""
    a, x = torch.tensor([1.0, -1.0], dtype=D), torch.tensor(1.0, dtype=D)

    def loss(y, b):
        return (y - b) ** 2 / 2

    maml = bl.Problem(lambda y, x, b: loss(y, b), lambda y, x, b: loss(y, b), init=lambda x, b: x)
    for problem, steps, expected in ((bl.meta.gradient_penalty(loss, 0.1), 0, 0.8), (maml, 1, 0.81)):
        for estimator in (bl.Unrolled(), bl.FirstOrder()) if not steps else (bl.Unrolled(),):
            for chunk in (None, 1):
                found = bl.hypergradient(
                    problem,
                    x,
                    None,
                    bl.Batches(a, a),
                    solver=bl.Descent(bl.SGD(0.1), steps),
                    estimator=bl.TaskMean(estimator, chunk),
                )
                assert float(found.grad) == pytest.approx(expected, abs=1e-15)
                assert found.status is bl.Status.OK


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("chunk", [None, 1])
def test_meta_rkhs_one_is_the_gradient_less_two_alpha_hessian_gradient(norm, chunk):
    """Also with normalization layers under vmap, where torch 2.13 alone gives a wrong second derivative."""
    torch.manual_seed(0)
    layer = [] if norm is None else [norm(4, **({"track_running_stats": False} if norm is nn.BatchNorm1d else {}))]
    module = nn.Sequential(nn.Linear(3, 4), *layer, nn.Tanh(), nn.Linear(4, 1)).double()
    call, x = bl.functional(module)
    inputs, targets, alpha = draw(2, 5, 3), draw(2, 5, 1, seed=1), 0.05

    def loss(p, batch):
        return (call(p, batch[0]) - batch[1]).square().mean()

    expected = {name: torch.zeros_like(leaf) for name, leaf in x.items()}
    for batch in zip(inputs, targets, strict=True):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in x.items()}
        slope = torch.autograd.grad(loss(leaves, batch), list(leaves.values()), create_graph=True)
        bent = torch.autograd.grad(slope, list(leaves.values()), [s.detach() for s in slope])
        for name, s, h in zip(x, slope, bent, strict=True):
            expected[name] += (s.detach() - 2 * alpha * h) / 2
    found = bl.hypergradient(
        bl.meta.gradient_penalty(loss, alpha),
        x,
        None,
        bl.Batches([inputs, targets], [inputs, targets]),
        solver=bl.Descent(bl.SGD(0.1), 0),
        estimator=bl.TaskMean(bl.Unrolled(), chunk),
    )
    for name in x:
        torch.testing.assert_close(found.grad[name], expected[name], rtol=1e-9, atol=1e-12)


def test_meta_rkhs_one_refuses_what_it_cannot_use():
    for alpha in (-0.1, math.inf, math.nan, True, "0.1"):
        with pytest.raises(ValueError, match="alpha="):
            bl.meta.gradient_penalty(lambda y, b: y, alpha)
    with pytest.raises(TypeError, match="a function"):
        bl.meta.gradient_penalty(3.0, 0.1)
    problem = bl.meta.gradient_penalty(lambda y, b: y**2, 0.1)
    with pytest.raises(ValueError, match="0-dim"):
        problem.outer_loss(torch.ones(2), torch.ones(2), None)


# --- gradients


HEADS = {
    "linear": KernelRidge(Linear(bias=True), 0.3, learn_regularizer=True, learn_scale=True, scale=2.0),
    "linear primal": KernelRidge(Linear(), 0.3, primal=True, learn_regularizer=True),
    "linear dual": KernelRidge(Linear(), 0.3, primal=False, jitter=0.01, mean=True),
    "rbf": KernelRidge(RBF(0.4, learn=True), 0.3, learn_regularizer=True),
    "rbf 1/d": KernelRidge(RBF(learn=True), 0.3),
    "cosine": KernelRidge(Cosine(), 0.3),
    "own": KernelRidge(Quadratic(), 0.3),
    "sum": KernelRidge(Sum([Linear(), RBF(learn=True), Cosine()], [1.0, 0.5, 2.0], learn=True), 0.3),
    "cg": KernelRidge(RBF(), 0.3, solver=bl.CG(40, tol=1e-13)),
    "ntk": KernelRidge(NTK(), 0.3, prior=nn.Identity()),
    "ntk over": KernelRidge(NTK(over="2"), 0.3, prior=nn.Identity()),
    "ntk and rbf": KernelRidge(Sum([NTK(), RBF()], learn=True), 0.3, prior=nn.Identity()),
    "flow": GradientFlow(RBF(), 1.5, learn_scale=True),
    "flow linear": GradientFlow(Linear(), 1.5, regularizer=0.1),
    "flow ntk": GradientFlow(NTK(), 0.7, prior=nn.Identity()),
    "flow to the end": GradientFlow(RBF()),
    "prior net": KernelRidge(RBF(), 0.3, prior=nn.Linear(2, 2).double()),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_of_every_head_is_that_of_finite_differences(name):
    """In float64, in the module's parameters and in the head's own variables, through fit and predict."""
    head, module = HEADS[name], net()
    call, parameters = bl.functional(module)
    x, q, y = draw(4, 3), draw(3, 3, seed=1), draw(4, 2, seed=2)
    variables = head.variables(torch.zeros((), dtype=D))
    names, own = list(parameters), list(variables)

    def program(*leaves):
        p, v = dict(zip(names, leaves[: len(names)], strict=True)), dict(zip(own, leaves[len(names) :], strict=True))
        fitted = head.fit(Embedded(call, p, x), y, v)
        return head.predict(fitted, Embedded(call, p, q), v)

    leaves = [leaf.detach().requires_grad_() for leaf in (*parameters.values(), *variables.values())]
    assert torch.autograd.gradcheck(program, leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_through_hypergradient_is_the_program_written_out(name, steps):
    """Unrolled through the Learner, for all tasks at once and one by one, on a module of float64."""
    head, module = HEADS[name], net()
    x, y = draw(3, 5, 3), draw(3, 5, 2, seed=2)
    batches = bl.Batches(inner=(x[:, :3], y[:, :3]), outer=(x[:, 3:], y[:, 3:]))
    # (Without a regularizer the points' curvature is large: longer steps magnify rounding errors.)
    lr = 1e-7 if name == "flow to the end" else 0.01
    solver, grads = bl.Descent(bl.SGD(lr), steps), []
    for chunk in (None, 1, 2):
        learner = bl.meta.Learner(module, nn.functional.mse_loss, adapts=head, solver=solver, chunk=chunk)
        outer = learner.outer()
        found = learner.hypergradient(outer, batches)
        # (Steps from where the closed form has rested may raise the loss.)
        assert not found.status.failed if steps else found.status is bl.Status.OK
        grads.append(found.grad)
    call, _ = bl.functional(module)
    own = {group: {k: v.detach().requires_grad_() for k, v in leaves.items()} for group, leaves in outer.items()}
    total = 0.0
    for task in range(3):
        support = Embedded(call, own["parameters"], x[task, :3])
        variables = own.get("head", {})
        fitted = head.fit(support, y[task, :3], variables)
        leaves, spec = torch.utils._pytree.tree_flatten(fitted)
        leaves = [leaf.view_as(leaf) for leaf in leaves]  # what is carried may be the embeddings themselves
        for _ in range(steps):
            loss = nn.functional.mse_loss(head.predict(spec.unflatten(leaves), support, variables), y[task, :3])
            slope = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            leaves = [a if s is None else a - lr * s for a, s in zip(leaves, slope, strict=True)]
        query = Embedded(call, own["parameters"], x[task, 3:])
        total = total + nn.functional.mse_loss(head.predict(spec.unflatten(leaves), query, variables), y[task, 3:]) / 3
    flat = [leaf for leaves in own.values() for leaf in leaves.values()]
    expected = torch.autograd.grad(total, flat, allow_unused=True)
    for grad in grads:
        ours = [leaf for leaves in grad.values() for leaf in leaves.values()]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-7, atol=1e-9)


def test_first_order_is_exact_for_a_head_and_blind_estimators_are_refused():
    module, head = net(), KernelRidge(RBF(), 0.3)
    x, y = draw(3, 5, 3), draw(3, 5, 2, seed=2)
    batches = bl.Batches(inner=(x[:, :3], y[:, :3]), outer=(x[:, 3:], y[:, 3:]))
    grads = []
    for estimator in (bl.Unrolled(), bl.FirstOrder(), bl.Unrolled("iterates")):
        learner = bl.meta.Learner(module, nn.functional.mse_loss, adapts=head, estimator=estimator)
        grads.append(learner.hypergradient(learner.outer(), batches).grad["parameters"])
    for grad in grads[1:]:
        for name in grad:
            torch.testing.assert_close(grad[name], grads[0][name], rtol=1e-12, atol=1e-14)
    for estimator in (bl.Implicit(bl.CG(5)), bl.FirstOrderCorrected(), bl.MemoryReduced()):
        with pytest.raises(ValueError, match="start"):
            bl.meta.Learner(module, nn.functional.mse_loss, adapts=head, estimator=estimator)


@pytest.mark.parametrize("time", [0.3, 4.0])
def test_the_flow_has_the_right_derivative_at_repeated_and_zero_eigenvalues(time):
    """Duplicate points (a zero eigenvalue) and orthonormal ones (all eigenvalues the same)."""
    y = draw(4, seed=1)
    for z in (torch.stack([draw(2), draw(2), draw(2), draw(2, seed=3)]), torch.eye(4, dtype=D)):

        def program(z):
            return GradientFlow(Linear(), time, prior=None).fit(given(z), y, {})["weights"]

        assert torch.autograd.gradcheck(program, z.clone().requires_grad_(), atol=1e-7)
        weights = program(z)
        eigenvalues, vectors = torch.linalg.eigh(z @ z.mT)
        filtered = torch.where(
            eigenvalues > 1e-10, (1 - torch.exp(-time * eigenvalues)) / eigenvalues.clamp_min(1e-10), time
        )
        torch.testing.assert_close(weights, z.mT @ (vectors * filtered) @ vectors.mT @ y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("time", [1e-8, 1e-3, 1.0, 1e3, 1e6, 1e9])
def test_the_flow_holds_its_accuracy_over_times(time):
    """Documented: to about 1e-16 t |K|, relative."""
    spectrum = torch.tensor([3.0, 1.0, 1e-2, 1e-4, 0.0], dtype=D)
    basis = torch.linalg.qr(draw(5, 5))[0]
    right = draw(5, 2, seed=1)
    filtered = torch.where(spectrum > 0, -torch.expm1(-time * spectrum) / spectrum.clamp_min(1e-9), time)
    expected = (basis * filtered) @ basis.mT @ right
    found = flowed((basis * spectrum) @ basis.mT, right, time)
    assert float((found - expected).norm() / expected.norm()) < 1e-13 + 3e-16 * time * 10


# --- kernels


def test_the_median_heuristic_is_of_the_support_and_has_no_derivative():
    z, q = draw(5, 3), draw(2, 3, seed=1)
    pairs = sorted(float((z[i] - z[j]).square().sum()) for i in range(5) for j in range(i))
    median = pairs[(len(pairs) - 1) // 2]
    expected = torch.exp(-torch.cdist(q, z).square() / median)
    torch.testing.assert_close(RBF("median").between(q, z, {}), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(RBF("median").between(100 * q, 100 * z, {}), expected, rtol=1e-12, atol=0)

    leaf = z.clone().requires_grad_()
    (ours,) = torch.autograd.grad(RBF("median").between(q, leaf, {}).sum(), leaf)
    (fixed,) = torch.autograd.grad(RBF(1 / median).between(q, leaf, {}).sum(), leaf)
    torch.testing.assert_close(ours, fixed, rtol=1e-12, atol=0)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda s: RBF("median").between(q, s, {}))(torch.stack([z, 2 * z]))
    torch.testing.assert_close(mapped[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kernel", "values"),
    [
        (Linear(), [[5.0, 2.0], [2.0, 1.0]]),
        (Linear(bias=True), [[6.0, 3.0], [3.0, 2.0]]),
        (Cosine(), [[1.0, 2 / 5**0.5], [2 / 5**0.5, 1.0]]),
        (RBF(), [[1.0, math.exp(-1)], [math.exp(-1), 1.0]]),
        (RBF(2.0), [[1.0, math.exp(-4)], [math.exp(-4), 1.0]]),
        (Sum([Linear(), Cosine()], [1.0, 10.0]), [[15.0, 2 + 20 / 5**0.5], [2 + 20 / 5**0.5, 11.0]]),
    ],
)
def test_the_numbers_of_each_kernel(kernel, values):
    z = torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=D)
    torch.testing.assert_close(kernel.gram(given(z), {}), torch.tensor(values, dtype=D), rtol=1e-14, atol=1e-14)
    if not isinstance(kernel, Sum):
        torch.testing.assert_close(
            kernel.gram(given(z), kernel.variables(z)), torch.tensor(values, dtype=D), rtol=1e-12, atol=0
        )


def test_learned_numbers_start_where_they_are_given():
    like, z = torch.zeros((), dtype=D), draw(3, 2)
    for value in (1e-8, 0.5, 40.0, 1e6):
        kernel = RBF(value, learn=True)
        torch.testing.assert_close(
            kernel.gram(given(z), kernel.variables(like)), RBF(value).gram(given(z), {}), rtol=1e-7, atol=1e-12
        )
    kernel = Sum([Linear(), RBF()], [0.2, 3.0], learn=True)
    assert set(kernel.variables(like)) == {"weight.0", "weight.1"}
    plain = Sum([Linear(), RBF()], [0.2, 3.0])
    torch.testing.assert_close(kernel.gram(given(z), kernel.variables(like)), plain.gram(given(z), {}))
    variables = KernelRidge(plain, learn_regularizer=True, learn_scale=True).variables(torch.zeros(()))
    assert {leaf.dtype for leaf in variables.values()} == {torch.float32}
    assert all(leaf.shape == () for leaf in variables.values())


def test_the_cosine_of_a_zero_embedding_is_zero_with_a_zero_derivative():
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-200, 0.0]], dtype=D, requires_grad=True)
    gram = Cosine().gram(given(z), {})
    torch.testing.assert_close(gram[0].detach(), torch.zeros(3, dtype=D))
    assert gram[2, 2].item() == pytest.approx(1.0)
    (slope,) = torch.autograd.grad(gram.sum(), z)
    assert bool(slope[:2].isfinite().all())
    torch.testing.assert_close(slope[0], torch.zeros(2, dtype=D))


def conv(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), norm(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2)
    ).double()


NORMS = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "batch, running": lambda: nn.BatchNorm2d(3).eval(),
    "layer": lambda: nn.LayerNorm([3, 6, 6]),
    "group": lambda: nn.GroupNorm(3, 3),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_tangent_kernel_and_its_derivative_with_each_normalization(norm):
    """Gram against jacrev, and the derivative of fit and predict against finite differences, singly and under vmap.

    torch 2.13 alone gives derivatives that are off by up to a tenth here.
    """
    module = conv(NORMS[norm])
    call, parameters = bl.functional(module, trainable=True)
    x, q, y = draw(2, 3, 1, 6, 6), draw(2, 4, 1, 6, 6, seed=1), draw(2, 3, 2, seed=2)
    rows = torch.func.jacrev(lambda p: call(p, x[0]))(parameters)
    flat = torch.cat([leaf.flatten(2) for leaf in rows.values()], 2).flatten(0, 1).detach()
    torch.testing.assert_close(
        NTK().gram(Embedded(call, parameters, x[0]), {}).detach(), flat @ flat.mT, rtol=1e-10, atol=1e-10
    )

    head = KernelRidge(NTK(), 1.0, prior=nn.Identity())

    def one(p, x, y, q):
        return head.predict(head.fit(Embedded(call, p, x), y, {}), Embedded(call, p, q), {})

    def loop(p):
        return torch.stack([one(p, *each) for each in zip(x, y, q, strict=True)]).square().sum()

    def mapped(p):
        return torch.func.vmap(lambda *each: one(p, *each))(x, y, q).square().sum()

    direction = {name: draw(*leaf.shape, seed=7) for name, leaf in parameters.items()}
    h = 1e-6
    ahead, back = (
        loop({name: leaf.detach() + sign * h * direction[name] for name, leaf in parameters.items()})
        for sign in (1, -1)
    )
    expected = float(ahead - back) / (2 * h)
    for program in (loop, mapped):
        slope = torch.autograd.grad(program(parameters), list(parameters.values()), allow_unused=True)
        found = sum(
            float((s * direction[name]).sum()) for name, s in zip(parameters, slope, strict=True) if s is not None
        )
        assert found == pytest.approx(expected, rel=1e-6)


# --- solving


def test_conjugate_gradients_give_cholesky_and_its_derivative():
    z, y = draw(30, 4), draw(30, 3, seed=1)
    results = []
    for solver in (None, bl.CG(200, tol=1e-13)):
        head, leaf = KernelRidge(RBF(), 0.1, solver=solver), z.clone().requires_grad_()
        values = fitted_values(head, given(leaf), y, given(draw(6, 4, seed=2)))
        (slope,) = torch.autograd.grad(values.square().sum(), leaf)
        results.append((values.detach(), slope))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_symmetric_solve_is_differentiable_twice_and_under_vmap():
    a = draw(2, 3, 4, 4)[0]
    a = a @ a.mT + torch.eye(4, dtype=D)
    b = draw(3, 4, 2, seed=1)

    def solve(matrix, right):
        return torch.linalg.solve(matrix, right)

    def ours(m, r):
        m = (m + m.mT) / 2
        return autodiff.symmetric_solve(m, r, solve)

    inputs = (a[0].clone().requires_grad_(), b[0].clone().requires_grad_())
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)
    mapped = torch.func.vmap(ours)(a, b)
    torch.testing.assert_close(mapped, torch.linalg.solve(a, b), rtol=1e-12, atol=1e-13)


SINGULAR = {
    "duplicates": (GradientFlow(RBF()), torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]])),
    "fewer dimensions than examples": (GradientFlow(Linear()), draw(3, 2)),
    "a regularizer below rounding": (KernelRidge(Linear(), 1e-17, primal=False), draw(3, 2)),
    "duplicates, tiny regularizer": (KernelRidge(RBF(), 1e-17), torch.ones(3, 2)),
    "all embeddings zero": (GradientFlow(Linear()), torch.zeros(3, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_kernel_matrix_is_an_error_or_a_failed_status_never_a_number(name, dtype):
    head, z = SINGULAR[name]
    z, y = z.to(dtype), draw(3, 1, seed=1).to(dtype)
    with pytest.raises(ValueError, match=r"singular to working precision[\s\S]*larger regularizer=.*jitter=1e-8"):
        head.fit(given(z), y, {})
    module = nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
    batches = bl.Batches(
        inner=(torch.stack([z, z]), torch.stack([y, y])), outer=(torch.stack([z, z]), torch.stack([y, y]))
    )
    for chunk in (None, 1):
        learner = bl.meta.Learner(module, nn.functional.mse_loss, adapts=head, chunk=chunk)
        if chunk == 1:
            with pytest.raises(ValueError, match="singular"):
                learner.hypergradient(learner.outer(), batches)
        else:
            found = learner.hypergradient(learner.outer(), batches)
            assert found.status.failed
            assert not any(bool(leaf.isfinite().all()) for leaf in torch.utils._pytree.tree_leaves(found.inner)[-1:])


def test_one_singular_task_fails_the_whole_and_names_no_other():
    """Under vmap the sound tasks keep their numbers."""
    z = torch.stack([draw(3, 3), torch.ones(3, 3, dtype=D)])
    y = draw(2, 3, 1, seed=1)
    found = torch.func.vmap(lambda z, y: GradientFlow(RBF()).fit(given(z), y, {})["coefficients"])(z, y)
    torch.testing.assert_close(found[0], GradientFlow(RBF()).fit(given(z[0]), y[0], {})["coefficients"])
    assert bool(found[1].isnan().all())


def test_jitter_makes_duplicates_solvable_and_is_reported():
    z, y = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=D), draw(3, 1, seed=1)
    head = KernelRidge(Linear(), 1e-17, primal=False, jitter=1e-6)
    values = fitted_values(head, given(z), y, given(z))
    assert float((values[:2] - y[:2].mean()).abs().max()) < 1e-4
    report = head.report(given(z), y, {})
    assert report["jitter"] == pytest.approx(1e-6 * (5 + 5 + 1) / 3)
    assert report["rank"] == 2
    assert report["condition"] > 1e5
    averaged = KernelRidge(Linear(), 0.5, mean=True).report(given(z), y, {})
    assert averaged["regularizer"] == pytest.approx(1.5)


def test_embeddings_that_are_not_finite_are_no_singular_matrix():
    """They are reported as what they are: a result that is not finite."""
    z = draw(3, 2)
    z[1, 0] = torch.nan
    for head in (KernelRidge(RBF(), 1.0), KernelRidge(Linear(), 1.0), GradientFlow(RBF(), 1.0)):
        assert all(bool(leaf.isnan().any()) for leaf in head.fit(given(z), draw(3), {}).values())
    assert bool(cholesky("KernelRidge", torch.full((2, 2), torch.nan, dtype=D), draw(2, 1)).isnan().all())


def test_conjugate_gradients_that_do_not_arrive_are_an_error():
    head = KernelRidge(RBF(), 1e-8, solver=bl.CG(2, tol=1e-12))
    with pytest.raises(ValueError, match="did not meet its tolerance"):
        head.fit(given(draw(20, 2)), draw(20, 1, seed=1), {})
    mapped = torch.func.vmap(lambda z, y: head.fit(given(z), y, {})["coefficients"])(
        draw(2, 20, 2), draw(2, 20, 1, seed=1)
    )
    assert bool(mapped.isnan().all())


# --- targets, shapes, dtypes


def test_codings_of_class_numbers():
    z, labels = draw(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    one_hot = nn.functional.one_hot(labels, 3).double()
    for coding, targets in (("one-hot", one_hot), ("signed", 2 * one_hot - 1), ("centered", one_hot - 1 / 3)):
        coded = fitted_values(KernelRidge(RBF(), 0.3, classes=3, coding=coding), given(z), labels, given(z))
        plain = fitted_values(KernelRidge(RBF(), 0.3), given(z), targets, given(z))
        torch.testing.assert_close(coded, plain, rtol=1e-13, atol=1e-14)
    scaled = fitted_values(KernelRidge(RBF(), 0.3, classes=3, scale=7.0), given(z), labels, given(z))
    plain = fitted_values(KernelRidge(RBF(), 0.3, classes=3), given(z), labels, given(z))
    torch.testing.assert_close(scaled, 7 * plain)


@pytest.mark.parametrize("kernel", [Linear(), Cosine(), RBF(), RBF("median"), Quadratic(), Sum([Linear(), RBF()])])
@pytest.mark.parametrize("head", [KernelRidge, lambda k: GradientFlow(k, 2.0)])
def test_float32_agrees_with_float64_and_keeps_its_dtype(kernel, head):
    z, y, q = draw(6, 3), draw(6, 2, seed=1), draw(4, 3, seed=2)
    wide = fitted_values(head(kernel), given(z), y, given(q))
    fitted = head(kernel).fit(given(z.float()), y.float(), {})
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(fitted)} == {torch.float32}
    narrow = head(kernel).predict(fitted, given(q.float()), {})
    assert narrow.dtype is torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [Linear(), RBF(), Cosine(), Sum([Linear(), RBF()])])
def test_targets_without_a_second_dimension_and_embeddings_with_more(kernel):
    z, y, q = draw(5, 3), draw(5, seed=1), draw(2, 3, seed=2)
    flat = fitted_values(KernelRidge(kernel), given(z), y, given(q))
    assert flat.shape == (2,)
    column = fitted_values(KernelRidge(kernel), given(z), y[:, None], given(q))
    torch.testing.assert_close(flat, column[:, 0], rtol=1e-13, atol=1e-14)
    folded = fitted_values(KernelRidge(kernel), given(z.reshape(5, 1, 3)), y, given(q.reshape(2, 1, 3)))
    torch.testing.assert_close(folded, flat, rtol=1e-13, atol=1e-14)
    single = fitted_values(KernelRidge(kernel), given(z[:1]), y[:1], given(q))
    assert single.shape == (2,)
    numbers = fitted_values(KernelRidge(kernel), given(z[:, 0]), y, given(q[:, 0]))
    torch.testing.assert_close(numbers, fitted_values(KernelRidge(kernel), given(z[:, :1]), y, given(q[:, :1])))


@dataclasses.dataclass(frozen=True)
class Tilted(FeatureKernel):
    def between(self, a, b, variables):
        return a @ b.mT + torch.arange(len(b), dtype=a.dtype)


@dataclasses.dataclass(frozen=True)
class Narrow(FeatureKernel):
    def between(self, a, b, variables):
        return (a @ b.mT).sum(0)


@dataclasses.dataclass(frozen=True)
class Indefinite(FeatureKernel):
    def between(self, a, b, variables):
        return -(a @ b.mT)


@dataclasses.dataclass(frozen=True)
class Squares(ExplicitKernel):
    def map(self, z, variables):
        return torch.cat([z, z**2], 1)


def test_own_kernels_are_right_or_refused():
    z, y, q = draw(5, 2), draw(5, 1, seed=1), draw(3, 2, seed=2)
    with pytest.raises(ValueError, match="not symmetric"):
        KernelRidge(Tilted()).fit(given(z), y, {})
    with pytest.raises(ValueError, match="square matrix"):
        KernelRidge(Narrow()).fit(given(z), y, {})
    with pytest.raises(ValueError, match="singular"):
        KernelRidge(Indefinite(), 0.1).fit(given(z), y, {})
    phi, at = torch.cat([z, z**2], 1), torch.cat([q, q**2], 1)
    expected = at @ torch.linalg.solve(phi.mT @ phi + torch.eye(4, dtype=D), phi.mT @ y)
    for primal in (True, False):
        found = fitted_values(KernelRidge(Squares(), primal=primal), given(z), y, given(q))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(TypeError, match="final"):

        class Further(RBF):
            pass


def test_what_the_constructors_refuse():
    for bad in (0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="regularizer="):
            KernelRidge(Linear(), bad)
        with pytest.raises(ValueError, match="scale="):
            KernelRidge(Linear(), scale=bad)
        with pytest.raises(ValueError, match="gamma="):
            RBF(bad)
    for bad in (0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match="time="):
            GradientFlow(Linear(), bad)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="regularizer="):
            GradientFlow(Linear(), 1.0, regularizer=bad)
        with pytest.raises(ValueError, match="jitter="):
            KernelRidge(Linear(), jitter=bad)
    with pytest.raises(TypeError, match="a kernel was needed"):
        KernelRidge("linear")
    with pytest.raises(TypeError, match="a kernel was needed"):
        GradientFlow(Linear)
    with pytest.raises(ValueError, match="classes="):
        KernelRidge(Linear(), classes=1)
    with pytest.raises(ValueError, match="coding="):
        KernelRidge(Linear(), classes=5, coding="onehot")
    with pytest.raises(TypeError, match="prior="):
        KernelRidge(Linear(), prior=0.0)
    with pytest.raises(TypeError, match="solver="):
        KernelRidge(Linear(), solver="cg")
    with pytest.raises(ValueError, match="damping"):
        KernelRidge(Linear(), solver=bl.CG(5, damping=0.1))
    with pytest.raises(TypeError, match="list of kernels"):
        Sum([])
    with pytest.raises(TypeError, match="list of kernels"):
        Sum(Linear())
    with pytest.raises(ValueError, match="2 weights and 1 kernels"):
        Sum([Linear()], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights=0"):
        Sum([Linear()], [0])


def test_what_a_fit_refuses():
    z, labels = draw(4, 3), torch.tensor([0, 1, 2, 0])
    classify, regress = KernelRidge(RBF(), classes=3), KernelRidge(RBF())
    for head, targets, message in (
        (classify, labels.double(), "class numbers were needed"),
        (classify, labels[:, None], "class numbers were needed"),
        (classify, labels + 1, "from 1 to 3"),
        (classify, labels - 1, "from -1 to 1"),
        (classify, labels[:3], "4 embeddings and 3 targets"),
        (regress, labels, "write KernelRidge"),
        (regress, draw(3, 2), "4 embeddings and 3 targets"),
        (regress, draw(4, 1, 1), "floating ones"),
        (KernelRidge(RBF(), prior=lambda z: z), draw(4), r"prior with values of shape \(4, 3\)"),
        (KernelRidge(RBF(), prior=lambda z: z[:, :1]), draw(4), r"prior with values of shape \(4, 1\)"),
        (KernelRidge(NTK()), draw(4, 3), "over=None, which selects none"),
        (KernelRidge(RBF(), primal=True), draw(4, 3), "no feature map"),
    ):
        with pytest.raises(ValueError, match=message):
            head.fit(given(z), targets, {})
    for rows in (z[:0], torch.ones(4, dtype=torch.long)):
        with pytest.raises(ValueError, match="KernelRidge"):
            regress.fit(given(rows), draw(len(rows)), {})
    with pytest.raises(ValueError, match="at least 2"):
        KernelRidge(RBF("median")).fit(given(z[:1]), draw(1), {})
    with pytest.raises(ValueError, match="median of the distances is 0"):
        KernelRidge(RBF("median")).fit(given(torch.ones(4, 3)), draw(4), {})
    module = net(outputs=5)
    with pytest.raises(ValueError, match="square matrix with a row"):
        KernelRidge(NTK()).fit(embedded(module, z), draw(4, 2), {})
    with pytest.raises(ValueError, match="selects none"):
        KernelRidge(NTK(over="7")).fit(embedded(module, z), draw(4, 5), {})
    for kernel in (RBF(), Linear(), Cosine()):
        head = KernelRidge(kernel)
        with pytest.raises(ValueError, match="2 columns"):
            head.predict(head.fit(given(z), draw(4), {}), given(z[:, :2]), {})
    # Under vmap, where no number can be read, a class number that does not exist is no number.
    mapped = torch.func.vmap(lambda z, y: classify.fit(given(z), y, {})["coefficients"])(z[None], labels[None] + 1)
    assert bool(mapped.isnan().any())


def test_a_frozen_parameter_and_one_task_and_one_step_of_training():
    """Through the Learner on class numbers: frozen layers stay, learned numbers move, a state dict has no place."""
    module = net(outputs=4, dtype=torch.float32)
    module[0].requires_grad_(False)
    head = KernelRidge(RBF("median", learn=True), classes=3, learn_regularizer=True, learn_scale=True)
    learner = bl.meta.Learner(module, nn.functional.cross_entropy, adapts=head)
    x = learner.outer()
    assert set(x["parameters"]) == {"2.weight", "2.bias"}
    assert set(x["head"]) == {"kernel.gamma", "regularizer", "scale"}
    before = {group: {k: v.detach().clone() for k, v in leaves.items()} for group, leaves in x.items()}
    inputs, labels = draw(1, 6, 3).float(), torch.tensor([[0, 1, 2, 0, 1, 2]])
    batches = bl.Batches(inner=(inputs, labels), outer=(inputs + 0.1, labels))
    for step in learner.train(x, [batches] * 3):
        assert step.hypergradient.status is bl.Status.OK
    moved = {f"{g}.{k}": not torch.equal(v, before[g][k]) for g, leaves in x.items() for k, v in leaves.items()}
    # (The bias shifts all embeddings alike, which a Gaussian kernel does not see.)
    assert all(moved.values()) or {name for name, each in moved.items() if not each} == {"parameters.2.bias"}
    assert learner.predict(x, (inputs[0], labels[0]), inputs[0, :2]).shape == (2, 3)
    with pytest.raises(ValueError, match="function space"):
        learner.adapt(x, (inputs[0], labels[0]))


@pytest.mark.parametrize("kernel", [Linear(), RBF("median"), Sum([Linear(), RBF()]), NTK()])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_module_under_autocast_is_fitted_in_the_dtype_of_its_parameters(kernel, chunk):
    module = net(dtype=torch.float32)
    x, y = draw(2, 6, 3).float(), draw(2, 6, 2, seed=1).float()
    batches = bl.Batches(inner=(x[:, :4], y[:, :4]), outer=(x[:, 4:], y[:, 4:]))
    prior = nn.Identity() if isinstance(kernel, NTK) else None
    learner = bl.meta.Learner(module, nn.functional.mse_loss, adapts=KernelRidge(kernel, 1.0, prior=prior), chunk=chunk)
    outer = learner.outer()
    plain = learner.hypergradient(outer, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learner.hypergradient(outer, batches)
    assert found.status is bl.Status.OK
    ours, theirs = (torch.cat([v.reshape(-1) for v in hg.grad["parameters"].values()]) for hg in (found, plain))
    assert ours.dtype is torch.float32
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1
