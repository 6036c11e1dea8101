"""The charts of TensorBoard's Custom Scalars page."""

from __future__ import annotations

import re
from typing import Any

CHARTS = {
    "data loss": "loss/data$",
    "penalty": "loss/penalty$",
    "exact zeros": "sparsity/total$",
    "exact zeros of each parameter": "sparsity/(?!total$).*",
    "weights that became zero": "zeros/new$",
    "weights that woke up": "zeros/revived$",
}


def layout(weights: str, *, threshold: bool, groups: bool) -> dict[str, dict[str, list[Any]]]:
    """What ``add_custom_scalars`` takes: charts that hold one quantity each.

    TensorBoard tells several tags of one chart apart by markers that differ from run to run.

    Args:
        weights: the word that all tags begin with, if any.
        threshold: whether thresholds are logged; an empty chart would be shown otherwise.
        groups: the same for groups.
    """
    charts = dict(CHARTS)
    if threshold:
        charts["threshold of the proximal step"] = "threshold/.*"
    if groups:
        charts["groups alive"] = "groups/.*"
    start = re.escape(f"{weights}/") if weights else ""
    title = f"torchreg: {weights} weights" if weights else "torchreg"
    return {title: {name: ["Multiline", [start + tags]] for name, tags in charts.items()}}
