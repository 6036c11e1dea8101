"""Every solver of linear models ends at the same certificate, or says why it can't be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import CASES, large_sparse_case, largest, relative_gap, sparse_case
from logistic_cases import CASES as CLASSES
from logistic_cases import classification
from logistic_cases import relative_gap as logistic_gap
from scipy import sparse

from torchreg.linear import ElasticNet, Lasso, LassoCV, LogisticRegression, alpha_max, lasso_path
from torchreg.linear.data.design import Dense, mean_squares
from torchreg.linear.lasso import accelerated, coordinate_descent
from torchreg.linear.lasso.fista import LeastSquares, solve_by_fista
from torchreg.linear.lasso.problem import Problem, Strength

compiled = pytest.mark.skipif(coordinate_descent.unavailable() is not None, reason="there is no compiler")
METHODS = ["newton", "fista", pytest.param("cd", marks=compiled)]
methods = pytest.mark.parametrize("solver", METHODS)


@methods
@pytest.mark.parametrize("l1_ratio", [1.0, 0.6])
@pytest.mark.parametrize("fraction", [0.5, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_all_end_at_the_same_certificate(case: str, fraction: float, l1_ratio: float, solver: str) -> None:
    x, y = CASES[case]()
    settings = {"alpha": fraction * largest(x, y), "l1_ratio": l1_ratio}
    exact = ElasticNet(**settings).fit(x, y)
    model = ElasticNet(**settings, solver=solver).fit(x, y)
    assert relative_gap(x, y, model.coef_, model.intercept_, **settings) < 1e-12
    assert model.dual_gap_ < 1e-12 * y.var()
    assert np.array_equal(model.coef_ != 0, exact.coef_ != 0)
    np.testing.assert_allclose(model.coef_, exact.coef_, rtol=1e-8, atol=1e-10 * np.abs(exact.coef_).max())


@pytest.fixture
def unpolished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Newton steps for the last digits."""
    monkeypatch.setattr("torchreg.linear.lasso.solver._POLISHED", -1)
    monkeypatch.setattr("torchreg.linear.logistic.solver._POLISHED", -1)


@pytest.mark.parametrize("solver", ["fista", pytest.param("cd", marks=compiled)])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["dense", "rows", "sparse"])
@pytest.mark.usefixtures("unpolished")
def test_alone_they_end_where_newton_steps_do(kind: str, weighted: bool, positive: bool, solver: str) -> None:
    x, y = sparse_case()
    x = x if kind == "sparse" else np.asarray(x.toarray(), order="F" if kind == "dense" else "C")
    weights = np.random.default_rng(0).uniform(0, 2, len(y)) if weighted else None
    settings = {"alpha": 0.02, "l1_ratio": 0.9, "positive": positive}
    exact = ElasticNet(**settings).fit(x, y, weights)
    model = ElasticNet(**settings, solver=solver).fit(x, y, weights)
    assert model.n_iter_ > 3
    assert model.dual_gap_ < 1e-12 * y.var()
    np.testing.assert_allclose(model.coef_, exact.coef_, rtol=0, atol=1e-5)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("case", CLASSES)
