"""The directory that a command writes: refused where its files are already, left as it was where the command fails."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torchreg.cli.output import CommandError, reason


@contextmanager
def new_logdir(
    wanted: Path | None, names: Sequence[str], *, option: str = "--logdir", prefix: str = "compare"
) -> Iterator[Path]:
    """Make the directory, with the parents it needs, and remove what was made if the body fails or is interrupted.

    Args:
        wanted: the directory, by default a new one named after the time.
        names: the folders and files that the body may make in it.
        option: how the directory is given, for errors.
        prefix: what the name of a new one begins with.

    Raises:
        CommandError: if it can't be written, or holds one of the names already.
    """
    logdir = wanted or _unused(Path("runs") / time.strftime(f"{prefix}-%Y%m%d-%H%M%S"))
    _check(logdir, names, option)
    missing = [folder for folder in (logdir, *logdir.parents) if not os.path.lexists(folder)]
    try:
        _make(logdir, option)
        yield logdir
    except BaseException:
        for name in names:
            shutil.rmtree(logdir / name, ignore_errors=True)
            with suppress(OSError):
                (logdir / name).unlink()
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _unused(folder: Path) -> Path:
    while folder.exists():
        folder = folder.with_name(folder.name + "-again")
    return folder


def _check(logdir: Path, names: Sequence[str], option: str) -> None:
    try:
        str(logdir).encode()
    except UnicodeEncodeError:
        raise CommandError(f"{option} {str(logdir)!r} is not UTF-8, as TensorBoard needs it") from None
    for name in names:
        if os.path.lexists(logdir / name):
            raise CommandError(f"{option} {str(logdir)!r} already holds {name}: give another directory")


def _make(logdir: Path, option: str) -> None:
    try:
        logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option} {str(logdir)!r} can't be made: {reason(error)}") from None
    if not os.access(logdir, os.W_OK | os.X_OK):
        raise CommandError(f"{option} {str(logdir)!r} can't be written")
