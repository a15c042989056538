"""Our estimators in Betty programs: against closed forms, programs written by hand, and Betty's own methods."""

import gc
import random
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from betty_programs import Quadratic, Quiet, Vector, Watched, edges, problem, recent, run, sgd
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.integrations import betty

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("label", AT_SOLUTION)
def test_the_hypergradient_at_a_solution_is_the_closed_form(label, dtype):
    quadratic = Quadratic(dtype)
    name = betty.register(**AT_SOLUTION[label](quadratic))
    upper, lower, dependencies = quadratic.problems(400, type=name)
    run([upper, lower], dependencies, 400)
    tolerance = {torch.float64: 1e-8, torch.float32: 2e-4 if label != "corrected" else 2e-3}[dtype]
    assert relative(upper_gradient(upper), quadratic.exact()) < tolerance
    assert upper_gradient(upper).dtype == dtype


def test_weight_decay_is_a_part_of_where_the_lower_problem_rests():
    quadratic = Quadratic()
    name = betty.register(bl.Implicit(bl.CG(10, tol=1e-12)))
    upper, lower, dependencies = quadratic.problems(600, sgd(quadratic.lr / 2, weight_decay=0.5), type=name)
    run([upper, lower], dependencies, 600)
    assert relative(upper_gradient(upper), quadratic.exact(decay=0.5)) < 1e-10
    assert relative(upper_gradient(upper), quadratic.exact()) > 0.05


