"""The ends of a spectrum from products, the smoothness of tasks' losses, and the constants of papers.md 2.4."""

import math

import pytest
import torch

import bilevel as bl
from bilevel.linear import Product, spectrum
from bilevel.space.inner_product import Space

D = torch.float64
NONE = bl.Batches(None, None)


def matrix(eigenvalues, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=g, dtype=D))[0]
    return basis @ torch.diag(torch.as_tensor(eigenvalues, dtype=D)) @ basis.T


SPECTRA = {
    "positive": [0.1 * k for k in range(1, 31)],
    "negative": [-0.1 * k for k in range(1, 31)],
    "both ends of one size": [-3.0, 3.0, *[0.05 * k for k in range(30)]],
    "a negative end that is larger": [-5.0, *[0.1 * k for k in range(30)]],
    "one large": [100.0, *[1.0] * 20],
    "the identity": [2.0] * 12,
    "nothing": [0.0] * 7,
    "one number": [-1.5],
    "close ends": [1.0, 0.9999, 0.9998, *[0.5] * 20],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_ends_equal_those_of_the_dense_matrix(name):
    values = SPECTRA[name]
    A = matrix(values)
    found = spectrum(lambda v: (A @ v[0],), (torch.zeros(len(values), dtype=D),), tol=1e-10, max_steps=200)
    assert found.lowest.item() == pytest.approx(min(values), rel=1e-7, abs=1e-9)
    assert found.highest.item() == pytest.approx(max(values), rel=1e-7, abs=1e-9)
    assert found.largest.item() == pytest.approx(max(map(abs, values)), rel=1e-9, abs=1e-12)
    assert bool(found.converged)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_never_above_the_truth_and_never_below_the_power_method_of_as_many_products(name, steps):
    A = matrix(SPECTRA[name])
    like = (torch.zeros(len(A), dtype=D),)
    found = spectrum(lambda v: (A @ v[0],), like, tol=1e-12, max_steps=steps)
    v = torch.randn(len(A), generator=torch.Generator().manual_seed(0), dtype=D)
    for _ in range(steps - 1):
        v = A @ (v / v.norm())
    quotient = (v @ A @ v / (v @ v)).abs() if v.norm() > 0 else torch.zeros(())
    assert quotient - 1e-12 <= found.largest <= max(map(abs, SPECTRA[name])) * (1 + 1e-12)
    assert found.steps <= steps


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_an_eigenvalue_lies_within_the_residual(name, steps):
    A = matrix(SPECTRA[name])
    found = spectrum(lambda v: (A @ v[0],), (torch.zeros(len(A), dtype=D),), tol=1e-12, max_steps=steps)
    for end in (found.lowest.item(), found.highest.item()):
        assert min(abs(each - end) for each in SPECTRA[name]) <= found.residual.item() + 1e-9


def test_tasks_are_those_alone_however_soon_they_are_done():
    spectra = [[1.0] * 12, [0.1 * k for k in range(12)], [-4.0, *[0.3 * k for k in range(11)]], [0.0] * 12]
    A = torch.stack([matrix(each, seed) for seed, each in enumerate(spectra)])

    def product(v):
        image = torch.einsum("tij,tj->ti", A, torch.cat([v[0].reshape(4, 8), v[1]], dim=1))
        return image[:, :8].reshape(4, 2, 4), image[:, 8:]

    like = torch.zeros(4, 2, 4, dtype=D), torch.zeros(4, 4, dtype=D)
    found = spectrum(product, like, space=Space(tasks=4), tol=1e-10, max_steps=60)
    for name, end in (("lowest", min), ("highest", max)):
        assert getattr(found, name).tolist() == pytest.approx([end(each) for each in spectra], rel=1e-7, abs=1e-9)
    assert found.converged.shape == (4,)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_narrow_dtypes_and_several_leaves(dtype, accuracy):
    A = matrix([-1.0, *[0.1 * k for k in range(20)], 7.0]).to(dtype)

    def product(v):
        image = A @ torch.cat([v[0].reshape(-1), v[1]])
        return image[:6].reshape(2, 3), image[6:]

    found = spectrum(product, (torch.zeros(2, 3, dtype=dtype), torch.zeros(16, dtype=dtype)), max_steps=40)
    assert found.largest.item() == pytest.approx(7.0, rel=accuracy)
    assert found.lowest.item() == pytest.approx(-1.0, abs=0.1)


def test_what_is_not_finite_is_said_and_stays_with_its_task():
    d = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]], dtype=D)
    found = spectrum(lambda v: (d * v[0],), (torch.zeros(3, 2, dtype=D),), space=Space(tasks=3))
    assert found.largest[0].item() == pytest.approx(2.0)
    assert found.largest[1:].isnan().all()
    assert not found.converged[1:].any()


