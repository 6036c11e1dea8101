"""Lasso and Elastic Net whose strength is chosen by cross-validation."""

from __future__ import annotations

import numbers
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
from sklearn.base import _fit_context
from sklearn.model_selection import check_cv
from sklearn.utils import check_scalar, column_or_1d
from sklearn.utils._metadata_requests import _raise_for_params
from sklearn.utils.metadata_routing import _routing_enabled, process_routing
from torch import Tensor

from torchreg.linear.data.inputs import Data, read, refuse_infinite, to_split
from torchreg.linear.data.precomputed import gram_of
from torchreg.linear.estimators.elastic_net import METHODS, PLACES, ElasticNet, Lasso, TensorPrediction
from torchreg.linear.lasso.problem import Problem, Strength
from torchreg.linear.paths.folds import Folds
from torchreg.linear.paths.path import alpha_grid, enet_path, lasso_path


class CrossValidated(TensorPrediction):
    """What these estimators share: fit, and scikit-learn's choice of the strength."""

    eps: float
    alphas: Any
    fit_intercept: bool
    precompute: Any
    max_iter: int
    tol: float
    cv: Any
    positive: bool
    solver: str
    _get_estimator: Any
    get_params: Any

    def _ratios(self) -> Any:
        return np.atleast_1d(getattr(self, "l1_ratio", 1.0))

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Any:
        """Choose the strength, and l1_ratio among several, by cross-validation, and fit with it on all samples.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,).
            sample_weight: shape (samples,), for the fits and for each fold's mean squared error.
            params: for the splitter, if scikit-learn's metadata routing is enabled.

        Raises:
            ValueError: for unsuitable data, as in scikit-learn, and folds of which a part has no weight.
        """
        _raise_for_params(params, self, "fit")
        data = read(self, X, y, sample_weight, finite=False)
        data, y = self._target(data, y)
        ratios = self._ratios()
        problem = self._problem(data)
        refuse_infinite(self, data, problem.moment)
        grids = self._grids(problem, ratios)
        folds = self._folds(data, list(self._splits(data, X, y, sample_weight, params)))
        folds.check_weights()
        errors = []
        for ratio, grid in zip(ratios, grids, strict=True):
            strengths = [Strength.of(a, ratio) for a in grid]
            errors.append(folds.errors(strengths, self.max_iter, self.tol))
        table = np.stack(errors)  # (ratios, folds, alphas)
        self.mse_path_ = np.squeeze(np.moveaxis(table, 2, 1))
        means = table.mean(1)
        best = np.nanmin(means, axis=1).argmin()
        self.alpha_ = grids[best][means[best].argmin()]
        if hasattr(self, "l1_ratio"):
            self.l1_ratio_ = ratios[best]
        self.alphas_ = np.asarray(grids)
        if len(ratios) == 1 or not isinstance(self.alphas, numbers.Integral):
            self.alphas_ = self.alphas_[0]
        model = self._model(ratios[best])
        self._refit(model, data, problem, folds)
        self.coef_, self.intercept_ = model.coef_, model.intercept_
        self.dual_gap_, self.n_iter_ = model.dual_gap_, model.n_iter_
        return self

    def _target(self, data: Data, y: Any) -> tuple[Data, Any]:
        """The data with their targets in the shape that is fitted, and what is given to the splitter as y."""
        if data.y.shape[1] > 1:
            raise ValueError(f"For multi-task outputs, use MultiTask{type(self).__name__}")
        if data.single or data.home is not None:
            return data, y
        return replace(data, single=True), column_or_1d(y, warn=True)

    def _problem(self, data: Data) -> Problem:
        design, _ = data.design(self.fit_intercept)
        return Problem(design, data.targets(self.fit_intercept)[0][0], self.positive, data.moment(design))

    def _folds(self, data: Data, splits: list[tuple[Any, Any]]) -> Folds:
        return Folds(data, splits, self.fit_intercept, self.positive, self.solver)

    def _splits(self, data: Data, X: Any, y: Any, sample_weight: Any, params: dict[str, Any]) -> Any:
        routed = {}
        if _routing_enabled():
            routed = process_routing(self, "fit", sample_weight=sample_weight, **params).splitter.split
        if isinstance(X, Tensor):
            y = data.y[:, 0].cpu().numpy()
        return check_cv(self.cv).split(to_split(X, self.cv), y, **routed)

    def _grids(self, problem: Problem, ratios: Any) -> list[Any]:
        """Strengths in falling order for each l1_ratio."""
        if not isinstance(self.alphas, numbers.Integral):
            for i, alpha in enumerate(self.alphas):
                check_scalar(alpha, f"alphas[{i}]", target_type=numbers.Real, min_val=0.0, include_boundaries="left")
            return [np.sort(self.alphas)[::-1]] * len(ratios)
        return [alpha_grid(problem, ratio, self.eps, int(self.alphas)) for ratio in ratios]

    def _model(self, ratio: float) -> Any:
        """For the last fit, with the strength that was chosen."""
        model = self._get_estimator()
        own = model.get_params()
        model.set_params(**{name: value for name, value in self.get_params().items() if name in own})
        model.alpha, model.l1_ratio = self.alpha_, ratio
        return model

    def _refit(self, model: Any, data: Data, problem: Problem, folds: Folds) -> None:
        """Fit on all samples."""
        if isinstance(self.precompute, str):
            gram: Tensor | bool | None = folds.gram()
        else:
            gram = gram_of(self.precompute, problem.design, data.mean if self.fit_intercept else None)
        model.fit_problems(data, [problem], gram)


