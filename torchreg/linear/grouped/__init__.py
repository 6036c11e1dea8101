"""Least squares with a penalty of group norms: the problem, and the way to solve it."""
