"""Figures: each function draws on the matplotlib axes it is given, and returns them.

They need matplotlib: ``pip install 'torchreg-sparse[plots]'``. Importing this package does not import it.
"""

from torchreg.plots.geometry import geometry
from torchreg.plots.paths import coefficient_path, cv_curve
from torchreg.plots.shrinkage import shrinkage_curve, shrinkage_curves
from torchreg.plots.style import NONZERO, SILENT, ZERO, require_matplotlib
from torchreg.plots.weights import inputs_read, weight_histogram

__all__ = [
    "NONZERO",
    "SILENT",
    "ZERO",
    "coefficient_path",
    "cv_curve",
    "geometry",
    "inputs_read",
    "require_matplotlib",
    "shrinkage_curve",
    "shrinkage_curves",
    "weight_histogram",
]
