"""Checks for what users write: `check_estimator` for estimators of their own, `check_problem` for problems."""

from bilevel.testing.catalogue import ENTRIES as ENTRIES
from bilevel.testing.catalogue import Entry as Entry
from bilevel.testing.estimator_checks import check_estimator as check_estimator
