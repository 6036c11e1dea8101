"""The lasso whose features are in or out group by group."""

from __future__ import annotations

import numbers
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import MultiOutputMixin, RegressorMixin, _fit_context
from sklearn.linear_model._base import LinearModel
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor

from torchreg.linear.data.inputs import read
from torchreg.linear.estimators.elastic_net import PLACES
from torchreg.linear.estimators.group_norms import GroupNorms
from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.grouped.problem import BlockProblem
from torchreg.linear.lasso.problem import Strength


class GroupLasso(GroupNorms, MultiOutputMixin, RegressorMixin, LinearModel):
    """Least squares with a penalty on the norm of each group of coefficients, solved to machine precision:

        ½/n·‖y − Xw − c‖² + alpha·Σ_g √|g|·‖w_g‖

    Groups of coefficients are zero together. With groups of one feature it is the `Lasso`.

    Args:
        alpha: non-negative.
        groups: a number of neighbouring features for each group, which divides the number of features; or a label for
            each feature, equal for those in one group; or a list of groups, each a list of columns.
        group_weight: "sqrt" for √|g|, or "none" for groups that all count alike.
        fit_intercept: whether X and y are centred.
        copy_X: False to allow that X is overwritten.
        max_iter: the most Newton steps at this strength, where ten sweeps of coordinate descent count as one; None for
            1000.
        tol: from which duality gap on there is a ConvergenceWarning, over ‖y‖²/n. The result doesn't depend on it.
        warm_start: whether a fit begins at the coefficients of the one before.
        device: "auto" for where X is, or a torch device for NumPy arrays, such as "cuda".
        dtype: "auto" for that of X, or float32 or float64. Systems of the support are solved in float64 either way.
        solver: "auto" or "newton".

    Attributes:
        coef_: shape (features,), or (targets, features) for y of two dimensions; each target is a problem of its own.
        intercept_: a number, or shape (targets,).
        groups_: each feature's group, a number from 0 on, (features,).
        dual_gap_: how far the objective is from the smallest one, at most; one for each target if there are several.
        n_iter_: Newton steps, and one for ten sweeps.

    >>> import numpy as np
    >>> from torchreg.linear import GroupLasso
    >>> x = np.random.default_rng(0).standard_normal((50, 6))
    >>> y = x @ [1.0, -1.0, 2.0, 0.0, 0.0, 0.0]
    >>> GroupLasso(alpha=0.3, groups=[["a", "b"][j > 2] for j in range(6)]).fit(x, y).coef_.round(2)
    array([ 0.85, -0.78,  1.6 ,  0.  ,  0.  ,  0.  ])

    Source: Yuan and Lin, Model selection and estimation in regression with grouped variables, Journal of the Royal
    Statistical Society B, 2006.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "alpha": [Interval(numbers.Real, 0, None, closed="left")],
        "groups": [Interval(numbers.Integral, 1, None, closed="left"), "array-like"],
        "group_weight": [StrOptions({"sqrt", "none"})],
        "fit_intercept": ["boolean"],
        "copy_X": ["boolean"],
        "max_iter": [Interval(numbers.Integral, 1, None, closed="left"), None],
        "tol": [Interval(numbers.Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        **PLACES,
    }

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        groups: Any = 1,
        group_weight: str = "sqrt",
        fit_intercept: bool = True,
        copy_X: bool = True,
        max_iter: int | None = 1000,
        tol: float = 1e-4,
        warm_start: bool = False,
        device: Any = "auto",
        dtype: Any = "auto",
        solver: str = "auto",
    ) -> None:
        self.alpha = alpha
        self.groups = groups
        self.group_weight = group_weight
        self.fit_intercept = fit_intercept
        self.copy_X = copy_X
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.solver = solver

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> GroupLasso:
        """Fit the coefficients, and the intercept if there is one.

        Args:
            X: shape (samples, features): NumPy array, frame, scipy sparse matrix or tensor.
            y: shape (samples,) or (samples, targets), each target a problem of its own.
            sample_weight: shape (samples,), of any scale.

        Raises:
            ValueError: for unsuitable data, or groups that don't hold each feature once.
        """
        data = read(self, X, y, sample_weight, finite=False)
        labels = group_labels(self.groups, data.x.shape[1])
        design, mean = data.design(self.fit_intercept, overwrite=not self.copy_X)
        targets, target_mean = data.targets(self.fit_intercept)
        sizes = torch.from_numpy(np.bincount(labels)).to(targets.device, torch.float64)
        weights = sizes.sqrt() if self.group_weight == "sqrt" else torch.ones_like(sizes)
        blocks = Blocks(torch.from_numpy(labels).to(targets.device), weights)
        start = self._start(data)
        found = [
            self._solve(
                data,
                BlockProblem(design, z, blocks=blocks),
                Strength.of(self.alpha),
                None if start is None else start[i : i + 1],
            )
            for i, z in enumerate(targets.split(1))
        ]
        coef = torch.cat([solution.w for solution in found])
        several = not data.single
        self.groups_ = labels
        self.coef_ = data.result(coef if several else coef[0])
        intercept = data.result(target_mean if mean is None else target_mean - coef @ mean)
        self.intercept_ = 0.0 if not self.fit_intercept else intercept if several else intercept[0]
        gaps, steps = [solution.gap for solution in found], [solution.steps for solution in found]
        self.dual_gap_ = np.array(gaps) if several else np.float64(gaps[0])
        self.n_iter_ = steps if several else steps[0]
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def group_labels(groups: Any, features: int) -> Any:
    """Each feature's group, numbers from 0 on without gaps, (features,): from what users say groups are.

    Raises:
        ValueError: if they don't hold each feature once.
    """
    if isinstance(groups, numbers.Integral):
        if features % int(groups):
            raise ValueError(f"Expected `groups` to divide the number of features, {features}, got {groups}.")
        return np.arange(features) // int(groups)
    if isinstance(groups, Tensor):
        groups = groups.detach().cpu().numpy()
    groups = list(groups)
    if all(np.ndim(g) == 0 for g in groups):
        if len(groups) != features:
            raise ValueError(
                f"Expected `groups` to be a label for each of {features} features, a list of lists of columns, or a "
                f"number of features for each group; got {len(groups)} labels."
            )
        return np.unique(np.asarray(groups), return_inverse=True)[1]
    labels = np.full(features, -1)
    for i, group in enumerate(groups):
        columns = np.atleast_1d(np.asarray(group))
        if columns.ndim != 1 or not len(columns) or not np.issubdtype(columns.dtype, np.integer):
            raise ValueError(f"Expected group {i} of `groups` to be a list of columns, got {group!r}.")
        if columns.min() < 0 or columns.max() >= features:
            raise ValueError(f"Expected columns from 0 to {features - 1} in `groups`, group {i} is {group!r}.")
        if len(np.unique(columns)) < len(columns) or (labels[columns] >= 0).any():
            raise ValueError(f"Expected each column in one group only, but group {i} repeats a column: {group!r}.")
        labels[columns] = i
    if (labels < 0).any():
        raise ValueError(f"Expected `groups` to hold each column, column {int(np.argmax(labels < 0))} is in none.")
    return labels
