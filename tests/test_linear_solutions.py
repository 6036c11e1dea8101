"""The coefficients are scikit-learn's, only exact: supports agree, and the duality gap is rounding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from linear_cases import CASES, largest, relative_gap, sparse_case

from torchreg.linear import ElasticNet, Lasso, alpha_max, enet_path, lasso_path
from torchreg.linear.data import native_columns
from torchreg.linear.data.design import Dense
from torchreg.linear.lasso import working_set
from torchreg.linear.quadratic import native_newton

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # scikit-learn's own
FRACTIONS = [0.5, 0.1, 0.01]


@cache
def data(name: str) -> tuple[Any, Any]:
    return CASES[name]()


def assert_same(ours: Any, theirs: Any) -> None:
    assert np.array_equal(ours.coef_ != 0, theirs.coef_ != 0)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=1e-8 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", CASES)
def test_lasso_is_scikit_learns(name: str, fraction: float) -> None:
    x, y = data(name)
    alpha = fraction * largest(x, y)
    ours = Lasso(alpha).fit(x, y)
    assert_same(ours, sklearn.linear_model.Lasso(alpha, tol=1e-12, max_iter=1_000_000).fit(x, y))
    assert relative_gap(x, y, ours.coef_, ours.intercept_, alpha) < 1e-12
    assert ours.dual_gap_ <= 1e-12 * y.var()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("l1_ratio", [0.9, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_elastic_net_is_scikit_learns(name: str, l1_ratio: float, positive: bool) -> None:
    x, y = data(name)
    settings = {"alpha": 0.1 * largest(x, y), "l1_ratio": l1_ratio, "positive": positive}
    ours = ElasticNet(**settings).fit(x, y)
    assert_same(ours, sklearn.linear_model.ElasticNet(**settings, tol=1e-12, max_iter=1_000_000).fit(x, y))
    assert ours.dual_gap_ <= 1e-12 * y.var()
    if not positive:
        assert relative_gap(x, y, ours.coef_, ours.intercept_, settings["alpha"], l1_ratio) < 1e-12


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_weighted_lasso_is_scikit_learns(name: str, fit_intercept: bool) -> None:
    x, y = data(name)
    weights = np.random.default_rng(1).uniform(0, 3, len(y))
    weights[:5] = 0
    settings = {"alpha": 0.1 * largest(x, y), "fit_intercept": fit_intercept}
    theirs = sklearn.linear_model.Lasso(**settings, tol=1e-12, max_iter=1_000_000).fit(x, y, weights)
    assert_same(Lasso(**settings).fit(x, y, weights), theirs)
    assert_same(Lasso(**settings).fit(x, y, 7 * weights), theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_sparse_lasso_is_the_dense_one(fraction: float, fit_intercept: bool, weighted: bool) -> None:
    x, y = sparse_case()
    weights = np.random.default_rng(1).uniform(0, 3, len(y)) if weighted else None
    settings = {"alpha": fraction * largest(x.toarray(), y), "fit_intercept": fit_intercept}
    dense = Lasso(**settings).fit(x.toarray(), y, weights)
    for given in (x, x.tocsr(), torch.tensor(x.toarray()).to_sparse()):
        ours = Lasso(**settings).fit(given, torch.tensor(y) if isinstance(given, torch.Tensor) else y, weights)
        coef = np.asarray(ours.coef_)
        assert np.array_equal(coef != 0, dense.coef_ != 0)
        np.testing.assert_allclose(coef, dense.coef_, rtol=0, atol=1e-9)
        assert ours.dual_gap_ <= 1e-12 * y.var()


@pytest.mark.parametrize("name", CASES)
def test_float32_is_certified_to_float32(name: str) -> None:
    x, y = (a.astype(np.float32) for a in data(name))
    alpha = 0.1 * largest(x.astype(np.float64), y.astype(np.float64))
    ours = Lasso(alpha).fit(x, y)
    assert ours.coef_.dtype == np.float32
    assert relative_gap(x, y, ours.coef_, ours.intercept_, alpha) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_path_is_its_single_fits(name: str) -> None:
    x, y = data(name)
    x, y = x - x.mean(0), y - y.mean()
    alphas, coefs, gaps = lasso_path(x, y, alphas=40)
    assert alphas[0] == pytest.approx(largest(x, y))
    assert gaps.max() <= 1e-12 * y.var()
    for i in (0, 1, 13, 27, 39):
        single = Lasso(alphas[i], fit_intercept=False).fit(x, y).coef_
        assert np.array_equal(coefs[:, i] != 0, single != 0) or i == 0  # at the largest strength one is on the edge
        np.testing.assert_allclose(coefs[:, i], single, rtol=0, atol=1e-9 * max(1.0, np.abs(single).max()))


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_paths_of_sparse_data_are_the_dense_ones(l1_ratio: float) -> None:
    x, y = sparse_case()
    alphas, coefs, gaps, steps = enet_path(x, y, l1_ratio=l1_ratio, alphas=20, return_n_iter=True)
    dense = enet_path(x.toarray(), y, l1_ratio=l1_ratio, alphas=20)
    np.testing.assert_allclose(alphas, dense[0])
    np.testing.assert_allclose(coefs, dense[1], rtol=0, atol=1e-8)
    assert gaps.max() <= 1e-12 * (y @ y) / len(y)
    assert len(steps) == 20


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_largest_strength_is_where_coefficients_begin(name: str, positive: bool) -> None:
    x, y = data(name)
    edge = alpha_max(x, y, l1_ratio=0.5, positive=positive)
    assert not ElasticNet(edge * (1 + 1e-9), positive=positive).fit(x, y).coef_.any()
    assert ElasticNet(edge * (1 - 1e-6), positive=positive).fit(x, y).coef_.any()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_left_as_they_were() -> None:
    Lasso(0.1).fit(*data("wide"))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fraction", [1e-2, 1.0, 10.0])
def test_two_threads_find_the_same_also_where_nothing_is_to_be_found(fraction: float) -> None:
    rng = np.random.default_rng(0)
    x, y = np.asfortranarray(rng.standard_normal((300, 4000))), rng.standard_normal(300)
    ours = Lasso(fraction * alpha_max(x, y)).fit(x, y)
    torch.set_num_threads(1)
    theirs = Lasso(fraction * alpha_max(x, y)).fit(x, y)
    assert_same(ours, theirs)
    assert ours.dual_gap_ < 1e-12 * y.var()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", ["wide", "correlated"])
def test_columns_that_are_not_read_at_each_step_are_in_the_end(
    name: str, positive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few are: here the tenth that pulled strongest before."""
    if native_columns.unavailable() is not None:
        pytest.skip(str(native_columns.unavailable()))
    read: list[int] = []
    monkeypatch.setattr(native_columns, "_FEWEST", 0)
    some = Dense.some_correlations
    monkeypatch.setattr(Dense, "some_correlations", lambda *a: (read.append(len(a[2])), some(*a))[1])
    monkeypatch.setattr(working_set, "_DEEP", 1)
    monkeypatch.setattr(working_set, "_FEWEST", 5)
    monkeypatch.setattr(working_set, "_STRONG", 1.6)
    monkeypatch.setattr(working_set, "_SIMILAR", float("inf"))
    x, y = data(name)
    x = np.asfortranarray(x)
    for fraction in FRACTIONS:
        alpha = fraction * largest(x, y)
        ours = Lasso(alpha, positive=positive).fit(x, y)
        theirs = sklearn.linear_model.Lasso(alpha, positive=positive, tol=1e-12, max_iter=10**6).fit(x, y)
        assert_same(ours, theirs)
        assert positive or relative_gap(x, y, ours.coef_, ours.intercept_, alpha) < 1e-12
        assert ours.dual_gap_ < 1e-12 * y.var()
    assert 0 < max(read) < x.shape[1]


@pytest.mark.parametrize("name", CASES)
def test_without_a_compiler_the_solutions_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(name)
    alpha = 0.05 * largest(x, y)
    compiled = Lasso(alpha).fit(x, y)
    monkeypatch.setattr(native_newton, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(native_columns, "unavailable", lambda: "no compiler")
    ours = Lasso(alpha).fit(x, y)
    assert np.array_equal(ours.coef_ != 0, compiled.coef_ != 0)
    np.testing.assert_allclose(ours.coef_, compiled.coef_, rtol=0, atol=1e-10 * np.abs(compiled.coef_).max())
