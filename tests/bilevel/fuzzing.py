"""Draw a bilevel problem at random, ask the library, compare with the oracle. benchmarks/fuzz.py is the long run.

    choices = choose(seed, index);   findings, outcome = check(choices)

Everything follows from (seed, index). Only the public API of bilevel is used.
"""

import dataclasses
import random
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from fuzzing_expected import (
    AT_SOLUTION,
    MAX_STEPS,
    UNROLLED,
    Expected,
    expect,
    inner_tol,
    moved,
    neumann_of,
    solve_tol,
    tasks_of,
)
from fuzzing_oracle import Rounding, descend
from fuzzing_problems import Built, Choices, build
from fuzzing_results import Finding, judge
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl

REFUSALS = (ValueError, TypeError, bl.BilevelError, bl.NotTwiceDifferentiableError)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What became of a draw: "number" (compared to `digits`), "vague" (no digits to compare), "invariants" (no single
    right number), "refused", "failed".
    """

    choices: Choices
    outcome: str
    findings: list[Finding]
    digits: float = 0.0


def choose(seed: int, index: int) -> Choices:
    """The draw of this index."""
    r = random.Random(f"{seed}-{index}")

    def often(value: Any, *others: Any, p: float = 0.6) -> Any:
        return value if r.random() < p else r.choice(others)

    estimator = r.choice([*UNROLLED, *UNROLLED, "implicit", "implicit", "reduced", "corrected", "corrected", "first"])
    ways = ("weights", "reg", "shift", "features", "direct", "both")
    enters = tuple(e for e in ways if r.random() < 0.3) or often((r.choice(ways[:4]),), ())
    drawn = Choices(
        seed=r.randrange(10**6),
        estimator=estimator,
        steps=r.randrange(9) if estimator not in AT_SOLUTION or r.random() < 0.6 else r.choice([15, 30]),
        model=r.choice(["quadratic", "quadratic", "softmax", "tanh", "relu"]),
        enters=enters,
        start=often("given", "init", "proximal"),
        optimizer=often("sgd", "nesterov", "adam", "adamw", p=0.5),
        lr=often("float", "learned", "leaf", "number", "tree", p=0.65),
        momentum=often("none", "float", "float", "learned", "leaf"),
        decay=often("none", "float", "float", "learned", "leaf"),
        dampening=r.random() < 0.2,
        unused=r.random() < 0.1,
        f_only=r.random() < 0.1,
        heads=r.random() < 0.15,
        regularized=r.random() < 0.9,
        random=often("none", "dropout", "randn", "features", p=0.8),
        inner_tree=r.choice(["bare", "dict", "nested"]),
        outer_tree=r.choice(["bare", "dict", "nested"]),
        layout=often("plain", "transposed", "strided", "expanded", "views"),
        float32=r.random() < 0.2,
        per_step=r.random() < 0.4,
        curvature=r.random() < 0.3,
        converge=r.random() < 0.12,
        solved=r.random() < 0.06,
        segment=often(None, 1, 2, 3, 20),
        last=often(None, 1, 2, 3, 20, p=0.7),
        linear=r.choice(["cg", "cg", "short", "neumann", "wild", "dense"]),
        damping=often(0.0, 0.3, p=0.8),
        warm=often("cold", "inner", "adjoint", "both"),
        scheme=r.choice(["symmetric", "forward"]),
        nu=often(None, 1e-3, 1e-2, 0.1, p=0.4),
        tasks=often(0, 1, 2, 3),
        chunk=r.choice([None, 1, 2, 3]),
        requires_grad=r.random() < 0.3,
    )
    return repaired(drawn if r.random() < 0.15 else in_sight(drawn))


def in_sight(c: Choices) -> Choices:
    """The draw without the paths that its estimator must refuse: most draws should end in a number."""
    if c.estimator in UNROLLED:
        return c
    floats = {name: "float" for name in ("lr", "momentum") if getattr(c, name) in ("learned", "leaf", "number")}
    c = dataclasses.replace(c, **floats)
    if c.optimizer == "adamw":
        c = dataclasses.replace(c, decay="none")
    if c.estimator == "first":
        seen = tuple(e for e in c.enters if e in ("direct", "both")) or ("direct",)
        return dataclasses.replace(c, enters=seen, decay="float" if c.decay != "none" else "none",
                                   start="init" if c.start == "proximal" else c.start)  # fmt: skip
    if c.estimator == "corrected" and c.decay != "none":
        c = dataclasses.replace(c, decay="float")
    enters = tuple(e for e in c.enters if c.start == "given" or e != "features") or ("shift",)
    return dataclasses.replace(c, enters=enters, start="proximal" if c.start == "init" else c.start)


def repaired(c: Choices) -> Choices:
    """The nearest draw that means something; draws that mean something stay as they are."""

    def put(**fields: Any) -> None:
        nonlocal c
        c = dataclasses.replace(c, **fields)

    if c.estimator not in AT_SOLUTION:
        put(curvature=False)
    if c.estimator not in UNROLLED:
        put(last=None)
    if c.estimator != "segments":
        put(segment=None)
    if c.estimator not in ("implicit", "reduced"):
        put(linear="cg", damping=0.0)
    if c.estimator == "reduced" and c.linear not in ("cg", "short"):
        put(linear="cg")
    if c.estimator != "reduced":
        put(warm="cold")
    if c.estimator != "corrected":
        put(scheme="symmetric", nu=None)
    if c.steps > 8 and c.model in ("tanh", "relu"):
        put(steps=8)
    if c.converge or c.solved:
        put(
            model=c.model if c.model == "softmax" else "quadratic",
            optimizer="sgd" if c.optimizer != "nesterov" else "nesterov",
            lr="float", momentum=c.momentum if c.momentum == "float" else "none", regularized=True, random="none",
            decay=c.decay if c.estimator in AT_SOLUTION and not c.solved else "none",
            per_step=False, f_only=False, heads=False, last=None,
        )  # fmt: skip
    if c.converge:
        put(steps=0, nu=None if c.float32 else 1e-2)
    if c.solved:
        put(start="given", layout="plain", curvature=False)
    if c.optimizer == "nesterov":
        put(dampening=False, momentum="float" if c.momentum == "none" else c.momentum)
    if c.optimizer != "sgd" or c.momentum == "none":
        put(dampening=False)
    if c.tasks == 0:
        put(chunk=None)
    if c.tasks and c.lr == "number":
        put(lr="leaf")
    if c.start == "proximal":
        put(enters=tuple(e for e in c.enters if e != "features"))
    if c.estimator == "corrected" and (c.optimizer, c.momentum, c.decay) != ("sgd", "none", "none"):
        put(f_only=False, heads=False)  # whether a leaf that f alone uses decays on one side only is nobody's contract
    if c.random == "features" and ("features" not in c.enters or c.estimator not in UNROLLED or c.tasks):
        put(random="none")
    if c.random != "none":
        put(float32=False)
    if c.start != "given" and c.layout == "views":
        put(layout="plain")
    learned = {"learned", "leaf", "number"} & {c.lr, c.momentum, c.decay}
    if not c.enters and c.start == "given" and not learned:
        put(enters=("reg",))
    if c.inner_tree == "bare" and (c.model in ("tanh", "relu") or c.heads or c.f_only):
        put(inner_tree="dict")
    return c


def posed(built: Built) -> tuple[bl.Problem, bl.Batches]:
    """The draw as the library takes it."""
    c, p = built.choices, built.program

    def loss(function: Any) -> Any:
        return lambda inner, outer, batch: function(pytree.tree_leaves(inner), built.named(outer), batch)

    problem = bl.Problem(
        inner_loss=loss(p.g),
        outer_loss=loss(p.f),
        init=None if p.init is None else lambda x, b: built.pack_inner(p.init(built.named(x), b)),
        features=(lambda x, b: p.embed(built.named(x), b)) if "features" in c.enters else None,
    )
    problem = bl.proximal(problem, p.strength) if p.strength else problem
    inner = bl.PerStep(built.inner_batches) if c.per_step else built.inner_batches[0]
    return problem, bl.Batches(inner=inner, outer=built.outer_batch, curvature=built.curvature)


def solver_of(built: Built) -> bl.InnerSolver:
    """The inner solver."""
    c, p = built.choices, built.program

    def hyper(name: str) -> Any:
        kind, values = getattr(c, name), p.hyper[name]
        if kind == "learned":
            return lambda outer: values(built.named(outer))[0]
        if kind in ("leaf", "number"):
            return lambda outer: built.pack_inner(values(built.named(outer)))
        return built.pack_inner(values({})) if kind == "tree" else values({})[0]

    if c.optimizer in ("sgd", "nesterov"):
        rest = {"dampening": p.hyper["dampening"]({})[0], "nesterov": c.optimizer == "nesterov"}
        optimizer: bl.Optimizer = bl.SGD(hyper("lr"), hyper("momentum"), weight_decay=hyper("decay"), **rest)
    else:
        kind = bl.Adam if c.optimizer == "adam" else bl.AdamW
        optimizer = kind(hyper("lr"), betas=(hyper("momentum"), 0.99), eps=1e-3, weight_decay=hyper("decay"))
    if c.converge:
        return bl.Converge(optimizer, tol=inner_tol(c), max_steps=MAX_STEPS)
    return bl.Descent(optimizer, c.steps)


def estimator_of(c: Choices) -> bl.Estimator:
    """The estimator."""
    products = {"max_steps": 2 if c.linear == "short" else 60, "tol": solve_tol(c), "damping": c.damping}
    made: bl.Estimator
    if c.estimator in UNROLLED:
        made = bl.Unrolled(c.estimator, c.segment, c.last)
    elif c.estimator == "implicit":
        if c.linear == "dense":
            made = bl.Implicit(bl.Dense(damping=c.damping, tol=solve_tol(c)))
        elif c.linear in ("neumann", "wild"):
            steps, size = neumann_of(c)
            made = bl.Implicit(bl.Neumann(steps, size, damping=c.damping))
        else:
            made = bl.Implicit(bl.CG(**products))
    elif c.estimator == "reduced":
        warm = {"warm_inner": c.warm in ("inner", "both"), "warm_adjoint": c.warm in ("adjoint", "both")}
        made = bl.MemoryReduced(products["max_steps"], products["tol"], products["damping"], **warm)
    else:
        made = bl.FirstOrderCorrected(c.nu, c.scheme) if c.estimator == "corrected" else bl.FirstOrder()
    return bl.TaskMean(made, c.chunk) if c.tasks else made


@dataclasses.dataclass(frozen=True)
class Called:
    """What the library gave: a result, or the error it raised; and the random state it left."""

    result: bl.Hypergradient | None
    error: Exception | None
    messages: list[str]
    random_state: Tensor
    first_failed: bool
    posed: bool  # whether the call was made at all


def call(built: Built, estimator: bl.Estimator | None = None) -> Called:
    """One hypergradient; the second one of a pair for warm starts."""
    c = built.choices
    problem, batches = posed(built)
    inner = built.pack_inner(built.inner) if c.start == "given" else None
    keywords: dict[str, Any] = {"solver": None, "estimator": estimator or estimator_of(c)}
    torch.manual_seed(c.seed + 1)
    found, error, first_failed = None, None, False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            keywords["solver"] = solver_of(built)
            found = bl.hypergradient(problem, built.pack_outer(built.outer), inner, batches, **keywords)
            first_failed = c.warm != "cold" and found.status.failed
            if c.warm != "cold" and not first_failed:
                outer = built.pack_outer(moved(built.outer))
                found = bl.hypergradient(problem, outer, inner, batches, **keywords, state=found.state)
        except Exception as raised:  # a raw one is a finding
            error = raised
    return Called(
        found,
        error,
        [str(w.message) for w in caught],
        torch.get_rng_state(),
        first_failed,
        keywords["solver"] is not None,
    )


def solved(built: Built) -> Built:
    """The same draw from a start that is the inner solution."""
    c = built.choices
    ends = [descend(task, task.xs, 5000, Rounding(), tol=1e-10).ys for task in tasks_of(built, built.outer)]
    leaves = [torch.stack(leaf) if c.tasks else leaf[0] for leaf in zip(*ends, strict=True)]
    return dataclasses.replace(built, inner=[leaf.to(c.dtype).requires_grad_(c.requires_grad) for leaf in leaves])


def check(c: Choices) -> Checked:
    """Ask the library, ask the oracle, compare everything."""
    built = build(c)
    built = solved(built) if c.solved else built
    given = {"outer": built.outer, "inner": built.inner}
    given |= {"batches": [built.inner_batches, built.outer_batch, built.curvature]}
    before = {name: _frozen(value) for name, value in given.items()}
    called = call(built)
    if called.first_failed:  # there was nothing to start warm from
        built = dataclasses.replace(built, choices=dataclasses.replace(c, warm="cold"))
    expected = expect(built)
    findings = [Finding("input changed", name) for name, value in given.items() if not _same(before[name], value)]
    outcome, digits = "number", 0.0
    if called.error is not None:
        outcome = "refused"
        findings += _judge_error(called, expected)
    else:
        assert called.result is not None
        outcome, digits, more = judge(built, expected, called.result, called.messages)
        findings += more
    again = call(dataclasses.replace(built, choices=c))
    if repr(again.error) != repr(called.error) or not _equal(again.result, called.result):
        findings.append(Finding("not deterministic", "the same seed gave another answer"))
    if not torch.equal(again.random_state, called.random_state):
        findings.append(Finding("not deterministic", "the same seed left another random state"))
    if c.estimator in UNROLLED and c.random != "none" and called.result is not None:
        findings += _keeps_agree(built, called)
    return Checked(c, outcome, findings, digits)


def _frozen(value: Any) -> list[Any]:
    """A copy of every tensor with its flags."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return [(leaf.detach().clone(), leaf.requires_grad, leaf.stride(), leaf._version, leaf.grad) for leaf in leaves]


