"""Values in errors: one line, whatever they are."""

from __future__ import annotations


def one_line(value: object, longest: int = 80) -> str:
    """The beginning of a value's ``repr`` in one line.

    >>> one_line("a\\nb"), one_line([1, 2, 3], longest=5)
    ("'a\\\\nb'", '[1, 2…')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else text[:longest] + "…"
