"""Every estimator that the library has, for comparisons that ask for all of them."""

import dataclasses
from collections.abc import Mapping

import bilevel as bl
from bilevel.testing import ENTRIES

ALL = "all"
"""What is written in the place of a list of estimators."""


def every(own: Mapping[str, bl.Estimator]) -> dict[str, bl.Estimator]:
    """A case's own estimators, then the library's with everyday budgets, over tasks where the case's are.

    What the case has under another label is not repeated. An estimator that cannot see how x acts in the case becomes a
    row that says so.

    Args:
        own: the case's, by label.

    Example:
        >>> labels = list(every({"mine": bl.FirstOrder()}))
        >>> labels[0], "graph" in labels, "first order" in labels
        ('mine', True, False)
    """
    means = [each for each in own.values() if isinstance(each, bl.TaskMean)]
    found, known = dict(own), {repr(each) for each in own.values()}
    for entry in ENTRIES:
        estimator = dataclasses.replace(means[0], estimator=entry.usual) if means else entry.usual
        if repr(estimator) not in known:
            found[f"{entry.label} (library)" if entry.label in own else entry.label] = estimator
    return found
