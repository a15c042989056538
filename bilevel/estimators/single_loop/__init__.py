"""Estimators that make one round a call: y and the adjoint v are carried, and neither is solved for."""