def test_too_few_steps_are_said():
    A = matrix([k**2 for k in range(40)])
    few = spectrum(lambda v: (A @ v[0],), (torch.zeros(40, dtype=D),), tol=1e-9, max_steps=3)
    assert not few.converged
    assert few.steps == 3
    enough = spectrum(lambda v: (A @ v[0],), (torch.zeros(40, dtype=D),), tol=0.05, max_steps=40)
    assert enough.converged
    assert enough.steps < 20


def test_the_caller_s_random_numbers_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    spectrum(lambda v: v, (torch.zeros(3),))
    assert torch.equal(torch.rand(1), expected)


REFUSED = {
    "no operator": (lambda: spectrum(3.0, (torch.zeros(2),)), TypeError, "a LinearOperator or a function"),
    "not symmetric": (
        lambda: spectrum(Product(lambda v: v, symmetric=False), (torch.zeros(2),)),
        ValueError,
        "spectrum was given Product.*symmetric=False",
    ),
    "tol": (lambda: spectrum(lambda v: v, (torch.zeros(2),), tol=0.0), ValueError, "tol=0.0"),
    "steps": (lambda: spectrum(lambda v: v, (torch.zeros(2),), max_steps=0), ValueError, "max_steps=0"),
    "integers": (lambda: spectrum(lambda v: v, (torch.zeros(2, dtype=torch.long),)), TypeError, "floating tensors"),
    "nothing": (lambda: spectrum(lambda v: v, ()), TypeError, "floating tensors"),
    "no elements": (lambda: spectrum(lambda v: v, (torch.zeros(0),)), ValueError, "without elements"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_of_the_iteration_are_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


# Of tasks


def net():
    g = torch.Generator().manual_seed(3)

    def loss(y, x, b):
        return ((torch.tanh(b[0] @ y["a"]) @ y["b"] - b[1]) ** 2).mean() + 0.1 * y["b"].square().sum()

    x = {"a": torch.randn(3, 4, generator=g, dtype=D), "b": torch.randn(4, generator=g, dtype=D)}
    batch = torch.randn(5, 8, 3, generator=g, dtype=D), torch.randn(5, 8, generator=g, dtype=D)
    return bl.Problem(loss, loss, init=lambda x, b: x), x, batch


def dense_hessian(problem, x, batch):
    def flat_loss(y):
        return problem.inner_loss({"a": y[:12].reshape(3, 4), "b": y[12:]}, x, batch)

    return torch.func.jacrev(torch.func.grad(flat_loss))(torch.cat([x["a"].reshape(-1), x["b"]]))


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_smoothness_of_tasks_equals_the_dense_hessians(chunk):
    problem, x, batch = net()
    found = bl.meta.smoothness(
        problem, x, None, bl.Batches(batch, None), tasks=True, chunk=chunk, tol=1e-8, max_steps=60
    )
    ends = torch.stack([torch.linalg.eigvalsh(dense_hessian(problem, x, (batch[0][i], batch[1][i]))) for i in range(5)])
    assert found.lowest.min() < 0, "the test needs negative curvature"
    torch.testing.assert_close(found.lowest, ends[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.highest, ends[:, -1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.largest, ends.abs().amax(1), rtol=1e-7, atol=0)
    assert found.converged.all()
    assert isinstance(found.steps, int)


def test_smoothness_of_one_problem_at_a_given_point_and_on_its_own_batch():
    """Of a PerStep the first batch; curvature, which is another estimator's, is left alone; features are followed."""
    problem = bl.Problem(
        lambda y, x, b: b * (y["a"] ** 2).sum() + (y["unused"] * 0).sum(),
        lambda y, x, b: y["a"].sum(),
        features=lambda x, b: x * b,
    )
    y = {"a": torch.ones(2, dtype=D), "unused": torch.ones(3, dtype=D)}
    batches = bl.Batches(bl.PerStep([torch.tensor(2.0), torch.tensor(7.0)]), None, curvature=torch.tensor(100.0))
    found = bl.meta.smoothness(problem, torch.tensor(1.5, dtype=D), y, batches)
    assert found.largest.shape == ()
    assert found.largest.item() == pytest.approx(6.0)


def test_a_tensor_that_the_loss_does_not_use_has_no_curvature():
    problem = bl.Problem(lambda y, x, b: (y["a"] ** 2).sum(), lambda y, x, b: y["b"].sum())
    y = {"a": torch.ones(2, dtype=D), "b": torch.ones(2, dtype=D)}
    found = bl.meta.smoothness(problem, torch.zeros(1, dtype=D), y, NONE)
    assert (found.lowest.item(), found.highest.item()) == pytest.approx((0.0, 2.0))
    norms = bl.meta.start_norms(problem, torch.zeros(1, dtype=D), y, NONE)
    assert norms.support.item() == pytest.approx(8**0.5)
    assert norms.query.item() == pytest.approx(2**0.5)
    assert norms.difference.item() == pytest.approx(10**0.5)


def test_proximal_terms_count():
    problem = bl.proximal(bl.Problem(lambda y, x, b: y**2, lambda y, x, b: y, init=lambda x, b: x), 3.0)
    assert bl.meta.smoothness(problem, torch.tensor(1.0), None, NONE).largest.item() == pytest.approx(5.0)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_norms_at_the_start_equal_those_by_hand(chunk):
    problem, x, batch = net()
    query = tuple(leaf.flip(1) * 1.5 for leaf in batch)
    found = bl.meta.start_norms(problem, x, None, bl.Batches(batch, query), tasks=True, chunk=chunk)
    for i in range(5):
        s, q = (
            torch.cat(
                [leaf.reshape(-1) for leaf in torch.func.grad(problem.inner_loss)(x, x, (b[0][i], b[1][i])).values()]
            )
            for b in (batch, query)
        )
        expected = [s.norm(), q.norm(), (s - q).norm()]
        torch.testing.assert_close(
            torch.stack([found.support[i], found.query[i], found.difference[i]]), torch.stack(expected)
        )


@pytest.mark.parametrize("call", [bl.meta.smoothness, bl.meta.start_norms])
def test_wrong_arguments_for_tasks_are_refused(call):
    problem, x, batch = net()
    with pytest.raises(ValueError, match=f"{call.__name__}.. was given chunk=2 without tasks=True"):
        call(problem, x, None, bl.Batches(batch, batch), chunk=2)
    with pytest.raises(TypeError, match="batches"):
        call(problem, x, None, batch)
    with pytest.raises(ValueError, match="one start too many"):
        call(problem, x, x, bl.Batches(batch, batch))
    with pytest.raises(ValueError, match="one leading task dimension"):
        call(problem, x, None, bl.Batches(batch, (batch[0][:3], batch[1][:3])), tasks=True)


# The constants of papers.md 2.4


@pytest.mark.parametrize("L", [1.0, 2.5])
@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_table_of_constants_papers_md_2_4(L, rho):
    """At alpha = 1 / (8 N L): (1 + a)^2N, C_L L / rho and C_b L / rho for N = 1, 5 and many, to the digits printed."""
    table = {1: (1.266, 0.141, 0.016), 5: (1.280, 0.164, 0.019), 10**7: (1.284, 0.171, 0.020)}
    for steps, (growth, gradient, difference) in table.items():
        constants = bl.meta.MultiStep(steps, L, rho)
        assert constants.growth == pytest.approx(growth, abs=6e-4)
        assert constants.gradient_weight * L / rho == pytest.approx(gradient, abs=6e-4)
        assert constants.difference_weight * L / rho == pytest.approx(difference, abs=6e-4)
        assert constants.alpha == pytest.approx(1 / (8 * steps * L))
        assert constants.product <= math.exp(1 / 8)
    assert bl.meta.MultiStep(10**7, L, rho).growth == pytest.approx(math.exp(1 / 4), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("alpha", [None, 0.1, 0.4])
def test_both_ways_of_writing_c_l_agree_papers_md_2_4(steps, alpha):
    L, rho = 2.5, 0.7
    constants = bl.meta.MultiStep(steps, L, rho, alpha)
    a = constants.alpha * L
    recalled = (1 + a) ** (steps - 1) * constants.alpha * rho + rho / L * (1 + a) ** steps * (
        (1 + a) ** (steps - 1) - 1
    )
    assert constants.gradient_weight == pytest.approx(recalled * (1 + a) ** steps, rel=1e-12)


def test_the_local_smoothness_and_the_step_by_hand_papers_md_2_4():
    constants = bl.meta.MultiStep(1, 2.0, 3.0)  # a = 1/8
    norms, differences = torch.tensor([1.0, 3.0], dtype=D), torch.tensor([0.5, 1.5], dtype=D)
    weight, other = 3 / 2 * 9 / 8 / 8, 3 / 2 / 64
    resampling, finite = 81 / 64 * 2 + weight * 2, 81 / 64 * 2 + weight * 2 + other * 1
    assert constants.local_smoothness(norms).item() == pytest.approx(resampling, rel=1e-12)
    assert constants.local_smoothness(norms, differences).item() == pytest.approx(finite, rel=1e-12)
    assert constants.outer_step(norms).item() == pytest.approx(1 / (100 * resampling), rel=1e-12)
    assert constants.outer_step(norms, differences).item() == pytest.approx(1 / (80 * finite), rel=1e-12)
    assert constants.outer_step(norms, divisor=2).item() == pytest.approx(1 / (2 * resampling), rel=1e-12)
    with pytest.raises(ValueError, match="divisor=0"):
        constants.outer_step(norms, divisor=0)


def test_fixed_steps_grow_exponentially_and_end_in_infinity_not_in_an_error():
    assert bl.meta.MultiStep(10, 1.0, 1.0, 1.0).growth == 2.0**20
    beyond = bl.meta.MultiStep(5000, 1.0, 1.0, 1.0)
    assert beyond.growth == beyond.gradient_weight == beyond.difference_weight == float("inf")
    assert bl.meta.MultiStep(5000, 1.0, 0.0, 1.0).gradient_weight == 0.0
    assert beyond.outer_step(torch.ones(2)).item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 1.0), "steps=0"),
        ((2.5, 1.0, 1.0), "steps=2.5"),
        ((True, 1.0, 1.0), "steps=True"),
        ((1, 0.0, 1.0), "smoothness=0.0"),
        ((1, float("nan"), 1.0), "smoothness=nan"),
        ((1, torch.tensor(1.0), 1.0), "smoothness=tensor"),
        ((1, 1.0, -1.0), "hessian_lipschitz=-1.0"),
        ((1, 1.0, 1.0, 0.0), "step_size=0.0"),
    ],
)
def test_constants_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bl.meta.MultiStep(*arguments)
