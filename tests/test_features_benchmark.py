"""The benchmark of feature selection splits, judges and keeps what it says, on digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import features
    import features_data
    from features_published import PUBLISHED

QUICK = json.dumps({"growth": 2.0, "steps_per_strength": 4, "dense_epochs": 2, "epochs": 3, "learning_rate": 3e-3})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """scikit-learn's digits in the form of the files, and five features to select."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.astype(np.uint8)
    for name in ("mnist", "fashion_mnist"):
        np.savez(
            tmp_path / f"{name}.npz",
            x_train=images[:1000],
            y_train=labels[:1000],
            x_test=images[1000:],
            y_test=labels[1000:],
        )
    x = digits.data[:300, 10:40] + np.random.default_rng(0).random((300, 30))
    x[::7, 3] = np.nan
    np.savez(tmp_path / "mice_protein.npz", x=x, y=labels[:300])
    monkeypatch.setattr(features, "FEATURES", 5)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_splits_are_those_of_the_protocols(folder):
    split = features_data.load(folder, "MNIST", False, 0)
    assert (len(split.y), len(split.y_judge)) == (637, 160)
    assert split.x.max() <= 1
    other = features_data.load(folder, "MNIST", False, 1)
    assert not np.array_equal(split.y_judge, other.y_judge)
    whole = features_data.load(folder, "MNIST", True, 0)
    assert (len(whole.y), len(whole.y_judge)) == (1000, 797)
    mice = features_data.load(folder, "Mice Protein", False, 0)
    assert np.isfinite(mice.x).all()
    assert (mice.x.min(), mice.x.max()) == (0, 1)
    held_out = whole.validation(0, 100)
    assert (len(held_out.y), len(held_out.y_judge)) == (900, 100)
    np.testing.assert_array_equal(np.sort(np.r_[held_out.y, held_out.y_judge]), np.sort(whole.y))


def test_figures_are_kept_judged_and_printed(folder, monkeypatch, capsys):
    monkeypatch.setattr(features.features_lassonet, "is_installed", lambda: True)
    monkeypatch.setattr(
        features.features_lassonet,
        "run",
        lambda split, k, width, seed: {"accuracy": 0.5, "seconds": 9.0, "features": [1, 2, 3]},
    )
    monkeypatch.setitem(features.BARS["whole"], "MNIST", 0.1)
    kept = folder / "kept.json"
    arguments = ["--data", str(folder), "--settings", QUICK, "--json", str(kept), "--seeds", "0", "1"]
    arguments += ["--lassonet-seeds", "0"]
    status = features.main([*arguments, "--only", "MNIST"])
    printed = capsys.readouterr().out
    document = json.loads(kept.read_text())
    for protocol, results in document["protocols"].items():
        runs = results["MNIST"]["torchreg"]
        assert list(runs) == ["0", "1"]
        for run in runs.values():
            assert len(run["features"]) == 5
            assert 0.1 < run["accuracy"] < 1
        assert ("lassonet" in results["MNIST"]) == (protocol != "whole")
    assert set(document["protocols"]["LassoNet's"]["MNIST"]["lassonet"]["0"]) == {
        "accuracy",
        "seconds",
        "features",
        "refitted",
    }
    assert "0.100 met" in printed
    assert "0.915 MISSED" in printed
    assert status == 1
    assert features.main([*arguments, "--only", "Mice Protein", "--protocols", "LassoNet's", "--lassonet-seeds"]) == 1
    again = json.loads(kept.read_text())["protocols"]
    assert again["whole"] == document["protocols"]["whole"]
    assert set(again["LassoNet's"]) == {"MNIST", "Mice Protein"}


def test_validation_never_looks_at_the_test_images(folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        features,
        "ours",
        lambda split, *_, **__: seen.append(split) or {"accuracy": 0.5, "seconds": 1.0, "features": []},
    )
    arguments = ["--data", str(folder), "--validate", "--only", "MNIST", "--protocols", "whole", "--seeds", "0"]
    assert features.main([*arguments, "--lassonet-seeds"]) == 0
    assert [(len(split.y), len(split.y_judge)) for split in seen] == [(834, 166)]
    assert "MISSED" not in capsys.readouterr().out


def test_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        features.main(["--data", str(tmp_path), "--only", "Mice Protein"])
    assert "no mice_protein.npz in" in capsys.readouterr().err


def test_published_figures_are_about_what_is_measured():
    assert {p: set(names) for p, names in PUBLISHED.items()} == {p: set(names) for p, names in features.BARS.items()}


def test_the_page_says_what_was_measured():
    page = (BENCHMARKS.parent / "docs" / "features.md").read_text(encoding="utf-8")
    kept = json.loads(features.RESULTS.read_text(encoding="utf-8"))["protocols"]
    for protocol, names in features.BARS.items():
        for name, bar in names.items():
            runs = [run["accuracy"] for run in kept[protocol][name]["torchreg"].values()]
            assert len(runs) == 3
            assert f"{name} | {np.mean(runs):.4f} ± {np.std(runs, ddof=1):.4f} |" in page
            assert np.mean(runs) >= bar
