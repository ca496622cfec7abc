"""Suites of models and families of kernels, timed: what `nas bench --suite` and `nas bench --kernels` do."""
