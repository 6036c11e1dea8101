"""Figures of a regularisation path: the coefficients, and the errors of a cross-validation, over the strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchreg.one_standard_error import mean_errors, one_standard_error
from torchreg.plots.style import FAINT, NONZERO, QUIET, ZERO, array, line_style, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_SIZE = 8.5
LONGEST_NAME = 28


def coefficient_path(
    alphas: Any,
    coefs: Any,
    axes: Axes,
    names: Sequence[str] | None = None,
    *,
    labels: int = 10,
    label_at: float | None = None,
) -> Axes:
    """Draw the coefficients w(α) = argmin f(w) + α·R(w) over the strength α, strong penalties at the left.

    The features with the largest coefficients have a colour, and those that are ever not zero their name at the right
    end; the others are grey. Above the axes stands how many coefficients are not zero.

    Args:
        alphas: the strengths (m,), positive, in any order.
        coefs: the coefficients (features, m), as `torchreg.linear.lasso_path` returns them. NaN makes a gap.
        axes: where to draw.
        names: of the features; by default x1, x2, …
        labels: how many features have a name at most.
        label_at: the strength whose coefficients choose those features; by default each one's largest modulus does.

    Raises:
        ValueError: if a strength is not positive (the axis is logarithmic), or the shapes don't fit.
        TypeError: if something does not hold real numbers.

    >>> from matplotlib.figure import Figure
    >>> from torchreg import plots
    >>> axes = plots.coefficient_path([1.0, 0.1], [[0.0, 0.5], [0.0, 0.2]], Figure().subplots(), ["age", "bmi"])
    >>> [text.get_text() for text in axes.texts]
    ['bmi', 'age']

    Source: Efron, Hastie, Johnstone and Tibshirani, Least angle regression, Annals of Statistics, 2004.
    """
    strengths, table = _strengths(alphas), array("coefs", coefs, ndim=2)
    features = len(table)
    if table.shape[1] != len(strengths):
        raise ValueError(f"Expected `coefs` of {len(strengths)} strengths, got the shape {table.shape}.")
    if label_at is not None and not 0 < label_at < np.inf:
        raise ValueError(f"Expected `label_at` to be positive, got {label_at}.")
    if names is not None and len(names) != features:
        raise ValueError(f"Expected {features} names of features, got {len(names)}.")
    names = [f"x{i + 1}" for i in range(features)] if names is None else [str(name) for name in names]
    order = np.argsort(-strengths)
    strengths, table = strengths[order], np.where(np.isfinite(table), table, np.nan)[:, order]
    moduli = np.nan_to_num(np.abs(table))
    size = moduli.max(1) if label_at is None else moduli[:, np.abs(np.log(strengths / label_at)).argmin()]
    ranked = np.lexsort((-moduli.max(1), -size))
    chosen = ranked[: min(max(0, labels), features)]
    axes.axhline(0, color=QUIET, linewidth=0.8, zorder=1)
    quiet = np.setdiff1d(ranked[moduli.max(1)[ranked] > 0], chosen)
    if len(quiet):
        axes.plot(strengths, np.apply_along_axis(_visible, 1, table[quiet]).T, color=FAINT, linewidth=0.8, zorder=1)
    for place, feature in enumerate(chosen):
        axes.plot(strengths, _visible(table[feature]), linewidth=1.8, zorder=3, **line_style(place))
    _log_axis(axes, strengths)
    axes.set_ylabel("coefficient")
    named = [(f, line_style(place)["color"]) for place, f in enumerate(chosen) if moduli[f].any()]
    _label_ends(axes, [(names[f], table[f, -1], color) for f, color in named])
    _count_above(axes, strengths, (np.nan_to_num(table) != 0).sum(0))
    return axes


def cv_curve(alphas: Any, errors: Any, axes: Axes) -> Axes:
    """Draw the mean error ē(α) over the folds of a cross-validation, ± one standard error s(α)/√k, and the choices.

    Two strengths are marked: the one with the least mean error, and the largest whose mean error is within one standard
    error of that (`torchreg.linear.one_standard_error`), which has fewer coefficients and is as good as the folds can
    tell.

    Args:
        alphas: the strengths (m,), positive, in any order.
        errors: of each strength in each of k folds (m, k), such as `LassoCV.mse_path_`.
        axes: where to draw.

    Raises:
        ValueError: if a strength is not positive (the axis is logarithmic), or the shapes don't fit.
        TypeError: if something does not hold real numbers.

    >>> from matplotlib.figure import Figure
    >>> from torchreg import plots
    >>> axes = plots.cv_curve([1.0, 0.1, 0.01], [[9.0, 9.0], [2.0, 3.0], [1.5, 3.1]], Figure().subplots())
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['one standard error: α = 0.1', 'least error: α = 0.01']

    Source: Hastie, Tibshirani and Friedman, The elements of statistical learning, 2009, section 7.10.
    """
    strengths, table = _strengths(alphas), array("errors", errors, ndim=2)
    best, simple = one_standard_error(strengths, table)
    order = np.argsort(-strengths)
    means, spread = mean_errors(table)
    x, middle, band = strengths[order], means[order], spread[order]
    axes.fill_between(x, middle - band, middle + band, color=NONZERO, alpha=0.18, linewidth=0)
    axes.plot(x, middle, color=NONZERO, linewidth=1.8)
    axes.axhline(means[best] + spread[best], color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
    mark_choices(axes, {"one standard error": strengths[simple], "least error": strengths[best]}, legend=True)
    for index, color in ((simple, ZERO), (best, NONZERO)):
        axes.plot([strengths[index]], [means[index]], "o", color=color, markeredgecolor="white", zorder=4)
    _log_axis(axes, strengths)
    axes.set_ylabel("mean squared error")
    return axes


def mark_choices(axes: Axes, choices: dict[str, float], *, legend: bool = False) -> None:
    """Vertical lines at chosen strengths, the first in the accent colour."""
    styles = ((ZERO, "-"), (NONZERO, (0, (4, 2))))
    for (name, alpha), (color, dashes) in zip(choices.items(), styles, strict=False):
        axes.axvline(alpha, color=color, linestyle=dashes, linewidth=1.2, zorder=2, label=f"{name}: α = {alpha:.3g}")
    if legend:
        axes.legend(loc="upper right", fontsize=LABEL_SIZE, framealpha=0.9, edgecolor="none")


def _visible(coefs: Any) -> Any:
    """The coefficients without the zeros that have zeros on both sides: those lie on the axis.

    >>> _visible(np.array([0.0, 0.0, 1.0, 2.0]))
    array([nan,  0.,  1.,  2.])
    """
    padded = np.pad(coefs, 1)
    return np.where((padded[:-2] == 0) & (coefs == 0) & (padded[2:] == 0), np.nan, coefs)


def _strengths(alphas: Any) -> Any:
    strengths = array("alphas", alphas, ndim=1)
    if not (np.isfinite(strengths) & (strengths > 0)).all():
        raise ValueError("Expected `alphas` to be positive and finite: their axis is logarithmic.")
    return strengths


def _log_axis(axes: Axes, strengths: Any) -> None:
    """A logarithmic axis from the strongest penalty to the weakest."""
    axes.set_xscale("log")
    largest, least = strengths.max(), strengths.min()
    axes.set_xlim((largest * 1.02, least / 1.02) if largest > least else (2 * largest, largest / 2))
    axes.set_xlabel("strength α")
    open_axes(axes)


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Names at the right end of their lines, moved apart where they would overlap, beside the axes."""
    ends = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    low, high = axes.get_ylim()
    figure: Any = axes.figure
    height = axes.bbox.height * 72 / figure.dpi  # in points, like the size of letters
    gap = min(1.25 * LABEL_SIZE / height, 1 / len(ends))
    wanted = [(value - low) / (high - low) for _, value, _ in ends]
    last = len(ends) - 1
    inside = [min(max(place, i * gap), 1 - (last - i) * gap) for i, place in enumerate(_apart(wanted, gap))]
    for (name, _, color), start, place in zip(ends, wanted, inside, strict=True):
        axes.annotate(
            name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…",
            (1, start),
            (1.035, place),
            xycoords="axes fraction",
            color=color,
            fontsize=LABEL_SIZE,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
            parse_math=False,  # a column may be called a$b$
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Rising places near the wanted ones, at least ``gap`` apart: neighbours that are closer share their middle.

    >>> [round(place, 2) for place in _apart([0.1, 0.5, 0.5, 0.51], 0.1)]
    [0.1, 0.4, 0.5, 0.6]
    """
    clusters: list[tuple[float, int]] = []  # (middle, members)
    for place in wanted:
        middle, members = place, 1
        while clusters and middle - clusters[-1][0] < gap * (members + clusters[-1][1]) / 2:
            before, count = clusters.pop()
            middle = (middle * members + before * count) / (members + count)
            members += count
        clusters.append((middle, members))
    return [middle + gap * (i - (members - 1) / 2) for middle, members in clusters for i in range(members)]


def _count_above(axes: Axes, strengths: Any, counts: Any) -> None:
    """A second scale above the axes: how many coefficients are not zero there."""
    above = axes.secondary_xaxis("top")
    places = np.unique(np.linspace(0, len(strengths) - 1, 7).round().astype(int))
    above.set_xticks(strengths[places], [str(counts[place]) for place in places])
    above.minorticks_off()
    above.tick_params(length=2, labelsize=LABEL_SIZE, colors=QUIET)
    above.spines["top"].set_visible(False)
    above.set_xlabel("coefficients that are not zero", fontsize=LABEL_SIZE, color=QUIET)
