"""The group lasso in a diagonal metric: the norm of every shrunken group is the root of an equation of its own.

With one step τᵢ for each weight, ``argmin_v Σ ½(vᵢ − wᵢ)²/τᵢ + λ‖v‖`` has no closed form. Its gradient is zero at v ≠ 0
where, with ρ = ‖v‖ and aᵢ = λτᵢ,

    vᵢ = wᵢ·ρ/(ρ + aᵢ),    and ρ > 0 solves  S(ρ) = Σ (wᵢ/(ρ + aᵢ))² = 1.

S falls to 0, so that there is a root exactly where S(0) = Σ (wᵢ/aᵢ)² > 1; else w/τ is in the subdifferential of λ‖v‖
at 0, and v = 0. The function 1/√S is concave and increasing, and linear if all aᵢ are the same: Newton's method on it
never passes the root from the left, and from the right lands left of it, so that every step gives a lower bound. Where
steps stay long, as they may if the aᵢ differ by orders of magnitude, the interval is halved on a logarithmic scale.

Source: 1/√S is what trust-region methods take, Moré and Sorensen, Computing a trust region step, SIAM J. Sci. Stat.
Comput., 1983; Conn, Gould and Toint, Trust-Region Methods, 2000, section 7.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.cuts import Cut

ITERATIONS = 16
"""Evaluations of S at most. All groups are solved together, and a device is not asked when to stop."""

_LONG, _WIDE = 1.25, 4.0
"""A step by this factor is a long one; an interval of this ratio is left to Newton."""


def ratios(cut: Cut, m: Tensor, a: Tensor) -> Tensor:
    """vᵢ/wᵢ for every weight: ρ/(ρ + aᵢ), zero where its group is, and 1 where aᵢ = 0.

    A group with a weight that is NaN has NaN ratios, one with an infinite weight is left as it is (ratios of 1).

    Args:
        cut: the groups.
        m: the moduli of the weights, arranged.
        a: λτ for each of them, arranged, without negative entries.
    """
    recorded = torch.is_grad_enabled() and (m.requires_grad or a.requires_grad)
    with torch.no_grad():
        norms = cut.norms(m)
        unit = torch.where((norms > 0) & torch.isfinite(norms), norms, 1)
        u, b = m / cut.spread(unit), a / cut.spread(unit)  # so that neither squares nor their sums leave the range
        root, alive = _roots(cut, u, b)
    if recorded:  # each of Newton's steps doubles the number of derivatives that are right
        u, b = m / cut.spread(unit), a / cut.spread(unit)
        for _ in range(2):
            _, newton = _newton(cut, u, b, root)
            root = torch.where(alive, newton, 1)
    rho = torch.where(alive, root, 0)
    rho = cut.spread(torch.where(torch.isnan(norms), norms, rho))
    whole = cut.spread(torch.isinf(norms)) | (b == 0)
    return torch.where(whole, 1, rho / (rho + torch.where(whole, 1, b)))


def _roots(cut: Cut, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The root of every group with ‖u‖ = 1, in (0, 1], and whether there is one (else any positive number)."""
    excess, spent = cut.sums_of(torch.where(u == 0, 0, u / b).square_(), u * u * b)
    alive = excess > 1
    eps = torch.finfo(u.dtype).eps
    least, near = eps**2, eps**0.5 / 8  # a step from so near is right to the last digits
    low = torch.maximum(1 - spent, cut.maxima((u - b).clamp_min_(0)))  # by Jensen; by one weight alone
    low = torch.where(alive, low.clamp(least, 1), 1)
    high, root = torch.ones_like(low), low
    settled = ~alive
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    scratch = (torch.empty_like(b), torch.empty_like(u)) if eager else None
    for _ in range(ITERATIONS):
        s, newton = _newton(cut, u, b, root, scratch)
        newton = newton.clamp(least, 1)
        high = torch.where(s < 1, torch.minimum(high, root), high)
        low = torch.maximum(low, torch.minimum(newton, high))
        far = torch.maximum(newton / root, root / newton) > _LONG
        bisected = torch.where(far & (high > _WIDE * low), (low * high).sqrt(), newton)
        is_near = (s - 1).abs() <= near
        root = torch.where(settled, root, torch.where(is_near, newton, bisected))
        settled = settled | is_near
        if eager and cut.agreed and u.device.type == "cpu" and bool(settled.all()):
            break
    return root, alive


def _newton(
    cut: Cut, u: Tensor, b: Tensor, root: Tensor, scratch: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """S at ``root``, and where Newton's method on 1/√S = 1 goes from there."""
    first, second = scratch or (None, None)
    shifted = torch.add(b, cut.spread(root), out=first)
    terms = torch.div(u, shifted, out=second)
    terms = torch.mul(terms, terms, out=second)
    s, slope = cut.sums_of(terms, torch.div(terms, shifted, out=first))
    return s, root + s * (s.sqrt() - 1) / torch.where(slope > 0, slope, 1)
