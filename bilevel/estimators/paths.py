"""Which paths the outer variable takes through a problem, found once and remembered.

    x -> y_0        x -> dg/dy        x -> the optimizer's algebra        x -> weight decay        x -> f

The problem is run on tensors without data, so that looking costs no memory; where a loss cannot be run on those, on
its own tensors.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.refusals import step_of
from bilevel.estimators.base import Estimator, Instance, Path
from bilevel.inner.dynamics import Dynamics
from bilevel.linear.operator import LinearOperator, Product
from bilevel.optim.base import Optimizer, held
from bilevel.outcome import NotTwiceDifferentiableError
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_MANY = 200
"""Steps of a dynamics not our own that are looked at."""
Paths = tuple[frozenset[Path], ...]
"""The paths of each outer tensor."""
_LASTING = frozenset({Path.INNER_LOSS, Path.STATIONARITY})
"""Paths that move the solution itself, not only the way there."""


def check(estimator: Estimator, instance: Instance) -> None:
    """Raise unless the estimator sees how each outer tensor acts.

    An outer tensor that acts along several paths must be seen on one of them (the start and the step size of an inner
    loop lose their influence as it converges), and an estimator at the solution must see all that move it. What an
    estimator leaves out by its nature, such as FirstOrder the inner loss, is its documented bias.

    Raises:
        TypeError: `sees` is no set of paths.
        ValueError: naming the tensors, the paths, what the estimator sees, and the remedy.
    """
    sees = estimator.sees_in(instance)
    if not isinstance(sees, frozenset) or not all(isinstance(path, Path) for path in sees):
        raise TypeError(f"{type(estimator).__name__}.sees is {sees!r}; a frozenset of bilevel.Path was needed")
    if frozenset(Path) - sees <= _impossible(instance):
        return
    blind = []
    for name, taken in zip(tree.names(instance.outer), of(instance) or (), strict=False):
        if not instance.solver.max_steps and Path.START in sees:
            taken = taken & {Path.START, Path.OUTER_LOSS}
        hidden = taken - sees
        if taken & sees:
            hidden = hidden & _LASTING if sees & _LASTING else frozenset()
        blind += [f"{name} through {path.value}" for path in Path if path in hidden]
    if blind:
        raise ValueError(_refusal(estimator, sees, blind))


def _impossible(instance: Instance) -> frozenset[Path]:
    """Paths that need not be looked for: no init, no hyper-parameter that is a function of x."""
    update = instance.solver.dynamics.update
    dynamics = instance.solver.dynamics
    constant = _ours(update) and not any(map(callable, tree.flatten(vars(update))[0]))
    constant = constant or (type(dynamics).__module__.startswith("bilevel.inner") and not dynamics.reads_outer)
    without_init = frozenset() if instance.problem.init else frozenset({Path.START})
    return without_init | (frozenset({Path.HYPERPARAMETER, Path.STATIONARITY}) if constant else frozenset())


def _ours(update: Optimizer | None) -> bool:
    """Whether it is one of the library that holds no other: a schedule acts by others, and at any step."""
    return update is not None and type(update).__module__.startswith("bilevel.optim") and not held(update)


def _soon(dynamics: Dynamics) -> bool:
    """Whether x does by the second step all that it ever does: in dynamics of the library without a user's function."""
    if dynamics.update is not None:
        return _prompt(dynamics.update)
    if dynamics.autonomous:
        return True
    fields = tree.flatten(vars(dynamics))[0] if type(dynamics).__module__.startswith("bilevel.inner") else [_soon]
    return not any(map(callable, fields)) and all(map(_prompt, held(dynamics)))


def _prompt(update: Optimizer) -> bool:
    """Whether it, and all that it holds, are optimizers of the library that do so."""
    ours = type(update).__module__.startswith("bilevel.optim") and not update.foreign
    return ours and not update.late and all(map(_prompt, held(update)))


