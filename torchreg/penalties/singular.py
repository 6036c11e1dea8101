"""Singular values less a threshold: by a full decomposition, or of large matrices by a certified randomised one.

With A = UΣVᴴ, U·diag((σ − t)₊)·Vᴴ needs only the singular triplets with σ > t. Those of a large d × N matrix (d ≤ N)
are found by subspace iteration from a random start, Y = AΩ, then Q = orth(Y), P = orth(AᴴQ), Y = AP, and so on, with
the triplets (U, S, V) of QQᴴA: of these AᴴU = VS holds exactly. The rank is doubled as long as nearly all of S are
beyond t. What is found, X = U₁(S₁ − t)V₁ᴴ of the values beyond t, is taken only if

1. ‖AV₁ − U₁S₁‖_F is at the level of rounding, and
2. ‖A − U₁S₁V₁ᴴ‖₂ ≤ t: its Frobenius norm is, or t²I − WWᴴ has a Cholesky factor, where W is that matrix.

Then X is the exact result for a matrix A′ = A − WV₁V₁ᴴ, which differs from A by no more than 1. says, since
A′ − X = t(U₁V₁ᴴ + M) with U₁ᴴM = 0, MV₁ = 0 and ‖M‖₂ ≤ 1 is t times a subgradient of the nuclear norm at X; and as a
proximal operator is nonexpansive, X is as near to the result for A. Unlike the usual bounds of randomised methods this
one is no matter of chance. Where it can't be had soon (many singular values beyond t, or some close to it) all are
computed.

The random numbers are the same each time and come from a generator of their own: the result depends on A and t alone,
on every replica and after every restart. All is computed in float64, whatever `torch.autocast` and
`torch.set_float32_matmul_precision` make of float32.

Source: Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review, 2011, algorithm 4.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 512
"""The shorter side from which the randomised method is tried."""

_RANK, _SHARE, _SPARE = 16, 6, 4
"""The first rank, what part of all singular values is the largest one, and how many of those found are to be small."""

_ITERATIONS = 16
_SEED = 0x51FD


def soft_thresholded(a: Tensor, t: float | Tensor) -> Tensor:
    """``U·diag((σ − t)₊)·Vᴴ`` of a finite matrix, for a t ≥ 0 that is a number or a 0-d tensor.

    >>> import torch
    >>> from torchreg.penalties import singular
    >>> singular.soft_thresholded(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), 1.0)
    tensor([[2., 0.],
            [0., 0.]])
    """
    found = randomized(a, float(t)) if min(a.shape) >= SMALLEST and _is_readable(a, t) else None
    if found is not None:
        return found
    u, s, vh = torch.linalg.svd(_wide(a), full_matrices=False)
    return ((u * (s - t).clamp_min(0)) @ vh).to(a.dtype) + 0


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, computed in float64."""
    return (_wide(a) @ _wide(b)).to(a.dtype)


@torch.no_grad()
def randomized(a: Tensor, t: float) -> Tensor | None:
    """`soft_thresholded` without a full decomposition, or None where that cannot be certified."""
    if a.shape[0] > a.shape[1]:
        found = randomized(a.mH, t)
        return None if found is None else found.mH
    unit = float(a.abs().amax())
    wide = _wide(a)
    wide = wide / unit if unit else wide  # so that no square leaves the range
    t = t / unit if unit else t
    norm, eps = _frobenius(wide), max(torch.finfo(a.dtype).eps, 64 * torch.finfo(torch.float64).eps)
    if norm <= t:
        return torch.zeros_like(a)
    triplets = _leading(wide, t, eps * norm)
    if triplets is None:
        return None
    u, s, vh = triplets
    if not _is_within(wide - (u * s) @ vh, t, eps):
        return None
    return (((u * (s - t)) @ vh) * unit).to(a.dtype) + 0


def _leading(a: Tensor, t: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The singular triplets beyond t, or None if they are too many or too slow to converge."""
    generator = torch.Generator().manual_seed(_SEED)

    def sampled(columns: int) -> Tensor:
        normal = torch.randn(a.shape[1], columns, dtype=torch.float64, generator=generator, device="cpu")
        return a @ normal.to(a.device, a.dtype)

    q, last = torch.linalg.qr(sampled(_RANK)).Q, math.inf
    for left in reversed(range(_ITERATIONS)):
        p, r = torch.linalg.qr(a.mH @ q)
        u, s, vh = torch.linalg.svd(r.mH)
        y = a @ p
        k = int((s > t).sum())
        u, beyond, vh = q @ u[:, :k], s[:k], vh[:k]
        error = _frobenius(y @ vh.mH - u * beyond)
        if k <= len(s) - _SPARE and error <= tolerance:
            return u, beyond, vh @ p.mH
        if k > len(s) - _SPARE or error * (error / last) ** left > tolerance:  # too few columns, or too slow with them
            if 2 * len(s) > min(a.shape) // _SHARE:
                return None
            y, error = torch.cat([y, sampled(len(s))], dim=1), math.inf
        q, last = torch.linalg.qr(y).Q, error
    return None


def _is_within(w: Tensor, t: float, eps: float) -> bool:
    """Whether ‖w‖₂ ≤ t(1 + eps)."""
    if _frobenius(w) <= t:
        return True
    gap = -(w @ w.mH)
    gap.diagonal().add_(t * t * (1 + 2 * eps))
    return int(torch.linalg.cholesky_ex(gap).info) == 0


def _wide(a: Tensor) -> Tensor:
    """In float64, where the device has it."""
    if a.device.type == "mps":
        return a
    return a.to(torch.complex128 if a.is_complex() else torch.float64)


def _frobenius(a: Tensor) -> float:
    return float((a * a.conj()).real.sum()) ** 0.5


def _is_readable(a: Tensor, t: float | Tensor) -> bool:
    """Whether the host may look at numbers on the way, and autograd records nothing."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch.is_grad_enabled() and (a.requires_grad or (isinstance(t, Tensor) and t.requires_grad)):
        return False
    return a.device.type in ("cpu", "cuda")
