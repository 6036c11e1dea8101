"""State dicts in safetensors files, without their zeros."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from torchreg import unsettled
from torchreg.export import coding, container
from torchreg.export.container import Part

RECORDS = "torchreg.sparse"
VERSION = 1
DENSE = "dense"


def save_sparse(source: torch.nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Save a model's state dict without its zeros: a safetensors file that `load_sparse` reads, bit for bit.

    With n elements of b bytes of which k are not zero, a tensor takes the least of

    - dense: b·n bytes, under its own name as in any safetensors file;
    - a bitmask: b·k + n/8 bytes, as ``<name>.compressed`` and ``<name>.bitmask``;
    - gaps: b·k bytes and 4, 8 or 16 bits for each value and for each 15, 255 or 65,535 zeros in a row, as
      ``<name>.compressed`` and ``<name>.gaps``.

    A float32 matrix with zeros in random places takes 11.6 % of its dense size at 90 % zeros, and 1.3 % at 99 %. A zero
    is what has no bit set: -0.0, NaN payloads and subnormal numbers are kept.

    Weights that are tied (the same memory, shape and strides) are stored once. Any other tensor is stored by itself, in
    its logical order: views and memory formats such as channels_last are not kept. The values come from any device and
    load on the CPU. Nothing may change them while they are saved.

    The file is written beside ``path``, flushed to the disk, and then put in its place in one step: whenever the
    process ends, ``path`` holds all of the old file or all of the new one (a process killed in between may leave a file
    ``.torchreg-*.tmp`` there). A replaced file keeps its permissions; a symbolic link stays, and what it points to is
    replaced. Header and tensors carry checksums.

    The names and the order of the bits are those of compressed-tensors' ``sparse-bitmask`` format; its readers can't
    open these files all the same: they take the name without ``.weight`` and want a shape and an offset for each row
    beside, and compressed-tensors itself no longer reads that format (version 0.20). Other readers of safetensors see
    the dense tensors as they are, and the coded ones as their two parts.

    Args:
        source: a module, or a mapping from names to tensors of any dtype that safetensors has: bool, integers of 8 to
            64 bits, float16 to float64, bfloat16, 8-bit floats and complex64.
        path: the file, by custom ``*.safetensors``.

    Raises:
        TypeError: if ``source`` is neither, or an entry is no plain dense tensor with values: an ``_extra_state``, a
            quantised, sparse, distributed or meta tensor.
        ValueError: if an entry's dtype or name can't be stored, or if ``path`` is a directory or a device.
        OSError: if writing fails.

    Source: the file format is that of https://github.com/huggingface/safetensors; gaps are after Han, Mao and Dally,
    "Deep Compression", ICLR 2016.

    >>> import os, tempfile
    >>> model = torch.nn.Linear(1000, 100)
    >>> _ = model.weight.data[:, 100:].zero_()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     save_sparse(model, path)
    ...     print(f"{os.path.getsize(path):,} bytes instead of {4 * (100_000 + 100):,}")
    ...     state = load_sparse(path)
    48,849 bytes instead of 400,400
    >>> model.load_state_dict(state)
    <All keys matched successfully>
    """
    tensors = _plain_tensors(source)
    parts: dict[str, Part] = {}
    records: dict[str, dict[str, Any]] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        original = first.setdefault(_memory(tensor) or name, name)
        if original != name:
            records[name] = {"tied": original}
        else:
            records[name], coded = _coded(name, tensor, taken=tensors)
            parts |= coded
    text = json.dumps({"version": VERSION, "tensors": records}, separators=(",", ":"), ensure_ascii=False)
    container.write(path, parts, {"format": "pt", RECORDS: text})


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of `save_sparse`: dense tensors on the CPU, in their order, bit for bit what was saved.

    Tied weights are one and the same tensor. A safetensors file from elsewhere is read, too, as the dense tensors that
    it holds. ``model.load_state_dict(load_sparse(path))`` loads a model, strictly or not as that says.

    Each claim of the file is checked before memory is taken for it, and each checksum before values are used: a damaged
    file is an error, never a wrong tensor. (A file from elsewhere has no checksums.)

    Raises:
        ValueError: if it is no safetensors file, a damaged one, one of a later version of this format, or one whose
            tensors another library has coded. The message names the file and what is wrong.
        OSError: if the file can't be read.

    >>> import os, tempfile
    >>> weight = torch.tensor([[0.0, 0.0, -0.0], [float("nan"), 0.0, 1e-45]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.safetensors")
    ...     save_sparse({"weight": weight}, path)
    ...     load_sparse(path)
    {'weight': tensor([[0.0000e+00, 0.0000e+00, -0.0000e+00],
            [       nan, 0.0000e+00, 1.4013e-45]])}
    """
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            return _loaded(file)
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{os.fspath(path)!r} can't be loaded: {error}.") from None


def _plain_tensors(source: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict, detached.

    Raises:
        TypeError, ValueError: at the first that can't be stored.
    """
    if isinstance(source, torch.nn.Module):
        unsettled.settle(source.parameters())
    state = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected a module or a state dict, got {type(source).__name__}.")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected the names of a state dict to be strings, got {name!r}.")
        if name == container.METADATA or name.encode(errors="ignore").decode() != name:
            raise ValueError(f"A safetensors file can't hold the name {name!r}.")
        tensors[name] = _plain(name, tensor)
    return tensors


def _plain(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        kind = f"of type {type(tensor).__name__}"
    elif torch.nn.parameter.is_lazy(tensor):
        kind = "not initialised yet"
    elif type(tensor.detach()) is not Tensor:
        kind = f"a {type(tensor).__name__}"
    elif tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
    elif tensor.is_meta:
        kind = "on the meta device"
    elif tensor.dtype not in container.NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in container.NAMES)
        raise ValueError(f"Entry {name!r} is of dtype {tensor.dtype}; a safetensors file can hold {known}.")
    else:
        return tensor.detach()
    raise TypeError(f"Expected plain dense tensors, but entry {name!r} is {kind}: convert it, or leave it out.")


def _memory(tensor: Tensor) -> Any:
    """What two tensors have in common if they are one, None for an empty tensor."""
    if not tensor.numel():
        return None
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), view


