"""Scikit-learn's own tests of coordinate descent, ridge and logistic regression, on our classes.

``python tests/sklearn_suite.py [-k ...]`` runs them.

They ship in scikit-learn's wheel. Our names are put in place of its own before the test modules import them. Tests of
its private compiled solvers don't touch our classes, and LogisticRegressionCV is scikit-learn's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sklearn.linear_model

import torchreg.linear

FILES = ("test_coordinate_descent.py", "test_sparse_coordinate_descent.py", "test_ridge.py", "test_logistic.py")
EXCEPTIONS = {
    "test_lasso_dual_gap": "compares seven digits of the duality gap with a formula; here both are rounding, 1e-16",
    "test_lassoCV_does_not_set_precompute": "replaces the Lasso in scikit-learn's private module, which is not ours",
    **{
        f"test_sparse_input_convergence_warning[{kind}-MultiTaskLassoCV]": "expects that one step is not enough; it is"
        for kind in ("csr_matrix", "csr_array")
    },
    "test_n_iter": "counts the iterations of sag, saga and lsqr; Ridge is solved directly",
    "test_lbfgs_solver_error": "expects that one step of L-BFGS is not enough; one Newton step is",
    "test_liblinear_dual_random_state": "expects that other seeds give other coefficients",
    "test_logistic_cv": "expects the six digits of scikit-learn's LogisticRegressionCV, which is exact to four",
    "test_logistic_cv_multinomial_score": "hands all parameters to a private function, which has no `device`",
    "test_max_iter": "expects each solver's own words where it has not converged",
    "test_liblinear_with_large_values": "expects that values above 1e30, which freeze liblinear, are refused; here a "
    "ConvergenceWarning says how far the solution is",
    "test_dtype_match": "expects float64 coefficients for float32 data from liblinear",
    "test_zero_max_iter": "expects intercepts of zero before the first step; here they fit the shares of the classes",
    "test_newton_cholesky_fallback_to_lbfgs": "expects the fallback's number of iterations",
    "test_logistic_regression_callback_support": "counts callbacks of L-BFGS",
    "test_logistic_regression_callback_fitted_estimator": "looks into callbacks of L-BFGS",
    "test_ridge_fit_intercept_sparse_sag": "expects a warning that sag needs many iterations; the solutions are equal",
}
"""Tests that are left out, by name, with the reason."""


class _Leave:
    """A pytest plugin that leaves the exceptions out."""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if EXCEPTIONS.keys() & {item.name, getattr(item, "originalname", item.name)}]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def main(arguments: list[str]) -> int:
    for name in torchreg.linear.__all__:
        if hasattr(sklearn.linear_model, name):
            setattr(sklearn.linear_model, name, getattr(torchreg.linear, name))
    folder = Path(sklearn.linear_model.__file__).parent / "tests"
    alone = ["-c", "/dev/null", "--rootdir", str(folder), "-p", "no:cacheprovider", "-q"]
    return int(pytest.main([*alone, *arguments, *(str(folder / file) for file in FILES)], plugins=[_Leave()]))


if __name__ == "__main__":
    for test, reason in EXCEPTIONS.items():
        print(f"left out: {test}: {reason}")
    sys.exit(main(sys.argv[1:]))
