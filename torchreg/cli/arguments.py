"""Command-line arguments: a parser whose errors are one line, and the kinds of numbers."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from torchreg.cli.output import print_error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, without the usage text."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        print_error(self.prog, message)
        raise SystemExit(2)


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
