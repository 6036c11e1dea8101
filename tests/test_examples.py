"""The examples run as a user runs them, on real data, and show what they promise."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from example import EXAMPLES, printed

pytest.importorskip("sklearn")


def run(name: str, *args: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs an example in this process, which has imported torch: others show that they are programs."""
    return functools.partial(printed, monkeypatch=monkeypatch, capsys=capsys)


def percent(pattern: str, text: str) -> float:
    return float(re.search(pattern + r" ([\d.]+)%", text).group(1))


def test_every_example_is_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


@pytest.mark.parametrize("route", [(), pytest.param(("--hook",), marks=pytest.mark.slow)])
def test_add_penalty_shrinks_and_zeroes_nothing(route, here):
    out = here("add_penalty.py", "--epochs", "15", *route)
    assert "left alone" in out
    assert percent("test accuracy", out) > 90
    assert percent("exactly zero:", out) == 0


def test_swap_optimizer_leaves_exact_zeros():
    out = run("swap_optimizer.py", "--epochs", "30")
    assert percent("test accuracy", out) > 93
    assert float(re.search(r"0\.weight .*? ([\d.]+) %", out).group(1)) > 60
    assert "KKT residual" in out


def test_refit_keeps_the_zeros_and_mends_the_loss(here):
    out = here("refit.py", "--epochs", "15")
    before, after = re.findall(r"test accuracy ([\d.]+)%, training loss ([\d.]+), exact zeros ([\d.]+)%", out)
    assert float(after[2]) == float(before[2]) > 60
    assert float(after[1]) < 0.6 * float(before[1])
    assert float(after[0]) >= float(before[0]) > 85


def test_monitor_sparsity_writes_a_run(tmp_path, here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = here("monitor_sparsity.py", "--epochs", "10", "--logdir", str(tmp_path))
    assert percent("exact zeros", out) > 30
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {"sparsity/total", "loss/data", "loss/penalty", "threshold/group0"} <= set(tags["scalars"])
    assert "mask/0.weight" in tags["images"]
    assert "weights/0.weight" in tags["histograms"]


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text).group(1).replace(",", ""))


@pytest.mark.slow
def test_compact_resnet_is_smaller_and_as_accurate_as_its_zeros(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("torch_pruning")
    out = run("compact_resnet.py", "--epochs", "2", "--refit", "3", "--logdir", str(tmp_path))
    assert 0.45 < 1 - number(r"total +448 +(\d+)", out) / 448 < 0.55
    assert number(r"parameters +308,074 +([\d,]+)", out) < 308_074 / 2
    assert number(r"FLOPs +1,519,104 +([\d,]+)", out) < 1_519_104 / 1.5
    zeros, compacted = percent("zeros: test accuracy", out), percent("compacted: test accuracy", out)
    assert compacted == zeros > 85
    assert number(r"torch.export: outputs differ by at most (\S+)", out) < 1e-4
    assert "ONNX: skipped" in out or number(r"ONNX Runtime: outputs differ by at most (\S+)", out) < 1e-4
    assert number(r"compacted: a file of ([\d,]+)", out) < number(r"dense: a file of ([\d,]+)", out) / 2
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {"compacted/parameters", "groups/5.conv1"} <= set(tags["scalars"])
    assert "barcode/5.conv1" in tags["images"]


@pytest.mark.slow
def test_the_resnet_takes_images_from_a_file_and_filters_into_its_groups(tmp_path):
    np = pytest.importorskip("numpy")
    pytest.importorskip("torch_pruning")
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (192, 9, 9), dtype=np.uint8), random.integers(0, 10, 192)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    small = ("--epochs", "2", "--refit", "1", "--zeros", "0.1")
    out = run("compact_resnet.py", "--data", str(tmp_path / "images.npz"), "--filters", *small)
    assert "4.conv2" in out
    assert "compacted: test accuracy" in out


