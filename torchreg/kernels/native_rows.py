"""Steps of single rows of a table on the CPU, compiled from C: each is one pass over the rows that have a gradient."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.kernels import native, pages, toolchain

SMALLEST = 1 << 16
"""Weights of a table from which rows are stepped by the kernel: below, building it does not pay."""
TABLED = 4096
"""Steps whose bias corrections are looked up; those of later ones are computed."""

_LARGEST = 1 << 30  # entries of a gradient
_SOURCE = Path(__file__).with_name("rows.c")
_NUMBERS: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("width", "count", "totals", "settled_pitch", "diagonal", "nesterov"),
            *("steps_pitch", "tabled", "identity", "penalised"),
        ),
        ctypes.c_int64,
    ),
    **dict.fromkeys(("l1", "sign", "lr", "threshold", "divisor", "momentum", "decay"), ctypes.c_double),
    **dict.fromkeys(("beta1", "beta2", "eps", "tau"), ctypes.c_double),
    **dict.fromkeys(("now", "then"), ctypes.c_double * 3),
}


class _Rows(ctypes.Structure):
    _fields_ = [
        (name, _NUMBERS.get(name, ctypes.c_void_p))
        for name in (
            *("width", "count", "w", "rows"),
            *("settled", "totals", "settled_pitch", "now", "then", "l1", "diagonal", "scale"),
            *("values", "first", "next", "sum"),
            *("sign", "lr", "threshold", "divisor", "buffer", "momentum", "decay", "nesterov"),
            *("mean", "square", "top", "steps", "steps_pitch", "drops1", "drops2", "tabled", "identity", "penalised"),
            *("beta1", "beta2", "eps", "tau"),
        )
    ]


@dataclasses.dataclass
class Entries:
    """The entries of a sparse gradient: those of its row i are ``first[i]`` and what ``next`` links to it."""

    rows: Tensor
    first: Tensor
    next: Tensor
    missed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What rows have missed; see `missed`."""


@functools.cache
def unavailable() -> str | None:
    """Why there is no kernel on this machine, or None. Builds it, once."""
    return toolchain.obstacle(_library)


def takes(p: Tensor, *beside: Tensor, numbers: Iterable[Tensor] = ()) -> bool:
    """Whether there is a kernel for a table and what is kept beside it: plain tensors in one piece, on the CPU.

    Of what holds a number or more for each row, only those of a row have to be in one piece.
    """
    if type(p) not in (Tensor, nn.Parameter) or type(p.data) is not Tensor or p.dtype not in native.DTYPES:
        return False
    if p.numel() < SMALLEST or torch.compiler.is_compiling():
        return False
    plain = all(t.device.type == "cpu" and t.is_contiguous() and not t.is_neg() for t in (p, *beside))
    plain = plain and all(t.device.type == "cpu" and (t.ndim == 1 or t.stride(1) == 1) for t in numbers)
    return plain and unavailable() is None


def lay_together(entries: dict[str, Any], keys: Sequence[str]) -> None:
    """Make those of the entries that hold numbers of each row views of one block: the kernel reads them together."""
    own = {key: entries[key] for key in keys if key in entries}
    if len(own) < 2 or not any(t.is_contiguous() for t in own.values()):
        return
    widths = [t[0].numel() for t in own.values()]
    block = pages.advised(torch.empty(len(next(iter(own.values()))), sum(widths), dtype=torch.float64, device="cpu"))
    for (key, t), columns in zip(own.items(), block.split(widths, 1), strict=True):
        entries[key] = (columns if t.ndim == 2 else columns[:, 0]).copy_(t)


