"""The sizes of sparse files in the docs are those of the committed results."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("sparse_files")


def committed():
    return json.loads((ROOT / "benchmarks/results/sparse-files.json").read_text(encoding="utf-8"))


def test_the_docs_show_the_committed_sizes(benchmark):
    assert list(committed()) == list(benchmark.NETWORKS)
    assert benchmark.docs_table(committed()) in (ROOT / "docs/smaller.md").read_text(encoding="utf-8")


def test_a_model_with_nine_tenths_zeros_takes_less_than_15_percent_of_its_dense_size():
    for rows in committed().values():
        row = next(row for row in rows if row["sparsity"] == 0.9)
        assert row["sparse"] < 0.15 * row["dense"]
        assert all(row["sparse"] < row["gzip"] for row in rows)


def test_the_sizes_can_be_made_again(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "NETWORKS", {"LeNet-300-100": benchmark.lenet})
    path = tmp_path / "results" / "files.json"
    assert benchmark.main(["--json", str(path)]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["LeNet-300-100"]
    for now, then in zip(again, committed()["LeNet-300-100"], strict=True):
        assert now["dense"] == then["dense"] == 4 * 266_610
        assert now["sparse"] == pytest.approx(then["sparse"], rel=0.01)  # torch may draw other numbers
    assert "LeNet-300-100, gzip" in capsys.readouterr().out
