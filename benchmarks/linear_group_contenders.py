"""Problems with group norms, and their solvers: several targets that share features, and features in groups.

Each is told to stop at a gap of 1e-6 of ‖y‖²/n, skglm at violations of 1e-4 of the strength.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from linear_contenders import MANY, TOLERANCE, Solver

SIZE = 10


def multitask(rng: Any, scale: float) -> tuple[Any, Any]:
    """500 × 5000, neighbours correlate by 0.5, 10 targets, 50 features matter, signal-to-noise ratio 3."""
    n, p = round(500 * scale), round(5000 * scale)
    x = rng.standard_normal((n, p))
    for j in range(1, p):
        x[:, j] = 0.5 * x[:, j - 1] + np.sqrt(0.75) * x[:, j]
    w = np.zeros((p, 10))
    w[rng.choice(p, 50, replace=False)] = rng.standard_normal((50, 10))
    signal = x @ w
    return x, signal + rng.standard_normal(signal.shape) * signal.std() / np.sqrt(3)


def groups(rng: Any, scale: float) -> tuple[Any, Any]:
    """500 × 5000 in groups of 10 that correlate by 0.5 within, 20 groups matter, signal-to-noise ratio 3."""
    n, p = round(500 * scale), round(500 * scale) * SIZE
    x = np.sqrt(0.5) * (rng.standard_normal((n, p)) + np.repeat(rng.standard_normal((n, p // SIZE)), SIZE, axis=1))
    w = np.zeros((p // SIZE, SIZE))
    w[rng.choice(p // SIZE, 20, replace=False)] = rng.standard_normal((20, SIZE))
    signal = x @ w.ravel()
    return x, signal + rng.standard_normal(n) * signal.std() / np.sqrt(3)


DESIGNS = {"multitask": multitask, "groups": groups}


def data(name: str, seed: int, scale: float) -> tuple[Any, Any]:
    """A design in columns, centred: no solver fits an intercept."""
    x, y = DESIGNS[name](np.random.default_rng(seed), scale)
    return np.asfortranarray(x - x.mean(0)), y - y.mean(0)


def norms(v: Any) -> Any:
    """Over their weights: of a feature's coefficients for all targets (features, targets), or of each group's."""
    return np.linalg.norm(v, axis=1) if v.ndim == 2 else np.linalg.norm(v.reshape(-1, SIZE), axis=1) / np.sqrt(SIZE)


def largest(x: Any, y: Any) -> float:
    """The strength from which on all coefficients are zero."""
    return float(norms(x.T @ y).max() / len(y))


def relative_gap(x: Any, y: Any, w: Any, alpha: float) -> float:
    """The duality gap over ‖y‖²/2n, from the coefficients, (targets, features) or (features,), alone."""
    n, w = len(y), w.T
    residual = y - x @ w
    energy, agreement = (residual**2).sum() / n, (residual * y).sum() / n
    bound = alpha / largest(x, residual)
    scale = np.clip(agreement / energy, -bound, bound)
    penalty = norms(w).sum() * (1 if w.ndim == 2 else SIZE)
    gap = energy / 2 + alpha * penalty - (scale * agreement - scale**2 * energy / 2)
    return float(gap / ((y**2).sum() / (2 * n)))


def _single(path: Solver) -> dict[str, Solver]:
    return {"fit": path, "path": path}


def _torchreg(design: str) -> dict[str, Solver]:
    from torchreg.linear import GroupLasso, MultiTaskLasso, lasso_path

    if design == "multitask":
        return {
            "fit": lambda x, y, alphas: MultiTaskLasso(alphas[0], fit_intercept=False).fit(x, y).coef_[..., None],
            "path": lambda x, y, alphas: lasso_path(x, y, alphas=alphas)[1],
        }
    return _single(_warm(lambda: GroupLasso(groups=SIZE, fit_intercept=False, warm_start=True)))


def _warm(make: Callable[[], Any], tolerance: float | None = None) -> Solver:
    """A path by an estimator's warm starts."""

    def path(x: Any, y: Any, alphas: Any) -> Any:
        model, found = make(), []
        for alpha in alphas:
            model.set_params(alpha=alpha)
            if tolerance is not None:
                model.set_params(tol=tolerance * alpha)
            found.append(np.array(model.fit(x, y).coef_))
        return np.stack(found, -1)

    return path


def _sklearn(design: str) -> dict[str, Solver]:
    from sklearn.linear_model import MultiTaskLasso, lasso_path

    if design != "multitask":
        raise ImportError("scikit-learn has no group lasso")
    settings = {"tol": TOLERANCE, "max_iter": MANY}
    return {
        "fit": lambda x, y, alphas: (
            MultiTaskLasso(alphas[0], fit_intercept=False, copy_X=False, **settings).fit(x, y).coef_[..., None]
        ),
        "path": lambda x, y, alphas: lasso_path(x, y, alphas=alphas, copy_X=False, **settings)[1],
    }


def _celer(design: str) -> dict[str, Solver]:
    from celer.homotopy import celer_path, mtl_path  # its estimators need an older scikit-learn

    if design == "multitask":
        return _single(lambda x, y, alphas: mtl_path(x, np.asfortranarray(y), alphas=alphas, tol=TOLERANCE)[1])

    def path(x: Any, y: Any, alphas: Any) -> Any:
        weights = np.full(x.shape[1] // SIZE, np.sqrt(SIZE))
        return celer_path(x, y, "grouplasso", alphas=alphas, groups=SIZE, weights=weights, tol=TOLERANCE, max_iter=100)[
            1
        ]

    return _single(path)


def _skglm(design: str) -> dict[str, Solver]:
    from skglm import GroupLasso, MultiTaskLasso

    if design == "multitask":
        return _single(_warm(lambda: MultiTaskLasso(fit_intercept=False, warm_start=True), 1e-4))
    weights = np.sqrt(SIZE)

    def path(x: Any, y: Any, alphas: Any) -> Any:
        counted = np.full(x.shape[1] // SIZE, weights)
        return _warm(lambda: GroupLasso(SIZE, weights=counted, fit_intercept=False, warm_start=True), 1e-4)(
            x, y, alphas
        )

    return _single(path)


def contenders(design: str) -> dict[str, dict[str, Solver]]:
    """Those that are installed and have such a model, by name."""
    found = {}
    for make in (_torchreg, _sklearn, _celer, _skglm):
        try:
            found[make.__name__.removeprefix("_")] = make(design)
        except ImportError as error:
            print(f"left out: {error}")
    return found
