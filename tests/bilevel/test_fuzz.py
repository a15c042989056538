"""Random problems, pytrees, dtypes, optimizers and estimators against programs written by hand; benchmarks/fuzz.py runs
thousands of them."""

import dataclasses
import functools

import fuzzing
import fuzzing_oracle as oracle
import pytest
import torch
from fuzzing_expected import tasks_of
from fuzzing_problems import Choices, build

import bilevel as bl

SEED, DRAWS = 7, 60
FOUND = {  # the simplest draws of what the fuzz test has found so far
    "an inner leaf that f alone uses, cg": Choices(seed=1, estimator="implicit", steps=30, f_only=True),
    "the same, in float32": Choices(seed=1, estimator="reduced", steps=30, f_only=True, float32=True),
    "fewer examples than parameters": Choices(
        seed=1, estimator="implicit", steps=30, enters=("weights",), regularized=False
    ),
    "solved already, corrected": Choices(seed=1, estimator="corrected", converge=True, solved=True, nu=0.01, steps=0),
    "solved already, unrolled": Choices(seed=1, converge=True, solved=True, nu=0.01, steps=0),
    "coupled decay": Choices(seed=1, estimator="implicit", steps=8, decay="float"),
    "decoupled decay": Choices(seed=1, estimator="implicit", steps=8, optimizer="adamw", decay="float"),
    "decoupled decay, corrected": Choices(seed=1, estimator="corrected", steps=8, optimizer="adamw", decay="float"),
    "random features": Choices(seed=1, steps=4, enters=("features",), random="features"),
    "random features, truncated": Choices(seed=1, steps=4, enters=("features",), random="features", last=2),
    "heads in turn": Choices(seed=1, steps=4, heads=True, per_step=True, momentum="float"),
    "heads in turn, adam": Choices(seed=1, steps=4, heads=True, per_step=True, optimizer="adam"),
    "a leaf that f alone uses under decay": Choices(seed=1, steps=4, f_only=True, decay="float"),
    "tasks that stop at different steps": Choices(seed=2, converge=True, nu=0.01, tasks=2, steps=0),
    "momentum per leaf": Choices(seed=1, steps=3, momentum="leaf", inner_tree="nested"),
    "betas per leaf": Choices(seed=1, steps=3, optimizer="adam", momentum="leaf"),
    "a tree of floats": Choices(seed=1, steps=3, lr="tree"),
    "state and result": Choices(seed=1, estimator="reduced", steps=8, warm="both"),
}


@functools.cache
def checked(index):
    return fuzzing.check(fuzzing.choose(SEED, index))


@pytest.mark.parametrize("index", range(DRAWS))
def test_a_random_draw(index):
    assert_sound(checked(index))


@pytest.mark.parametrize("name", FOUND)
def test_a_draw_that_once_failed(name):
    assert fuzzing.repaired(FOUND[name]) == FOUND[name]
    assert_sound(fuzzing.check(FOUND[name]))


def assert_sound(found):
    story = "\n".join(f"{finding.kind}: {finding.text}" for finding in found.findings)
    assert not found.findings, f"fuzzing.check({found.choices.brief()})\n{story}"


