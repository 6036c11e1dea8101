"""The final table: where each run ended, and the mean over the seeds of each group of runs."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence

from torchreg.cli.output import printable
from torchreg.cli.report.runs import Run, natural

MOST_METRICS = 24
FIRST = ("accuracy", "sparsity", "inputs_used", "data_loss", "objective", "l1_norm", "l2_norm", "largest_weight")
"""Metrics that stand first, in this order; the others follow by name."""
LOGGED = ("sparsity/total", "loss/data", "loss/penalty", "accuracy/test")
HEADINGS = {
    "sparsity/total": "zeros",
    "loss/data": "data loss",
    "loss/penalty": "penalty",
    "final/sparsity": "zeros",
    "refit/sparsity": "zeros, refitted",
}
SAME = {"sparsity/total": "final/sparsity", "loss/data": "final/data_loss", "accuracy/test": "final/accuracy"}
"""What the last log says less exactly than a final metric."""
FRACTIONS = ("sparsity", "accuracy")


def final_tables(runs: Sequence[Run], groups: Sequence[str], group: Mapping[str, int]) -> str:
    """A row for each group, mean ± standard deviation over its runs, and below the runs themselves if they are more."""
    columns = [tag for tag in LOGGED if any(tag in run.curves for run in runs)]
    metrics = sorted({tag for run in runs for tag in run.curves if tag.startswith(("final/", "refit/"))}, key=_rank)
    columns = [tag for tag in columns if SAME.get(tag) not in metrics]
    columns = metrics[:MOST_METRICS] + columns
    if not columns:
        return ""
    by_group = [[run for run in runs if group[run.name] == i] for i in range(len(groups))]
    first = _table(columns, [(name, members) for name, members in zip(groups, by_group, strict=True)])
    single = "" if len(groups) == len(runs) else _table(columns, [(run.name, [run]) for run in runs])
    below = f"<details><summary>each of the {len(runs)} runs</summary>{single}</details>" if single else ""
    spread = "<p class='quiet'>mean ± standard deviation over the seeds</p>" if single else ""
    return f"<section><h2>In the end</h2>{spread}{first}{below}</section>"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Run]]]) -> str:
    head = "".join(f"<th>{html.escape(_heading(tag))}</th>" for tag in ("run", *columns, "steps"))
    lines = []
    for name, runs in rows:
        cells = [_cell(tag, [run.curves[tag].last for run in runs if tag in run.curves]) for tag in columns]
        cells.append(f"{max(run.steps for run in runs):,}")
        shown = html.escape(printable(name)[:120])
        lines.append(f"<tr><td>{shown}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _rank(tag: str) -> tuple[bool, int, list[tuple[int, str]]]:
    """What the training ended with comes before what a refit did."""
    name = tag.partition("/")[2]
    return tag.startswith("refit/"), FIRST.index(name) if name in FIRST else len(FIRST), natural(tag)


def _heading(tag: str) -> str:
    text = HEADINGS.get(tag) or printable(tag).removeprefix("final/").replace("_", " ")
    return f"{text[:60]} %" if _is_fraction(tag) else text[:60]


def _is_fraction(tag: str) -> bool:
    return tag.startswith(FRACTIONS) or tag.rpartition("/")[2] in FRACTIONS


def _cell(tag: str, values: Sequence[float]) -> str:
    """Mean ± standard deviation; fractions as per cent with one digit, other numbers with three digits."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "NaN" if any(map(math.isnan, values)) else "∞"
    mean = math.fsum(values) / len(values)
    spread = statistics.stdev(values) if len(values) > 1 else None
    if _is_fraction(tag) and max(map(abs, values)) <= 1:
        return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    if not spread:
        return f"{mean:.4g}" + ("" if spread is None else " ± 0")
    if mean == 0 or not 1e-2 <= abs(mean) < 1e6:
        return f"{mean:.2e} ± {spread:.0e}"
    digits = min(max(0, -math.floor(math.log10(spread))), 6)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
