"""Checks for what users write: `check_estimator` for estimators of their own, `check_problem` for problems."""

from bilevel.testing.catalogue import ENTRIES as ENTRIES
from bilevel.testing.catalogue import Entry as Entry
from bilevel.testing.catalogue import Need as Need
from bilevel.testing.estimator_checks import check_estimator as check_estimator
from bilevel.testing.problem_checks import Finding as Finding
from bilevel.testing.problem_checks import Kind as Kind
from bilevel.testing.problem_checks import Report as Report
from bilevel.testing.problem_checks import check_problem as check_problem
