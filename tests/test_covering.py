"""The sets of combinations that `make test` runs of tests marked ``pairs``, and that nothing is lost."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from covering import covering, mark_slow_beyond_pairs

TABLES = {
    "alike": list(product("abc", "abc", "abc")),
    "unlike": list(product(range(6), range(2), range(4), range(5))),
    "ragged": [row for row in product(range(5), repeat=3) if sum(row) % 3 or row[0] > 2],
    "two parameters": list(product(range(4), range(7))),
    "one parameter": [(i,) for i in range(5)],
}
MARKED = """
import pytest

slow = pytest.mark.slow

@pytest.mark.pairs
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize(("b", "c"), [("x", 1.0), ("y", 1.0)])
@pytest.mark.parametrize("d", [None, [], pytest.param({}, marks=slow)])
def test_all(a, b, c, d): ...

@pytest.mark.pairs(form="fast")
@pytest.mark.parametrize("form", ["fast", "sure"])
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_one_form(form, a, b, c): ...

@pytest.mark.parametrize("a", range(2))
def test_unmarked(a): ...

@pytest.mark.pairs
def test_without_parameters(): ...
"""


def pairs(rows) -> set:
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_each_value_meets_each_other_that_it_meets_anywhere(rows):
    taken = covering(rows)
    assert taken == sorted(set(taken))
    assert pairs(rows[i] for i in taken) == pairs(rows)
    assert {cell for i in taken for cell in enumerate(rows[i])} == {cell for row in rows for cell in enumerate(row)}


def test_few_are_taken():
    """As many as the two longest parameters have pairs, and a fifth more."""
    assert len(covering(TABLES["alike"])) <= 9 * 1.2
    assert len(covering(TABLES["unlike"])) <= 6 * 5 * 1.2
    assert len(covering(list(product(range(10), range(5), range(5), range(4))))) <= 10 * 5 * 1.2


class Collected:
    def __init__(self) -> None:
        self.items: list = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        mark_slow_beyond_pairs(items)
        self.items = list(items)


def test_marked_tests_keep_their_pairs_and_nothing_is_lost(tmp_path, capsys):
    (tmp_path / "test_marked.py").write_text(MARKED, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    pairs\n    slow\n", encoding="utf-8")
    collected = Collected()
    assert (
        pytest.main([f"--rootdir={tmp_path}", str(tmp_path), "-q", "-m", "not slow", "--collect-only"], [collected])
        == 0
    )
    quick, slow = ([], [])
    for item in collected.items:
        (slow if item.get_closest_marker("slow") else quick).append(item)

    def rows(items, name, **chosen):
        params = [item.callspec.params for item in items if item.originalname == name]
        return [
            tuple(str(v) for _, v in sorted(p.items()))
            for p in params
            if all(p[key] == value for key, value in chosen.items())
        ]

    assert len(collected.items) == 3 * 2 * 3 + 2 * 27 + 2 + 1
    assert len(set(rows(collected.items, "test_all"))) == 18
    everything = [row for row in rows(collected.items, "test_all") if row[-1] != "{}"]
    assert pairs(rows(quick, "test_all")) == pairs(everything)
    assert len(rows(quick, "test_all")) == 6
    assert len(rows(quick, "test_one_form", form="sure")) == 27
    fast = rows(quick, "test_one_form", form="fast")
    assert pairs(fast) == pairs(rows(collected.items, "test_one_form", form="fast"))
    assert len(fast) < 12
    assert len(rows(quick, "test_unmarked")) == 2
    assert "test_without_parameters" in {item.name for item in quick}
