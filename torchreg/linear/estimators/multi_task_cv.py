"""Lasso and Elastic Net of several targets whose strength is chosen by cross-validation."""

from __future__ import annotations

from typing import Any, ClassVar

import sklearn.linear_model

from torchreg.linear.data.inputs import Data
from torchreg.linear.estimators.cross_validation import CrossValidated
from torchreg.linear.estimators.elastic_net import PLACES
from torchreg.linear.estimators.multi_task import MultiTaskElasticNet, MultiTaskLasso
from torchreg.linear.lasso.problem import Problem
from torchreg.linear.paths.block_folds import BlockFolds
from torchreg.linear.paths.folds import Folds
from torchreg.linear.paths.path import all_targets, enet_path, lasso_path


class _SharedFeatures(CrossValidated):
    """All targets of a fold are one problem."""

    def _target(self, data: Data, y: Any) -> tuple[Data, Any]:
        if data.single:
            raise ValueError(f"For mono-task outputs, use {type(self).__name__.removeprefix('MultiTask')}")
        return data, y

    def _problem(self, data: Data) -> Problem:
        return all_targets(data, self.fit_intercept)

    def _refit(self, model: Any, data: Data, problem: Problem, folds: Folds) -> None:
        model.fit_problem(data, problem)

    def _folds(self, data: Data, splits: list[tuple[Any, Any]]) -> BlockFolds:
        return BlockFolds(data, splits, self.fit_intercept, False)


class MultiTaskLassoCV(_SharedFeatures, sklearn.linear_model.MultiTaskLassoCV):
    """`MultiTaskLasso` whose strength is chosen by cross-validation.

    Parameters and attributes are those of `sklearn.linear_model.MultiTaskLassoCV`; `MultiTaskElasticNet` says what
    differs. A fold's strengths share one working set of features. `n_jobs` and `verbose` are ignored.

    >>> from sklearn.datasets import load_linnerud
    >>> from torchreg.linear import MultiTaskLassoCV
    >>> X, Y = load_linnerud(return_X_y=True)
    >>> model = MultiTaskLassoCV(alphas=20).fit(X, Y)
    >>> model.coef_.shape, model.mse_path_.shape
    ((3, 3), (20, 5))

    Source: Obozinski, Taskar and Jordan, Joint covariate selection and joint subspace selection for multiple
    classification problems, Statistics and Computing, 2010.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.MultiTaskLassoCV._parameter_constraints,
        **PLACES,
    }
    path = staticmethod(lasso_path)

    def __init__(
        self,
        *,
        eps: float = 1e-3,
        alphas: Any = 100,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-4,
        copy_X: bool = True,
        cv: Any = None,
        verbose: Any = False,
        n_jobs: int | None = None,
        random_state: Any = None,
        selection: str = "cyclic",
        device: Any = "auto",
        dtype: Any = "auto",
        solver: str = "auto",
    ) -> None:
        super().__init__(
            eps=eps,
            alphas=alphas,
            fit_intercept=fit_intercept,
            max_iter=max_iter,
            tol=tol,
            copy_X=copy_X,
            cv=cv,
            verbose=verbose,
            n_jobs=n_jobs,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    def _get_estimator(self) -> MultiTaskLasso:
        return MultiTaskLasso()


class MultiTaskElasticNetCV(_SharedFeatures, sklearn.linear_model.MultiTaskElasticNetCV):
    """`MultiTaskElasticNet` whose strength, and l1_ratio among several, are chosen by cross-validation.

    Parameters and attributes are those of `sklearn.linear_model.MultiTaskElasticNetCV`; `MultiTaskLassoCV` says what
    differs.

    >>> from sklearn.datasets import load_linnerud
    >>> from torchreg.linear import MultiTaskElasticNetCV
    >>> X, Y = load_linnerud(return_X_y=True)
    >>> model = MultiTaskElasticNetCV(l1_ratio=[0.5, 0.9], alphas=20).fit(X, Y)
    >>> model.mse_path_.shape
    (2, 20, 5)

    Source: Obozinski, Taskar and Jordan, Joint covariate selection and joint subspace selection for multiple
    classification problems, Statistics and Computing, 2010.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.MultiTaskElasticNetCV._parameter_constraints,
        **PLACES,
    }
    path = staticmethod(enet_path)

    def __init__(
        self,
        *,
        l1_ratio: Any = 0.5,
        eps: float = 1e-3,
        alphas: Any = 100,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-4,
        cv: Any = None,
        copy_X: bool = True,
        verbose: Any = 0,
        n_jobs: int | None = None,
        random_state: Any = None,
        selection: str = "cyclic",
        device: Any = "auto",
        dtype: Any = "auto",
        solver: str = "auto",
    ) -> None:
        super().__init__(
            l1_ratio=l1_ratio,
            eps=eps,
            alphas=alphas,
            fit_intercept=fit_intercept,
            max_iter=max_iter,
            tol=tol,
            cv=cv,
            copy_X=copy_X,
            verbose=verbose,
            n_jobs=n_jobs,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    def _get_estimator(self) -> MultiTaskElasticNet:
        return MultiTaskElasticNet()
