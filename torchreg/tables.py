"""Text tables for the terminal: rows in, string out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import StringIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


def render(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    footer: Sequence[str] | None = None,
    left: int = 1,
    width: int | None = None,
    narrow: bool = False,
) -> str:
    """A plain-text table. The first ``left`` columns are aligned left, the others right.

    Args:
        columns: the headings.
        rows: the cells, one sequence per row.
        title: a line above the table.
        footer: a last row set apart, such as the total.
        left: how many leading columns hold text.
        width: characters per line; by default as wide as the content needs.
        narrow: two spaces between columns instead of three.
    """
    table = Table(
        box=SIMPLE,
        title=title,
        title_justify="left",
        show_footer=footer is not None,
        pad_edge=False,
        collapse_padding=narrow,
    )
    for i, heading in enumerate(columns):
        table.add_column(
            Text(heading),
            footer=Text(footer[i]) if footer else "",
            justify="left" if i < left else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    out = StringIO()
    console = Console(file=out, width=width or 1000, color_system=None, highlight=False, legacy_windows=False)
    console.print(table)
    return textwrap.dedent("\n".join(line.rstrip() for line in out.getvalue().splitlines())).strip("\n")
