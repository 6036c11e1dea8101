"""What is told of measurements of linear models: times beside the peers', and whether they reach what they are to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """Ours takes at most `limit` times the least time of some peers in a row."""

    row: str
    peers: tuple[str, ...]
    limit: float


SINGLE = ("wide, alpha_max/10", "wide, alpha_max/100", "correlated, alpha_max/10", "correlated, alpha_max/100")
FASTER = ("celer", "skglm")
ALL = ("sklearn", "celer", "skglm", "adelie")
BARS = (
    *(Bar(row, ("sklearn",), 1 / 3) for row in SINGLE),
    *(Bar(row, FASTER, 1.0) for row in SINGLE),
    *(Bar(f"{design}, path of 100", ("sklearn",), 1 / 5) for design in ("wide", "correlated")),
    *(Bar(f"{design}, path of 100", FASTER, 1 / 2) for design in ("wide", "correlated")),
    *(Bar(f"{design}, path of 100", ("adelie",), 1.0) for design in ("wide", "correlated")),
    Bar("tall, path of 100", ALL, 1.1),
    Bar("wide, LassoCV", ("sklearn",), 1 / 4),
    Bar("tall, LassoCV", ("sklearn",), 1 / 10),
    Bar("correlated, alpha_max/1000", ("celer",), 1 / 5),
    *(Bar(f"diabetes, alpha_max/{f}", ("sklearn",), 2.5) for f in (10, 100)),
    *(Bar(f"sparse, {task}", ALL, 1.5) for task in ("alpha_max/10", "alpha_max/100", "path of 100")),
    Bar("GPU, path of 100", ALL, 1 / 10),
    Bar("GPU, LassoCV", ALL, 1 / 10),
    Bar("GPU, path of 100", ("cuml",), 1 / 10),
)


def judged(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each bar with the ratio that was measured and whether it is met; both None where it was not measured."""
    found = []
    for bar in BARS:
        row = rows.get(bar.row, {})
        peers = [row[peer]["seconds"] for peer in bar.peers if peer in row]
        ratio = row["torchreg"]["seconds"] / min(peers) if "torchreg" in row and peers else None
        text = f"{bar.row}: at most {bar.limit:.3g} × {' and '.join(bar.peers)}"
        met = None if ratio is None else ratio <= bar.limit
        found.append({"text": text, "limit": bar.limit, "measured": ratio, "met": met})
    return found


def told(bar: Mapping[str, Any]) -> str:
    """One line."""
    if bar["measured"] is None:
        return f"not measured yet   {bar['text']}"
    return f"{'met' if bar['met'] else 'missed':9s} {bar['measured']:8.3g}   {bar['text']}"


def show(title: str, row: Mapping[str, Any]) -> None:
    """Print a row of contenders with their seconds, and over ours."""
    ours = row["torchreg"]["seconds"]
    cells = [
        f"{name} {entry['seconds']:.4f} s ({entry['seconds'] / ours:.2f} ×"
        + (f", gap {entry['gap']:.0e})" if "gap" in entry else ")")
        for name, entry in row.items()
    ]
    print(f"{title:24s} " + "   ".join(cells), flush=True)