OPTIMIZERS = {
    "SGD": (sgd(0.1), bl.SGD(0.1)),
    "momentum": (sgd(0.05, momentum=0.9), bl.SGD(0.05, momentum=0.9)),
    "nesterov and decay": (
        sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        bl.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "dampening": (sgd(0.05, momentum=0.9, dampening=0.3), bl.SGD(0.05, momentum=0.9, dampening=0.3)),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05), bl.Adam(0.05)),
    "Adam, decay": (lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1), bl.Adam(0.05, weight_decay=0.1)),
    "AdamW": (
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
        bl.AdamW(0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("keep", ["tape", "iterates", "segments"])
@pytest.mark.parametrize("label", OPTIMIZERS)
def test_unrolled_differentiates_the_steps_that_betty_made(label, keep):
    quadratic, (theirs, ours) = Quadratic(), OPTIMIZERS[label]
    upper, lower, dependencies = quadratic.problems(6, theirs)
    estimator = bl.Unrolled() if keep == "tape" else bl.Unrolled(keep=keep)
    betty.use(lower, estimator)
    run([upper, lower], dependencies, 6)
    wanted = bl.hypergradient(
        bl.Problem(
            lambda y, x, b: 0.5 * y @ quadratic.H @ y - y @ (quadratic.B @ x),
            lambda y, x, b: 0.5 * ((y - quadratic.c) ** 2).sum(),
        ),
        quadratic.x,
        torch.zeros_like(quadratic.x),
        bl.Batches(None, None),
        solver=bl.Descent(ours, 6),
        estimator=bl.Unrolled(),
    )
    assert relative(lower.module.value.detach(), wanted.inner) < 1e-12
    assert relative(upper_gradient(upper), wanted.grad) < 1e-12


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


def by_hand(case, steps=3, momentum=0.5, rates=None):
    """The same program with autograd alone: truncated at each outer step, momentum going on."""
    torch.manual_seed(5)
    net, weights = Net().double(), Weights().double()
    names = [name for name, _ in net.named_parameters()]
    y = [p.detach().clone() for p in net.parameters()]
    buffers = [None] * len(y)
    gradients, count = [], 0
    torch.manual_seed(6)
    for window in range(3):
        y = [leaf.detach().requires_grad_() for leaf in y]
        buffers = [None if b is None else b.detach() for b in buffers]
        for _ in range(steps):
            inputs, targets = case.train[count % 9]
            losses = (torch.func.functional_call(net, dict(zip(names, y, strict=True)), (inputs,)) - targets).square()
            loss = (weights(losses.detach()) * losses).mean()
            found = torch.autograd.grad(loss, y, create_graph=True)
            buffers = [g if b is None else momentum * b + g for g, b in zip(found, buffers, strict=True)]
            rate = 0.1 if rates is None else rates[count]
            y = [leaf - rate * b for leaf, b in zip(y, buffers, strict=True)]
            count += 1
        inputs, targets = case.valid[window]
        outer = F.mse_loss(torch.func.functional_call(net, dict(zip(names, y, strict=True)), (inputs,)), targets)
        found = torch.autograd.grad(outer, list(weights.parameters()))
        gradients.append(found)
        with torch.no_grad():
            for parameter, gradient in zip(weights.parameters(), found, strict=True):
                parameter -= 0.05 * gradient
    return gradients


@pytest.mark.parametrize("keep", ["graph", "iterates"])
def test_a_real_program_with_noise_batch_norm_and_minibatches_is_differentiated(keep):
    case = Reweighting(bl.Unrolled() if keep == "graph" else bl.Unrolled(keep="iterates"))
    found, wanted = case.run(), by_hand(case)
    assert len(found) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_a_schedule_of_step_sizes_is_followed():
    case = Reweighting(
        bl.Unrolled(), scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    )
    found, wanted = case.run(), by_hand(case, rates=[0.1 * 0.8**k for k in range(9)])
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@recent
def test_a_replay_leaves_the_program_as_it_is():
    """Parameters, running statistics, modes and random numbers, as after the program without any hypergradient."""
    ends = []
    for asked in (False, True):
        case = Reweighting(bl.Unrolled())
        case.outer.optimizer_step = lambda: None
        if not asked:  # no path: the upper problem takes its own gradient alone
            case.dependencies["u2l"] = {}
        case.run()
        ends.append((case.net.state_dict(), torch.rand(3), [layer.training for layer in case.net.modules()]))
    (without, drawn, modes), (with_it, again, after) = ends
    for key, value in with_it.items():
        torch.testing.assert_close(value, without[key], rtol=0, atol=0)
    assert torch.equal(drawn, again)
    assert modes == after
    assert int(with_it["norm.num_batches_tracked"]) == 12  # of nine inner steps and three outer losses


class Levels:
    """Three levels: top learns x from mid's solution, mid starts from what bottom learned, bottom depends on x.

    bottom: b*(t) = argmin b'Gb/2 - b't;  mid: m*(b) = argmin m'Hm/2 - m'Cb;  top: |m - c|^2 / 2.
    """

    def __init__(self, bottom, mid, steps=200):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        roots = draw(2, 4, 4)
        self.G, self.H = (r @ r.T / 4 + torch.eye(4, dtype=DOUBLE) for r in roots)
        self.C, self.c, self.t = draw(4, 4), draw(4), draw(4)
        own = self
        rates = [float(1 / torch.linalg.eigvalsh(each).max()) for each in (self.G, self.H)]

        class Top(Watched):
            def training_step(self, batch):
                return 0.5 * (self.mid() - own.c).square().sum()

        class Mid(Quiet):
            def training_step(self, batch):
                m = self.module()
                return 0.5 * m @ own.H @ m - m @ (own.C @ self.bottom())

        class Bottom(Quiet):
            def training_step(self, batch):
                b = self.module()
                return 0.5 * b @ own.G @ b - b @ self.top()

        zero = torch.zeros(4, dtype=DOUBLE)
        settings = [{"neumann_iterations": 400, "neumann_alpha": rate} for rate in rates]
        self.bottom = problem(
            Bottom, "bottom", Vector(zero), sgd(rates[0]), unroll_steps=steps, type=bottom, **settings[0]
        )
        self.mid = problem(Mid, "mid", Vector(zero), sgd(rates[1]), unroll_steps=steps, type=mid, **settings[1])
        self.top = problem(Top, "top", Vector(self.t), sgd(0.0))
        self.dependencies = edges(u2l={self.top: [self.bottom]}, l2u={self.bottom: [self.mid], self.mid: [self.top]})
        betty.check([self.top, self.mid, self.bottom], self.dependencies)
        run([self.top, self.mid, self.bottom], self.dependencies, steps * steps)

    def exact(self):
        b = torch.linalg.solve(self.G, self.t)
        m = torch.linalg.solve(self.H, self.C @ b)
        return torch.linalg.solve(self.G, self.C.T @ torch.linalg.solve(self.H, m - self.c))


def test_three_levels_with_bettys_neumann_and_with_ours():
    """The same program; one argument differs."""
    theirs = Levels(bottom="neumann", mid="neumann", steps=60)
    ours = Levels(
        bottom=betty.register(bl.Implicit(bl.Neumann(400, 0.2))),
        mid=betty.register(bl.Implicit(bl.CG(10, tol=1e-12))),
        steps=60,
    )
    assert relative(upper_gradient(theirs.top), theirs.exact()) < 1e-6
    assert relative(upper_gradient(ours.top), ours.exact()) < 1e-6
    said = ours.mid.logger.lines[-1]
    assert '[Problem "mid"] [Hypergradient for "bottom"] OK' in said
    assert "linear_residual" in said


class Chain:
    """Three levels in a chain: mid differentiates through bottom, and top through mid.

    bottom: b*(m, t) = argmin b'Gb/2 - b'(Pm + t);  mid: m'Hm/2 + b'Qm - m't;  top: |m - c|^2 / 2.
    """

    def __init__(self, through_mid, through_bottom=None, steps=(40, 150)):
        generator = torch.Generator().manual_seed(4)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        root = draw(3, 3)
        self.G = root @ root.T / 6 + torch.eye(3, dtype=DOUBLE)
        self.H = 4 * torch.eye(3, dtype=DOUBLE)
        self.P, self.Q, self.c, self.t = 0.5 * draw(3, 3), 0.5 * draw(3, 3), draw(3), draw(3)
        own = self
        rate = float(1 / torch.linalg.eigvalsh(self.G).max())

        class Top(Watched):
            def training_step(self, batch):
                return 0.5 * (self.mid() - own.c).square().sum()

        class Mid(Quiet):
            def training_step(self, batch):
                m = self.module()
                return 0.5 * m @ own.H @ m + self.bottom() @ (own.Q @ m) - m @ self.top()

        class Bottom(Quiet):
            def training_step(self, batch):
                b = self.module()
                return 0.5 * b @ own.G @ b - b @ (own.P @ self.mid() + self.top())

        zero = torch.zeros(3, dtype=DOUBLE)
        exactly = betty.register(bl.Implicit(bl.CG(10, tol=1e-12)))
        self.bottom = problem(
            Bottom, "bottom", Vector(zero), sgd(rate), unroll_steps=steps[0], type=through_bottom or exactly
        )
        self.mid = problem(
            Mid, "mid", Vector(zero), sgd(0.15), unroll_steps=steps[1], type=through_mid, retain_graph=True
        )
        self.top = problem(Top, "top", Vector(self.t), sgd(0.0))
        self.dependencies = edges(
            u2l={self.top: [self.mid], self.mid: [self.bottom]}, l2u={self.bottom: [self.mid], self.mid: [self.top]}
        )
        self.iterations = steps[0] * steps[1]

    def run(self):
        run([self.top, self.mid, self.bottom], self.dependencies, self.iterations)
        return upper_gradient(self.top)

    def exact(self):
        """d/dt of top's loss at m*(t), where mid's total loss is m'Hm/2 + (G^-1 (Pm + t))'Qm - m't."""
        inverse = torch.linalg.inv(self.G)
        coupling = (inverse @ self.P).T @ self.Q
        hessian = self.H + coupling + coupling.T
        cross = (inverse.T @ self.Q).T - torch.eye(3, dtype=DOUBLE)  # d2/dm dt
        m = torch.linalg.solve(hessian, -cross @ self.t)
        return -cross.T @ torch.linalg.solve(hessian, m - self.c)


@recent
def test_a_chain_of_three_levels_is_exact_when_what_lies_below_follows():
    chain = Chain(betty.register(bl.Implicit(bl.CG(10, tol=1e-12)), below=40))
    found = chain.run()
    assert relative(found, chain.exact()) < 1e-6
    fixed = Chain(betty.register(bl.Implicit(bl.CG(10, tol=1e-12)), below=0))
    assert relative(fixed.run(), fixed.exact()) > 0.05


@recent
def test_a_chain_is_refused_unless_it_is_said_what_lies_below_does():
    chain = Chain(betty.register(bl.Implicit(bl.CG(10))), steps=(2, 2))
    with pytest.raises(ValueError, match=r"problem mid is itself above bottom.*below=K.*below=0"):
        chain.run()


class Tied(nn.Module):
    """One parameter in two places, and a list of parameters that names it twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor([0.5, 1.5], dtype=DOUBLE)) for _ in range(2))

    def forward(self):
        return self.first * self.second


@recent
@pytest.mark.parametrize("listed", ["twice", "generator"])
def test_lists_of_parameters_may_name_one_twice_and_may_be_generators(listed):
    """Betty's neumann, whose answer is torch.autograd's own, is the measure."""
    found = {}
    for label, kind in {"theirs": "neumann", "ours": betty.register(bl.Implicit(bl.Neumann(30, 0.25)))}.items():

        class Upper(Watched):
            def training_step(self, batch):
                return (self.lower() ** 2).sum()

            def trainable_parameters(self):
                m = self.module
                return [m.first, m.second, m.first] if listed == "twice" else [m.first, m.second]

        class Lower(Quiet):
            def training_step(self, batch):
                return ((self.module() - self.upper()) ** 2).sum()

            def trainable_parameters(self):
                return (p for p in self.module.parameters()) if listed == "generator" else [self.module.value]

            def zero_grad(self):
                self.module.zero_grad()

        value = Vector(torch.ones(2, dtype=DOUBLE))
        lower = problem(Lower, "lower", value, sgd(0.25), type=kind, neumann_iterations=30, neumann_alpha=0.25)
        upper = problem(Upper, "upper", Tied(), lambda p: torch.optim.SGD([{"params": list(p)}], lr=0.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a parameter that stands twice
            try:
                run([upper, lower], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 2)
            except (TypeError, IndexError, RuntimeError):
                assert label == "theirs"  # a generator is empty when Betty comes back to it
                return
        found[label] = upper.gradients[-1]
    for a, b in zip(found["ours"], found["theirs"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


@recent
def test_only_a_part_may_be_what_the_upper_gradient_goes_through():
    """meta_trainable_parameters leaves one out: Unrolled still follows all that moves."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = (nn.Parameter(torch.zeros(2, dtype=DOUBLE)) for _ in range(2))

    class Lower(Quiet):
        def training_step(self, batch):
            m = self.module
            return ((m.a - self.upper()) ** 2).sum() + ((m.b - m.a) ** 2).sum() + (m.a * m.b).sum()

        def meta_trainable_parameters(self):
            return [self.module.a]

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower.module.a**2).sum()

    lower = problem(Lower, "lower", Two(), sgd(0.1), unroll_steps=3)
    upper = problem(Upper, "upper", Vector(torch.tensor([1.0, 2.0], dtype=DOUBLE)), sgd(0.0))
    betty.use(lower, bl.Unrolled())
    run([upper, lower], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 3)
    x = torch.tensor([1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    b = a = torch.zeros(2, dtype=DOUBLE)
    for _ in range(3):
        b, a = b - 0.1 * (2 * (b - a) + a), a - 0.1 * (2 * (a - x) - 2 * (b - a) + b)
    (wanted,) = torch.autograd.grad((a**2).sum(), x)
    assert relative(upper_gradient(upper), wanted) < 1e-12


@recent
@pytest.mark.parametrize("label", ["implicit CG", "corrected", "unrolled onwards"])
def test_losses_may_ask_which_parameters_require_grad(label):
    """A penalty whose strength is learned, on those that do: in all evaluations, also where y is held fixed."""

    class Lower(Quiet):
        def training_step(self, batch):
            decay = sum(p.square().sum() for p in self.module.parameters() if p.requires_grad)
            pull = sum(p.sum() for p in self.other.module.parameters() if p.requires_grad)
            return (self.module() - 1).square().sum() + self.upper() * decay + pull * self.module().sum()

    class Other(Quiet):
        def training_step(self, batch):
            return self.module().square().sum()

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower() ** 2).sum()

    settings = AT_SOLUTION[label](SimpleNamespace(lr=0.2))
    lower = problem(Lower, "lower", Vector(torch.zeros(2, dtype=DOUBLE)), sgd(0.2), unroll_steps=200)
    betty.use(lower, **settings)
    upper = problem(Upper, "upper", Vector(torch.tensor(0.5, dtype=DOUBLE)), sgd(0.0))
    other = problem(Other, "other", Vector(torch.tensor([0.25, 0.25], dtype=DOUBLE)), sgd(0.0))
    run([upper, lower, other], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 200)
    # 2 (y - 1) + 2 x y + 0.5 = 0
    x = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    (wanted,) = torch.autograd.grad(2 * ((2 - 0.5) / (2 + 2 * x)) ** 2, x)
    assert upper_gradient(upper) == pytest.approx(float(wanted), rel=1e-6)


class Ordinary(Quiet):
    """What programs do beside: a loss of one element, noise of Python's own, a callback that logs, frozen layers."""

    noisy = True

    def training_step(self, batch):
        net = self.module
        (slope,) = torch.autograd.grad(net(batch[0]).sum(), net[0].weight, create_graph=True)
        jitter = 1 + (0.1 * random.random() if self.noisy else 0.0)
        penalty = sum(p.square().sum() for p in net.parameters() if p.requires_grad)
        return jitter * (net(batch[0]) - self.upper()).square().mean().reshape(1) + 0.1 * penalty + slope.square().sum()

    def trainable_parameters(self):
        return list(self.module[2].parameters())


@pytest.mark.parametrize("use", [bl.Unrolled(), bl.Implicit(bl.Dense())], ids=["unrolled", "implicit"])
def test_ordinary_programs_are_not_refused(use):
    """With a head that is trained on a body that is not, though it requires grad; the head's problem is quadratic."""

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower(batch[0]) - 1).square().mean()

    class Logging(Ordinary):
        noisy = False  # a replay draws torch's numbers again, and no others

        def grad_callback(self):
            self.logger.info("seen")

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    rows = [(torch.randn(6, 2, dtype=DOUBLE),)]
    kind = Logging if isinstance(use, bl.Unrolled) else Ordinary
    lower = problem(kind, "lower", net, sgd(0.05), batches=rows, unroll_steps=2)
    upper = problem(Upper, "upper", Vector(torch.zeros(1, dtype=DOUBLE)), sgd(0.0), batches=rows)
    betty.use(lower, use)
    random.seed(0)
    run([upper, lower], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 2)
    assert upper_gradient(upper).isfinite().all()
    assert upper_gradient(upper).abs().sum() > 0


@pytest.mark.parametrize("use", [bl.Unrolled(), bl.Implicit(bl.CG(10, damping=0.1))], ids=["unrolled", "implicit"])
def test_sparse_embeddings_are_those_that_are_dense(use):
    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower(torch.tensor([2])) ** 2).sum()

    class Lower(Quiet):
        def training_step(self, batch):
            return ((self.module(torch.tensor([0, 2, 2])) - self.upper()) ** 2).sum()

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        lower = problem(Lower, "lower", nn.Embedding(4, 2, sparse=sparse).double(), sgd(0.1), unroll_steps=2)
        upper = problem(Upper, "upper", Vector(torch.ones(2, dtype=DOUBLE)), sgd(0.0))
        betty.use(lower, use)
        run([upper, lower], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 2)
        found.append(upper_gradient(upper))
    torch.testing.assert_close(*found)


