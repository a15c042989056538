"""Our estimators against those of higher, TorchOpt, Betty and hypertorch on one problem, to 1e-6 in float64.

The packages themselves run, where they are installed, each in its strongest version:

- higher 0.2.1: `innerloop_ctx` with SGD (momentum, weight decay) and Adam, its eps set so that it is torch.optim's;
- TorchOpt 0.7.3: `FuncOptimizer`; `custom_root` with conjugate gradients and those on normal equations, unstopped.
  (Its dense `solve_inv` takes each tensor of y by itself.) Its default dtype is float64 here: it rounds Adam's bias
  correction to it;
- Betty 0.2.1: its Engine, with `neumann`, `cg`, `darts`, `sama` and the unrolled `IterativeProblem`. Its `cg` takes the
  old residual in the direction, so that only one iteration of it is conjugate gradients;
- hypertorch (not on any index): its methods written here anew, from their description and with a correct and
  unstopped CG (its own returns the iterate before the one that met the tolerance): `reverse` over stored iterates,
  `reverse_unroll`, `fixed_point`, `neumann`, `CG` and `CG_normaleq` on w = Phi(w, x), Phi a step of gradient descent,
  or of the heavy ball on (w, velocity).
"""

import pytest
import torch

import bilevel as bl
from bilevel.estimators import T1T2, FixedPoint, Sama

D = torch.float64
SGD, HEAVY, ADAM = bl.SGD(0.2), bl.SGD(0.15, momentum=0.6), bl.Adam(0.05, eps=1e-6)
DECAYED = bl.SGD(0.15, momentum=0.6, weight_decay=0.05)
CLOSE = 1e-6


def posed():
    """Examples' weights and a decay on a small net; f sees x as well."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=D)

    inner, outer = {"a": normal(3, 4), "b": normal(4)}, {"weights": normal(9), "decay": torch.tensor(-1.0, dtype=D)}

    def predicted(y, inputs):
        return (inputs @ y["a"]).tanh() @ y["b"]

    def inner_loss(y, x, batch):
        errors = (x["weights"].sigmoid() * (predicted(y, batch[0]) - batch[1]) ** 2).mean()
        return errors + x["decay"].exp() * (y["a"].square().sum() + y["b"].square().sum()) / 2

    def outer_loss(y, x, batch):
        return ((predicted(y, batch[0]) - batch[1]) ** 2).mean() + 0.1 * x["weights"].square().mean()

    batches = bl.Batches((normal(9, 3), normal(9)), (normal(6, 3), normal(6)))
    return bl.Problem(inner_loss, outer_loss), outer, inner, batches


def flat(value):
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(value)])


def ours(estimator, optimizer, steps):
    found = bl.hypergradient(*posed(), solver=bl.Descent(optimizer, steps), estimator=estimator)
    assert found.status in (bl.Status.OK, bl.Status.MAX_STEPS)
    return found.grad


def close(found, expected, tolerance=CLOSE):
    return bool((flat(found) - flat(expected)).norm() <= tolerance * flat(expected).norm())


# higher and TorchOpt


@pytest.fixture
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


UNROLLED = [bl.Unrolled("graph"), bl.Unrolled("iterates"), bl.Unrolled("segments")]


@pytest.mark.parametrize("optimizer", [SGD, DECAYED, ADAM], ids=["SGD", "momentum and decay", "Adam"])
@pytest.mark.parametrize("package", ["higher", "torchopt", "betty"])
def test_unrolling(package, optimizer, double):
    name = {"betty": "betty.engine"}.get(package, package)
    pytest.importorskip(name, reason=f"{package} is not installed: pip install 'bilevel[peers,betty]'")
    from bilevel_profiling.baselines import betty, higher, torchopt

    solver = bl.Descent(optimizer, 6)
    if package == "betty":
        theirs = betty.hypergradient_with_betty(*posed(), solver, betty.unrolled()).grad
    else:
        problem, outer, *rest = posed()
        x = {key: leaf.requires_grad_() for key, leaf in outer.items()}
        theirs = {"higher": higher, "torchopt": torchopt}[package].unrolled(problem, x, *rest, solver).grad
    for estimator in UNROLLED:
        assert close(ours(estimator, optimizer, 6), theirs)


def torchopt_root(solve, optimizer, steps):
    """TorchOpt's `custom_root` at our y_K."""
    import torchopt

    problem, outer, inner, batches = posed()
    y = bl.adapt(problem, outer, inner, batches, solver=bl.Descent(optimizer, steps)).inner
    decay = optimizer.weight_decay

    def root(y, x):
        def loss(y):
            return problem.inner_loss(dict(zip(inner, y, strict=True)), dict(zip(outer, x, strict=True)), batches.inner)

        slope = torch.func.grad(loss)(y)
        return tuple(g + decay * leaf for g, leaf in zip(slope, y, strict=True))

    @torchopt.diff.implicit.custom_root(root, argnums=1, solve=solve)
    def solved(start, x):
        return tuple(y[name].clone().requires_grad_() for name in inner)

    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    found = solved(tuple(inner.values()), tuple(x.values()))
    loss = problem.outer_loss(dict(zip(inner, found, strict=True)), x, batches.outer)
    return dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))


