"""Estimators that differentiate the steps taken."""
