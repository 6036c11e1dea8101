"""The Newton steps end at the minimiser, whatever the Gram matrix, with a finite number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchreg.linear.lasso.full_gram import Normal
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic import native_newton
from torchreg.linear.quadratic.newton import Minimum, factorise
from torchreg.linear.quadratic.newton import minimise as in_torch


def in_c(gram: Tensor, moment: Tensor, l1: float, l2: float = 0.0, **settings: Any) -> Minimum:
    if reason := native_newton.unavailable():
        pytest.skip(reason)
    return native_newton.minimise_all(gram, moment, [l1], [l2], **settings)[0]


@pytest.fixture(params=[in_torch, in_c])
def minimise(request: pytest.FixtureRequest) -> Any:
    return request.param


def problem(trial: int) -> tuple[Any, Any, Any]:
    """A random problem of up to 30 samples and 40 features; many are degenerate."""
    rng = np.random.default_rng(trial)
    n, p = rng.integers(1, 30), rng.integers(1, 40)
    x = rng.standard_normal((n, p))
    if trial % 3 == 0 and p > 3:
        x[:, 1], x[:, 2] = x[:, 0], x[:, 0] + x[:, 3]
    if trial % 5 == 0:
        x[:, -1] = 0
    if trial % 7 == 0:
        x = np.round(x)
    if trial % 4 == 0:
        x *= 10.0 ** rng.integers(-8, 8, p)
    return rng, x, rng.standard_normal(n)


def violation(gram: Tensor, moment: Tensor, w: Tensor, l1: float, l2: float, positive: bool) -> float:
    """How far the optimality conditions are from being met, relative to the units of each coefficient."""
    unit = gram.diagonal().sqrt().clamp(min=1e-300)
    pull = moment - gram @ w - l2 * w
    at_zero = (pull if positive else pull.abs()) - l1
    return float((torch.where(w == 0, at_zero.clamp(min=0), (pull - l1 * torch.sign(w)).abs()) / unit).max())


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("trials", [range(k, k + 50) for k in range(0, 200, 50)], ids=str)
def test_the_gap_is_rounding(minimise: Any, trials: range, l2: float, positive: bool) -> None:
    for trial in trials:
        rng, x, y = problem(trial)
        n = len(y)
        gram, moment = torch.from_numpy(x.T @ x / n), torch.from_numpy(x.T @ y / n)
        largest = float(moment.abs().max())
        l1 = largest * 10.0 ** -rng.integers(0, 5)
        start = torch.from_numpy(rng.standard_normal(x.shape[1])) * 10 if trial % 2 and not positive else None
        found = minimise(gram, moment, l1, l2, start=start, positive=positive)
        normal = Normal(gram, moment, float(y @ y) / n, n, positive)
        assert found.exact
        assert found.steps <= 20 + 3 * x.shape[1]
        assert normal.gaps(found.w.unsqueeze(0), [Strength(l1, l2)])[0] <= 1e-11 * (y @ y) / n
        assert not (positive and (found.w < 0).any())


def test_without_a_penalty_it_is_least_squares(minimise: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 12)), rng.standard_normal(40)
    found = minimise(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y), 0.0)
    np.testing.assert_allclose(found.w, np.linalg.lstsq(x, y)[0], rtol=1e-10)
    assert found.steps == 1


def test_without_l1_it_is_ridge_regression(minimise: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 12)), rng.standard_normal(5)
    found = minimise(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y), 0.0, 0.3)
    np.testing.assert_allclose(found.w, np.linalg.solve(x.T @ x + 0.3 * np.eye(12), x.T @ y), rtol=1e-9)


def test_of_two_equal_columns_one_takes_part(minimise: Any) -> None:
    gram, moment = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    w = minimise(gram, moment, 0.25).w
    assert sorted(w.tolist()) == [0, 0.75]


def test_a_column_that_is_cheaper_than_two_replaces_them(minimise: Any) -> None:
    """The third is the sum of the first two: the same prediction for half the price."""
    x = torch.eye(2, dtype=torch.float64)
    x = torch.cat([x, x.sum(1, keepdim=True)], 1)
    y = torch.tensor([1.0, 1.0], dtype=torch.float64)
    found = minimise(x.T @ x, x.T @ y, 0.1, start=torch.tensor([0.9, 0.9, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.w, torch.tensor([0, 0, 0.95], dtype=torch.float64))


def test_a_dependent_start_is_left_behind(minimise: Any) -> None:
    gram = torch.ones(4, 4, dtype=torch.float64)
    found = minimise(gram, gram[0], 0.1, start=torch.tensor([1.0, -2, 3, 1000], dtype=torch.float64))
    assert found.w.count_nonzero() == 1
    torch.testing.assert_close(found.w.sum(), torch.tensor(0.9, dtype=torch.float64))


def test_zeros_are_positive(minimise: Any) -> None:
    found = minimise(torch.eye(3, dtype=torch.float64), torch.tensor([-1.0, 0.2, -0.2], dtype=torch.float64), 0.5)
    assert not torch.signbit(found.w[1:]).any()


def test_the_limit_is_kept_and_said(minimise: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 100)), rng.standard_normal(50)
    gram, moment = torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y)
    cut = minimise(gram, moment, 0.1, limit=2)
    assert (cut.steps, cut.exact) == (2, False)
    whole = minimise(gram, moment, 0.1)
    assert whole.exact
    assert violation(gram, moment, whole.w, 0.1, 0, False) < 1e-10 < violation(gram, moment, cut.w, 0.1, 0, False)


def test_the_first_dependent_column_is_found() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((20, 6)))
    assert factorise(x.T @ x)[1] is None
    x[:, 4] = x[:, 0] - 2 * x[:, 2]
    assert factorise(x.T @ x)[1] == 4


@pytest.mark.parametrize("positive", [False, True])
def test_a_factor_that_many_columns_leave_and_enter_stays_right(positive: bool) -> None:
    """Columns that leave are rotated out of the rows behind them, which are then not computed anew."""
    if reason := native_newton.unavailable():
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 200))
    for j in range(1, 200):
        x[:, j] = 0.8 * x[:, j - 1] + 0.6 * x[:, j]
    x *= 10.0 ** rng.integers(-3, 3, 200)
    gram, moment = torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ (x @ rng.standard_normal(200)))
    largest = float((moment / gram.diagonal().sqrt()).abs().max())
    l1 = [largest * s for s in np.exp(rng.uniform(-8, 0, 60))]
    l2 = [1e-3 * largest] * 60
    start = None
    for found, a, b in zip(native_newton.minimise_all(gram, moment, l1, l2, positive=positive), l1, l2, strict=True):
        expected = in_torch(gram, moment, a, b, positive=positive, start=start)
        start = expected.w
        assert found.exact
        assert torch.equal(found.w != 0, expected.w != 0)
        unit = gram.diagonal().sqrt()
        torch.testing.assert_close(found.w * unit, expected.w * unit, rtol=1e-9, atol=1e-11 * float(unit.max()))


def test_compiled_paths_are_those_of_torch() -> None:
    if reason := native_newton.unavailable():
        pytest.skip(reason)
    for trial in range(1, 40, 6):
        _, x, y = problem(trial)
        gram, moment = torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y)
        l1 = [float(moment.abs().max()) * 0.7**i for i in range(20)]
        l2 = [0.1 * s for s in l1]
        start = None
        for found, a, b in zip(native_newton.minimise_all(gram, moment, l1, l2), l1, l2, strict=True):
            expected = in_torch(gram, moment, a, b, start=start)
            start = expected.w
            assert found.exact
            assert torch.equal(found.w != 0, expected.w != 0)
            torch.testing.assert_close(found.w, expected.w, rtol=1e-8, atol=1e-11)
