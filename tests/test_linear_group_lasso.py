"""The group lasso against other ways to its solution: the lasso, the multi-task lasso, and torchreg's optimizers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import CASES, sparse_case
from sklearn.datasets import load_iris

import torchreg
from torchreg.linear import GroupLasso, Lasso, MultiTaskLasso
from torchreg.linear.grouped import descent as block_descent
from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.lasso.problem import Strength

SIZES = {"wide": 5, "tall": 3, "correlated": 4, "scaled": 6}
PAGE = Path(__file__).parent.parent / "docs/linear.md"


def labels(name: str) -> Any:
    """Groups of several sizes whose columns lie apart."""
    features = CASES[name]()[0].shape[1]
    return np.random.default_rng(3).permutation(np.sort(np.random.default_rng(4).integers(0, features // 4, features)))


def penalty_of(groups: Any, w: Any) -> float:
    return sum(np.sqrt((groups == g).sum()) * np.linalg.norm(w[groups == g]) for g in np.unique(groups))


def largest(x: Any, y: Any, groups: Any) -> float:
    """The strength from which on all coefficients are zero."""
    pull = (x - x.mean(0)).T @ (y - y.mean()) / len(y)
    return max(np.linalg.norm(pull[groups == g]) / np.sqrt((groups == g).sum()) for g in np.unique(groups))


def relative_gap(x: Any, y: Any, w: Any, alpha: float, groups: Any) -> float:
    """The duality gap over ‖y − ȳ‖²/n, group by group from the data themselves."""
    x, y, w = (np.asarray(a, dtype=np.float64) for a in (x, y, w))
    n, x, y = len(y), x - x.mean(0), y - y.mean()
    residual = y - x @ w
    scale = min(1.0, alpha / largest(x, residual, groups))
    energy = residual @ residual / n
    primal = energy / 2 + alpha * penalty_of(groups, w)
    return float((primal - scale * (residual @ y) / n + scale**2 * energy / 2) / (y @ y / n))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("name", CASES)
def test_the_gap_is_rounding(name: str, fraction: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(block_descent, "unavailable", lambda: "no compiler")
    x, y = CASES[name]()
    groups = labels(name)
    alpha = fraction * largest(x, y, groups)
    model = GroupLasso(alpha, groups=groups).fit(x, y)
    assert relative_gap(x, y, model.coef_, alpha, groups) < 1e-13
    assert model.dual_gap_ == pytest.approx(0, abs=1e-13 * y.var())
    for g in np.unique(groups):
        assert len(set(model.coef_[groups == g] != 0)) == 1  # together


@pytest.mark.skipif(block_descent.unavailable() is not None, reason="no compiler")
def test_sweeps_that_are_extrapolated_end_at_the_same_minimum_in_half_the_number(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 120, generator=generator, dtype=torch.float64).cumsum(1)
    x -= x.mean(0)
    gram, moment = x.T @ x / 100, (x @ torch.randn(120, 2, generator=generator, dtype=torch.float64)).T @ x / 100
    blocks = Blocks(torch.arange(120) // 4, torch.ones(30, dtype=torch.float64))
    strength = Strength(0.01 * float(blocks.norms(moment).max()), 0.1)
    found, counts = [], []
    for large in (0, math.inf):
        monkeypatch.setattr(block_descent, "_LARGE", large)
        start = torch.zeros_like(moment)
        w, sweeps = block_descent.sweep(gram, moment, blocks, strength, start, 1e-9 * strength.l1, 100_000)
        found.append(w)
        counts.append(sweeps)
    torch.testing.assert_close(*found, rtol=0, atol=1e-7 * float(found[1].abs().max()))
    assert torch.equal(*(blocks.norms(w) > 0 for w in found))
    assert 2 * counts[0] <= counts[1] < 100_000


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("name", CASES)
def test_groups_of_one_are_the_lasso(name: str, fraction: float) -> None:
    x, y = CASES[name]()
    alpha = fraction * largest(x, y, np.arange(x.shape[1]))
    ours, lasso = GroupLasso(alpha).fit(x, y), Lasso(alpha).fit(x, y)
    assert np.array_equal(ours.coef_ != 0, lasso.coef_ != 0)
    np.testing.assert_allclose(ours.coef_, lasso.coef_, rtol=0, atol=1e-9 * np.abs(lasso.coef_).max())
    assert ours.intercept_ == pytest.approx(lasso.intercept_, rel=1e-9, abs=1e-9)


def test_the_multi_task_lasso_is_a_group_lasso() -> None:
    x, y = CASES["tall"]()
    y = np.c_[y, x[:, 3] - y, x[:, 0] + x[:, 9]]
    x, y = x - x.mean(0), y - y.mean(0)
    alpha = 0.1 * np.linalg.norm(x.T @ y, axis=1).max() / len(y)
    multi = MultiTaskLasso(alpha, fit_intercept=False).fit(x, y)
    whole = np.kron(x, np.eye(3))  # three times as many samples
    model = GroupLasso(alpha / 3, groups=3, group_weight="none", fit_intercept=False).fit(whole, y.ravel())
    ours = model.coef_.reshape(-1, 3).T
    assert np.array_equal(ours != 0, multi.coef_ != 0)
    np.testing.assert_allclose(ours, multi.coef_, rtol=0, atol=1e-10)


@pytest.mark.parametrize("route", ["FISTA", "ProxSGD"])
def test_optimizers_find_the_same_solution(route: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 24))
    y = x[:, :8] @ rng.standard_normal(8) + 0.1 * rng.standard_normal(80)
    groups = np.arange(24) // 4
    alpha = 0.2 * largest(x, y, groups)
    ours = GroupLasso(alpha, groups=4, fit_intercept=False).fit(x, y)
    w = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    penalty = torchreg.GroupLasso(alpha, "rows")
    step = 80 / float(np.linalg.eigvalsh(x.T @ x)[-1])
    optimizer: Any = torchreg.FISTA([w], penalty=penalty)
    if route == "ProxSGD":
        optimizer = torchreg.ProxSGD([w], lr=step, penalty=penalty)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (torch.tensor(x) @ w.reshape(-1) - torch.tensor(y)).square().sum() / 160
        loss.backward()
        return loss

    for _ in range(1 if route == "FISTA" else 300):
        optimizer.step(closure)
    found = w.detach().numpy().ravel()
    assert np.array_equal(found != 0, ours.coef_ != 0)
    assert 0 < np.count_nonzero(found) < 24
    np.testing.assert_allclose(found, ours.coef_, rtol=0, atol=1e-6 if route == "FISTA" else 1e-9)


@pytest.mark.parametrize(
    "groups",
    [
        3,
        np.arange(30) // 3,
        ["abcdefghij"[j // 3] for j in range(30)],
        [list(range(j, j + 3)) for j in range(0, 30, 3)],
        torch.arange(30) // 3,
    ],
    ids=["size", "labels", "names", "columns", "tensor"],
)
def test_groups_can_be_said_in_several_ways(groups: Any) -> None:
    x, y = CASES["tall"]()
    model = GroupLasso(0.3, groups=groups).fit(x, y)
    assert np.array_equal(model.coef_, GroupLasso(0.3, groups=3).fit(x, y).coef_)
    assert np.array_equal(model.groups_, np.arange(30) // 3)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (7, "divide the number of features, 30, got 7"),
        ([0, 1], "30 features.* got 2 labels"),
        ([[0, 1], [1, 2]], "group 1 repeats a column"),
        ([[0, 0]], "group 0 repeats a column"),
        ([[0, 1], [2]], "column 3 is in none"),
        ([[0, 30]], "columns from 0 to 29"),
        ([[0, 1], []], "group 1 of `groups` to be a list of columns"),
        ([[0, 1], [0.5]], "group 1 of `groups` to be a list of columns"),
        (0, "groups"),
    ],
)
def test_groups_that_are_none_are_refused(groups: Any, message: str) -> None:
    model = GroupLasso(groups=groups)
    with pytest.raises(ValueError, match=message):
        model.fit(*CASES["tall"]())
    assert not hasattr(model, "coef_")


def test_groups_without_weights_count_alike() -> None:
    x, y = CASES["tall"]()
    ours = GroupLasso(0.3, groups=3, group_weight="none").fit(x, y)
    np.testing.assert_allclose(ours.coef_, GroupLasso(0.3 / np.sqrt(3), groups=3).fit(x, y).coef_, rtol=1e-9)


def test_several_targets_are_problems_of_their_own() -> None:
    x, y = CASES["wide"]()
    both = np.c_[y, x[:, 20] - y]
    model = GroupLasso(0.3, groups=5).fit(x, both)
    for i in range(2):
        single = GroupLasso(0.3, groups=5).fit(x, both[:, i])
        np.testing.assert_allclose(model.coef_[i], single.coef_, rtol=0, atol=1e-12)
        assert model.intercept_[i] == pytest.approx(single.intercept_)
    assert model.predict(x).shape == (60, 2)
    warm = GroupLasso(0.3, groups=5, warm_start=True).fit(x, both)
    assert max(warm.fit(x, both).n_iter_) <= 3


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("weighted", [False, True])
def test_sparse_data_give_the_dense_solution(weighted: bool) -> None:
    x, y = sparse_case()
    weights = np.random.default_rng(1).uniform(0, 3, len(y)) if weighted else None
    model = GroupLasso(0.02, groups=4)
    dense = model.fit(x.toarray(), y, weights).coef_
    assert 0 < np.count_nonzero(dense) < len(dense)
    for given in (x, torch.tensor(x.toarray()).to_sparse_csr()):
        coef = np.asarray(model.fit(given, torch.tensor(y) if isinstance(given, torch.Tensor) else y, weights).coef_)
        assert np.array_equal(coef != 0, dense != 0)
        np.testing.assert_allclose(coef, dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_duplicated_columns_in_a_group_and_in_several(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(block_descent, "unavailable", lambda: "no compiler")
    x, y = CASES[name]()
    size, features = SIZES[name], x.shape[1]
    double = np.c_[x, x, x[:, ::-1]]
    groups = np.r_[np.arange(features) // size, np.arange(features) // size, features + np.arange(features) // size]
    alpha = 0.05 * largest(double, y, groups)
    model = GroupLasso(alpha, groups=groups).fit(double, y)
    assert relative_gap(double, y, model.coef_, alpha, groups) < 1e-12
    np.testing.assert_allclose(model.coef_[:features], model.coef_[features : 2 * features], rtol=1e-6, atol=1e-9)


def test_float32_is_certified_to_float32() -> None:
    x, y = (a.astype(np.float32) for a in CASES["wide"]())
    groups = labels("wide")
    alpha = 0.1 * largest(x.astype(np.float64), y.astype(np.float64), groups)
    model = GroupLasso(alpha, groups=groups).fit(x, y)
    assert model.coef_.dtype == np.float32
    assert relative_gap(x, y, model.coef_, alpha, groups) < 1e-5


@pytest.mark.filterwarnings("ignore:With alpha=0")
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_at_both_ends_of_the_path(name: str) -> None:
    x, y = CASES[name]()
    groups = np.arange(x.shape[1]) // 5
    edge = largest(x, y, groups)
    zero = GroupLasso(edge * (1 + 1e-9), groups=5).fit(x, y)
    assert not zero.coef_.any()
    assert not np.signbit(zero.coef_).any()
    assert zero.intercept_ == pytest.approx(y.mean())
    assert np.count_nonzero(GroupLasso(edge * (1 - 1e-6), groups=5).fit(x, y).coef_) == 5
    np.testing.assert_allclose(GroupLasso(0, groups=5).fit(x, y).predict(x), Lasso(0).fit(x, y).predict(x), rtol=1e-8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    x, y = CASES["tall"]()
    x[3, 2] = value
    for convert in (np.asarray, torch.tensor):
        with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
            GroupLasso(groups=3).fit(convert(x), convert(y))


@pytest.mark.parametrize("alpha", [0.05, 1e-15])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
def test_a_constant_column_of_a_group_is_zero(constant: float, alpha: float) -> None:
    x, y = CASES["tall"]()
    groups = np.r_[0, np.arange(30) // 3]
    model = GroupLasso(alpha, groups=groups, group_weight="none", tol=1).fit(np.c_[np.full(len(y), constant), x], y)
    assert model.coef_[0] == 0
    without = GroupLasso(alpha, groups=3, group_weight="none", tol=1).fit(x, y)
    np.testing.assert_allclose(model.coef_[1:], without.coef_, rtol=1e-8, atol=1e-9)


def test_one_sample() -> None:
    model = GroupLasso(0.5, groups=[0, 0, 1], fit_intercept=False).fit([[3.0, 4.0, 1.0]], [2.0])
    # along the first group ½(2 − 5t)² + 0.5·√2·t is smallest at 5t = 2 − √2/10
    np.testing.assert_allclose(model.coef_, np.array([0.6, 0.8, 0]) * (2 - np.sqrt(0.5) / 5) / 5, atol=1e-12)


def test_the_lines_of_the_page_run() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Groups that are zero together")[1].split("\n## ")[0]
    x, y = CASES["tall"]()
    space: dict[str, Any] = {"torchreg": torchreg, "X": x, "y": y, "Y": np.c_[y, -y]}
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, space)
    assert set(space["model"].groups_) == set(range(7))


def test_steps_are_counted_without_a_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group along its pull needs no other step, which scikit-learn's checks took for none at all."""
    monkeypatch.setattr(block_descent, "unavailable", lambda: "no compiler")
    x, y = load_iris(return_X_y=True)
    for model in (GroupLasso(groups=1), MultiTaskLasso()):
        assert np.min(model.fit(x, np.c_[y, y]).n_iter_) >= 1
