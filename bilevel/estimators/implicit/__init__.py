"""Estimators that differentiate the condition for a solution."""
