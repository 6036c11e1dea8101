"""Which penalty scikit-learn's parameters of a logistic regression mean."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.linear_model._logistic import _check_solver

from torchreg.linear.lasso.problem import Strength

_LARGEST = 1e150  # a strength whose square is a number


def penalty_of(estimator: Any) -> str | None:
    """ "l1", "l2", "elasticnet" or None, with scikit-learn's warnings about how it used to be given, and its errors.

    Raises:
        ValueError: for a solver of scikit-learn's that does not go with the penalty, `dual` without "liblinear", or a
            penalty "elasticnet" without `l1_ratio`.
    """
    given, ratio = estimator.penalty, estimator.l1_ratio
    if given == "deprecated":
        penalty = _by_ratio(estimator)
    else:
        penalty = given
        warnings.warn(
            "'penalty' was deprecated in version 1.8 and will be removed in 1.10. To avoid this warning, leave "
            "'penalty' set to its default value and use 'l1_ratio' or 'C' instead. Use l1_ratio=0 instead of "
            "penalty='l2', l1_ratio=1 instead of penalty='l1', l1_ratio set to a float between 0 and 1 instead of "
            "penalty='elasticnet', and C=np.inf instead of penalty=None.",
            FutureWarning,
            stacklevel=4,
        )
    if estimator.solver in OWN_SOLVERS:
        if estimator.dual:
            raise ValueError(f"Solver {estimator.solver} supports only dual=False, got dual={estimator.dual}")
    else:
        _check_solver(estimator.solver, penalty, estimator.dual)
    if penalty != "elasticnet" and ratio is not None and 0 < ratio < 1:
        _warn(f"l1_ratio parameter is only used when penalty is 'elasticnet'. Got (penalty={penalty})")
    if (given == "l2" and ratio != 0) or (given == "l1" and ratio != 1):
        _warn(
            f"Inconsistent values: penalty={given} with l1_ratio={ratio}. penalty is deprecated. Please use l1_ratio "
            "only."
        )
    if penalty == "elasticnet" and ratio is None:
        raise ValueError("l1_ratio must be specified when penalty is elasticnet.")
    if given is None and estimator.C != 1.0:
        _warn("Setting penalty=None will ignore the C and l1_ratio parameters")
    return penalty


OWN_SOLVERS = ("auto", "newton", "fista", "cd")
"""Those that scikit-learn doesn't have."""


def strength_of(penalty: str | None, C: float, l1_ratio: float | None, mass: float) -> Strength:
    """The strength beside a mean loss, for weights that sum to `mass`."""
    if penalty is None or np.inf == C:
        return Strength(0.0, 0.0)
    total = min(_LARGEST, 1 / max(C * mass, 1 / _LARGEST))
    share = {"l1": 1.0, "l2": 0.0}.get(penalty, l1_ratio if l1_ratio is not None else 0.0)
    return Strength(total * share, total * (1 - share))


def _by_ratio(estimator: Any) -> str | None:
    if estimator.l1_ratio is None:
        warnings.warn(
            "'l1_ratio=None' was deprecated in version 1.8 and will trigger an error in 1.10. Use 0<=l1_ratio<=1 "
            "instead.",
            FutureWarning,
            stacklevel=5,
        )
    if np.inf == estimator.C:
        return None
    return {0: "l2", None: "l2", 1: "l1"}.get(estimator.l1_ratio, "elasticnet")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
