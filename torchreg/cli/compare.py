"""``torchreg compare``: one network under no penalty, and under L1 and L2 in the loss and by proximal optimizers."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.cli.arguments import fraction, learning_rate, positive_integer, strength
from torchreg.cli.logdir import new_logdir
from torchreg.cli.output import CommandError, print_error, print_result, printable, reason

if TYPE_CHECKING:
    from torchreg.cli.data import Dataset
    from torchreg.cli.methods import Settings
    from torchreg.cli.training import Run

BATCH = 128
LR = 0.2
ADAM_LR = 0.01
"""Chosen on a validation third of the digits' training data: the smallest of .0003, .001, .002, .003, .005, .01, .02,
.03 with which ProxAdamW comes within 2 % of the objective that ProxSGD reaches in 2000 steps at equal strength.
(Validation accuracy there: 97.1 %, ProxSGD's 96.9 %; the best was 97.4 %, at .005, with a third more objective.)"""
FIGURE = "compare.png"
LARGEST = {"seeds": 1000, "steps": 10**9, "hidden": 65536, "refit": 10**6}

DESCRIPTION = """\
Answers "L1 or L2?" on data: trains the same network (inputs, hidden, classes) without a penalty, with L1 or L2 in the
loss, and with L1 or Elastic Net by a proximal optimizer, under SGD and Adam. Prints accuracy, exact zeros, inputs still
used, norms, optimality and time side by side. Writes TensorBoard runs and a figure.
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
    add("--lr", type=learning_rate, default=LR, metavar="LR", help=f"SGD's first learning rate (default: {LR})")
    add("--adam-lr", type=learning_rate, default=ADAM_LR, metavar="LR", help=f"the same of Adam (default: {ADAM_LR})")
    add("--l1", type=strength, metavar="λ", help="strength of L1: λ·Σ|w| (default: 0.02/√samples)")
    add("--l2", type=strength, metavar="λ", help="strength of L2: λ·Σw² (default: 0.04/√samples)")
    add(
        "--target",
        type=fraction,
        metavar="F",
        help="fraction of exact zeros, such as 0.9, that the proximal methods reach by scaling their strengths, "
        "halfway through the steps (default: they keep the strengths)",
    )
    add(
        "--refit",
        type=positive_integer,
        metavar="N",
        help="after the proximal methods freeze the zeros, and train the other weights for N epochs without a penalty",
    )
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
        CommandError: for bad input, before anything is written, and if the training fails, with its runs removed.
    """
    from torchreg.cli import summary
    from torchreg.cli.data import load_digits, load_npz

    for option, most in LARGEST.items():
        if (given := getattr(arguments, option) or 0) > most:
            raise CommandError(f"argument --{option}: expected at most {most}, got {given}")
    if arguments.target is not None and arguments.l1 == 0:
        raise CommandError("argument --target: needs an --l1 above 0, which it scales")
    if not arguments.no_figure:
        _check_matplotlib()
    data = load_npz(arguments.data) if arguments.data else load_digits()
    settings = _settings(arguments, data)
    with new_logdir(arguments.logdir, _names(settings)) as logdir:
        if not arguments.json:
            print_result(summary.heading(data, settings) + "\n")
        start = time.perf_counter()
        runs = _train_all(data, settings, logdir, progress=not arguments.json)
    figure = None if arguments.no_figure else _draw(runs, data, settings, logdir / FIGURE)
    seconds = time.perf_counter() - start
    results = summary.by_row(runs)
    if arguments.json:
        document = summary.document(results, data, settings)
        places = {"seconds": seconds, "logdir": str(logdir), "figure": figure and str(figure)}
        print_result(json.dumps(document | places, indent=2, allow_nan=False))
        return
    print_result(summary.table(results))
    for sentence in summary.notes(results, settings) + summary.conclusion(results, data, settings):
        print_result("\n" + textwrap.fill(sentence, 110))
    print_result("")
    if figure:
        print_result(printable(f"figure: {figure}"))
    print_result(printable(f"curves: tensorboard --logdir {shlex.quote(str(logdir))}"))
    print_result(f"({seconds:.0f} s)")


def _settings(arguments: argparse.Namespace, data: Dataset) -> Settings:
    """Default strengths fall as 1/√samples, like the noise in the gradient that they have to exceed."""
    from torchreg.cli.methods import Settings

    samples = len(data.x_train)
    default = 0.02 / math.sqrt(samples)
    return Settings(
        seeds=arguments.seeds,
        steps=arguments.steps,
        hidden=arguments.hidden,
        batch=min(BATCH, samples),
        lr=arguments.lr,
        adam_lr=arguments.adam_lr,
        l1=_rounded(default) if arguments.l1 is None else arguments.l1,
        l2=_rounded(2 * default) if arguments.l2 is None else arguments.l2,
        target=arguments.target,
        refit=arguments.refit or 0,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _names(settings: Settings) -> list[str]:
    """What a comparison makes in its directory."""
    from torchreg.cli.methods import METHODS

    return [FIGURE, *(f"{method.name}-seed{k}" for method in METHODS for k in range(settings.seeds))]


def _train_all(data: Dataset, settings: Settings, logdir: Path, *, progress: bool) -> dict[str, list[Run]]:
    """The runs of each method, by its name, in the order of the seeds.

    Raises:
        CommandError: if one of them fails.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from torchreg.cli.methods import METHODS
    from torchreg.cli.training import one_thread, refit_steps, strict_writers, train, writer_for

    runs: dict[str, list[Run]] = {method.name: [] for method in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not progress or sys.stderr is None or not sys.stderr.isatty(),
        refresh_per_second=4,
    )
    try:
        with one_thread(), strict_writers(), bar:
            refits = sum(method.route == "prox" for method in METHODS) * refit_steps(data, settings)
            task = bar.add_task("", total=settings.seeds * (len(METHODS) * settings.steps + refits))
            for seed in range(settings.seeds):
                for method in METHODS:
                    bar.update(task, description=f"seed {seed + 1} of {settings.seeds}: {method.label}")
                    writer = writer_for(logdir / f"{method.name}-seed{seed}")
                    try:
                        one = train(method, data, settings, seed, writer, lambda steps: bar.advance(task, steps))
                    finally:
                        writer.close()
                    runs[method.name].append(one)
    except OSError as error:
        raise CommandError(f"writing to {str(logdir)!r} failed: {reason(error)}") from None
    except (RuntimeError, MemoryError, ArithmeticError) as error:  # torch raises RuntimeError for lack of memory
        raise CommandError(f"the training failed: {reason(error)}") from None
    return runs


def _check_matplotlib() -> None:
    from torchreg import plots

    try:
        plots.require_matplotlib()
    except ImportError as error:
        raise CommandError(f"{error}, or give --no-figure") from None


def _draw(runs: dict[str, list[Run]], data: Dataset, settings: Settings, path: Path) -> Path | None:
    """Draw the figure; one that can't be drawn or written is a warning, for the results matter more."""
    from torchreg.cli.figure import compare_figure

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font lacks
            compare_figure({name: group[0] for name, group in runs.items()}, data, settings).savefig(path)
    except Exception as error:
        print_error("torchreg compare", f"the figure failed: {reason(error)}", kind="warning")
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    return path
