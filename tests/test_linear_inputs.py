"""Arrays, frames, tensors and sparse matrices: one result, in the user's own kind of array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import sparse_case, tall, wide
from scipy import sparse
from sklearn.base import clone

from torchreg.linear import (
    ElasticNet,
    ElasticNetCV,
    Lasso,
    LassoCV,
    LogisticRegression,
    Ridge,
    RidgeCV,
    alpha_max,
    lasso_path,
)
from torchreg.linear.lasso import solver as lasso_solver
from torchreg.linear.logistic import solver as logistic_solver

ALPHA = 0.05


@pytest.fixture
def fitted() -> Any:
    return Lasso(ALPHA).fit(*tall())


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_rows_and_columns_are_left_alone(fitted: Any, order: str) -> None:
    x, y = tall()
    x = np.array(x, order=order)
    before = x.copy()
    model = Lasso(ALPHA).fit(x, y)
    np.testing.assert_allclose(model.coef_, fitted.coef_, rtol=1e-10, atol=1e-13)
    assert np.array_equal(x, before)


def test_strided_and_read_only_arrays(fitted: Any) -> None:
    x, y = tall()
    np.testing.assert_allclose(Lasso(ALPHA).fit(np.repeat(x, 2, 1)[:, ::2], y).coef_, fitted.coef_, atol=1e-12)
    np.testing.assert_allclose(Lasso(ALPHA).fit(x[::-1], y[::-1]).coef_, fitted.coef_, atol=1e-12)
    x.flags.writeable = y.flags.writeable = False
    np.testing.assert_allclose(Lasso(ALPHA, copy_X=False).fit(x, y).coef_, fitted.coef_, atol=1e-12)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames(fitted: Any, library: str) -> None:
    frames = pytest.importorskip(library)
    x, y = tall()
    frame = frames.DataFrame({f"f{i}": column for i, column in enumerate(x.T)})
    model = Lasso(ALPHA).fit(frame, frames.Series(y))
    np.testing.assert_allclose(model.coef_, fitted.coef_, atol=1e-12)
    assert list(model.feature_names_in_[:2]) == ["f0", "f1"]
    np.testing.assert_allclose(model.predict(frame), fitted.predict(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_give_tensors(fitted: Any, dtype: torch.dtype) -> None:
    x, y = (torch.tensor(a, dtype=dtype) for a in tall())
    model = Lasso(ALPHA).fit(x, y)
    assert model.coef_.dtype == model.intercept_.dtype == dtype
    torch.testing.assert_close(model.coef_.double().numpy(), fitted.coef_, rtol=1e-4, atol=1e-4)
    assert isinstance(model.predict(x), torch.Tensor)
    assert model.score(x, y) == pytest.approx(fitted.score(*tall()), rel=1e-5)
    assert model.n_features_in_ == 30
    with pytest.raises(ValueError, match="30 features"):
        model.predict(x[:, :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_other_types_are_widened(dtype: torch.dtype) -> None:
    x = (torch.tensor(tall()[0]) * 4).to(dtype)
    y = torch.tensor(tall()[1])
    wide_type = torch.float64 if dtype == torch.int64 else torch.float32
    model = Lasso(ALPHA).fit(x, y)
    assert model.coef_.dtype == wide_type
    torch.testing.assert_close(model.coef_, Lasso(ALPHA).fit(x.to(wide_type), y).coef_)


def test_a_parameter_is_fitted_without_a_graph() -> None:
    x, y = (torch.tensor(a) for a in tall())
    assert not Lasso(ALPHA).fit(x.requires_grad_(), y).coef_.requires_grad


def test_arrays_and_tensors_mix(fitted: Any) -> None:
    x, y = tall()
    torch.testing.assert_close(Lasso(ALPHA).fit(torch.tensor(x), y).coef_.numpy(), fitted.coef_)
    assert isinstance(Lasso(ALPHA).fit(x, torch.tensor(y)).coef_, np.ndarray)
    np.testing.assert_allclose(fitted.predict(torch.tensor(x)), fitted.predict(x))


def test_dtype_is_what_is_asked_for() -> None:
    x, y = tall()
    for dtype in ("float32", torch.float32, np.float32):
        assert Lasso(ALPHA, dtype=dtype).fit(x, y).coef_.dtype == np.float32
    assert Lasso(ALPHA, dtype="float64").fit(x.astype(np.float32), y).coef_.dtype == np.float64
    with pytest.raises(ValueError, match="Expected `dtype`"):
        Lasso(ALPHA, dtype="float16").fit(x, y)


def test_several_targets_are_problems_of_their_own() -> None:
    x, y = tall()
    several = np.c_[y, -2 * y, np.roll(y, 3)]
    model = Lasso(ALPHA).fit(x, several)
    assert model.coef_.shape == (3, 30)
    for k in range(3):
        single = Lasso(ALPHA).fit(x, several[:, k])
        np.testing.assert_allclose(model.coef_[k], single.coef_, atol=1e-12)
        assert model.intercept_[k] == pytest.approx(single.intercept_)
    tensors = Lasso(ALPHA).fit(torch.tensor(x), torch.tensor(several))
    np.testing.assert_allclose(tensors.coef_, model.coef_, atol=1e-12)


@pytest.mark.parametrize("case", [wide, tall])
def test_a_warm_start_at_the_solution_takes_no_step(case: Any) -> None:
    x, y = case()
    model = ElasticNet(ALPHA, warm_start=True).fit(x, y)
    assert model.n_iter_ > 0
    coef = model.coef_
    assert model.fit(x, y).n_iter_ == 0
    assert np.array_equal(model.coef_, coef)


def test_a_warm_start_of_another_shape_is_refused() -> None:
    x, y = tall()
    model = Lasso(ALPHA, warm_start=True).fit(x, y)
    with pytest.raises(ValueError, match="warm start of shape"):
        model.fit(x[:, :5], y)


@pytest.mark.parametrize("case", [wide, tall])
def test_a_gram_matrix_that_is_handed_in(case: Any) -> None:
    x, y = case()
    x = x - x.mean(0)
    plain = Lasso(ALPHA).fit(x, y)
    for precompute in (x.T @ x, (x.T @ x).tolist(), torch.tensor(x.T @ x), True):
        np.testing.assert_allclose(Lasso(ALPHA, precompute=precompute).fit(x, y).coef_, plain.coef_, atol=1e-10)
    with pytest.raises(ValueError, match="Gram matrix of shape"):
        Lasso(ALPHA, precompute=np.eye(3)).fit(x, y)


def test_tensors_through_paths_and_cross_validation() -> None:
    x, y = tall()
    tensors = torch.tensor(x), torch.tensor(y)
    _, coefs, _ = lasso_path(*tensors, alphas=5)
    assert isinstance(coefs, torch.Tensor)
    np.testing.assert_allclose(coefs, lasso_path(x, y, alphas=5)[1], atol=1e-10)
    assert alpha_max(*tensors) == pytest.approx(alpha_max(x, y))
    model = LassoCV(alphas=7, cv=3).fit(*tensors)
    assert isinstance(model.coef_, torch.Tensor)
    np.testing.assert_allclose(model.mse_path_, LassoCV(alphas=7, cv=3).fit(x, y).mse_path_)


def test_sparse_data_stay_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sparse_case()
    monkeypatch.setattr(type(x), "toarray", None)
    monkeypatch.setattr(type(x), "todense", None)
    model = Lasso(ALPHA).fit(x, y)
    assert model.predict(x).shape == y.shape


SPARSE_MODELS = {
    "lasso": Lasso(ALPHA),
    "cd": Lasso(ALPHA, solver="cd"),
    "ridge": Ridge(),
    "classes": LogisticRegression(l1_ratio=1.0),
    "classes, L2": LogisticRegression(),
    "folds": RidgeCV(cv=3),
    "lasso folds": LassoCV(cv=3, alphas=[ALPHA]),
}


def two_values(y: Any) -> Any:
    """Targets for regression and for classes."""
    return np.where(y > np.median(y), 10.0, 0.0)


@pytest.mark.parametrize("model", SPARSE_MODELS.values(), ids=SPARSE_MODELS)
@pytest.mark.parametrize("form", ["csc", "csr"])
def test_entries_of_one_place_are_summed(model: Any, form: str) -> None:
    x, y = sparse_case()
    x, y = sparse.csc_matrix(x[:, :12].toarray() + 1), two_values(y)
    parts = [0.25 * x, 0.25 * x, 0.5 * x]
    order = np.argsort(
        np.concatenate([np.repeat(np.arange(12), np.diff(part.indptr)) for part in parts]), kind="stable"
    )
    data, rows = (np.concatenate([getattr(part, key) for part in parts])[order] for key in ("data", "indices"))
    repeated = sparse.csc_matrix((data, rows, 3 * x.indptr), shape=x.shape).asformat(form)
    assert repeated.nnz == 3 * x.nnz
    found, expected = (clone(model).fit(a, y).coef_ for a in (repeated, x))
    assert expected.any()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert repeated.nnz == 3 * x.nnz


@pytest.mark.parametrize("model", SPARSE_MODELS.values(), ids=SPARSE_MODELS)
@pytest.mark.parametrize("large", [False, True])
def test_sparse_entries_may_lie_apart(model: Any, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sparse_case()
    y = two_values(y)
    apart = sparse.csc_matrix((np.repeat(x.data, 2)[::2], np.repeat(x.indices, 2)[::2], x.indptr), shape=x.shape)
    assert not apart.data.flags.contiguous
    if large:
        monkeypatch.setattr(lasso_solver, "_POLISHED", -1)
        monkeypatch.setattr(logistic_solver, "_POLISHED", -1)
    found, expected = (clone(model).fit(a, y).coef_ for a in (apart, x))
    assert expected.any()
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("model", SPARSE_MODELS.values(), ids=SPARSE_MODELS)
@pytest.mark.parametrize("form", ["dense", "sparse", "large"])
def test_torchs_default_device_changes_nothing(model: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sparse_case()
    x, y = x.toarray() if form == "dense" else x, two_values(y)
    if form == "large":
        monkeypatch.setattr(lasso_solver, "_POLISHED", -1)
        monkeypatch.setattr(logistic_solver, "_POLISHED", -1)
    expected = clone(model).fit(x, y)
    with torch.device("meta"):
        found = clone(model).fit(x, y)
    np.testing.assert_array_equal(found.coef_, expected.coef_)
    np.testing.assert_array_equal(found.predict(x), expected.predict(x))


@pytest.mark.parametrize("estimator", [Lasso, ElasticNet, LassoCV, ElasticNetCV])
def test_parameters_survive_a_clone(estimator: Any) -> None:
    model = clone(estimator(device="cpu", dtype="float32", solver="newton", positive=True))
    assert (model.device, model.dtype, model.solver, model.positive) == ("cpu", "float32", "newton", True)
    with pytest.raises(ValueError, match="'solver' parameter"):
        model.set_params(solver="lars").fit(*tall())


def test_targets_that_are_a_part_of_data_which_may_be_overwritten() -> None:
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((60, 5)) + 2)
    expected = Lasso(0.01).fit(x, x[:, 0].copy())
    found = Lasso(0.01, copy_X=False).fit(x, x[:, 0])
    assert found.intercept_ == pytest.approx(expected.intercept_)
    np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-9, atol=1e-12)


def test_sparse_targets_are_refused() -> None:
    x, _ = tall()
    with pytest.raises(TypeError, match="dense data is required"):
        Lasso().fit(x, sparse.csr_matrix(x[:, :1]))


def test_a_column_of_targets_has_one_intercept_after_cross_validation() -> None:
    x, y = tall()
    with pytest.warns(Warning, match="1d array was expected"):
        model = LassoCV(cv=3).fit(x, y[:, None])
    assert np.shape(model.intercept_) == ()
    assert model.coef_.shape == (x.shape[1],)
