"""The figure of a path: coefficients over the strength, above the errors of the cross-validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchreg import plots
from torchreg.cli.path_fit import Path
from torchreg.plots.paths import mark_choices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (9.0, 7.6)
DPI = 100


def path_figure(path: Path) -> Figure:
    """Two axes with one strength axis, the chosen strengths marked in both."""
    plots.require_matplotlib()
    from matplotlib.figure import Figure

    p = path.problem
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    plots.coefficient_path(path.alphas, path.coefs, above, p.features, label_at=float(path.alphas[path.best]))
    mark_choices(above, {name: float(path.alphas[i]) for name, i in path.choices.items()})
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    above.set_ylabel("coefficient, features standardised" if p.standardise else "coefficient")
    plots.cv_curve(path.alphas, path.errors, below)
    below.set_ylabel(f"mean squared error, {p.folds} folds")
    penalty = "Lasso" if p.l1_ratio == 1 else f"Elastic Net, l1_ratio = {p.l1_ratio:g}"
    figure.suptitle(
        f"{p.name}: {p.target} from {len(p.features)} features, {len(p.y)} rows. {penalty}",
        fontweight="bold",
        fontsize="large",
        parse_math=False,  # a file may be called a$b$.csv
    )
    return figure
