"""``torchreg path``: the coefficients of a linear model over the strength, and the strengths that data choose."""

from __future__ import annotations

import argparse
import math
import textwrap
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.cli.arguments import fraction, positive_integer, share
from torchreg.cli.logdir import new_logdir
from torchreg.cli.output import CommandError, print_error, print_result, printable, reason

if TYPE_CHECKING:
    from torchreg.cli import path_fit

FIGURE, CSV, JSON = "path.png", "path.csv", "path.json"
ROWS = 40
LARGEST = {"folds": 1000, "alphas": 10_000}

DESCRIPTION = """\
Fits a linear model with L1, or Elastic Net, at a hundred strengths from the one that makes all coefficients zero
downwards, and cross-validates them. Prints the features and their coefficients at the strength of least error, and at
the largest one within one standard error of it. Writes path.png (the coefficients and the errors over the strength),
path.csv and path.json.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser("path", help="draw a linear model's path over the strength", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--data",
        default="diabetes",
        metavar="FILE",
        help="a CSV file, an .npz file with X and y (and names), or a data set of scikit-learn: diabetes (the "
        "default), breast_cancer, wine, iris, linnerud",
    )
    add("--target", metavar="COLUMN", help="what is predicted: a column's name or number (default: the last, or y)")
    add("--drop", action="append", default=[], metavar="COLUMN", help="leave a column out; may be repeated")
    add("--l1-ratio", type=share, default=1.0, metavar="R", help="the share of L1, below 1 is Elastic Net (default: 1)")
    add("--folds", type=positive_integer, default=5, metavar="K", help="of the cross-validation (default: 5)")
    add("--seed", type=int, default=0, metavar="N", help="of the order in which rows go to folds (default: 0)")
    add("--alphas", type=positive_integer, default=100, metavar="N", help="how many strengths (default: 100)")
    add("--eps", type=fraction, default=1e-3, metavar="F", help="the weakest over the strongest (default: 0.001)")
    add("--no-standardise", action="store_true", help="penalise the columns as they are, whatever their units")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the files go; none of them may exist (default: runs/path-DATE-TIME)",
    )
    add("--no-figure", action="store_true", help="draw no figure, so that matplotlib is not needed")
    add("--json", action="store_true", help="print path.json instead of the table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fit, write the files and print the table.

    Raises:
        CommandError: for bad input, before anything is written, and if a file can't be written, with all removed.
    """
    _check(arguments)
    from torchreg.cli import path_fit
    from torchreg.cli.table import load_table

    table = load_table(arguments.data, arguments.drop)
    x, y, features, target = table.problem(arguments.target, arguments.drop)
    with new_logdir(arguments.out, [FIGURE, CSV, JSON], option="--out", prefix="path") as folder:
        path = path_fit.fit_path(
            path_fit.Problem(
                name=table.name,
                x=x,
                y=y,
                features=features,
                target=target,
                l1_ratio=arguments.l1_ratio,
                folds=arguments.folds,
                seed=arguments.seed,
                count=arguments.alphas,
                eps=arguments.eps,
                standardise=not arguments.no_standardise,
            )
        )
        for name, text in ((CSV, path_fit.as_csv(path)), (JSON, path_fit.as_json(path) + "\n")):
            _write(folder / name, text)
    figure = None if arguments.no_figure else _draw(path, folder / FIGURE)
    if arguments.json:
        print_result(path_fit.as_json(path))
        return
    print_result(_heading(path) + "\n")
    print_result(_table(path))
    print_result("\n" + textwrap.fill(_conclusion(path), 110) + "\n")
    for name, file in (("figure", figure), ("table", folder / CSV), ("all numbers", folder / JSON)):
        if file is not None:
            print_result(printable(f"{name}: {file}"))


