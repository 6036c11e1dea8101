"""Columns of a data matrix that are read where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchreg.linear.data import blas, columns, native_columns, native_gram
from torchreg.linear.data.design import Dense, mean_squares, weighted_mean

N, P = 300, 96
ADDED = ([5, 80, 33], [7], [], [1, 0, 95, 40, 41, 42, 43, 44, 45, 46])
"""Columns in the order in which they come: the last ones are more than are copied."""


def centred(x: Tensor, mean: Tensor | None, root: Tensor | None) -> Tensor:
    z = x.double() if mean is None else x.double() - mean
    return z if root is None else z * root.unsqueeze(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BLOCK", 500)
    monkeypatch.setattr(columns, "_SHORTEST", 64)
    monkeypatch.setattr(native_columns, "_FEWEST", 0)


@pytest.mark.parametrize("slow", [True, False], ids=["slow BLAS", "fast BLAS"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("weights", ["no", "all", "a fold's", "a fold's, alike"])
@pytest.mark.parametrize("offset", [None, 0.0, 3.0, 1e4], ids=str)
@pytest.mark.parametrize("order", ["rows", "columns", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_are_those_of_centred_and_weighted_columns(
    dtype: Any,
    order: str,
    offset: float | None,
    weights: str,
    compiled: bool,
    slow: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blas, "is_slow", lambda: slow)
    for least in ("_FEWEST", "_SHORTEST", "_NARROWEST"):
        monkeypatch.setattr(native_gram, least, 0)
    if not compiled:
        for module in (native_columns, native_gram):
            monkeypatch.setattr(module, "unavailable", lambda: "no compiler")
    elif native_columns.unavailable() is not None:
        pytest.skip(str(native_columns.unavailable()))
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2 * N, 2 * P, generator=generator, dtype=torch.float64) + (offset or 0)).to(dtype)
    x = {"rows": x[:N, :P].contiguous(), "columns": x[:N, :P].T.contiguous().T, "strided": x[::2, ::2]}[order]
    v = None if weights == "no" else torch.rand(N, generator=generator, dtype=torch.float64)
    if v is not None and "alike" in weights:
        v.fill_(1)
    if v is not None and "fold" in weights:
        v[100:170] = 0
    v = None if v is None else v * (N / v.sum())
    mean = None if offset is None else weighted_mean(x.double(), v)
    root = None if v is None else v.sqrt()
    z, design = centred(x, mean, root), Dense(x, mean, root)
    assert design.far.tolist() == (list(range(P)) if offset == 1e4 else [])
    torch.testing.assert_close(mean_squares(design), z.square().mean(0), rtol=1e-10, atol=1e-10)
    for r in (z[:, :1].T, z[:, :3].T, z[:, :9].T):
        scale = 1e3 if dtype == torch.float32 and offset != 1e4 else 1e-6
        torch.testing.assert_close(design.correlations(r), r @ z / N, rtol=1e-6 * scale, atol=1e-6 * scale)
        torch.testing.assert_close(design.fitted(r @ z), r @ z @ z.T, rtol=1e-6 * scale, atol=1e-4 * scale)
    assert design.selective == (compiled and order == "columns")
    if design.selective:
        r, some = z[:, 0], torch.tensor([95, 3, 3, 0, 40, 41])
        close = 1e-12
        torch.testing.assert_close(design.some_correlations(r, some), r @ z[:, some] / N, rtol=close, atol=close)
    held = design.columns()
    index: list[int] = []
    for added in ADDED:
        index += added
        products = held.add(torch.tensor(added, dtype=torch.long))
        torch.testing.assert_close(products, z[:, added].T @ z[:, index] / N, rtol=1e-11, atol=1e-11)
        w = torch.randn(2, len(index), generator=generator, dtype=torch.float64)
        w[:, :1] = 0
        places = torch.arange(len(index))[1::2]
        for rows in (1, 2):
            torch.testing.assert_close(held.combine(w[:rows]), w[:rows] @ z[:, index].T, rtol=1e-10, atol=1e-10)
            found, expected = held.correlations(z[:, :rows].T, places), z[:, :rows].T @ z[:, index][:, 1::2] / N
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_with_long_columns_are_exact(dtype: Any, rows: int) -> None:
    if native_columns.unavailable() is not None:
        pytest.skip(str(native_columns.unavailable()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 6000, generator=generator, dtype=torch.float64).to(dtype).T[:5003]
    r = torch.randn(rows, 5003, generator=generator, dtype=torch.float64)
    places = torch.tensor([10, 0, 3, 3, 4, 5, 6])
    torch.testing.assert_close(native_columns.dots(x, r, [slice(0, 5003)]), r @ x.double(), rtol=1e-12, atol=1e-11)
    for start, stop in ((0, 4), (1, 7)):
        some = places[start:stop]
        found = native_columns.dots(x, r, [slice(0, 100), slice(200, 5003)], some)
        expected = r[:, :100] @ x[:100, some].double() + r[:, 200:] @ x[200:, some].double()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_samples_without_weight_are_not_read() -> None:
    x = torch.randn(P, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    x[100:170] = torch.nan
    v = torch.ones(N, dtype=torch.float64)
    v[100:170] = 0
    design = Dense(x, None, v.sqrt())
    held, r = design.columns(), v.clone()
    held.add(torch.arange(5))
    for found in (
        held.combine(torch.ones(1, 5, dtype=torch.float64)),
        held.correlations(r.unsqueeze(0), torch.arange(5)),
        design.correlations(r.unsqueeze(0)),
    ):
        assert found.isfinite().all()
    if design.selective:
        assert design.some_correlations(r, torch.tensor([1, 95])).isfinite().all()


def test_constant_columns_have_no_products() -> None:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 0.1
    held = Dense(x, x.mean(0)).columns()
    held.add(torch.tensor([0, 1]))
    products = held.add(torch.tensor([2, 3]))
    assert not products[:, 1].any()
    assert products[0, 2] > 0


def test_only_columns_that_lie_apart_are_copied_and_few_of_them() -> None:
    x = torch.randn(N, P, dtype=torch.float64)
    for matrix, most in ((x, P // 8), (x.T.contiguous().T, 0)):
        held = Dense(matrix).columns()
        for start in range(0, 64, 4):
            held.add(torch.arange(start, start + 4))
            assert len(held._copy) <= most  # type: ignore[attr-defined]
        assert len(held._copy) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_a_few_columns_with_large_means_leave_those_that_follow_their_digits(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "is_slow", lambda: True)
    x = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    x[:, 0] += offset
    held, z = Dense(x, x.mean(0)).columns(), x - x.mean(0)
    held.add(torch.tensor([0]))
    products = held.add(torch.arange(1, 40))
    torch.testing.assert_close(products, z[:, 1:].T @ z / 1000, rtol=0, atol=2e-14)
