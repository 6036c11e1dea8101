"""Ridge regression: scikit-learn's solutions, exact leave-one-out errors, and data that are hard."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from linear_cases import CASES, sparse_case, tall, wide
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.utils.estimator_checks import check_estimator

import torchreg.linear.ridge.solver
from torchreg.linear import Ridge, RidgeCV

ALPHAS = [0.01, 1.0, 30.0]


def close(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def data(case: str, targets: int, weighted: bool) -> tuple[Any, Any, Any]:
    x, y = CASES[case]()
    rng = np.random.default_rng(1)
    y = y if targets == 1 else np.c_[y, rng.standard_normal((len(y), targets - 1))]
    return x, y, rng.uniform(0.1, 5, len(y)) if weighted else None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ["auto", "svd", "cholesky", "sparse_cg"])
def test_coefficients_are_those_of_scikit_learn(solver: str, case: str, fit_intercept: bool, weighted: bool) -> None:
    x, y, weights = data(case, 2, weighted)
    for alpha in (0.3, [0.05, 20.0]):
        theirs = sklearn.linear_model.Ridge(alpha, fit_intercept=fit_intercept, solver="svd").fit(x, y, weights)
        ours = Ridge(alpha, fit_intercept=fit_intercept, solver=solver).fit(x, y, weights)
        close(ours.coef_, theirs.coef_)
        close(ours.intercept_, theirs.intercept_)
        assert (ours.dual_gap_ <= 1e-14 * np.square(y).sum(0)).all()


def test_many_strengths_share_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = data("correlated", 8, False)
    alphas = np.logspace(-2, 2, 8)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    model = Ridge(alphas).fit(x, y)
    assert calls == [(80, 80)]
    close(model.coef_, sklearn.linear_model.Ridge(alphas, solver="svd").fit(x, y).coef_)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_sparse_data(shape: str, fit_intercept: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sparse_case()
    x = x if shape == "wide" else x[:, :60]
    dense = x.toarray()
    weights = np.random.default_rng(0).uniform(0.1, 2, len(y)) if weighted else None
    monkeypatch.setattr(type(x), "toarray", None)
    expected = Ridge(0.1, fit_intercept=fit_intercept, solver="svd").fit(dense, y, weights)
    for form in ("csc", "csr", "coo"):
        close(Ridge(0.1, fit_intercept=fit_intercept).fit(x.asformat(form), y, weights).coef_, expected.coef_)
    monkeypatch.setattr(torchreg.linear.ridge.solver, "_LARGE", 10)
    model = Ridge(0.1, fit_intercept=fit_intercept).fit(x, y, weights)
    assert model.solver_ == "sparse_cg"
    close(model.coef_, expected.coef_, 1e-9)
    found = RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(x, y, weights)
    close(
        found.cv_results_,
        RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(dense, y, weights).cv_results_,
    )


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_positive_coefficients(alpha: float, fit_intercept: bool) -> None:
    x, y, weights = data("tall", 1, True)
    model = Ridge(alpha, positive=True, fit_intercept=fit_intercept).fit(x, y, weights)
    assert (model.coef_ >= 0).all()
    assert (model.coef_ == 0).any()
    shift = np.average(x, axis=0, weights=weights), np.average(y, weights=weights)
    x, y = (x - shift[0], y - shift[1]) if fit_intercept else (x, y)
    slope = x.T @ (weights * (y - x @ model.coef_)) - alpha * model.coef_
    scale = np.abs(x.T @ (weights * y)).max()
    assert slope.max() < 1e-9 * scale
    assert np.abs(slope[model.coef_ > 0]).max() < 1e-9 * scale
    assert model.dual_gap_ <= 1e-10 * (weights @ y**2)


@pytest.mark.parametrize("gcv_mode", [None, "svd", "eigen"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("shape", [(12, 5), (12, 12), (12, 40)])
def test_leave_one_out_is_brute_force(shape: Any, fit_intercept: bool, weighted: bool, gcv_mode: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape) + 2, rng.standard_normal((shape[0], 2))
    weights = rng.uniform(0.2, 3, shape[0]) if weighted else np.ones(shape[0])
    model = RidgeCV(ALPHAS, fit_intercept=fit_intercept, gcv_mode=gcv_mode, store_cv_results=True)
    model.fit(x, y, weights if weighted else None)
    expected = np.empty((shape[0], 2, len(ALPHAS)))
    for k, alpha in enumerate(ALPHAS):
        for i in range(shape[0]):
            rest = np.arange(shape[0]) != i
            one = sklearn.linear_model.Ridge(alpha, fit_intercept=fit_intercept, solver="svd")
            predicted = one.fit(x[rest], y[rest], weights[rest]).predict(x[[i]])[0]
            expected[i, :, k] = weights[i] * (y[i] - predicted) ** 2
    close(model.cv_results_, expected, 1e-9)
    best = expected.mean((0, 1)).argmin()
    assert model.alpha_ == ALPHAS[best]
    close(model.best_score_, -expected.mean((0, 1))[best], 1e-9)
    close(model.coef_, Ridge(ALPHAS[best], fit_intercept=fit_intercept).fit(x, y, weights).coef_)


@pytest.mark.parametrize("scoring", [None, "r2", "neg_mean_absolute_error"])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("per_target", [False, True])
def test_leave_one_out_results_are_those_of_scikit_learn(per_target: bool, targets: int, scoring: Any) -> None:
    x, y, weights = data("tall", targets, True)
    arguments = {"scoring": scoring, "alpha_per_target": per_target and targets > 1, "store_cv_results": True}
    ours = RidgeCV(ALPHAS, **arguments).fit(x, y, weights)
    theirs = sklearn.linear_model.RidgeCV(ALPHAS, **arguments).fit(x, y, weights)
    for name in ("coef_", "intercept_", "alpha_", "best_score_", "cv_results_"):
        assert np.shape(getattr(ours, name)) == np.shape(getattr(theirs, name))
        close(getattr(ours, name), getattr(theirs, name), 1e-9)


@pytest.mark.parametrize("case", ["wide", "tall", "sparse"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scoring", [None, "neg_mean_squared_error"])
def test_folds_are_those_of_a_grid_search(scoring: Any, weighted: bool, case: str) -> None:
    x, y = sparse_case() if case == "sparse" else CASES[case]()
    weights = np.random.default_rng(0).uniform(0.1, 2, len(y)) if weighted else None
    folds, alphas = KFold(4, shuffle=True, random_state=0), [*([0.0] if case == "tall" else []), *ALPHAS]
    model = RidgeCV(alphas, cv=folds, scoring=scoring).fit(x, y, weights)
    whole = x.toarray() if case == "sparse" else x
    search = GridSearchCV(sklearn.linear_model.Ridge(solver="svd"), {"alpha": alphas}, cv=folds, scoring=scoring)
    search.fit(whole, y, sample_weight=weights)
    assert model.alpha_ == search.best_params_["alpha"]
    close(model.best_score_, search.best_score_, 1e-8)
    close(model.coef_, search.best_estimator_.coef_, 1e-8)


@pytest.mark.parametrize("cv", [None, 3])
@pytest.mark.parametrize("targets", [1, 2])
def test_the_strength_that_is_chosen_is_certified(targets: int, cv: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 6)), rng.standard_normal((40, targets))
    y = y if targets > 1 else y[:, 0]
    weights = rng.uniform(0.5, 2, 40)
    model = RidgeCV(cv=cv).fit(x, y, weights)
    alone = Ridge(model.alpha_).fit(x, y, weights)
    np.testing.assert_allclose(model.coef_, alone.coef_, rtol=1e-12)
    assert np.shape(model.dual_gap_) == np.shape(alone.dual_gap_)
    assert np.max(model.dual_gap_) < 1e-20 * np.square(y).sum()


@pytest.mark.parametrize("estimator", [Ridge(), Ridge(positive=True), RidgeCV(), RidgeCV(cv=3)], ids=str)
def test_a_sparse_matrix_may_have_large_indices(estimator: Any) -> None:
    x = sparse.random(40, 6, 0.5, format="csr", random_state=0)
    y = np.arange(40.0)
    expected = estimator.fit(x, y).coef_
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    assert np.array_equal(estimator.fit(x, y).coef_, expected)


@pytest.mark.parametrize("scoring", [None, "r2"])
@pytest.mark.parametrize("targets", [0, 2])
def test_folds_of_a_sparse_tensor_are_those_of_a_dense_one(targets: int, scoring: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64).relu()
    y = torch.randn(40, max(1, targets), generator=generator, dtype=torch.float64)
    y = y if targets else y[:, 0]
    dense, found = (RidgeCV(cv=3, scoring=scoring).fit(z, y) for z in (x, x.to_sparse()))
    assert found.alpha_ == dense.alpha_
    assert found.best_score_ == pytest.approx(dense.best_score_, rel=1e-12)
    torch.testing.assert_close(found.coef_, dense.coef_)


def test_the_scale_of_weights_matters() -> None:
    x, y = tall()
    close(Ridge(2.0).fit(x, y, 4.0).coef_, Ridge(0.5).fit(x, y).coef_)
    close(Ridge(2.0).fit(x, y, np.full(len(y), 4)).coef_, Ridge(0.5).fit(x, y).coef_)
    close(RidgeCV([2.0]).fit(x, y, 4.0).coef_, Ridge(0.5).fit(x, y).coef_)
    twice = Ridge(2.0).fit(np.r_[x, x[:50]], np.r_[y, y[:50]])
    close(Ridge(2.0).fit(x, y, np.r_[np.full(50, 2.0), np.ones(len(y) - 50)]).coef_, twice.coef_)


@pytest.mark.parametrize("case", [tall, wide])
def test_tensors(case: Any) -> None:
    x, y = case()
    expected = Ridge(0.5).fit(x, y)
    model = Ridge(0.5).fit(torch.tensor(x), torch.tensor(y))
    assert isinstance(model.coef_, torch.Tensor)
    close(model.coef_.numpy(), expected.coef_)
    assert model.score(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected.score(x, y))
    for cv in (None, 3):
        tensors = RidgeCV(ALPHAS, cv=cv, scoring="r2").fit(torch.tensor(x), torch.tensor(y))
        close(tensors.coef_.numpy(), RidgeCV(ALPHAS, cv=cv, scoring="r2").fit(x, y).coef_)
    close(Ridge(0.5).fit(torch.tensor(x).to_sparse(), torch.tensor(y)).coef_.numpy(), expected.coef_)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames(library: str) -> None:
    frames = pytest.importorskip(library)
    x, y = tall()
    frame = frames.DataFrame({f"f{i}": column for i, column in enumerate(x.T)})
    for model in (Ridge(0.5), RidgeCV(ALPHAS), RidgeCV(ALPHAS, cv=3)):
        expected = model.fit(x, y).coef_
        close(model.fit(frame, frames.Series(y)).coef_, expected)
        assert list(model.feature_names_in_[:2]) == ["f0", "f1"]


@pytest.mark.parametrize("case", CASES)
def test_float32_is_solved_in_float64(case: str) -> None:
    x, y = (a.astype(np.float32) for a in CASES[case]())
    exact = Ridge(0.5, dtype="float64").fit(x, y)
    model = Ridge(0.5).fit(x, y)
    assert model.coef_.dtype == np.float32
    close(model.coef_, exact.coef_, 1.2e-7)
    assert RidgeCV(ALPHAS).fit(x, y).coef_.dtype == np.float32


def test_x_is_left_alone_unless_it_may_be_overwritten() -> None:
    x, y = tall()
    kept = x.copy()
    Ridge().fit(x, y)
    RidgeCV().fit(x, y)
    assert np.array_equal(x, kept)
    close(Ridge(copy_X=False).fit(x, y).coef_, Ridge().fit(kept, y).coef_)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array])
def test_without_a_penalty_the_shortest_solution(container: Any, fit_intercept: bool) -> None:
    for x, y in (wide(), tall(), (np.repeat(tall()[0], 2, 1), tall()[1])):
        z, t = (x - x.mean(0), y - y.mean()) if fit_intercept else (x, y)
        model = Ridge(0.0, fit_intercept=fit_intercept).fit(container(x), y)
        close(model.coef_, np.linalg.lstsq(z, t, rcond=1e-12)[0], 1e-8)


def test_equal_columns_share_one_coefficient() -> None:
    x, y = tall()
    model = Ridge(1e-9).fit(np.c_[x, x], y)
    close(model.coef_[:30], model.coef_[30:])
    close(2 * model.coef_[:30], Ridge(0.0).fit(x, y).coef_, 1e-8)


@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_badly_scaled_columns(alpha: float) -> None:
    x, y = tall()
    x = x - x.mean(0)
    scales = np.logspace(-8, 8, 30)
    model = Ridge(alpha).fit(x * scales, y)
    root = np.sqrt(alpha) / scales  # the same problem for coefficients times scales
    expected = np.linalg.lstsq(np.r_[x, np.diag(root)], np.r_[y - y.mean(), np.zeros(30)], rcond=None)[0]
    np.testing.assert_allclose(model.coef_ * scales, expected, rtol=1e-9, atol=1e-12)


def test_large_means_cost_no_digits() -> None:
    x, y = tall()
    x, mean = np.round(x * 2**10), 2.0**40  # exact in float64, shifted or not
    close(Ridge(1e4).fit(x + mean, y).coef_, Ridge(1e4).fit(x, y).coef_)
    close(RidgeCV([1e4]).fit(x + mean, y).best_score_, RidgeCV([1e4]).fit(x, y).best_score_, 1e-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_leave_one_out_keeps_its_digits_for_weak_penalties(fit_intercept: bool, transposed: bool) -> None:
    x, y = np.vander(np.linspace(0, 1, 40), 12), np.cos(np.linspace(0, 30, 40))
    x, y = (x.T, y[:12]) if transposed else (x, y)
    errors = [
        RidgeCV([1e-10], fit_intercept=fit_intercept, gcv_mode=mode, store_cv_results=True).fit(x, y).cv_results_
        for mode in (None, "svd")
    ]
    close(errors[0], errors[1], 1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
@pytest.mark.parametrize("container", [np.asarray, sparse.csc_array])
@pytest.mark.parametrize("case", [tall, wide])
def test_a_constant_column_has_no_part(case: Any, container: Any, constant: float, alpha: float) -> None:
    x, y = case()
    model = Ridge(alpha).fit(container(np.c_[np.full(len(y), constant), x]), y)
    assert abs(model.coef_[0]) * max(constant, 1) < 1e-9
    close(model.coef_[1:], Ridge(alpha).fit(x, y).coef_, 1e-7)


def test_an_ill_conditioned_matrix_is_decomposed_itself() -> None:
    x, y = np.vander(np.linspace(0, 1, 40), 12), np.cos(np.linspace(0, 3, 40))
    for alpha in (0.0, 1e-14):
        model = Ridge(alpha, fit_intercept=False).fit(x, y)
        theirs = sklearn.linear_model.Ridge(alpha, fit_intercept=False, solver="svd").fit(x, y)
        assert model.solver_ == "svd"
        np.testing.assert_allclose(x @ model.coef_, x @ theirs.coef_, atol=1e-11)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_one_sample(fit_intercept: bool) -> None:
    model = Ridge(0.5, fit_intercept=fit_intercept).fit([[1.0, 2.0, 0.0]], [3.0])
    theirs = sklearn.linear_model.Ridge(0.5, fit_intercept=fit_intercept).fit([[1.0, 2.0, 0.0]], [3.0])
    close(model.coef_, theirs.coef_)
    close(model.intercept_, theirs.intercept_)


def test_many_more_features_than_samples() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3000)), rng.standard_normal(8)
    for alpha in (1e-10, 1.0, 1e10):
        close(Ridge(alpha).fit(x, y).coef_, sklearn.linear_model.Ridge(alpha, solver="svd").fit(x, y).coef_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": [1.0, -1.0]}, "do not correspond: 2 != 1"),
        ({"alpha": [-1.0]}, "finite and non-negative"),
        ({"solver": "lbfgs"}, "positive=True"),
        ({"solver": "svd", "positive": True}, "does not support positive"),
        ({"solver": "fast"}, "'solver' parameter"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ridge(**arguments).fit(*tall())


def test_wrong_data() -> None:
    x, y = sparse_case()
    with pytest.raises(ValueError, match="does not support fitting the intercept on sparse"):
        Ridge(solver="svd").fit(x, y)
    with pytest.raises(TypeError, match="sparse"):
        Ridge(solver="svd", fit_intercept=False).fit(x, y)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            Ridge().fit([[bad], [1.0]], [0.0, 1.0])
    with pytest.raises(ValueError, match="non-finite"):
        Ridge().fit([[1e200], [-1e200]], [0.0, 1.0])
    with pytest.raises(ValueError, match="weights"):
        Ridge().fit(*tall(), 0.0)
    with pytest.warns(ConvergenceWarning):
        Ridge(1e-6, max_iter=1, solver="sparse_cg").fit(*tall())


@pytest.mark.parametrize("estimator", [Ridge(), RidgeCV(), RidgeCV(cv=3), Ridge([1.0])], ids=str)
def test_check_estimator(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    assert sum(r["status"] == "passed" for r in results) >= 50