def test_two_paths_add_up_and_sync_leaves_the_sum_in_place():
    """One upper problem above two lower ones: the gradient is the sum, whichever of them is last."""
    first, second = Quadratic(seed=1), Quadratic(seed=2)
    name = betty.register(bl.Implicit(bl.CG(10, tol=1e-12)))

    class Upper(Watched):
        def training_step(self, batch):
            return 0.5 * (self.a() - first.c).square().sum() + 0.5 * (self.b() - second.c).square().sum()

    def lower(quadratic):
        class Lower(Quiet):
            def training_step(self, batch):
                y = self.module()
                return 0.5 * y @ quadratic.H @ y - y @ (quadratic.B @ self.upper())

        return Lower

    zero = torch.zeros(4, dtype=DOUBLE)
    a = problem(lower(first), "a", Vector(zero), sgd(first.lr), unroll_steps=400, type=name)
    b = problem(lower(second), "b", Vector(zero), sgd(second.lr), unroll_steps=400, type=name)
    upper = problem(Upper, "upper", Vector(first.x), sgd(0.0))
    run([upper, a, b], edges(u2l={upper: [a, b]}, l2u={a: [upper], b: [upper]}), 400)
    second.x = first.x
    assert relative(upper_gradient(upper), first.exact() + second.exact()) < 1e-10


