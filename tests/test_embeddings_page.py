"""The page on embeddings: its code runs, and its numbers are those of the committed results."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/embeddings.md"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("embeddings")


def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert 0 < int(capsys.readouterr().out) < 8000


def test_the_page_shows_the_committed_results(benchmark):
    results = json.loads((ROOT / "benchmarks/results/embeddings-cpu.json").read_text(encoding="utf-8"))["results"]
    assert benchmark.docs_table(results) in PAGE.read_text(encoding="utf-8")
    assert all(row["from_exact"] < 1e-6 for row in results if "from_exact" in row)


def test_the_results_can_be_made_again(benchmark, tmp_path, capsys):
    path = tmp_path / "embeddings.json"
    assert benchmark.main(["--json", str(path), "--rows", "2000", "--steps", "6"]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert {row["case"] for row in again} == set(benchmark.CASES)
    assert "ProxSGD, L1" in capsys.readouterr().out
