"""The page: which figures there are, in which order, and what is said beside them."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence

import torchreg
from torchreg.cli.output import printable
from torchreg.cli.report.charts import Line, bars, line_chart
from torchreg.cli.report.runs import Run, natural
from torchreg.cli.report.style import style_of, style_sheet
from torchreg.cli.report.tables import final_tables

SEED = re.compile(r"[-_ /]?seed[-_ ]?\d+$")
MOST_CHARTS = 60
MOST_PICTURES = 60
MOST_BYTES = 24 << 20
OPEN = 6
"""Sections with more figures than this begin closed."""
LONGEST_TAG = 120

OVERVIEW = (
    ("loss/data", "data loss", {"log": True}),
    ("loss/penalty", "penalty", {"log": True}),
    ("sparsity/total", "fraction of exact zeros", {"percent": True}),
    ("zeros/new", "became zero since the last log", {"zero": True}),
    ("zeros/revived", "woke up since the last log", {"zero": True}),
)


class Report:
    """The runs, and their groups: runs that differ only in their seed share a colour."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        names = [SEED.sub("", run.name) or run.name for run in runs]
        self.groups = list(dict.fromkeys(names))
        self.group = {run.name: self.groups.index(name) for run, name in zip(runs, names, strict=True)}
        self.tags = sorted({tag for run in runs for tag in run.curves}, key=natural)
        self.bytes = 0

    def style(self, run: Run) -> str:
        """The classes of a run's figures."""
        return style_of(self.group[run.name])

    def beginning(self, *starts: str) -> list[str]:
        """The tags of scalars that begin like this."""
        return [tag for tag in self.tags if tag.startswith(starts)]


def page(title: str, runs: Sequence[Run], left_out: int = 0) -> str:
    """The whole page as HTML without scripts, whose only sources are itself."""
    report = Report(runs)
    body = [_head(title, report, left_out), _legend(report), final_tables(report.runs, report.groups, report.group)]
    body += [
        _section("Losses and zeros", [figure for chart in OVERVIEW for figure in _figure(report, *chart)], 0),
        _charts(report, "Thresholds", report.beginning("threshold/", "strength_scale/"), log=True),
        _charts(report, "Living groups", report.beginning("groups/"), zero=True),
        _pictures(
            report,
            "barcode/",
            "Which groups were alive",
            "a column for each group, a row for each log, the latest at the bottom; white is alive",
        ),
        _pictures(report, "mask/", "Masks", "white where weights are, black for exact zeros"),
        _charts(report, "Exact zeros, layer by layer", _layers(report), percent=True),
        _histograms(report),
        _charts(report, "Other scalars", _others(report), log=True),
        _pictures(report, "", "Other images", ""),
        _settings(report),
        _problems(report),
    ]
    sheet = style_sheet(len(report.groups))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}: torchreg report'
        f"</title><style>{sheet}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _text(text: str) -> str:
    """Text from a file, for HTML: no markup, no control characters, not longer than a line or two."""
    clean = printable(text)
    return html.escape(clean if len(clean) <= LONGEST_TAG else clean[: LONGEST_TAG - 1] + "…")


def _head(title: str, report: Report, left_out: int) -> str:
    count = len(report.runs)
    steps = max(run.steps for run in report.runs)
    more = f" ({left_out:,} more are left out)" if left_out else ""
    return (
        f"<h1>{_text(title)}</h1><p class='quiet'>{count} run{'s' * (count != 1)}{more}, up to step {steps:,}; "
        f"made by torchreg {html.escape(torchreg.__version__)}</p>"
    )


def _legend(report: Report) -> str:
    if len(report.runs) == 1:
        return ""
    entries = []
    for i, name in enumerate(report.groups):
        seeds = sum(group == i for group in report.group.values())
        swatch = '<svg viewBox="0 0 30 10"><line class="line" x1="0" x2="30" y1="5" y2="5"/></svg>'
        style = style_of(i).split(" ", 1)[1]  # without its own class, which would hide the box itself
        entries.append(
            f'<label class="{style}"><input type="checkbox" id="g{i}" checked>{swatch}<span>{_text(name)}'
            f"{f' × {seeds}' if seeds > 1 else ''}</span></label>"
        )
    return f'<div class="legend">{"".join(entries)}</div>'


def _layers(report: Report) -> list[str]:
    return [tag for tag in report.beginning("sparsity/") if tag != "sparsity/total"]


def _others(report: Report) -> list[str]:
    shown, starts = {tag for tag, _, _ in OVERVIEW}, ("sparsity/", "threshold/", "strength_scale/", "groups/")
    elsewhere = (*starts, "final/", "refit/", "_hparams_/")
    return [tag for tag in report.tags if tag not in shown and not tag.startswith(elsewhere)]


def _charts(report: Report, heading: str, tags: Sequence[str], **axis: bool) -> str:
    figures = [figure for tag in tags[:MOST_CHARTS] for figure in _figure(report, tag, "", axis)]
    return _section(heading, figures, len(tags) - len(figures))


