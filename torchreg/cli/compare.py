"""``torchreg compare``: one network under no penalty, L2, L1 in the loss, L1 and Elastic Net by ProxSGD."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.cli.arguments import learning_rate, positive_integer, strength
from torchreg.cli.output import CommandError, print_result, reason

if TYPE_CHECKING:
    from torchreg.cli.data import Dataset
    from torchreg.cli.training import Run, Settings

BATCH = 128
LR = 0.2
FIGURE = "compare.png"
LARGEST_HIDDEN = 65536

DESCRIPTION = """\
Answers "L1 or L2?" on data: trains the same network (inputs, hidden, classes) under five penalties and prints accuracy,
exact zeros, inputs still used, norms, optimality and time side by side. Writes TensorBoard runs and a figure.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser("compare", help='answer "L1 or L2?" on data', description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="x_train, y_train, x_test, y_test, such as Keras's mnist.npz (default: scikit-learn's digits)",
    )
    add("--seeds", type=positive_integer, default=3, metavar="N", help="runs of each method (default: 3)")
    add("--steps", type=positive_integer, default=2000, metavar="N", help="training steps of a run (default: 2000)")
    add("--hidden", type=positive_integer, default=128, metavar="N", help="hidden units (default: 128)")
    add("--lr", type=learning_rate, default=LR, metavar="LR", help=f"first learning rate, decays to 0 (default: {LR})")
    add("--l1", type=strength, metavar="λ", help="strength of L1: λ·Σ|w| (default: 0.02/√samples)")
    add("--l2", type=strength, metavar="λ", help="strength of L2: λ·Σw² (default: 0.04/√samples)")
    add(
        "--logdir",
        type=Path,
        metavar="DIR",
        help="where the TensorBoard runs go, DIR/METHOD-seedK; none of them may exist "
        "(default: runs/compare-DATE-TIME)",
    )
    add("--no-figure", action="store_true", help="draw no figure, so that matplotlib is not needed")
    add("--json", action="store_true", help="print one JSON document instead of the table, and no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, and print the results.

    Raises:
        CommandError: for bad input, before anything is written.
    """
    from torchreg.cli import summary
    from torchreg.cli.data import load_digits, load_npz

    if arguments.hidden > LARGEST_HIDDEN:
        raise CommandError(f"argument --hidden: expected at most {LARGEST_HIDDEN}, got {arguments.hidden}")
    if not arguments.no_figure:
        _check_matplotlib()
    data = load_npz(arguments.data) if arguments.data else load_digits()
    settings = _settings(arguments, data)
    logdir = _new_logdir(arguments.logdir, settings)
    if not arguments.json:
        print_result(summary.heading(data, settings) + "\n")
    start = time.perf_counter()
    try:
        runs = _train_all(data, settings, logdir, progress=not arguments.json and sys.stderr.isatty())
        figure = None if arguments.no_figure else _draw(runs, data, settings, logdir / FIGURE)
    except OSError as error:
        raise CommandError(f"writing to {str(logdir)!r} failed: {reason(error)}") from None
    seconds = time.perf_counter() - start
    results = {name: [one.result for one in group] for name, group in runs.items()}
    if arguments.json:
        document = summary.document(results, data, settings)
        places = {"seconds": seconds, "logdir": str(logdir), "figure": figure and str(figure)}
        print_result(json.dumps(document | places, indent=2, allow_nan=False))
        return
    print_result(summary.table(results))
    for sentence in summary.conclusion(results, data):
        print_result("\n" + textwrap.fill(sentence, 110))
    print_result("")
    if figure:
        print_result(f"figure: {figure}")
    print_result(f"curves: tensorboard --logdir {logdir}")
    print_result(f"({seconds:.0f} s)")


def _settings(arguments: argparse.Namespace, data: Dataset) -> Settings:
    """Default strengths fall as 1/√samples, like the noise in the gradient that they have to exceed."""
    from torchreg.cli.training import Settings

    samples = len(data.x_train)
    default = 0.02 / math.sqrt(samples)
    return Settings(
        seeds=arguments.seeds,
        steps=arguments.steps,
        hidden=arguments.hidden,
        batch=min(BATCH, samples),
        lr=arguments.lr,
        l1=_rounded(default) if arguments.l1 is None else arguments.l1,
        l2=_rounded(2 * default) if arguments.l2 is None else arguments.l2,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _new_logdir(wanted: Path | None, settings: Settings) -> Path:
    """Make the directory, or refuse one that can't be written or holds such runs already."""
    from torchreg.cli.training import METHODS

    logdir = wanted or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    if wanted is None:
        while logdir.exists():
            logdir = logdir.with_name(logdir.name + "-again")
    for name in (FIGURE, *(f"{m.name}-seed{k}" for m in METHODS for k in range(settings.seeds))):
        if os.path.lexists(logdir / name):
            raise CommandError(f"--logdir {str(logdir)!r} already holds {name}: give another directory")
    try:
        logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--logdir {str(logdir)!r} can't be made: {reason(error)}") from None
    if not os.access(logdir, os.W_OK | os.X_OK):
        raise CommandError(f"--logdir {str(logdir)!r} can't be written")
    return logdir


def _train_all(data: Dataset, settings: Settings, logdir: Path, *, progress: bool) -> dict[str, list[Run]]:
    """The runs of each method, by its name, in the order of the seeds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from torchreg.cli.training import METHODS, one_thread, train, writer_for

    runs: dict[str, list[Run]] = {method.name: [] for method in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
        refresh_per_second=4,
    )
    with one_thread(), bar:
        task = bar.add_task("", total=settings.seeds * len(METHODS) * settings.steps)
        for seed in range(settings.seeds):
            for method in METHODS:
                bar.update(task, description=f"seed {seed + 1} of {settings.seeds}: {method.label}")
                writer = writer_for(logdir / f"{method.name}-seed{seed}")
                try:
                    one = train(method, data, settings, seed, writer, lambda steps: bar.advance(task, steps))
                finally:
                    writer.close()
                runs[method.name].append(one)
    return runs


def _check_matplotlib() -> None:
    from torchreg import plots

    try:
        plots.require_matplotlib()
    except ImportError as error:
        raise CommandError(f"{error}, or give --no-figure") from None


def _draw(runs: dict[str, list[Run]], data: Dataset, settings: Settings, path: Path) -> Path:
    from torchreg.cli.figure import compare_figure

    compare_figure({name: group[0] for name, group in runs.items()}, data, settings).savefig(path)
    return path
