"""Weights that wait for steps which they missed, and who can take these: whatever reads weights asks here first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_settlers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register(p: Tensor, settle: Callable[[Tensor], Any]) -> None:
    """Remember the bound method that brings all rows of ``p`` up to date, as long as its object lives."""
    _settlers[p] = weakref.WeakMethod(settle)


def settle(tensors: Iterable[Any]) -> None:
    """Bring those of the tensors up to date that have missed steps of an optimizer with sparse gradients."""
    if torch.compiler.is_compiling() or not _settlers:
        return
    for p in tensors:
        found = _settlers.get(p) if isinstance(p, Tensor) else None
        method = found() if found is not None else None
        if method is not None:
            method(p)
