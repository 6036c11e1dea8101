"""Penalties of a weight's singular values: the nuclear norm, which lowers its rank."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from torchreg.penalties import singular
from torchreg.penalties.base import (
    Penalty,
    Step,
    Strength,
    arithmetic,
    checked_step,
    checked_weight,
    host_scalar,
    like,
    strength_field,
)


@dataclasses.dataclass(frozen=True, eq=False)
class NuclearNorm(Penalty):
    """The nuclear norm: singular values become zero, and the weight a matrix of low rank.

    R(w) = λ Σ σ_i(W),  prox(w) = U·diag(max(σ − step·λ, 0))·Vᴴ  with  W = U·diag(σ)·Vᴴ,

    where W is the weight as a matrix of its first dimension and all others: (out, in) of a linear layer,
    (out, in·kh·kw) of a convolution, (in, out·kh·kw) of a transposed one; a vector is one column. What becomes zero is
    singular values, so that single weights rarely do; `torch.linalg.matrix_rank` tells the rank that is left.

    In a metric where each weight has a step of its own, such as Adam's, its proximal operator has no closed form, and
    is refused: use ProxSGD, RMDA or FISTA, or ``metric="identity"``.

    The singular vectors of all σ > step·λ are what is needed, of large matrices found by a randomised method, whose
    result is certified to be the exact one up to rounding, or else by a full decomposition; see
    `torchreg.penalties.singular`. It is the same wherever and whenever it is computed from the same weight. On CUDA it
    waits for the device, as torch's decompositions do. Autograd differentiates `prox` where singular values differ.

    Args:
        strength: λ ≥ 0, in units of the objective: a float or 0-d tensor.

    The subgradient is λUVᴴ of the σ > 0. The `optimality_residual` is the least-norm element of ∇f + ∂R, which is
    {λ(UVᴴ + M): UᴴM = 0, MV = 0, ‖M‖₂ ≤ 1}, weight by weight. Both take singular values within rounding for zero. A NaN
    makes all of its weight NaN; a weight with an infinite entry stays as it is.

    Raises:
        ValueError: if the strength is negative, NaN or infinite, or more than one number; for steps that differ.
        TypeError: if the strength is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import NuclearNorm
    >>> w = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    >>> NuclearNorm(1.0).prox(w)
    tensor([[2., 0.],
            [0., 0.]])
    >>> NuclearNorm(1.0).value(w), NuclearNorm(1.0).strength_max(w)
    (tensor(3.5000), tensor(3.))

    Source: Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, SIAM J. Optim., 2010;
    its subdifferential: Watson, Characterization of the subdifferential of some matrix norms, LAA, 1992.
    """

    strength: Strength = strength_field()

    takes_steps = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strength()

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless the strength is one number."""
        self._check_strength()  # `scaled` may have multiplied by any tensor

    def value(self, w: Tensor) -> Tensor:  # noqa: D102
        x, strength = self._prepared(w)
        if w.numel() == 0:
            return x.real.new_zeros(())
        a, regular = _matrix(x)
        values = torch.linalg.svdvals(a)
        total = torch.where(values > _cutoff(values, w), values, values.detach()).sum()
        return torch.where(regular, total, x.detach().abs().sum()) * strength

    def grad(self, w: Tensor) -> Tensor:  # noqa: D102
        x, strength = self._prepared(w)
        if w.numel() == 0:
            return torch.zeros_like(w)
        a, regular = _matrix(x)
        u, values, vh = torch.linalg.svd(a, full_matrices=False)
        alive = (values > _cutoff(values, w)).to(values)
        result = singular.product(u * alive, vh).reshape(w.shape) * strength
        return torch.where(regular, result, math.nan).to(w.dtype)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        x, strength = self._prepared(w)
        step = self._one(checked_step(step, x))
        if w.numel() == 0 or _is_zero(step) or _is_zero(strength):
            return w.clone()
        a, regular = _matrix(x)
        threshold = strength * step
        shrunk = singular.soft_thresholded(a, threshold).reshape(w.shape)
        result = torch.where(regular, shrunk, torch.where(torch.isnan(x).any(), math.nan, x))
        if isinstance(threshold, Tensor):
            result = torch.where(threshold > 0, result, x)
        return result.to(w.dtype) + 0

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """The moduli of the least-norm element of ∇f + ∂R."""
        x, strength = self._prepared(w)
        g = arithmetic(checked_weight(grad))
        if w.numel() == 0:
            return torch.zeros_like(g.real)
        a, regular = _matrix(x)
        slope, falls = _matrix(g)
        u, values, vh = torch.linalg.svd(a, full_matrices=False)
        alive = (values > _cutoff(values, w)).to(values)
        u, vh = u * alive, vh * alive.unsqueeze(-1)
        outside = slope - singular.product(u, singular.product(u.mH, slope))
        outside = outside - singular.product(singular.product(outside, vh.mH), vh)
        along = slope - outside + singular.product(u, vh) * strength
        residual = (along + singular.soft_thresholded(outside, strength)).reshape(w.shape).abs()
        return torch.where(regular & falls, residual, math.nan)

    def strength_max(self, grad: Tensor) -> Tensor:
        """The largest singular value of the gradient."""
        x, _ = self._prepared(grad)
        if grad.numel() == 0:
            return x.real.new_zeros(())
        a, regular = _matrix(x)
        return torch.where(regular, torch.linalg.svdvals(a).max(), x.abs().sum())

    def threshold(self, step: float | Tensor) -> float | Tensor:
        """The singular value up to which ``prox(w, step)`` makes singular values zero."""
        step, strength = host_scalar(step), host_scalar(self.strength)
        if isinstance(step, Tensor) and isinstance(strength, Tensor):
            strength = strength.to(step.device)
        return step * strength

    def with_pattern(self, v: Tensor, w: Tensor) -> Tensor:
        """The weights nearest to ``v`` of the rank that ``w`` has: the largest singular values."""
        if w.numel() == 0:
            return v.clone()
        (a, regular), (b, is_finite) = _matrix(arithmetic(v)), _matrix(arithmetic(w))
        values = torch.linalg.svdvals(b)
        rank = (values > _cutoff(values, w)).sum()
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        kept = torch.where(torch.arange(len(s), device=s.device) < rank, s, 0)
        result = singular.product(u * kept, vh).reshape(v.shape).to(v.dtype)
        return torch.where(regular & is_finite, result, v)

    def _check_strength(self) -> None:
        if isinstance(self.strength, Tensor) and self.strength.ndim:
            raise ValueError(
                f"Expected `strength` of {self.type_name} to be one number for all singular values (a float or 0-d "
                f"tensor), got a tensor of shape {tuple(self.strength.shape)}."
            )

    def _prepared(self, w: Tensor) -> tuple[Tensor, Strength]:
        """The weight in computing precision, and λ ready to compute with it."""
        x = arithmetic(checked_weight(w))
        self._check_strength()
        return x, like(self.strength, x)

    def _one(self, step: Step) -> Step:
        """The step as one number, or raise."""
        if not isinstance(step, Tensor):
            return step
        if step.numel() != 1:
            raise ValueError(
                f"Expected one `step` for {self.type_name}, got one per weight, of the shape {tuple(step.shape)}: its "
                'proximal operator is unknown in such a metric. Use ProxSGD, RMDA or FISTA, or metric="identity".'
            )
        return step.reshape(())


def _matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as a matrix, zeros where it has an entry that is not finite, and whether it has none such."""
    regular = torch.isfinite(x).all()
    rows = x.shape[0] if x.ndim else 1
    return torch.where(regular, x, 0).reshape(rows, x.numel() // rows), regular


def _cutoff(values: Tensor, w: Tensor) -> Tensor:
    """The singular value up to which there may be nothing but rounding: of the decomposition, or of ``w`` to its type.

    Rounding all entries makes singular values of about ε·‖w‖_F/√min(m, n) at most.
    """
    rows = w.shape[0] if w.ndim else 1
    sides = math.sqrt(rows) + math.sqrt(w.numel() / rows)
    return values.detach().amax() * max(torch.finfo(values.dtype).eps * sides, 2 * torch.finfo(w.dtype).eps)


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0