@pytest.mark.slow
def test_compact_transformer_has_the_loss_of_its_zeros():
    pytest.importorskip("torch_pruning")
    out = run("compact_transformer.py", "--steps", "12", "--refit", "6")
    alive = {name: int(count) for name, count in re.findall(r"(layers\.\d\.\w+) +shared +\d+ +(\d+)", out)}
    assert alive["layers.0.self_attn"] + alive["layers.1.self_attn"] == 8
    assert 240 <= alive["layers.0.linear1"] + alive["layers.1.linear1"] <= 272
    assert number(r"parameters +[\d,]+ +([\d,]+)", out) < number(r"parameters +([\d,]+)", out) / 2
    refitted, compacted = re.search(r"refitted: loss (\S+); compacted: loss (\S+)", out).groups()
    assert float(refitted) == pytest.approx(float(compacted), abs=1e-3)
    assert float(refitted) < 4.2
    assert number(r"torch.export: outputs differ by (\S+)", out) < 1e-4


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_the_page_on_smaller_models_quotes_what_the_examples_printed(name):
    printed = (EXAMPLES.parent / f"benchmarks/results/compact-{name}.txt").read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs/smaller.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| a {name}".replace("resnet", "ResNet")))
    for what in ("parameters", "FLOPs", "latency"):
        before, after = re.search(rf"^{what} +([\d.,]+)(?: ms)? +([\d.,]+)", printed, re.MULTILINE).groups()
        assert f"| {before} → {after} |" in row
    dense, compacted = (
        re.search(rf"{which}: (?:test accuracy|loss) ([\d.]+%?)", printed)[1] for which in ("dense", "compacted")
    )
    assert row.endswith(f"| {dense} | {compacted} |")


def test_the_page_quotes_the_run_with_filters():
    printed = (EXAMPLES.parent / "benchmarks/results/compact-resnet-filters.txt").read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs/smaller.md").read_text(encoding="utf-8")
    accuracy = re.search(r"compacted: test accuracy ([\d.]+)%", printed)[1]
    flops = re.search(r"FLOPs +[\d,]+ +([\d,]+)", printed)[1]
    assert f"{accuracy} % right, but {flops} FLOPs" in page


def test_l1_or_l2_shows_what_the_page_says():
    out = run("l1_or_l2.py")
    page = (EXAMPLES.parent / "docs/l1-or-l2.md").read_text(encoding="utf-8")
    assert out.strip() in page
    weights = {
        name: tuple(map(float, pair))
        for name, *pair in re.findall(r"(\w+) +radius +(\S+) +perimeter +(\S+) +zeros", out)
    }
    assert weights["Lasso"].count(0.0) == 1
    assert 0.0 not in weights["Ridge"] + weights["Net"]
    picks = re.findall(r"20 random halves of the data \w+ ?\w* uses radius (\d+), perimeter (\d+)", out)
    assert all(5 < int(count) < 16 for count in picks[0])
    assert picks[1] == ("20", "20")
    lasso, ridge = (
        list(map(float, re.search(name + r": objective .*? (\S+), .*? (\S+), \w+ (\S+);", out).groups()))
        for name in ("Lasso", "Ridge")
    )
    assert max(lasso) - min(lasso) < 1e-5
    assert ridge[0] > ridge[1] > ridge[2]
    used = {
        name.strip(): (int(noise), float(score))
        for name, noise, score in re.findall(r" {3}(\w.*?) +uses .* and +(\d+) columns of noise, test R² (\S+)", out)
    }
    assert used["Ridge"][0] == 2000
    assert used["Lasso, one standard error"][0] <= used["Lasso, least error"][0] < 40
    assert used["Lasso, least error"][1] > 4 * used["Ridge"][1]


@pytest.mark.slow
def test_draw_penalties_draws_the_pictures_of_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    names = run("draw_penalties.py", "--out", str(tmp_path)).split()
    assert [Path(name).name for name in names] == ["geometry.png", "shrinkage.png"]
    for name in names:
        assert 20_000 < Path(name).stat().st_size < 200_000
        assert Path(name).read_bytes()[16:24] == (EXAMPLES.parent / "docs" / Path(name).name).read_bytes()[16:24]


@pytest.mark.slow
def test_embeddings_leave_the_items_that_matter():
    out = run("embeddings.py", "--items", "500", "--steps", "1000")
    left, useful, known = map(int, re.search(r"items left: (\d+), (\d+) of them among the (\d+)", out).groups())
    assert useful == known == 50
    assert left < 350
    error, spread = map(float, re.search(r"mean squared error ([\d.]+) of ([\d.]+)", out).groups())
    assert error < 0.5 * spread