def check_unreached(estimator: Estimator, instance: Instance, missed: frozenset[int]) -> None:
    """Raise if an outer tensor for which the estimator returned nothing does act on the problem."""
    names = tree.names(instance.outer)
    sees, ours = estimator.sees_in(instance), type(estimator).__module__.startswith("bilevel.")
    if ours and sees >= frozenset(Path):
        return  # what followed every path and arrived nowhere is on none
    taken = _at_any_step(instance)
    if taken is None:
        return
    # (A loop that stops by itself may have taken no step: then there was nothing to follow, which a status says.)
    followed = sees if ours and not instance.solver.fixed else frozenset()
    blind = [f"{names[i]} through {path.value}" for i in sorted(missed) for path in Path if path in taken[i] - followed]
    if blind and (instance.solver.max_steps or Path.START not in estimator.sees):
        said = estimator.missed(f"x enters as {'; '.join(blind)}")
        raise ValueError(said or _refusal(estimator, sees, blind))


def _refusal(estimator: Estimator, sees: frozenset[Path], blind: Sequence[str]) -> str:
    followed = ", ".join(path.value for path in Path if path in sees) or "nothing"
    remedy = "Use Unrolled(), which sees every path"
    if any(Path.START.value in each for each in blind):
        remedy = (
            "Write Unrolled(last=None), which backpropagates to the start"
            if Path.HYPERPARAMETER in sees
            else "Use Unrolled(), which sees every path (a start can also be made visible, with "
            "bilevel.proximal(problem, strength))"
        )
    elif Path.INNER_LOSS not in sees:
        remedy = "Use Unrolled(), Implicit(bilevel.CG(10)) or FirstOrderCorrected()"
    return (
        f"{type(estimator).__name__} cannot see how the outer variable acts here: it sees {followed}, but x enters as "
        f"{'; '.join(blind)}. Its hypergradient would be zero, which is wrong. {remedy}."
    )


def _at_any_step(instance: Instance) -> Paths | None:
    """The paths as they are now, at every batch of the steps: what was remembered may have been of another batch."""
    inner = instance.batches.inner
    steps = min(_MANY, instance.solver.max_steps)
    batches = [inner[step] for step in range(min(steps, len(inner)))] if isinstance(inner, PerStep) else [inner]
    taken: list[frozenset[Path]] | None = None
    for batch in batches or [None]:
        at = dataclasses.replace(instance, batches=dataclasses.replace(instance.batches, inner=batch))
        found = _probed(at if batches else instance, steps)
        if found is None:
            return None
        taken = list(found) if taken is None else [a | b for a, b in zip(taken, found, strict=True)]
    return None if taken is None else tuple(taken)


def of(instance: Instance) -> Paths | None:
    """The paths of each outer tensor, remembered with the problem; None if a function of the problem fails."""
    remembered = instance.problem.memo.setdefault("paths", {})
    # Momentum acts from the second step on; a user's own schedule may do so at any.
    steps = min(2 if _soon(instance.solver.dynamics) else _MANY, instance.solver.max_steps)
    signature = (
        tuple(tree.names(instance.outer)),
        instance.inner is None,
        instance.tasks is None,
        steps,
        instance.constant,
    )
    dynamics = instance.solver.dynamics
    for seen, found in remembered.get(signature, ()):
        if seen is dynamics or (type(seen) is type(dynamics) and _same(seen, dynamics)):
            return found
    found = _probed(instance, steps)
    if found is not None:
        remembered.setdefault(signature, []).append((dynamics, found))
    return found


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # fields that are tensors have no single answer
        return False


def _probed(instance: Instance, steps: int) -> Paths | None:
    generators = instance.oracles.generators
    before = generators.peek()
    try:
        with torch.compiler.set_stance("force_eager"):
            try:
                with _without_data(instance) as fake:
                    return _trace(fake, steps)
            except Exception:  # whatever the user's functions do with numbers, they do on real ones
                try:
                    with _disable_current_modes():
                        return _trace(instance, steps)
                except Exception:  # which the estimate itself will meet, and raise from where it belongs
                    return None
    finally:
        generators.set(before)


@contextlib.contextmanager
def _without_data(instance: Instance) -> Iterator[Instance]:
    """The instance on tensors without data, unseen by meters."""
    leaves = tree.tensors(instance.outer)
    with _disable_current_modes():
        mode = leaves[0].fake_mode if isinstance(leaves[0], FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)

        def convert(leaf: Any) -> Any:
            return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf

        def converted(value: Tree) -> Tree:
            return None if value is None else tree.tree_map(convert, value)

        batches = instance.batches
        first = Batches(converted(batches.inner_at(0)), converted(batches.outer))
        with mode:
            yield dataclasses.replace(
                instance, outer=converted(instance.outer), inner=converted(instance.inner), batches=first
            )


