"""Scikit-learn's judgement of our estimators: its checks for all, and a part of its own tests."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.utils.estimator_checks import check_estimator

from torchreg.linear import (
    ElasticNet,
    ElasticNetCV,
    GroupLasso,
    Lasso,
    LassoCV,
    LogisticRegression,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    MultiTaskLassoCV,
)

SUITE = Path(__file__).with_name("sklearn_suite.py")
WORDS = "toy or zero or warm_start or positive or incorrect or raises or float or sparse_coef"
QUICK = f"({WORDS}) and not (test_ridge or test_logistic)"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SUITE), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


FAST = [Lasso(), ElasticNet(), LassoCV(alphas=4, cv=3), ElasticNetCV(alphas=4, cv=3)]
GROUPS = [
    MultiTaskLasso(),
    MultiTaskElasticNet(),
    GroupLasso(),
    MultiTaskLassoCV(alphas=4, cv=3),
    pytest.param(MultiTaskElasticNetCV(alphas=4, cv=3), marks=pytest.mark.slow),
]
CLASSIFIERS = [LogisticRegression(), LogisticRegression(l1_ratio=0.5)]
DEFAULT = [pytest.param(LassoCV(), marks=pytest.mark.slow), pytest.param(ElasticNetCV(), marks=pytest.mark.slow)]


@pytest.mark.parametrize("estimator", [*FAST, *GROUPS, *CLASSIFIERS, *DEFAULT], ids=str)
def test_check_estimator(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    assert sum(r["status"] == "passed" for r in results) >= 50
    assert isinstance(estimator, BaseEstimator)


def test_names_of_parameters_are_those_of_each_class() -> None:
    class Mine(Lasso):
        def __init__(self, alpha: float = 1.0, mine: int = 2) -> None:
            super().__init__(alpha)
            self.mine = mine

    Lasso._get_param_names().clear()
    assert set(Lasso().get_params()) >= {"alpha", "solver", "tol"}
    assert Mine().get_params() == {"alpha": 1.0, "mine": 2}
    assert clone(Mine(mine=3)).mine == 3


def test_a_part_of_scikit_learns_own_tests() -> None:
    assert " passed" in run("-k", QUICK)


@pytest.mark.slow
def test_all_of_scikit_learns_own_tests() -> None:
    assert " passed" in run()
