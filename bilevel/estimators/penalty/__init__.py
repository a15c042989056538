"""Estimators that need first derivatives only, by penalizing the outer loss into the inner one."""
