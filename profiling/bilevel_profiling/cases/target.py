"""What the library's estimators estimate, for the records and for the baseline of a report."""

import bilevel as bl
from bilevel_profiling.records.record import Target


def target_of(estimator: bl.Estimator) -> Target | None:
    """What an estimator gives but for rounding and unmet tolerances; None where it is neither or not known.

    A class of a user's says it as an attribute `target`, "program" or "solution".

    Example:
        >>> import bilevel as bl
        >>> target_of(bl.TaskMean(bl.Unrolled())).value, target_of(bl.Implicit(bl.CG(5))).value
        ('program', 'solution')
        >>> target_of(bl.FirstOrder()) is None
        True
    """
    if isinstance(estimator, bl.TaskMean):
        return target_of(estimator.estimator)
    if isinstance(estimator, bl.Unrolled):
        whole = estimator.last is None and estimator.step_weights is None and not estimator.resampled
        return Target.PROGRAM if whole else None
    if isinstance(estimator, (bl.Implicit, bl.MemoryReduced, bl.FirstOrderCorrected)):
        return Target.SOLUTION
    said = getattr(estimator, "target", None)
    return Target(said) if said in set(Target) else None
