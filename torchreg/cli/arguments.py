"""Command-line arguments: a parser whose errors are one line, the kinds of numbers, and files that can be read."""

from __future__ import annotations

import argparse
import math
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torchreg.cli.output import CommandError, print_error, print_result, reason

if TYPE_CHECKING:
    from torchreg.groups import Groups


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, without the usage text."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        print_error(self.prog, message)
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version like results: argparse itself fails where the encoding lacks a letter."""
        print_result(message.rstrip("\n"))


def positive_integer(text: str) -> int:
    """An integer of at least 1.

    >>> positive_integer("3")
    3
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def strength(text: str) -> float:
    """A non-negative, finite number."""
    value = _number(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a non-negative number, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number from 0 up to, but without, 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction of at least 0 and below 1, such as 0.9, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0, up to 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return value


def learning_rate(text: str) -> float:
    """A positive, finite number."""
    value = _number(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_file(path: Path, name: str) -> None:
    """Refuse a path that is no regular file.

    Raises:
        CommandError: with a message that starts with ``name``.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CommandError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{name} can't be read: {reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise CommandError(f"{name} is a directory: give the file inside")
    if not stat.S_ISREG(mode):
        raise CommandError(f"{name} is not a regular file")


def groups_argument(text: str) -> Groups:
    """Groups from a name of `torchreg.groups.NAMES`, or ``blocks=K``, ``heads=N`` or ``heads=NxP`` (P packed)."""
    from torchreg.groups import NAMES, Blocks, Heads, as_groups

    kind, _, number = text.partition("=")
    try:
        if kind == "blocks":
            return Blocks(int(number))
        if kind == "heads":
            heads, several, packed = number.partition("x")
            return Heads(int(heads), int(packed) if several else 1)
        return as_groups(text)
    except ValueError:
        allowed = ", ".join((*NAMES, "blocks=K", "heads=N", "heads=NxP"))
        raise argparse.ArgumentTypeError(f"expected one of {allowed}, got {text!r}") from None
