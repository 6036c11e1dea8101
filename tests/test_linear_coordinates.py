"""Coordinate descent on sparse data ends where Newton steps end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from linear_cases import large_sparse_case, largest, relative_gap

from torchreg.linear import ElasticNet, Lasso, lasso_path
from torchreg.linear.lasso import coordinate_descent, solver

pytestmark = pytest.mark.skipif(coordinate_descent.unavailable() is not None, reason="there is no compiler")


@pytest.fixture
def by_newton(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fit(model: Any, *data: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(solver, "_by_coordinates", lambda *_: False)
            return model.fit(*data)

    return fit


@pytest.fixture
def unpolished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps alone, to the end."""
    monkeypatch.setattr(solver, "_by_coordinates", lambda design, strengths: True)
    monkeypatch.setattr(solver, "_POLISHED", 0)


@pytest.mark.pairs
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.usefixtures("unpolished")
def test_sweeps_end_where_newton_steps_do(
    by_newton: Any, l1_ratio: float, fit_intercept: bool, weighted: bool, positive: bool
) -> None:
    x, y = large_sparse_case()
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y)) if weighted else None
    if weighted:
        weights[:7] = 0
    settings = {"alpha": 0.02, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept, "positive": positive}
    exact = by_newton(ElasticNet(**settings), x, y, weights)
    swept = ElasticNet(**settings).fit(x, y, weights)
    np.testing.assert_allclose(swept.coef_, exact.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(swept.intercept_, exact.intercept_, rtol=1e-6)
    assert swept.dual_gap_ <= 1e-12 * y.var()


@pytest.mark.parametrize("fraction", [0.5, 0.1])
def test_the_last_digits_are_newtons(by_newton: Any, fraction: float) -> None:
    x, y = large_sparse_case()
    alpha = fraction * largest(x.toarray(), y)
    exact, model = by_newton(Lasso(alpha), x, y), Lasso(alpha).fit(x, y)
    assert np.array_equal(model.coef_ != 0, exact.coef_ != 0)
    np.testing.assert_allclose(model.coef_, exact.coef_, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("unpolished")
def test_float32() -> None:
    x, y = large_sparse_case()
    alpha = 0.1 * largest(x.toarray(), y)
    model = Lasso(alpha).fit(x.astype(np.float32), y)
    assert relative_gap(x.astype(np.float32).toarray(), y, model.coef_, model.intercept_, alpha) < 1e-5


def test_a_path() -> None:
    x, y = large_sparse_case()
    alphas, coefs, gaps = lasso_path(x, y, alphas=8, eps=0.05)
    assert gaps.max() <= 1e-12 * (y @ y) / len(y)
    for i in (3, 7):
        single = Lasso(alphas[i], fit_intercept=False).fit(x, y).coef_
        np.testing.assert_allclose(coefs[:, i], single, rtol=0, atol=1e-5)


def test_the_limit_is_kept() -> None:
    x, y = large_sparse_case()
    with pytest.warns(UserWarning, match="did not converge"):
        lasso_path(x, y, alphas=[0.1, 1e-4], max_iter=1, tol=1e-12)
