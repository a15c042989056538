"""One estimate, with everything that is checked around it: the door through which every estimator is called."""

import dataclasses
from typing import Any

from bilevel.estimators import admission, paths
from bilevel.estimators.base import Estimate, Estimator, Instance
from bilevel.space import tree


def estimated(estimator: Estimator, instance: Instance, carried: Any) -> Estimate:
    """The estimate on one instance, after the checks that no estimator makes itself.

    Raises:
        TypeError, ValueError: the estimator cannot see how x acts, the state is not its own, or it returned nothing for
            an outer tensor that does act.
    """
    paths.check(estimator, instance)
    admission.check(estimator, instance)
    if carried is not None:
        carried = estimator.admit_state(instance, carried)
    found = looked_at(estimator, instance, estimator.estimate(instance, carried))
    admission.check_rest(estimator, instance, found.inner)
    return found


def looked_at(estimator: Estimator, instance: Instance, found: Any) -> Estimate:
    """What an estimator returned on one instance, checked.

    Raises:
        TypeError, ValueError: as `estimated`.
    """
    if not isinstance(found, Estimate):
        raise TypeError(
            f"{type(estimator).__name__}.estimate() returned a {type(found).__name__}; an Estimate was needed: end it "
            f"with "
            f"return instance.finish(found, grad, outer_loss)"
        )
    shapes = [leaf.shape for leaf in tree.tensors(instance.outer)]
    if len(found.grad) != len(shapes) or any(
        leaf is not None and leaf.shape != shape for leaf, shape in zip(found.grad, shapes, strict=True)
    ):
        raise ValueError(
            f"{type(estimator).__name__}.estimate() returned a gradient of "
            f"{[None if leaf is None else tuple(leaf.shape) for leaf in found.grad]}; one entry for each outer tensor "
            f"was "
            f"needed, of shapes {[tuple(shape) for shape in shapes]}"
        )
    missed = frozenset(i for i, leaf in enumerate(found.grad) if leaf is None) - found.unused
    if missed:
        paths.check_unreached(estimator, instance, missed)
    # (Without a step nothing is known of what the steps would have used.)
    stood_still = found.stats.get("inner_steps") == 0 and not instance.solver.fixed
    return found if stood_still else dataclasses.replace(found, unused=found.unused | missed)
