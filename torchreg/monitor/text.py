"""Tables for TensorBoard's Text page, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchreg.assignments import shape_text, strengths_text
from torchreg.monitor.living import GroupReport
from torchreg.monitor.report import SparsityReport

LONGEST_TABLE = 200
"""Rows: a text is one card, and TensorBoard cuts those of a megabyte."""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; the first column holds names, the first ``left`` ones are aligned left.

    >>> print(markdown(("parameter", "zeros"), [("0.weight", "12"), ("a|b_c", "3")]))
    | parameter | zeros |
    | :-- | --: |
    | `0.weight` | 12 |
    | `a\\|b_c` | 3 |
    """
    rule = [":--" if i < left else "--:" for i in range(len(columns))]
    lines = [columns, rule, *((_code(row[0]), *map(_plain, row[1:])) for row in rows[:LONGEST_TABLE])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left_out = len(rows) - LONGEST_TABLE
    return f"{table}\n\n… and {left_out} more." if left_out > 0 else table


def table_of(text: str) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of a table that `markdown` has made.

    >>> table_of(markdown(("parameter", "zeros"), [("0.weight", "12"), ("a|b", "3")]))
    (['parameter', 'zeros'], [['0.weight', '12'], ['a|b', '3']])
    """
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    columns, _, *rows = [[cell.strip("`").replace("\\|", "|") for cell in line] for line in lines]
    return columns, rows


def penalties_text(source: Any) -> str | None:
    """Which penalty each parameter of a `Regularizer` has, and why the others have none; None for other sources."""
    assignments = getattr(source, "assignments", None)
    if not assignments:
        return None
    here = [a for a in assignments if a.module._parameters.get(a.attribute) is not None]
    rows = [
        (
            a.name,
            shape_text(a.parameter),
            a.rule or "–",
            f"none: {a.reason}" if a.penalty is None else strengths_text(a),
        )
        for a in sorted(here, key=lambda a: a.penalty is None)
    ]
    return markdown(("parameter", "shape", "rule", "penalty"), rows, left=4)


def sparsity_text(report: SparsityReport) -> str:
    """The exact zeros of each tensor."""
    columns = ("parameter", "shape", "weights", "zeros", "zeros %", "zero rows", "zero columns")
    rows = [
        (
            e.name,
            "" if e.shape is None else "×".join(map(str, e.shape)) or "scalar",
            f"{e.size:,}",
            f"{e.zeros:,}",
            f"{100 * e.fraction:.1f}",
            "–" if e.rows is None else f"{e.zero_rows} of {e.rows}",
            "–" if e.columns is None else f"{e.zero_columns} of {e.columns}",
        )
        for e in (report.total, *report.tensors)
    ]
    return markdown(columns, rows, left=2)


def groups_text(report: GroupReport) -> str:
    """The groups that are alive, of each tensor."""
    rows = [(e.name, e.groups or "–", f"{e.count:,}", f"{e.alive:,}") for e in (report.total, *report.entries)]
    return markdown(("parameter", "groups", "count", "alive"), rows, left=2)


def _code(text: str) -> str:
    return f"`{_plain(text).replace('`', '')}`"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
