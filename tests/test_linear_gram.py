"""Gram matrices compiled from C: those of general products of matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_cases import tall, wide

from torchreg.kernels import toolchain
from torchreg.linear import Lasso, LassoCV, Ridge
from torchreg.linear.data import blas, native_gram

if native_gram.unavailable() is not None:
    pytest.skip(str(native_gram.unavailable()), allow_module_level=True)


def matrix(samples: int, features: int, order: str) -> torch.Tensor:
    x = torch.randn(features, 2 * samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"columns": x[:, :samples].T, "rows": x[:, :samples].T.contiguous(), "strided": x[:, ::2].T}[order]


@pytest.mark.parametrize("order", ["columns", "rows", "strided"])
@pytest.mark.parametrize("features", [1, 3, 4, 37, 130, 600])
@pytest.mark.parametrize("samples", [1, 7, 512, 1000, 2509])
def test_the_matrix_is_symmetric_and_exact(
    samples: int, features: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = matrix(samples, features, order)
    if features == 600:
        monkeypatch.setattr(native_gram, "_BLOCK", 0)
    found = native_gram.inner(x)
    torch.testing.assert_close(found, x.T @ x, rtol=1e-12, atol=1e-11)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("count", "first"), [(5, 0), (70, 1), (70, 33), (70, 66), (70, 69), (3000, 2990)])
def test_some_rows_are_added_up_to_the_diagonal(count: int, first: int, threads: int) -> None:
    rows = matrix(530, count, "columns").T
    found = torch.full((count - first, 2 * count), torch.nan, dtype=torch.float64)[:, :count].fill_(1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native_gram.add(rows, first, found)
    finally:
        torch.set_num_threads(before)
    expected = 1 + (rows[first:] @ rows.T).tril(first)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_rows_in_some_places_are_those_alone() -> None:
    rows = matrix(530, 90, "columns").T
    places = torch.tensor([3, 89, 3, 0, *range(17, 51)])
    found = torch.zeros(30, len(places), dtype=torch.float64)
    native_gram.add(rows, len(places) - 30, found, places)
    some = rows[places]
    torch.testing.assert_close(found, (some[-30:] @ some.T).tril(len(places) - 30), rtol=1e-12, atol=1e-10)


def test_what_is_not_finite_stays_so() -> None:
    x = matrix(600, 9, "columns").clone()
    x[3, 2], x[599, 5] = torch.nan, torch.inf
    finite = native_gram.inner(x).isfinite()
    kept = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert finite[kept][:, kept].all()
    assert not finite[2].any()
    assert not finite[:, 5].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 4.0, 1e5])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_estimators_are_the_same_with_it(dtype, order, offset, weighted, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("_FEWEST", "_SHORTEST", "_NARROWEST"):
        monkeypatch.setattr(native_gram, least, 0)
    for case in (tall, wide):
        x, y = case()
        x = np.asarray(x + offset, dtype=dtype, order=order)
        weights = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else None
        for model in (Lasso(0.05), Ridge(0.5), LassoCV(cv=3, alphas=5)):
            found = []
            for slow in (False, True):
                monkeypatch.setattr(blas, "is_slow", lambda slow=slow: slow)
                found.append(model.fit(x, y, sample_weight=weights).coef_)
            close = 1e-8 if dtype == np.float64 else 1e-3
            np.testing.assert_allclose(*found, rtol=close, atol=close * np.abs(found[0]).max())
            assert dtype == np.float32 or np.array_equal(found[0] != 0, found[1] != 0)


@pytest.mark.parametrize(("vendor", "slow"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_mkl_is_slow_on_other_makers_processors(vendor, slow, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t: fpu\n")
    monkeypatch.setattr(toolchain, "_CPU_INFO", path)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert blas.is_slow.__wrapped__() is slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not blas.is_slow.__wrapped__()
