"""Lasso and Elastic Net as estimators."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
import sklearn.metrics
import torch
from sklearn.base import _fit_context
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from torchreg.linear.data.inputs import Data, read, refuse_infinite
from torchreg.linear.data.precomputed import gram_of
from torchreg.linear.lasso.problem import NOT_FINITE, Problem, Strength
from torchreg.linear.lasso.solution import Solution
from torchreg.linear.lasso.solver import SOLVERS, is_narrow, solve
from torchreg.linear.paths.path import enet_path, warn_if_far

PLACES = {
    "device": [str, torch.device],
    "dtype": "no_validation",
    "solver": [StrOptions({"auto", "newton"})],
}
"""Constraints of the parameters that scikit-learn's estimators don't have."""
METHODS = {"solver": [StrOptions(set(SOLVERS))]}
"""That of a solver for least squares with an L1 penalty."""


class TensorPrediction:
    """Predictions of a linear model whose coefficients may be tensors."""

    coef_: Any
    intercept_: Any
    _param_names: ClassVar[tuple[str, ...]]

    @classmethod
    def _get_param_names(cls) -> list[str]:
        """Of a class once: scikit-learn reads the signature in every fit, which takes a tenth of a small one."""
        if "_param_names" not in cls.__dict__:
            cls._param_names = tuple(super()._get_param_names())  # type: ignore[misc]
        return list(cls._param_names)

    def predict(self, X: Any) -> Any:
        """Xw + intercept: a tensor for a model that was fitted on tensors, else a NumPy array.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples,), or (samples, targets).
        """
        check_is_fitted(self)
        if not isinstance(self.coef_, Tensor):
            return super().predict(X.detach().cpu().numpy() if isinstance(X, Tensor) else X)  # type: ignore[misc]
        X = torch.as_tensor(X, dtype=self.coef_.dtype, device=self.coef_.device)
        if X.ndim != 2 or X.shape[1] != self.coef_.shape[-1]:
            raise ValueError(f"X has shape {tuple(X.shape)}, but {self.coef_.shape[-1]} features were expected.")
        return X @ (self.coef_ if self.coef_.ndim == 1 else self.coef_.T) + self.intercept_

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R², averaged over targets.

        Args:
            X: shape (samples, features).
            y: shape (samples,) or (samples, targets).
            sample_weight: shape (samples,).
        """
        arrays = [a.detach().cpu().numpy() if isinstance(a, Tensor) else a for a in (y, sample_weight)]
        if not isinstance(self.coef_, Tensor):
            return super().score(X, *arrays)  # type: ignore[misc]
        return float(sklearn.metrics.r2_score(arrays[0], self.predict(X).cpu().numpy(), sample_weight=arrays[1]))