@pytest.mark.filterwarnings("ignore:.*integrated functorch", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("optimizer", [SGD, DECAYED], ids=["SGD", "momentum and decay"])
@pytest.mark.parametrize("solver", ["cg", "normal cg"])
def test_implicit_differentiation_of_torchopt(solver, optimizer):
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed: pip install 'bilevel[peers]'")
    solve = {
        "cg": torchopt.linear_solve.solve_cg(maxiter=100, rtol=1e-14, atol=0.0),
        "normal cg": torchopt.linear_solve.solve_normal_cg(maxiter=400, rtol=1e-14, atol=0.0),
    }[solver]
    theirs = torchopt_root(solve, optimizer, 80)
    for estimator in (
        bl.Implicit(bl.CG(60, tol=1e-13)),
        bl.Implicit(bl.Dense()),
        bl.MemoryReduced(60, tol=1e-13),
        FixedPoint(bl.Dense()) if optimizer is SGD else bl.Implicit(bl.CG(60, tol=1e-12)),
    ):
        assert close(ours(estimator, optimizer, 80), theirs)


@pytest.mark.filterwarnings("ignore:.*integrated functorch", "ignore:.*torch.jit.script")
def test_the_dense_inverse_of_torchopt_takes_each_tensor_by_itself():
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed: pip install 'bilevel[peers]'")
    theirs = torchopt_root(torchopt.linear_solve.solve_inv(), SGD, 80)
    assert not close(theirs, ours(bl.Implicit(bl.Dense()), SGD, 80), 1e-2)


# Betty


def betty_of(method, optimizer, steps):
    pytest.importorskip("betty.engine", reason='betty-ml is not installed: pip install "bilevel[betty]"')
    from bilevel_profiling.baselines import betty

    made = getattr(betty, method[0])(*method[1:])
    if made.name not in betty.methods():
        pytest.skip(f"the installed release of betty-ml has no {made.name}; 0.2.1 has")
    return betty.hypergradient_with_betty(*posed(), bl.Descent(optimizer, steps), made).grad


FADED = bl.Adam(0.02, betas=(0.5, 0.6), eps=1e-12)
"""After 60 steps nothing is left of its bias correction, which Betty leaves out."""


@pytest.mark.parametrize(
    ("method", "estimator", "optimizer", "steps"),
    [
        (("neumann", 5), bl.Implicit(bl.Neumann(5, SGD.lr)), SGD, 8),
        (("neumann", 5), FixedPoint(bl.Neumann(5, 1.0)), SGD, 8),
        (("neumann", 3, 0.3), bl.Implicit(bl.Neumann(3, 0.3)), ADAM, 8),
        (("cg", 1), bl.Implicit(bl.CG(1, tol=0.0)), SGD, 30),
        (("darts", 0.01), Sama(scale=1 / SGD.lr, radius=0.01), SGD, 8),
        (("darts", 1e-4), T1T2(), SGD, 8),
        (("sama", 1.0), Sama(scale=1 / SGD.lr, radius=1.0), SGD, 8),
        (("sama", 1.0), Sama(radius=1.0), FADED, 60),
        (("sama", 0.1), Sama(radius=0.1), FADED, 60),
    ],
    ids=lambda value: (
        value[0] if isinstance(value, tuple) else type(value).__name__ if hasattr(value, "sees") else None
    ),
)
def test_best_responses_of_betty(method, estimator, optimizer, steps):
    assert close(ours(estimator, optimizer, steps), betty_of(method, optimizer, steps))


def test_betty_leaves_out_what_we_do_not():
    """Its sama has no bias correction, which counts in the first steps; its cg is none from the second iteration on."""
    assert not close(ours(Sama(radius=0.1), ADAM, 8), betty_of(("sama", 0.1), ADAM, 8), 1e-2)
    assert not close(ours(bl.Implicit(bl.CG(8, tol=0.0)), SGD, 30), betty_of(("cg", 8), SGD, 30), 1e-2)


# hypertorch, written anew


class Hypertorch:
    """Its methods on a map Phi(w, x) of lists of tensors: a step of gradient descent, or of the heavy ball.

    Args:
        optimizer: SGD with or without momentum.
        steps: of the map, from the start.
    """

    def __init__(self, optimizer, steps):
        self.problem, outer, inner, self.batches = posed()
        self.names, self.optimizer = list(inner), optimizer
        self.x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
        self.history = [list(inner.values())]
        if optimizer.momentum:
            # Its velocity begins at zero, which torch.optim's first buffer, the first gradient, amounts to.
            self.history[0] += [torch.zeros_like(leaf) for leaf in inner.values()]
        for _ in range(steps):
            self.history.append([leaf.detach() for leaf in self.map(self.history[-1], self.x)])

    def map(self, w, x):
        y, velocity = w[: len(self.names)], w[len(self.names) :]
        y = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in y]
        loss = self.problem.inner_loss(dict(zip(self.names, y, strict=True)), x, self.batches.inner)
        slope = torch.autograd.grad(loss, y, create_graph=True)
        if self.optimizer.momentum:
            slope = [self.optimizer.momentum * b + g for b, g in zip(velocity, slope, strict=True)]
        moved = [leaf - self.optimizer.lr * d for leaf, d in zip(y, slope, strict=True)]
        return [*moved, *(slope if self.optimizer.momentum else ())]

    def outer(self, w):
        return self.problem.outer_loss(
            dict(zip(self.names, w[: len(self.names)], strict=True)), self.x, self.batches.outer
        )

    def at(self, w):
        """A point as graph leaves, df/dw and df/dx there."""
        w = [leaf.detach().clone().requires_grad_() for leaf in w]
        return w, *(self.pull([self.outer(w)], at, [torch.ones((), dtype=D)]) for at in (w, self.xs))

    @property
    def xs(self):
        return list(self.x.values())

    def pull(self, outputs, inputs, weights):
        found = torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, inputs, strict=True)]

    def reverse(self):
        """Back through the stored iterates, one rebuilt map at a time."""
        _, v, total = self.at(self.history[-1])
        for w in reversed(self.history[:-1]):
            w = [leaf.detach().clone().requires_grad_() for leaf in w]
            mapped = self.map(w, self.x)
            total = [a + b for a, b in zip(total, self.pull(mapped, self.xs, v), strict=True)]
            v = self.pull(mapped, w, v)
        return total

    def reverse_unroll(self):
        """One backward through all the maps."""
        w = [leaf.clone().requires_grad_() for leaf in self.history[0]]
        for _ in self.history[1:]:
            w = self.map(w, self.x)
        return self.pull([self.outer(w)], self.xs, [torch.ones((), dtype=D)])

    def implicit(self, solve):
        """df/dx + (dPhi/dx)' v at the last iterate, where `solve` makes v of J' and of J, products with dPhi/dw, and of
        df/dw."""
        w, b, direct = self.at(self.history[-1])
        mapped = self.map(w, self.x)
        dummy = [torch.ones_like(leaf).requires_grad_() for leaf in mapped]
        pulled = torch.autograd.grad(mapped, w, dummy, create_graph=True)

        def transposed(v):
            return self.pull(mapped, w, v)

        def forward(v):
            return self.pull(pulled, dummy, v)

        v = solve(transposed, forward, b)
        return [a + g for a, g in zip(direct, self.pull(mapped, self.xs, v), strict=True)]


