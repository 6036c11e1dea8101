"""Sparse files: damage and claims that can't be are one clear error, found before anything is done with them."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_dicts import assert_same_bits, codings, random_bits

from torchreg.export import container, load_sparse, save_sparse, sparse_file
from torchreg.export.container import Part

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def small():
    return {
        "dense": random_bits(torch.float32, (2, 3), 1.0),
        "gaps": random_bits(torch.float16, (3, 500), 0.01, 1),
        "mask": random_bits(torch.int64, (5, 9), 0.3, 2),
        "none": torch.empty(0, 2),
    }


def found_or_harmless(path, state):
    try:
        loaded = load_sparse(path)
    except ValueError as error:
        return str(error).startswith(f"{os.fspath(path)!r} can't be loaded: ")
    assert_same_bits(loaded, state)
    return True


def patched(path, position, byte):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(bytes([byte]))


def tied():
    weight = torch.ones(2)
    return {"a": weight, "b": weight}


@pytest.mark.parametrize(("make", "ways"), [(small, ["dense", "gaps8", "bitmask", "dense"]), (tied, ["dense", "tied"])])
def test_each_flipped_bit_is_found_or_harmless(make, ways, path):
    state = make()
    save_sparse(state, path)
    assert list(codings(path).values()) == ways
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        for bit in range(8) if position < length else [position % 8]:
            patched(path, position, whole[position] ^ 1 << bit)
            if position < length:
                assert found_or_harmless(path, state)
            else:
                with pytest.raises(ValueError, match="checksum"):
                    load_sparse(path)
        patched(path, position, whole[position])
    assert path.read_bytes() == whole


def test_each_truncation_is_found(path):
    save_sparse(small(), path)
    whole = path.stat().st_size
    for length in (whole + 1, *range(whole - 1, -1, -1)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="can't be loaded: it is"):
            load_sparse(path)


@SETTINGS
@given(data=st.data())
def test_any_patch_is_found_or_harmless(path, data):
    state = small()
    save_sparse(state, path)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    patch = data.draw(
        st.binary(max_size=20) | st.sampled_from([b"null", b"[]", b"{}", b"1e99", b"-1", b"9" * 30, b'"'])
    )
    stop = data.draw(st.sampled_from([start, min(start + len(patch), len(whole))]))
    path.write_bytes(whole[:start] + patch + whole[stop:])
    assert found_or_harmless(path, state)


@SETTINGS
@given(
    content=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    ).map(lambda v: (lambda t: len(t).to_bytes(8, "little") + t)(json.dumps(v).encode()))
)
def test_anything_else_is_no_safetensors_file(path, content):
    path.write_bytes(content)
    if content[8:] in (b"{}", b'{"__metadata__": {}}'):
        assert load_sparse(path) == {}
        return
    with pytest.raises(ValueError, match="can't be loaded: it is"):
        load_sparse(path)


BYTES = {torch.uint8: "u1", torch.uint16: "u2"}


def write_crafted(
    path, record, values, places, places_dtype=torch.uint8, version=1, suffix="gaps", values_dtype=torch.float32
):
    """A file with a right header and right checksums, of one tensor 'w' of four 7s or so."""
    data = np.full(values, 7, dtype=f"u{values_dtype.itemsize}") if isinstance(values, int) else values
    where = np.array(places, dtype=BYTES[places_dtype])
    parts = {
        "w.compressed": Part(values_dtype, data.shape, data),
        f"w.{suffix}": Part(places_dtype, where.shape, where),
    }
    text = json.dumps({"version": version, "tensors": record if record is None else {"w": record}})
    container.write(path, parts, {sparse_file.RECORDS: text})


def gaps8(shape, **options):
    return {"record": {"coding": "gaps8", "shape": shape}, **options}


def mask(shape, **options):
    return {"record": {"coding": "bitmask", "shape": shape}, "suffix": "bitmask", **options}


def damaged_files():
    huge = [10**5, 10**5, 10**5]
    yield "too few values", gaps8([10], values=1, places=[2, 3, 2]), "gaps are those of 2 values, and it has 1"
    yield "too many values", gaps8([10], values=3, places=[2, 3, 3]), "gaps are those of 2 values, and it has 3"
    yield "past the end", gaps8([10], values=2, places=[2, 9, 0]), "gaps are those of 13 elements, and its shape has 10"
    yield (
        "before the end",
        gaps8([10], values=2, places=[2, 3, 2]),
        "gaps are those of 9 elements, and its shape has 10",
    )
    yield "open gaps", gaps8([300], values=1, places=[2, 3, 255]), "gaps have no end"
    yield "no gaps", gaps8([300], values=0, places=[]), "claims 300 elements, far more than its 0 bytes can hold"
    yield (
        "more gaps than halves",
        gaps8([30], values=1, places=[2, 255]) | {"record": {"coding": "gaps4", "shape": [30]}},
        "no end",
    )
    yield "claimed elements", gaps8(huge, values=2, places=[2, 3, 2]), "claims 1000000000000000 elements"
    yield (
        "claimed by 16 bits",
        {
            "record": {"coding": "gaps16", "shape": [10**10]},
            "values": 0,
            "places": [65535] * 9 + [1],
            "places_dtype": torch.uint16,
        },
        "claims 10000000000 elements",
    )
    yield "claimed by a bitmask", mask(huge, values=2, places=[6]), "claims 1000000000000000 elements"
    yield "long bitmask", mask([8], values=2, places=[6, 0]), "bitmask has 16 bits, and its shape 8 elements"
    yield "short bitmask", mask([9], values=2, places=[6]), "bitmask has 8 bits, and its shape 9 elements"
    yield "few bits", mask([8], values=3, places=[6]), "bitmask marks 2 values, and it has 3"
    yield "many bits", mask([8], values=1, places=[6]), "bitmask marks 2 values, and it has 1"
    yield "bits past the end", mask([6], values=2, places=[128 + 6]), "bitmask marks 3 values, and it has 2"
    yield "negative shape", gaps8([-2, -5], values=2, places=[2, 3, 3]), "has coding 'gaps8' and shape"
    yield "fractional shape", gaps8([2.0, 5], values=2, places=[2, 3, 3]), "has coding 'gaps8' and shape"
    yield "no shape", gaps8(None, values=2, places=[2, 3, 3]), "records don't fit"
    yield "text for a shape", gaps8("25", values=2, places=[2, 3, 3]), "has coding 'gaps8' and shape"
    yield "impossible shape", mask([2**62, 2**62, 0], values=0, places=[]), "impossible shape"
    yield "other places", gaps8([10], values=2, places=[2, 3, 3], places_dtype=torch.uint16), "don't fit coding 'gaps8'"
    yield (
        "unknown coding",
        {"record": {"coding": "gaps9", "shape": [10]}, "values": 2, "places": [2, 3, 3]},
        "coding 'gaps9'",
    )
    yield "missing coding", {"record": {"shape": [10]}, "values": 2, "places": [2, 3, 3]}, "records don't fit"
    yield "missing part", mask([10], values=2, places=[2, 3]) | {"suffix": "gaps"}, "records don't fit its tensors"
    yield "unrecorded", {"record": {"tied": "v"}, "values": 2, "places": [2]}, "records don't fit its tensors"
    yield "no record", {"record": None, "values": 2, "places": [2]}, "records don't fit its tensors"
    yield "later version", gaps8([10], values=2, places=[2, 3, 3], version=2), "it is of version 2"
    yield "flat values", gaps8([8], values=np.ones((2, 1), "u4"), places=[2, 3, 1]), "don't fit coding 'gaps8'"


@pytest.mark.parametrize(("crafted", "words"), [pytest.param(*row[1:], id=row[0]) for row in damaged_files()])
def test_claims_that_the_data_do_not_back_are_refused_before_memory_is_taken(crafted, words, path, monkeypatch):
    write_crafted(path, **crafted)

    def allocate(size, **_):
        assert size == 0, "memory was taken"
        return torch.empty(0, dtype=torch.uint8)

    monkeypatch.setattr(torch, "zeros", allocate)
    with pytest.raises(ValueError, match="can't be loaded") as caught:
        load_sparse(path)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_tensors_without_a_record_are_refused(path):
    ones = np.ones(2, "u4")
    parts = {name: Part(torch.float32, (2,), ones) for name in ("a", "b")}
    text = json.dumps({"version": 1, "tensors": {"a": {"coding": "dense"}}})
    container.write(path, parts, {sparse_file.RECORDS: text})
    with pytest.raises(ValueError, match="tensors without a record"):
        load_sparse(path)


def test_memory_that_is_not_there_is_one_clear_error(path, monkeypatch):
    save_sparse({"w": torch.eye(40)}, path)

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ValueError, match="'w' has 1600 elements: too many for this memory"):
        load_sparse(path)


def test_records_without_checksums_are_refused(path):
    save_sparse(tied(), path)
    path.write_bytes(path.read_bytes().replace(container.CHECKSUMS.encode(), b"torchreg.crc33"))
    with pytest.raises(ValueError, match="of records and checksums it has only one"):
        load_sparse(path)


def test_tensors_coded_by_others_are_refused(path):
    parts = {f"w.{part}": Part(torch.uint8, (2,), np.ones(2, "u1")) for part in ("compressed", "bitmask")}
    container.write(path, parts, {})
    content = path.read_bytes().replace(container.CHECKSUMS.encode(), b"somebodys.sums")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'w' is coded, by another library or with its records lost"):
        load_sparse(path)


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, r"shape \[1\] of F32 in 8 bytes"),
        (
            {"w": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}},
            "tensors have 4000000000000000 bytes",
        ),
        ({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]}}, "impossible shape"),
        ({"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "impossible shape"),
        ({"w": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "impossible shape"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "F32 in -8 bytes"),
        ({"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, "unknown dtype 'F4'"),
        ({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "can't be read"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "leave bytes out"),
        ({n: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for n in "ab"}, "overlap"),
        ({"w": [1, 2], "__metadata__": {}}, "can't be read"),
        ({"__metadata__": {"a": 3}}, "metadata are no strings"),
        ({"__metadata__": ["a"]}, "can't be read"),
        ([], "can't be read"),
        (b'{"w":{},"w":{}}', "a name stands there twice"),
        (b"[" * 100_000, "can't be read"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "can't be read"),
        (b"\xff\xfe", "can't be read"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_wrong_headers_are_refused(header, words, path):
    header_file(path, header, data=b"\0" * 8)
    with pytest.raises(ValueError, match=words):
        load_sparse(path)
