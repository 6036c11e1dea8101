"""What all figures share: colours that colour-blind readers can tell apart, and how axes look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONZERO, ZERO, SILENT = "#3b6ea8", "#e07b39", "#d6d6d6"
QUIET, FAINT = "#666666", "#c4c4c4"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito (Color universal design, 2008) without its yellow, too pale for a line on white."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
"""Line styles, each for one round of the colours."""


def require_matplotlib() -> None:
    """Import matplotlib.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'torchreg-sparse[plots]'") from None


def line_style(index: int) -> dict[str, Any]:
    """The colour and dashes of the line with this number, so that the first 21 differ.

    >>> line_style(0), line_style(7)["color"]
    ({'color': '#0072B2', 'linestyle': '-'}, '#0072B2')
    """
    return {"color": LINES[index % len(LINES)], "linestyle": DASHES[index // len(LINES) % len(DASHES)]}


def open_axes(axes: Axes) -> None:
    """Leave out the frame's top and right side."""
    axes.spines[["top", "right"]].set_visible(False)


def array(name: str, values: Any, *, ndim: int) -> Any:
    """A float64 NumPy array of a tensor on any device, or of anything that NumPy takes.

    Raises:
        ValueError: if it has another number of dimensions, or is empty.
        TypeError: if it does not hold real numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise TypeError(f"Expected `{name}` to hold real numbers: {error}.") from None
    if found.dtype.kind not in "uifb":
        raise TypeError(f"Expected `{name}` to hold real numbers, got {type(values).__name__} of {found.dtype}.")
    if found.ndim != ndim or not found.size:
        wanted = {1: "a vector", 2: "a matrix"}[ndim]
        raise ValueError(f"Expected `{name}` to be {wanted} that is not empty, got the shape {found.shape}.")
    return found.astype(np.float64)
