"""The figure of a comparison: how large the weights are, and which inputs each network still reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchreg import plots
from torchreg.cli.data import Dataset
from torchreg.cli.methods import METHODS, Settings
from torchreg.cli.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (14.0, 6.0)
DPI = 100


def compare_figure(runs: Mapping[str, Run], data: Dataset, settings: Settings) -> Figure:
    """One column per method: the histogram of its weights above the inputs that its first layer reads."""
    plots.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    columns = figure.subplots(2, len(runs), squeeze=False).T
    for method, (top, bottom) in zip(METHODS, columns, strict=True):
        run = runs[method.name]
        result = run.refitted or run.result
        plots.weight_histogram(run.weights, top)
        top.set_title(f"{_two_lines(method.label)}\n", fontweight="bold")
        top.text(0.5, 1.03, f"accuracy {100 * result.accuracy:.1f} %", transform=top.transAxes, ha="center")
        top.set_xticks(top.get_xticks()[[0, 2, 3, 4]])  # five don't fit
        top.set_xlabel("|w|")
        plots.inputs_read(run.weights[0], bottom, data.input_shape)
        bottom.set_title(f"reads {result.inputs_used} of {data.inputs} inputs", fontsize="medium")
    columns[0][0].set_ylabel("weights")
    for column in columns[1:]:
        column[0].tick_params(labelleft=False)
    columns[0][1].set_ylabel("‖column‖ of the first layer")
    target = "" if settings.target is None else f", proximal methods scaled to {100 * settings.target:g} % zeros"
    refit = f", proximal methods refitted for {settings.refit} epochs" if settings.refit else ""
    figure.supxlabel(
        f"{data.name}, {data.inputs}-{settings.hidden}-{data.classes} network, l1 = {settings.l1:g}, "
        f"l2 = {settings.l2:g}{target}{refit}, seed {next(iter(runs.values())).result.seed}; "
        "grey: exactly zero, never read",
        fontsize="small",
        color="#555555",
        parse_math=False,  # a file may be called a$b$.npz
    )
    return figure


def _two_lines(label: str) -> str:
    """A label broken where its route begins, so that seven of them fit side by side."""
    for words in (" in the loss", " by "):
        label = label.replace(words, "\n" + words.lstrip())
    return label if "\n" in label else "\n" + label
