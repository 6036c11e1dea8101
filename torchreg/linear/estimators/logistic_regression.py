"""Logistic regression as an estimator."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import sklearn.linear_model
import sklearn.metrics
import torch
from scipy import sparse
from sklearn.base import _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import logsigmoid

from torchreg.linear.data.labels import Labelled, read_labelled
from torchreg.linear.estimators.elastic_net import PLACES
from torchreg.linear.lasso.problem import NOT_FINITE, Strength
from torchreg.linear.logistic.loss import Binomial, Multinomial
from torchreg.linear.logistic.newton import LogisticSolution
from torchreg.linear.logistic.penalty import OWN_SOLVERS, penalty_of, strength_of
from torchreg.linear.logistic.problem import LogisticProblem
from torchreg.linear.logistic.solver import solve_classification
from torchreg.linear.paths.path import warn_if_far

_THEIRS = ("lbfgs", "liblinear", "newton-cg", "newton-cholesky", "sag", "saga")
_SEPARATED = 1e-8  # of the loss without features: what is left of it where classes are separable

_NOTHING = 1e-12  # a loss that needs no features


class LogisticRegression(sklearn.linear_model.LogisticRegression):
    """Classification by a linear model of log-odds, with an L1 or an L2 penalty, both or none, to machine precision:

        1/S·Σ s·loss(y, Xw + c) + (l1_ratio·‖w‖₁ + ½·(1 − l1_ratio)·‖w‖²)/(C·S)

    with log(1 + exp(∓score)) for two classes, −log softmax for more, and sample weights s (times class weights) that
    sum to S. Parameters, attributes and errors are those of `sklearn.linear_model.LogisticRegression`. This differs in:

    1. Every penalty goes with every number of classes. The result doesn't depend on `solver`, `tol` or `random_state`:
       proximal Newton steps on a working set of columns end at the minimiser. `tol` (times the loss without
       features) only says from which duality gap on there is a ConvergenceWarning. `max_iter` limits Newton steps.
    2. Scikit-learn's solvers are accepted for what it accepts them for, and mean "auto"; "liblinear" also means that
       the intercept is penalised, as a coefficient of a column of `intercept_scaling`.
    3. X may be a torch tensor, dense or sparse, and is then not copied to another device; `coef_`, `intercept_` and
       predictions are tensors there, labels too if y was a tensor. A sparse X is never filled in.
    4. Sample weights are non-negative. Callbacks are not called.
    5. For separable classes with C=inf, where there is no minimiser, there is a ConvergenceWarning.

    Args:
        solver: "auto" and "newton" are what is said above; "fista" (accelerated proximal gradient with gap-safe
            screening, up to 50 iterations for each of `max_iter`) ends at the same certificate.
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Newton's systems are solved in float64 either way.

    `dual_gap_` bounds how far the objective above is from the smallest one. It is computed from the coefficients.

    >>> from sklearn.datasets import load_iris
    >>> from torchreg.linear import LogisticRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> model = LogisticRegression(l1_ratio=1.0, C=0.5).fit(X, y)
    >>> (model.coef_ == 0).sum(), model.predict(X[:2])
    (np.int64(9), array([0, 0]))
    >>> bool(model.dual_gap_ < 1e-12)
    True

    Source: Friedman, Hastie and Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    Journal of Statistical Software, 2010; Yuan, Ho and Lin, An improved GLMNET for L1-regularized logistic regression,
    JMLR 2012.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **sklearn.linear_model.LogisticRegression._parameter_constraints,
        **PLACES,
        "solver": [StrOptions({*OWN_SOLVERS, *_THEIRS})],
    }

    def __init__(
        self,
        penalty: Any = "deprecated",
        *,
        C: float = 1.0,
        l1_ratio: float | None = 0.0,
        dual: bool = False,
        tol: float = 1e-4,
        fit_intercept: bool = True,
        intercept_scaling: float = 1,
        class_weight: Any = None,
        random_state: Any = None,
        solver: str = "auto",
        max_iter: int = 100,
        verbose: Any = 0,
        warm_start: bool = False,
        n_jobs: int | None = None,
        device: Any = "auto",
        dtype: Any = "auto",
    ) -> None:
        super().__init__(
            penalty=penalty,
            C=C,
            l1_ratio=l1_ratio,
            dual=dual,
            tol=tol,
            fit_intercept=fit_intercept,
            intercept_scaling=intercept_scaling,
            class_weight=class_weight,
            random_state=random_state,
            solver=solver,
            max_iter=max_iter,
            verbose=verbose,
            warm_start=warm_start,
            n_jobs=n_jobs,
        )
        self.device = device
        self.dtype = dtype

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LogisticRegression:
        """Fit the coefficients, and the intercepts if there are any.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,), labels of at least two classes.
            sample_weight: shape (samples,). Their scale matters: weights of 2 are twice the C.

        Raises:
            ValueError: for unsuitable data, as in scikit-learn.
        """
        penalty = penalty_of(self)
        if self.n_jobs is not None:
            warnings.warn(
                "'n_jobs' has no effect since 1.8 and will be removed in 1.10. You provided "
                f"'n_jobs={self.n_jobs}', please leave it unspecified.",
                FutureWarning,
                stacklevel=2,
            )
        tensor_labels = isinstance(y, Tensor)
        read = read_labelled(self, X, y, sample_weight, self.class_weight)
        rows = 1 if len(read.classes) == 2 else len(read.classes)
        penalised = self.solver == "liblinear" and self.fit_intercept
        if self.solver == "liblinear" and rows > 1:
            raise ValueError(
                "The 'liblinear' solver does not support multiclass classification (n_classes >= 3). Either use "
                "another solver or wrap the estimator in a OneVsRestClassifier to keep applying a one-versus-rest "
                "scheme."
            )
        if penalised:
            read = _with_constant(read, self.intercept_scaling)
        free = self.fit_intercept and not penalised
        design, mean = read.data.design(free)
        loss = Binomial(read.codes, read.weights) if rows == 1 else Multinomial(read.codes, read.weights, rows)
        strength = strength_of(penalty, self.C, self.l1_ratio, read.mass)
        problem = LogisticProblem(design, loss, strength, free)
        start = self._start(read, rows, mean, penalised)
        found = solve_classification(problem, self.max_iter, start, self.solver)
        self._warn(problem, found, strength)
        self._keep(read, found, mean, penalised, strength)
        self.classes_ = torch.as_tensor(read.classes) if tensor_labels else read.classes
        if tensor_labels and read.data.home is not None:
            self.classes_ = self.classes_.to(read.data.home)
        return self

    def _start(self, read: Labelled, rows: int, mean: Tensor | None, penalised: bool) -> tuple[Tensor, Tensor] | None:
        """Coefficients and intercepts to begin with, as the solver sees them."""
        if not self.warm_start or not hasattr(self, "coef_"):
            return None
        coef = self.coef_.toarray() if sparse.issparse(self.coef_) else self.coef_
        w, intercept = (
            torch.as_tensor(a, dtype=torch.float64, device=read.codes.device) for a in (coef, self.intercept_)
        )
        features = read.data.x.shape[1] - penalised
        if w.shape != (rows, features):
            raise ValueError(f"Initialization coef is of shape {tuple(w.shape)}, expected shape {(rows, features)}")
        if penalised:
            w = torch.cat([w, intercept.reshape(1, 1) / self.intercept_scaling], 1)
        if mean is not None:
            return w, intercept + w @ mean
        return w, torch.zeros_like(intercept)

    def _warn(self, problem: LogisticProblem, found: LogisticSolution, strength: Strength) -> None:
        if not (strength.l1 or strength.l2):
            scores = problem.design.fitted(found.w) + found.intercept.unsqueeze(1)
            if float(problem.loss.value(scores)) <= _SEPARATED * problem.power:
                warnings.warn(
                    "The classes are separable: without a penalty the coefficients grow without bound, and these are "
                    "merely large. Expected a finite C.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
        warn_if_far(found.gap, max(problem.power, _NOTHING), problem.design.eps, self.tol)

    def _keep(
        self, read: Labelled, found: LogisticSolution, mean: Tensor | None, penalised: bool, strength: Strength
    ) -> None:
        w, intercept = found.w, found.intercept
        if mean is not None:
            intercept = intercept - w @ mean
        if len(w) > 1:  # what all classes share changes nothing
            intercept = intercept - intercept.mean()
        if penalised:
            w, intercept = w[:, :-1], w[:, -1] * self.intercept_scaling
        if not bool(w.isfinite().all() & intercept.isfinite().all()):
            raise ValueError(NOT_FINITE)
        self.coef_ = read.data.result(w.contiguous())
        self.intercept_ = read.data.result(intercept)
        self.dual_gap_ = np.float64(found.gap)
        self.n_iter_ = np.array([found.steps], dtype=np.int32)

    def decision_function(self, X: Any) -> Any:
        """Scores: log-odds of the second class, or one for each class.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples,), or (samples, classes); a tensor for a model that was fitted on tensors.
        """
        check_is_fitted(self)
        if not isinstance(self.coef_, Tensor):
            return super().decision_function(X.detach().cpu().numpy() if isinstance(X, Tensor) else X)
        X = torch.as_tensor(X, dtype=self.coef_.dtype, device=self.coef_.device)
        if X.ndim != 2 or X.shape[1] != self.coef_.shape[-1]:
            raise ValueError(f"X has shape {tuple(X.shape)}, but {self.coef_.shape[-1]} features were expected.")
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> Any:
        """The likeliest class of each sample.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples,), labels.
        """
        scores = self.decision_function(X)
        if isinstance(scores, Tensor):
            codes = (scores > 0).long() if scores.ndim == 1 else scores.argmax(1)
            return self.classes_[codes if isinstance(self.classes_, Tensor) else codes.cpu().numpy()]
        codes = (scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1)
        return self.classes_[torch.from_numpy(codes) if isinstance(self.classes_, Tensor) else codes]

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of the classes' probabilities, also of those too small for a number.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples, classes).
        """
        scores = self.decision_function(X)
        t = scores if isinstance(scores, Tensor) else torch.from_numpy(scores)
        logs = logsigmoid(torch.stack([-t, t], 1)) if t.ndim == 1 else torch.log_softmax(t, 1)
        return logs if isinstance(scores, Tensor) else logs.numpy()

    def predict_proba(self, X: Any) -> Any:
        """Probabilities of the classes, in the order of `classes_`.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples, classes).
        """
        logs = self.predict_log_proba(X)
        return logs.exp() if isinstance(logs, Tensor) else np.exp(logs)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of samples whose class is predicted, with their weights.

        Args:
            X: shape (samples, features).
            y: shape (samples,).
            sample_weight: shape (samples,).
        """
        found, y, sample_weight = (
            a.detach().cpu().numpy() if isinstance(a, Tensor) else a for a in (self.predict(X), y, sample_weight)
        )
        return float(sklearn.metrics.accuracy_score(y, found, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = False
        return tags


def _with_constant(read: Labelled, value: float) -> Labelled:
    """The data with a column of this value."""
    x = read.data.x
    if isinstance(x, Tensor):
        x = torch.cat([x, torch.full_like(x[:, :1], value)], 1)
    else:
        x = sparse.hstack([x, np.full((x.shape[0], 1), value, dtype=x.dtype)], format="csc")
    return replace(read, data=replace(read.data, x=x))
