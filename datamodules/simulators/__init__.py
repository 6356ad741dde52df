"""Numerical solvers that write training data. Each file is one generator: a config and a class (see `base.Generator`)."""
