"""Ridge regression as an estimator."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
import torch
from scipy import sparse
from sklearn.base import _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import StrOptions
from torch import Tensor

from torchreg.linear.data.inputs import Data, read
from torchreg.linear.estimators.elastic_net import PLACES, TensorPrediction
from torchreg.linear.lasso.problem import NOT_FINITE, Problem, Strength
from torchreg.linear.lasso.solver import solve
from torchreg.linear.ridge.problem import RidgeProblem
from torchreg.linear.ridge.solver import ridge_gaps, solve_ridge

_SOLVERS = {"auto", "svd", "cholesky", "lsqr", "sparse_cg", "sag", "saga", "lbfgs", "newton"}
_METHODS = {"svd": "svd", "cholesky": "cholesky", "sparse_cg": "cg"}
_NAMES = {"svd": "svd", "cholesky": "cholesky", "cg": "sparse_cg", "newton": "newton"}


class Ridge(TensorPrediction, sklearn.linear_model.Ridge):
    """Least squares with an L2 penalty, solved to machine precision:

        ‖y − Xw − c‖² + alpha·‖w‖²

    Parameters, attributes and errors are those of `sklearn.linear_model.Ridge`. This differs in:

    1. The result doesn't depend on `solver`, `tol` or `random_state`. "cholesky" takes the Gram matrix of X's smaller
       side and refines by residuals from X; "svd" decomposes X; "sparse_cg" runs conjugate gradients down to rounding,
       or `max_iter`. "auto" is "cholesky", "svd" where that has lost its digits, and "sparse_cg" for a sparse X
       with more than 4096 samples and features. The other names mean "auto", and `solver_` repeats them.
    2. `positive=True` is solved by the Newton method of `ElasticNet`, in at most `max_iter` steps. Those are counted in
       `n_iter_`, which is None for "svd", "cholesky" and "sparse_cg", and 1 for the other ways.
    3. X may be a torch tensor, dense or sparse, as in `ElasticNet`. A sparse X is never filled in.
    4. Sample weights are non-negative.

    Args:
        alpha: strength, or one for each target.
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Systems are solved in float64 either way.
        solver: one of scikit-learn's, or "newton".

    `dual_gap_` bounds how far the objective is from the smallest one, for each target: it is
    ‖Xᵀ(y − Xw − c) − alpha·w‖²/alpha with X centred and weighted; for alpha = 0, ‖Xᵀ(y − Xw − c)‖²/n.

    >>> from sklearn.datasets import load_diabetes
    >>> from torchreg.linear import Ridge
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = Ridge(alpha=0.1).fit(X, y)
    >>> model.coef_[:3].round(2)
    array([   1.31, -207.19,  489.7 ])
    >>> bool(model.dual_gap_ < 1e-20 * (y @ y))
    True

    Source: Hoerl and Kennard, Ridge regression: biased estimation for nonorthogonal problems, Technometrics, 1970.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.Ridge._parameter_constraints,
        **PLACES,
        "solver": [StrOptions(_SOLVERS)],
    }

    def __init__(
        self,
        alpha: Any = 1.0,
        *,
        fit_intercept: bool = True,
        copy_X: bool = True,
        max_iter: int | None = None,
        tol: float = 1e-4,
        solver: str = "auto",
        positive: bool = False,
        random_state: Any = None,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha,
            fit_intercept=fit_intercept,
            copy_X=copy_X,
            max_iter=max_iter,
            tol=tol,
            solver=solver,
            positive=positive,
            random_state=random_state,
        )
        self.device = device
        self.dtype = dtype

    @property
    def _takes_large_indices(self) -> bool:
        return self.solver not in ("sag", "saga")

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Ridge:
        """Fit the coefficients, and the intercept if there is one.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,) or (samples, targets).
            sample_weight: a number or shape (samples,). Their scale matters: weights of 2 are half the strength.

        Raises:
            ValueError: for unsuitable data, as in scikit-learn, or a solver that doesn't suit them.
        """
        self._check_solver(_is_sparse(X))
        data = read(self, X, y, sample_weight)
        alphas = self._alphas(data)
        mass = mean_weight(sample_weight)
        problem = RidgeProblem(data, self.fit_intercept, overwrite=not self.copy_X)
        method = _METHODS.get(self.solver, "auto")
        steps = np.ones(len(alphas), dtype=np.int32)
        if self.positive:
            coef, gaps, method, steps = self._positive(problem, alphas / mass)
        else:
            coef, method = solve_ridge(problem, alphas / mass, method, self.max_iter, self.tol)
            gaps = ridge_gaps(problem, coef, alphas / mass)
        keep(self, data, problem, coef)
        self.dual_gap_ = bounds(gaps * mass)
        self.n_iter_ = None if self.solver in _METHODS else steps
        self.solver_ = _NAMES[method] if self.solver in ("auto", *_METHODS) else self.solver
        return self

    def _check_solver(self, sparse_x: bool) -> None:
        """Scikit-learn's own refusals."""
        if self.solver == "lbfgs" and not self.positive:
            raise ValueError("'lbfgs' solver can be used only when positive=True. Please use another solver.")
        if self.positive and self.solver not in ("auto", "lbfgs", "newton"):
            raise ValueError(
                f"solver='{self.solver}' does not support positive fitting. Please set the solver to 'auto' or "
                "'lbfgs', or set `positive=False`"
            )
        if sparse_x and self.fit_intercept and self.solver in ("svd", "cholesky", "saga"):
            raise ValueError(
                f"solver='{self.solver}' does not support fitting the intercept on sparse data. Please set the solver "
                "to 'auto' or 'lsqr', 'sparse_cg', 'sag', 'lbfgs' or set `fit_intercept=False`"
            )
        if sparse_x and self.solver == "svd":
            raise TypeError("SVD solver does not support sparse inputs currently")

    def _alphas(self, data: Data) -> Tensor:
        """One strength a target."""
        given = self.alpha.detach().cpu().numpy() if isinstance(self.alpha, Tensor) else self.alpha
        alphas = torch.as_tensor(np.ravel(np.asarray(given, dtype=np.float64)), device=data.y.device)
        targets = data.y.shape[1]
        if len(alphas) not in (1, targets):
            raise ValueError(f"Number of targets and number of penalties do not correspond: {len(alphas)} != {targets}")
        if not bool((alphas >= 0).all() & alphas.isfinite().all()):
            raise ValueError(f"Expected `alpha` to be finite and non-negative, got {self.alpha!r}.")
        return alphas.expand(targets)

    def _positive(self, problem: RidgeProblem, alphas: Tensor) -> tuple[Tensor, Tensor, str, Any]:
        """By Newton steps on ½/n of the objective; each target is a problem of its own."""
        design, found, limit = problem.design, [], self.max_iter or 1000
        for target, alpha in zip(problem.targets, alphas.tolist(), strict=True):
            strength = Strength(0.0, alpha / design.samples)
            found += solve(Problem(design, target, positive=True), [strength], limit=limit)
        gaps = alphas.new_tensor([2 * design.samples * solution.gap for solution in found])
        power = problem.targets.square().sum(1)
        if not bool((gaps <= max(self.tol, 1e-10, 64 * design.eps) * power).all()):
            warnings.warn(
                f"Newton steps did not converge within {limit}, duality gap: {float(gaps.max())}",
                ConvergenceWarning,
                stacklevel=3,
            )
        taken = np.array([max(1, solution.steps) for solution in found], dtype=np.int32)
        return torch.stack([solution.full(design.features) for solution in found]), gaps, "newton", taken


