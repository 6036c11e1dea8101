"""Cross-validation: scikit-learn's table of errors, whichever way the folds are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
from linear_cases import CASES, sparse_case, tall
from sklearn.model_selection import KFold, ShuffleSplit

from torchreg.linear import ElasticNetCV, Lasso, LassoCV, MultiTaskLassoCV
from torchreg.linear.paths import folds

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # scikit-learn's own
EXACT = {"tol": 1e-12, "max_iter": 1_000_000}


def assert_same(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours.alphas_, theirs.alphas_, rtol=1e-12)
    np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-6)
    assert ours.alpha_ == pytest.approx(theirs.alpha_, rel=1e-12)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8 * np.abs(theirs.coef_).max())
    assert ours.intercept_ == pytest.approx(theirs.intercept_)


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_scikit_learns(name: str) -> None:
    x, y = CASES[name]()
    settings = {"alphas": 12, "eps": 0.02, "cv": 4}
    assert_same(LassoCV(**settings).fit(x, y), sklearn.linear_model.LassoCV(**settings, **EXACT).fit(x, y))


def test_several_ratios() -> None:
    x, y = tall()
    settings = {"l1_ratio": [0.2, 0.7, 1.0], "alphas": 8, "cv": 3}
    ours, theirs = ElasticNetCV(**settings).fit(x, y), sklearn.linear_model.ElasticNetCV(**settings, **EXACT).fit(x, y)
    assert_same(ours, theirs)
    assert ours.l1_ratio_ == theirs.l1_ratio_


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "cv",
    [KFold(4, shuffle=True, random_state=0), ShuffleSplit(3, train_size=0.5, test_size=0.2, random_state=0)],
    ids=["partition", "random"],
)
def test_any_split_weights_and_intercept(cv: Any, weighted: bool, fit_intercept: bool) -> None:
    x, y = tall()
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y)) if weighted else None
    settings = {"alphas": [1.0, 0.3, 0.01], "cv": cv, "fit_intercept": fit_intercept}
    theirs = sklearn.linear_model.LassoCV(**settings, **EXACT).fit(x, y, weights)
    assert_same(LassoCV(**settings).fit(x, y, weights), theirs)


def test_sparse_data() -> None:
    x, y = sparse_case()
    settings = {"alphas": 10, "eps": 0.05, "cv": 3}
    assert_same(LassoCV(**settings).fit(x, y), sklearn.linear_model.LassoCV(**settings, **EXACT).fit(x.toarray(), y))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_folds_of_one_gram_matrix_are_those_of_paths(
    monkeypatch: pytest.MonkeyPatch, fit_intercept: bool, weighted: bool
) -> None:
    x, y = tall()
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y)) if weighted else None
    model = LassoCV(alphas=10, cv=5, fit_intercept=fit_intercept)
    by_gram = model.fit(x, y, weights).mse_path_
    monkeypatch.setattr(folds, "is_narrow", lambda *_: False)
    np.testing.assert_allclose(model.fit(x, y, weights).mse_path_, by_gram, rtol=1e-9)


def test_a_feature_of_one_fold_only() -> None:
    """What is left of its square in the other samples is rounding, in a difference of Gram matrices."""
    x, y = tall()
    x[:, 0] = 0
    x[:40, 0] = 1e6 * np.random.default_rng(0).standard_normal(40)
    x[45, 1] = 1e9
    settings = {"alphas": [1.0, 0.1, 0.01], "cv": 5}
    ours = LassoCV(**settings).fit(x, y)
    assert_same(ours, sklearn.linear_model.LassoCV(**settings, **EXACT).fit(x, y))


def test_errors_much_smaller_than_the_targets() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 5))
    y = 1e4 * x[:, 0] + 1e-3 * rng.standard_normal(100)
    settings = {"alphas": [1e-4, 1e-5], "cv": 5}
    ours, theirs = LassoCV(**settings).fit(x, y), sklearn.linear_model.LassoCV(**settings, tol=1e-16).fit(x, y)
    np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-6)


def test_several_targets_are_refused() -> None:
    x, y = tall()
    with pytest.raises(ValueError, match="use MultiTaskLassoCV"):
        LassoCV().fit(x, np.c_[y, y])


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e5])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_folds_of_neighbours_are_those_of_scattered_samples(offset: float, fit_intercept: bool) -> None:
    """Neighbouring rows are a view, and the last fit takes the folds' Gram matrix: neither may be seen."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 7)) + offset
    y = x[:, 0] - x[:, 3] + rng.standard_normal(60)
    folds = [(np.delete(np.arange(60), part), part) for part in np.arange(60).reshape(4, 15)]
    scattered = [(train[::-1].copy(), test[::-1].copy()) for train, test in folds]
    a, b = (LassoCV(alphas=20, cv=cv, fit_intercept=fit_intercept).fit(x, y) for cv in (folds, scattered))
    np.testing.assert_allclose(a.mse_path_, b.mse_path_, rtol=1e-8)
    assert a.alpha_ == b.alpha_
    alone = Lasso(a.alpha_, fit_intercept=fit_intercept).fit(x, y)
    np.testing.assert_allclose(a.coef_, alone.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(a.intercept_, alone.intercept_, rtol=1e-8, atol=1e-8)
    centred = y - y.mean() * fit_intercept
    assert a.dual_gap_ <= 1e-14 * (centred @ centred) / 60


@pytest.mark.parametrize(("kept", "part"), [(slice(20, None), "test"), (slice(0, 20), "training")])
@pytest.mark.parametrize("model", [LassoCV, ElasticNetCV, MultiTaskLassoCV])
@pytest.mark.parametrize("copies", [1, 30])
def test_folds_without_weight_are_refused(model: Any, copies: int, kept: slice, part: str) -> None:
    """The wide way gave NaN for them, and took the largest strength for the best."""
    x, y = tall()
    x, y = np.tile(x[:80], (1, copies)), y[:80]
    weights = np.zeros(80)
    weights[kept] = 1
    targets = np.c_[y, -y] if model is MultiTaskLassoCV else y
    with pytest.raises(ValueError, match=rf"each fold to have {part} samples of positive weight, fold 0 of 4"):
        model(alphas=5, cv=4).fit(x, targets, sample_weight=weights)
    with pytest.raises(ValueError, match=r"fold 1 of 2 has none among 0 of 80 samples"):
        model(alphas=5, cv=[(range(40), range(40, 80)), (range(40), [])]).fit(x, targets)
