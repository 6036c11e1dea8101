"""Classification data for the tests of logistic regression, and the duality gap in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax, xlogy


def classification(n: int, p: int, classes: int, seed: int = 0, shift: float = 0.0) -> tuple[Any, Any]:
    """Noisy labels of a sparse linear model, on features whose mean is `shift`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) + shift
    w = np.zeros((p, classes))
    w[: min(p, 8)] = rng.standard_normal((min(p, 8), classes))
    return x, ((x - shift) @ w + 1.5 * rng.gumbel(size=(n, classes))).argmax(1)


CASES = {
    "tall, two classes": classification(150, 12, 2, shift=3.0),
    "tall, four classes": classification(200, 8, 4, shift=-1.0),
    "wide, two classes": classification(60, 200, 2),
    "wide, three classes": classification(60, 90, 3),
}


def scores_of(model: Any, x: Any) -> Any:
    """(n, classes) in float64; the first class of two has 0."""
    scores = np.asarray(x, dtype=np.float64) @ np.asarray(model.coef_, dtype=np.float64).T + model.intercept_
    return np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores


def objective(model: Any, x: Any, y: Any, weights: Any = None) -> float:
    """1/S·Σ s·loss + R/(C·S)."""
    s = np.ones(len(y)) if weights is None else weights
    codes = np.unique(y, return_inverse=True)[1]
    logs = log_softmax(scores_of(model, x), axis=1)[np.arange(len(y)), codes]
    w = np.asarray(model.coef_, dtype=np.float64)
    penalty = model.l1_ratio * np.abs(w).sum() + 0.5 * (1 - model.l1_ratio) * (w**2).sum()
    return float((-(s * logs).sum() + (penalty / model.C if np.isfinite(model.C) else 0.0)) / s.sum())


def relative_gap(model: Any, x: Any, y: Any, weights: Any = None) -> float:
    """The duality gap over the logarithm of the number of classes, from a dual point that is feasible to rounding.

    Between labels and predicted probabilities, scaled so that the pull exceeds the L1 strength nowhere. For models
    whose intercepts balance the classes.
    """
    s = np.ones(len(y)) if weights is None else weights
    v = s / s.sum()
    classes, codes = np.unique(y, return_inverse=True)
    p = softmax(scores_of(model, x), axis=1)
    labels = np.eye(len(classes))[codes]
    l1, l2 = (share / (model.C * s.sum()) for share in (model.l1_ratio, 1 - model.l1_ratio))
    residual = v[:, None] * (p - labels)
    if model.fit_intercept:
        assert np.abs(residual.sum(0)).max() < (1e-7 if model.coef_.dtype == np.float64 else 1e-5)
    residual = residual[:, 1:] if len(classes) == 2 else residual
    pull = np.abs(np.asarray(x, dtype=np.float64).T @ residual)
    scale = 1.0 if l2 else min(1.0, l1 / pull.max())
    q = labels + scale * (p - labels)
    dual = -(v * xlogy(q, q).sum(1)).sum()
    if l2:
        dual -= (np.maximum(pull - l1, 0) ** 2).sum() / (2 * l2)
    return float((objective(model, x, y, weights) - dual) / logsumexp(np.zeros(len(classes))))