def bounds(gaps: Tensor) -> Any:
    """What `dual_gap_` holds: a number, or one for each of several targets."""
    found = gaps.cpu().numpy()
    return found if len(found) > 1 else found[0]


def mean_weight(sample_weight: Any) -> float:
    """What weights that sum to the number of samples are to be multiplied by."""
    if sample_weight is None:
        return 1.0
    mean = float(sample_weight.mean() if isinstance(sample_weight, Tensor) else np.asarray(sample_weight).mean())
    if not 0 < mean < np.inf:
        raise ValueError(f"Expected sample weights of which one is positive, got a mean of {mean}.")
    return mean


def keep(estimator: Any, data: Data, problem: RidgeProblem, coef: Tensor) -> None:
    """Set `coef_` and `intercept_` from coefficients (targets, features) in float64."""
    if not bool(coef.isfinite().all()):
        raise ValueError(NOT_FINITE)
    several = len(coef) > 1
    estimator.coef_ = data.result(coef if several else coef[0])
    estimator.intercept_ = 0.0
    if problem.mean is not None:
        kept = data.result(problem.target_mean - coef @ problem.mean)
        estimator.intercept_ = kept if several or not data.single else kept[0]


def _is_sparse(x: Any) -> bool:
    return sparse.issparse(x) or (isinstance(x, Tensor) and x.layout != torch.strided)
