"""Averages over tasks."""

from bilevel.tasks.mean import TaskMean as TaskMean