def test_the_sign_and_the_size_are_bettys():
    """A hook's answer is what Betty's own neumann gives with the same series."""
    quadratic = Quadratic()
    found = {}
    for label, name in {
        "theirs": "neumann",
        # (Betty counts the terms after the first one.)
        "ours": betty.register(bl.Implicit(bl.Neumann(7, quadratic.lr)), tolerate=list(bl.Status)),
    }.items():
        upper, lower, dependencies = quadratic.problems(3, type=name, neumann_iterations=7, neumann_alpha=quadratic.lr)
        run([upper, lower], dependencies, 3)
        found[label] = upper_gradient(upper)
    assert relative(found["ours"], found["theirs"]) < 1e-12


def test_another_problem_with_batch_norm_is_left_as_it_is():
    """A third problem's net in the lower loss: its running statistics are Betty's business."""
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    inputs = torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))

    class Body(Quiet):
        def training_step(self, batch):
            return self.module(inputs).square().mean()

    class Lower(Quiet):
        def training_step(self, batch):
            y = self.module()
            return (self.body(inputs) @ y).square().mean() + y.square().sum() - (y * self.upper()).sum()

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower() - 1).square().sum()

    lower = problem(
        Lower, "lower", Vector(torch.zeros(4, dtype=DOUBLE)), sgd(0.1), type=betty.register(bl.Implicit(bl.CG(10)))
    )
    upper = problem(Upper, "upper", Vector(torch.ones(4, dtype=DOUBLE)), sgd(0.0))
    third = problem(Body, "body", body, sgd(0.0))
    dependencies = edges(u2l={upper: [lower]}, l2u={lower: [upper], third: [lower]})
    run([upper, lower, third], dependencies, 4)
    # Body's own steps and lower's: two forwards an iteration, none of the hook's.
    assert int(body[1].num_batches_tracked) == 8
    assert body[1].track_running_stats


