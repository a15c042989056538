"""Programs of many levels: what lies below a problem follows it, whatever the order of its edges."""

import betty_programs as programs
import pytest
import torch
from betty_programs import DOUBLE, Quiet, Vector, Watched, edges, problem, run, sgd

import bilevel as bl
from bilevel.integrations import betty

SOLVED = bl.Implicit(bl.CG(10, tol=1e-12))


def vector(value):
    return Vector(torch.full((2,), value, dtype=DOUBLE))


def loss(function):
    """A problem whose loss is function(own value, problems by name)."""

    class Own(Quiet):
        def training_step(self, batch):
            return function(self.module(), self).sum()

    return Own


def level(name, kind, rate, *, start=0.0, below=None, **config):
    """A problem of two numbers, of a class or with the loss of a function, moved by SGD; it may be above others."""
    config = {"type": betty.register(SOLVED, below=below), "retain_graph": True} | config
    return problem(kind if isinstance(kind, type) else loss(kind), name, vector(start), sgd(rate), **config)


class Top(Watched):
    def training_step(self, batch):
        return self.c().sum()


def four_levels(below):
    """a*(b) = b;  b*(c) = argmin (b - c)^2 / 2 + a(b)^2 / 2 = c / 2;  c*(x): (c - x)^2 / 2 + b(c)^2 / 2, so 0.8 x."""
    top = problem(Top, "x", vector(1.0), sgd(0.0))
    c = level("c", lambda c, s: (c - s.x()) ** 2 / 2 + s.b() ** 2 / 2, 0.3, below=below, unroll_steps=25)
    b = level("b", lambda b, s: (b - s.c()) ** 2 / 2 + s.a() ** 2 / 2, 0.3, below=below, unroll_steps=15)
    a = level("a", lambda a, s: (a - s.b()) ** 2 / 2, 0.9, unroll_steps=10)
    run([top, c, b, a], edges(u2l={top: [c], c: [b], b: [a]}, l2u={a: [b], b: [c], c: [top]}), 25 * 15 * 10)
    return float(top.gradients[-1][0][0]), b


def test_four_levels_are_exact_when_each_follows_with_what_lies_below_it():
    found, b = four_levels(30)
    assert found == pytest.approx(0.8, rel=1e-4)
    assert "below_left: " in b.logger.lines[-1]
    found, _ = four_levels(bl.Descent(bl.SGD(0.5), 20))
    assert found == pytest.approx(0.8, rel=1e-4)


@programs.recent
@pytest.mark.parametrize("order", ["a b", "b a"])
def test_the_order_of_edges_does_not_matter(order):
    """a*(m) = m;  b*(a, m) = a + m;  m*(x) = argmin (m - x)^2 / 2 + b^2 / 2 = x / 5."""

    class Upper(Watched):
        def training_step(self, batch):
            return self.m().sum()

    top = problem(Upper, "x", vector(1.0), sgd(0.0))
    m = level("m", lambda m, s: (m - s.x()) ** 2 / 2 + s.b() ** 2 / 2, 0.15, below=40, unroll_steps=25)
    low = {
        "a": level("a", lambda a, s: (a - s.m()) ** 2 / 2, 0.9, unroll_steps=4),
        "b": level("b", lambda b, s: (b - s.m() - s.a()) ** 2 / 2, 0.9, unroll_steps=4),
    }
    u2l = {top: [m], m: [low[name] for name in order.split()]}
    run([top, m, *low.values()], edges(u2l=u2l, l2u={low["a"]: [low["b"], m], low["b"]: [m], m: [top]}), 400)
    torch.testing.assert_close(top.gradients[-1][0], torch.full((2,), 0.2, dtype=DOUBLE), rtol=1e-4, atol=0)


def above_a(c, s):
    return (c - s.x()) ** 2 / 2 + s.a() ** 2 / 2


def chain(low, *, below=20, optimizer=None, middle=None, scheduler=None):
    """A middle problem above `low`, with the classes given; two steps of each."""
    top = problem(Top, "x", vector(1.0), sgd(0.0))
    c = level("c", middle or above_a, 0.3, start=0.5, below=below, unroll_steps=2)
    a = problem(low, "a", vector(0.1), optimizer or sgd(0.5), scheduler=scheduler, unroll_steps=2, type="neumann")
    run([top, c, a], edges(u2l={top: [c], c: [a]}, l2u={a: [c], c: [top]}), 4)
    return top


following = loss(lambda a, s: (a - s.c()) ** 2 / 2)


