"""safetensors files: written whole or not at all, and read with every claim checked.

Such a file is the length of its header as 8 bytes, the header as JSON, and the tensors' bytes
(https://github.com/huggingface/safetensors). It is written here rather than by the library, because a file that is
replaced in one step must be flushed before, and should have an ordinary new file's permissions and the same bytes every
time; what reads and writes these files then needs no library at all.

Files get the checksums (CRC-32) of their header and of each tensor among their metadata. The header's is that of its
JSON without the checksums themselves.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
import zlib
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

CHECKSUMS = "torchreg.crc32"
METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000  # bytes; that of the safetensors library

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of) for name, of in _DTYPES.items() if hasattr(torch, of)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a header says of a tensor: its dtype, its shape, and where its bytes begin and end behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Part(NamedTuple):
    """A tensor to be written: its dtype, its shape, and its bytes as an array of any unsigned integers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: NDArray[Any]


class Header(NamedTuple):
    """A file's checked header: strings, tensors by name, their checksums (None without any), and its own length."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    checksums: dict[str, str] | None
    length: int


def header_bytes(name: str, part: Part) -> int:
    """The bytes that a tensor takes in the header, its checksum included."""
    return len(_json({name: _entry(part, part.data.nbytes)})) + len(" 01234567")


def write(path: str | os.PathLike[str], parts: dict[str, Part], metadata: dict[str, str]) -> None:
    """Write the tensors to a new file beside ``path``, flush it to the disk, and put it in the place of ``path``.

    Raises:
        ValueError: if ``path`` is there and no file, or if the tensors' names are too many for a header.
        OSError: if writing fails. In either case ``path`` is as it was, and nothing new lies beside it.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    mode = _mode(target)
    # the largest types first: every tensor's first byte is then at a multiple of its size
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {METADATA: metadata}
    stop = 0
    for name, part in parts.items():
        stop += part.data.nbytes
        header[name] = _entry(part, stop)
    sums = [_checksum(_json(header)), *(_checksum(_bytes(part)) for part in parts.values())]
    header[METADATA] = {**metadata, CHECKSUMS: " ".join(sums)}
    text = _json(header)
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"The names and shapes of {len(parts)} tensors take more than a header's 100 MB.")

    temporary = target.with_name(f".torchreg-{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            file.write(len(text).to_bytes(8, "little") + text)
            for part in parts.values():
                file.write(_bytes(part))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(target.parent)


def read_header(file: BufferedReader) -> Header:
    """Read and check a file's header.

    Raises:
        ValueError: if it is no header of a safetensors file, or not that of the bytes that follow.
    """
    behind = os.fstat(file.fileno()).st_size - 8
    if behind < 0:
        raise ValueError("it is too short for a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > min(behind, LONGEST_HEADER):
        raise ValueError("it is no safetensors file, or cut off in its header")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
        metadata = header.pop(METADATA, {})
        entries = {name: _checked(entry) for name, entry in header.items()}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no strings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged or no safetensors file: its header can't be read ({error})") from None
    stop = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != stop:
            raise ValueError("it is damaged: its tensors overlap, or leave bytes out")
        stop = entry.stop
    if length + stop != behind:
        raise ValueError(f"it is damaged: its tensors have {stop} bytes, and {behind - length} follow its header")
    checksums = _checksums(metadata, header) if CHECKSUMS in metadata else None
    return Header(metadata, entries, checksums, length)


def read(file: BufferedReader, header: Header, name: str) -> torch.Tensor:
    """A tensor's bytes, as a tensor of uint8.

    Raises:
        ValueError: if they are not those that the checksum is of.
    """
    entry = header.entries[name]
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(8 + header.length + entry.start)
    if file.readinto(data.numpy().data) != data.numel():
        raise ValueError("it became shorter while it was read")
    if header.checksums is not None and header.checksums[name] != _checksum(data.numpy().data):
        raise ValueError(f"it is damaged: the checksum of {name!r} is not that of its bytes")
    return data


def _entry(part: Part, stop: int) -> dict[str, Any]:
    offsets = [stop - part.data.nbytes, stop]
    return {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets}


def _checked(entry: dict[str, Any]) -> Entry:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)) or len(shape) > 64:
        raise ValueError(f"impossible shape or offsets {shape}, {start}, {stop}")
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise ValueError(f"shape {shape} of {dtype} in {stop - start} bytes")
    return Entry(DTYPES[dtype], tuple(shape), start, stop)


def _checksums(metadata: dict[str, str], entries: dict[str, Any]) -> dict[str, str]:
    first, *rest = metadata[CHECKSUMS].split(" ")
    others = {key: text for key, text in metadata.items() if key != CHECKSUMS}
    if first != _checksum(_json({METADATA: others, **entries})) or len(rest) != len(entries):
        raise ValueError("it is damaged: the checksum of its header is not that of its header")
    return dict(zip(entries, rest, strict=True))


def _checksum(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _bytes(part: Part) -> memoryview:
    return part.data.view(np.uint8).data


def _mode(target: Path) -> int | None:
    """The permissions of the file that will be replaced, None for a new one."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such directory", str(target.parent)) from None
        return None
    if not stat.S_ISREG(mode):
        raise ValueError(f"Expected the path of a file, but {str(target)!r} is a directory or a device.")
    return stat.S_IMODE(mode)


def _flush_directory(directory: Path) -> None:
    with suppress(OSError):  # not on every system: the file is whole without, but after a power cut perhaps the old one
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
