"""Shrinkage curves: what a penalty's proximal operator makes of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchreg.penalties import (
    L0,
    L1,
    L2,
    MCP,
    NM,
    SCAD,
    Box,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NonNegative,
    NuclearNorm,
    Penalty,
    SparseGroupLasso,
    TopK,
)
from torchreg.plots.style import NONZERO, QUIET, ZERO, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = 3.0
POINTS = 601
SMALL = "small"


def library() -> dict[str, Penalty]:
    """Every penalty of the library with strengths that show its shape, by the text for its panel."""
    return {
        "L2(0.5)": L2(0.5),
        "L1(1)": L1(1.0),
        "ElasticNet(1, .25)": ElasticNet(1.0, 0.25),
        "MCP(1, 2.5)": MCP(1.0, 2.5),
        "SCAD(0.8)": SCAD(0.8),
        "LogSum(1, 1.2)": LogSum(1.0, 1.2),
        "LHalf(0.7)": LHalf(0.7),
        "L0(0.5)": L0(0.5),
        "GroupLasso(1)": GroupLasso(1.0, "rows", group_weight="none"),
        "SparseGroupLasso(.5, .5)": SparseGroupLasso(0.5, 0.5, "rows", group_weight="none"),
        "NuclearNorm(1)": NuclearNorm(1.0),
        "TopK(1)": TopK(1),
        "NM(1, 2)": NM(1, 2),
        "NonNegative()": NonNegative(),
        "Box(-1, 1.5)": Box(-1.0, 1.5),
    }


def shrinkage_curve(
    penalty: Penalty,
    axes: Axes,
    others: Sequence[float] = (),
    *,
    step: float = 1.0,
    limit: float = LIMIT,
    **style: Any,
) -> Axes:
    """Draw what the proximal operator makes of a weight v: the first entry of

        prox(v, others) = argmin_w ½‖w − (v, others)‖² + step·R(w),

    over v, with a gap where it jumps, beside the line of no shrinkage. Flat at zero is sparsity, parallel to that line
    is a constant bias, on it is none.

    Args:
        penalty: any penalty; its strengths must be numbers.
        axes: where to draw. Several curves may be drawn on the same axes.
        others: the other weights of the row whose first is v, for penalties that look at them.
        step: the step τ of the proximal operator.
        limit: v runs from −limit to limit.
        style: of the line, as for `matplotlib.axes.Axes.plot`.

    Raises:
        TypeError: if ``penalty`` is none.
        ValueError: if the limit is not positive, or the penalty does not fit a row of so many weights.

    >>> from matplotlib.figure import Figure
    >>> from torchreg import L1, plots
    >>> axes = plots.shrinkage_curve(L1(1.0), Figure().subplots(), limit=2.0)
    >>> v, w = axes.lines[-1].get_data()
    >>> float(v[-1]), float(w[-1]), float(w[len(w) // 2])
    (2.0, 1.0, 0.0)

    Source: Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization, 2014; the pictures of Fan and
    Li, Variable selection via nonconcave penalized likelihood, JASA, 2001.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"Expected a penalty, got {type(penalty).__name__}.")
    if not (0 < limit < np.inf):
        raise ValueError(f"Expected `limit` to be positive, got {limit}.")
    v = np.linspace(-limit, limit, POINTS)
    w = _shrunk(penalty, v, others, step)
    if not any(line.get_gid() == "identity" for line in axes.lines):
        axes.plot([-limit, limit], [-limit, limit], color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)), gid="identity")
        axes.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
        axes.axvline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    jumps = np.flatnonzero(np.abs(np.diff(w)) > 12 * (v[1] - v[0])) + 1
    axes.plot(np.insert(v, jumps, np.nan), np.insert(w, jumps, np.nan), **{"color": NONZERO, "linewidth": 2.0, **style})
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_aspect("equal")
    open_axes(axes)
    return axes


def shrinkage_curves(axes: Any, penalties: Mapping[str, Penalty] | Iterable[Penalty] | None = None) -> Any:
    """Draw the shrinkage curve of several penalties, each on axes of its own.

    Where a weight's fate depends on the others of its row, as in a group, two curves are drawn: beside one other weight
    that is 0 (blue), and beside one that is 2 (orange, dashed).

    Args:
        axes: at least as many axes as penalties, as a list or as ``figure.subplots`` returns them. Those left over are
            hidden.
        penalties: by title, or with their types as titles. By default every penalty of the library.

    Returns:
        The axes, as they were given.

    Raises:
        ValueError: if there are too few axes.
        TypeError: if one is no penalty.

    >>> from matplotlib.figure import Figure
    >>> from torchreg import L0, L1, plots
    >>> axes = plots.shrinkage_curves(Figure().subplots(1, 2), [L1(1.0), L0(0.5)])
    >>> [one.get_title() for one in axes]
    ['L1', 'L0']
    """
    chosen = library() if penalties is None else penalties
    pairs = list(chosen.items()) if isinstance(chosen, Mapping) else [(type(p).__name__, p) for p in chosen]
    panels = list(np.asarray(axes, dtype=object).flat)
    if len(panels) < len(pairs):
        raise ValueError(f"Expected axes for {len(pairs)} penalties, got {len(panels)}.")
    grid = np.linspace(-LIMIT, LIMIT, 61)
    for panel, (title, penalty) in zip(panels, pairs, strict=False):
        shrinkage_curve(penalty, panel, (0.0,))
        beside = _shrunk(penalty, grid, (2.0,), 1.0)
        if not np.array_equal(beside, _shrunk(penalty, grid, (0.0,), 1.0)):
            shrinkage_curve(penalty, panel, (2.0,), color=ZERO, linestyle=(0, (4, 1.5)))
            for height, text, color in ((0.2, "beside 0", NONZERO), (0.06, "beside 2", ZERO)):
                panel.text(0.97, height, text, transform=panel.transAxes, ha="right", color=color, fontsize=SMALL)
        panel.set_title(title, fontsize=9.5, parse_math=False)
        panel.tick_params(labelsize=SMALL)
    for panel in panels[len(pairs) :]:
        panel.set_visible(False)
    return axes


def _shrunk(penalty: Penalty, v: Any, others: Sequence[float], step: float) -> Any:
    """The first weight of each row (v_i, others) after the proximal operator, which sees one row at a time."""
    rows = torch.tensor([[value, *others] for value in v.tolist()], dtype=torch.float64)
    if penalty.is_separable:
        return penalty.prox(rows, step)[:, 0].numpy()
    return torch.stack([penalty.prox(row[None], step)[0, 0] for row in rows]).numpy()
