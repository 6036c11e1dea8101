"""``torchreg report``: the runs of a log folder as one HTML page, for readers without TensorBoard."""

from __future__ import annotations

import argparse
import fnmatch
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchreg.cli.output import CommandError, print_error, print_result, printable, reason

NAME = "report.html"
MARK = b"<!doctype html><!-- torchreg report -->"
MOST_WARNINGS = 5
MOST_RUNS = 100

DESCRIPTION = """\
Reads the TensorBoard event files below a folder, as torchreg.SparsityMonitor and `torchreg compare` write them, and
makes one HTML page of them: the final figures, sparsity, data loss and penalty, thresholds, which groups are alive,
masks and histograms, with all runs side by side. The page needs no network, no scripts and no other file. Damaged event
files are read up to the damage.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser("report", help="make one HTML page of TensorBoard runs", description=DESCRIPTION)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="a folder of runs, or a run itself")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"where the page goes (default: LOGDIR/{NAME}); an older report is replaced, another file is not",
    )
    parser.add_argument("--runs", metavar="GLOB", help="only runs with such names, such as 'l1-*'")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the runs and write the page.

    Raises:
        CommandError: if there are no runs, none can be read, or the page can't be written.
    """
    logdir: Path = arguments.logdir
    _check(logdir)
    out = arguments.out or logdir / NAME
    _check_out(out)

    from torchreg.cli.report.page import page
    from torchreg.cli.report.runs import event_files, read_run

    files = event_files(logdir)
    if not files:
        raise CommandError(f"{str(logdir)!r} holds no TensorBoard event files")
    names = [name for name in files if arguments.runs is None or fnmatch.fnmatchcase(name, arguments.runs)]
    if not names:
        raise CommandError(f"argument --runs: {arguments.runs!r} matches none of {len(files)} runs")
    if len(names) > MOST_RUNS:
        print_error(
            "torchreg report", f"of {len(names)} runs the first {MOST_RUNS} are shown; --runs chooses", "warning"
        )
    title = logdir.resolve().name or str(logdir)
    runs = [read_run(title if name == "." else name, files[name]) for name in names[:MOST_RUNS]]
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    if not any(run.holds_something for run in runs):
        why = f": {problems[0]}" if problems else ""
        raise CommandError(f"the event files in {str(logdir)!r} hold nothing to show{why}")
    content = page(title, runs, len(names) - len(runs))
    _write(out, MARK + content.encode("utf-8", "backslashreplace"))
    for problem in problems[:MOST_WARNINGS]:
        print_error("torchreg report", problem, kind="warning")
    if len(problems) > MOST_WARNINGS:
        more = len(problems) - MOST_WARNINGS
        print_error("torchreg report", f"{more} more files are damaged; the page names them", kind="warning")
    print_result(printable(f"report of {len(runs)} run{'s' * (len(runs) != 1)}: {out}"))


def _check(logdir: Path) -> None:
    try:
        mode = logdir.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CommandError(f"{str(logdir)!r} does not exist") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{str(logdir)!r} can't be read: {reason(error)}") from None
    if not stat.S_ISDIR(mode):
        raise CommandError(f"{str(logdir)!r} is no folder: give the one that holds the event files")
    if not os.access(logdir, os.R_OK | os.X_OK):
        raise CommandError(f"{str(logdir)!r} can't be read")


def _check_out(out: Path) -> None:
    """Refuse what can't be written, or is no report, before runs are read."""
    try:
        if os.path.lexists(out):
            if not out.is_file():
                raise CommandError(f"--out {str(out)!r} is not a regular file")
            with out.open("rb") as file:
                if file.read(len(MARK)) != MARK:
                    raise CommandError(f"--out {str(out)!r} is there already, and no report: give another name")
        elif not out.parent.is_dir():
            raise CommandError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}")
    except (OSError, ValueError) as error:
        raise CommandError(f"--out {str(out)!r} can't be written: {reason(error)}") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CommandError(f"{str(out.parent)!r} can't be written: give --out FILE.html elsewhere")


def _write(out: Path, content: bytes) -> None:
    """Replace the file in one step: a reader sees the old page or the new one."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=out.name[:32], suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # as a plain open() would make it
        temporary.replace(out)
    except OSError as error:
        raise CommandError(f"--out {str(out)!r} can't be written: {reason(error)}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
