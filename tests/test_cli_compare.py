"""``torchreg compare``: its results, its files, and one line for every bad input."""

import json
import os
import pickle
import re
import shlex
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_one_line, assert_refused, mnist_like, program, run_json

import torchreg
from torchreg.cli import main
from torchreg.cli.output import printable
from torchreg.cli.summary import QUANTITIES, table
from torchreg.cli.training import Result

METHODS = ["none", "l2-loss", "l1-loss", "l1-prox", "elastic-net-prox", "l1-loss-adam", "l1-prox-adam"]
PROXIMAL = ["l1-prox", "elastic-net-prox", "l1-prox-adam"]
LABELS = [
    *("no penalty", "L2 in the loss", "L1 in the loss", "L1 by ProxSGD", "Elastic Net by ProxSGD"),
    *("L1 in the loss, Adam", "L1 by ProxAdamW"),
]
SMALL = ["--steps", "30", "--seeds", "2", "--hidden", "16"]
VARYING = {"seconds", "logdir", "figure", "step_time", "step_time_ratio"}


def without_varying(value):
    if isinstance(value, dict):
        return {k: without_varying(v) for k, v in value.items() if k not in VARYING}
    return [without_varying(v) for v in value] if isinstance(value, list) else value


# compare: results


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """One full-length seed on the digits: the bar that the project sets itself."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    logdir = tmp_path_factory.mktemp("digits") / "runs"
    document = run_json(["compare", "--seeds", "1", "--logdir", str(logdir)])
    return document, logdir


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A few steps of two seeds on data in MNIST's format."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("small")
    path = mnist_like(folder / "toy.npz")
    logdir = folder / "runs"
    document = run_json(["compare", "--data", str(path), *SMALL, "--logdir", str(logdir)])
    return document, logdir, path


def results(document, quantity):
    return {entry["method"]: entry["mean"][quantity] for entry in document["methods"]}


def test_prox_sgd_leaves_80_percent_zeros_within_a_point_of_accuracy_on_digits(digits):
    accuracy, sparsity = results(digits[0], "accuracy"), results(digits[0], "sparsity")
    assert accuracy["none"] > 0.96
    assert sparsity["l1-prox"] >= 0.8
    assert accuracy["l1-prox"] >= accuracy["none"] - 0.01
    assert sparsity["elastic-net-prox"] >= 0.8
    assert sparsity["none"] == sparsity["l2-loss"] == sparsity["l1-loss"] == 0


def test_prox_adamw_leaves_as_many_zeros_at_the_objective_of_prox_sgd_on_digits(digits):
    accuracy, sparsity, objective = (results(digits[0], q) for q in ("accuracy", "sparsity", "objective"))
    assert sparsity["l1-prox-adam"] >= 0.85
    assert sparsity["l1-loss-adam"] == 0
    assert accuracy["l1-prox-adam"] >= accuracy["none"] - 0.01
    assert objective["l1-prox-adam"] == pytest.approx(objective["l1-prox"], rel=0.05)


def test_both_routes_of_l1_reach_the_same_objective_on_digits(digits):
    objective, norm = results(digits[0], "objective"), results(digits[0], "l1_norm")
    assert objective["l1-loss"] == pytest.approx(objective["l1-prox"], rel=0.03)
    assert norm["l1-loss"] == pytest.approx(norm["l1-prox"], rel=0.1)
    assert norm["none"] > 3 * norm["l1-prox"]


def test_elastic_net_has_smaller_weights_than_l1_on_digits(digits):
    largest, l2_norm = results(digits[0], "largest_weight"), results(digits[0], "l2_norm")
    assert largest["elastic-net-prox"] < 0.8 * largest["l1-prox"]
    assert l2_norm["elastic-net-prox"] < 0.8 * l2_norm["l1-prox"]


def test_l1_stops_reading_border_pixels_on_digits(digits):
    used = results(digits[0], "inputs_used")
    assert used["none"] == used["l1-loss"] == 64
    assert 20 <= used["l1-prox"] <= 55


def test_conclusion_names_the_numbers(digits):
    document = digits[0]
    text = " ".join(document["conclusion"])
    assert f"{100 * results(document, 'sparsity')['l1-prox']:.1f} % of the weights are exactly zero" in text
    assert "L1 in the loss has none" in text


def test_json_document_has_every_quantity_of_every_run(small):
    document = small[0]
    assert set(document) == {
        *("torchreg", "torch", "data", "settings", "methods", "notes", "conclusion", "seconds", "logdir"),
        "figure",
    }
    assert document["torchreg"] == torchreg.__version__
    assert document["data"] == {"name": "toy", "train": 200, "test": 60, "inputs": 36, "classes": 3}
    assert document["settings"]["steps"] == 30
    assert [entry["method"] for entry in document["methods"]] == METHODS
    quantities = {
        *("accuracy", "sparsity", "inputs_used", "l1_norm", "l2_norm", "largest_weight", "data_loss", "objective"),
        *("kkt_residual", "strength_scale", "step_time"),
    }
    for entry in document["methods"]:
        assert set(entry["mean"]) == set(entry["std"]) == quantities
        assert [run["seed"] for run in entry["runs"]] == [0, 1]
        for q in quantities:
            values = [run[q] for run in entry["runs"]]
            assert entry["mean"][q] == pytest.approx(np.mean(values))
            assert entry["std"][q] == pytest.approx(np.std(values, ddof=1))


def test_results_repeat_for_a_seed_whatever_the_callers_state(small, tmp_path):
    document, _, path = small
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = run_json(["compare", "--data", str(path), *SMALL, "--logdir", str(tmp_path / "again")])
    assert without_varying(again) == without_varying(document)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_methods_share_initial_weights_and_batches(tmp_path):
    path = mnist_like(tmp_path / "toy.npz")
    document = run_json(
        [
            "compare",
            "--data",
            str(path),
            *SMALL,
            "--l1",
            "0",
            "--l2",
            "0",
            "--no-figure",
            "--logdir",
            str(tmp_path / "r"),
        ]
    )
    norms = results(document, "l2_norm")
    for name, norm in norms.items():
        same = "l1-loss-adam" if "adam" in name else "none"
        assert norm == pytest.approx(norms[same], rel=1e-6)
    assert norms["l1-loss-adam"] != norms["none"]
    assert "too small" in document["conclusion"][0]


def test_default_strengths_fall_with_the_root_of_the_samples(small):
    assert small[0]["settings"]["l1"] == pytest.approx(0.02 / 200**0.5, rel=0.05)
    assert small[0]["settings"]["batch"] == 128


def test_divergence_is_said_and_stays_valid_json(tmp_path):
    path = mnist_like(tmp_path / "toy.npz")
    arguments = ["compare", "--data", str(path), *SMALL, "--lr", "1e30", "--logdir", str(tmp_path / "runs")]
    document = run_json(arguments)
    assert results(document, "l2_norm")["none"] is None
    assert document["conclusion"][0].startswith("Diverged: no penalty")


# compare: what people see


def test_table_conclusion_and_paths_are_printed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = mnist_like(tmp_path / "toy.npz")
    assert main(["compare", "--data", str(path), *SMALL, "--logdir", str(tmp_path / "runs")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar unless stderr is a terminal
    for heading in ("accuracy %", "zeros %", "inputs used", "‖w‖₁", "‖w‖₂", "max |w|", "KKT residual", "µs/step"):
        assert heading in captured.out
    rows = [line for line in captured.out.splitlines() if "±" in line]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == LABELS
    assert "Want zeros?" in captured.out
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in captured.out
    assert f"figure: {tmp_path / 'runs' / 'compare.png'}" in captured.out


def test_figure_is_a_png_of_readable_size(digits):
    document, logdir = digits
    assert document["figure"] == str(logdir / "compare.png")
    content = (logdir / "compare.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-12:] == b"\0\0\0\0IEND\xaeB`\x82"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1400, 600)
    assert len(content) < 150_000


def test_no_figure_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["compare", "--data", path, "--steps", "2", "--seeds", "1", "--logdir", tmp_path / "runs"]
    assert_refused(capsys, arguments, "torchreg-sparse[plots]", "--no-figure")
    assert not (tmp_path / "runs").exists()
    assert main([*map(str, arguments), "--no-figure"]) == 0
    assert not (tmp_path / "runs" / "compare.png").exists()


def test_missing_scikit_learn_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_refused(capsys, ["compare", "--no-figure", "--logdir", tmp_path / "r"], "torchreg-sparse[sklearn]", "--data")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("method", METHODS)
def test_tensorboard_reads_curves_and_hparams(small, method):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    _, logdir, _ = small
    assert {p.name for p in logdir.iterdir() if p.is_dir()} == {f"{m}-seed{k}" for m in METHODS for k in (0, 1)}
    directory = logdir / f"{method}-seed1"
    assert all(p.is_file() for p in directory.iterdir())  # hparams made no run of their own
    events = EventAccumulator(str(directory)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/data", "loss/penalty", "accuracy/test", "lr", "sparsity/total", "sparsity/0.weight"} <= tags
    assert {"mask/0.weight", "mask/2.weight"} <= set(events.Tags()["images"])
    assert {"weights/0.weight", "weights/2.weight"} <= set(events.Tags()["histograms"])
    texts = {"torchreg/penalties/text_summary", "torchreg/sparsity/text_summary", "custom_scalars__config__"}
    assert texts <= set(events.Tags()["tensors"])
    assert [e.step for e in events.Scalars("final/accuracy")] == [30], "where the curves end"
    assert [e.step for e in events.Scalars("accuracy/test")] == list(range(3, 31, 3))
    result = next(m for m in small[0]["methods"] if m["method"] == method)["runs"][1]
    assert events.Scalars("accuracy/test")[-1].value == pytest.approx(result["accuracy"])
    assert events.Scalars("sparsity/total")[-1].value == pytest.approx(result["sparsity"])
    assert events.Scalars("final/accuracy")[-1].value == pytest.approx(result["accuracy"])
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    hparams = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert hparams["method"].string_value == method
    assert hparams["seed"].number_value == 1
    assert (hparams["l1"].number_value > 0) == ("l1" in method or "elastic" in method)
    assert (hparams["l2"].number_value > 0) == ("l2" in method or "elastic" in method)
    assert sorted(hparams)[:4] == ["l1", "l2", "method", "seed"]  # TensorBoard's table opens with the first five


def test_prox_runs_log_their_threshold(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(small[1] / "l1-prox-seed0")).Reload().Tags()["scalars"]
    assert any(tag.startswith("threshold/") for tag in tags)


# compare: a target instead of a strength, and a refit


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    """60 % zeros asked for, on data that needs few weights, and a refit of 20 steps (one an epoch)."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("refitted")
    path, logdir = mnist_like(folder / "toy.npz"), folder / "runs"
    options = ["--target", "0.6", "--refit", "20", "--logdir", str(logdir)]
    return run_json(["compare", "--data", str(path), *SMALL, *options]), logdir, path


