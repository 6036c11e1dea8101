"""Features are dropped one after the other, for good and exactly; those that matter stay."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import DataConversionWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from torchreg import FeatureSelector, GroupLasso
from torchreg.features.path import FeaturePath, Shrinking, chosen_count
from torchreg.features.reweighting import reweighted_columns

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
FAST: dict[str, Any] = {
    "hidden": (32,),
    "growth": 1.3,
    "steps_per_strength": 10,
    "dense_epochs": 5,
    "epochs": 20,
    "learning_rate": 3e-3,
    "random_state": 0,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:1000], y[:1000], x[1000:], y[1000:]


@pytest.fixture(scope="module")
def fitted(digits):
    return FeatureSelector(12, **FAST).fit(*digits[:2])


def three_of_many(task: str) -> tuple[Any, Any, set[int]]:
    """Targets that depend on three features of 20, in ways that a line doesn't show."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 20))
    signal = np.abs(x[:, 3]) + x[:, 7] * np.sign(x[:, 11]) - 0.8
    return x, signal + 0.05 * rng.standard_normal(600) if task == "regression" else signal > 0, {3, 7, 11}


def test_check_estimator() -> None:
    quick = FeatureSelector(
        steps_per_strength=2, growth=2.0, epochs=3, dense_epochs=2, hidden=(8,), random_state=0, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(quick, on_fail=None, on_skip=None)
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    assert sum(r["status"] == "passed" for r in results) >= 40


def test_along_the_path_features_only_leave_and_exactly(fitted):
    path = fitted.path_
    assert path.n_features[0] == 64
    assert path.n_features[-1] <= 12 < path.n_features[-2]
    assert (np.diff(path.n_features) <= 0).all()
    assert (np.diff(path.strengths) > 0).all()
    assert path.strengths[0] == 0
    for i in range(1, len(path)):
        assert not (path.support(i) & ~path.support(i - 1)).any()
        assert (path.norms[i][~path.support(i)] == 0).all()
    assert np.isfinite(path.scores).all()
    assert path.scores[0] > 0.9


def test_what_is_selected_is_what_was_left_last(fitted):
    path, support = fitted.path_, fitted.get_support()
    assert support.sum() == fitted.n_features_ == 12
    assert not (path.support(len(path) - 1) & ~support).any()
    assert not (support & ~path.support(len(path) - 2)).any()
    np.testing.assert_array_equal(fitted.ranking_ == 1, support)
    assert sorted(fitted.ranking_[~support]) == list(range(2, 54))
    assert set(path.ranking()[:12]) == set(np.flatnonzero(support))


def test_a_ranking_goes_by_survival_and_then_by_norms():
    norms = np.array([[5.0, 1.0, 3.0, 2.0, 9.0], [4.0, 0.0, 3.0, 2.0, 0.0], [0.0, 0.0, 1.0, 2.0, 0.0]])
    path = FeaturePath(np.arange(3.0), (norms > 0).sum(1), np.ones(3), np.ones(3), norms)
    assert path.ranking().tolist() == [3, 2, 0, 4, 1]
    assert path.ranking(1).tolist() == [0, 2, 3, 4, 1]
    assert path.ranking(0).tolist() == [4, 0, 2, 3, 1]


def test_predictions_read_the_selected_features_only(fitted, digits):
    _, _, x, y = digits
    other = np.where(fitted.get_support(), x, 1e6)
    np.testing.assert_array_equal(fitted.predict(x), fitted.predict(other))
    assert fitted.score(x, y) > 0.75
    assert fitted.transform(x).shape == (len(x), 12)
    back = fitted.inverse_transform(fitted.transform(x))
    np.testing.assert_array_equal(back, np.where(fitted.get_support(), x, 0))
    np.testing.assert_allclose(fitted.predict_proba(x).sum(1), 1, rtol=1e-5)
    assert fitted.get_feature_names_out().tolist() == [f"x{i}" for i in fitted.get_support(indices=True)]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_features_that_matter_are_found(task):
    x, y, relevant = three_of_many(task)
    selector = FeatureSelector(3, **FAST).fit(x[:400], y[:400])
    assert selector.task_ == task
    assert set(selector.get_support(indices=True)) == relevant
    assert selector.score(x[400:], y[400:]) > 0.75
    assert selector.predict(x).shape == y.shape
    assert hasattr(selector, "predict_proba") == hasattr(selector, "classes_") == (task == "classification")


def test_validation_chooses_how_many(digits):
    x, y, relevant = three_of_many("regression")
    few = FeatureSelector(**FAST).fit(x, y)
    assert relevant <= set(few.get_support(indices=True))
    assert few.n_features_ <= 6
    assert few.path_.n_features[-1] <= 1
    path = FeaturePath(
        np.arange(4.0), np.array([9, 6, 3, 1]), np.array([0.8, 0.9, 0.87, 0.5]), np.array([0, 0.04, 0, 0]), None
    )
    assert chosen_count(path, "best") == 6
    assert chosen_count(path, "one_se") == 3


def test_units_of_features_do_not_matter():
    x, y, relevant = three_of_many("classification")
    scaled = x * np.logspace(-8, 8, 20) + 5
    assert set(FeatureSelector(3, **FAST).fit(scaled, y).get_support(indices=True)) == relevant


def test_the_same_random_state_gives_the_same_and_torchs_generator_is_left_alone(fitted, digits):
    state = torch.get_rng_state()
    again = FeatureSelector(12, **FAST).fit(*digits[:2])
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again.path_.norms, fitted.path_.norms)
    np.testing.assert_array_equal(again.predict_proba(digits[2]), fitted.predict_proba(digits[2]))
    other = clone(again).set_params(random_state=1).fit(*digits[:2])
    assert not np.array_equal(other.path_.norms[0], fitted.path_.norms[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: default_dtype(torch.float64)])
