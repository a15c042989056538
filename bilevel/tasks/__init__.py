"""Averages over tasks."""

from bilevel.tasks.base import TaskResults as TaskResults
from bilevel.tasks.base import TaskWeights as TaskWeights
from bilevel.tasks.mean import TaskMean as TaskMean
from bilevel.tasks.weights import GivenWeights as GivenWeights
from bilevel.tasks.weights import GradientSimilarity as GradientSimilarity
