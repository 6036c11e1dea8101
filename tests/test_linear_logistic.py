"""Logistic regression ends at the minimiser: at scikit-learn's where that is exact, and by its gap from outside."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import torch
from logistic_cases import CASES, classification, objective, relative_gap
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

import torchreg
from torchreg.linear import LogisticRegression
from torchreg.linear.lasso import sparse_descent
from torchreg.linear.logistic import newton as logistic_newton

cases = pytest.mark.parametrize(("x", "y"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("C", [0.01, 0.3, 100.0])
def test_the_duality_gap_is_rounding(x: Any, y: Any, C: float, l1_ratio: float, fit_intercept: bool) -> None:
    model = LogisticRegression(C=C, l1_ratio=l1_ratio, fit_intercept=fit_intercept).fit(x, y)
    assert abs(relative_gap(model, x, y)) < 1e-12
    assert 0 <= model.dual_gap_ < 1e-12
    assert not np.signbit(model.coef_[model.coef_ == 0]).any()


@cases
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_penalty_equals_scikit_learns(x: Any, y: Any, weighted: bool, fit_intercept: bool) -> None:
    weights = np.random.default_rng(1).uniform(0.1, 2, len(y)) if weighted else None
    settings = {"C": 0.5, "fit_intercept": fit_intercept, "class_weight": "balanced" if weighted else None}
    model = LogisticRegression(**settings).fit(x, y, weights)
    theirs = sklearn.linear_model.LogisticRegression(**settings, solver="newton-cg", tol=1e-12, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(x, y, weights)
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-8, atol=1e-8 * np.abs(theirs.coef_).max())
    expected = theirs.intercept_
    if len(expected) > 1:  # any number may be added to all: theirs sum to rounding over the curvature in that direction
        expected = expected - expected.mean()
    np.testing.assert_allclose(model.intercept_, expected, rtol=1e-8, atol=1e-8)


@cases
@pytest.mark.parametrize("l1_ratio", [1.0, 0.3])
def test_sparse_penalties_equal_sagas(x: Any, y: Any, l1_ratio: float) -> None:
    settings = {"C": 0.2, "l1_ratio": l1_ratio, "fit_intercept": False}
    model = LogisticRegression(**settings).fit(x, y)
    theirs = sklearn.linear_model.LogisticRegression(**settings, solver="saga", tol=1e-12, max_iter=5000).fit(x, y)
    assert objective(model, x, y) <= objective(theirs, x, y) + 1e-15
    if l1_ratio == 1 and x.shape[1] == 8:  # of four classes any number between the middle two may be subtracted
        np.testing.assert_allclose(model.predict_proba(x), theirs.predict_proba(x), rtol=0, atol=1e-7)
        return
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=0, atol=1e-7 * np.abs(theirs.coef_).max())
    assert np.array_equal(model.coef_ != 0, theirs.coef_ != 0)


def test_lasso_penalty_equals_liblinears() -> None:
    x, y = CASES["wide, two classes"]
    for fit_intercept in (False, True):
        settings = {"C": 0.3, "l1_ratio": 1.0, "fit_intercept": fit_intercept, "intercept_scaling": 2.5}
        model = LogisticRegression(**settings, solver="liblinear").fit(x, y)
        theirs = sklearn.linear_model.LogisticRegression(**settings, solver="liblinear", tol=1e-12, max_iter=10000)
        theirs.fit(x, y)
        np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=0, atol=1e-7)
        np.testing.assert_allclose(model.intercept_, theirs.intercept_, rtol=0, atol=1e-7)


@cases
def test_unpenalised_equals_scikit_learns(x: Any, y: Any) -> None:
    if x.shape[1] > len(y) // 2:
        return
    model = LogisticRegression(C=np.inf).fit(x, y)
    theirs = sklearn.linear_model.LogisticRegression(C=np.inf, solver="newton-cg", tol=1e-12, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-7, atol=1e-8)
    assert model.dual_gap_ < 1e-12


def test_an_l1_strength_at_the_largest_pull_leaves_nothing() -> None:
    x, y = CASES["wide, three classes"]
    share = np.eye(3)[y].mean(0)
    largest = np.abs((x - x.mean(0)).T @ (np.eye(3)[y] - share)).max()
    assert not LogisticRegression(C=(1 - 1e-9) / largest, l1_ratio=1.0).fit(x, y).coef_.any()
    model = LogisticRegression(C=(1 + 1e-6) / largest, l1_ratio=1.0).fit(x, y)
    assert (model.coef_ != 0).sum() == 1
    np.testing.assert_allclose(model.predict_proba(x[:1]).sum(), 1)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_sparse_matrix_gives_what_a_dense_one_does(classes: int, l1_ratio: float) -> None:
    x, y = classification(80, 120, classes, shift=0.5)
    x[np.random.default_rng(0).uniform(size=x.shape) < 0.9] = 0
    settings = {"C": 0.7, "l1_ratio": l1_ratio}
    dense = LogisticRegression(**settings).fit(x, y)
    for form in (sparse.csr_matrix(x), sparse.csc_array(x), torch.from_numpy(x).to_sparse()):
        model = LogisticRegression(**settings).fit(form, y)
        np.testing.assert_allclose(np.asarray(model.coef_), dense.coef_, rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.asarray(model.intercept_), dense.intercept_, rtol=0, atol=1e-10)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_tensors_and_arrays_give_the_same(classes: int, l1_ratio: float) -> None:
    x, y = classification(60, 20, classes)
    model = LogisticRegression(l1_ratio=l1_ratio).fit(x, y)
    ours = LogisticRegression(l1_ratio=l1_ratio).fit(torch.from_numpy(x), torch.from_numpy(y))
    for name in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
        found = getattr(ours, name)(torch.from_numpy(x))
        assert isinstance(found, torch.Tensor)
        np.testing.assert_allclose(found.numpy(), getattr(model, name)(x), rtol=1e-10, atol=1e-12)
    assert ours.score(torch.from_numpy(x), torch.from_numpy(y)) == model.score(x, y)
    assert isinstance(ours.classes_, torch.Tensor)
    named = LogisticRegression(l1_ratio=l1_ratio).fit(torch.from_numpy(x), np.array(["a", "b", "c"])[y])
    assert named.predict(torch.from_numpy(x))[0] in {"a", "b", "c"}


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
def test_float32(l1_ratio: float) -> None:
    for x, y in CASES.values():
        narrow = x.astype(np.float32)
        model = LogisticRegression(C=0.3, l1_ratio=l1_ratio).fit(narrow, y)
        assert model.coef_.dtype == model.intercept_.dtype == np.float32
        assert abs(relative_gap(model, narrow, y)) < 1e-5
        wide = LogisticRegression(C=0.3, l1_ratio=l1_ratio).fit(narrow.astype(np.float64), y)
        np.testing.assert_allclose(model.coef_, wide.coef_, atol=1e-5 * max(1, np.abs(wide.coef_).max()))
        assert LogisticRegression(l1_ratio=l1_ratio, dtype="float64").fit(narrow, y).coef_.dtype == np.float64


def test_weights_of_two_are_samples_twice() -> None:
    x, y = CASES["tall, four classes"]
    weights = np.arange(len(y)) % 3
    model = LogisticRegression(l1_ratio=0.7).fit(x, y, weights)
    twice = np.repeat(np.arange(len(y)), weights)
    same = LogisticRegression(l1_ratio=0.7).fit(x[twice], y[twice])
    np.testing.assert_allclose(model.coef_, same.coef_, atol=1e-10)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.0])
@cases
def test_a_warm_start_at_the_solution_is_the_solution(x: Any, y: Any, l1_ratio: float) -> None:
    model = LogisticRegression(l1_ratio=l1_ratio, warm_start=True, C=0.3).fit(x, y)
    before = model.coef_.copy()
    model.fit(x, y)
    assert model.n_iter_[0] <= 2
    np.testing.assert_allclose(model.coef_, before, atol=1e-10)
    model.set_params(C=0.5).fit(x, y)
    cold = LogisticRegression(l1_ratio=l1_ratio, C=0.5).fit(x, y)
    np.testing.assert_allclose(model.predict_proba(x), cold.predict_proba(x), atol=1e-9)
    with pytest.raises(ValueError, match="Initialization coef is of shape"):
        model.fit(x[:, 1:], y)


def test_a_bad_warm_start_does_no_harm() -> None:
    x, y = CASES["wide, two classes"]
    model = LogisticRegression(l1_ratio=1.0, warm_start=True).fit(x, y)
    exact = model.coef_.copy()
    model.coef_ = 1e6 * np.random.default_rng(0).standard_normal(exact.shape)
    np.testing.assert_allclose(model.fit(x, y).coef_, exact, atol=1e-9)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("classes", [2, 3])
class TestDegenerateData:
    def fit(self, x: Any, y: Any, l1_ratio: float, C: float = 1.0, tolerance: float = 1e-12) -> Any:
        model = LogisticRegression(C=C, l1_ratio=l1_ratio).fit(x, y)
        assert abs(relative_gap(model, x, y)) < tolerance
        return model

    def test_constant_and_duplicated_columns(self, classes: int, l1_ratio: float) -> None:
        x, y = classification(50, 6, classes)
        x = np.column_stack([x, np.full(len(y), 1e4), x[:, 0], -x[:, 1], np.zeros(len(y))])
        model = self.fit(x, y, l1_ratio)
        assert np.abs(model.coef_[:, [6, 9]]).max() < 1e-9
        if l1_ratio == 0:
            np.testing.assert_allclose(model.coef_[:, 7], model.coef_[:, 0], atol=1e-9)

    def test_badly_scaled_columns(self, classes: int, l1_ratio: float) -> None:
        x, y = classification(80, 9, classes)
        self.fit(x * np.logspace(-8, 8, 9), y, l1_ratio, tolerance=1e-9)  # the pull of the largest is rounding

    def test_a_tiny_and_a_huge_strength(self, classes: int, l1_ratio: float) -> None:
        x, y = classification(100, 5, classes)
        free = LogisticRegression(C=np.inf).fit(x, y)
        huge = self.fit(x, y, l1_ratio, 1e9, tolerance=1e-6)  # likewise
        np.testing.assert_allclose(huge.predict_proba(x), free.predict_proba(x), atol=1e-5)
        for least in (1e-12, 1e-300, 5e-324):
            model = LogisticRegression(C=least, l1_ratio=l1_ratio).fit(x, y)
            assert np.abs(model.coef_).max() < 1e-8
            np.testing.assert_allclose(model.predict_proba(x).mean(0), np.bincount(y) / len(y), atol=1e-8)

    def test_separable_classes(self, classes: int, l1_ratio: float) -> None:
        x = np.random.default_rng(0).standard_normal((60, 3))
        y = (x @ np.eye(3)[:, :classes]).argmax(1)
        for C in (1.0, 1e3, 1e6):
            assert self.fit(x, y, l1_ratio, C).score(x, y) > 0.9

    def test_as_many_samples_as_classes(self, classes: int, l1_ratio: float) -> None:
        x = np.random.default_rng(0).standard_normal((classes, 30))
        self.fit(x, np.arange(classes), l1_ratio)

    def test_a_class_without_weight(self, classes: int, l1_ratio: float) -> None:
        x, y = classification(60, 4, classes)
        model = LogisticRegression(l1_ratio=l1_ratio).fit(x, y, (y != classes - 1) * 1.0)
        assert model.predict_proba(x)[:, -1].max() < 1e-6


@pytest.mark.parametrize("C", [1e12, 1e14, 1e20])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_strength_next_to_nothing_is_certified(case: str, fit_intercept: bool, C: float) -> None:
    x, y = CASES[case]
    model = LogisticRegression(C=C, l1_ratio=1.0, fit_intercept=fit_intercept).fit(x, y)
    assert model.dual_gap_ < 1e-9  # the penalty's own size
    if "tall" in case:
        free = LogisticRegression(C=np.inf, fit_intercept=fit_intercept).fit(x, y)
        np.testing.assert_allclose(model.predict_proba(x), free.predict_proba(x), atol=1e-6)


def test_far_from_the_solution_a_small_strength_is_not_certified() -> None:
    x, y = CASES["tall, two classes"]
    with pytest.warns(UserWarning, match="did not converge"):
        model = LogisticRegression(C=1e14, l1_ratio=1.0, max_iter=2).fit(x, y)
    exact = LogisticRegression(C=np.inf).fit(x, y)
    assert model.dual_gap_ >= objective(model, x, y) - objective(exact, x, y) > 0


@pytest.mark.parametrize("constant", [7.0, 1.0, 0.1, 0.0])
@pytest.mark.parametrize("container", [np.asarray, sparse.csc_matrix, np.float32], ids=["dense", "sparse", "float32"])
@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_penalty_a_constant_column_has_no_part(classes: int, container: Any, constant: float) -> None:
    x, y = classification(60, 5, classes)
    x[:, 3] = constant
    model = LogisticRegression(C=np.inf).fit(container(x), y)
    other = LogisticRegression(C=np.inf).fit(container(np.delete(x, 3, 1)), y)
    assert np.abs(model.coef_[:, 3]).max() == 0
    tolerance = 1e-3 if container is np.float32 else 1e-6
    np.testing.assert_allclose(np.delete(model.coef_, 3, 1), other.coef_, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model.intercept_, other.intercept_, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", [5, 5.0, np.float64(5)], ids=repr)
def test_one_weight_for_all_is_that_of_each(weight: Any) -> None:
    x, y = classification(60, 5, 2)
    model, each = (LogisticRegression().fit(x, y, w) for w in (weight, np.full(60, 5.0)))
    assert np.array_equal(model.coef_, each.coef_)


def test_separable_classes_without_a_penalty_are_named() -> None:
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.warns(ConvergenceWarning, match="separable"):
        model = LogisticRegression(C=np.inf).fit(x, [0, 0, 1, 1])
    assert model.coef_[0, 0] > 10
    assert model.score(x, [0, 0, 1, 1]) == 1


def test_the_limit_is_kept() -> None:
    x, y = CASES["wide, two classes"]
    for l1_ratio in (1.0, 0.0):
        with pytest.warns(ConvergenceWarning, match="did not converge"):
            model = LogisticRegression(C=100.0, l1_ratio=l1_ratio, max_iter=1, tol=1e-9).fit(x, y)
        assert model.n_iter_ == [1]
        best = LogisticRegression(C=100.0, l1_ratio=l1_ratio).fit(x, y)
        excess = objective(model, x, y) - objective(best, x, y)
        assert excess <= model.dual_gap_  # also far from the solution the gap is a bound
        assert excess > 1e-9


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_far_from_the_solution_the_gap_is_the_one_from_outside(l1_ratio: float, classes: int) -> None:
    x, y = classification(60, 90, classes)
    model = LogisticRegression(C=5.0, l1_ratio=l1_ratio, max_iter=2, tol=1.0, fit_intercept=False).fit(x, y)
    outside = relative_gap(model, x, y) * np.log(classes)
    assert outside > 1e-4
    if l1_ratio == 1:
        np.testing.assert_allclose(model.dual_gap_, outside, rtol=1e-9)
    else:  # with L2 there is a second dual point, which may be the better one
        best = LogisticRegression(C=5.0, l1_ratio=l1_ratio, fit_intercept=False).fit(x, y)
        assert objective(model, x, y) - objective(best, x, y) <= model.dual_gap_ <= outside


def test_a_working_set_that_is_too_small_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic_newton, "_FEWEST", 2)
    for name in ("wide, two classes", "wide, three classes"):
        x, y = CASES[name]
        model = LogisticRegression(C=1.0, l1_ratio=1.0).fit(x, y)
        assert (model.coef_ != 0).any(0).sum() > 10
        assert abs(relative_gap(model, x, y)) < 1e-12


def test_it_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = CASES["wide, three classes"]
    exact = LogisticRegression(l1_ratio=1.0).fit(x, y).coef_
    monkeypatch.setattr("torchreg.linear.quadratic.native_newton.unavailable", lambda: "switched off")
    np.testing.assert_allclose(LogisticRegression(l1_ratio=1.0).fit(x, y).coef_, exact, atol=1e-10)


def test_many_coefficients_go_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, y in CASES.values():
        direct = LogisticRegression(C=2.0).fit(x, y)
        with monkeypatch.context() as patch:
            patch.setattr("torchreg.linear.logistic.systems._LARGEST", 0)
            model = LogisticRegression(C=2.0).fit(x, y)
        np.testing.assert_allclose(model.coef_, direct.coef_, atol=1e-9)
        assert model.dual_gap_ < 1e-12


@pytest.mark.parametrize("compiler", ["", "no C compiler"])
def test_a_large_sparse_matrix_ends_where_newton_steps_do(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By coordinate descent, or FISTA where that can't be compiled."""
    if compiler:
        monkeypatch.setattr(sparse_descent, "unavailable", lambda: compiler)
    rng = np.random.default_rng(0)
    x = sparse.random(1200, 1500, density=0.01, format="csr", random_state=0)
    y = (x @ rng.standard_normal(1500) + 0.3 * rng.standard_normal(1200) > 0).astype(int)
    for C in (1.0, 3.0):
        model = LogisticRegression(C=C, l1_ratio=1.0).fit(x, y)
        exact = LogisticRegression(C=C, l1_ratio=1.0, solver="newton").fit(x, y)
        assert abs(relative_gap(model, x.toarray(), y)) < 1e-12
        np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-7)