def combine(a, scale, b):
    return [p + scale * q for p, q in zip(a, b, strict=True)]


def fixed_point(count):
    def solve(transposed, forward, b):
        v = [torch.zeros_like(leaf) for leaf in b]
        for _ in range(count):
            v = combine(transposed(v), 1.0, b)
        return v

    return solve


def neumann(count):
    def solve(transposed, forward, b):
        total, term = b, b
        for _ in range(count):
            term = transposed(term)
            total = combine(total, 1.0, term)
        return total

    return solve


def conjugate(product, b, steps):
    x, r, p = [torch.zeros_like(leaf) for leaf in b], b, b
    for _ in range(steps):
        squared = sum((leaf**2).sum() for leaf in r)
        if squared < 1e-28:
            break
        image = product(p)
        alpha = squared / sum((a * c).sum() for a, c in zip(p, image, strict=True))
        x, r = combine(x, alpha, p), combine(r, -alpha, image)
        p = combine(r, sum((leaf**2).sum() for leaf in r) / squared, p)
    return x


def cg(transposed, forward, b):
    return conjugate(lambda v: combine(v, -1.0, transposed(v)), b, 60)


def cg_normaleq(transposed, forward, b):
    def product(v):
        once = combine(v, -1.0, transposed(v))
        return combine(once, -1.0, forward(once))

    return conjugate(product, combine(b, -1.0, forward(b)), 400)


