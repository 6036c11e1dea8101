"""The examples run as a user runs them, on real data, and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("sklearn")


def run(name: str, *args: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def percent(pattern: str, text: str) -> float:
    return float(re.search(pattern + r" ([\d.]+)%", text).group(1))


def test_every_example_is_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


@pytest.mark.parametrize("route", [(), ("--hook",)])
def test_add_penalty_shrinks_and_zeroes_nothing(route):
    out = run("add_penalty.py", "--epochs", "15", *route)
    assert "left alone" in out
    assert percent("test accuracy", out) > 90
    assert percent("exactly zero:", out) == 0


def test_swap_optimizer_leaves_exact_zeros():
    out = run("swap_optimizer.py", "--epochs", "30")
    assert percent("test accuracy", out) > 93
    assert float(re.search(r"0\.weight .*? ([\d.]+) %", out).group(1)) > 60
    assert "KKT residual" in out


def test_refit_keeps_the_zeros_and_mends_the_loss():
    out = run("refit.py", "--epochs", "15")
    before, after = re.findall(r"test accuracy ([\d.]+)%, training loss ([\d.]+), exact zeros ([\d.]+)%", out)
    assert float(after[2]) == float(before[2]) > 60
    assert float(after[1]) < 0.6 * float(before[1])
    assert float(after[0]) >= float(before[0]) > 85


def test_monitor_sparsity_writes_a_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run("monitor_sparsity.py", "--epochs", "10", "--logdir", str(tmp_path))
    assert percent("exact zeros", out) > 30
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {"sparsity/total", "loss/data", "loss/penalty", "threshold/group0"} <= set(tags["scalars"])
    assert "mask/0.weight" in tags["images"]
    assert "weights/0.weight" in tags["histograms"]
