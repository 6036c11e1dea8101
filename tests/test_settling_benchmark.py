"""The comparison of how zeros settle runs as its text says, and the committed figures support the README."""

import importlib
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module("lenet_settling")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_every_way_is_trained_and_counted(settling, monkeypatch, tmp_path, capsys):
    generator = np.random.default_rng(0)
    data = {
        **{f"x_{part}": generator.integers(0, 256, (200, 28, 28), dtype=np.uint8) for part in ("train", "test")},
        **{f"y_{part}": generator.integers(0, 10, 200, dtype=np.uint8) for part in ("train", "test")},
    }
    np.savez(tmp_path / "mnist.npz", **data)
    monkeypatch.setattr(settling, "EPOCHS", 6)
    monkeypatch.setattr(settling, "BATCH", 50)
    monkeypatch.setattr(settling, "RESULTS", tmp_path / "settling.json")
    assert settling.main(["--data", str(tmp_path / "mnist.npz"), "--seeds", "0"]) == 0
    runs = json.loads((tmp_path / "settling.json").read_text(encoding="utf-8"))["runs"]
    assert set(runs) == {way.name for way in settling.WAYS}
    for (run,) in runs.values():
        assert 0 < run["weights"] <= 266_200
        assert run["error"] > 50  # random labels
    assert all(name in capsys.readouterr().out for name in list(runs)[:1])


def test_the_committed_figures_support_the_text(settling):
    runs = json.loads(settling.RESULTS.read_text(encoding="utf-8"))["runs"]

    def mean(name, key):
        return statistics.mean(run[key] for run in runs[name])

    assert mean("RMDA", "changes_per_step") < 0.02 * mean("ProxSGD, decaying rate", "changes_per_step")
    assert mean("ProxSGD, decaying rate", "changes_per_step") < mean("ProxSGD, constant rate", "changes_per_step")
