"""Estimators that call the inner program at several x, and take no derivative of it."""
