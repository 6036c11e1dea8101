"""Regression data for the tests of linear models."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(seed: int = 0) -> tuple[Any, Any]:
    """More features than samples, ten of which matter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 400))
    return x, x[:, :10] @ rng.uniform(1, 3, 10) + 0.5 * rng.standard_normal(60) + 3


def tall(seed: int = 0) -> tuple[Any, Any]:
    """More samples than features, with means of their own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 30)) + rng.uniform(-5, 5, 30)
    return x, x[:, :8] @ rng.uniform(-2, 2, 8) + rng.standard_normal(200)


def correlated(seed: int = 0) -> tuple[Any, Any]:
    """Neighbouring features that correlate by 0.95."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((80, 300))
    x = noise.copy()
    for j in range(1, 300):
        x[:, j] = 0.95 * x[:, j - 1] + np.sqrt(1 - 0.95**2) * noise[:, j]
    w = np.zeros(300)
    w[rng.choice(300, 12, replace=False)] = rng.standard_normal(12)
    return x, x @ w + 0.3 * rng.standard_normal(80)


def scaled(seed: int = 0) -> tuple[Any, Any]:
    """Columns whose units differ."""
    x, y = tall(seed)
    return x * np.logspace(-2, 2, x.shape[1]), y


CASES = {"wide": wide, "tall": tall, "correlated": correlated, "scaled": scaled}


def sparse_case(seed: int = 0) -> tuple[Any, Any]:
    """A sparse matrix, most of whose columns have a mean that is not zero, and targets."""
    from scipy import sparse

    rng = np.random.default_rng(seed)
    x = sparse.random(
        150, 200, density=0.05, format="csc", random_state=seed, data_rvs=lambda k: rng.uniform(0.1, 2, k)
    )
    return x, x[:, :10] @ rng.uniform(1, 3, 10) + 0.1 * rng.standard_normal(150) + 1


def largest(x: Any, y: Any) -> float:
    """The strength from which on all coefficients of the lasso with an intercept are zero."""
    return float(np.abs((x - x.mean(0)).T @ (y - y.mean())).max() / len(y))


def relative_gap(x: Any, y: Any, w: Any, intercept: float, alpha: float, l1_ratio: float = 1.0) -> float:
    """The duality gap over ‖y − ȳ‖²/n, computed in plain NumPy in float64 from the data as they were handed in."""
    x, y, w = (np.asarray(a, dtype=np.float64) for a in (x, y, w))
    n = len(y)
    l1, l2 = alpha * l1_ratio, alpha * (1 - l1_ratio)
    y = y - y.mean()
    residual = y - (x - x.mean(0)) @ w
    pull = (x - x.mean(0)).T @ residual / n - l2 * w
    scale = min(1.0, l1 / np.abs(pull).max())
    energy = residual @ residual / n + l2 * (w @ w)
    primal = 0.5 * energy + l1 * np.abs(w).sum()
    return float((primal - scale * (residual @ y) / n + 0.5 * scale**2 * energy) / (y @ y / n))


def large_sparse_case(seed: int = 0) -> tuple[Any, Any]:
    """A sparse matrix large enough for coordinate descent."""
    from scipy import sparse

    rng = np.random.default_rng(seed)
    x = sparse.random(
        1500, 2000, density=0.01, format="csc", random_state=seed, data_rvs=lambda k: rng.uniform(0.1, 2, k)
    )
    return x, x[:, :50] @ rng.uniform(1, 3, 50) + rng.standard_normal(1500) + 1
