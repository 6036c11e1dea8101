"""``torchreg doctor``: what each device would use, why, and what is found."""

import json
import os

import pytest
import torch
from command import assert_refused, program, run_json

import torchreg
from torchreg import L1, GroupLasso, ProxAdamW, ProxSGD
from torchreg.cli import main
from torchreg.kernels import native, toolchain


@pytest.fixture
def forgotten(monkeypatch, tmp_path):
    """Nothing remembered of the toolchain, before and after."""
    monkeypatch.delenv(toolchain.SWITCH, raising=False)
    caches = native.unavailable, toolchain.library
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def printed(capsys):
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_device_has_a_row_and_the_versions_are_there(capsys):
    document = run_json(["doctor"])
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    rows = [(device, optimizer) for device in devices for optimizer in ("ProxSGD", "ProxAdamW")]
    assert [(d["device"], d["optimizer"]) for d in document["devices"]] == rows
    assert document["versions"]["torchreg"] == torchreg.__version__
    assert document["versions"]["torch"] == torch.__version__
    table = printed(capsys)
    for word in (*devices, torchreg.__version__, torch.__version__, toolchain.SWITCH, toolchain.CACHE):
        assert word in table


@pytest.mark.parametrize("penalty", [L1(0.1), GroupLasso(0.1)], ids=str)
@pytest.mark.parametrize("cls", [ProxSGD, ProxAdamW])
@pytest.mark.parametrize("switch", ["0", "1", "1, but not of one"])
def test_it_tells_what_a_step_does(switch, cls, penalty, forgotten, monkeypatch):
    monkeypatch.setenv(toolchain.SWITCH, switch)
    if switch.endswith("one"):
        monkeypatch.setattr(native, "_source", lambda name, of=native._source: of(name) + "!" * (name == "prox_adam"))
    rows = run_json(["doctor"])["devices"]
    (cpu,) = (d for d in rows if d["device"] == "cpu" and d["optimizer"] == cls.__name__)
    w = torch.nn.Parameter(torch.ones(cpu["smallest"] or 100_000))
    w.grad = torch.zeros_like(w)
    opt = cls([w], lr=0.1, penalty=penalty)
    opt.step()
    assert (cpu["step"] == "fused (C)") == (opt.step_counts() is not None)
    assert (cpu["not_fused"] is None) == (opt.step_counts() is not None)


def test_a_switched_off_kernel_is_given_as_the_reason(forgotten, monkeypatch, capsys):
    monkeypatch.setenv(toolchain.SWITCH, "0")
    cpu = run_json(["doctor"])["devices"][0]
    assert cpu["step"] == "tiled"
    assert cpu["not_fused"] == "switched off by TORCHREG_NATIVE=0"
    assert "not fused: switched off by TORCHREG_NATIVE=0" in printed(capsys)


def test_without_a_compiler_that_is_the_reason(forgotten, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    document = run_json(["doctor"])
    assert document["compiler"] == {"path": None, "reason": "no C compiler (cc, gcc or clang) on the PATH"}
    assert "not fused: no C compiler" in printed(capsys)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_an_unsafe_cache_folder_is_named(monkeypatch, tmp_path, capsys):
    tmp_path.chmod(0o777)
    monkeypatch.setenv(toolchain.CACHE, str(tmp_path))
    assert run_json(["doctor"])["cache"]["path"] is None
    assert "others can write to it" in printed(capsys)


def test_it_runs_as_a_program(tmp_path):
    done = program("doctor", "--json", env={**os.environ, toolchain.SWITCH: "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["switches"][toolchain.SWITCH] == "0"


def test_help_and_bad_options(capsys):
    assert main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: torchreg doctor")
    assert_refused(capsys, ["doctor", "cpu"], "cpu")