def test_the_proximal_methods_reach_the_target(refitted):
    sparsity = results(refitted[0], "sparsity")
    for name in METHODS:
        assert sparsity[name] == pytest.approx(0.6 if name in PROXIMAL else 0, abs=0.005)


def test_the_strength_that_a_target_needed_is_told_and_judged_by(refitted):
    document = refitted[0]
    scale = results(document, "strength_scale")
    assert all(scale[name] == 1 for name in METHODS if name not in PROXIMAL)
    assert all(scale[name] > 0 and scale[name] != 1 for name in PROXIMAL)
    l1 = document["settings"]["l1"] * scale["l1-prox"]
    assert f"60.0 % zeros were held at these strengths: l1 = {l1:.1e} ±" in document["notes"][0]
    assert "missed" not in document["notes"][0]
    run = next(m for m in document["methods"] if m["method"] == "l1-prox")["runs"][0]
    penalty = document["settings"]["l1"] * run["strength_scale"] * run["l1_norm"]
    assert run["objective"] == pytest.approx(run["data_loss"] + penalty, rel=1e-4)


def test_the_strength_told_is_the_median_since_the_target_was_reached(tmp_path, monkeypatch):
    scales = []
    step = torchreg.TargetSparsity.step

    def recorded(self):
        step(self)
        scales.append(float(self.optimizer.param_groups[0]["strength_scale"]))

    monkeypatch.setattr(torchreg.TargetSparsity, "step", recorded)
    path = mnist_like(tmp_path / "toy.npz")
    options = ["--target", "0.5", "--steps", "9", "--seeds", "1", "--no-figure", "--logdir", str(tmp_path / "r")]
    document = run_json(["compare", "--data", str(path), *options])
    told = results(document, "strength_scale")
    for i, name in enumerate(PROXIMAL):
        assert told[name] == pytest.approx(np.median(scales[9 * i + 3 : 9 * i + 9]))  # from the 4th step on