def _coded(name: str, tensor: Tensor, taken: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Part]]:
    """The record of a tensor and its parts in the file, whichever way takes the fewest bytes."""
    shape = tuple(tensor.shape)
    bits = _bits(tensor.resolve_conj().resolve_neg().cpu().contiguous())
    ways: list[tuple[dict[str, Any], dict[str, Part]]] = [({"coding": DENSE}, {name: Part(tensor.dtype, shape, bits)})]
    coded = coding.shortest(bits)
    if coded is not None:
        values_name, places_name = _part_names(name, coded.coding)
        values = Part(tensor.dtype, coded.values.shape, coded.values)
        places = Part(_place_dtype(coded.coding), coded.places.shape, coded.places)
        if not {values_name, places_name} & taken.keys():
            record = {"coding": coded.coding, "shape": shape}
            ways.append((record, {values_name: values, places_name: places}))
    return min(ways, key=lambda way: _file_bytes(*way))


def _file_bytes(record: dict[str, Any], parts: dict[str, Part]) -> int:
    """What a tensor takes in the file, but for some digits of its offsets."""
    escaped = json.dumps(json.dumps(record, separators=(",", ":")))
    return len(escaped) + sum(container.header_bytes(name, part) + part.data.nbytes for name, part in parts.items())


def _part_names(name: str, way: str) -> tuple[str, str]:
    return f"{name}.compressed", f"{name}.bitmask" if way == coding.BITMASK else f"{name}.gaps"


def _place_dtype(way: str) -> torch.dtype:
    return torch.uint16 if way == "gaps16" else torch.uint8


def _bits(tensor: Tensor) -> NDArray[Any]:
    """A contiguous tensor's memory as a flat array of unsigned integers of its elements' size."""
    return tensor.reshape(-1).view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _loaded(file: BufferedReader) -> dict[str, Tensor]:
    header = container.read_header(file)
    if (RECORDS in header.metadata) != (header.checksums is not None):
        raise ValueError("it is damaged: of records and checksums it has only one")
    if RECORDS not in header.metadata:
        _refuse_coded(header)
        return {name: _dense(file, header, name) for name in header.entries}
    loaded: dict[str, Tensor] = {}
    used: set[str] = set()
    try:
        records = json.loads(header.metadata[RECORDS])
        if records["version"] != VERSION:
            raise ValueError(f"it is of version {records['version']!r}, and this torchreg reads version {VERSION}")
        for name, record in records["tensors"].items():
            if "tied" in record:
                loaded[name] = loaded[record["tied"]]
            elif record["coding"] == DENSE:
                loaded[name] = _dense(file, header, name)
                used.add(name)
            else:
                used |= set(_part_names(name, record["coding"]))
                loaded[name] = _decoded(file, header, name, record["coding"], record["shape"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged: its records don't fit its tensors ({error!r})") from None
    if used != header.entries.keys():
        raise ValueError("it is damaged: it has tensors without a record")
    return loaded


def _dense(file: BufferedReader, header: container.Header, name: str) -> Tensor:
    entry = header.entries[name]
    return _shaped(name, container.read(file, header, name), entry.dtype, entry.shape)


def _decoded(file: BufferedReader, header: container.Header, name: str, way: str, shape: list[int]) -> Tensor:
    values_name, places_name = _part_names(name, way)
    values, places = header.entries[values_name], header.entries[places_name]
    if way not in coding.CODINGS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"it is damaged: {name!r} has coding {way!r} and shape {shape}")
    if places.dtype != _place_dtype(way) or len(places.shape) != 1 or len(values.shape) != 1:
        raise ValueError(f"it is damaged: the parts of {name!r} don't fit coding {way!r}")
    size, itemsize = math.prod(shape), values.dtype.itemsize
    stored = values.stop - values.start + places.stop - places.start
    if size * itemsize > coding.LARGEST_EXPANSION * stored:
        raise ValueError(f"it is damaged: {name!r} claims {size} elements, far more than its {stored} bytes can hold")
    code = _bits(container.read(file, header, places_name).view(places.dtype))
    try:
        where = coding.positions(way, code, count=values.shape[0], size=size)
    except ValueError as error:
        raise ValueError(f"{name!r} is damaged: {error}") from None
    try:
        data = torch.zeros(size * itemsize, dtype=torch.uint8)
    except RuntimeError:
        raise ValueError(f"{name!r} has {size} elements: too many for this memory") from None
    data.numpy().view(f"u{itemsize}")[where] = _bits(container.read(file, header, values_name).view(values.dtype))
    return _shaped(name, data, values.dtype, shape)


def _shaped(name: str, data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    try:
        return data.view(dtype).reshape(tuple(shape))
    except (RuntimeError, TypeError, OverflowError):  # such as [2**62, 2**62, 0]
        raise ValueError(f"{name!r} has an impossible shape, {list(shape)}") from None


def _refuse_coded(header: container.Header) -> None:
    for name in header.entries:
        base = name.removesuffix(".compressed")
        if base != name and {f"{base}.bitmask", f"{base}.gaps"} & header.entries.keys():
            raise ValueError(f"{base!r} is coded, by another library or with its records lost")
