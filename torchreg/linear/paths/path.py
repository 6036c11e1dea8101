"""Regularisation paths, and the strength at which they begin."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from torchreg.linear.data.inputs import Data, read
from torchreg.linear.data.precomputed import gram_of
from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.grouped.problem import BlockProblem
from torchreg.linear.grouped.solver import solve_blocks
from torchreg.linear.lasso.problem import Problem, Strength
from torchreg.linear.lasso.solver import SOLVERS, solve

RESOLUTION = float(np.finfo(np.float64).resolution)
"""The only strength of an automatic grid where any strength makes all coefficients zero."""

_ROUNDING = 100.0  # a gap of this many roundings of ‖y‖²/n is zero, whatever tolerance is asked for
_IGNORED = {"X_offset", "X_scale", "random_state", "selection", "do_screening"}
_OF_SOLVER = {"tol", "solver", "max_iter", "sample_weight", *_IGNORED}


class _Anything(BaseEstimator):
    """What the functions check their data for."""

    device = dtype = "auto"


def alpha_max(
    X: Any,
    y: Any,
    *,
    l1_ratio: float = 1.0,
    fit_intercept: bool = True,
    sample_weight: Any = None,
    positive: bool = False,
) -> float:
    """The smallest strength at which all coefficients are zero: max|Xᵀ(y − ȳ)|/(n·l1_ratio).

    Args:
        X: shape (samples, features).
        y: shape (samples,).
        l1_ratio: the share of L1, above 0 and at most 1.
        fit_intercept: whether X and y are centred.
        sample_weight: shape (samples,).
        positive: whether coefficients are bound to be non-negative, so that only positive correlations count.

    Raises:
        ValueError: for unsuitable data.

    >>> from torchreg.linear import Lasso, alpha_max
    >>> X, y = [[0.0], [1.0], [2.0]], [1.0, 1.0, 4.0]
    >>> round(alpha_max(X, y), 12)
    1.0
    >>> Lasso(alpha=0.999).fit(X, y).coef_[0] > 0
    np.True_
    """
    if not 0 < l1_ratio <= 1:
        raise ValueError(f"Expected `l1_ratio` above 0 and at most 1, got {l1_ratio!r}.")
    data = read(_Anything(), X, y, sample_weight)
    design, _ = data.design(fit_intercept)
    targets, _ = data.targets(fit_intercept)
    return max(Problem(design, z, positive).largest for z in targets) / l1_ratio


def alpha_grid(problem: Problem, l1_ratio: float, eps: float, count: int) -> Any:
    """Strengths in a falling geometric sequence from the largest useful one.

    Raises:
        ValueError: for l1_ratio=0, where all strengths are useful.
    """
    if l1_ratio == 0:
        raise ValueError(
            "Automatic alpha grid generation is not supported for l1_ratio=0. Please supply a grid by providing your "
            "estimator with the appropriate `alphas=` argument."
        )
    largest = problem.largest / l1_ratio
    if largest <= RESOLUTION:
        return np.full(count, RESOLUTION)
    return np.geomspace(largest, largest * eps, num=count)


def lasso_path(
    X: Any,
    y: Any,
    *,
    eps: float = 1e-3,
    n_alphas: Any = "deprecated",
    alphas: Any = "warn",
    precompute: Any = "auto",
    Xy: Any = None,
    copy_X: bool = True,
    coef_init: Any = None,
    verbose: Any = False,
    return_n_iter: bool = False,
    positive: bool = False,
    **params: Any,
) -> Any:
    """The lasso's solutions for falling strengths: `enet_path` with l1_ratio=1.

    >>> from torchreg.linear import lasso_path
    >>> alphas, coefs, gaps = lasso_path([[1, 2.3], [2, 5.4], [3.1, 4.3]], [1, 2, 3.1], alphas=[5, 1, 0.5])
    >>> coefs.round(4)
    array([[0.    , 0.    , 0.4692],
           [0.2159, 0.4426, 0.2367]])
    """
    return enet_path(
        X,
        y,
        l1_ratio=1.0,
        eps=eps,
        n_alphas=n_alphas,
        alphas=alphas,
        precompute=precompute,
        Xy=Xy,
        copy_X=copy_X,
        coef_init=coef_init,
        verbose=verbose,
        return_n_iter=return_n_iter,
        positive=positive,
        **params,
    )


def enet_path(
    X: Any,
    y: Any,
    *,
    l1_ratio: float = 0.5,
    eps: float = 1e-3,
    n_alphas: Any = "deprecated",
    alphas: Any = "warn",
    precompute: Any = "auto",
    Xy: Any = None,
    copy_X: bool = True,
    coef_init: Any = None,
    verbose: Any = False,
    return_n_iter: bool = False,
    positive: bool = False,
    check_input: bool = True,
    **params: Any,
) -> Any:
    """The Elastic Net's solutions for falling strengths, without an intercept, as `sklearn.linear_model.enet_path`:

        ½/n·‖y − Xw‖² + alpha·l1_ratio·‖w‖₁ + ½·alpha·(1 − l1_ratio)·‖w‖²

    All strengths share one Gram matrix of the columns that any of them needs.

    Args:
        X: shape (samples, features), dense or sparse; a tensor's path is computed where it is.
        y: shape (samples,), or (samples, targets): the path of `MultiTaskElasticNet`.
        l1_ratio: the share of L1 in [0, 1].
        eps: the smallest strength over the largest one, for an automatic grid.
        alphas: the strengths, or how many of them.
        precompute: XᵀX, True, or what the solver chooses.
        coef_init: coefficients (features,) to begin with.
        return_n_iter: whether the Newton steps of each strength are returned too.
        positive: whether coefficients are bound to be non-negative.
        check_input: False for arrays that have been checked.
        params: `tol`, `max_iter`, `sample_weight` and `solver` (see `ElasticNet`); what only concerns scikit-learn's
            solver is ignored, as are `Xy`, `copy_X` and `verbose`.

    Returns:
        The strengths (m,), coefficients (features, m), or (targets, features, m), and duality gaps (m,); with
        `return_n_iter` the steps.

    Raises:
        ValueError: for unsuitable data, unknown parameters, or an automatic grid with l1_ratio=0.

    >>> from torchreg.linear import enet_path
    >>> alphas, coefs, gaps = enet_path([[1, 2.3], [2, 5.4], [3.1, 4.3]], [1, 2, 3.1], alphas=3)
    >>> coefs.shape
    (2, 3)

    Source: Friedman, Hastie and Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    Journal of Statistical Software, 2010.
    """
    chosen = _chosen(alphas, n_alphas)
    if unknown := params.keys() - _OF_SOLVER:
        raise ValueError("Unexpected parameters in params", unknown)
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"Expected `l1_ratio` in [0, 1], got {l1_ratio!r}.")
    data = read(_Anything(), X, y, params.get("sample_weight"), check_input)
    problem = Problem(data.design(False)[0], data.targets(False)[0][0], positive)
    if not data.single:
        if positive:
            raise ValueError("positive=True is not allowed for multi-output (y.ndim != 1)")
        problem = all_targets(data, False)
    counted = isinstance(chosen, numbers.Integral)
    strengths = alpha_grid(problem, l1_ratio, eps, int(chosen)) if counted else _falling(chosen)
    start = None if coef_init is None else torch.as_tensor(coef_init, dtype=torch.float64, device=data.y.device)
    pairs = [Strength.of(a, l1_ratio) for a in strengths]
    limit, method = params.get("max_iter", 1000), _method(params.get("solver", "auto"))
    found: Any
    if isinstance(problem, BlockProblem):
        if method not in ("auto", "newton"):
            raise ValueError(f"Expected `solver` to be 'auto' or 'newton' for several targets, got {method!r}.")
        found = list(solve_blocks(problem, pairs, limit=limit, start=start))
        coefs = torch.stack([s.w for s in found], 2)
    else:
        gram = gram_of(precompute, problem.design, None, check_input)
        found = solve(problem, pairs, limit=limit, start=start, gram=gram, method=method)
        coefs = torch.stack([s.full(problem.design.features) for s in found], 1)
    for solution in found:
        warn_if_far(solution.gap, problem.power, problem.design.eps, params.get("tol", 1e-4))
    result = strengths, data.result(coefs), np.array([s.gap for s in found])
    return (*result, [s.steps for s in found]) if return_n_iter else result


def all_targets(data: Data, centred: bool, overwrite: bool = False) -> BlockProblem:
    """All targets as one problem, in which each feature is a group."""
    design, _ = data.design(centred, overwrite)
    return BlockProblem(design, data.targets(centred)[0], blocks=Blocks.single(design.features, data.y.device))


def warn_if_far(gap: float, power: float, eps: float, tol: float) -> None:
    """Warn about a solution that is not one: its gap exceeds both the tolerance and rounding."""
    allowed = max(tol, _ROUNDING * eps) * power
    if not gap <= allowed:
        warnings.warn(
            "Objective did not converge. You might want to increase the number of iterations. Duality gap: "
            f"{gap:.6g}, tolerance: {allowed:.3g}",
            ConvergenceWarning,
            stacklevel=4,
        )


def _method(name: Any) -> str:
    if name not in SOLVERS:
        raise ValueError(f"Expected `solver` to be one of {SOLVERS}, got {name!r}.")
    return name


def _falling(alphas: Any) -> Any:
    values = np.asarray(alphas, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"Expected `alphas` to be non-negative numbers, or how many there are, got {alphas!r}.")
    return np.sort(values)[::-1]


def _chosen(alphas: Any, n_alphas: Any) -> Any:
    """The strengths or their number, with scikit-learn's warnings about how they used to be given."""
    chosen = 100
    if not (isinstance(n_alphas, str) and n_alphas == "deprecated"):
        chosen = n_alphas
        warnings.warn(
            "'n_alphas' was deprecated in 1.9 and will be removed in 1.11. 'alphas' now accepts an integer value which "
            "removes the need to pass 'n_alphas'. The default value of 'alphas' will change from None to 100 in 1.11. "
            "Pass an explicit value to 'alphas' and leave 'n_alphas' to its default value to silence this warning.",
            FutureWarning,
            stacklevel=3,
        )
    if alphas is None:
        warnings.warn(
            "'alphas=None' is deprecated and will be removed in 1.11, at which point the default value will be set to "
            "100. Set 'alphas=100' to silence this warning.",
            FutureWarning,
            stacklevel=3,
        )
    elif not (isinstance(alphas, str) and alphas == "warn"):
        chosen = alphas
    return chosen
