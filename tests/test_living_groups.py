"""What is said of groups of weights: counts of the living ones, their history as an image, and `torchreg inspect`."""

import json

import numpy as np
import pytest
import torch
from command import assert_refused
from torch import nn

import torchreg
from torchreg import L1, GroupLasso, TopK
from torchreg.cli import main
from torchreg.groups import Blocks, Heads, Labels, Member, Shared
from torchreg.monitor.pictures import FRAME, Barcode


class Writer:
    def __init__(self):
        self.scalars, self.images = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        self.images[tag] = image


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1]] = 0
        model[3].weight[:, :8] = 0
    return model


@pytest.mark.parametrize(
    ("groups", "alive"),
    [
        ("out_channels", {"0.weight": 4, "3.weight": 4}),
        ("in_channels", {"0.weight": 2, "3.weight": 16}),
        ("kernels", {"0.weight": 8, "3.weight": 64}),
        ("tensor", {"0.weight": 1, "3.weight": 1}),
        (Blocks(8), {"3.weight": 8}),
        (Heads(3), {"0.weight": 3}),
        (Labels(torch.tensor([0, 1, 2]).repeat_interleave(8)), {"3.weight": 2}),
    ],
    ids=str,
)
def test_living_groups_are_those_with_a_weight_that_is_not_zero(model, groups, alive):
    report = torchreg.group_sparsity(model, groups)
    assert {entry.name: entry.alive for entry in report.entries} == alive
    counted = torchreg.group_sparsity(model.state_dict(), groups)
    assert counted == report


def test_a_nan_is_alive(model):
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = torch.nan
    assert torchreg.group_sparsity(model, "rows")["0.weight"].alive == 5


def test_a_regularizer_says_what_its_groups_are(model):
    channel = torch.arange(6)
    shared = Shared(
        [
            Member("0.weight", 0, channel),
            Member("0.bias", 0, channel),
            Member("3.weight", 1, channel.repeat_interleave(4)),
        ],
        parts=[("conv", 6)],
    )
    report = torchreg.group_sparsity(torchreg.Regularizer(model, GroupLasso(1e-3, shared)))
    assert [(e.name, e.count, e.alive) for e in report.entries] == [("conv", 6, 5)]  # 4 has a bias and users
    assert torchreg.group_sparsity(model, shared) == report
    rules = {"0.weight": GroupLasso(1e-3, "out_channels"), "3.weight": TopK(3, groups="columns"), "*.bias": L1(1e-3)}
    report = torchreg.group_sparsity(torchreg.Regularizer(model, rules))
    assert [(e.name, e.groups, e.count, e.zero) for e in report.entries] == [
        ("0.weight", "out_channels", 6, 2),
        ("3.weight", "columns", 24, 8),
    ]
    assert report.fraction == 10 / 30


def test_a_report_is_plain_data_too(model):
    report = torchreg.group_sparsity(model, "rows")
    document = json.loads(json.dumps(report.to_dict()))
    assert document["groups"][0] == {
        "name": "0.weight", "groups": "rows", "count": 6, "alive": 4, "zero": 2, "fraction": 2 / 6,
    }  # fmt: skip
    assert document["total"]["zero"] == 2
    assert report.to_csv().splitlines()[1].startswith("0.weight,rows,6,4,2,")
    with pytest.raises(KeyError, match="No groups of 'x'"):
        report["x"]


def test_what_has_no_groups_is_refused(model):
    with pytest.raises(ValueError, match="No penalty of the regularizer has groups"):
        torchreg.group_sparsity(torchreg.Regularizer(model, L1(1e-3)))
    with pytest.raises(ValueError, match="No tensor has groups"):
        torchreg.group_sparsity(model, Blocks(7))
    with pytest.raises(TypeError, match="Expected `groups` beside"):
        torchreg.group_sparsity(model)


def unframed(image):
    """The grey image within its frame."""
    inner = image[FRAME:-FRAME, FRAME:-FRAME]
    grey = (inner == inner[:, :, :1]).all((0, 2))
    return inner[:, grey, 0]


