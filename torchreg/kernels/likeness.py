"""Whether many tensors are what they were: asked in C++ of all at once, since to ask each in Python takes time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Likeness:
    """What tensors are but for where they lie: classes, dtypes, devices, sizes, strides, negations, requires_grad.

    It is what torch's compiler asks of a graph's inputs before it is run: for 60 tensors that takes the time of one
    question for each in Python. The tensors are not kept. They must be strided: at others torch may end the process.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards = _guards(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are all that. False also where it can't be told: in another dispatch mode, or of one twice."""
        return self._guards is not None and len(tensors) == self._count and self._guards.check(*tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count, "_guards": None}


def _guards(tensors: Sequence[Tensor]) -> Any:
    if torch.compiler.is_compiling():
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (ImportError, TypeError):  # torch's own affair, which may change
        return None
