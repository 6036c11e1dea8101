"""Coordinate descent for two classes on sparse data ends where Newton steps end, and so do its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from logistic_cases import relative_gap
from scipy import sparse

from torchreg.linear import LogisticRegression
from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso import sparse_descent
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.lasso.sparse_descent import Quadratic
from torchreg.linear.logistic import descent as logistic_descent
from torchreg.linear.logistic import solver as logistic_solver

pytestmark = pytest.mark.skipif(sparse_descent.unavailable() is not None, reason="there is no compiler")


def case(n: int = 150, p: int = 220, density: float = 0.1) -> tuple[Any, Any]:
    """Positive entries, so that means matter; a constant, an empty and a doubled column."""
    rng = np.random.default_rng(0)
    x = sparse.random(n, p, density=density, format="lil", random_state=0)
    x[:, 0], x[:, 1], x[:, 3] = 1.0, 0.0, x[:, 2]
    x = sparse.csc_matrix(x)
    return x, (x @ rng.standard_normal(p) + rng.standard_normal(n) > 0.3).astype(int)


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All sparse data go by coordinate descent, alone; what it gave."""
    found: list[Any] = []
    original = logistic_solver.solve_logistic_by_coordinates
    monkeypatch.setattr(logistic_solver, "_POLISHED", -1)
    monkeypatch.setattr(
        logistic_solver, "solve_logistic_by_coordinates", lambda *a: found.append(original(*a)) or found[-1]
    )
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize("C", [0.5, 30.0])
def test_they_end_where_newton_steps_do(
    swept: list[Any], C: float, l1_ratio: float, fit_intercept: bool, weighted: bool
) -> None:
    x, y = case()
    weights = np.random.default_rng(0).uniform(0, 2, len(y)) if weighted else None
    if weighted:
        weights[:7] = 0
    settings = {"C": C, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    model = LogisticRegression(**settings).fit(x, y, weights)
    assert len(swept) == 1
    assert swept[0].gap == model.dual_gap_ < 1e-13
    assert abs(relative_gap(model, x.toarray(), y, weights)) < 1e-12
    exact = LogisticRegression(**settings, solver="newton").fit(x, y, weights)
    np.testing.assert_allclose(model.predict_proba(x), exact.predict_proba(x), atol=1e-8)
    if l1_ratio < 1:  # else equal columns have many solutions
        np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-7)


def test_float32_and_a_penalised_intercept(swept: list[Any]) -> None:
    x, y = case()
    model = LogisticRegression(l1_ratio=1.0).fit(x.astype(np.float32), y)
    assert model.coef_.dtype == np.float32
    assert abs(relative_gap(model, x.astype(np.float32).toarray(), y)) < 1e-5
    settings = {"l1_ratio": 1.0, "solver": "liblinear", "intercept_scaling": 5.0}
    sparse_model, dense = (LogisticRegression(**settings).fit(a, y) for a in (x, x.toarray()))
    np.testing.assert_allclose(sparse_model.intercept_, dense.intercept_, atol=1e-8)
    assert len(swept) == 2


@pytest.mark.usefixtures("swept")
def test_a_warm_start_at_the_solution_takes_no_sweeps_and_a_bad_one_does_no_harm() -> None:
    x, y = case()
    model = LogisticRegression(l1_ratio=1.0, warm_start=True).fit(x, y)
    coef, intercept = model.coef_.copy(), model.intercept_.copy()
    assert model.fit(x, y).n_iter_[0] <= 3
    np.testing.assert_allclose(model.coef_, coef, atol=1e-9)
    model.coef_ = 1e6 * np.ones_like(coef)
    np.testing.assert_allclose(model.fit(x, y).intercept_, intercept, atol=1e-8)


@pytest.mark.usefixtures("swept")
def test_the_limit_is_kept() -> None:
    x, y = case()
    with pytest.warns(UserWarning, match="did not converge"):
        model = LogisticRegression(C=100.0, l1_ratio=1.0, max_iter=1).fit(x, y)
    assert model.n_iter_[0] == 1


def test_separable_classes(swept: list[Any]) -> None:
    x, _ = case()
    model = LogisticRegression(C=1e4, l1_ratio=1.0).fit(x, np.arange(150) % 2)
    assert model.dual_gap_ < 1e-12
    assert swept[0].steps == model.n_iter_[0]


