"""Covering sets: few of all combinations of parameters, in which each value of one meets each value of every other.

Most faults show where two values meet (Kuhn, Wallace and Gallo, "Software fault interactions and implications for
software testing", IEEE Transactions on Software Engineering 30, 2004). A test marked ``pairs`` runs on such a set in
`make test` and on all other combinations in `make test-slow`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Numbers of rows among which each value is, and each two that stand in one row.

    Greedy, and the same at each call: the first of the rows with the most new pairs is taken next.
    """
    pairs = [{*enumerate(row), *combinations(enumerate(row), 2)} for row in rows]
    missing, taken = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        taken.append(best)
    return sorted(taken)


def mark_slow_beyond_pairs(items: Iterable[Any]) -> None:
    """Of each test marked ``pairs``, mark slow all but a covering set.

    ``pairs(name="triton")`` leaves out combinations with that ``name`` only. What is slow anyway covers nothing.
    """
    tests = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("pairs")
        given = getattr(item, "callspec", None)
        if not mark or not given or item.get_closest_marker("slow"):
            continue
        if all(given.params[name] == value for name, value in mark.kwargs.items()):
            tests[item.nodeid.split("[")[0]].append(item)
    for chosen in tests.values():
        taken = covering([[id(value) for _, value in sorted(item.callspec.params.items())] for item in chosen])
        for i, item in enumerate(chosen):
            if i not in taken:
                item.add_marker(pytest.mark.slow)