def _figure(report: Report, tag: str, caption: str, axis: Mapping[str, bool]) -> list[str]:
    """The chart of a tag, if any run has it."""
    lines, remarks = [], []
    for run in report.runs:
        if tag in run.curves:
            points = run.curves[tag].points()
            lines.append(Line(points, report.style(run), f"{printable(run.name)}: {points[-1][1]:.6g} at the end"))
            if broken := [step for step, value in points if not math.isfinite(value)]:
                remarks.append(f"{_text(run.name)}: not finite at step {broken[0]:,}")
    if not lines:
        return []
    note = f"<small>{'; '.join(remarks[:5])}</small>" if remarks else ""
    heading = f"{caption} <small><code>{_text(tag)}</code></small>" if caption else _text(tag)
    return [f"<figure><figcaption>{heading}</figcaption>{line_chart(lines, **axis)}{note}</figure>"]


def _section(heading: str, figures: Sequence[str], left_out: int, remark: str = "", kind: str = "grid-of") -> str:
    if not figures:
        return ""
    more = f"<p class='quiet'>{left_out:,} more are not shown.</p>" if left_out else ""
    remark = f"<p class='quiet'>{remark}</p>" if remark else ""
    content = f"{remark}<div class='{kind}'>{''.join(figures)}</div>{more}"
    if len(figures) > OPEN:
        content = f"<details><summary>{len(figures)} figures</summary>{content}</details>"
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"


def _pictures(report: Report, start: str, heading: str, remark: str) -> str:
    """A row for each tag, with the last image of each group of runs side by side, or of each run if there are few."""
    tags = sorted({tag for run in report.runs for tag in run.pictures}, key=natural)
    if start:
        tags = [tag for tag in tags if tag.startswith(start)]
    else:
        tags = [tag for tag in tags if not tag.startswith(("barcode/", "mask/"))]
    rows = []
    for tag in tags[:MOST_PICTURES]:
        cells, shown = [], set()
        holders = [run for run in report.runs if tag in run.pictures]
        for run in holders:
            picture, group = run.pictures[tag], report.group[run.name]
            if (len(holders) > len(report.groups) and group in shown) or report.bytes + len(picture.png) > MOST_BYTES:
                continue
            shown.add(group)
            report.bytes += len(picture.png)
            data = base64.b64encode(picture.png).decode()
            cells.append(
                f'<div class="g{group}"><img alt="{_text(tag)}" src="data:image/png;base64,{data}">'
                f"<span>{_text(run.name)}, step {picture.step:,}</span></div>"
            )
        if cells:
            name = _text(tag.removeprefix(start))
            rows.append(f"<figure><figcaption>{name}</figcaption><div class='pictures'>{''.join(cells)}</div></figure>")
    kind = "tiles" if len(report.runs) == 1 else "rows"
    return _section(heading, rows, len(tags) - len(rows), remark, kind)


def _histograms(report: Report) -> str:
    figures, tags = [], sorted({tag for run in report.runs for tag in run.histograms}, key=natural)
    for tag in tags[:MOST_CHARTS]:
        shown: set[int] = set()
        drawn = []
        for run in report.runs:
            group = report.group[run.name]
            if tag in run.histograms and group not in shown:
                shown.add(group)
                h, label = run.histograms[tag], f"{run.name}, step {run.histograms[tag].step:,}"
                picture = bars(h.least, h.limits, h.counts, report.style(run), printable(label))
                drawn.append(f'<div class="g{group}">{picture}<small class="quiet">{_text(label)}</small></div>')
        figures.append(f"<figure><figcaption>{_text(tag)}</figcaption>{''.join(drawn)}</figure>")
    remark = "the weights that are not zero, at the last log; heights are roots of counts"
    return _section("Histograms", figures, len(tags) - len(figures), remark)


def _settings(report: Report) -> str:
    names = sorted({name for run in report.runs for name in run.settings}, key=natural)[:MOST_CHARTS]
    runs = [run for run in report.runs if run.settings]
    if not names:
        return ""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{_text(run.name)}</td>{''.join(f'<td>{_setting(run, name)}</td>' for name in names)}</tr>"
        for run in runs
    )
    table = f"<div class='scroll'><table><thead><tr><th>run</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    return f"<section><h2>Settings</h2><details><summary>{len(runs)} of the runs</summary>{table}</details></section>"


def _setting(run: Run, name: str) -> str:
    value = run.settings.get(name, "–")
    return f"{value:g}" if isinstance(value, float) else _text(str(value))


def _problems(report: Report) -> str:
    found = [(run.name, problem) for run in report.runs for problem in run.problems]
    if not found:
        return ""
    rows = "".join(f"<li><code>{_text(name)}</code>: {_text(problem)}</li>" for name, problem in found[:200])
    more = f"<p>{len(found) - 200:,} more.</p>" if len(found) > 200 else ""
    return (
        "<section class='problems'><h2>What could not be read</h2><p>These files were read up to the damage. A run "
        f"that is still going may end in the middle of a record.</p><ul>{rows}</ul>{more}</section>"
    )
