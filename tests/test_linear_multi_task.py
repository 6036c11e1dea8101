"""Coefficients of several targets that are zero together: scikit-learn's, only exact."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from linear_cases import CASES, sparse_case
from sklearn.exceptions import ConvergenceWarning

from torchreg.linear import (
    Lasso,
    LassoCV,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    MultiTaskLassoCV,
    enet_path,
    lasso_path,
)
from torchreg.linear.grouped import descent as block_descent

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # scikit-learn's own
ESTIMATORS = [MultiTaskLasso, MultiTaskElasticNet]


def targets(x: Any, y: Any, count: int = 3) -> Any:
    """Several targets that share some of their features."""
    rng = np.random.default_rng(7)
    signal = x[:, :6] @ rng.standard_normal((6, count))
    return np.asarray(y)[:, None] * rng.uniform(0.2, 1, count) + signal + 0.1 * rng.standard_normal(signal.shape)


def data(name: str, count: int = 3) -> tuple[Any, Any]:
    x, y = CASES[name]()
    return x, targets(x, y, count)


def largest(x: Any, y: Any) -> float:
    """The strength from which on all coefficients are zero."""
    return float(np.linalg.norm((x - x.mean(0)).T @ (y - y.mean(0)), axis=1).max() / len(y))


def relative_gap(x: Any, y: Any, w: Any, alpha: float, l1_ratio: float = 1.0) -> float:
    """The duality gap over ‖Y − Ȳ‖²/n for coefficients (targets, features), in NumPy from the data themselves."""
    x, y, w = (np.asarray(a, dtype=np.float64) for a in (x, y, w))
    n, l1, l2 = len(y), alpha * l1_ratio, alpha * (1 - l1_ratio)
    x, y = x - x.mean(0), y - y.mean(0)
    residual = y - x @ w.T
    pull = x.T @ residual / n - l2 * w.T
    scale = min(1.0, l1 / np.linalg.norm(pull, axis=1).max())
    energy = (residual**2).sum() / n + l2 * (w**2).sum()
    primal = energy / 2 + l1 * np.linalg.norm(w, axis=0).sum()
    return float((primal - scale * (residual * y).sum() / n + scale**2 * energy / 2) / ((y**2).sum() / n))


def assert_same(ours: Any, theirs: Any) -> None:
    assert np.array_equal(ours.coef_ != 0, theirs.coef_ != 0)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=1e-8 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("name", CASES)
def test_the_solution_is_scikit_learns(name: str, fraction: float, l1_ratio: float) -> None:
    x, y = data(name)
    alpha = fraction * largest(x, y)
    ours = MultiTaskElasticNet(alpha, l1_ratio=l1_ratio).fit(x, y)
    theirs = sklearn.linear_model.MultiTaskElasticNet(alpha, l1_ratio=l1_ratio, tol=1e-12, max_iter=1_000_000)
    assert_same(ours, theirs.fit(x, y))
    assert ours.eps_ == pytest.approx(1e8 * theirs.eps_)
    assert relative_gap(x, y, ours.coef_, alpha, l1_ratio) < 1e-14
    assert ours.dual_gap_ == pytest.approx(0, abs=1e-14 * (y**2).sum() / len(y))


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_weighted_solutions_are_scikit_learns(name: str, fit_intercept: bool) -> None:
    x, y = data(name)
    weights = np.random.default_rng(1).uniform(0, 3, len(y))
    weights[:5] = 0
    settings = {"alpha": 0.1 * largest(x, y), "fit_intercept": fit_intercept}
    theirs = sklearn.linear_model.MultiTaskLasso(**settings, tol=1e-12, max_iter=1_000_000).fit(x, y, weights)
    assert_same(MultiTaskLasso(**settings).fit(x, y, weights), theirs)
    assert_same(MultiTaskLasso(**settings).fit(x, y, 7 * weights), theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_sparse_data_give_the_dense_solution(fit_intercept: bool, weighted: bool) -> None:
    x, y = sparse_case()
    y = targets(x, y)
    weights = np.random.default_rng(1).uniform(0, 3, len(y)) if weighted else None
    settings = {"alpha": 0.1 * largest(x.toarray(), y), "fit_intercept": fit_intercept}
    dense = MultiTaskLasso(**settings).fit(x.toarray(), y, weights)
    for given in (x, x.tocsr(), torch.tensor(x.toarray()).to_sparse()):
        ours = MultiTaskLasso(**settings).fit(given, torch.tensor(y) if isinstance(given, torch.Tensor) else y, weights)
        coef = np.asarray(ours.coef_)
        assert np.array_equal(coef != 0, dense.coef_ != 0)
        np.testing.assert_allclose(coef, dense.coef_, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_one_target_is_the_lasso(name: str) -> None:
    x, y = CASES[name]()
    alpha = 0.05 * largest(x, y[:, None])
    ours, lasso = MultiTaskLasso(alpha).fit(x, y[:, None]), Lasso(alpha).fit(x, y)
    assert ours.coef_.shape == (1, x.shape[1])
    assert ours.intercept_.shape == (1,)
    assert np.array_equal(ours.coef_[0] != 0, lasso.coef_ != 0)
    np.testing.assert_allclose(ours.coef_[0], lasso.coef_, rtol=0, atol=1e-9 * np.abs(lasso.coef_).max())


@pytest.mark.parametrize("name", CASES)
def test_without_a_compiler_the_solution_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(name)
    model = MultiTaskLasso(0.05 * largest(x, y))
    compiled = model.fit(x, y).coef_
    monkeypatch.setattr(block_descent, "unavailable", lambda: "no compiler")
    ours = model.fit(x, y).coef_
    assert np.array_equal(ours != 0, compiled != 0)
    np.testing.assert_allclose(ours, compiled, rtol=0, atol=1e-10 * np.abs(compiled).max())
    assert relative_gap(x, y, ours, model.alpha) < 1e-14


@pytest.mark.parametrize("name", CASES)
def test_float32_is_certified_to_float32(name: str) -> None:
    x, y = (a.astype(np.float32) for a in data(name))
    alpha = 0.1 * largest(x.astype(np.float64), y.astype(np.float64))
    ours = MultiTaskLasso(alpha).fit(x, y)
    assert ours.coef_.dtype == ours.intercept_.dtype == np.float32
    assert relative_gap(x, y, ours.coef_, alpha) < 1e-5


def test_tensors_give_tensors() -> None:
    x, y = data("wide")
    alpha = 0.1 * largest(x, y)
    ours = MultiTaskLasso(alpha).fit(torch.tensor(x), torch.tensor(y))
    arrays = MultiTaskLasso(alpha).fit(x, y)
    assert isinstance(ours.coef_, torch.Tensor)
    np.testing.assert_allclose(ours.coef_, arrays.coef_, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.predict(torch.tensor(x)), arrays.predict(x), rtol=1e-10)
    assert ours.score(x, y) == pytest.approx(arrays.score(x, y))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", ["wide", "tall"])
def test_coefficients_begin_at_the_largest_strength(case: str, estimator: Any) -> None:
    x, y = data(case)
    edge = largest(x, y) / estimator().l1_ratio
    zero = estimator(edge * (1 + 1e-9)).fit(x, y)
    assert not zero.coef_.any()
    assert not np.signbit(zero.coef_).any()
    np.testing.assert_allclose(zero.intercept_, y.mean(0))
    assert estimator(edge * (1 - 1e-6)).fit(x, y).coef_.any(0).sum() == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_penalty_is_least_squares(estimator: Any) -> None:
    x, y = data("tall")
    theirs = sklearn.linear_model.LinearRegression().fit(x, y)
    np.testing.assert_allclose(estimator(alpha=0).fit(x, y).coef_, theirs.coef_, rtol=1e-9)


def test_no_group_norm_is_ridge() -> None:
    x, y = data("wide")
    theirs = sklearn.linear_model.Ridge(0.3 * len(y)).fit(x, y)
    ours = MultiTaskElasticNet(0.3, l1_ratio=0).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-7, atol=1e-10)
    assert ours.dual_gap_ < 1e-12 * (y**2).sum() / len(y)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
def test_a_constant_column_has_no_part(constant: float) -> None:
    x, y = data("tall")
    model = MultiTaskLasso(0.05).fit(np.c_[np.full(len(y), constant), x], y)
    assert not model.coef_[:, 0].any()
    np.testing.assert_allclose(model.coef_[:, 1:], MultiTaskLasso(0.05).fit(x, y).coef_, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["wide", "tall"])
def test_duplicated_columns_share_one_optimum(case: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(block_descent, "unavailable", lambda: "no compiler")
    x, y = data(case)
    alpha = 0.03 * largest(x, y)
    double = np.c_[x, x, -x]
    model = MultiTaskLasso(alpha).fit(double, y)
    assert relative_gap(double, y, model.coef_, alpha) < 1e-13
    np.testing.assert_allclose(model.predict(double), MultiTaskLasso(alpha).fit(x, y).predict(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_one_sample(fit_intercept: bool) -> None:
    x, y = [[1.0, 2.0, 0.0]], [[3.0, -1.0]]
    model = MultiTaskLasso(0.5, fit_intercept=fit_intercept).fit(x, y)
    theirs = sklearn.linear_model.MultiTaskLasso(0.5, fit_intercept=fit_intercept, tol=1e-14).fit(x, y)
    np.testing.assert_allclose(model.coef_, theirs.coef_, atol=1e-10)


def test_many_more_features_than_samples() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 2000)), rng.standard_normal((8, 4))
    alpha = 1e-3 * largest(x, y)
    model = MultiTaskLasso(alpha).fit(x, y)
    assert relative_gap(x, y, model.coef_, alpha) < 1e-13


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_badly_scaled_columns(case: str) -> None:
    x, y = data(case)
    x = x * np.logspace(-8, 8, x.shape[1])
    alpha = 1e-4 * largest(x, y)
    assert relative_gap(x, y, MultiTaskLasso(alpha).fit(x, y).coef_, alpha) < 1e-12


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_finite_is_refused(estimator: Any, value: float) -> None:
    x, y = data("tall")
    bad = x.copy()
    bad[3, 2] = value
    for arguments in ((bad, y), (x, np.where(y == y.max(), value, y))):
        for convert in (np.asarray, torch.tensor):
            with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
                estimator().fit(*map(convert, arguments))


def test_a_single_target_is_refused_by_name() -> None:
    x, y = CASES["tall"]()
    with pytest.raises(ValueError, match="For mono-task outputs, use Lasso"):
        MultiTaskLasso().fit(x, y)
    with pytest.raises(ValueError, match="For mono-task outputs, use ElasticNet"):
        MultiTaskElasticNet().fit(torch.tensor(x), torch.tensor(y))


def test_a_warm_start_begins_where_the_last_fit_ended() -> None:
    x, y = data("correlated")
    alpha = 0.05 * largest(x, y)
    model = MultiTaskLasso(alpha, warm_start=True).fit(x, y)
    cold = model.coef_
    assert model.fit(x, y).n_iter_ <= 3
    np.testing.assert_allclose(model.coef_, cold, rtol=0, atol=1e-10)
    assert_same(model.set_params(alpha=alpha / 2).fit(x, y), MultiTaskLasso(alpha / 2).fit(x, y))
    with pytest.raises(ValueError, match="warm start of shape"):
        model.fit(x[:, :5], y)


def test_too_few_steps_are_reported() -> None:
    x, y = data("correlated")
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        MultiTaskLasso(1e-3 * largest(x, y), max_iter=1, tol=1e-12).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiTaskLasso(1e-3 * largest(x, y), tol=1e-12).fit(x, y)


def test_models_survive_copies_and_pickles() -> None:
    x, y = data("wide")
    model = MultiTaskElasticNet(0.5).fit(x, y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.predict(x), model.predict(x))


@pytest.mark.parametrize("name", CASES)
def test_a_path_is_its_single_fits(name: str) -> None:
    x, y = data(name)
    x, y = x - x.mean(0), y - y.mean(0)
    alphas, coefs, gaps, steps = lasso_path(x, y, alphas=20, return_n_iter=True)
    assert alphas[0] == pytest.approx(largest(x, y))
    assert coefs.shape == (3, x.shape[1], 20)
    assert gaps.max() <= 1e-12 * (y**2).sum() / len(y)
    assert len(steps) == 20
    for i in (1, 8, 19):
        single = MultiTaskLasso(alphas[i], fit_intercept=False).fit(x, y).coef_
        assert np.array_equal(coefs[..., i] != 0, single != 0)
        np.testing.assert_allclose(coefs[..., i], single, rtol=0, atol=1e-9 * max(1.0, np.abs(single).max()))


def test_paths_of_sparse_data_and_tensors_are_the_dense_ones() -> None:
    x, y = sparse_case()
    y = targets(x, y)
    alphas, coefs, _ = enet_path(x.toarray(), y, alphas=10)
    for given, wanted in ((x, y), (torch.tensor(x.toarray()), torch.tensor(y))):
        again = enet_path(given, wanted, alphas=10)
        np.testing.assert_allclose(again[0], alphas)
        np.testing.assert_allclose(again[1], coefs, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="positive=True is not allowed"):
        lasso_path(x, y, positive=True)


def test_strengths_down_to_none_end_at_least_squares() -> None:
    x, y = data("tall")
    coefs = lasso_path(x, y, alphas=[1.0, 0.1, 0.0])[1]
    np.testing.assert_allclose(coefs[..., 2], np.linalg.lstsq(x, y)[0].T, rtol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_cross_validation_is_scikit_learns(name: str, weighted: bool) -> None:
    x, y = data(name)
    weights = np.random.default_rng(1).uniform(0.1, 3, len(y)) if weighted else None
    settings = {"l1_ratio": [0.5, 0.9], "alphas": 6, "eps": 0.02, "cv": 3}
    ours = MultiTaskElasticNetCV(**settings).fit(x, y, sample_weight=weights)
    theirs = sklearn.linear_model.MultiTaskElasticNetCV(**settings, tol=1e-10, max_iter=100_000)
    theirs.fit(x, y, sample_weight=weights)
    np.testing.assert_allclose(ours.alphas_, theirs.alphas_)
    np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-6)
    assert (ours.alpha_, ours.l1_ratio_) == pytest.approx((theirs.alpha_, theirs.l1_ratio_))
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=1e-6 * np.abs(theirs.coef_).max())


def test_cross_validation_of_one_target_is_that_of_the_lasso() -> None:
    x, y = CASES["wide"]()
    ours, lasso = MultiTaskLassoCV(alphas=8, cv=3).fit(x, y[:, None]), LassoCV(alphas=8, cv=3).fit(x, y)
    np.testing.assert_allclose(ours.mse_path_, lasso.mse_path_, rtol=1e-8)
    np.testing.assert_allclose(ours.coef_[0], lasso.coef_, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="For mono-task outputs, use LassoCV"):
        MultiTaskLassoCV().fit(x, y)


def test_cross_validation_of_sparse_data_and_tensors() -> None:
    x, y = sparse_case()
    y = targets(x, y)
    dense = MultiTaskLassoCV(alphas=5, cv=3).fit(x.toarray(), y)
    np.testing.assert_allclose(MultiTaskLassoCV(alphas=5, cv=3).fit(x, y).mse_path_, dense.mse_path_, rtol=1e-8)
    tensors = MultiTaskLassoCV(alphas=5, cv=3).fit(torch.tensor(x.toarray()), torch.tensor(y))
    assert isinstance(tensors.coef_, torch.Tensor)
    np.testing.assert_allclose(tensors.mse_path_, dense.mse_path_, rtol=1e-8)