class LassoCV(CrossValidated, sklearn.linear_model.LassoCV):
    """Lasso whose strength is chosen by cross-validation.

    Parameters and attributes are those of `sklearn.linear_model.LassoCV`; `ElasticNet` says what differs. For p ≤ n all
    folds come from one Gram matrix, less that of the samples left out. `n_jobs` and `verbose` are ignored.

    >>> from sklearn.datasets import load_diabetes
    >>> from torchreg.linear import LassoCV
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = LassoCV().fit(X, y)
    >>> float(model.alpha_.round(5)), model.mse_path_.shape
    (0.00375, (100, 5))

    Source: Friedman, Hastie and Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    Journal of Statistical Software, 2010.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.LassoCV._parameter_constraints,
        **PLACES,
        **METHODS,
    }
    path = staticmethod(lasso_path)

    def __init__(
        self,
        *,
        eps: float = 1e-3,
        alphas: Any = 100,
        fit_intercept: bool = True,
        precompute: Any = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        copy_X: bool = True,
        cv: Any = None,
        verbose: Any = False,
        n_jobs: int | None = None,
        positive: bool = False,
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
            precompute=precompute,
            max_iter=max_iter,
            tol=tol,
            copy_X=copy_X,
            cv=cv,
            verbose=verbose,
            n_jobs=n_jobs,
            positive=positive,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    def _get_estimator(self) -> Lasso:
        return Lasso()


class ElasticNetCV(CrossValidated, sklearn.linear_model.ElasticNetCV):
    """Elastic Net whose strength, and l1_ratio among several, are chosen by cross-validation.

    Parameters and attributes are those of `sklearn.linear_model.ElasticNetCV`; `LassoCV` says what differs.

    >>> from sklearn.datasets import load_diabetes
    >>> from torchreg.linear import ElasticNetCV
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ElasticNetCV(l1_ratio=[0.5, 0.99], alphas=20).fit(X, y)
    >>> float(model.l1_ratio_), model.mse_path_.shape
    (0.99, (2, 20, 5))

    Source: Zou and Hastie, Regularization and variable selection via the elastic net, Journal of the Royal Statistical
    Society B, 2005.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.ElasticNetCV._parameter_constraints,
        **PLACES,
        **METHODS,
    }
    path = staticmethod(enet_path)

    def __init__(
        self,
        *,
        l1_ratio: Any = 0.5,
        eps: float = 1e-3,
        alphas: Any = 100,
        fit_intercept: bool = True,
        precompute: Any = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        cv: Any = None,
        copy_X: bool = True,
        verbose: Any = 0,
        n_jobs: int | None = None,
        positive: bool = False,
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
            precompute=precompute,
            max_iter=max_iter,
            tol=tol,
            cv=cv,
            copy_X=copy_X,
            verbose=verbose,
            n_jobs=n_jobs,
            positive=positive,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    def _get_estimator(self) -> ElasticNet:
        return ElasticNet()
