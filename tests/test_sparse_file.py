"""Sparse files: bit for bit what was saved, in the fewest bytes, whole or not there."""

import math
import os
import stat
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_dicts import assert_same_bits, codings, random_bits, raw
from torch import nn

from torchreg.export import coding, container, load_sparse, save_sparse

DTYPES = list(container.NAMES)
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# bit for bit


@SETTINGS
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_loading_gives_the_bits_that_were_saved(path, dtype, shape, density, seed):
    state = {"weight": random_bits(dtype, shape, density, seed), "mask": torch.tensor(True), "a.b": torch.ones(3)}
    save_sparse(state, path)
    assert_same_bits(load_sparse(path), state)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [40, 4000])
def test_only_the_pattern_without_a_set_bit_is_a_zero(dtype, length, path):
    top = 8 * dtype.itemsize
    patterns = [1 << (top - 1), 1, (1 << top) - 1, (1 << (top - 1)) - 1, ((1 << top) - 1) ^ 2]  # -0.0, subnormal, NaNs
    data = np.zeros(length, dtype=f"u{dtype.itemsize}")
    data[3 : 3 + 5 * 7 : 7] = patterns
    state = {"w": torch.from_numpy(data.view(np.uint8)).view(dtype)}
    save_sparse(state, path)
    assert length == 40 or codings(path) != {"w": "dense"}
    assert_same_bits(load_sparse(path), state)


def test_negative_zeros_are_values(path):
    state = {"w": torch.zeros(4000).neg()}
    save_sparse(state, path)
    assert codings(path) == {"w": "dense"}
    assert torch.signbit(load_sparse(path)["w"]).all()


def test_views_and_memory_formats_are_stored_in_their_logical_order(path):
    base = random_bits(torch.float32, (8, 6, 10, 4), 0.1)
    state = {
        "transposed": base[0, 0].t(),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "every third": base.reshape(-1)[1::3],
        "expanded": torch.tensor([[0.0], [2.0]]).expand(2, 500),
        "conjugated": torch.view_as_complex(base.reshape(-1, 2)).conj(),
        "negative": torch.view_as_complex(base.reshape(-1, 2)).conj().imag,
        "parameter": nn.Parameter(base[2]),
    }
    save_sparse(state, path)
    expected = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state.items()}
    assert_same_bits(load_sparse(path), expected)


def test_a_model_comes_back(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(1440, 10))
    model[3].weight.data[torch.rand_like(model[3].weight) < 0.9] = 0
    model(torch.randn(2, 3, 8, 8))
    model.to(memory_format=torch.channels_last)
    save_sparse(model, path)
    again = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(1440, 10))
    again.load_state_dict(load_sparse(path))
    assert_same_bits(again.state_dict(), {name: t.contiguous() for name, t in model.state_dict().items()})
    assert list(load_sparse(path)) == list(model.state_dict())


def test_tied_weights_are_stored_once_and_load_as_one(path):
    model = nn.Sequential(nn.Embedding(300, 40), nn.Linear(40, 300, bias=False))
    model[1].weight = model[0].weight
    save_sparse(model, path)
    assert path.stat().st_size < 1.1 * 300 * 40 * 4
    state = load_sparse(path)
    assert state["1.weight"] is state["0.weight"]
    again = nn.Sequential(nn.Embedding(300, 40), nn.Linear(40, 300, bias=False))
    again.load_state_dict(state)
    assert torch.equal(again[0].weight, model[0].weight)
    assert torch.equal(again[1].weight, model[1].weight)


def test_tensors_that_merely_overlap_are_apart(path):
    base = torch.arange(20.0)
    state = {
        "all": base,
        "head": base[:10],
        "tail": base[10:],
        "square": base.view(4, 5),
        "bits": base.view(torch.int32),
    }
    state |= {"turned": torch.arange(9.0).view(3, 3)}
    state |= {"turned back": state["turned"].t(), "complex": torch.tensor([1 + 2j, 3 - 1j])}
    state |= {"conjugate": state["complex"].conj(), "imaginary": state["complex"].imag}
    state |= {"negative": state["conjugate"].imag}
    state |= {"empty": base[:0], "other empty": torch.empty(0), "empty matrix": torch.empty(0, 3)}
    save_sparse(state, path)
    loaded = load_sparse(path)
    assert_same_bits(loaded, {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items()})
    assert len({id(tensor) for tensor in loaded.values()}) == len(state)
    loaded["head"].zero_()
    assert torch.equal(loaded["all"], base)