def test_a_target_that_is_missed_is_said_once(tmp_path, capsys, recwarn):
    """After one step with a learning rate of 1e-30 no weight has moved, but for those that no strength spares."""
    path = mnist_like(tmp_path / "toy.npz")
    options = ["--target", "0.9", "--l1", "1e-30", "--lr", "1e-30", "--steps", "2", "--seeds", "1", "--no-figure"]
    assert main(["compare", "--data", str(path), *options, "--logdir", str(tmp_path / "r")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not recwarn.list
    assert re.search(r"\(L1 by\s+ProxSGD,\s+missed:\s+0\.0\s+%\)", captured.out)


def test_a_refit_keeps_the_zeros_and_fits_the_other_weights(refitted):
    sparsity, loss = results(refitted[0], "sparsity"), results(refitted[0], "data_loss")
    for name in PROXIMAL:
        assert sparsity[f"{name}-refit"] == sparsity[name]
        assert loss[f"{name}-refit"] < 0.9 * loss[name]
    used = results(refitted[0], "inputs_used")
    assert all(used[f"{name}-refit"] == used[name] for name in PROXIMAL)


def test_refits_stand_after_their_method_and_have_no_kkt_residual(refitted):
    document = refitted[0]
    expected = [row for name in METHODS for row in ([name, f"{name}-refit"] if name in PROXIMAL else [name])]
    assert [entry["method"] for entry in document["methods"]] == expected
    for entry in document["methods"]:
        assert (entry["mean"]["kkt_residual"] is None) == entry["method"].endswith("-refit")
    assert "20 more epochs without a penalty" in document["notes"][1]


def test_a_refit_changes_nothing_before_it(refitted, tmp_path):
    document, _, path = refitted
    options = ["--target", "0.6", "--no-figure", "--logdir", str(tmp_path / "r")]
    alone = run_json(["compare", "--data", str(path), *SMALL, *options])
    for quantity in ("accuracy", "sparsity", "objective"):
        before, after = results(alone, quantity), results(document, quantity)
        assert {name: after[name] for name in METHODS} == before


def test_tables_show_refits_beneath_their_methods(tmp_path, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    options = [*SMALL, "--refit", "1", "--no-figure", "--logdir", str(tmp_path / "r")]
    assert main(["compare", "--data", str(path), *options]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip())[0] for line in out.splitlines() if "±" in line]
    labelled = zip(LABELS, METHODS, strict=True)
    assert rows == [row for label, name in labelled for row in ([label, "refitted"] if name in PROXIMAL else [label])]
    assert "1 more epoch without a penalty" in out


def test_tensorboard_shows_the_refit_after_the_training(refitted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    document, logdir, _ = refitted
    events = EventAccumulator(str(logdir / "l1-prox-seed1")).Reload()
    assert {"mask/0.weight", "mask/2.weight"} <= set(events.Tags()["images"])
    assert {"weights/0.weight", "weights/2.weight"} <= set(events.Tags()["histograms"])
    texts = {"torchreg/penalties/text_summary", "torchreg/sparsity/text_summary", "custom_scalars__config__"}
    assert texts <= set(events.Tags()["tensors"])
    assert [e.step for e in events.Scalars("final/accuracy")] == [50], "where the curves end"
    assert [e.step for e in events.Scalars("accuracy/test")] == list(range(3, 51, 3))
    entries = {m["method"]: m["runs"][1] for m in document["methods"]}
    assert events.Scalars("final/accuracy")[-1].value == pytest.approx(entries["l1-prox"]["accuracy"])
    assert events.Scalars("refit/accuracy")[-1].value == pytest.approx(entries["l1-prox-refit"]["accuracy"])
    loss = {e.step: e.value for e in events.Scalars("loss/data")}
    assert max(loss) == 50
    plain = EventAccumulator(str(logdir / "l1-loss-seed1")).Reload()
    assert max(e.step for e in plain.Scalars("loss/data")) == 30


@pytest.mark.parametrize("options", [["--target", "0"], ["--target", "0.9999"], ["--l1", "1e3"], ["--lr", "1e30"]])
def test_extreme_targets_and_empty_or_diverged_networks_are_refitted_quietly(options, tmp_path, capsys, recwarn):
    path = mnist_like(tmp_path / "toy.npz")
    options = [*options, "--refit", "1", "--steps", "3", "--seeds", "1", "--hidden", "4"]
    assert main(["compare", "--data", str(path), *options, "--logdir", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().err == ""
    assert not recwarn.list


# compare: bad input


def test_a_logdir_with_such_runs_is_refused(small, capsys):
    _, logdir, path = small
    before = sorted(logdir.rglob("*"))
    assert_refused(capsys, ["compare", "--data", path, *SMALL, "--logdir", logdir], "already holds")
    assert sorted(logdir.rglob("*")) == before


def test_a_logdir_below_a_file_is_refused(tmp_path, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    assert_refused(capsys, ["compare", "--data", path, *SMALL, "--logdir", path / "runs"], "logdir")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_logdir_is_refused(tmp_path, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for logdir in (closed, closed / "runs"):
        assert_refused(capsys, ["compare", "--data", path, *SMALL, "--logdir", logdir], "logdir")


@pytest.mark.parametrize(
    "option",
    [
        *(("--seeds", "0"), ("--seeds", "x"), ("--seeds", "1.5"), ("--steps", "0"), ("--steps", "-3")),
        *(
            ("--seeds", "1000000000"),
            ("--steps", "1" + "0" * 400),
            ("--hidden", "0"),
            ("--hidden", "99999999"),
            ("--l1", "-0.1"),
            ("--l1", "nan"),
            ("--l1", "inf"),
            *(("--adam-lr", "0"), ("--adam-lr", "fast"), ("--target", "1"), ("--target", "-0.1"), ("--target", "90")),
            *(("--target", "nan"), ("--target", "90%"), ("--target",), ("--target", "0.9", "--l1", "0")),
            *(("--refit", "0"), ("--refit", "-2"), ("--refit", "1.5"), ("--refit", "1" + "0" * 30)),
        ),
        *(("--l2", "-1e-9"), ("--l2", "much"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--unknown",)),
        *(("--seeds",), ("extra",)),
    ],
    ids=lambda option: " ".join(option)[:30],
)
def test_bad_options_are_refused(option, tmp_path, capsys):
    logdir = tmp_path / "runs"
    assert_refused(capsys, ["compare", "--logdir", logdir, "--no-figure", *option], option[0])
    assert not logdir.exists()


NOT_NUMBERS = np.array([["a"] * 36] * 200)
BAD_ARRAYS = {
    "missing array": ({"y_test": None}, "y_test"),
    "no array": ({"x_train": None, "y_train": None, "x_test": None, "y_test": None}, "no array"),
    "object array": ({"x_train": np.array([[object()] * 36] * 200, dtype=object)}, "can't be read"),
    "text": ({"x_train": NOT_NUMBERS}, "x_train must hold real numbers"),
    "complex": ({"x_train": np.ones((200, 6, 6), dtype=complex)}, "x_train must hold real numbers"),
    "other number of labels": ({"y_train": np.zeros(7, dtype=int)}, "y_train has 7"),
    "other features": ({"x_test": np.ones((60, 5, 5))}, "(5, 5)"),
    "flat inputs": ({"x_train": np.ones(200)}, "x_train must have the shape"),
    "no features": ({"x_train": np.ones((200, 0))}, "x_train must have the shape"),
    "0-d": ({"x_train": np.float64(3)}, "x_train must have the shape"),
    "NaN": ({"x_train": np.full((200, 6, 6), np.nan)}, "x_train holds NaN"),
    "infinite": ({"x_test": np.full((60, 6, 6), np.inf)}, "x_test holds infinite"),
    "all zeros": ({"x_train": np.zeros((200, 6, 6))}, "all zeros"),
    "too large for the scale": ({"x_test": np.full((60, 6, 6), 1e300)}, "too large"),
    "fractional labels": ({"y_train": np.full(200, 0.5)}, "integer class labels"),
    "one-hot labels": ({"y_train": np.zeros((200, 3), dtype=int)}, "y_train must have the shape"),
    "one class": ({"y_train": np.zeros(200, dtype=int)}, "one class only"),
    "ids as labels": ({"y_train": np.arange(200)}, "are these class labels"),
    "unknown test label": ({"y_test": np.full(60, 9)}, "label 9"),
    "no samples": ({"x_train": np.ones((0, 6, 6)), "y_train": np.zeros(0, dtype=int)}, "0 samples"),
    "too few samples": ({"x_test": np.ones((3, 6, 6)), "y_test": np.zeros(3, dtype=int)}, "3 samples"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_arrays_are_refused(case, tmp_path, capsys):
    replaced, words = BAD_ARRAYS[case]
    path = mnist_like(tmp_path / "bad.npz", **replaced)
    logdir = tmp_path / "runs"
    assert_refused(capsys, ["compare", "--data", path, "--no-figure", "--logdir", logdir], words)
    assert not logdir.exists()


def test_malformed_data_files_are_refused(tmp_path, capsys):
    whole = mnist_like(tmp_path / "toy.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.ones(3))
    files = {
        "text.npz": b"no arrays here\n",
        "empty.npz": b"",
        "truncated.npz": whole[: len(whole) // 2],
        "damaged.npz": whole[:300] + b"\xff" * 40 + whole[340:],
        "pickled.npz": pickle.dumps({"x_train": 1}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "single.npy", "missing.npz", "."):
        assert_refused(
            capsys, ["compare", "--no-figure", "--data", tmp_path / name, "--logdir", tmp_path / "r"], "--data"
        )
    assert not (tmp_path / "r").exists()


def test_labels_need_not_start_at_zero_and_may_be_a_column(tmp_path):
    """As in CIFAR's Keras arrays, and in data whose classes are numbered from 1."""
    rng = np.random.default_rng(0)
    labels = {"y_train": rng.integers(1, 4, (200, 1)) * 10, "y_test": rng.integers(1, 4, (60, 1)) * 10}
    path = mnist_like(tmp_path / "toy.npz", **labels)
    document = run_json(
        ["compare", "--data", str(path), "--steps", "3", "--seeds", "1", "--no-figure", "--logdir", str(tmp_path / "r")]
    )
    assert document["data"]["classes"] == 3
    assert all(value is None for entry in document["methods"] for value in entry["std"].values())


@pytest.mark.parametrize("shape", [(5, 4, 3), (7,), pytest.param((3,), marks=pytest.mark.slow)])
def test_data_of_any_shape_gets_a_figure(shape, tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    images = {"x_train": rng.normal(size=(200, *shape)), "x_test": rng.normal(size=(60, *shape))}
    path = mnist_like(tmp_path / "toy.npz", **images)
    arguments = ["--steps", "3", "--seeds", "1", "--l1", "3", "--logdir", str(tmp_path / "r")]
    document = run_json(["compare", "--data", str(path), *arguments])
    assert Path(document["figure"]).is_file()


# compare: failures amid the work


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("no memory. Sorry"), MemoryError(), OSError(28, "full")]
)
def test_a_failure_leaves_nothing_and_no_traceback(error, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("torchreg.cli.training.accuracy", fail)
    path = mnist_like(tmp_path / "toy.npz")
    (tmp_path / "old").mkdir()
    for logdir in ("new/runs", "old"):
        arguments = ["compare", "--data", path, *SMALL, "--no-figure", "--json", "--logdir", tmp_path / logdir]
        if isinstance(error, KeyboardInterrupt):
            assert main([str(a) for a in arguments]) == 130
            assert capsys.readouterr() == ("", "")
        else:
            assert_refused(capsys, arguments, "failed: ")
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "old").iterdir()) == []


def test_huge_rates_are_refused_in_one_line(tmp_path, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    arguments = ["compare", "--data", path, *SMALL, "--json", "--no-figure", "--logdir", tmp_path / "r"]
    assert_refused(capsys, [*arguments, "--lr", "1e308"], "the training failed")
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("limit", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(limit, tmp_path):
    path = mnist_like(tmp_path / "toy.npz")
    arguments = ["compare", "--data", path, *SMALL, "--json", "--no-figure", "--logdir", tmp_path / "r"]
    limited = ("bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash")
    assert_one_line(program(*arguments, before=limited), "failed: File too large")
    assert not (tmp_path / "r").exists()


def test_results_are_printed_even_if_the_figure_fails(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def fail(*args):
        raise OSError(28, "No space left")

    monkeypatch.setattr("torchreg.cli.figure.compare_figure", fail)
    path = mnist_like(tmp_path / "toy.npz")
    arguments = ["compare", "--data", str(path), *SMALL, "--json", "--logdir", str(tmp_path / "r")]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == "torchreg compare: warning: the figure failed: No space left\n"
    assert json.loads(captured.out)["figure"] is None


@pytest.mark.parametrize("name", ["a$\\frac$b", "\x1b[2J\n", "日本", os.fsdecode(b"\xff")], ids=ascii)
def test_data_of_any_name_gets_a_figure_and_a_heading(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = mnist_like(tmp_path / f"{name}.npz")
    logdir = tmp_path / "run's"
    arguments = ["--steps", "3", "--seeds", "1", "--logdir", str(logdir)]
    assert main(["compare", "--data", str(path), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{printable(name)}: 200 training")
    assert f"figure: {logdir}" in captured.out
    assert f"tensorboard --logdir {shlex.quote(str(logdir))}\n" in captured.out


def test_a_logdir_that_is_not_utf8_is_refused(tmp_path, capsys):
    path = mnist_like(tmp_path / "toy.npz")
    logdir = tmp_path / os.fsdecode(b"\xff")
    assert_refused(capsys, ["compare", "--data", path, "--no-figure", "--logdir", logdir], "is not UTF-8")


def test_the_table_fits_130_columns_and_shows_every_deviation():
    fields = dict.fromkeys(QUANTITIES, 0.5) | {
        "inputs_used": 433,
        "l1_norm": 1234.0,
        "l2_norm": 23.0,
        "step_time": 1e-3,
    }
    runs = [Result(seed=k, **{name: value * (1 + k / 4) for name, value in fields.items()}) for k in (0, 1)]
    names = [*METHODS, *(f"{name}-refit" for name in PROXIMAL)]
    lines = table(dict.fromkeys(names, runs)).splitlines()
    assert max(map(len, lines)) <= 130
    assert [line.count("±") for line in lines[2:]] == [8] * 7 + [7] * 3