class ElasticNet(TensorPrediction, sklearn.linear_model.ElasticNet):
    """Least squares with an L1 and an L2 penalty, solved to machine precision:

        ½/n·‖y − Xw − c‖² + alpha·l1_ratio·‖w‖₁ + ½·alpha·(1 − l1_ratio)·‖w‖²

    Parameters, attributes and errors are those of `sklearn.linear_model.ElasticNet`. This differs in:

    1. The result doesn't depend on `tol`, `selection` or `random_state`: Newton steps on a working set end at the
       minimiser. `tol` (times ‖y‖²/n) only says from which duality gap on there is a ConvergenceWarning.
    2. `n_iter_` counts Newton steps, each a linear system of the size of the support; `max_iter` limits those at the
       strength asked for, not those at larger strengths on the way there. Of "cd" it counts sweeps, of which there may
       be 10 times as many, of "fista" iterations, 50 times.
    3. The Gram matrix is also used with ``precompute=False`` where it is faster.
    4. X may be a torch tensor, dense or sparse, and is then not copied to another device; `coef_`, `intercept_` and
       predictions are tensors there.

    Args:
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Systems of the support are solved in float64 either way.
        solver: "auto", or one of these, all of which end at the same certificate:
            "newton" (a working set with its Gram matrix), "cd" (coordinate descent, compiled), "fista" (accelerated
            proximal gradient with gap-safe screening, by products with X alone). After the latter two, solutions with
            at most 1000 coefficients get their last digits by Newton steps.

    `dual_gap_` bounds how far the objective is from the smallest one: it is computed from the coefficients, by
    scikit-learn's formula.

    >>> from sklearn.datasets import load_diabetes
    >>> from torchreg.linear import ElasticNet
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ElasticNet(alpha=0.01).fit(X, y)
    >>> model.coef_[:3].round(2)
    array([ 33.15, -35.24, 211.03])
    >>> bool(model.dual_gap_ < 1e-12 * (y @ y) / len(y))
    True

    Source: Zou and Hastie, Regularization and variable selection via the elastic net, Journal of the Royal Statistical
    Society B, 2005.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.ElasticNet._parameter_constraints,
        **PLACES,
        **METHODS,
    }
    path = staticmethod(enet_path)

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        l1_ratio: float = 0.5,
        fit_intercept: bool = True,
        precompute: Any = False,
        max_iter: int | None = 1000,
        copy_X: bool = True,
        tol: float = 1e-4,
        warm_start: bool = False,
        positive: bool = False,
        random_state: Any = None,
        selection: str = "cyclic",
        device: Any = "auto",
        dtype: Any = "auto",
        solver: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha,
            l1_ratio=l1_ratio,
            fit_intercept=fit_intercept,
            precompute=precompute,
            max_iter=max_iter,
            copy_X=copy_X,
            tol=tol,
            warm_start=warm_start,
            positive=positive,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, check_input: bool = True) -> ElasticNet:
        """Fit the coefficients, and the intercept if there is one.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,) or (samples, targets), each target a problem of its own.
            sample_weight: shape (samples,), of any scale.
            check_input: False for arrays that have been checked, in columns.

        Raises:
            ValueError: for unsuitable data, as in scikit-learn.
        """
        data = read(self, X, y, sample_weight, check_input, finite=False)
        design, mean = data.design(self.fit_intercept, overwrite=not self.copy_X)
        targets, _ = data.targets(self.fit_intercept)
        gram = gram_of(self.precompute, design, mean, check_input)
        if gram is None and len(targets) > 1 and self.solver not in ("cd", "fista") and is_narrow(design, len(targets)):
            gram = design.gram()
        moment = data.moment(design)
        return self.fit_problems(data, [Problem(design, z, self.positive, moment) for z in targets], gram)

    def fit_problems(self, data: Data, problems: list[Problem], gram: Tensor | bool | None) -> ElasticNet:
        """`fit` for data that have been read, one problem for each target, with ZᵀZ/n where it is known."""
        if self.alpha == 0:
            warnings.warn(
                "With alpha=0, this algorithm does not converge well. You are advised to use the LinearRegression "
                "estimator",
                stacklevel=3,
            )
        starts = self._starts(data)
        found = [self._solve(data, problem, start, gram) for problem, start in zip(problems, starts, strict=True)]
        self._keep(data, found)
        return self

    def _solve(self, data: Data, problem: Problem, start: Tensor | None, gram: Tensor | bool | None) -> Solution:
        refuse_infinite(self, data, problem.moment)
        strength = Strength.of(self.alpha, self.l1_ratio)
        (solution,) = solve(
            problem, [strength], limit=self.max_iter or 1000, start=start, gram=gram, method=self.solver
        )
        warn_if_far(solution.gap, problem.power, problem.design.eps, self.tol)
        return solution

    def _starts(self, data: Data) -> list[Tensor | None]:
        """Where each target's solution begins."""
        targets = data.y.shape[1]
        if not self.warm_start or not hasattr(self, "coef_"):
            return [None] * targets
        start = self.coef_ if isinstance(self.coef_, Tensor) else torch.from_numpy(np.array(self.coef_))
        start = torch.atleast_2d(start.to(data.y.device, torch.float64))
        if start.shape != (targets, data.x.shape[1]):
            raise ValueError(
                f"Expected a warm start of shape {(targets, data.x.shape[1])}, got coef_ of {tuple(start.shape)}."
            )
        if self.positive:
            start = start.clamp(min=0)
        return list(start)

    def _keep(self, data: Data, found: list[Solution]) -> None:
        coef = torch.stack([solution.full(data.x.shape[1]) for solution in found])
        if not bool(coef.isfinite().all()):
            raise ValueError(NOT_FINITE)
        several = len(found) > 1
        self.coef_ = data.result(coef if several else coef[0])
        self.intercept_ = 0.0
        if self.fit_intercept:
            kept = data.result(data.targets(True)[1] - coef @ data.mean)
            self.intercept_ = kept if several or not data.single else kept[0]
        gaps, steps = [solution.gap for solution in found], [solution.steps for solution in found]
        self.dual_gap_ = np.array(gaps) if several else np.float64(gaps[0])
        self.n_iter_ = steps if several else steps[0]


class Lasso(ElasticNet):
    """Least squares with an L1 penalty, solved to machine precision:

        ½/n·‖y − Xw − c‖² + alpha·‖w‖₁

    Parameters and attributes are those of `sklearn.linear_model.Lasso`; `ElasticNet` says what differs.

    >>> from torchreg.linear import Lasso
    >>> model = Lasso(alpha=0.1).fit([[0, 0], [1, 1], [2, 2]], [0, 1, 2])
    >>> model.coef_.round(6), round(float(model.intercept_), 6)
    (array([0.85, 0.  ]), 0.15)

    Source: Tibshirani, Regression shrinkage and selection via the lasso, Journal of the Royal Statistical Society B,
    1996.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {**ElasticNet._parameter_constraints}
    _parameter_constraints.pop("l1_ratio")

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        precompute: Any = False,
        copy_X: bool = True,
        max_iter: int | None = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
        positive: bool = False,
        random_state: Any = None,
        selection: str = "cyclic",
        device: Any = "auto",
        dtype: Any = "auto",
        solver: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha,
            l1_ratio=1.0,
            fit_intercept=fit_intercept,
            precompute=precompute,
            copy_X=copy_X,
            max_iter=max_iter,
            tol=tol,
            warm_start=warm_start,
            positive=positive,
            random_state=random_state,
            selection=selection,
            device=device,
            dtype=dtype,
            solver=solver,
        )
