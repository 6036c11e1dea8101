"""Files as they might come from anywhere: real ones, damaged in many ways, and hostile ones, by number.

As a program, it puts the files of a range of numbers through every loader and command that reads files, and prints what
came of each: a process of its own, so that a crash is seen, with a hook that notices if any code of a file runs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import sys
import tempfile
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchreg
from torchreg.cli import main
from torchreg.cli.data import load_npz
from torchreg.cli.output import CommandError
from torchreg.cli.report.runs import read_run
from torchreg.cli.table import load_table

FORBIDDEN = {
    *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.rmdir"),
    *("shutil.rmtree", "socket.connect", "ctypes.dlopen", "webbrowser.open", "builtins.input"),
}
MOST_MEMORY = 1 << 27


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    reg = torchreg.Regularizer(model, {"0.weight": torchreg.L1(0.1), "2.weight": torchreg.GroupLasso(0.1)})
    opt = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    opt.settle_lookups(model)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randint(0, 6, (5, 2))).square().sum().backward()
        opt.step()
    schedule = torchreg.schedules.LinearStrength(reg, until=10)
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": opt.state_dict(),
        "regularizer": reg.state_dict(),
        "schedule": schedule.state_dict(),
    }


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def corpus(folder):
    """Whole files by name."""
    checkpoint = trained()
    files = {
        "zip.pt": saved(checkpoint),
        "small.pth": saved({"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}),
        "legacy.pt": saved(checkpoint, _use_new_zipfile_serialization=False),
        "plain.bin": pickle.dumps({"w": [1.0, 2.0], "n": {"a": (1, 2)}}, protocol=2),
        "sparse.pt": saved({"s": torch.eye(4).to_sparse(), "c": torch.eye(4).to_sparse_csr(), "w": torch.ones(2)}),
    }
    path = Path(folder, "source.safetensors")
    weights = {"w": torch.zeros(40, 40).fill_diagonal_(1.5), "b": torch.arange(5.0), "i": torch.arange(3)}
    torchreg.export.save_sparse(weights, path)
    files["sparse.safetensors"] = path.read_bytes()
    from safetensors.torch import save

    files["dense.safetensors"] = save({"w": torch.eye(4), "b": torch.zeros(3)})
    rng = np.random.default_rng(0)
    images = io.BytesIO()
    y = rng.integers(0, 3, 30)
    np.savez(images, x_train=rng.random((30, 4)), y_train=y, x_test=rng.random((30, 4)), y_test=y)
    files["images.npz"] = images.getvalue()
    packed = io.BytesIO()
    np.savez_compressed(packed, X=rng.random((30, 3)), y=rng.random(30))
    files["table.npz"] = packed.getvalue()
    with SummaryWriter(Path(folder, "run")) as writer:
        writer.add_scalar("loss", 0.5, 1)
        writer.add_histogram("weights", rng.random(50), 2)
        writer.add_image("mask", rng.random((1, 4, 4)), 3)
        writer.add_hparams({"lr": 0.1}, {"accuracy": 0.9}, run_name=".")
    files["a.tfevents.1"] = next(Path(folder, "run").iterdir()).read_bytes()
    rows = "\n".join(",".join(f"{v:.3f}" for v in row) for row in rng.random((30, 4)))
    files["table.csv"] = f"a,b,c,y\n{rows}\n".encode()
    return files


def hostile(trace):
    """Files that nobody's tools write, by name."""
    touch = Payload(Path.touch, Path(trace))
    shell = Payload(os.system, f"touch {trace}")
    evaluated = Payload(eval, f"open({str(trace)!r}, 'w')")
    content = {"state_dict": {"w": torch.ones(2)}}
    for i, payload in enumerate((touch, shell, evaluated)):
        yield f"zip{i}.pt", saved({**content, "extra": payload})
        yield f"legacy{i}.pt", saved({**content, "extra": payload}, _use_new_zipfile_serialization=False)
        for protocol in (0, 2, 4):
            yield f"pickle{i}-{protocol}.pkl", pickle.dumps(payload, protocol=protocol)
        objects = io.BytesIO()
        np.savez(objects, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test", "X"), np.array([payload], object)))
        yield f"objects{i}.npz", objects.getvalue()
        yield f"renamed{i}.safetensors", pickle.dumps(payload)
    yield "nested.pt", _deep(20_000)
    yield "nested-dicts.pt", saved(_nested(lambda inner: {"state_dict": inner}, 150))
    yield "doubling.pt", saved(_nested(lambda inner: [inner, inner], 60))
    yield (
        "tripling.pt",
        saved(_nested(lambda inner: dict.fromkeys(("state_dict", "model_state_dict", "model"), inner), 60)),
    )
    yield (
        "expanded.pt",
        _with_pickle(saved({"w": torch.zeros(4)}), b"K\x04\x85", _int(1 << 31) + b"\x85", b"K\x01\x85", b"K\x00\x85"),
    )
    yield "numel.pt", _with_pickle(saved({"w": torch.zeros(4)}), b"K\x04tq", _int(1 << 30) + b"tq")
    yield "offset.pt", _with_pickle(saved({"w": torch.zeros(4)}), b"QK\x00K\x04", b"Q" + _int(-4) + b"K\x04")
    yield "size.pt", _with_pickle(saved({"w": torch.zeros(4)}), b"QK\x00K\x04\x85", b"QK\x00" + _int(1 << 62) + b"\x85")
    yield (
        "float8.pt",
        _with_pickle(
            saved({"w": torch.zeros(4).to(torch.float8_e5m2)}),
            b"K\x04\x85",
            _int(1 << 40) + b"\x85",
            b"K\x01\x85",
            b"K\x00\x85",
        ),
    )
    yield (
        "huge-sparse.pt",
        saved({"s": torch.sparse_coo_tensor([[0], [0]], [1.0], (1 << 31, 1 << 31), check_invariants=True)}),
    )
    for name, index in (("beyond", 1 << 40), ("before", -(1 << 40))):  # written through when they become dense
        wild = torch.sparse_coo_tensor([[0], [index]], [1.0], (4, 4), check_invariants=False)
        yield f"sparse-{name}.pt", saved({"s": wild})
    yield "bytes.pkl", b"\x80\x02cbuiltins\nbytearray\n" + _int(1 << 36) + b"\x85R."
    yield "memo.pkl", b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFFF) + b"."
    yield "text.pkl", b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b"abc."
    bomb = _bomb(saved({"w": torch.zeros(4)}), zipfile.ZIP_DEFLATED, 1 << 28)
    yield from ((f"bomb.{suffix}", bomb) for suffix in ("pt", "npz"))
    yield "lzma.pt", _bomb(saved({"w": torch.zeros(4)}), zipfile.ZIP_LZMA, 1 << 24)
    claims = bytearray(saved({"w": torch.zeros(4)}))
    at = claims.rindex(b"PK\x01\x02")
    claims[at + 20 : at + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    yield "claims.pt", bytes(claims)
    yield "header.safetensors", struct.pack("<Q", 1 << 62) + b"{}"
    big = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    yield "shape.safetensors", struct.pack("<Q", len(big)) + big
    deep = b"[" * 50_000
    yield "deep.safetensors", struct.pack("<Q", len(deep)) + deep
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    yield (
        "shape.npz",
        _archive({f"{n}.npy": array.getvalue() for n in ("x_train", "y_train", "x_test", "y_test", "X", "y")}),
    )
    yield "wide.csv", b"a," * 300_000 + b"y\n1,2\n"
    yield "null.csv", b"a,b\0\n1,2\n"


def _nested(wrap, depth):
    content = {}
    for _ in range(depth):
        content = wrap(content)
    return content


def _deep(depth):
    """A pickle of lists in lists, which a recursive pickler could not write."""
    return _archive(
        {
            "a/data.pkl": b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".",
            "a/version": b"3\n",
            "a/byteorder": b"little",
        }
    )


def _int(value):
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def _archive(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _members(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _with_pickle(whole, *swaps):
    """A checkpoint with bytes of its pickle replaced."""
    members = _members(whole)
    name = next(name for name in members if name.endswith("data.pkl"))
    for old, new in zip(swaps[::2], swaps[1::2], strict=True):
        assert old in members[name], old
        members[name] = members[name].replace(old, new, 1)
    return _archive(members)


def _bomb(whole, compression, size):
    """A checkpoint, and an array beside it, of so many compressed zeros; made without the memory for them."""
    members, file = _members(whole), io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            if not name.endswith("data/0"):
                archive.writestr(name, data)
        for name in (next(name for name in members if name.endswith("data/0")), "X.npy"):
            with archive.open(name, "w") as member:
                for _ in range(size >> 20):
                    member.write(bytes(1 << 20))
    return file.getvalue()


def mutated(whole, random_, others):
    """The content of a file, damaged in one of many ways, some of them twice."""
    data = bytearray(whole)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        way = random_.randrange(9)
        at = random_.randrange(len(data))
        length = min(random_.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
        if way == 0:
            del data[at:]
        elif way == 1:
            for _ in range(random_.choice((1, 3, 30))):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        elif way == 2:
            data[at : at + length] = random_.randbytes(length)
        elif way == 3:
            del data[at : at + length]
        elif way == 4:
            data[at:at] = data[random_.randrange(len(data)) :][:length]
        elif way == 5:
            other = random_.choice(others)
            data[at:] = other[random_.randrange(len(other)) :]
        elif way == 6:
            data[at : at + 8] = random_.choice(
                (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<Q", 1 << 40))
            )
        elif way == 7:
            data[at:at] = random_.choice(
                (b"PK\x03\x04", b"\x80\x02", b"cos\nsystem\n", b"R", b"b", b"}", b"]", b"(", b".")
            )
        elif data == whole and data[:2] == b"PK":
            data = bytearray(_damaged_member(whole, random_))
    return bytes(data)


def _damaged_member(whole, random_):
    """An archive whose checksums are right, with one damaged member: damage that no zip reader finds."""
    members = _members(whole)
    name = random_.choice([n for n in members if n.endswith((".pkl", ".npy"))] or list(members))
    data = bytearray(members[name])
    for _ in range(random_.choice((1, 2, 5))):
        if data:
            at = random_.randrange(len(data))
            data[at] = random_.choice((random_.randrange(256), *b"R.bcQ]}()\x85\x86\x87tq\x8a"))
    members[name] = bytes(data)
    if random_.random() < 0.1:
        members.pop(random_.choice(list(members)))
    return _archive(members)


def loaded(path):
    """What is wrong with how a file is taken: nothing but a result or one line of an error is right."""
    if path.suffix == ".safetensors":
        try:
            torchreg.export.load_sparse(path)
        except ValueError as error:
            if "\n" in str(error) or "can't be loaded" not in str(error):
                return f"load_sparse: {error}"
    if path.suffix == ".npz":
        try:
            load_npz(path)
        except CommandError as error:
            if "\n" in str(error):
                return f"load_npz: {error}"
        return table(path)
    if path.suffix == ".csv":
        return table(path)
    if ".tfevents." in path.name:
        found = read_run("run", [path])
        return next((f"read_run: {text}" for text in found.problems if "\n" in text), None)
    for arguments in (["inspect", str(path), "--json"], ["inspect", str(path), "--groups", "rows"]):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(arguments)
        line = re.fullmatch(r"torchreg[ a-z]*: error: [^\n]+\n", err.getvalue())
        if not ((status == 0 and not err.getvalue()) or (status == 2 and line and not out.getvalue())):
            return f"{arguments}: {status}, {err.getvalue()!r:.300}, {out.getvalue()!r:.100}"
    return None


def table(path):
    try:
        load_table(str(path))
    except CommandError as error:
        if "\n" in str(error):
            return f"load_table: {error}"
    return None


def file_of(number, whole, extra):
    """The name and content of a numbered file: the hostile ones first."""
    if number < len(extra):
        return extra[number]
    random_ = random.Random(number)
    name = random_.choice(sorted(whole))
    return name, mutated(
        whole[name], random_, [*whole.values(), *(content for _, content in extra if len(content) < 1 << 20)]
    )


def run(start, stop):
    import faulthandler
    import resource

    faulthandler.enable()
    problems, errors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "executed")
        whole, extra = corpus(folder), list(hostile(trace))
        warnings.simplefilter("ignore")
        for name, content in whole.items() if start == 0 else ():
            Path(folder, name).write_bytes(content)
            if problem := loaded(Path(folder, name)):
                problems.append((name, problem))
        sys.addaudithook(lambda event, args: event in FORBIDDEN and ran.append((event, str(args)[:200])))
        ran: list = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(start, stop):
            name, content = file_of(number, whole, extra)
            path = Path(folder, f"{number}-{name}")
            path.write_bytes(content)
            print(f"{number} {name}", file=sys.stderr, flush=True)
            try:
                problem = loaded(path)
            except BaseException as error:
                problem = f"{type(error).__name__}: {error!s:.300}"
            path.unlink()
            if ran or trace.exists():
                problem = f"code has run: {ran}"
                ran.clear()
                trace.unlink(missing_ok=True)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if used - before > MOST_MEMORY >> 10:
                problem = f"took {(used - before) >> 10} MiB"
            before = max(before, used)
            if problem:
                problems.append((f"{number} {name}", problem))
            errors += 1
    json.dump({"files": errors, "problems": problems}, sys.stdout)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