def test_the_monitor_logs_living_groups_and_their_barcode(model):
    reg = torchreg.Regularizer(model, {"0.weight": GroupLasso(1e-3, "out_channels")})
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1)
    writer = Writer()
    monitor = torchreg.SparsityMonitor(reg, writer, every=1, optimizer=optimizer, images=True)
    for dead in ([1, 4], [1, 4, 5], [0, 1]):
        with torch.no_grad():
            model[0].weight.fill_(1.0)[dead] = 0
        monitor.step()
    assert writer.scalars["groups/0.weight"] == [(1, 4), (2, 3), (3, 4)]
    image = unframed(writer.images["barcode/0.weight"])
    high, wide = image.shape[0] // 3, image.shape[1] // 6
    assert image.dtype == np.uint8
    assert (image[::high, ::wide] == 255).tolist() == [
        [True, False, True, True, False, True],
        [True, False, True, True, False, False],
        [False, False, True, True, True, True],
    ]


def test_without_groups_nothing_of_them_is_logged(model):
    writer = Writer()
    torchreg.SparsityMonitor(torchreg.Regularizer(model, L1(1e-3)), writer, every=1, images=True).step()
    assert not any(tag.startswith(("groups/", "barcode/")) for tag in (*writer.scalars, *writer.images))


def test_a_barcode_stays_small_and_spans_the_whole_run():
    barcode = Barcode(700)
    for i in range(3000):
        barcode.add(torch.arange(700) >= i / 3000 * 700)
    image = unframed(barcode.image())
    assert image.shape[0] <= 512
    assert image.shape[1] == 512
    share = image.mean(1) / 255
    assert share[0] == 1
    assert share[-1] < 0.01
    assert np.allclose(share, np.linspace(1, 0, len(share)), atol=0.01)


def test_inspect_counts_groups(model, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert main(["inspect", str(path), "--groups", "out_channels"]) == 0
    printed = capsys.readouterr().out
    assert str(torchreg.sparsity(model)) in printed
    assert str(torchreg.group_sparsity(model, "out_channels")) in printed
    assert main(["inspect", str(path), "--groups", "blocks=8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["groups"] == torchreg.group_sparsity(model, Blocks(8)).to_dict()
    assert document["total"]["size"] == sum(p.numel() for p in model.parameters())
    assert main(["inspect", str(path), "--groups", "heads=1x3", "--csv"]) == 0
    assert capsys.readouterr().out == torchreg.group_sparsity(model, Heads(1, 3)).to_csv()


@pytest.mark.parametrize("groups", ["channels", "blocks=x", "blocks=0", "heads=", "heads=2x"])
def test_inspect_refuses_unknown_groups(groups, model, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert_refused(capsys, ["inspect", str(path), "--groups", groups], "expected one of rows, out_features")


def test_inspect_says_so_where_nothing_can_be_cut(model, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert_refused(capsys, ["inspect", str(path), "--groups", "blocks=1000"], "can be cut into")


def test_the_monitor_logs_what_it_is_asked_to_measure(model):
    writer = Writer()
    values = iter([{"a": 1.0, "b": torch.tensor(2.0)}, {"a": 3.0, "b": 4.0}])
    measures = {"own": lambda: next(values), "number": lambda: 7}
    monitor = torchreg.SparsityMonitor(model, writer, every=1, measures=measures)
    monitor.step()
    monitor.step()
    assert writer.scalars["own/a"] == [(1, 1.0), (2, 3.0)]
    assert writer.scalars["own/b"] == [(1, 2.0), (2, 4.0)]
    assert writer.scalars["number"] == [(1, 7.0), (2, 7.0)]
    with pytest.warns(RuntimeWarning, match="The measure 'own' failed"):
        monitor.step()
    monitor.step()
    assert len(writer.scalars["own/a"]) == 2
    assert len(writer.scalars["number"]) == 4
    with pytest.raises(TypeError, match="measure 'x' to be a function, got int"):
        torchreg.SparsityMonitor(model, writer, measures={"x": 3})


def test_the_size_of_a_compacted_model_is_logged_while_it_is_trained(model):
    pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    x = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        model[0].bias[4] = 0
    writer = Writer()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    size = torchreg.export.CompactedSize(model, x)
    monitor = torchreg.SparsityMonitor(model, writer, every=1, measures={"compacted": size})
    monitor.step()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0
    monitor.step()
    for step in (0, 1):
        alive = 3 - step  # 1 and 4 are zero, 0 is not used
        assert writer.scalars["compacted/parameters"][step][1] == alive * (2 * 9 + 1) + 4 * (4 * alive + 1)
    dense = torchreg.export.compact(model, x, seconds=0).report
    assert writer.scalars["compacted/flops"][1][1] == dense.flops[1]
    before["0.weight"][5], before["0.bias"][5] = 0, 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
