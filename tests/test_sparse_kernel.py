"""The compiled steps of rows against torch's form of them, and against the dense computation."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from sparse_cases import adam, lookups, sgd, sparse_gradient
from torch import nn

from torchreg import L1, L2, ElasticNet, ProxAdamW, ProxSGD
from torchreg.kernels import native_rows, pages

SHAPE = (50, 5)
SGD_HYPERS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02, "maximize": True}]
ADAM_HYPERS = [{}, {"amsgrad": True, "betas": (0.4, 0.9), "eps": 1e-2}, {"metric": "identity", "maximize": True}]
CASES = [(ProxSGD, hyper) for hyper in SGD_HYPERS] + [(ProxAdamW, {"weight_decay": 0, **h}) for h in ADAM_HYPERS]
cases = pytest.mark.parametrize(("optimizer", "hyper"), CASES, ids=str)

pytestmark = pytest.mark.skipif(native_rows.unavailable() is not None, reason=str(native_rows.unavailable()))


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Take the kernel for small tables too; what it was called for."""
    called = []
    original = native_rows._call
    monkeypatch.setattr(native_rows, "SMALLEST", 0)
    monkeypatch.setattr(native_rows, "_call", lambda name, *a, **k: called.append(name) or original(name, *a, **k))
    return called


@contextlib.contextmanager
def by_torch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_rows, "SMALLEST", math.inf)
        yield


def table(dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(optimizer, w, gradients, penalty, hyper):
    p = nn.Parameter(w.clone())
    opt = optimizer([p], lr=0.05, penalty=penalty, **hyper)
    for t, (rows, values) in enumerate(gradients):
        opt.settle(p, rows if t % 2 else rows.int())
        opt.param_groups[0].update(lr=0.03 + 0.02 * math.cos(t / 20), strength_scale=min(1.0, t / 20))
        p.grad = sparse_gradient(rows, values.to(p.dtype), p.shape)
        opt.step()
    opt.flush()
    return p.detach(), opt.state[p]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", [None, L1(0.05), ElasticNet(0.05, 0.05)], ids=str)
def test_the_kernel_does_what_torch_does(optimizer, hyper, dtype, penalty, kernel):
    gradients = lookups(50, 40, 8, 5)
    got, state = run(optimizer, table(dtype), gradients, penalty, hyper)
    adapts = optimizer is ProxAdamW and "metric" not in hyper
    assert ({"sgd", "adam"} & set(kernel) == set()) == (adapts and isinstance(penalty, ElasticNet))
    assert ("settle" in kernel) == (
        (penalty is not None or ("weight_decay" in hyper and optimizer is ProxSGD))
        and not (adapts and isinstance(penalty, ElasticNet))
    )
    kernel.clear()
    with by_torch():
        expected, reference = run(optimizer, table(dtype), gradients, penalty, hyper)
    assert kernel == []
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=tolerance)
    assert torch.equal(got == 0, expected == 0)
    assert state.keys() == reference.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, reference[key], rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("penalty", [L1(0.05), L2(0.1)], ids=str)
def test_sgd_is_the_dense_computation(penalty):
    gradients = lookups(50, 100, 8, 5)
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.05, momentum=0.9, penalty=penalty)
    for rows, values in gradients:
        opt.settle(p, rows)
        p.grad = sparse_gradient(rows, values.double(), p.shape)
        opt.step()
    opt.flush()
    expected = sgd(table(), gradients, penalty, lambda t: 0.05, lambda t: 1.0, momentum=0.9)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(p == 0, expected == 0)


def test_bias_corrections_go_on_beyond_those_that_are_tabled(monkeypatch):
    monkeypatch.setattr(native_rows, "TABLED", 3)
    native_rows._drops.cache_clear()
    gradients = lookups(50, 100, 30, 5)
    p = nn.Parameter(table())
    opt = ProxAdamW([p], lr=0.05, weight_decay=0, penalty=L1(0.05))
    for rows, values in gradients:
        opt.settle(p, rows)
        p.grad = sparse_gradient(rows, values.double(), p.shape)
        opt.step()
    opt.flush()
    native_rows._drops.cache_clear()
    assert opt.state[p]["row_steps"].min() > 3
    expected = adam(table(), gradients, L1(0.05), lambda t: 0.05, lambda t: 1.0)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-11)


@cases
def test_nan_and_infinity_stay_where_they_are_in_torchs_form(optimizer, hyper):
    w = table()
    w[1, 2], w[2, 0], w[7, 1] = math.nan, math.inf, -math.inf
    gradients = lookups(50, 40, 8, 5)
    gradients[20][1][0], gradients[21][1][0, 1] = math.inf, math.nan
    got, _ = run(optimizer, w, gradients, L1(0.05), hyper)
    with by_torch():
        expected, _ = run(optimizer, w, gradients, L1(0.05), hyper)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(got.isnan(), expected.isnan())
    assert not torch.signbit(got[got == 0]).any()


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3), (1, 1), (6, 300), (6, 0)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_tables_of_any_shape(shape, count):
    index = torch.randint(0, shape[0], (count,), generator=torch.Generator().manual_seed(1))
    values = torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(2))
    gradients = [(index, values), (index[:0], values[:0]), (index, values)]
    for optimizer, hyper in CASES[::3]:
        got, _ = run(optimizer, table(shape=shape), gradients, L1(0.05), hyper)
        with by_torch():
            expected, _ = run(optimizer, table(shape=shape), gradients, L1(0.05), hyper)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_entries_hold_each_row_once_with_all_its_gradients_in_their_order(count):
    for size in (1, 7, 1 << 40):
        index = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(count))
        entries = native_rows.entries_of(index, size)
        assert entries.rows.tolist() == list(dict.fromkeys(index.tolist()))
        for row, at in zip(entries.rows.tolist(), entries.first.tolist(), strict=True):
            found = []
            while at >= 0:
                found.append(at)
                at = int(entries.next[at])
            assert found == (index == row).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("row", [50, -1, 1 << 40, -(1 << 62)])
