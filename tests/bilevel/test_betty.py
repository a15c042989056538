"""Our estimators in Betty programs: against closed forms, programs written by hand, and Betty's own methods."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from betty_programs import (
    AT_SOLUTION,
    DOUBLE,
    Quadratic,
    Quiet,
    Reweighting,
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
