"""Which strength to choose from the errors of a cross-validation: the best, or a stronger one that is as good."""

from __future__ import annotations

from typing import Any

import numpy as np


def one_standard_error(alphas: Any, errors: Any) -> tuple[int, int]:
    """The positions of the strength with the least mean error, and of the one within one standard error of it.

    The second is the largest strength whose mean error is at most that of the best plus its standard error,

        max{α : ē(α) ≤ ē(α*) + s(α*)/√k},  α* = argmin ē,  s the standard deviation over the k folds (k − 1):

    the sparsest model that the folds cannot tell from the best one. With a single fold both are the same.

    Args:
        alphas: the strengths (m,), in any order.
        errors: the error of each strength in each fold (m, k), such as `LassoCV.mse_path_`. Strengths with a NaN are
            left out.

    Raises:
        ValueError: for other shapes, or if no strength has a finite mean error.

    >>> from torchreg.linear import one_standard_error
    >>> one_standard_error([1.0, 0.1, 0.01], [[9.0, 9.0], [2.0, 3.0], [1.5, 3.1]])
    (2, 1)

    Source: Breiman, Friedman, Olshen and Stone, Classification and regression trees, 1984, section 3.4.3; Hastie,
    Tibshirani and Friedman, The elements of statistical learning, 2009, section 7.10.
    """
    strengths, table = np.asarray(alphas, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if table.ndim != 2 or strengths.shape != table.shape[:1] or not table.size:
        raise ValueError(f"Expected errors (strengths, folds) of {strengths.shape} strengths, got {table.shape}.")
    means, spread = mean_errors(table)
    usable = np.isfinite(means)
    if not usable.any():
        raise ValueError("Expected a finite mean error for at least one strength, got none.")
    best = int(np.where(usable, means, np.inf).argmin())
    good = usable & (means <= means[best] + spread[best]) & (strengths >= strengths[best])
    return best, int(np.where(good, strengths, -np.inf).argmax())


def mean_errors(errors: Any) -> tuple[Any, Any]:
    """The means over the folds (m, k) and their standard errors, 0 for a single fold."""
    table = np.asarray(errors, dtype=np.float64)
    folds = table.shape[1]
    spread = table.std(1, ddof=1) / np.sqrt(folds) if folds > 1 else np.zeros(len(table))
    return table.mean(1), spread
