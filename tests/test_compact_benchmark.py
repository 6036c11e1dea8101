"""The figures of compaction in the docs are those of the committed results, and reach what they must."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compact")


def committed():
    return json.loads((ROOT / "benchmarks/results/compact-cpu.json").read_text(encoding="utf-8"))["results"]


def test_the_docs_show_the_committed_figures(benchmark):
    assert benchmark.docs_table(committed()) in (ROOT / "docs/smaller.md").read_text(encoding="utf-8")


def test_half_of_the_channels_is_half_of_the_work():
    for figures in committed().values():
        assert figures["flops_over_ideal"] <= 1.3
        assert figures["times_faster"] >= 1.5
        assert figures["error_float32_absolute"] <= 1e-5


def test_the_ideal_is_what_torch_counts(benchmark):
    tokens = torch.randint(1000, (2, 16))
    counted = benchmark.flops(benchmark.Transformer(), benchmark.Example.of(tokens))
    assert counted == benchmark.transformer_flops(tokens, benchmark.UNITS, benchmark.HEADS)
