"""What a command writes: results to stdout, one line for an error to stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


class CommandError(Exception):
    """Bad input: the command ends with this message as its one line on stderr, and exit status 2."""


def print_result(text: str) -> None:
    """Print to stdout at once, with a question mark for what its encoding lacks.

    Raises:
        CommandError: if stdout takes no more, such as a file on a full disk.
        BrokenPipeError: if its reader has gone.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise CommandError(f"writing to standard output failed: {reason(error)}") from None


def print_error(program: str, message: str, kind: str = "error") -> None:
    """Print an error to stderr as one line."""
    if sys.stderr is None:  # closed before the start; print would take stdout instead
        return
    line = f"{program}: {kind}: {printable(' '.join(message.split()))}"
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)


def printable(text: str) -> str:
    """The text with control characters escaped: names in a file must not reach the terminal as commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """Why an operation failed, in a few words: the first sentence of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return text[:200] or type(error).__name__


def discard_output() -> None:
    """Send the rest of stdout nowhere, so that nothing fails when the process ends after its reader has gone."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # stdout is no file
        pass
