"""Data that other solvers stumble on: the right answer, or scikit-learn's own error."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from linear_cases import largest, relative_gap, tall, wide
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from torchreg.linear import ElasticNet, ElasticNetCV, Lasso, LassoCV, Ridge, lasso_path
from torchreg.linear.data import native_columns
from torchreg.linear.data.inputs import read

ESTIMATORS = [Lasso, ElasticNet, LassoCV, ElasticNetCV]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        yield


def test_many_more_features_than_samples() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3000)), rng.standard_normal(8)
    alpha = 1e-3 * largest(x, y)
    model = Lasso(alpha).fit(x, y)
    assert relative_gap(x, y, model.coef_, model.intercept_, alpha) < 1e-12
    assert 0 < np.count_nonzero(model.coef_) < 8  # never more than the rank


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_one_sample(fit_intercept: bool) -> None:
    model = Lasso(0.5, fit_intercept=fit_intercept).fit([[1.0, 2.0, 0.0]], [3.0])
    theirs = sklearn.linear_model.Lasso(0.5, fit_intercept=fit_intercept, tol=1e-12).fit([[1.0, 2.0, 0.0]], [3.0])
    np.testing.assert_allclose(model.coef_, theirs.coef_, atol=1e-12)
    np.testing.assert_allclose(model.intercept_, theirs.intercept_, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("container", [np.asarray, sparse.csc_array])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
@pytest.mark.filterwarnings("ignore:With alpha=0")
def test_a_constant_column_has_no_part(constant: float, container: Any, alpha: float) -> None:
    x, y = tall()
    model = Lasso(alpha).fit(container(np.c_[np.full(len(y), constant), x]), y)
    assert model.coef_[0] == 0
    np.testing.assert_allclose(model.coef_[1:], Lasso(alpha).fit(x, y).coef_, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("container", [np.asarray, sparse.csc_array])
def test_duplicated_columns_share_one_optimum(container: Any) -> None:
    x, y = wide()
    alpha = 0.05 * largest(x, y)
    single = Lasso(alpha).fit(x, y)
    double = np.c_[x, x, -x]
    model = Lasso(alpha).fit(container(double), y)
    assert relative_gap(double, y, model.coef_, model.intercept_, alpha) < 1e-12
    np.testing.assert_allclose(model.predict(double), single.predict(x), rtol=1e-9)


def test_elastic_net_spreads_over_duplicated_columns() -> None:
    x, y = tall()
    model = ElasticNet(0.1, l1_ratio=0.5).fit(np.c_[x, x], y)
    np.testing.assert_allclose(model.coef_[:30], model.coef_[30:], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:With alpha=0")
@pytest.mark.parametrize("estimator", [Lasso, ElasticNet])
def test_no_penalty_is_least_squares(estimator: Any) -> None:
    x, y = tall()
    model = estimator(alpha=0).fit(x, y)
    theirs = sklearn.linear_model.LinearRegression().fit(x, y)
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:With alpha=0")
def test_no_penalty_and_more_features_than_samples_fits_exactly() -> None:
    x, y = wide()
    model = Lasso(alpha=0).fit(x, y)
    np.testing.assert_allclose(model.predict(x), y, rtol=1e-9)


@pytest.mark.parametrize("case", [wide, tall])
def test_a_strength_beyond_the_largest_leaves_the_mean(case: Any) -> None:
    x, y = case()
    model = Lasso(2 * largest(x, y)).fit(x, y)
    assert not model.coef_.any()
    assert model.dual_gap_ == pytest.approx(0, abs=1e-14)
    assert model.intercept_ == pytest.approx(y.mean())


@pytest.mark.parametrize("case", [wide, tall])
def test_badly_scaled_columns(case: Any) -> None:
    x, y = case()
    x = x * np.logspace(-8, 8, x.shape[1])
    alpha = 1e-4 * largest(x, y)
    model = Lasso(alpha).fit(x, y)
    assert relative_gap(x, y, model.coef_, model.intercept_, alpha) < 1e-12


def test_targets_that_do_not_vary() -> None:
    x, _ = wide()
    model = Lasso(0.1).fit(x, np.full(len(x), 2.5))
    assert not model.coef_.any()
    assert model.intercept_ == 2.5


def test_data_far_from_the_origin() -> None:
    x, y = tall()
    near, far = Lasso(0.05).fit(x, y), Lasso(0.05).fit(x + 1e6, y - 1e6)
    np.testing.assert_allclose(far.coef_, near.coef_, atol=1e-8)


@pytest.mark.parametrize("solver", ["auto", "cd", "fista"])
@pytest.mark.parametrize("offset", [3e3, 1e5, 1e7])
@pytest.mark.parametrize("few", [False, True], ids=["all columns", "few"])
@pytest.mark.parametrize("case", [tall, wide])
def test_large_means_cost_no_digits(
    case: Any, few: bool, offset: float, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Gram matrix had none to lose, but each product with X lost as many as the mean has more than the others."""
    monkeypatch.setattr(native_columns, "_FEWEST", 0)
    x, y = case()
    x = x + offset * (np.arange(x.shape[1]) % 7 == 0 if few else 1)
    x[:, 3] = offset  # a constant
    near = x - x.mean(0)  # exact, but for a shift of all samples alike
    alpha = 0.1 * largest(near, y)
    for container in (np.ascontiguousarray, np.asfortranarray):
        model = Lasso(alpha, solver=solver).fit(container(x), y)
        assert model.dual_gap_ < 1e-14 * np.square(y - y.mean()).mean()
        assert relative_gap(near, y - y.mean(), model.coef_, 0.0, alpha) < 1e-14
        assert model.coef_[3] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("samples", [20_000, 300_000])
