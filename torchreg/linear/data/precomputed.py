"""Gram matrices that users hand in: XᵀX, of X centred and weighted."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.linear.data.design import Dense, Design


def gram_of(precompute: Any, design: Design, mean: Tensor | None, check: bool = True) -> Tensor | bool | None:
    """ZᵀZ/n where it is known, True where it is to be computed, None where the solver decides.

    Args:
        precompute: True, False, "auto", or XᵀX of shape (features, features).
        design: the data.
        mean: their column means if an intercept is fitted.
        check: whether one entry is compared with the data.

    Raises:
        ValueError: if it has another shape, or the entry differs.
    """
    if not isinstance(design, Dense) or isinstance(precompute, str) or precompute is None:
        return None
    if isinstance(precompute, (bool, np.bool_)):
        return True if precompute else None
    gram = precompute if isinstance(precompute, Tensor) else torch.from_numpy(np.array(precompute))
    narrow = torch.float32 in (gram.dtype, design.x.dtype)
    gram = gram.to(design.device, torch.float64)
    if gram.shape != (design.features, design.features):
        raise ValueError(
            f"Expected `precompute` to be a Gram matrix of shape {(design.features, design.features)}, "
            f"got {tuple(gram.shape)}."
        )
    if mean is not None and not torch.allclose(mean, torch.zeros_like(mean)):
        warnings.warn(
            "Gram matrix was provided but X was centered to fit intercept: recomputing Gram matrix.", stacklevel=4
        )
        return None
    if check:
        _check_entry(gram, design, rtol=1e-4 if narrow else 1e-7)
    return gram / design.samples


def _check_entry(gram: Tensor, design: Dense, rtol: float) -> None:
    first = design.features // 2
    second = min(first + 1, design.features - 1)
    a, b = design.rows(torch.tensor([first, second], device=design.device))
    expected, given = float(a @ b), float(gram[first, second])
    if not np.isclose(expected, given, rtol=rtol, atol=1e-5):
        raise ValueError(
            "Gram matrix passed in via 'precompute' parameter did not pass validation when a single element was "
            f"checked - please check that it was computed properly. For element ({first},{second}) we computed "
            f"{expected} but the user-supplied value was {given}."
        )