@pytest.mark.parametrize(
    ("method", "estimators", "optimizer", "steps"),
    [
        ("reverse", UNROLLED, SGD, 7),
        ("reverse", UNROLLED, HEAVY, 7),
        ("reverse_unroll", UNROLLED, HEAVY, 7),
        (fixed_point(6), [bl.Implicit(bl.Neumann(5, SGD.lr)), FixedPoint(bl.Neumann(5, 1.0))], SGD, 20),
        (fixed_point(6), [FixedPoint(bl.Neumann(5, 1.0))], HEAVY, 20),
        (neumann(5), [FixedPoint(bl.Neumann(5, 1.0))], HEAVY, 20),
        (cg, [bl.Implicit(bl.CG(60, tol=1e-13)), bl.MemoryReduced(60, tol=1e-13), FixedPoint(bl.Dense())], SGD, 80),
        (cg_normaleq, [bl.Implicit(bl.Dense()), FixedPoint(bl.Dense())], SGD, 80),
        (cg_normaleq, [FixedPoint(bl.Dense()), FixedPoint(bl.Neumann(1400, 1.0))], HEAVY, 80),
    ],
    ids=[
        "reverse",
        "reverse, heavy ball",
        "reverse_unroll",
        "fixed_point",
        "fixed_point, heavy ball",
        "neumann, heavy ball",
        "CG",
        "CG_normaleq",
        "CG_normaleq, heavy ball",
    ],
)
def test_methods_of_hypertorch(method, estimators, optimizer, steps):
    theirs = Hypertorch(optimizer, steps)
    grad = getattr(theirs, method)() if isinstance(method, str) else theirs.implicit(method)
    for estimator in estimators:
        assert close(ours(estimator, optimizer, steps), grad)


def test_the_architects_step_of_darts():
    """Liu et al.'s architect, written anew: a virtual step, f there, and their difference of radius 0.01."""
    problem, outer, inner, batches = posed()
    xi, names, xs = 0.2, list(inner), list(outer)
    y = bl.adapt(problem, outer, inner, batches, solver=bl.Descent(SGD, 5)).inner
    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    w = [y[name].clone().requires_grad_() for name in names]

    def train(w):
        return problem.inner_loss(dict(zip(names, w, strict=True)), x, batches.inner)

    ahead = [a - xi * g for a, g in zip(w, torch.autograd.grad(train(w), w), strict=True)]
    ahead = [leaf.detach().requires_grad_() for leaf in ahead]
    loss = problem.outer_loss(dict(zip(names, ahead, strict=True)), x, batches.outer)
    vector = torch.autograd.grad(loss, ahead, retain_graph=True)
    direct = [
        torch.zeros_like(x[name]) if g is None else g
        for name, g in zip(xs, torch.autograd.grad(loss, [x[n] for n in xs], allow_unused=True), strict=True)
    ]
    eps = 0.01 / torch.cat([v.reshape(-1) for v in vector]).norm()
    sides = [
        torch.autograd.grad(train([a + sign * eps * v for a, v in zip(w, vector, strict=True)]), [x[n] for n in xs])
        for sign in (1.0, -1.0)
    ]
    expected = [d - xi * (p - n) / (2 * eps) for d, p, n in zip(direct, *sides, strict=True)]
    assert close(ours(bl.estimators.Darts(xi=xi, radius=0.01), SGD, 5), expected, 1e-9)
    assert close(ours(bl.estimators.Darts(radius=0.01), SGD, 5), expected, 1e-9)
