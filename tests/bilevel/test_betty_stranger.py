"""What strangers' Betty programs do: lists of parameters, filters, noise, frozen parts, sparse gradients."""

import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from betty_programs import (
    AT_SOLUTION,
    DOUBLE,
    Quiet,
    Vector,
    Watched,
    edges,
    problem,
    recent,
    relative,
    run,
    sgd,
    upper_gradient,
)
from torch import nn

import bilevel as bl
from bilevel.integrations import betty


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