def test_names_like_those_of_parts_are_kept_apart(path):
    sparse = random_bits(torch.float32, (4000,), 0.05)
    state = {"w": sparse, "w.gaps": sparse, "w.compressed": sparse, "v": sparse, "": sparse, 'ü\n"\\': torch.ones(2)}
    save_sparse({name: tensor.clone() for name, tensor in state.items()}, path)
    assert_same_bits(load_sparse(path), state)
    assert codings(path)["w"] == "dense"
    assert codings(path)["v"] == "gaps4"


def test_the_same_weights_make_the_same_file(path, tmp_path):
    state = {"w": random_bits(torch.float32, (50, 50), 0.1), "b": torch.ones(50)}
    save_sparse(state, path)
    save_sparse(load_sparse(path), tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


# the fewest bytes


def plain_size(array, way):
    """The places' bytes of a coding, counted one symbol after the other."""
    if way == coding.BITMASK:
        return math.ceil(array.size / 8)
    full, symbols, gap = 2 ** coding.GAP_BITS[way] - 1, 0, 0
    for value in [*array.tolist(), 1]:
        gap, symbols = (gap + 1, symbols) if value == 0 else (0, symbols + gap // full + 1)
    return math.ceil(symbols * coding.GAP_BITS[way] / 8)


def gapped(gaps, after):
    array = np.zeros(sum(gaps) + len(gaps) + after, dtype=np.uint32)
    array[np.cumsum([gap + 1 for gap in gaps], dtype=np.int64) - 1] = 7
    return array


GAPS = st.sampled_from([0, 1, 2, 4, 5, 6, 7, 13, 14, 15, 16, 29, 30, 31, 254, 255, 256, 300, 509, 510, 511, 5000])


@SETTINGS
@given(gaps=st.lists(GAPS, max_size=60), after=GAPS, dtype=st.sampled_from(["u1", "u2", "u4", "u8"]))
def test_the_shortest_coding_is_taken_and_finds_each_value(gaps, after, dtype):
    array = gapped(gaps, after).astype(dtype)
    sizes = {way: plain_size(array, way) for way in coding.CODINGS}
    values = np.count_nonzero(array) * array.itemsize
    allowed = {w: s for w, s in sizes.items() if array.nbytes <= coding.LARGEST_EXPANSION * (values + s)}
    coded = coding.shortest(array)
    if coded is None:
        assert values + min(allowed.values()) >= array.nbytes
        return
    assert coded.places.nbytes == sizes[coded.coding] == min(allowed.values())
    where = coding.positions(coded.coding, coded.places, coded.values.size, array.size)
    again = np.zeros_like(array)
    again[where] = coded.values
    assert np.array_equal(again, array)


@pytest.mark.parametrize("gap", [0, 1, 65_534, 65_535, 65_536, 131_069, 131_070, 131_071])
def test_gaps_of_16_bits_reach_any_length(gap):
    array = gapped([3000] * 50 + [gap] + [3000] * 50, after=gap)
    coded = coding.shortest(array)
    assert coded.coding == "gaps16"
    assert coded.places.nbytes == plain_size(array, "gaps16")
    where = coding.positions("gaps16", coded.places, coded.values.size, array.size)
    assert np.array_equal(where, np.flatnonzero(array))


WAYS = {1: "dense", 0.5: "bitmask", 0.2: "gaps4", 0.1: "gaps4", 0.02: "gaps8", 0.0005: "gaps16"}


@pytest.mark.parametrize(("density", "way"), WAYS.items())
def test_each_density_has_its_coding(density, way, path):
    save_sparse({"w": random_bits(torch.float32, (500, 300), density)}, path)
    assert codings(path) == {"w": way}


SHAPES = {
    "LeNet-300-100": [(300, 784), (300,), (100, 300), (100,), (10, 100), (10,)],
    "ResNet-18's middle": [(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (256, 128, 3, 3)] + 8 * [(128,)],
    "transformer block": [(768, 256), (768,), (256, 256), (1024, 256), (1024,), (256, 1024)] + 6 * [(256,)],
}


@pytest.mark.parametrize("net", SHAPES)
def test_a_model_with_nine_tenths_zeros_takes_less_than_15_percent(net, path):
    state = {f"layer{i}.weight": random_bits(torch.float32, shape, 0.1, i) for i, shape in enumerate(SHAPES[net])}
    save_sparse(state, path)
    assert path.stat().st_size < 0.15 * 4 * sum(tensor.numel() for tensor in state.values())


@SETTINGS
@given(
    sizes=st.lists(st.integers(0, 200), max_size=8),
    density=st.floats(0, 1),
    name=st.text(st.characters(codec="utf-8"), max_size=9),
)
def test_no_file_is_much_larger_than_the_dense_one(path, sizes, density, name):
    state = {f"{name}{i}": random_bits(torch.float32, (size,), density, i) for i, size in enumerate(sizes)}
    save_sparse(state, path)
    coded = path.stat().st_size
    save_sparse({name: torch.ones_like(tensor) for name, tensor in state.items()}, path)
    assert coded <= path.stat().st_size + 16  # digits of offsets, and the header's filling


# the format


def test_the_safetensors_library_reads_it_and_is_read(path, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    named = [dtype for dtype in FLOATS if dtype.itemsize > 1] + [torch.int64, torch.int8, torch.bool]
    state = {str(dtype): random_bits(dtype, (11, 3), 0.9) for dtype in named}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_sparse(state, path)
    found = library.load_file(path)
    assert_same_bits({name: found[name] for name in state}, state)
    library.save_file(state, tmp_path / "foreign.safetensors", metadata={"format": "pt", "by": "hand"})
    foreign = load_sparse(tmp_path / "foreign.safetensors")
    assert_same_bits({name: foreign[name] for name in state}, state)


def test_the_library_sees_the_parts_of_a_coded_tensor(path):
    library = pytest.importorskip("safetensors.torch")
    weight = random_bits(torch.float32, (20, 64), 0.5)
    save_sparse({"w": weight, "v": random_bits(torch.float32, (20, 64), 0.0005)}, path)
    found = library.load_file(path)
    assert set(found) == {"w.compressed", "w.bitmask", "v.compressed", "v.gaps"}
    assert torch.equal(raw(found["w.compressed"]), raw(weight.flatten()[weight.view(torch.int32).flatten() != 0]))
    # compressed-tensors' rows, of 64 / 8 bytes each
    mask = np.unpackbits(found["w.bitmask"].numpy().reshape(20, 8), axis=1, bitorder="little")
    assert np.array_equal(mask, weight.view(torch.int32).numpy() != 0)


def test_each_tensors_bytes_begin_at_a_multiple_of_its_elements_size(path):
    save_sparse({str(dtype): random_bits(dtype, (3,), 1) for dtype in reversed(DTYPES)}, path)
    with open(path, "rb") as file:
        header = container.read_header(file)
    assert (8 + header.length) % 8 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in header.entries.values())


def test_no_library_is_needed(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    save_sparse({"w": torch.eye(30)}, path)
    assert_same_bits(load_sparse(path), {"w": torch.eye(30)})


# whole or not there

KILLED = """
    import os, signal, sys, torch, zlib
    from torchreg.export import container, load_sparse, save_sparse

    path, fatal = sys.argv[1], None
    state = {"a": torch.full((3000,), 2.0), "b": torch.full((4000,), 2.0), "c": torch.eye(100)}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying:
        '''A file whose n-th write ends the process when half of it is on the disk.'''
        def __init__(self, descriptor, mode):
            self.file, self.writes = open(descriptor, mode, buffering=0), 0
        def write(self, data):
            if self.writes == fatal:
                self.file.write(bytes(data)[: len(data) // 2])
                die()
            self.writes += 1
            self.file.write(data)
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def flush(self): pass
        def fileno(self): return self.file.fileno()

    class System:
        '''The module os, but deadly.'''
        def __getattr__(self, name): return getattr(os, name)
        def fdopen(self, descriptor, mode): return Dying(descriptor, mode)
        def fsync(self, descriptor): die() if fatal == "fsync" else os.fsync(descriptor)
        def replace(self, *paths):
            die() if fatal == "replace" else os.replace(*paths)
            die() if fatal == "after" else None

    container.os = System()
    for fatal in [0, 1, 2, 3, 4, "fsync", "replace", "after"]:
        child = os.fork()
        if not child:
            save_sparse(state, path)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (fatal, status)
        print(fatal, zlib.crc32(open(path, "rb").read()), list(load_sparse(path)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_killed_save_leaves_the_old_file_whole(path):
    old = {"a": random_bits(torch.float32, (3000,), 0.1)}
    save_sparse(old, path)
    whole = zlib.crc32(path.read_bytes())
    command = [sys.executable, "-c", textwrap.dedent(KILLED), path]
    *killed, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert killed == [f"{fatal} {whole} ['a']" for fatal in [0, 1, 2, 3, 4, "fsync", "replace"]]
    assert after.endswith("['a', 'b', 'c']")
    assert len(list(path.parent.glob(".torchreg-*.tmp"))) == 7  # as the docstring says


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_nothing_behind(call, error, path, monkeypatch):
    save_sparse({"w": torch.eye(30)}, path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(container.os, call, fail)
    with pytest.raises(type(error)):
        save_sparse({"w": torch.ones(30)}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_permissions_are_an_ordinary_files_and_a_replaced_one_keeps_its_own(path):
    before = os.umask(0o027)
    try:
        save_sparse({"w": torch.eye(3)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        save_sparse({"w": torch.ones(3)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="links need privileges")
def test_a_symbolic_link_stays_and_its_target_is_written(path, tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("there.safetensors", "dangling.safetensors"):
        link, target = tmp_path / f"link to {name}", tmp_path / "far" / name
        link.symlink_to(target)
        if name.startswith("there"):
            target.write_bytes(b"old")
        save_sparse({"w": torch.eye(3)}, link)
        assert link.is_symlink()
        assert_same_bits(load_sparse(target), {"w": torch.eye(3)})
        assert list(target.parent.glob(".torchreg*")) == list(tmp_path.glob(".torchreg*")) == []


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="directory or a device"):
        save_sparse({"w": torch.eye(3)}, tmp_path)
    with pytest.raises(FileNotFoundError):
        save_sparse({"w": torch.eye(3)}, tmp_path / "missing" / "w.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path.name}' can't be loaded: it is no file"):
        load_sparse(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "missing.safetensors")
    assert list(tmp_path.iterdir()) == []


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"epoch": 3}


class Wrapped(torch.Tensor):
    pass


def quantised():
    return {"q": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}


def refused_entries():
    yield "extra state", nn.Sequential(Stateful(2, 2)).state_dict(), TypeError, r"'0\._extra_state' is of type dict"
    yield "quantised", quantised, TypeError, "'q' is quantised"
    yield "sparse", {"s": torch.eye(3).to_sparse()}, TypeError, "'s' is sparse"
    yield "csr", lambda: {"s": torch.eye(3).to_sparse_csr()}, TypeError, "'s' is sparse"
    yield "meta", {"m": torch.ones(2, device="meta")}, TypeError, "'m' is on the meta device"
    yield "lazy", nn.LazyLinear(3).state_dict(), TypeError, "'weight' is not initialised yet"
    yield "subclass", {"w": torch.ones(2).as_subclass(Wrapped)}, TypeError, "'w' is a Wrapped"
    yield "complex128", {"w": torch.ones(2, dtype=torch.complex128)}, ValueError, "'w' is of dtype torch.complex128"
    yield "checkpoint", {"model": {"w": torch.ones(2)}}, TypeError, "'model' is of type dict"
    yield "number", {"epoch": 3}, TypeError, "'epoch' is of type int"
    yield "name", {3: torch.ones(2)}, TypeError, "names of a state dict to be strings, got 3"
    yield "metadata", {"__metadata__": torch.ones(2)}, ValueError, "can't hold the name '__metadata__'"
    yield "surrogate", {"\ud800": torch.ones(2)}, ValueError, "can't hold the name"
    yield "list", [torch.ones(2)], TypeError, "a module or a state dict, got list"


@pytest.mark.parametrize(("source", "kind", "words"), [pytest.param(*row[1:], id=row[0]) for row in refused_entries()])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_refused_by_name(source, kind, words, path):
    path.write_bytes(b"old")
    source = source() if callable(source) else source
    with pytest.raises(kind, match=words):
        save_sparse(source, path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        save_sparse({"w": torch.ones(2)}, tmp_path / "none" / "model.safetensors")
    assert raised.value.filename == str(tmp_path / "none")
