"""Estimators of dE[f]/dx where y is a sample of exp(-g / tau): the chain of a Langevin dynamics in place of a solution.

They answer another question than the estimators of `bilevel`, so that the catalogue of `bilevel.testing` does not hold
them: its targets are the K-step program and the inner solution.
"""

from bilevel.estimators.stochastic.covariance import Covariance as Covariance
from bilevel.estimators.stochastic.pathwise import Pathwise as Pathwise
