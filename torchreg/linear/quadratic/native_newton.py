"""The Newton steps of newton.py compiled from C: on small Gram matrices most of torch's time is its calls' overhead."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import toolchain
from torchreg.linear.quadratic import newton
from torchreg.linear.quadratic.newton import Minimum


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled steps on this machine, or None. Builds them, once."""
    return toolchain.obstacle(_function)


def minimise_all(
    gram: Tensor,
    moment: Tensor,
    l1: Sequence[float],
    l2: Sequence[float],
    *,
    start: Tensor | None = None,
    positive: bool = False,
    limit: int = 1000,
) -> list[Minimum]:
    """What `newton.minimise` does, on the CPU, for a sequence of strengths, each from the minimiser before.

    Raises:
        torchreg.kernels.toolchain.Unavailable: if there is no compiler.
        MemoryError: if there is no room for a matrix as large as the Gram matrix.
    """
    k, count = len(moment), len(l1)
    gram, moment = gram if gram.stride(-1) == 1 else gram.contiguous(), moment.contiguous()
    w = torch.zeros(count, k, dtype=torch.float64, device="cpu")
    if start is not None:
        w[0] = start
    steps = np.empty(count, dtype=np.int64)
    strengths = np.array([l1, l2], dtype=np.float64)
    failed = _function()(
        k,
        gram.stride(0),
        gram.data_ptr(),
        moment.data_ptr(),
        count,
        strengths[0].ctypes.data,
        strengths[1].ctypes.data,
        int(positive),
        limit,
        w.data_ptr(),
        steps.ctypes.data,
    )
    if failed:
        raise MemoryError(f"No room for a factor of {k} × {k} numbers.")
    return [Minimum(row, int(s) if s >= 0 else int(-1 - s), bool(s >= 0)) for row, s in zip(w, steps, strict=True)]


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = toolchain.library("newton", _source()).torchreg_minimise
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        integer,
        integer,
        pointer,
        pointer,
        integer,
        pointer,
        pointer,
        ctypes.c_int,
        integer,
        pointer,
        pointer,
    ]
    function.restype = ctypes.c_int
    return function


def _source() -> str:
    """The constants of newton.py and the text in C."""
    constants = {
        "DEPENDENT": newton.DEPENDENT,
        "SLACK": newton.SLACK,
        "CROSSINGS": newton.CROSSINGS,
        "MANY": newton.MANY,
        "SHARES_COUNT": len(newton.SHARES),
        "SHARES": "{" + ", ".join(map(repr, newton.SHARES)) + "}",
    }
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    return "\n".join([*lines, Path(__file__).with_name("newton.c").read_text(encoding="utf-8")])
