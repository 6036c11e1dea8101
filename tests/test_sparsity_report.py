"""Reports count each weight once, on its device, and in every form say the same."""

import csv
import io
import json

import pytest
import torch
from torch import nn

import torchreg
from torchreg.monitor import counting, transfer


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].weight[:, 2] = 0
        net[2].weight[:, 3:] = 0
        net[2].bias.zero_()
    return net


def test_counts_are_those_of_a_direct_count():
    net = conv_net()
    report = torchreg.sparsity(net)
    assert [e.name for e in report.tensors] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    conv, _, linear, bias = report.tensors
    assert (conv.zero_rows, conv.rows, conv.zero_columns, conv.columns) == (1, 4, 1, 3)
    assert (linear.zero_rows, linear.zero_columns, linear.columns) == (0, 13, 16)
    assert (bias.zeros, bias.rows, bias.zero_columns, bias.fraction) == (5, None, None, 1.0)
    parameters = list(net.parameters())
    everything = torch.cat([p.detach().flatten() for p in parameters]).double()
    assert report.total.size == everything.numel()
    assert report.total.zeros == int((everything == 0).sum())
    assert report.total.l1_norm == pytest.approx(everything.abs().sum().item(), rel=1e-6)
    assert report.total.l2_norm == pytest.approx(everything.norm().item(), rel=1e-6)
    assert report.fraction == report.total.zeros / report.total.size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0), (2, 3, 4, 5)])
def test_every_dtype_and_shape(dtype, shape):
    w = torch.zeros(shape, dtype=dtype)
    w.view(-1)[::2] = 2
    entry = torchreg.sparsity({"w": w}).tensors[0]
    assert entry.zeros == w.numel() - (w.numel() + 1) // 2
    assert entry.l1_norm == pytest.approx(2 * ((w.numel() + 1) // 2))


@pytest.mark.parametrize("dense", [True, False])
def test_large_tensors_are_summed_accurately(dense):
    w = torch.rand(3_000_000) if dense else torch.rand(3_000_000, 2)[:, 0]
    entry = torchreg.sparsity({"w": w}).tensors[0]
    assert entry.l1_norm == pytest.approx(w.double().sum().item(), rel=1e-12)
    assert entry.l2_norm == pytest.approx(w.double().norm().item(), rel=1e-12)


def test_norms_of_huge_and_tiny_weights_neither_overflow_nor_vanish():
    huge, tiny = torchreg.sparsity([torch.full((10,), 3e38), torch.full((10,), 1e-30)]).tensors
    assert (huge.l1_norm, huge.l2_norm) == pytest.approx((3e39, 3e38 * 10**0.5))
    assert (tiny.l1_norm, tiny.l2_norm) == pytest.approx((1e-29, 1e-30 * 10**0.5))


def test_not_a_number_is_no_zero_and_minus_zero_is():
    entry = torchreg.sparsity({"w": torch.tensor([float("nan"), -0.0, 0.0, 1.0])}).tensors[0]
    assert entry.zeros == 2
    assert entry.l1_norm != entry.l1_norm


def test_tied_weights_count_once_in_modules_and_state_dicts():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert torchreg.sparsity(net).total.size == 16
    assert torchreg.sparsity(net.state_dict()).total.size == 16
    views = {"a": torch.zeros(4, 4)}
    views["transposed"] = views["a"].t()  # the same memory, but another tensor
    assert len(torchreg.sparsity(views).tensors) == 2


def test_sources_agree():
    net = conv_net()
    reg = torchreg.Regularizer(net, torchreg.L1(0.1))
    opt = torchreg.ProxSGD(net.named_parameters(), lr=0.1)
    whole = torchreg.sparsity(net).total
    for source in (net.state_dict(), opt, list(net.parameters()), list(net.named_parameters())):
        assert torchreg.sparsity(source).total == whole
    assert [e.name for e in torchreg.sparsity(opt).tensors] == [n for n, _ in net.named_parameters()]
    assert [e.name for e in torchreg.sparsity(reg).tensors] == ["0.weight", "2.weight"]


def test_integer_tensors_are_left_out():
    norm = nn.BatchNorm1d(3)
    assert "num_batches_tracked" not in {e.name for e in torchreg.sparsity(norm.state_dict()).tensors}


def test_forms_say_the_same():
    report = torchreg.sparsity(conv_net())
    from_json = json.loads(report.to_json())
    assert from_json == json.loads(json.dumps(report.to_dict()))
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [r["name"] for r in rows] == [e.name for e in report.tensors] + ["total"]
    assert [int(r["zeros"]) for r in rows[:-1]] == [e["zeros"] for e in from_json["tensors"]]
    assert rows[0]["shape"] == "4x3x3x3"
    table = str(report).splitlines()
    assert table[0].split()[:4] == ["parameter", "shape", "size", "zeros"]
    assert table[-1].split()[0] == "total"
    assert "1/4" in table[2]


def test_json_is_strict_where_norms_are_not_finite():
    text = torchreg.sparsity({"w": torch.tensor([float("nan")])}).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["tensors"][0]["l1_norm"] is None


def test_an_empty_source_gives_an_empty_report():
    report = torchreg.sparsity({})
    assert (report.total.size, report.fraction) == (0, 0.0)
    assert "total" in str(report)
    assert report.to_csv().count("\n") == 2


def test_unknown_sources_and_names_are_refused():
    with pytest.raises(TypeError, match="got int"):
        torchreg.sparsity(3)
    with pytest.raises(TypeError, match="got str for 'w'"):
        torchreg.sparsity({"w": "x"})
    with pytest.raises(KeyError, match="No tensor 'v'"):
        torchreg.sparsity({"w": torch.ones(1)})["v"]


def test_fetch_and_its_packing_keep_every_tensor():
    tensors = [
        torch.tensor(3, dtype=torch.uint8),
        torch.arange(6, dtype=torch.float64).view(2, 3).t(),
        torch.tensor([], dtype=torch.int64),
        torch.arange(5, dtype=torch.float32),
        torch.tensor([True, False]),
    ]
    for got in (transfer.fetch(tensors), transfer.unpacked(transfer.packed(tensors), tensors)):
        for want, have in zip(tensors, got, strict=True):
            assert have.dtype == want.dtype
            assert torch.equal(have, want)


def test_counting_reads_nothing_on_the_host():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a host read stalls the device"
            assert func is not torch.ops.aten.nonzero.default
            return func(*args, **(kwargs or {}))

    with NoReads():
        for w in (torch.ones(3, 4), torch.ones(5), torch.ones(2, 3, 4, 5)):
            counting.counted(w)