def entries_of(index: Tensor, size: int) -> Entries | None:
    """The entries of each row, which there are ``size`` of; None if there are too many or some are of no row."""
    index = index.contiguous()
    n = len(index)
    if n > _LARGEST or not _are_rows(index, size):
        return None
    slots = torch.zeros(1 << (2 * n).bit_length(), dtype=torch.int32, device="cpu")
    first, last, following = torch.empty(3, n, dtype=torch.int32, device="cpu")
    rows = torch.empty(n, dtype=torch.int64, device="cpu")
    count = _library().group(
        *(_address(index), ctypes.c_int64(n), _address(slots), ctypes.c_uint64(len(slots) - 1)),
        *map(_address, (rows, first, last, following)),
    )
    return Entries(rows[:count], first[:count], following)


def missed(
    settled: Tensor, now: list[float], l1: float, metric: dict[str, Any] | None, then: list[float] | None = None
) -> dict[str, Any]:
    """What rows have missed, as the kernel is told it.

    Args:
        settled: the totals at which each row was settled.
        now: the totals.
        l1: the strength of Σ|w|.
        metric: ``scale`` (squares), ``steps``, ``beta2`` and ``eps`` where each weight is shrunk by Adam's step.
        then: the totals after a step.
    """
    size = ctypes.c_double * 3
    fields = {"settled": settled, "totals": settled.shape[1], "now": size(*now), "then": size(*(then or now)), "l1": l1}
    if metric is None:
        return fields
    drops = _drops(metric["beta2"])
    return {**fields, **metric, "diagonal": 1, "drops2": drops, "tabled": len(drops)}


def settle(p: Tensor, rows: Tensor, fields: dict[str, Any]) -> bool:
    """Give rows (int64, also repeated) the shrinkage that they have missed; False if some do not exist."""
    rows = rows.contiguous()
    if not _are_rows(rows, len(p)):
        return False
    if _call("settle", p, rows, **fields):
        torch.autograd.graph.increment_version(p)
    return True


def step(name: str, p: Tensor, entries: Entries, values: Tensor, betas: tuple[float, ...] = (), **fields: Any) -> None:
    """A step ``sgd`` or ``adam`` of the rows that have a gradient, with the fields of rows.c that are given."""
    values = values.contiguous()
    if betas:
        drops = [_drops(beta) for beta in betas]
        fields |= dict(zip(("beta1", "beta2"), betas, strict=True), drops1=drops[0], drops2=drops[1], tabled=TABLED)
    room = torch.empty(values.shape[1:], dtype=values.dtype, device="cpu")
    links = {**entries.missed, "first": entries.first, "next": entries.next, "values": values, "sum": room}
    _call(name, p, entries.rows, **{**links, **fields})
    written = (fields.get(key) for key in ("buffer", "mean", "square", "top", "steps"))
    torch.autograd.graph.increment_version([p, *(t for t in written if isinstance(t, Tensor))])


def _call(name: str, p: Tensor, rows: Tensor, **fields: Any) -> int:
    given = {key: _address(value) if isinstance(value, Tensor) else value for key, value in fields.items()}
    given |= {f"{key}_pitch": fields[key].stride(0) for key in ("settled", "steps") if key in fields}
    view = _Rows(width=p[0].numel() if len(p) else 0, count=len(rows), w=_address(p), rows=_address(rows), **given)
    function = getattr(_library(), f"{name}_{str(p.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_int64 if name == "settle" else None
    found = function(ctypes.byref(view))
    return int(found or 0)


def _are_rows(index: Tensor, size: int) -> bool:
    return bool(_library().are_rows(_address(index), ctypes.c_int64(len(index)), ctypes.c_int64(size)))


def _address(t: Tensor | None) -> Any:
    return None if t is None else ctypes.c_void_p(t.data_ptr())


@functools.lru_cache(maxsize=8)
def _drops(beta: float) -> Tensor:
    """1 − βᵗ for the first t."""
    return 1 - beta ** torch.arange(TABLED, dtype=torch.float64, device="cpu")


@functools.cache
def _library() -> ctypes.CDLL:
    return toolchain.library("rows", _SOURCE.read_text(encoding="utf-8"))
