"""Figures of sparse weights: how large they are, and which inputs a first layer reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchreg.plots.style import NONZERO, SILENT, ZERO, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = (-12, 1)
BINS_PER_DECADE = 4
CHANNELS = (1, 3, 4)


def weight_histogram(weights: Tensor | Iterable[Tensor], axes: Axes) -> Axes:
    """Draw how large the weights are: counts over log₁₀|w|, the exact zeros as a bar of their own at the left.

    A weight that is merely tiny and one that is exactly zero look the same on a linear axis; here they are apart.

    Args:
        weights: a tensor or several, of any shape. NaN is left out, infinite values count as the largest.
        axes: where to draw.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> from torchreg import plots
    >>> plots.weight_histogram(torch.tensor([0.0, 0.0, 1e-9, 0.5]), Figure().subplots()).texts[0].get_text()
    '50.0 % exactly 0'
    """
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    modulus = torch.cat([w.detach().abs().double().flatten().cpu() for w in tensors])
    zeros = int((modulus == 0).sum())
    low, high = DECADES
    logs = modulus[modulus > 0].log10().clamp(low, high)
    bins = (high - low) * BINS_PER_DECADE
    counts = torch.histc(logs, bins=bins, min=low, max=high) if logs.numel() else torch.zeros(bins)
    edges = [low + i / BINS_PER_DECADE for i in range(bins)]
    axes.set_yscale("log")
    axes.set_ylim(0.7, 20 * max(10, modulus.numel()))  # room for the label
    axes.bar(edges, counts.tolist(), width=1 / BINS_PER_DECADE, align="edge", color=NONZERO)
    at_zero = low - 2.5
    axes.bar([at_zero], [zeros], width=1.6, color=ZERO)
    axes.set_xlim(low - 3.6, high)
    ticks = range(low, high + 1, 4)
    axes.set_xticks([at_zero, *ticks], ["0", *(f"$10^{{{tick}}}$" for tick in ticks)])
    axes.get_xticklabels()[0].set(color=ZERO, fontweight="bold")
    share = zeros / max(1, modulus.numel())
    label = f"{100 * share:.1f} % exactly 0" if zeros else "none exactly 0"
    axes.text(0.03, 0.95, label, transform=axes.transAxes, va="top", color=ZERO, fontweight="bold")
    open_axes(axes)
    return axes


def inputs_read(weight: Tensor, axes: Axes, shape: tuple[int, ...] | None = None) -> Axes:
    """Draw how strongly a first layer reads each input: the norms of its columns, exact zeros in grey.

    Args:
        weight: the layer's weight, (outputs × inputs).
        axes: where to draw.
        shape: that of one sample, (height × width), (height × width × channels) or (channels × height × width), for
            an image; 1, 3 or 4 are channels, and stand last where both ends could be. By default, if the number of
            inputs is a square, that square. Other inputs are drawn as bars, those of norm 0 below the axis.

    Raises:
        ValueError: if ``weight`` is not a matrix or ``shape`` does not hold its inputs.

    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> from torchreg import plots
    >>> weight = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 4.0, 1.0, 0.0]])
    >>> print(plots.inputs_read(weight, Figure().subplots()).images[0].get_array())
    [[-- 5.0]
     [1.0 --]]
    """
    if weight.ndim != 2:
        raise ValueError(f"Expected `weight` to be a matrix (outputs × inputs), got the shape {tuple(weight.shape)}.")
    inputs = weight.shape[1]
    if shape is not None and math.prod(shape) != inputs:
        raise ValueError(f"Expected `shape` to hold {inputs} inputs, got {shape}.")
    squares = weight.detach().double().cpu().square().sum(0)
    image = _as_image(squares, shape)
    axes.set_xticks([])
    if image is None:
        norms = squares.sqrt()
        axes.bar(range(inputs), norms.tolist(), width=1.0, color=NONZERO)
        silent = (norms == 0).nonzero().flatten().tolist()
        largest = float(norms.nan_to_num(0.0, 0.0).max()) or 1.0
        axes.bar(silent, [-0.05 * largest] * len(silent), width=1.0, color=SILENT)
        axes.set_ylim(-0.06 * largest, 1.05 * largest)
        axes.set_xlabel("inputs")
        return axes
    axes.set_yticks([])
    from matplotlib import colormaps

    colors: Any = colormaps["viridis"].with_extremes(bad=SILENT)
    norms = image.sqrt()
    axes.imshow(norms.masked_fill(norms == 0, math.nan).numpy(), cmap=colors, vmin=0, interpolation="nearest")
    return axes


def _as_image(squares: Tensor, shape: tuple[int, ...] | None) -> Tensor | None:
    if shape is not None and len(shape) == 3:
        return squares.reshape(shape).sum(0 if shape[0] in CHANNELS and shape[2] not in CHANNELS else 2)
    if shape is not None and len(shape) == 2:
        return squares.reshape(shape)
    side = math.isqrt(len(squares))
    return squares.reshape(side, side) if side > 1 and side * side == len(squares) else None