def _check(arguments: argparse.Namespace) -> None:
    for option, most in LARGEST.items():
        if (given := getattr(arguments, option)) > most:
            raise CommandError(f"argument --{option}: expected at most {most}, got {given}")
    if arguments.folds < 2:
        raise CommandError(f"argument --folds: expected at least 2, got {arguments.folds}")
    if arguments.alphas < 2:
        raise CommandError(f"argument --alphas: expected at least 2, got {arguments.alphas}")
    if not arguments.eps > 0:
        raise CommandError("argument --eps: expected a fraction above 0, such as 0.001")
    if not 0 <= arguments.seed < 2**32:
        raise CommandError(f"argument --seed: expected a number from 0 to 2³² − 1, got {arguments.seed}")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise CommandError("paths need scikit-learn: pip install 'torchreg-sparse[sklearn]'") from None
    if not arguments.no_figure:
        from torchreg import plots

        try:
            plots.require_matplotlib()
        except ImportError as error:
            raise CommandError(f"{error}, or give --no-figure") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CommandError(f"writing to {str(path)!r} failed: {reason(error)}") from None


def _draw(path: path_fit.Path, file: Path) -> Path | None:
    """Draw the figure; one that can't be drawn or written is a warning, for the results matter more."""
    from torchreg.cli.path_figure import path_figure

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font lacks
            path_figure(path).savefig(file)
    except Exception as error:
        print_error("torchreg path", f"the figure failed: {reason(error)}", kind="warning")
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    return file


def _heading(path: path_fit.Path) -> str:
    p = path.problem
    penalty = "Lasso" if p.l1_ratio == 1 else f"Elastic Net with l1_ratio = {p.l1_ratio:g}"
    units = "each divided by its standard deviation" if p.standardise else "in their own units"
    return (
        f"{p.name}: {p.target} from {len(p.features)} features ({units}), {len(p.y)} rows\n"
        f"{penalty}, {len(path.alphas)} strengths from {path.alphas[0]:.4g} to {path.alphas[-1]:.3g}, "
        f"{p.folds} folds (seed {p.seed})"
    )


def _table(path: path_fit.Path) -> str:
    """Features in the order in which they enter, at most 40 of those in the least error's model."""
    from torchreg import tables
    from torchreg.one_standard_error import mean_errors

    entered, (means, spread) = path.entered(), mean_errors(path.errors)
    order = sorted(range(len(entered)), key=lambda i: -(entered[i] or -math.inf))
    alive = [i for i in order if path.coefs[i, path.best] != 0]
    shown = order if len(order) <= ROWS else alive[:ROWS]

    def cells(values: Any) -> list[str]:
        return [_number(float(values[i])) for i in path.choices.values()]

    rows = [
        [path.problem.features[i], "never" if entered[i] is None else f"{entered[i]:.4g}", *cells(path.coefs[i])]
        for i in shown
    ]
    if len(shown) < len(order):
        more = f"{len(alive) - len(shown)} of them not 0" if len(alive) > len(shown) else "all 0 at the least error"
        rows.append([f"{len(order) - len(shown)} more, {more}", "", "", ""])
    rows += [
        ["features used", "", *(str(int((path.coefs[:, i] != 0).sum())) for i in path.choices.values())],
        ["mean squared error", "", *cells(means)],
        ["its standard error", "", *cells(spread)],
    ]
    chosen = [f"{name}: α = {path.alphas[i]:.4g}" for name, i in path.choices.items()]
    return tables.render(["feature", "enters at α", *chosen], rows)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}"


def _conclusion(path: path_fit.Path) -> str:
    simple, best = (int((path.coefs[:, i] != 0).sum()) for i in (path.simple, path.best))
    least = f"The model of least error uses {best} of {len(path.problem.features)} features"
    if simple == 0:
        but = ", but one without any is within one standard error of it" if best else ""
        return f"{least}{but}: these folds can't tell that the features predict anything."
    if path.simple == path.best:
        return f"{least}; no stronger penalty is within one standard error of it."
    other = f"One with {simple}" if simple != best else "One with as many, but smaller coefficients,"
    return f"{least}. {other} is within one standard error of it: the folds can't tell which of the two is better."
