"""Betty programs for tests, small enough for a closed form."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.integrations import betty
from bilevel.integrations.betty import release

if not release.available():
    pytest.skip(release.MISSING, allow_module_level=True)

with release.importing():
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

SIZE = 4
recent = pytest.mark.skipif(
    release.installed_version() < (0, 2), reason="Betty 0.1.1 has other callbacks, defaults and attributes of problems"
)
ONE = [[torch.zeros(1)]]
"""A loader of one batch that nothing looks at."""


class Silent:
    """A logger that remembers."""

    def __init__(self):
        self.lines, self.stats = [], []

    def info(self, text, *_):
        self.lines.append(text)

    warning = info

    def log(self, stats, tag=None, step=None):
        self.stats.append((tag, step, stats))


class Vector(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def forward(self):
        return self.value


class Quiet(ImplicitProblem):
    """A problem that logs nowhere but into `logger`."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.logger = Silent()


class Watched(Quiet):
    """An upper problem that remembers the gradients it steps with."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.gradients = []

    def optimizer_step(self, *arguments, **keywords):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.trainable_parameters()])
        super().optimizer_step(*arguments, **keywords)


def problem(kind, name, module, optimizer, *, batches=ONE, scheduler=None, **config):
    """A problem of class `kind` (a subclass of Quiet)."""
    made = optimizer(module.parameters())
    return kind(name, Config(**config), module, made, scheduler(made) if scheduler else None, batches)


def sgd(lr, **more):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **more)


def edges(*, u2l, l2u):
    return {"u2l": u2l, "l2u": l2u}


def run(problems, dependencies, iterations):
    """Run a program; nothing is printed."""
    engine = Engine(
        problems=problems, config=EngineConfig(train_iters=iterations, valid_step=10**9), dependencies=dependencies
    )
    engine.logger = Silent()
    engine.run()
    return engine


class Quadratic:
    """f = |y - c|^2 / 2 and g = y'Hy / 2 - y'Bx, in float64: y*(x) = H^-1 B x."""

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        root = draw(SIZE, SIZE)
        self.H = (root @ root.T / SIZE + torch.eye(SIZE, dtype=torch.float64)).to(dtype)
        self.B, self.c, self.x = draw(SIZE, SIZE).to(dtype), draw(SIZE).to(dtype), draw(SIZE).to(dtype)
        self.lr = float(1 / torch.linalg.eigvalsh(self.H.double()).max())

    def exact(self, decay=0.0):
        """The hypergradient at the solution."""
        H = self.H.double() + decay * torch.eye(SIZE, dtype=torch.float64)
        B, c, x = self.B.double(), self.c.double(), self.x.double()
        return B.T @ torch.linalg.solve(H, torch.linalg.solve(H, B @ x) - c)

    def problems(self, steps, optimizer=None, kind=None, **config):
        """(upper, lower, dependencies)."""
        own = self

        class Upper(Watched):
            def training_step(self, batch):
                return 0.5 * ((self.lower() - own.c) ** 2).sum()

        class Lower(Quiet):
            def training_step(self, batch):
                y = self.module()
                return 0.5 * y @ own.H @ y - y @ (own.B @ self.upper())

        lower = problem(
            kind(Lower) if kind else Lower,
            "lower",
            Vector(torch.zeros_like(self.x)),
            optimizer or sgd(self.lr),
            unroll_steps=steps,
            **config,
        )
        upper = problem(Upper, "upper", Vector(self.x), sgd(0.0))
        return upper, lower, edges(u2l={upper: [lower]}, l2u={lower: [upper]})


DOUBLE = torch.float64


def relative(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def upper_gradient(upper, step=-1):
    return upper.gradients[step][0]


AT_SOLUTION = {
    "implicit CG": lambda q: {"estimator": bl.Implicit(bl.CG(10, tol=1e-12))},
    "implicit dense": lambda q: {"estimator": bl.Implicit(bl.Dense())},
    "implicit Neumann": lambda q: {"estimator": bl.Implicit(bl.Neumann(400, q.lr))},
    "memory-reduced": lambda q: {"estimator": bl.MemoryReduced(tol=1e-12)},
    "memory-reduced, warm": lambda q: {"estimator": bl.MemoryReduced(tol=1e-12, warm_adjoint=True)},
    "corrected": lambda q: {
        "estimator": bl.FirstOrderCorrected(),
        "solver": bl.Descent(bl.SGD(lr=q.lr), 400),
    },
    "unrolled onwards": lambda q: {"estimator": bl.Unrolled(), "solver": bl.Descent(bl.SGD(lr=q.lr), 400)},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, inputs):
        return self.last(self.drop(torch.tanh(self.norm(self.first(inputs)))))


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

    def forward(self, losses):
        return self.net(losses)


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, 3, generator=generator, dtype=DOUBLE)
    return [(x, (x.sum(1, keepdim=True) + 0.5 * torch.randn(5, 1, generator=generator, dtype=DOUBLE))) for x in inputs]


class Reweighting:
    """Data reweighting with a net that has dropout and batch normalization, minibatches and a schedule."""

    def __init__(self, estimator=None, optimizer=None, scheduler=None, steps=3, **config):
        torch.manual_seed(5)
        self.net, self.weights = Net().double(), Weights().double()
        self.train, self.valid = data(9, 1), data(3, 2)

        class Outer(Watched):
            def training_step(self, batch):
                return F.mse_loss(self.net(batch[0]), batch[1])

        class Inner(Quiet):
            def training_step(self, batch):
                losses = (self.module(batch[0]) - batch[1]).square()
                weighted = (self.outer(losses.detach()) * losses).mean()
                return {"loss": weighted, "plain": losses.mean().item()}

        self.inner = problem(
            Inner,
            "net",
            self.net,
            optimizer or sgd(0.1, momentum=0.5),
            batches=self.train,
            scheduler=scheduler,
            unroll_steps=steps,
            **config,
        )
        self.outer = problem(Outer, "outer", self.weights, sgd(0.05), batches=self.valid)
        self.dependencies = edges(u2l={self.outer: [self.inner]}, l2u={self.inner: [self.outer]})
        if estimator is not None:
            betty.use(self.inner, estimator)

    def run(self, iterations=9):
        torch.manual_seed(6)
        run([self.outer, self.inner], self.dependencies, iterations)
        return self.outer.gradients
