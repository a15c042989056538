"""What is measured: one estimator on one problem (a Case), the files that define cases, and those that ship."""
