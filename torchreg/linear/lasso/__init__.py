"""Least squares with an L1 and an L2 penalty: the problem, and the ways to solve it."""
