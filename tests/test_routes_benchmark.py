"""The picture of three ways to L1 under Adam shows what its text says."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare_routes")


def test_each_way_is_run_and_the_proximal_one_is_the_lasso(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "FACTORS", (0.3,))
    monkeypatch.setattr(benchmark, "STEPS", 600)
    figure, results = tmp_path / "a" / "routes.png", tmp_path / "routes.json"
    assert benchmark.main(["--figure", str(figure), "--json", str(results)]) == 0
    assert figure.stat().st_size > 10_000
    outcomes = {k: v[0] for k, v in json.loads(results.read_text(encoding="utf-8"))["outcomes"].items()}
    assert outcomes["ProxAdamW"]["zeros"] == outcomes[benchmark.TRUTH]["zeros"] > 0.9
    assert abs(outcomes["ProxAdamW"]["excess"]) < 1e-6
    assert outcomes["Adam, L1 in the loss"]["zeros"] == 0
    assert outcomes["AdamW, then thresholding by lr·λ"]["excess"] > 0.1


def test_the_committed_figures_support_the_readme(benchmark):
    outcomes = json.loads((ROOT / "benchmarks/results/routes.json").read_text(encoding="utf-8"))["outcomes"]
    assert len(outcomes["ProxAdamW"]) == len(benchmark.FACTORS) == 11
    for ours, truth in zip(outcomes["ProxAdamW"], outcomes[benchmark.TRUTH], strict=True):
        assert ours["zeros"] == truth["zeros"]
        assert abs(ours["excess"]) < 1e-9
    assert all(row["zeros"] == 0 for row in outcomes["Adam, L1 in the loss"])
    assert all(row["excess"] > 0.1 for row in outcomes["AdamW, then thresholding by lr·λ"])