def _same(before: list[Any], value: Any) -> bool:
    pairs = zip(before, _frozen(value), strict=True)
    return all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in pairs)


def _judge_error(called: Called, expected: Expected) -> list[Finding]:
    error = called.error
    assert error is not None
    text = f"{type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = str(Path(bl.__file__).parent) in last.filename and (last.line or "").startswith("raise ")
    if not isinstance(error, REFUSALS) or not own:
        return [Finding("raw error", text)]
    if not called.posed or not (expected.must_refuse or expected.may_refuse):
        return [Finding("refused what it ought to handle", text)]
    return []


def _equal(one: bl.Hypergradient | None, two: bl.Hypergradient | None) -> bool:
    if one is None or two is None:
        return one is two
    pairs = [(one.grad, two.grad), (one.inner, two.inner), (one.outer_loss, two.outer_loss), (one.state, two.state)]
    return one.status is two.status and all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for pair in pairs
        for a, b in zip(*map(pytree.tree_leaves, pair), strict=True)
        if isinstance(a, Tensor)
    )


def _keeps_agree(built: Built, called: Called) -> list[Finding]:
    """The three ways of keeping the trajectory: the same number and the same random state afterwards."""
    c = built.choices
    for keep in UNROLLED:
        other = call(built, estimator_of(dataclasses.replace(c, estimator=keep, segment=None)))
        if other.result is None or called.result is None:
            return [Finding("keeps differ", f"{keep}: {other.error!r}")]
        if not torch.equal(other.random_state, called.random_state):
            return [Finding("keeps differ", f"{keep} and {c.estimator} leave another random state")]
        for a, b in zip(*[pytree.tree_leaves(r.grad) for r in (other.result, called.result)], strict=True):
            if (a - b).abs().max() > 1e-9 * (a.abs().max() + b.abs().max() + 1e-12):
                return [Finding("keeps differ", f"{keep} and {c.estimator} give another gradient")]
    return []


def simplified(c: Choices, kind: str) -> Choices:
    """Fields put back to their simplest value, one after another, as long as a finding of this kind stays."""
    changed = True
    while changed:
        changed = False
        for field in dataclasses.fields(Choices):
            if field.name in ("seed", "estimator") or getattr(c, field.name) == field.default:
                continue
            simpler = repaired(dataclasses.replace(c, **{field.name: field.default}))
            if simpler != c and len(simpler.brief()) < len(c.brief()) and _still(simpler, kind):
                c, changed = simpler, True
    return c


def _still(c: Choices, kind: str) -> bool:
    return any(finding.kind == kind for finding in check(c).findings)
