"""What the figures must reach, and whether they do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from adam_contenders import BASELINE as ADAMW
from adam_contenders import FUSED as ADAM_FUSED
from contenders import BASELINE, BY_HAND, COUNTS_READ, FUSED, LOSS_TERM, PAT, SOFT_FOREACH
from group_contenders import FUSED as GROUPS_FUSED
from group_contenders import PAT as GROUPS_PAT
from workload import LARGE, LISTS, count


@dataclass(frozen=True)
class Bar:
    """``contender`` takes at most ``limit`` times as long as ``against`` on a list.

    ``against`` None stands for a copy of the bytes that no step can do without.
    """

    contender: str
    against: str | None
    limit: float
    tensors: str
    dtype: str = "float32"


def _all(contenders: tuple[str, ...], against: str | None, limit: float, lists: tuple[str, ...]) -> list[Bar]:
    return [Bar(contender, against, limit, tensors) for tensors in lists for contender in contenders]


_MANY = ("1000 × 1 k", "ResNet-50")
_BOTH = ("4 × 4 M", "60 × 20 k")
_LARGE = tuple(name for name, shapes in LISTS.items() if count(shapes) >= LARGE)
_L1 = FUSED[:1]

BARS = {
    "cpu": [
        *_all(FUSED, BASELINE, 1.10, _BOTH[:1]),
        *_all(FUSED, BASELINE, 1.30, _BOTH[1:]),
        *_all(ADAM_FUSED, ADAMW, 1.15, _BOTH[:1]),
        *_all(ADAM_FUSED, ADAMW, 1.30, _BOTH[1:]),
        *_all(_L1, PAT, 1 / 10, _BOTH),
        *_all(GROUPS_FUSED, BASELINE, 1.4, _BOTH[:1]),
        *_all(GROUPS_FUSED, GROUPS_PAT, 1 / 5, _BOTH[1:]),
        *_all((LOSS_TERM,), BY_HAND, 1 / 3, _BOTH),
    ],
    "cuda": [
        dataclasses.replace(bar, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for bar in (
            *_all(FUSED, BASELINE, 1.03, _LARGE),
            *_all(FUSED, None, 1 / 0.85, _LARGE),
            *_all(FUSED, BASELINE, 1.0, _MANY),
            *_all(ADAM_FUSED, ADAMW, 1.05, _LARGE),
            *_all(_L1, SOFT_FOREACH, 1 / 2.2, _LARGE),
            *_all(_L1, PAT, 1 / 5, _LARGE),
            *_all(GROUPS_FUSED, BASELINE, 1.2, _LARGE),
            *_all((COUNTS_READ,), FUSED[0], 1.01, _LARGE),
        )
    ],
}


def judged(lists: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Every bar of a kind of device, with what was measured (None: was not) and whether it is met."""
    verdicts = []
    for bar in BARS[device]:
        result = lists.get(bar.tensors, {}).get(bar.dtype)
        measured = None if result is None else _measured(bar, result)
        against = bar.against or "a copy of the bytes that it needs"
        verdicts.append(
            {
                "text": f"{bar.contender}, at most {bar.limit:.3g} × {against}, {bar.tensors}, {bar.dtype}",
                "limit": round(bar.limit, 4),
                "measured": None if measured is None else round(measured, 4),
                "met": None if measured is None else measured <= bar.limit,
            }
        )
    return verdicts


def _measured(bar: Bar, result: dict[str, Any]) -> float | None:
    rows = result["contenders"]
    if bar.contender not in rows or (bar.against is not None and bar.against not in rows):
        return None
    row = rows[bar.contender]
    if bar.against is None:
        return row["bytes_per_parameter"] / result["floor_bytes_per_parameter"]
    return row["ratio"] / rows[bar.against]["ratio"]