def test_bad_input_is_named() -> None:
    x, y = classification(20, 3, 2)
    with pytest.raises(ValueError, match="at least 2 classes"):
        LogisticRegression().fit(x, np.zeros(20))
    with pytest.raises(ValueError, match="at least 2 classes"):
        LogisticRegression().fit(torch.from_numpy(x), torch.zeros(20))
    with pytest.raises(ValueError, match="Unknown label type"):
        LogisticRegression().fit(x, np.linspace(0, 1, 20))
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[3, 1] = bad
        for data in (broken, torch.from_numpy(broken), sparse.csr_matrix(broken)):
            with pytest.raises(ValueError, match=r"NaN|infinity"):
                LogisticRegression().fit(data, y)
    for l1_ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match="large values"):
            LogisticRegression(l1_ratio=l1_ratio).fit(x * 1e200, y)
    with pytest.raises(ValueError, match="non-zero"):
        LogisticRegression().fit(x, y, np.zeros(20))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        LogisticRegression().fit(x, y, -np.ones(20))
    with pytest.raises(ValueError, match="dual=False"):
        LogisticRegression(dual=True).fit(x, y)
    with pytest.raises(ValueError, match="supports only 'l2' or None"):
        LogisticRegression(l1_ratio=1.0, solver="lbfgs").fit(x, y)
    with pytest.raises(ValueError, match="does not support multiclass"):
        LogisticRegression(solver="liblinear").fit(*classification(20, 3, 3))
    with pytest.raises(ValueError, match="solver"):
        LogisticRegression(solver="bogus").fit(x, y)


def test_a_fitted_model_is_copied_and_pickled() -> None:
    x, y = CASES["tall, two classes"]
    model = LogisticRegression(l1_ratio=1.0).fit(x, y)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(same.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(model.sparsify().predict(x), model.densify().predict(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("l1_ratio", [1.0, 0.0])
@cases
def test_a_gpu_gives_the_same(x: Any, y: Any, l1_ratio: float) -> None:
    model = LogisticRegression(l1_ratio=l1_ratio).fit(x, y)
    there = LogisticRegression(l1_ratio=l1_ratio).fit(torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda())
    assert there.coef_.is_cuda
    np.testing.assert_allclose(there.coef_.cpu().numpy(), model.coef_, atol=1e-9)


def test_the_pages_code_runs() -> None:
    page = Path(__file__).parent.parent / "docs/linear.md"
    section = page.read_text(encoding="utf-8").split("## Logistic regression")[1].split("\n## ")[0]
    x, y = CASES["tall, four classes"]
    space: dict[str, Any] = {"torchreg": torchreg, "X": x, "labels": y}
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, space)
    assert space["model"].dual_gap_ < 1e-12