def test_means_of_constant_columns_are_exact(samples: int, dtype: Any) -> None:
    """A sum of equal numbers is off by more roundings than a constant column is allowed to vary."""
    rng = np.random.default_rng(0)
    x = np.asfortranarray(
        np.c_[rng.standard_normal((samples, 2)), np.tile([0.1, 1 / 3, 1e5 + 0.1], (samples, 1))], dtype
    )
    x[:, 1] = x[:, 0] > -3.1  # nearly constant, but no mean that is far larger
    y = x[:, 0] + rng.standard_normal(samples)
    weights = rng.uniform(0.5, 2, samples).astype(dtype).astype(float)
    for w in (None, weights):
        data = read(Lasso(), x, y, w)
        np.testing.assert_allclose(data.mean, np.average(x.astype(float), axis=0, weights=w), rtol=1e-12, atol=1e-12)
        assert w is not None or data.mean[2:].tolist() == x[0, 2:].astype(float).tolist()
        assert data.design(True)[0].far.tolist() == [2, 3, 4]
        moment, product = data.moment(data.design(True)[0]), data.design(True)[0].correlations(data.targets(True)[0])
        np.testing.assert_allclose(moment, product[0], atol=1e-10)
        assert not Ridge(1e-6).fit(x, y, w).coef_[2:].any()
        for order in "FC":
            model = Lasso(1e-5).fit(np.array(x, order=order), y, w)
            assert not model.coef_[2:].any()
            assert model.dual_gap_ < (1e-12 if dtype == np.float64 else 1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["X", "y"])