def test_modes_of_torch_outside_do_not_matter(digits, mode):
    x, y = digits[0][:200], digits[1][:200]
    quick = FAST | {"epochs": 2, "growth": 3.0}
    plain = FeatureSelector(20, **quick).fit(x, y)
    with mode():
        same = FeatureSelector(20, **quick).fit(x, y)
    assert same.n_features_ == plain.n_features_ == 20
    assert {p.dtype for p in same.network_.parameters()} == {torch.float32}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_narrowing_the_layer_changes_nothing_but_the_time(digits, monkeypatch):
    settings = FAST | {"growth": 2.0, "steps_per_strength": 4, "epochs": 1}
    narrow = FeatureSelector(20, **settings).fit(*digits[:2])
    make = Shrinking.__init__

    def wide_only(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.narrows = False

    monkeypatch.setattr(Shrinking, "__init__", wide_only)
    wide = FeatureSelector(20, **settings).fit(*digits[:2])
    np.testing.assert_array_equal(wide.path_.n_features, narrow.path_.n_features)
    np.testing.assert_allclose(wide.path_.norms, narrow.path_.norms, rtol=1e-3, atol=1e-4)


class Residual(nn.Module):
    """A network with a layer beside the first, which is left out of the path unless it reads the features."""

    def __init__(self, features: int, outputs: int, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.last = nn.Linear(16, outputs)
        self.skip = nn.Linear(features, outputs)
        self.first = nn.Linear(features, 16)

    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return y + self.skip(x) if self.reads else y


def test_a_network_of_the_users_own(digits):
    selector = FeatureSelector(12, network=lambda d, k: Residual(d, k, False), **FAST).fit(*digits[:2])
    assert selector.network_.first.in_features == 12
    assert selector.score(*digits[2:]) > 0.7
    assert (np.diff(selector.path_.n_features) <= 0).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d, k: Residual(d, k, True), "with 2 of them"),
        (lambda d, k: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, k)), "given the input itself"),
        (lambda d, k: nn.Linear(d, k + 1), "to give 10 numbers for each sample"),
        (lambda d, k: nn.Linear(d, k).requires_grad_(False), "input layer is trained"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(digits, make, words):
    with pytest.raises(ValueError, match=words):
        FeatureSelector(12, network=make, **FAST).fit(*digits[:2])


def test_what_is_no_network_is_refused(digits):
    with pytest.raises(TypeError, match=r"to return a torch\.nn\.Module, got int"):
        FeatureSelector(12, network=lambda d, k: 3, **FAST).fit(*digits[:2])


def test_counts_may_be_parts_and_all(digits):
    x, y = digits[0][:100], digits[1][:100]
    quick = FAST | {"epochs": 2, "dense_epochs": 1}
    assert FeatureSelector(0.25, **quick).fit(x, y).n_features_ == 16
    assert FeatureSelector(1.0, **quick).fit(x, y).get_support().all()
    assert FeatureSelector(64, **quick).fit(x, y).path_.n_features.tolist() == [64]
    assert FeatureSelector(1, **(quick | {"hidden": ()})).fit(x, y).n_features_ == 1


def test_it_goes_into_pipelines_and_copies(fitted, digits):
    x, y, x_test, _ = digits
    pipeline = make_pipeline(FeatureSelector(12, **FAST), LogisticRegression(max_iter=50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert clone(pipeline).fit(x, y).predict(x_test).shape == (len(x_test),)
    for twin in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(twin.predict(x_test), fitted.predict(x_test))


def test_given_validation_data_judge_and_are_not_trained_on(digits):
    x, y, x_val, y_val = digits
    quick = FAST | {"epochs": 2}
    given = FeatureSelector(30, **quick).fit(x, y, X_val=x_val, y_val=y_val)
    other = FeatureSelector(30, **quick).fit(x, y, X_val=x_val[:50], y_val=(y_val[:50] + 1) % 10)
    np.testing.assert_array_equal(given.path_.norms, other.path_.norms)
    assert given.path_.scores[0] > 0.8 > other.path_.scores[0]
    none = FeatureSelector(30, **quick, validation_fraction=0).fit(x, y)
    assert np.isnan(none.path_.scores).all()


def test_tensors_strings_and_several_targets(digits):
    x, y = digits[0][:300], digits[1][:300]
    quick = FAST | {"epochs": 2}
    arrays = FeatureSelector(9, **quick).fit(x, y)
    tensors = FeatureSelector(9, **quick).fit(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_array_equal(arrays.predict(x), tensors.predict(torch.from_numpy(x)))
    names = np.array([f"digit {i}" for i in range(10)], dtype=object)
    assert FeatureSelector(9, **quick).fit(x, names[y]).predict(x[:3])[0].startswith("digit")
    with pytest.warns(DataConversionWarning):
        column = FeatureSelector(9, **quick).fit(x, y[:, None], X_val=x, y_val=y[:, None])
    assert column.predict(x).shape == (300,)
    several = FeatureSelector(9, **quick).fit(x, np.c_[y + 0.5, -y])
    assert several.predict(x).shape == (300, 2)


@pytest.mark.parametrize(
    ("settings", "data", "words"),
    [
        ({"n_features_to_select": 65}, {}, "n_features_to_select=65 must be at most the number of features, 64"),
        ({"n_features_to_select": 0}, {}, "'n_features_to_select' parameter"),
        ({"n_features_to_select": 1.5}, {}, "'n_features_to_select' parameter"),
        ({"growth": 1.0}, {}, "'growth' parameter"),
        ({"hidden": (8, 0)}, {}, "`hidden` to hold positive widths"),
        ({"validation_fraction": 0}, {}, "validation data have to choose"),
        ({}, {"X_val": np.ones((3, 64))}, "both of `X_val` and `y_val`"),
        ({}, {"X_val": np.ones((3, 64)), "y_val": [0, 1, 99]}, "y_val has labels that are not in y"),
        ({"task": "classification"}, {"y": np.linspace(0, 1, 100)}, "Unknown label type"),
        ({}, {"y": np.zeros(100)}, "number of classes has to be greater than one"),
        ({}, {"X": np.full((100, 64), np.nan)}, "contains NaN"),
        ({}, {"y": np.zeros(99)}, "inconsistent numbers of samples"),
        ({"standardize": False, "n_features_to_select": 3}, {"X": np.full((100, 64), 1e38)}, "became NaN or infinite"),
    ],
)
def test_bad_input_is_refused(digits, settings, data, words):
    x, y = data.pop("X", digits[0][:100]), data.pop("y", digits[1][:100])
    with pytest.raises(ValueError, match=words):
        FeatureSelector(**(FAST | settings)).fit(x, y, **data)


def test_the_reweighted_penalty_shrinks_by_relative_norms():
    w = torch.tensor([[3.0, 0.6, 0.0], [4.0, 0.8, 0.0]])  # norms 5, 1 and 0, mean 3
    torch.testing.assert_close(reweighted_columns(0.0).prox(w, 0.5), GroupLasso(0.5, "columns", "none").prox(w))
    shrunk = reweighted_columns(1.0).prox(w, 0.1)
    torch.testing.assert_close(shrunk.norm(dim=0), torch.tensor([5 - 0.1 * 3 / 5, 1 - 0.1 * 3.0, 0.0]))
    assert not torch.signbit(shrunk[:, 2]).any()
    assert (reweighted_columns(1.0).prox(w, 0.4)[:, 1] == 0).all()
    assert torch.isnan(reweighted_columns(1.0).prox(torch.full((2, 2), torch.nan), 0.1)).all()


def test_the_pages_code_runs(monkeypatch):
    for name in ("growth", "steps_per_strength", "dense_epochs", "epochs", "learning_rate"):
        monkeypatch.setitem(FeatureSelector.__init__.__kwdefaults__, name, FAST[name])
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert found["X_ten"].shape[1] == 10
    assert found["selector"].score(found["X_test"], found["y_test"]) > 0.75
    assert 10 < found["chosen"].n_features_ < 64


def test_only_the_selector_needs_scikit_learn() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import torchreg; print('imported'); torchreg.FeatureSelector"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n"
    assert (
        "ImportError: torchreg.FeatureSelector needs scikit-learn: pip install 'torchreg-sparse[sklearn]'"
        in done.stderr
    )