class Clipped(following):
    def param_callback(self):
        with torch.no_grad():
            self.module.value.clamp_(min=0)


class Holding(Quiet):
    def training_step(self, batch):
        if not hasattr(self, "theirs"):
            self.theirs = list(self.a.module.parameters())
        return ((self.module() - self.x()) ** 2 / 2 + self.theirs[0] ** 2 / 2).sum()


REFUSED = {
    "a rate without the weight decay": (
        {"low": following, "optimizer": sgd(0.5, weight_decay=0.3), "below": bl.Descent(bl.SGD(0.5), 20)},
        r"problem a is moved with weight_decay=0.3, and SGD\(lr=0.5",
    ),
    "a callback": ({"low": Clipped}, r"problem a lies below and is to follow, and it uses param_callback"),
    "Adam": (
        {"low": following, "optimizer": lambda p: torch.optim.Adam(p, lr=0.1)},
        r"problem a lies below .* steps of Adam .* below=bilevel.Descent\(bilevel.SGD\(lr=0.1\), 20\)",
    ),
    "a rate that has gone": (
        {"low": following, "optimizer": sgd(1e-6)},
        r"problem c: what lies below it does not follow in 20: 100% of its gradient's dependence is left",
    ),
    "a middle that holds the lowest's parameters": (
        {"low": following, "middle": Holding},
        r"training_step of problem c, or its gradient, is not the same .* holds on to parameter objects",
    ),
}


@programs.recent
@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_follow_is_refused(label):
    settings, said = REFUSED[label]
    with pytest.raises(ValueError, match=said):
        chain(**settings)


@programs.recent
def test_a_gradient_for_what_itself_follows_is_refused():
    """The upper problem uses both: Betty's paths take one answer after the other, and these two answer together."""

    class Both(Watched):
        def training_step(self, batch):
            return self.c().sum() + self.a().sum()

    top = problem(Both, "x", vector(1.0), sgd(0.0))
    c = level("c", above_a, 0.3, start=0.5, below=20, unroll_steps=2)
    a = level("a", lambda a, s: (a - s.c() * s.x()) ** 2 / 2, 0.5, start=0.1, unroll_steps=2)
    with pytest.raises(ValueError, match=r"problem a lies below c, .* the two answer together"):
        run([top, c, a], edges(u2l={top: [c, a], c: [a]}, l2u={a: [c], c: [top]}), 4)


def test_two_that_answer_each_other_through_a_third_are_refused():
    """a and b both have c below them: what c does for the one moves the other."""

    class Both(Watched):
        def training_step(self, batch):
            return self.a().sum() + self.b().sum()

    top = problem(Both, "x", vector(1.0), sgd(0.0))
    a, b = (level(name, lambda own, s: (own - s.x()) ** 2 / 2 + own * s.c(), 0.1, start=0.5, below=20) for name in "ab")
    c = level("c", lambda c, s: (c - s.a() - s.b()) ** 2 / 2, 0.5, start=0.1)
    dependencies = edges(u2l={top: [a, b], a: [c], b: [c]}, l2u={c: [a, b], a: [top], b: [top]})
    with pytest.raises(ValueError, match=r"problems a and b answer each other through what lies below both"):
        run([top, a, b, c], dependencies, 1)


@programs.recent
def test_how_far_what_lies_below_went_is_in_the_log():
    """On the batch of the moment: where that pulls it away, the derivative is taken elsewhere than where it is."""
    figures = {}
    for noise in (0.0, 0.5):

        class Noisy(Quiet):
            def training_step(self, batch):
                a = self.module()
                return ((a - self.c()) ** 2 / 2 + batch[0] * a).sum()

        c = level("c", above_a, 0.3, start=0.5, below=20, unroll_steps=20)
        batches = [(torch.tensor(sign * noise, dtype=DOUBLE),) for sign in (1.0, -1.0)]
        a = problem(Noisy, "a", vector(0.1), sgd(0.1), batches=batches, unroll_steps=20, type=betty.register(SOLVED))
        top = problem(Top, "x", vector(1.0), sgd(0.0))
        run([top, c, a], edges(u2l={top: [c], c: [a]}, l2u={a: [c], c: [top]}), 400)
        figures[noise] = next(stats for tag, _, stats in reversed(c.logger.stats) if tag == "c/hypergradient")
    assert figures[0.0]["below_moved"] < 0.01
    assert figures[0.5]["below_moved"] > 0.2
    assert figures[0.0]["below_left"] == pytest.approx(0.9**20, rel=0.01)