def test_newton_steps_take_over_where_columns_depend_on_one_another(
    swept: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = case()
    monkeypatch.setattr(logistic_solver, "_PATIENCE", 2)
    for polished in (0, 1000):  # too many coefficients for Newton steps; few enough
        monkeypatch.setattr(logistic_solver, "_POLISHED", polished)
        monkeypatch.setattr(logistic_solver, "_is_large", lambda _: True)
        assert LogisticRegression(C=10.0, l1_ratio=1.0).fit(x, y).dual_gap_ < 1e-12
        assert swept[-1].gap > 1e-6


def test_steps_that_do_not_lower_the_objective_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quadratic model that is too flat leads too far."""
    x, y = case()
    weigh = Quadratic.weigh
    monkeypatch.setattr(logistic_solver, "_POLISHED", -1)
    monkeypatch.setattr(logistic_descent, "_SMALL", 0.0)
    monkeypatch.setattr(Quadratic, "weigh", lambda self, h, index: weigh(self, 0.2 * h, index))
    exact = LogisticRegression(C=5.0, l1_ratio=1.0, solver="newton").fit(x, y)
    model = LogisticRegression(C=5.0, l1_ratio=1.0, max_iter=39).fit(x, y)
    np.testing.assert_allclose(model.predict_proba(x), exact.predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_a_quadratic_is_minimised_in_the_columns_of_an_index(
    positive: bool, even: bool, centred: bool, l2: float
) -> None:
    rng = np.random.default_rng(1)
    x = sparse.random(60, 50, density=0.3, format="csc", random_state=2, data_rvs=rng.standard_normal)
    h = np.full(60, 0.1) if even else rng.uniform(0, 0.2, 60)
    t = 0.3 * rng.standard_normal(60)
    t -= t.mean() if centred else 0.0
    index, strength = np.arange(5, 50), Strength(0.2, l2)
    columns = Quadratic(Sparse(x), centred, positive)
    columns.w[:7] = 0.5
    start = columns.w.copy()
    columns.weigh(0.1 if even else h, index)
    assert 0 < columns.descend(t, index, strength, 1e-14, 10_000) < 1000
    dense = x.toarray() - (h @ x.toarray() / h.sum() if centred else 0.0)
    np.testing.assert_allclose(columns.squares[index], (h @ dense**2)[index], rtol=1e-12)
    w = columns.w
    assert np.array_equal(w[:5], start[:5])
    assert np.count_nonzero(w[index]) > 5
    force = (dense.T @ (t - h * (dense @ (w - start))) - l2 * w)[index]
    here = w[index]
    np.testing.assert_allclose(force[here != 0], 0.2 * np.sign(here[here != 0]), atol=1e-12)
    assert (force if positive else np.abs(force)).max() <= 0.2 + 1e-12
    assert not positive or w.min() >= 0


def test_conjugate_gradients_finish_what_sweeps_take_long_for() -> None:
    """Neighbours correlate: without them thousands of sweeps would be needed."""
    n, p = 400, 150
    x = sparse.csc_matrix(np.cumsum(np.random.default_rng(0).standard_normal((n, p)), 1) + 30.0)
    y = x[:, 40].toarray()[:, 0] + x[:, 90].toarray()[:, 0] + np.random.default_rng(1).standard_normal(n)
    columns = Quadratic(Sparse(x), True)
    columns.weigh(1 / n, np.arange(p))
    done = columns.descend((y - y.mean()) / n, np.arange(p), Strength(1e-3), 1e-12, 100_000)
    assert done < 10_000
    residual = y - y.mean() - (x @ columns.w - (x @ columns.w).mean())
    pull = (x.toarray() - x.toarray().mean(0)).T @ residual / n
    assert np.abs(pull).max() <= 1e-3 + 1e-9
    support = columns.w != 0
    np.testing.assert_allclose(pull[support], 1e-3 * np.sign(columns.w[support]), atol=1e-9)


def test_tensors_give_the_same(swept: list[Any]) -> None:
    x, y = case()
    model = LogisticRegression(l1_ratio=1.0).fit(x, y)
    found = LogisticRegression(l1_ratio=1.0).fit(torch.from_numpy(x.toarray()).to_sparse(), torch.from_numpy(y))
    np.testing.assert_allclose(found.coef_.numpy(), model.coef_, atol=1e-12)
    assert len(swept) == 2
