"""``torchreg inspect``: real checkpoints, and one line for what is none."""

import json
import pickle
import re
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import assert_one_line, assert_refused, program, run_json
from torch import nn

import torchreg
from torchreg.cli import main


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].weight[:, 5] = 0
    return model


def inspected(path):
    return run_json(["inspect", str(path)])


def test_inspect_prints_the_table_of_sparsity(model, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert main(["inspect", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(torchreg.sparsity(model)) in captured.out
    assert re.search(r"0\.weight\s+4×6\s+24\s+19\s+79\.2 %\s+3/4\s+1/6", captured.out)


def test_inspect_gives_json_and_csv(model, tmp_path, capsys):
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    report = torchreg.sparsity(model)
    document = inspected(path)
    assert document.pop("file") == str(path)
    assert document.pop("part") == ""
    assert document == json.loads(report.to_json())
    assert main(["inspect", str(path), "--csv"]) == 0
    assert capsys.readouterr().out == report.to_csv()


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_inspect_takes_the_model_and_not_the_optimizer(key, model, tmp_path):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, key: model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    document = inspected(path)
    assert document["part"] == key
    assert [entry["name"] for entry in document["tensors"]] == [name for name, _ in model.named_parameters()]


def test_inspect_names_nested_tensors_by_dots(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    path = tmp_path / "gan.bin"
    nets = {"nets": {"generator": {"w": torch.zeros(3)}, "critics": [torch.ones(2)]}, "steps": torch.tensor(4)}
    torch.save({**nets, "opt": optimizer.state_dict()}, path)
    assert [entry["name"] for entry in inspected(path)["tensors"]] == ["nets.generator.w", "nets.critics.0"]


def test_inspect_counts_tied_weights_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    path = tmp_path / "tied.pt"
    torch.save(model.state_dict(), path)
    assert inspected(path)["total"]["size"] == 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
def test_inspect_reads_every_float_type(dtype, tmp_path):
    path = tmp_path / "single.pt"
    torch.save(torch.tensor([0.0, 1.0, 0.0, 2.0]).to(dtype), path)
    assert inspected(path)["total"]["zeros"] == 2


def test_inspect_reads_prox_sgds_own_checkpoint(model, tmp_path):
    reg = torchreg.Regularizer(model, torchreg.L1(0.1))
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "reg": reg.state_dict()}, path)
    assert inspected(path)["total"]["zeros"] >= 19


def test_inspect_reads_safetensors(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), path)
    assert inspected(path)["total"]["zeros"] == torchreg.sparsity(model).total.zeros


def test_inspect_reads_sparse_files_and_compares_their_size(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    model.append(nn.Linear(2, 200, bias=False)).append(nn.Linear(200, 2, bias=False))
    model[4].weight = nn.Parameter(model[3].weight.t())  # a view, stored by itself
    model[3].weight.data.zero_()
    model.register_module("again", model[3])
    path = tmp_path / "model.safetensors"
    torchreg.export.save_sparse(model, path)
    document = inspected(path)
    assert document["total"]["zeros"] == torchreg.sparsity(model).total.zeros == 823
    dense = 4 * (24 + 4 + 4 * 4 + 8 + 2 + 400 + 400) + 8  # with the norm's counter
    assert (document["bytes_on_disk"], document["dense_bytes"]) == (path.stat().st_size, dense)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path.stat().st_size:,} bytes on disk: " in out
    assert f" % of its {dense:,} bytes of dense tensors" in out
    assert str(torchreg.sparsity(model)) in out


def test_inspect_refuses_a_damaged_sparse_file(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    torchreg.export.save_sparse({"w": torch.eye(40)}, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(capsys, ["inspect", path], "model.safetensors' can't be loaded: it is damaged: the checksum of")


class Malicious:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (Path(self.trace),))


def test_inspect_executes_nothing(tmp_path, capsys):
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # it does work
    trace.unlink()
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Malicious(trace)}, tmp_path / "zip.pt")
    torch.save(Malicious(trace), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(trace)))
    for name in ("zip.pt", "old.pt", "plain.pkl"):
        assert_refused(capsys, ["inspect", tmp_path / name], "torchreg inspect: error:")
        assert not trace.exists()


def test_inspect_refuses_what_is_not_weights(model, tmp_path, capsys):
    torch.save(model, tmp_path / "module.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"epoch": 3, "ids": torch.arange(4)}, tmp_path / "integers.pt")
    torch.save(torch.optim.SGD(model.parameters()).state_dict(), tmp_path / "optimizer.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    contents = {
        "truncated.pt": whole[: len(whole) // 2],
        "short.pt": whole[:20],
        "text.pt": b"these are not weights\n",
        "nothing.pt": b"",
        "number.pt": pickle.dumps(3),
        "text.safetensors": b"these are not weights\n",
        "nothing.safetensors": b"",
        "huge.safetensors": struct.pack("<Q", 2**62) + b"{}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = ["module.pt", "empty.pt", "integers.pt", "optimizer.pt", "script.pt", *contents, "missing.pt", "."]
    for name in names:
        assert_refused(capsys, ["inspect", tmp_path / name], "torchreg inspect: error:")
    assert_refused(capsys, ["inspect", tmp_path / "module.pt"], "holds more than weights")


def test_names_cannot_write_control_characters_to_the_terminal(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save({"\x1b[2Jweight\n": torch.zeros(2)}, path)
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert_refused(capsys, ["inspect", "no\x1b[2J\nfile.pt"], "does not exist")


def test_names_that_print_alike_stay_two_tensors(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({1: torch.zeros(2), "1": torch.ones(2), "a\n": torch.zeros(3), "a\\n": torch.ones(3)}, path)
    document = inspected(path)
    assert [entry["name"] for entry in document["tensors"]] == ["1", "1", "a\\n", "a\\n"]
    assert document["total"]["size"] == 10


def odd_contents():
    looped = {"w": torch.zeros(2)}
    looped["again"] = [looped]
    yield "looped", looped, "holds itself"
    looped = {}
    looped["state_dict"] = looped
    yield "looped state dict", looped, "holds itself"
    if hasattr(torch, "float4_e2m1fn_x2"):
        packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        yield "float4", {"w": packed}, "can't be counted"


@pytest.mark.parametrize(("content", "words"), [pytest.param(c, w, id=n) for n, c, w in odd_contents()])
def test_odd_contents_are_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    assert_refused(capsys, ["inspect", path], words)


def test_nested_tensors_are_one_line(tmp_path):
    path = tmp_path / "nested.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, path)
    assert_one_line(program("inspect", path), "nested.pt")


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--json", "--csv"]])
def test_bad_inspect_options_are_refused(arguments, capsys):
    assert_refused(capsys, arguments)