def _trace(instance: Instance, steps: int) -> Paths:
    if isinstance(instance.batches.inner, PerStep):
        instance = dataclasses.replace(
            instance, batches=dataclasses.replace(instance.batches, inner=instance.batches.inner_at(0))
        )
    oracles, found = instance.oracles, dict[Path, frozenset[int]]()
    with torch.enable_grad():
        xs = tree.tensors(oracles.attached)
        y0 = oracles.differentiable_start()
        found[Path.START] = _reached(tree.tensors(y0), xs) if instance.problem.init is not None else frozenset()
        y = tree.attach(y0)
        embedded = oracles.evaluation.embed(oracles.attached, instance.batches.inner)
        found[Path.INNER_LOSS] = _through_inner_loss(oracles, y, embedded, xs)
        found[Path.HYPERPARAMETER] = _through_steps(oracles, y, embedded, xs, steps)
        found[Path.STATIONARITY] = _through_stationarity(oracles, y, embedded, xs)
        batch = oracles.evaluation.embed(oracles.attached, instance.batches.outer)
        found[Path.OUTER_LOSS] = _reached([oracles.evaluation.outer(y, oracles.attached, batch)], xs)
    return tuple(frozenset(path for path, reached in found.items() if i in reached) for i in range(len(xs)))


def _through_inner_loss(oracles: Oracles, y: Tree, embedded: Any, xs: Sequence[Tensor]) -> frozenset[int]:
    # What moves y is dg/dy: an x that only shifts g has no influence through it.
    loss = oracles.inner(y, oracles.attached, embedded).sum()
    try:
        gradient = autodiff.grad([loss], tree.tensors(y), create_graph=True)
        return _reached([leaf for leaf in gradient if leaf is not None], xs)
    except NotTwiceDifferentiableError:
        return _reached([oracles.inner(y, oracles.attached, embedded)], xs)


def _through_steps(oracles: Oracles, y: Tree, embedded: Any, xs: Sequence[Tensor], steps: int) -> frozenset[int]:
    """Through the steps, with the inner gradient held fixed."""
    # A copy: a step in place, which is refused, must not have changed what the caller gave.
    moved = tree.tree_map(torch.clone, tree.detach(y))
    state = oracles.dynamics.init(moved, oracles.attached)
    outputs: list[Tensor] = []
    for step in range(steps):
        value, along = oracles.differentiable_value, oracles.source.along(graph=True)
        at = At(step, embedded, _constant, value, along, _no_outer, _flat)
        moved, state = step_of(oracles.dynamics, moved, state, oracles.attached, at)
        outputs += tree.tensors(moved)
    return _reached(outputs, xs)


def _through_stationarity(oracles: Oracles, y: Tree, embedded: Any, xs: Sequence[Tensor]) -> frozenset[int]:
    at = At(0, embedded, _constant, oracles.differentiable_value, oracles.source.along(graph=True), _no_outer, _flat)
    condition = oracles.dynamics.stationarity(y, oracles.attached, at)
    return frozenset() if condition is None else _reached(tree.tensors(condition), xs)


def _constant(inner: Tree, embedded: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = tuple(torch.ones_like(leaf) for leaf in tree.tensors(tree.detach(inner)))
    return leaves[0].new_zeros(()), leaves


def _reached(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> frozenset[int]:
    if not outputs:
        return frozenset()
    floating = [output for output in outputs if output.is_floating_point()]
    found = autodiff.grad(floating, inputs, [torch.ones_like(output) for output in floating], retain_graph=True)
    return frozenset(i for i, leaf in enumerate(found) if leaf is not None)


def _no_outer(inner: Tree) -> tuple[Tensor, PartialLeaves]:
    return _constant(inner, None)


def _flat(inner: Tree, embedded: Any) -> tuple[Tensor, tuple[Tensor, ...], LinearOperator]:
    """A curvature that no x enters, for a gradient that is held fixed."""
    return *_constant(inner, embedded), Product(lambda v: v)