def test_classification(case: str, fit_intercept: bool, l1_ratio: float) -> None:
    x, y = CLASSES[case]
    settings = {"C": 0.3, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    exact = LogisticRegression(**settings).fit(x, y)
    model = LogisticRegression(**settings, solver="fista").fit(x, y)
    assert abs(logistic_gap(model, x, y)) < 1e-12
    np.testing.assert_allclose(model.predict_proba(x), exact.predict_proba(x), atol=1e-9)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.usefixtures("unpolished")
def test_classification_alone(l1_ratio: float) -> None:
    for case in ("wide, two classes", "tall, four classes"):
        x, y = CLASSES[case]
        model = LogisticRegression(C=0.2, l1_ratio=l1_ratio, solver="fista").fit(x, y)
        assert model.n_iter_ > 10
        assert model.dual_gap_ < 1e-12


@pytest.mark.parametrize("fraction", [0.5, 0.1])
def test_screening_leaves_out_only_zeros_of_the_solution(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = CASES["wide"]()
    problem = Problem(Dense(torch.from_numpy(x)), torch.from_numpy(y))
    strength = Strength(fraction * problem.largest)
    support = torch.nonzero(solve_by_fista(problem, [strength], 10000, None)[0].values).squeeze(1)
    kept: list[Any] = []
    original = accelerated.part
    monkeypatch.setattr(accelerated, "_PART", 0.999)
    monkeypatch.setattr(accelerated, "part", lambda design, index: kept.append(index) or original(design, index))
    screened = solve_by_fista(problem, [strength], 10000, None)[0]
    every = torch.arange(x.shape[1])
    for index in kept:
        every = every[index]
        assert set(support.tolist()) <= set(every.tolist())
    assert len(every) < (60 if fraction == 0.5 else 399)
    assert screened.gap <= 1e-12 * problem.power


@pytest.mark.parametrize("fraction", [0.9, 0.3])
def test_the_dual_solution_is_as_near_as_the_certificate_says(fraction: float) -> None:
    x, y = CASES["wide"]()
    problem = Problem(Dense(torch.from_numpy(x)), torch.from_numpy(y))
    composite = LeastSquares(problem, Strength(fraction * problem.largest))
    exact = solve_by_fista(problem, [composite.strength], 10000, None)[0].values
    least = 1.0
    for share in (0.0, 0.5, 0.9):
        w = share * exact.unsqueeze(0)
        scores = problem.design.fitted(w)
        pulls = [problem.design.correlations(problem.target - s) for s in (scores, problem.design.fitted(exact[None]))]
        found = composite.certificate(scores, w, pulls[0])
        apart = (found.force - pulls[1].abs()).abs() / (found.radius * mean_squares(problem.design).sqrt())
        assert apart.max() <= 1 + 1e-9
        least = min(least, 1 - float(apart.max()))
    assert least < 0.9  # and not much farther


@methods
def test_paths_and_cross_validation(solver: str) -> None:
    x, y = CASES["tall"]()
    _, exact, _ = lasso_path(x, y, alphas=5, eps=0.01)
    _, coefs, gaps = lasso_path(x, y, alphas=5, eps=0.01, solver=solver)
    np.testing.assert_allclose(coefs, exact, rtol=0, atol=1e-9)
    assert gaps.max() < 1e-12 * (y @ y) / len(y)
    model, same = (LassoCV(alphas=4, cv=3, solver=s).fit(x, y) for s in (solver, "auto"))
    np.testing.assert_allclose(model.mse_path_, same.mse_path_, rtol=1e-6)


@compiled
def test_columns_that_are_all_but_alike_are_solved_along_a_path() -> None:
    """To which coordinate descent takes tens of thousands of sweeps."""
    generator, size = np.random.default_rng(0), 2000
    few = sparse.random(size, size // 10, 0.01, format="csc", random_state=0)
    x = (sparse.hstack([few] * 10) + 0.1 * sparse.random(size, size, 0.001, format="csc", random_state=1)).tocsc()
    w = np.zeros(size)
    w[generator.choice(size, 100)] = generator.standard_normal(100)
    y = x @ w + 0.5 * (x @ w).std() * generator.standard_normal(size)
    alphas = np.geomspace(1, 3e-3, 15) * alpha_max(x, y, fit_intercept=False)
    for solver in ("auto", "cd"):
        _, coefs, gaps = lasso_path(x, y, alphas=alphas, solver=solver)
        assert gaps.max() < 1e-12 * np.mean(y**2)
        for alpha, w in zip(alphas, coefs.T, strict=True):
            r = y - x @ w
            scale = min(1, alpha * len(y) / np.abs(x.T @ r).max())
            gap = 0.5 * (1 + scale**2) * (r @ r) / len(y) + alpha * np.abs(w).sum() - scale * (r @ y) / len(y)
            assert gap < 1e-12 * np.mean(y**2)


def test_newton_is_newton_also_for_large_sparse_data(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = large_sparse_case()
    alpha = 0.2 * largest(x.toarray(), y)
    exact = Lasso(alpha).fit(x, y).coef_
    monkeypatch.setattr("torchreg.linear.lasso.solver.solve_by_coordinates", None)
    np.testing.assert_allclose(Lasso(alpha, solver="newton").fit(x, y).coef_, exact, atol=1e-10)


@methods
def test_float32_and_tensors(solver: str) -> None:
    x, y = CASES["wide"]()
    alpha = 0.1 * largest(x, y)
    model = Lasso(alpha, solver=solver).fit(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))
    assert model.coef_.dtype == torch.float32
    assert relative_gap(x.astype(np.float32), y, model.coef_, model.intercept_, alpha) < 1e-5


@methods
def test_units_of_columns_do_not_matter(solver: str) -> None:
    x, y = CASES["tall"]()
    scale = np.logspace(-8, 8, x.shape[1])
    # the strength must suit the units: columns far below it are zero
    model = Lasso(1e-3, solver=solver, fit_intercept=False).fit(x * scale, y - y.mean())
    exact = Lasso(1e-3, fit_intercept=False).fit(x * scale, y - y.mean())
    np.testing.assert_allclose(model.predict(x * scale), exact.predict(x * scale), rtol=0, atol=1e-6 * y.std())


def test_what_can_not_be_had_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = CASES["tall"]()
    for solver in ("fista", "cd"):
        with pytest.raises(ValueError, match="Gram matrix"):
            Lasso(solver=solver, precompute=True).fit(x, y)
    with pytest.raises(ValueError, match="'solver' parameter"):
        Lasso(solver="saga").fit(x, y)
    with pytest.raises(ValueError, match="solver"):
        lasso_path(x, y, solver="saga")
    monkeypatch.setattr(coordinate_descent, "unavailable", lambda: "no C compiler")
    with pytest.raises(ValueError, match="no C compiler"):
        Lasso(solver="cd").fit(x, y)
    a, b = classification(30, 3, 2)
    with pytest.raises(ValueError, match="least squares"):
        LogisticRegression(solver="cd").fit(a, b)
    with pytest.raises(ValueError, match="finite C"):
        LogisticRegression(solver="fista", C=np.inf).fit(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu() -> None:
    x, y = (torch.from_numpy(a).cuda() for a in CASES["wide"]())
    exact = Lasso(0.1).fit(x, y).coef_
    torch.testing.assert_close(Lasso(0.1, solver="fista").fit(x, y).coef_, exact, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="no work for a GPU"):
        Lasso(0.1, solver="cd").fit(x, y)
