"""Ridge regression whose strength is chosen by cross-validation."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, RegressorMixin, _fit_context
from sklearn.metrics import check_scoring
from sklearn.model_selection import GridSearchCV, check_cv
from sklearn.utils import check_scalar
from sklearn.utils._metadata_requests import _raise_for_params
from sklearn.utils.metadata_routing import _routing_enabled, process_routing
from torch import Tensor

from torchreg.linear.data.inputs import Data, read, to_split
from torchreg.linear.estimators.elastic_net import PLACES, TensorPrediction
from torchreg.linear.estimators.ridge import Ridge, bounds, keep, mean_weight
from torchreg.linear.ridge.problem import RidgeProblem
from torchreg.linear.ridge.solver import ridge_gaps, solve_ridge
from torchreg.linear.ridge.spectrum import Spectrum, leave_one_out

_GCV = {None: None, "auto": None, "svd": True, "eigen": False}


class RidgeCV(TensorPrediction, sklearn.linear_model.RidgeCV):
    """Ridge regression whose strength is chosen by exact leave-one-out errors, or by cross-validation.

    Parameters and attributes are those of `sklearn.linear_model.RidgeCV`. One eigendecomposition of the Gram matrix of
    X's smaller side serves all strengths, of each fold for `cv`; where it would lose digits X itself is decomposed
    (``gcv_mode="svd"`` and ``"eigen"`` ask for one of them). A sparse X is never filled in; X may be a torch tensor.

    Args:
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Systems are solved in float64 either way.

    `dual_gap_` certifies the last fit, as that of `Ridge` does.

    >>> from sklearn.datasets import load_diabetes
    >>> from torchreg.linear import RidgeCV
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = RidgeCV(alphas=[1e-3, 1e-2, 1e-1, 1]).fit(X, y)
    >>> model.alpha_, round(float(model.best_score_), 2)
    (0.01, -3000.39)

    Source: Golub, Heath and Wahba, Generalized cross-validation as a method for choosing a good ridge parameter,
    Technometrics, 1979; Rifkin and Lippert, Notes on regularized least squares, MIT-CSAIL-TR-2007-025, 2007.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.RidgeCV._parameter_constraints,
        "device": PLACES["device"],
        "dtype": PLACES["dtype"],
    }
    _takes_large_indices = True
    alpha_: Any
    best_score_: Any
    dual_gap_: Any

    def __init__(
        self,
        alphas: Any = (0.1, 1.0, 10.0),
        *,
        fit_intercept: bool = True,
        scoring: Any = None,
        cv: Any = None,
        gcv_mode: str | None = None,
        store_cv_results: bool = False,
        alpha_per_target: bool = False,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        super().__init__(
            alphas=alphas,
            fit_intercept=fit_intercept,
            scoring=scoring,
            cv=cv,
            gcv_mode=gcv_mode,
            store_cv_results=store_cv_results,
            alpha_per_target=alpha_per_target,
        )
        self.device = device
        self.dtype = dtype

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> RidgeCV:
        """Choose the strength, and fit with it on all samples.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,) or (samples, targets).
            sample_weight: a number or shape (samples,), for the fits and the errors or scores.
            params: for the scorer and the splitter, if scikit-learn's metadata routing is enabled.

        Raises:
            ValueError: for unsuitable data or strengths, as in scikit-learn.
        """
        _raise_for_params(params, self, "fit")
        strengths = self._strengths()
        if self.cv is not None and self.store_cv_results:
            raise ValueError("cv!=None and store_cv_results=True are incompatible")
        if self.cv is not None and self.alpha_per_target:
            raise ValueError("cv!=None and alpha_per_target=True are incompatible")
        if sample_weight is not None:
            params["sample_weight"] = sample_weight
        if self.cv is not None and _routing_enabled():
            return self._search(X, y, params)
        data = read(self, X, y, sample_weight)
        mass = mean_weight(sample_weight)
        alphas = torch.tensor(strengths, dtype=torch.float64, device=data.y.device)
        if self.cv is None:
            problem = self._leave_one_out(data, alphas, mass, params)
        else:
            scores = np.mean([self._fold_scores(data, alphas, mass, *fold) for fold in self._folds(data, X, y)], axis=0)
            best = 0 if np.isnan(scores).all() else int(np.nanargmax(scores))
            self.alpha_, self.best_score_ = strengths[best], scores[best]
            problem = RidgeProblem(data, self.fit_intercept)
        chosen = torch.as_tensor(self.alpha_, dtype=torch.float64, device=alphas.device) / mass
        chosen = chosen.expand(len(problem.targets))
        coef, _ = solve_ridge(problem, chosen)
        keep(self, data, problem, coef)
        self.dual_gap_ = bounds(ridge_gaps(problem, coef, chosen) * mass)
        return self

    def _strengths(self) -> list[float]:
        """The strengths, checked as in scikit-learn: positive, or with `cv` non-negative."""
        given = self.alphas.tolist() if isinstance(self.alphas, Tensor) else self.alphas
        several = np.ndim(given) > 0
        if several and not len(given):
            raise ValueError("Expected `alphas` to hold at least one strength, got none.")
        for i, alpha in enumerate(given if several else [given]):
            name = f"alphas[{i}]" if several and len(given) > 1 else "alphas"
            edge = "neither" if self.cv is None else "left"
            check_scalar(alpha, name, target_type=numbers.Real, min_val=0.0, include_boundaries=edge)
        return [float(alpha) for alpha in np.atleast_1d(given)]

    def _leave_one_out(self, data: Data, alphas: Tensor, mass: float, params: dict[str, Any]) -> RidgeProblem:
        if self.gcv_mode == "svd" and not isinstance(data.x, Tensor):
            warnings.warn(
                "The 'svd' mode is not supported for sparse X, we fallback to `gcv_mode='eigen'`.",
                FutureWarning,
                stacklevel=4,
            )
        problem = RidgeProblem(data, self.fit_intercept)
        score = self._scores(data, problem, mass, params)
        stored, table = [], []
        for looe in leave_one_out(problem, alphas / mass, _GCV[self.gcv_mode]):
            values, found = score(looe)
            table.append(found)
            if self.store_cv_results:
                stored.append(values[:, 0] if data.single else values)
        if self.store_cv_results:
            self.cv_results_ = data.result(torch.stack(stored, -1))
        scores = np.stack(table)
        best = np.zeros(scores.shape[1:], dtype=np.int64)  # of the best, the first; NaN never wins
        for i, row in enumerate(scores):
            best = np.where(row > np.take_along_axis(scores, best[None], 0)[0], i, best)
        self.alpha_ = alphas.cpu().numpy()[best]
        self.best_score_ = np.take_along_axis(scores, best[None], 0)[0]
        if best.size == 1:
            self.alpha_, self.best_score_ = float(np.ravel(self.alpha_)[0]), np.ravel(self.best_score_)[0]
        return problem

    def _scores(
        self, data: Data, problem: RidgeProblem, mass: float, params: dict[str, Any]
    ) -> Callable[[Tensor], tuple[Tensor, Any]]:
        """What is stored for leave-one-out errors, (samples, targets), and their score, one a target if asked for."""
        if self.scoring is None:

            def squared(looe: Tensor) -> tuple[Tensor, Any]:
                squares = (looe.square() * mass).T
                return squares, -(squares.mean(0) if self.alpha_per_target else squares.mean()).cpu().numpy()

            return squared
        scorer = self._get_scorer()
        routed = process_routing(self, "fit", **params).scorer.score if _routing_enabled() else params
        routed = {key: _array(value) for key, value in routed.items()}
        truth = data.y.cpu().numpy()

        def scored(looe: Tensor) -> tuple[Tensor, Any]:
            predictions = ((problem.targets - looe) / problem.root).T + problem.target_mean
            p = predictions.cpu().numpy()
            if self.alpha_per_target:
                return predictions, np.array(
                    [scorer(_Identity(), p[:, j], truth[:, j], **routed) for j in range(p.shape[1])]
                )
            if data.single:
                return predictions, np.array(scorer(_Identity(), p[:, 0], truth[:, 0], **routed))
            return predictions, np.array(scorer(_Identity(), p, truth, **routed))

        return scored

    def _folds(self, data: Data, X: Any, y: Any) -> Iterator[tuple[Any, Any]]:
        y = data.y.cpu().numpy() if isinstance(X, Tensor) else y
        return check_cv(self.cv).split(to_split(X, self.cv), y)

    def _fold_scores(self, data: Data, alphas: Tensor, mass: float, train: Any, test: Any) -> list[float]:
        """The score of the samples left out, for each strength."""
        part, share = _subset(data, train)
        problem = RidgeProblem(part, self.fit_intercept)
        spectrum = Spectrum(problem, float(alphas.min()) / (mass * share))
        model = Ridge(fit_intercept=self.fit_intercept)
        scorer = check_scoring(model, scoring=self.scoring)
        x, truth = _rows(data.x, test), _array(data.y[torch.as_tensor(test, device=data.y.device)])
        truth = truth[:, 0] if data.single else truth
        weights = {}
        if data.weights is not None and _takes_weights(scorer):
            weights["sample_weight"] = _array(data.weights[torch.as_tensor(test, device=data.y.device)]) * mass
        scores = []
        for alpha in alphas:
            keep(model, part, problem, spectrum.coefficients(alpha[None] / (mass * share))[0])
            model.n_features_in_ = problem.design.features
            if data.home is not None:
                scores.append(scorer(_Identity(), _predicted(model, x), truth, **weights))
            else:
                scores.append(scorer(model, _array(x), truth, **weights))
        return scores

    def _search(self, X: Any, y: Any, params: dict[str, Any]) -> RidgeCV:
        """By scikit-learn's grid search, which knows where metadata go."""
        model = Ridge(fit_intercept=self.fit_intercept, device=self.device, dtype=self.dtype)
        model.set_fit_request(sample_weight=True)
        search = GridSearchCV(model, {"alpha": self._strengths()}, cv=self.cv, scoring=self._get_scorer())
        search.fit(X, y, **params)
        best = search.best_estimator_
        self.alpha_, self.best_score_, self.dual_gap_ = best.alpha, search.best_score_, best.dual_gap_
        self.coef_, self.intercept_, self.n_features_in_ = best.coef_, best.intercept_, best.n_features_in_
        if hasattr(best, "feature_names_in_"):
            self.feature_names_in_ = best.feature_names_in_
        return self


def _takes_weights(scorer: Any) -> bool:
    """As scikit-learn's grid search asks."""
    if hasattr(scorer, "_accept_sample_weight"):
        return bool(scorer._accept_sample_weight())
    return "sample_weight" in inspect.signature(scorer).parameters


class _Identity(RegressorMixin, BaseEstimator):
    """Hands predictions to a scorer, which calls this on them."""

    def predict(self, predictions: Any) -> Any:
        return predictions


def _predicted(model: Ridge, x: Any) -> Any:
    """By a model whose coefficients are tensors; of sparse tensors, x has what they hold as scipy's matrix."""
    if isinstance(x, Tensor):
        return _array(model.predict(x))
    return x @ _array(model.coef_).T + _array(model.intercept_)


def _subset(data: Data, rows: Any) -> tuple[Data, float]:
    """Some samples, with weights that sum to their number again, and what those were divided by."""
    index = torch.as_tensor(rows, device=data.y.device)
    weights, share = None, 1.0
    if data.weights is not None:
        weights = data.weights[index]
        share = mean_weight(weights)
        weights = weights / share
    return replace(data, x=_rows(data.x, rows), y=data.y[index], weights=weights, writeable=False), share


def _rows(x: Any, rows: Any) -> Any:
    if isinstance(x, Tensor):
        return x[torch.as_tensor(rows, device=x.device)]
    return sparse.csc_array(x.tocsr()[np.asarray(rows)])


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
