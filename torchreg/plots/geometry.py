"""Why L1 makes zeros: the penalty's ball and the contours of the loss of two features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.plots.style import NONZERO, QUIET, ZERO, array, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALVINGS = 200
PIXELS = 241


def geometry(
    X: Any,
    y: Any,
    axes: Axes,
    *,
    l1_ratio: float = 1.0,
    size: float = 0.5,
    names: Sequence[str] = ("w₁", "w₂"),
) -> Axes:
    """Draw the loss of two features as contours, the ball of a penalty, and the point where they touch.

    The loss is f(w) = ½/n·‖y − Xw‖² with X and y centred, and the penalty that of scikit-learn's `ElasticNet`,
    R(w) = l1_ratio·‖w‖₁ + ½(1 − l1_ratio)·‖w‖²: a diamond for 1, a circle for 0, something in between otherwise. The
    solution of

        min f(w)  where  R(w) ≤ R(size·ŵ),  ŵ = argmin f,

    also minimises f(w) + α·R(w), for the α in the title. A corner of the ball has a weight that is exactly zero. The
    ball's shape depends on the scale of w where l1_ratio is neither 0 nor 1: standardise X and y to see its corners.

    Args:
        X: the two features (samples, 2).
        y: the target (samples,).
        axes: where to draw.
        l1_ratio: the share of L1, in [0, 1].
        size: of the ball, above 0 and below 1: a ball of size 1 reaches the least squares solution ŵ.
        names: of the two features.

    Raises:
        ValueError: for other shapes, infinite values or NaN, numbers out of their range, or a target that neither
            feature is correlated with.
        TypeError: if something does not hold real numbers.

    >>> from matplotlib.figure import Figure
    >>> from torchreg import plots
    >>> X, y = [[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [2.0, 1.0]], [3.0, -2.0, -1.0, 4.0]
    >>> axes = plots.geometry(X, y, Figure().subplots(), size=0.4)
    >>> [float(w.round(3)) for w in axes.lines[-1].get_xydata()[0]]
    [1.08, 0.0]

    Source: Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996, figure 2.
    """
    design, target = array("X", X, ndim=2), array("y", y, ndim=1)
    if design.shape != (len(target), 2):
        raise ValueError(f"Expected `X` of two features of {len(target)} samples, got the shape {design.shape}.")
    if not (np.isfinite(design).all() and np.isfinite(target).all()):
        raise ValueError("Expected `X` and `y` to be finite.")
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"Expected `l1_ratio` in [0, 1], got {l1_ratio}.")
    if not 0 < size < 1:
        raise ValueError(f"Expected `size` above 0 and below 1, got {size}.")
    if len(names) != 2:
        raise ValueError(f"Expected two names of features, got {len(names)}.")
    design, target = design - design.mean(0), target - target.mean()
    with np.errstate(over="ignore", invalid="ignore"):
        hessian, moment = design.T @ design / len(target), design.T @ target / len(target)
    if not (np.isfinite(hessian).all() and np.isfinite(moment).all()):
        raise ValueError("Expected `X` and `y` of moderate size: their squares are beyond float64.")
    best = np.linalg.lstsq(hessian, moment, rcond=None)[0]
    if not np.abs(best).max() > 0:
        raise ValueError("Expected a target that is correlated with one of the features.")
    radius = _penalty(size * best, l1_ratio)
    alpha, solution = _constrained(hessian, moment, l1_ratio, radius)
    ball = _ball(l1_ratio, radius)
    _contours(axes, hessian, best, solution, ball)
    axes.fill(*ball, facecolor=ZERO, alpha=0.25, zorder=2)
    axes.plot(*np.c_[ball, ball[:, :1]], color=ZERO, linewidth=1.6, zorder=2)
    axes.plot(*best, "+", color=QUIET, markersize=10, markeredgewidth=2, label="least squares", zorder=4)
    axes.plot(*solution, "o", color=NONZERO, markersize=8, markeredgecolor="white", label="with the penalty", zorder=5)
    zeros = [name for name, w in zip(names, solution, strict=True) if w == 0]
    remark = f"{zeros[0]} is exactly 0" if zeros else "no weight is 0"
    axes.set_title(f"{_name(l1_ratio)}, α = {alpha:.2g}: {remark}", fontsize="medium", parse_math=False)
    axes.set_xlabel(f"weight of {names[0]}" if names[0] != "w₁" else names[0], parse_math=False)
    axes.set_ylabel(f"weight of {names[1]}" if names[1] != "w₂" else names[1], parse_math=False)
    return axes


def _name(l1_ratio: float) -> str:
    return {1.0: "Lasso", 0.0: "Ridge"}.get(float(l1_ratio), "Elastic Net")


def _penalty(w: Any, l1_ratio: float) -> float:
    return float(l1_ratio * np.abs(w).sum() + 0.5 * (1 - l1_ratio) * (w @ w))


def _penalised(hessian: Any, moment: Any, l1_ratio: float, alpha: float) -> Any:
    """argmin ½wᵀHw − bᵀw + α·R(w) over two weights: the best of the stationary points of all patterns of signs."""
    found, least = np.zeros(2), 0.0
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=2):
        chosen = np.flatnonzero(signs)
        if not len(chosen):
            continue
        system = hessian[np.ix_(chosen, chosen)] + alpha * (1 - l1_ratio) * np.eye(len(chosen))
        part = np.linalg.lstsq(system, moment[chosen] - alpha * l1_ratio * np.take(signs, chosen), rcond=None)[0]
        w = np.zeros(2)
        w[chosen] = part
        objective = 0.5 * w @ hessian @ w - moment @ w + alpha * _penalty(w, l1_ratio)
        if objective < least:
            found, least = w, objective
    return found


def _constrained(hessian: Any, moment: Any, l1_ratio: float, radius: float) -> tuple[float, Any]:
    """The strength whose solution lies on the ball, and that solution: R falls as the strength rises."""
    low, high = 0.0, float(np.abs(moment).max())
    while _penalty(_penalised(hessian, moment, l1_ratio, high), l1_ratio) > radius:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        outside = _penalty(_penalised(hessian, moment, l1_ratio, middle), l1_ratio) > radius
        low, high = (middle, high) if outside else (low, middle)
    return high, _penalised(hessian, moment, l1_ratio, high)


def _ball(l1_ratio: float, radius: float) -> Any:
    """The boundary of R(w) ≤ radius, (2, points): in each direction the root r of a·r + b·r² = radius."""
    angles = np.linspace(0, 2 * math.pi, 721)[:-1]  # its corners are among them
    directions = np.stack([np.cos(angles), np.sin(angles)])
    linear, quadratic = l1_ratio * np.abs(directions).sum(0), 0.5 * (1 - l1_ratio)
    return directions * (2 * radius / (linear + np.sqrt(linear**2 + 4 * quadratic * radius)))


def _contours(axes: Axes, hessian: Any, best: Any, solution: Any, ball: Any) -> None:
    """Ellipses of equal loss at even distances, the one through the solution in blue."""
    points = np.c_[ball, best, np.zeros(2)]
    middle, reach = (points.max(1) + points.min(1)) / 2, 0.62 * np.ptp(points, axis=1).max()
    x, y = (np.linspace(m - reach, m + reach, PIXELS) for m in middle)
    away = np.stack(np.meshgrid(x, y)) - best[:, None, None]
    excess = 0.5 * np.einsum("iab,ij,jab->ab", away, hessian, away)
    touching = 0.5 * (solution - best) @ hessian @ (solution - best)
    levels = touching * (np.arange(1, 16) / 4) ** 2
    axes.contour(x, y, excess, levels=np.delete(levels, 3), colors=QUIET, linewidths=0.7, alpha=0.55, zorder=1)
    axes.contour(x, y, excess, levels=[touching], colors=NONZERO, linewidths=1.8, zorder=3)
    axes.axhline(0, color="#999999", linewidth=0.7, zorder=0)
    axes.axvline(0, color="#999999", linewidth=0.7, zorder=0)
    axes.set_aspect("equal")
    open_axes(axes)
