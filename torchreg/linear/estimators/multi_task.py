"""Lasso and Elastic Net of several targets that share their features."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
from sklearn.base import _fit_context

from torchreg.linear.data.inputs import Data, read
from torchreg.linear.estimators.elastic_net import PLACES
from torchreg.linear.estimators.group_norms import GroupNorms
from torchreg.linear.grouped.problem import BlockProblem
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.paths.path import all_targets, enet_path


class MultiTaskElasticNet(GroupNorms, sklearn.linear_model.MultiTaskElasticNet):
    """Least squares of several targets, each of whose features is used by all of them or by none:

        ½/n·‖Y − XW − c‖² + alpha·l1_ratio·Σ_j ‖W_j‖ + ½·alpha·(1 − l1_ratio)·‖W‖²

    where W_j are the coefficients of feature j, one for each target, and norms are Euclidean. Parameters, attributes
    and errors are those of `sklearn.linear_model.MultiTaskElasticNet`. This differs in:

    1. The result doesn't depend on `tol`, `selection` or `random_state`: coordinate descent only finds the features,
       and Newton steps on them end at the minimiser. `tol` (times ‖Y‖²/n) only says from which duality gap on there is
       a ConvergenceWarning.
    2. `n_iter_` counts Newton steps, and ten sweeps as one; `max_iter` limits those at the strength asked for.
    3. X may be a torch tensor, dense or sparse, and is then not copied to another device; `coef_`, `intercept_` and
       predictions are tensors there.

    Args:
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Systems of the support are solved in float64 either way.
        solver: "auto" or "newton".

    `dual_gap_` bounds how far the objective is from the smallest one: it is computed from the coefficients, by
    scikit-learn's formula.

    >>> from torchreg.linear import MultiTaskElasticNet
    >>> model = MultiTaskElasticNet(alpha=0.1).fit([[0, 0], [1, 1], [2, 2]], [[0, 0], [1, 1], [2, 2]])
    >>> model.coef_.round(4)
    array([[0.4564, 0.4564],
           [0.4564, 0.4564]])

    Source: Obozinski, Taskar and Jordan, Joint covariate selection and joint subspace selection for multiple
    classification problems, Statistics and Computing, 2010.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.MultiTaskElasticNet._parameter_constraints,
        **PLACES,
    }
    path = staticmethod(enet_path)

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        l1_ratio: float = 0.5,
        fit_intercept: bool = True,
        copy_X: bool = True,
        max_iter: int | None = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
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
            copy_X=copy_X,
            max_iter=max_iter,
            tol=tol,
            warm_start=warm_start,
            random_state=random_state,
            selection=selection,
        )
        self.device = device
        self.dtype = dtype
        self.solver = solver

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MultiTaskElasticNet:
        """Fit the coefficients, and the intercepts if there are any.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples, targets).
            sample_weight: shape (samples,), of any scale.

        Raises:
            ValueError: for unsuitable data, as in scikit-learn, or one-dimensional y.
        """
        data = read(self, X, y, sample_weight, finite=False)
        if data.single:
            raise ValueError(f"For mono-task outputs, use {type(self).__name__.removeprefix('MultiTask')}")
        return self.fit_problem(data, all_targets(data, self.fit_intercept, overwrite=not self.copy_X))

    def fit_problem(self, data: Data, problem: BlockProblem) -> MultiTaskElasticNet:
        """`fit` for data that have been read."""
        strength = Strength.of(self.alpha, self.l1_ratio)
        solution = self._solve(data, problem, strength, self._start(data))
        self.coef_ = data.result(solution.w)
        self.intercept_ = 0.0
        if self.fit_intercept:
            self.intercept_ = data.result(data.targets(True)[1] - solution.w @ data.mean)
        self.dual_gap_, self.n_iter_ = np.float64(solution.gap), solution.steps
        self.eps_ = self.tol * float(problem.target.square().sum())
        return self


class MultiTaskLasso(MultiTaskElasticNet):
    """Least squares of several targets, each of whose features is used by all of them or by none:

        ½/n·‖Y − XW − c‖² + alpha·Σ_j ‖W_j‖

    where W_j are the coefficients of feature j, one for each target. Parameters and attributes are those of
    `sklearn.linear_model.MultiTaskLasso`; `MultiTaskElasticNet` says what differs.

    >>> from torchreg.linear import MultiTaskLasso
    >>> model = MultiTaskLasso(alpha=0.1).fit([[0, 1], [1, 2], [2, 4]], [[0, 0], [1, 1], [2, 3]])
    >>> model.coef_.round(4)
    array([[0.    , 0.6081],
           [0.    , 0.9459]])

    Source: Obozinski, Taskar and Jordan, Joint covariate selection and joint subspace selection for multiple
    classification problems, Statistics and Computing, 2010.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {**MultiTaskElasticNet._parameter_constraints}
    _parameter_constraints.pop("l1_ratio")

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        copy_X: bool = True,
        max_iter: int | None = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
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
            copy_X=copy_X,
            max_iter=max_iter,
            tol=tol,
            warm_start=warm_start,
            random_state=random_state,
            selection=selection,
            device=device,
            dtype=dtype,
            solver=solver,
        )
