"""Designs of linear models, and the solvers that are compared on them, each told to stop at a gap of 1e-6 of ‖y‖²/n."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

TOLERANCE = 1e-6
MANY = 100_000  # iterations, for peers that count them


def wide(rng: Any, scale: float) -> tuple[Any, Any]:
    """1000 × 10000, independent features, 100 of which matter."""
    n, p = round(1000 * scale), round(10000 * scale)
    x = rng.standard_normal((n, p))
    return x, x[:, :100] @ (100 * rng.uniform(size=100)) + 10 * rng.standard_normal(n)


def correlated(rng: Any, scale: float) -> tuple[Any, Any]:
    """500 × 5000, neighbours correlate by 0.95, signal-to-noise ratio 3."""
    n, p = round(500 * scale), round(5000 * scale)
    x = rng.standard_normal((n, p))
    for j in range(1, p):
        x[:, j] = 0.95 * x[:, j - 1] + np.sqrt(1 - 0.95**2) * x[:, j]
    w = np.zeros(p)
    w[rng.choice(p, 50, replace=False)] = rng.standard_normal(50)
    signal = x @ w
    return x, signal + rng.standard_normal(n) * signal.std() / np.sqrt(3)


def tall(rng: Any, scale: float) -> tuple[Any, Any]:
    """100000 × 200, 50 features matter."""
    n = round(100_000 * scale)
    x = rng.standard_normal((n, 200))
    return x, x[:, :50] @ (100 * rng.uniform(size=50)) + 50 * rng.standard_normal(n)


def diabetes(rng: Any, scale: float) -> tuple[Any, Any]:
    """442 × 10, scikit-learn's."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x * np.sqrt(len(y)), y


def sparse(rng: Any, scale: float) -> tuple[Any, Any]:
    """20000 × 50000 with one entry in a thousand, positive, 200 features matter."""
    from scipy import sparse

    n, p = round(20_000 * scale), round(50_000 * scale)
    x = sparse.random(
        n, p, density=1e-3, format="csc", random_state=rng, data_rvs=lambda k: np.abs(rng.standard_normal(k)) + 0.1
    )
    w = np.zeros(p)
    w[rng.choice(p, 200, replace=False)] = 5 * rng.standard_normal(200)
    signal = x @ w
    return x, signal + rng.standard_normal(n) * signal.std() / 2


DESIGNS = {"wide": wide, "correlated": correlated, "tall": tall, "diabetes": diabetes, "sparse": sparse}


def data(name: str, seed: int, scale: float) -> tuple[Any, Any]:
    """A design in columns, centred where it is dense: no solver fits an intercept."""
    x, y = DESIGNS[name](np.random.default_rng(seed), scale)
    return (x if name == "sparse" else np.asfortranarray(x - x.mean(0))), y - y.mean()


def relative_gap(x: Any, y: Any, w: Any, alpha: float) -> float:
    """The duality gap over ‖y‖²/2n, from the coefficients alone."""
    n = len(y)
    residual = y - x @ w
    energy = residual @ residual / n
    pull = np.abs(x.T @ residual).max() / n
    scale = np.clip((residual @ y) / (residual @ residual), -alpha / pull, alpha / pull)
    gap = energy / 2 + alpha * np.abs(w).sum() - (scale * (residual @ y) / n - scale**2 * energy / 2)
    return float(gap / (y @ y / (2 * n)))


Solver = Callable[[Any, Any, Any], Any]
"""Takes X, y and strengths; gives coefficients (features, strengths)."""


def _torchreg() -> dict[str, Solver]:
    from torchreg.linear import Lasso, lasso_path

    return {
        "fit": lambda x, y, alphas: Lasso(alphas[0], fit_intercept=False).fit(x, y).coef_[:, None],
        "path": lambda x, y, alphas: lasso_path(x, y, alphas=alphas)[1],
    }


def _sklearn() -> dict[str, Solver]:
    from sklearn.linear_model import Lasso, lasso_path

    settings = {"tol": TOLERANCE, "max_iter": MANY}
    return {
        "fit": lambda x, y, alphas: (
            Lasso(alphas[0], fit_intercept=False, copy_X=False, **settings).fit(x, y).coef_[:, None]
        ),
        "path": lambda x, y, alphas: lasso_path(x, y, alphas=alphas, copy_X=False, **settings)[1],
    }


def _celer() -> dict[str, Solver]:
    from celer import Lasso, celer_path

    return {
        "fit": lambda x, y, alphas: Lasso(alphas[0], tol=TOLERANCE, fit_intercept=False).fit(x, y).coef_[:, None],
        "path": lambda x, y, alphas: celer_path(x, y, "lasso", alphas=alphas, tol=TOLERANCE)[1],
    }


def _skglm() -> dict[str, Solver]:
    from skglm import Lasso
    from skglm.datafits import Quadratic
    from skglm.penalties import L1
    from skglm.solvers import AndersonCD

    def path(x: Any, y: Any, alphas: Any) -> Any:
        solver = AndersonCD(tol=TOLERANCE * alphas[-1], fit_intercept=False, warm_start=True)
        return solver.path(x, y, Quadratic(), L1(1.0), alphas=alphas)[1]

    def fit(x: Any, y: Any, alphas: Any) -> Any:
        return Lasso(alphas[0], tol=1e-3 * alphas[0], fit_intercept=False).fit(x, y).coef_[:, None]

    return {"fit": fit, "path": path}


def _adelie(threads: int) -> dict[str, Solver]:
    import adelie
    from scipy import sparse

    def path(x: Any, y: Any, alphas: Any) -> Any:
        kind = adelie.matrix.sparse if sparse.issparse(x) else adelie.matrix.dense
        matrix = kind(x, n_threads=threads)
        state = adelie.grpnet(
            matrix,
            adelie.glm.gaussian(y),
            lmda_path=np.asarray(alphas),
            intercept=False,
            early_exit=False,
            progress_bar=False,
            n_threads=threads,
            tol=1e-10,
        )
        return np.asarray(state.betas.todense()).T

    return {"fit": path, "path": path}


def contenders(threads: int = 1) -> dict[str, dict[str, Solver]]:
    """Those that are installed, by name; adelie wants to be told of threads."""
    found = {}
    for make in (_torchreg, _sklearn, _celer, _skglm, _adelie):
        try:
            found[make.__name__.removeprefix("_")] = make(threads) if make is _adelie else make()
        except ImportError as error:
            print(f"left out: {error}")
    return found