def test_refusals_and_failures_do_not_hide_what_is_compared():
    """Most draws end in a number that is compared, most of these to many digits, and some of every estimator."""
    done = [checked(index) for index in range(DRAWS)]
    compared = [each for each in done if each.outcome == "number"]
    assert len(compared) > 0.6 * DRAWS
    assert {each.choices.estimator for each in compared} == {each.choices.estimator for each in done}
    assert len({each.choices.estimator for each in done}) == 7
    exact = [each.digits for each in compared if not each.choices.float32 and each.choices.estimator != "corrected"]
    assert sorted(exact)[len(exact) // 4] > 9


def test_a_draw_is_reproducible():
    assert fuzzing.choose(3, 11) == fuzzing.choose(3, 11) != fuzzing.choose(3, 12)
    choices = fuzzing.choose(3, 11)
    assert eval(choices.brief(), {"Choices": Choices}) == choices
    one, two = build(choices), build(choices)
    assert all(torch.equal(a, b) for a, b in zip(one.inner, two.inner, strict=True))


def test_every_draw_survives_its_own_repair():
    for index in range(300):
        choices = fuzzing.choose(1, index)
        assert fuzzing.repaired(choices) == choices


def scaled(hg, outer, inner, batches):
    hg.grad["n0"].mul_(1 + 1e-9)
    return hg


def aliased(hg, outer, inner, batches):
    return dataclasses.replace(hg, outer_loss=hg.inner["n0"].view(()))


def moved(hg, outer, inner, batches):
    inner["n0"].add_(1e-30)
    return hg


def refused(hg, outer, inner, batches):
    raise ValueError("no")


def failed(hg, outer, inner, batches):
    return dataclasses.replace(hg, code=bl.Status.BREAKDOWN.code)


def drew(hg, outer, inner, batches):
    hg.inner["n0"].add_(torch.rand(()).to(hg.inner["n0"].dtype))
    return hg


def raw(hg, outer, inner, batches):
    raise KeyError("n0")


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (scaled, "wrong number"),
        (aliased, "shared storage"),
        (moved, "input changed"),
        (failed, "failed what it ought to handle"),
        (drew, "wrong inner"),
        (raw, "raw error"),
        (refused, "raw error"),  # a sentence, but not one of the library's
    ],
)
def test_a_planted_error_is_found(plant, kind, monkeypatch):
    choices = Choices(seed=2)
    assert fuzzing.check(choices).findings == []
    honest = bl.hypergradient

    def dishonest(problem, outer, inner, batches, **keywords):
        return plant(honest(problem, outer, inner, batches, **keywords), outer, inner, batches)

    monkeypatch.setattr(bl, "hypergradient", dishonest)
    assert kind in {finding.kind for finding in fuzzing.check(choices).findings}


def test_zeros_where_a_refusal_is_due_are_found(monkeypatch):
    choices = Choices(estimator="implicit", enters=(), lr="learned")
    assert fuzzing.check(choices).outcome == "refused"
    assert fuzzing.check(choices).findings == []
    wrong = bl.hypergradient

    def blind(problem, outer, inner, batches, *, solver, estimator):
        return wrong(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())

    monkeypatch.setattr(bl, "hypergradient", blind)
    assert "not refused" in {finding.kind for finding in fuzzing.check(choices).findings}


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_the_oracle_agrees_with_finite_differences(optimizer):
    """The hand-written unroll is itself checked, by nothing but its own outer loss."""
    choices = fuzzing.repaired(
        Choices(seed=4, steps=5, model="tanh", enters=("weights", "reg"), start="init", optimizer=optimizer,
                lr="learned", momentum="learned", decay="learned")
    )  # fmt: skip
    task = tasks_of(build(choices), build(choices).outer)[0]
    found, _ = oracle.unrolled(task, 5, oracle.Rounding())

    def value(name, step):
        xs = task.xs | {name: task.xs[name] + step}
        return task.f(oracle.descend(task, xs, 5, oracle.Rounding()).ys, xs).detach()

    for name, gradient in zip(task.xs, found, strict=True):
        step = 1e-5 * torch.ones_like(task.xs[name])
        difference = (value(name, step) - value(name, -step)) / 2e-5
        torch.testing.assert_close(gradient.sum(), difference, rtol=1e-6, atol=1e-9)


def test_the_oracles_of_the_solution_agree_with_a_long_unroll():
    task = tasks_of(built := build(Choices(seed=5, enters=("weights", "shift"), converge=True)), built.outer)[0]
    found, run = oracle.unrolled(task, 300, oracle.Rounding())
    system = oracle.linearized(task, run.ys, 300, 0.0, oracle.Rounding())
    v = torch.linalg.solve(system.matrix, system.b)
    corrected, _ = oracle.corrected(task, 300, oracle.Rounding(), 1e-4, "symmetric")
    for a, b, c in zip(found, system.gradient(v), corrected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
    assert torch.allclose(oracle.krylov(system.matrix, system.b, torch.zeros_like(v), 60)[-1], v, rtol=1e-9)
    assert torch.allclose(oracle.neumann(system.matrix, system.b, 3000, 0.3), v, rtol=1e-9)