def test_values_that_are_not_finite_are_refused(estimator: Any, bad: float, where: str) -> None:
    x, y = tall()
    (x if where == "X" else y)[3] = bad
    with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
        estimator().fit(x, y)
    with pytest.raises(ValueError, match=rf"Input {where} contains NaN or infinity"):
        estimator().fit(torch.tensor(x), torch.tensor(y))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_empty_data_are_refused(estimator: Any, shape: tuple[int, int]) -> None:
    for x, y in ((np.empty(shape), np.zeros(shape[0])), (torch.empty(shape), torch.zeros(shape[0]))):
        with pytest.raises(ValueError, match=r"Found array with 0"):
            estimator().fit(x, y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lengths_that_differ_are_refused(estimator: Any) -> None:
    x, y = tall()
    for given in (x, torch.tensor(x)):
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            estimator().fit(given, y[:-1])


@pytest.mark.parametrize("case", [wide, tall])
def test_data_too_large_for_float64_are_refused(case: Any) -> None:
    x, y = case()
    with pytest.raises(ValueError, match="non-finite"), np.errstate(all="ignore"):
        Lasso(0.1).fit(x * 1e300, y)


@pytest.mark.parametrize("weights", [[0.0] * 200, [-1.0] + [1.0] * 199, [1.0] * 3])
def test_unsuitable_weights_are_refused(weights: list[float]) -> None:
    x, y = tall()
    for given in ((x, y, weights), (torch.tensor(x), torch.tensor(y), torch.tensor(weights))):
        with pytest.raises(ValueError, match=r"[Ww]eight"):
            Lasso(0.1).fit(*given)


@pytest.mark.parametrize("solver", ["auto", "cd", "fista"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("estimator", [Lasso, ElasticNet])
def test_strengths_of_numpys_narrow_types_are_certified_as_floats(estimator: Any, kind: Any, solver: str) -> None:
    x, y = wide()
    given, exact = (estimator(alpha, solver=solver).fit(x, y) for alpha in (kind(0.05), float(kind(0.05))))
    assert given.dual_gap_ == exact.dual_gap_
    np.testing.assert_array_equal(given.coef_, exact.coef_)


@pytest.mark.filterwarnings("ignore:With alpha=0")
def test_a_certificate_that_overflowed_certifies_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 5)) * 1e-160
    y = x @ np.array([1e160, 0, -2e160, 0, 0.5e160]) + 0.1 * rng.standard_normal(30)
    with pytest.warns(ConvergenceWarning):
        model = ElasticNet(alpha=0.0).fit(x, y)
    assert np.isnan(model.dual_gap_)


def test_too_few_steps_are_said() -> None:
    x, y = tall()
    with pytest.warns(ConvergenceWarning, match="Objective did not converge"):
        Lasso(0.05, max_iter=1, tol=1e-12).fit(x, y)


@pytest.mark.parametrize("alphas", [[], [-1.0], [np.nan], [[1.0]]])
def test_unsuitable_strengths_of_a_path_are_refused(alphas: Any) -> None:
    with pytest.raises(ValueError, match="non-negative numbers"):
        lasso_path(*tall(), alphas=alphas)


@pytest.mark.parametrize("features", [6, 200])
@pytest.mark.parametrize("solver", ["auto", "fista", "cd"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_without_weight_have_to_be_finite_too(bad: float, solver: str, features: int) -> None:
    """They have no part in any product, so that none would show them."""
    x = np.random.default_rng(0).standard_normal((60, features))
    y, weights = x[:, 0].copy(), np.ones(60)
    x[10:20, 1], weights[10:20] = bad, 0
    for pack in (np.asarray, torch.tensor):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            Lasso(0.05, fit_intercept=False, solver=solver).fit(pack(x), pack(y), sample_weight=pack(weights))


def test_a_refinement_that_diverges_is_not_taken() -> None:
    """Errors on the support are noise where float32 can't tell columns apart: only the gap says what is better."""
    rng = np.random.default_rng(283)
    x = (rng.standard_normal((200, 1)) + 1e-6 * rng.standard_normal((200, 3))).astype(np.float32)
    y = (x[:, 0] + 0.1 * rng.standard_normal(200)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of alpha=0
        model = Lasso(0.0, fit_intercept=False).fit(x, y)
    assert model.score(x, y) > 0.99
    assert model.dual_gap_ < 1e-5


def test_powers_of_a_variable_have_a_certificate() -> None:
    rng = np.random.default_rng(2)
    t = rng.uniform(0, 100, 300)
    x, y = np.stack([t**j for j in range(1, 7)], 1), t / 100 + 0.1 * rng.standard_normal(300)
    model = ElasticNet(0.01, l1_ratio=1e-3, positive=True).fit(x, y)
    assert model.dual_gap_ < 1e-12


def test_positive_coefficients_stay_so_where_steps_run_out() -> None:
    rng = np.random.default_rng(346)
    x, y = rng.standard_normal((30, 15)), rng.standard_normal(30)
    for steps in range(1, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert Lasso(0.0, positive=True, max_iter=steps).fit(x, y).coef_.min() >= 0
