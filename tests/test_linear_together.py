"""All strengths and folds at once, as on a GPU: the minimisers that steps one after the other end at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchreg.linear import ElasticNetCV, LassoCV, lasso_path
from torchreg.linear.lasso import descent
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic.newton import minimise
from torchreg.linear.quadratic.together import minimise_together

FOLDS, SAMPLES, FEATURES = 3, 120, 30


def _alike(x: Tensor) -> Tensor:
    for j in range(1, FEATURES):
        x[:, :, j] = 0.95 * x[:, :, j - 1] + 0.3 * x[:, :, j]
    return x


def _scaled(x: Tensor) -> Tensor:
    return x * torch.logspace(-6, 6, FEATURES, dtype=torch.float64)


def _constant(x: Tensor) -> Tensor:
    x[:, :, 4] = 0.0
    return x


def _twice(x: Tensor) -> Tensor:
    x[:, :, 10:15] = x[:, :, :5]
    return x


COLUMNS = {"independent": lambda x: x, "alike": _alike, "scaled": _scaled, "zero": _constant, "twice": _twice}


def sums(columns: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = columns(torch.randn(FOLDS, SAMPLES, FEATURES, generator=generator, dtype=torch.float64))
    noise = torch.randn(FOLDS, SAMPLES, generator=generator, dtype=torch.float64)
    y = (x / x.std(1, keepdim=True).clamp(min=1e-9))[:, :, :6] @ torch.tensor(
        [3.0, -2, 1, 1, 0.5, -0.2]
    ).double() + noise
    return x.mT @ x / SAMPLES, (x.mT @ y.unsqueeze(2) / SAMPLES).squeeze(2)


def value(gram: Tensor, moment: Tensor, l1: float, l2: float, w: Tensor) -> float:
    return float(0.5 * w @ gram @ w - moment @ w + l1 * w.abs().sum() + 0.5 * l2 * w @ w)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.7])
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_they_are_the_minimisers(columns: Any, share: float, positive: bool) -> None:
    gram, moment = sums(columns)
    strengths = torch.logspace(0.1, -3, 12, dtype=torch.float64) * moment.abs().max()
    l1, l2 = share * strengths, (1 - share) * strengths
    found = minimise_together(gram, moment, l1, l2, positive)
    if columns is not _twice:
        assert found.exact.double().mean() > 0.9
    for i, j in torch.nonzero(found.exact).tolist():
        problem = gram[i], moment[i], float(l1[j]), float(l2[j])
        exact = minimise(*problem, positive=positive).w
        assert torch.equal(found.w[i, j] != 0, exact != 0) or columns is _twice
        best = value(*problem, exact)
        assert value(*problem, found.w[i, j]) <= best + 1e-13 * max(abs(best), float(moment[i].abs().max()))
        if columns is not _twice:
            size = gram[i].diagonal().sqrt()
            torch.testing.assert_close(found.w[i, j] * size, exact * size, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_what_stays_open_is_solved_one_after_the_other(columns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gram, moment = sums(columns)
    strengths = [Strength(float(s)) for s in np.geomspace(1, 1e-3, 6) * float(moment.abs().max())] + [Strength(0.0)]
    arguments = list(gram), list(moment), strengths
    usual = descent.descend_together(*arguments, positive=False, limit=1000)
    monkeypatch.setattr(descent, "_TOGETHER", ("cpu",))
    found = descent.descend_together(*arguments, positive=False, limit=1000)
    for i, row in enumerate(found):
        for s, ours, theirs in zip(strengths, row, usual[i], strict=True):
            assert ours.exact
            best = value(gram[i], moment[i], s.l1, 0.0, theirs.w)
            assert value(gram[i], moment[i], s.l1, 0.0, ours.w) <= best + 1e-12 * max(1.0, abs(best))


@pytest.mark.parametrize("closeness", [1e-7, 1e-3])
@pytest.mark.parametrize("positive", [False, True])
def test_columns_that_are_all_but_alike_end_where_steps_do(
    positive: bool, closeness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        base = torch.randn(FOLDS, 12, 8, generator=generator, dtype=torch.float64)  # fewer samples than columns
        x = torch.cat([base, base + closeness * torch.randn(base.shape, generator=generator).double()], 2)
        y = torch.randn(FOLDS, 12, generator=generator, dtype=torch.float64)
        gram, moment = x.mT @ x / 12, (x.mT @ y.unsqueeze(2) / 12).squeeze(2)
        strengths = [Strength(float(s)) for s in np.geomspace(1, 1e-4, 8) * float(moment.abs().max())]
        arguments = list(gram), list(moment), strengths
        usual = descent.descend_together(*arguments, positive=positive, limit=1000)
        with monkeypatch.context() as patch:
            patch.setattr(descent, "_TOGETHER", ("cpu",))
            found = descent.descend_together(*arguments, positive=positive, limit=1000)
        for i, row in enumerate(found):
            for s, ours, theirs in zip(strengths, row, usual[i], strict=True):
                assert not positive or float(ours.w.min()) >= 0
                best = value(gram[i], moment[i], s.l1, 0.0, theirs.w)
                assert value(gram[i], moment[i], s.l1, 0.0, ours.w) <= best + 1e-9 * abs(best)


@pytest.mark.parametrize("estimator", [LassoCV(cv=4, alphas=20), ElasticNetCV(cv=4, alphas=10, l1_ratio=[0.5, 1.0])])
def test_folds_are_one_problem(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 25))
    y = x[:, :5].sum(1) + generator.standard_normal(300)
    usual, seen = estimator.fit(x, y).mse_path_, []
    alpha, coef = estimator.alpha_, estimator.coef_

    def spy(gram: Tensor, *rest: Any) -> Any:
        seen.append(len(gram))
        return minimise_together(gram, *rest)

    monkeypatch.setattr(descent, "_TOGETHER", ("cpu",))
    monkeypatch.setattr(descent, "minimise_together", spy)
    estimator.fit(x, y)
    assert seen[0] == 4
    np.testing.assert_allclose(estimator.mse_path_, usual, rtol=1e-10)
    assert estimator.alpha_ == alpha
    np.testing.assert_allclose(estimator.coef_, coef, rtol=1e-10)
    seen.clear()
    _, coefs, gaps = lasso_path(x, y, alphas=np.geomspace(1, 1e-3, 30))
    assert seen == [1]
    assert gaps.max() < 1e-12 * np.mean(y**2)
    assert (coefs[:, -1] != 0).all()
