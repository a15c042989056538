"""Compare a result of the library with what was expected, and hold it to what every result promises."""

import dataclasses
import math

import torch
from fuzzing_expected import Expected, double, moved, tasks_of
from fuzzing_oracle import Partial
from fuzzing_problems import Built, Choices
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong: `kind` groups, `text` explains."""

    kind: str
    text: str


def judge(
    built: Built, expected: Expected, hg: bl.Hypergradient, messages: list[str]
) -> tuple[str, float, list[Finding]]:
    """What became of the draw, the digits that were compared, and the findings."""
    c, findings = built.choices, list[Finding]()

    def find(kind: str, text: str) -> None:
        findings.append(Finding(kind, text))

    for kind, text in _promises(built, hg):
        find(kind, text)
    grads = [leaf.double() for leaf in pytree.tree_leaves(hg.grad)]
    if expected.must_refuse:
        find("not refused", f"{expected.must_refuse}; it gave {[d.tolist() for d in grads]} with {hg.status.name}")
        return "refused", 0.0, findings
    if not expected.number:
        return "invariants", 0.0, findings
    wrong, digits = _difference(expected.grads, grads, expected)
    residual = hg.stats.get("linear_residual")
    if not hg.status.failed and residual is not None and float(torch.as_tensor(residual).max()) > 1.05:
        find("not failed", f"{hg.status.name} at a linear residual of {residual}")
    if hg.status.failed:
        if not expected.may_fail and not expected.must_fail:
            find("failed what it ought to handle", f"{hg.status.name}; the gradient is off by {wrong or 'nothing'}")
        if hg.status is bl.Status.NEGATIVE_CURVATURE and not _among(c, expected, grads):
            find("unsafe iterate", f"NEGATIVE_CURVATURE with {[d.tolist() for d in grads]}, no iterate of CG")
        return "failed", 0.0, findings
    if expected.must_fail:
        find("not failed", f"{hg.status.name} where the linear system is unsolved")
        return "failed", 0.0, findings
    odd = any(answer.others for answer in expected.answers)  # indefinite or singular: any Krylov iterate will do
    if odd:
        if not _among(c, expected, grads):
            find("wrong number", f"{hg.status.name} on a singular or indefinite system: {[d.tolist() for d in grads]}")
    elif wrong:
        find("wrong number", f"{hg.status.name}, {wrong}")
    for kind, text in _values(built, expected, hg):
        find(kind, text)
    for kind, text in _warnings(built, expected, messages):
        find(kind, text)
    return ("vague" if odd or digits < 1 else "number"), digits, findings


def _difference(right: Partial, given: list[Tensor], expected: Expected) -> tuple[str, float]:
    """What is wrong with a gradient, and to how many digits the comparison went."""
    texts, digits = [], 16.0
    for i, (a, b) in enumerate(zip(right, given, strict=True)):
        want = torch.zeros_like(b) if a is None else a
        # not <=: a NaN is wrong
        if want.shape != b.shape or not float((want - b).abs().max()) <= expected.tolerance[i]:
            texts.append(f"leaf {i}: {b.tolist()} for {want.tolist()} (tolerance {expected.tolerance[i]:.1e})")
    if expected.scale > 0:
        digits = -math.log10(max(expected.tolerance) / expected.scale + 1e-16)
    return "; ".join(texts), digits


def _among(c: Choices, expected: Expected, grads: list[Tensor]) -> bool:
    """Whether a gradient belongs to some safe iterate of conjugate gradients (not asked of tasks, or float32)."""
    if c.tasks or c.float32 or not any(answer.others for answer in expected.answers):
        return all(bool(d.isfinite().all()) for d in grads)
    for other in expected.answers[0].others:
        full = [torch.zeros_like(b) if a is None else a for a, b in zip(other, grads, strict=True)]
        size = torch.stack([a.norm() for a in full]).norm()
        if all((a - b).abs().max() <= 1e-5 * size + 1e-12 for a, b in zip(full, grads, strict=True)):
            return True
    return False


def _promises(built: Built, hg: bl.Hypergradient) -> list[tuple[str, str]]:
    """Structure, dtypes, flags and storages of a result."""
    found = []
    outer = built.pack_outer(built.outer)
    if pytree.tree_structure(hg.grad) != pytree.tree_structure(outer):
        found.append(("structure", f"grad is {pytree.tree_structure(hg.grad)}"))
    if pytree.tree_structure(hg.inner) != built.inner_spec:
        found.append(("structure", f"inner is {pytree.tree_structure(hg.inner)}"))
    for name, values, like in (("grad", hg.grad, list(built.outer.values())), ("inner", hg.inner, built.inner)):
        for a, b in zip(pytree.tree_leaves(values), like, strict=True):
            if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, False):
                found.append(("structure", f"{name} holds {a.shape}, {a.dtype}, requires_grad={a.requires_grad}"))
    groups = {
        "inputs": [built.outer, built.inner, built.inner_batches, built.outer_batch, built.curvature],
        **{f"grad {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(hg.grad))},
        **{f"inner {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(hg.inner))},
        "outer_loss": hg.outer_loss,
        "inner_loss": hg.inner_loss,
        "state": hg.state,
    }
    owner: dict[int, str] = {}
    for name, values in groups.items():
        here = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
        for pointer in here - {0}:
            if pointer in owner:
                pair = f"{name.split()[0]} and {owner[pointer].split()[0]}"
                found.append(("shared storage", pair))
            owner[pointer] = name
    for name in ("outer_loss", "inner_loss"):
        value = getattr(hg, name)
        if value.shape != () or value.requires_grad or value.dtype != built.choices.dtype:
            found.append(("structure", f"{name} is {value!r}"))
    return found


def _values(built: Built, expected: Expected, hg: bl.Hypergradient) -> list[tuple[str, str]]:
    """y and the losses."""
    c, found = built.choices, []
    inner = [leaf.double() for leaf in pytree.tree_leaves(hg.inner)]
    away = max(float((a - b.detach()).abs().max()) for a, b in zip(inner, expected.ys, strict=True))
    # Where coupled decay is in force, whether a tolerance is on g alone or on the whole condition decides when to stop.
    if not away <= expected.ys_tolerance and not (c.converge and c.decay != "none"):
        found.append(("wrong inner", f"off by {away:.1e} (tolerance {expected.ys_tolerance:.1e}), {hg.stats}"))
    steps = hg.stats.get("inner_steps")
    ours = max(answer.run.steps for answer in expected.answers)
    if c.converge and c.decay == "none" and c.estimator != "corrected" and c.tasks == 0 and steps != ours:
        found.append(("wrong steps", f"{steps} for {ours}"))
    if c.random != "none":
        return found
    tasks = tasks_of(built, moved(built.outer) if c.warm != "cold" else built.outer)
    f = g = 0.0
    for t, task in enumerate(tasks):
        ys = [double(leaf[t]) if c.tasks else double(leaf) for leaf in inner]
        batch = task.batch(max((0 if c.converge else c.steps) - 1, 0))
        f += float(task.f(ys, task.xs)) / len(tasks)
        g += float(task.g(ys, task.xs, batch, task.program.embed(task.xs, batch))) / len(tasks)
    bound = 100 * torch.finfo(c.dtype).eps
    for name, right, value in (("outer_loss", f, hg.outer_loss), ("inner_loss", g, hg.inner_loss)):
        if not abs(float(value) - right) <= bound * (abs(right) + 1):
            found.append((f"wrong {name}", f"{float(value)} for {right}"))
    return found


def _warnings(built: Built, expected: Expected, messages: list[str]) -> list[tuple[str, str]]:
    found = []
    nothing = [i for i, d in enumerate(expected.grads) if d is None or not d.any()]
    for message in messages:
        if "influences neither" not in message:
            found.append(("stray warning", message))
        elif not nothing:
            found.append(("false warning", message))
    if built.choices.unused and not any("influences neither" in message for message in messages):
        found.append(("no warning", "an outer leaf that nothing uses"))
    return found