def test_a_program_that_is_over_leaves_nothing_behind():
    case = Reweighting(bl.Unrolled())
    case.run()
    gone = weakref.ref(case.inner)
    del case
    gc.collect()
    assert gone() is None


def test_nothing_of_betty_is_touched_before_it_is_asked_for():
    code = (
        "import sys, bilevel, bilevel.integrations.betty as ours\n"
        "assert 'betty' not in sys.modules\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from betty.hypergradient import jvp_fn_mapping as table\n"
        "before = dict(table)\n"
        "name = ours.register(bilevel.Implicit(bilevel.CG(3)))\n"
        "assert {k: v for k, v in table.items() if k != name} == before and name in table\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_status_and_residual_of_every_solve_reach_bettys_log():
    quadratic = Quadratic()
    name = betty.register(bl.Implicit(bl.CG(1, tol=1e-12)))
    upper, lower, dependencies = quadratic.problems(2, type=name)
    run([upper, lower], dependencies, 6)
    said = [line for line in lower.logger.lines if "Hypergradient" in line]
    assert len(said) == 3
    assert all('[Problem "lower"] [Hypergradient for "upper"] MAX_STEPS || ' in line for line in said)
    stats = [each for each in lower.logger.stats if each[0] == "lower/hypergradient"]
    assert len(stats) == 3
    _, step, figures = stats[-1]
    assert step == 6
    assert 0 < figures["linear_residual"] < 1
    assert figures["linear_steps"] == 1
    assert figures["status"] == bl.Status.MAX_STEPS.code


def test_the_probes_say_what_the_installed_release_does():
    found = betty.installed()
    if found.version == "0.2.1":
        assert set(found.defects) == {"cg", "iterative"}
        assert "54%" in found.defects["cg"]
        assert "KeyError('params')" in found.defects["iterative"]
    if found.version == "0.1.1":
        assert {"cg", "darts"} <= set(found.defects)