def test_rows_that_do_not_exist_are_refused_before_anything_is_written(row):
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    p.grad = sparse_gradient(torch.tensor([1]), torch.ones(1, 5).double(), SHAPE)
    opt.step()
    before = p.detach().clone()
    with pytest.raises((IndexError, RuntimeError)):
        opt.settle(p, torch.tensor([3, row]))
    assert torch.equal(p, before)
    assert native_rows.entries_of(torch.tensor([3, row]), 50) is None


def test_autograd_is_told_of_what_the_kernel_wrote():
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    opt.settle(p, torch.tensor([0]))
    p.grad = sparse_gradient(torch.tensor([1]), torch.ones(1, 5).double(), SHAPE)
    loss = p.square().sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = p.square().sum()
    opt.settle(p, torch.tensor([1]))  # has missed nothing
    loss.backward()
    loss = p.square().sum()
    opt.settle(p, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["transposed", "half", "switched off"])
def test_what_the_kernel_has_no_form_for_is_left_to_torch(kind, kernel, monkeypatch):
    w = table(torch.bfloat16 if kind == "half" else torch.float32)
    p = nn.Parameter(w.t().contiguous().t() if kind == "transposed" else w.clone())
    if kind == "switched off":
        monkeypatch.setattr(native_rows, "unavailable", lambda: "switched off by TORCHREG_NATIVE=0")
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    p.grad = sparse_gradient(torch.tensor([1, 1]), torch.ones(2, 5).to(p.dtype), SHAPE)
    opt.step()
    opt.settle(p, torch.tensor([2]))
    assert kernel == []
    assert not torch.equal(p[2], w[2])


@pytest.mark.parametrize("how", ["saved", "copied", "pickled", "another metric"])
def test_numbers_of_a_row_lie_together_and_that_changes_nothing(how, tmp_path):
    gradients = lookups(50, 20, 8, 5)
    hyper = {"lr": 0.05, "weight_decay": 0, "penalty": L1(0.05)}

    def steps(opt, p, some):
        for rows, values in some:
            opt.settle(p, rows)
            p.grad = sparse_gradient(rows, values.double(), SHAPE)
            opt.step()
        return opt.state[p]

    p = nn.Parameter(table())
    opt = ProxAdamW([p], **hyper)
    state = steps(opt, p, gradients[:10])
    assert state["settled"].data_ptr() + 3 * 8 == state["row_steps"].data_ptr()
    assert state["settled"].stride() == (4, 1)
    q, other = copy.deepcopy((p, opt)) if how == "copied" else (nn.Parameter(p.detach().clone()), None)
    if how == "saved":
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        other = ProxAdamW([q], **hyper)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif how == "pickled":
        q, other = pickle.loads(pickle.dumps((p, opt)))
    elif how == "another metric":
        q, other = copy.deepcopy((p, opt))
        opt.param_groups[0]["metric"] = other.param_groups[0]["metric"] = "identity"
        with by_torch():
            steps(other, q, gradients[10:])
    for key in ("settled", "row_steps"):
        assert how == "another metric" or torch.equal(other.state[q][key], state[key])
    steps(opt, p, gradients[10:])
    if how != "another metric":
        steps(other, q, gradients[10:])
    for one, parameter in ((opt, p), (other, q)):
        one.flush()
        assert one.state[parameter]["row_steps"].sum() == sum(len(rows.unique()) for rows, _ in gradients)
    torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert state["settled"].data_ptr() + 8 * state["settled"].shape[1] == state["row_steps"].data_ptr()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 19, 3)], ids=str)
def test_advice_on_pages_changes_no_number(shape):
    t = torch.ones(shape, dtype=torch.float64)
    assert pages.advised(t) is t
    assert torch.equal(t, torch.ones(shape, dtype=torch.float64))
    assert torch.equal(pages.zeros_like(t), torch.zeros(shape, dtype=torch.float64))
    assert torch.equal(pages.zeros_like(t.T if t.ndim == 2 else t), torch.zeros_like(t.T if t.ndim == 2 else t))


@cases
def test_the_kernel_stays_on_the_cpu_whatever_the_default_device_is(optimizer, hyper, kernel):
    gradients = lookups(50, 10, 8, 5)
    with by_torch():
        expected, _ = run(optimizer, table(), gradients, L1(0.05), hyper)
    native_rows._drops.cache_clear()
    p = nn.Parameter(table())
    opt = optimizer([p], lr=0.05, penalty=L1(0.05), **hyper)
    for t, (rows, values) in enumerate(gradients):
        opt.param_groups[0].update(lr=0.03 + 0.02 * math.cos(t / 20), strength_scale=min(1.0, t / 20))
        p.grad = sparse_gradient(rows, values.to(p.dtype), p.shape)
        with torch.device("meta"):
            opt.settle(p, rows)
            opt.step()
    with torch.device("meta"):
        opt.flush()
    assert kernel
    torch.testing.assert_close(p.detach(), expected)
