"""Classification designs, and the solvers of L1-penalised logistic regression that are compared on them.

No solver fits an intercept: liblinear's is penalised. Each peer is told to stop at about the same duality gap, 1e-6 of
log 2, in its own terms; the gap of what it gives is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import linear_contenders
import numpy as np
from scipy.special import xlogy

MANY = 100_000  # iterations, for peers that count them


def data(name: str, seed: int, scale: float) -> tuple[Any, Any]:
    """A design of linear regression whose targets, above their median or not, are the classes ±1."""
    x, y = linear_contenders.data(name, seed, scale)
    return x, np.where(y > np.median(y), 1.0, -1.0)


def relative_gap(x: Any, y: Any, w: Any, alpha: float) -> float:
    """The duality gap of mean log-loss + alpha·‖w‖₁ over log 2, from the coefficients alone."""
    margins, n = y * (x @ w), len(y)
    wrong = np.exp(-np.logaddexp(0, margins))
    pull = np.abs(x.T @ (y * wrong)).max() / n
    wrong *= min(1.0, alpha / pull)
    dual = -(xlogy(wrong, wrong) + xlogy(1 - wrong, 1 - wrong)).mean()
    return float((np.logaddexp(0, -margins).mean() + alpha * np.abs(w).sum() - dual) / np.log(2))


Solver = Callable[[Any, Any, float], Any]
"""Takes X, y and a strength; gives coefficients (features,)."""


def _torchreg() -> Solver:
    from torchreg.linear import LogisticRegression

    return lambda x, y, alpha: (
        LogisticRegression(C=1 / (alpha * len(y)), l1_ratio=1.0, fit_intercept=False).fit(x, y).coef_[0]
    )


def _sklearn(solver: str, tol: float) -> Solver:
    from sklearn.linear_model import LogisticRegression

    def fit(x: Any, y: Any, alpha: float) -> Any:
        settings = {"l1_ratio": 1.0, "solver": solver, "tol": tol, "max_iter": MANY, "fit_intercept": False}
        return LogisticRegression(C=1 / (alpha * len(y)), **settings).fit(x, y).coef_[0]

    return fit


def _liblinear() -> Solver:
    return _sklearn("liblinear", 1e-7)


def _saga() -> Solver:
    return _sklearn("saga", 1e-4)


def _celer() -> Solver:
    from celer import LogisticRegression

    return lambda x, y, alpha: (
        LogisticRegression(C=1 / (alpha * len(y)), tol=1e-7, fit_intercept=False).fit(x, y).coef_[0]
    )


def _skglm() -> Solver:
    from skglm import SparseLogisticRegression

    return lambda x, y, alpha: (
        SparseLogisticRegression(alpha, tol=1e-5 * alpha, fit_intercept=False, max_iter=1000).fit(x, y).coef_[0]
    )


def contenders() -> dict[str, Solver]:
    """Those that are installed, by name."""
    found = {}
    for make in (_torchreg, _liblinear, _saga, _celer, _skglm):
        try:
            found[make.__name__.removeprefix("_")] = make()
        except ImportError as error:
            print(f"left out: {error}")
    return found
