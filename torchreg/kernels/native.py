"""Proximal steps on the CPU, compiled from C: one pass over memory, with the zeros counted on the way."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from torchreg.kernels import threads, toolchain
from torchreg.kernels.plan import COLUMNS, COUNTS, Plan
from torchreg.kernels.problem import AdamStep, SGDStep

PIECE_SIZE = 1 << 18
DTYPES = (torch.float32, torch.float64)

_STEPS = {step.KERNEL: step for step in (SGDStep, AdamStep)}
_SHARED = "step.h"


class _Plan(ctypes.Structure):
    _fields_ = [
        ("table", ctypes.c_void_p),
        ("tensors", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hypers", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


@functools.cache
def unavailable(name: str = SGDStep.KERNEL) -> str | None:
    """Why the kernel of this name is not there on this machine, or None. Builds it, once."""
    return toolchain.obstacle(functools.partial(_library, name))


def run(name: str, plan: Plan) -> None:
    """One step of every tensor of the plan, by the kernel of this name."""
    if not plan.pieces.shape[1]:
        return
    if plan.view is None:
        plan.view = _view(plan)
    function = getattr(_library(name), f"{name}_{str(plan.dtype).removeprefix('torch.')}")
    threads.run(function, plan.view, plan.pieces)


def _view(plan: Plan) -> Any:
    arrays = plan.table, plan.pieces, plan.hypers
    assert all(array.flags.c_contiguous for array in arrays)
    table, pieces, hypers = (array.ctypes.data for array in arrays)
    return ctypes.byref(_Plan(table, plan.table.shape[1], pieces, plan.pieces.shape[1], hypers, plan.counts.data_ptr()))


def _library(name: str) -> ctypes.CDLL:
    return toolchain.library(name, _source(name), streams=True)


@functools.cache
def _source(name: str) -> str:
    """The names of columns (COLUMN_w, HYPER_lr, COUNT_zeros, ...), what steps share, and the kernel."""
    names = {"COLUMN": COLUMNS, "HYPER": _STEPS[name].HYPERS, "COUNT": COUNTS}
    enums = "".join(
        f"enum {{ {', '.join(f'{prefix}_{entry}' for entry in entries)}, {prefix}S }};\n"
        for prefix, entries in names.items()
    )
    folder = Path(__file__).parent
    texts = ((folder / file).read_text(encoding="utf-8") for file in (_SHARED, f"{name}.c"))
    return "\n".join(("#ifndef T", enums, "#endif", *texts))
