"""Constraints on how many weights are not zero: of a tensor, of a rule, of the groups of either, or of every block."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchreg.cuts import Cut, Grid
from torchreg.groups import Groups, as_groups
from torchreg.penalties.base import Step, arithmetic, checked_weight, paired
from torchreg.penalties.constraints import _Constraint, _ready
from torchreg.penalties.largest import largest, largest_along

T = TypeVar("T", bound="TopK")

_SCOPES = ("tensor", "rule")


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(_Constraint):
    """At most k weights, or groups of weights, are not zero, in each tensor or in all tensors of a rule together.

    R(w) = 0 where #{w ≠ 0} ≤ k, else ∞,  prox(w) = w with all but its k largest moduli set to zero; of equal ones
    the first are kept. In a diagonal metric, with one step τ per weight, those with the largest |w|/√τ are kept, and
    a weight whose step is 0 is. With groups, R(w) = 0 where #{g: w_g ≠ 0} ≤ k, and the groups with the largest
    Σ w_i²/τ_i are kept, whole.

    It has no gradient: only a proximal optimizer can apply it. Nothing is read on the host. With
    ``scope="rule"``, `prox` and `value` of one tensor take it for the whole rule; `prox_all_` and `value_all` are given
    all tensors.

    Args:
        k: how many weights (or groups) are kept; more than there are keep all.
        fraction: which fraction of them instead, rounded to a whole number.
        scope: "tensor": k of each tensor; "rule": k of all tensors of a param group together.
        groups: how each weight is cut: a name such as "rows" or "out_channels" (see `torchreg.groups.NAMES`), or a
            value of `torchreg.groups`; None counts single weights. Groups of different sizes count alike.

    Raises:
        ValueError: if not exactly one of k and the fraction is given, k is negative, the fraction outside [0, 1], or
            the scope or name of groups another one; for a weight that the groups don't fit.
        TypeError: if k is no whole number, the fraction no number, or the groups are none.

    >>> import torch
    >>> from torchreg import TopK
    >>> TopK(2).prox(torch.tensor([-3.0, 0.25, 2.0, 1.0]))
    tensor([-3.,  0.,  2.,  0.])
    >>> TopK(1, groups="rows").prox(torch.tensor([[3.0, 0.0], [2.5, 2.5]]))
    tensor([[0.0000, 0.0000],
            [2.5000, 2.5000]])

    Source: Blumensath and Davies, Iterative hard thresholding for compressed sensing, ACHA, 2009; of groups, Baraniuk,
    Cevher, Duarte and Hegde, Model-based compressive sensing, IEEE Trans. Inf. Theory, 2010.
    """

    k: int | None = None
    fraction: float | None = None
    scope: str = "tensor"
    groups: Groups | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.fraction is None):
            raise ValueError(f"Expected either `k` or `fraction`, got k={self.k} and fraction={self.fraction}.")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, numbers.Integral):
                raise TypeError(f"Expected `k` to be a whole number (a fraction is TopK(fraction=…)), got {self.k!r}.")
            if self.k < 0:
                raise ValueError(f"Expected `k` to be 0 or more, got {self.k}.")
            object.__setattr__(self, "k", int(self.k))
        if self.fraction is not None:
            if isinstance(self.fraction, bool) or not isinstance(self.fraction, numbers.Real):
                raise TypeError(f"Expected `fraction` to be a number in [0, 1], got {self.fraction!r}.")
            if not 0 <= self.fraction <= 1:
                raise ValueError(f"Expected `fraction` to be in [0, 1], got {self.fraction}.")
            object.__setattr__(self, "fraction", float(self.fraction))
        if self.scope not in _SCOPES:
            raise ValueError(f"Expected `scope` to be 'tensor' or 'rule', got {self.scope!r}.")
        if self.groups is not None:
            object.__setattr__(self, "groups", as_groups(self.groups))

    @property
    def is_grouped(self) -> bool:
        """Whether it is groups that are kept or not."""
        return self.groups is not None

    @property
    def is_joint(self) -> bool:
        """Whether the tensors of a rule are taken together."""
        return self.scope == "rule"

    def count(self, there: int) -> int:
        """How many of so many weights, or groups, are kept."""
        wanted = self.k if self.k is not None else round((self.fraction or 0.0) * there)
        return min(wanted, there)

    def to(self: T, device: torch.device | str) -> T:
        """The same constraint with the tensors of its groups on ``device``."""
        new = super().to(device)
        if isinstance(self.groups, Groups):
            object.__setattr__(new, "groups", self.groups.to(device))
        return new

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless the groups fit a weight of this shape."""
        self._cut(shape)

    def violated(self, w: Tensor) -> Tensor:  # noqa: D102
        return self._used([w])[0] > self.count(self._cut(w.shape).count)

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:  # noqa: D102
        if not self.is_joint or len(weights) == 1:
            return super().value_all(weights)
        for w in weights:
            self.check_weight(w)
        device, real = weights[0].device, arithmetic(weights[0]).real.dtype
        used = torch.stack([used.to(device) for used in self._used(weights)]).sum()
        wrong = torch.where(used > self.count(self._there(weights)), math.inf, 0.0).to(real)
        unknown = torch.stack([torch.isnan(w).any().to(device) for w in weights]).any()
        return torch.where(unknown, math.nan, wrong)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self.check_weight(w)
        if _is_zero(_ready(step, w)):
            return w.clone()
        (kept,) = self._kept([(w, step)])
        return torch.where(kept, w, 0)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self._keep_only([(w, step)])
        return w

    @torch.no_grad()
    def prox_all_(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> None:
        """Keep the largest of all tensors together, or of each, as the scope says."""
        pairs = paired(weights, steps)
        for some in [pairs] if self.is_joint else [[pair] for pair in pairs]:
            self._keep_only(some)

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """|grad| where w ≠ 0 (or its group); elsewhere 0 if k of them are not zero, and |grad| if more may be.

        That is the distance from −grad to the regular normal cone; infinite where more than k are not zero.
        """
        return self.residual_all([w], [grad])[0]

    def residual_all(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        if not self.is_joint and len(weights) != 1:
            return super().residual_all(weights, grads)
        for w, g in zip(weights, grads, strict=True):
            self.check_weight(w)
            checked_weight(g)
        k = self.count(self._there(weights))
        used = torch.stack([used.to(weights[0].device) for used in self._used(weights)]).sum()
        return [_residual(w, g, self._is_used(w), used.to(w.device), k) for w, g in zip(weights, grads, strict=True)]

    def _cut(self, shape: Sequence[int]) -> Cut:
        """The groups of a weight, or every weight as one."""
        if isinstance(self.groups, Groups):
            return self.groups.of(shape)
        return Grid(tuple(shape), tuple(range(len(shape))))

    def _there(self, weights: Sequence[Tensor]) -> int:
        return sum(self._cut(w.shape).count for w in weights)

    def _used(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """How many weights, or groups, of each tensor are not zero."""
        if self.groups is None:
            return [torch.count_nonzero(w) for w in weights]
        return [torch.count_nonzero(_alive(self._cut(w.shape), w)) for w in weights]

    def _is_used(self, w: Tensor) -> Tensor:
        """For every weight, whether it is not zero, or its group is not."""
        if self.groups is None:
            return w != 0
        cut = self._cut(w.shape)
        return _at_weights(cut, _alive(cut, w), w)

    def _keep_only(self, pairs: Sequence[tuple[Tensor, Step]]) -> None:
        for w, _ in pairs:
            self.check_weight(w)
        if all(_is_zero(_ready(step, w)) for w, step in pairs):
            return
        for (w, _), kept in zip(pairs, self._kept(pairs), strict=True):
            w.masked_fill_(~kept, 0)

    def _kept(self, pairs: Sequence[tuple[Tensor, Step]]) -> list[Tensor]:
        """For every weight of these tensors, whether it is kept."""
        steps = [_ready(step, w) for w, step in pairs]
        alike = all(not isinstance(step, Tensor) and step == steps[0] for step in steps)
        moduli = [arithmetic(w.detach()).abs() for w, _ in pairs]
        each = moduli if alike else [_score(m, step) for m, step in zip(moduli, steps, strict=True)]
        cuts = [self._cut(w.shape) for w, _ in pairs]
        scores = [_norms(cut, s) for cut, s in zip(cuts, each, strict=True)]
        device = scores[0].device
        together = scores[0] if len(scores) == 1 else torch.cat([s.to(device) for s in scores])
        chosen = largest(together, self.count(together.numel())).split([s.numel() for s in scores])
        kept = []
        for (w, _), step, cut, mask in zip(pairs, steps, cuts, chosen, strict=True):
            mask = (_at_weights(cut, mask.to(w.device), w) & (w != 0)) | torch.isnan(w)
            kept.append(mask | (step == 0) if isinstance(step, Tensor) or step == 0 else mask)
        return kept


@dataclasses.dataclass(frozen=True, eq=False)
class NM(_Constraint):
    """N:M sparsity: of every m consecutive weights along a dimension at most n are not zero.

    R(w) = 0 where #{w_b ≠ 0} ≤ n for all blocks b, else ∞,  prox(w)_b = w_b with all but its n largest moduli set to
    zero; of equal ones the first are kept. In a diagonal metric, with one step τ per weight, those with the largest
    |w|/√τ are kept, and a weight whose step is 0 is. Zeros in the pattern 2:4 are what sparse tensor cores skip.

    It has no gradient: only a proximal optimizer can apply it. Nothing is read on the host.

    Args:
        n: how many weights of a block are kept.
        m: the size of a block; it must divide the dimension.
        dim: the dimension along which the blocks lie, from the end if it is negative. None is the input dimension of
            linear layers and convolutions, which hardware and `torch.sparse.to_sparse_semi_structured` ask for: 1, the
            last of a matrix and the in-channels of a kernel; of a vector 0. (Of a transposed convolution, whose weight
            is (in, out, …), it is 0.)

    Raises:
        ValueError: if n is below 1 or above m; for a weight that has no such dimension, or one that m does not divide
            (leave it out of the rule, as the first layer of an image model with 3 in-channels).
        TypeError: if a number is no integer.

    >>> import torch
    >>> from torchreg import NM
    >>> NM(2, 4).prox(torch.tensor([[3.0, -1.0, 0.5, -2.0, 1.0, 1.0, 1.0, 0.0]]))
    tensor([[ 3.,  0.,  0., -2.,  1.,  1.,  0.,  0.]])

    Source: Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun and Li, Learning N:M fine-grained structured sparse neural networks
    from scratch, ICLR 2021; Mishra et al., Accelerating sparse deep neural networks, arXiv 2021.
    """

    n: int = 2
    m: int = 4
    dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "m", "dim"):
            value: Any = getattr(self, name)
            if name == "dim" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"Expected `{name}` to be an integer{' or None' * (name == 'dim')}, got {value!r}.")
            object.__setattr__(self, name, int(value))
        if not 1 <= self.n <= self.m:
            raise ValueError(f"Expected 1 ≤ `n` ≤ `m`, got n={self.n} and m={self.m}.")

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless m divides the dimension of a weight of this shape."""
        self._axis(shape)

    def violated(self, w: Tensor) -> Tensor:  # noqa: D102
        return self._used(w) > self.n

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self.check_weight(w)
        step = _ready(step, w)
        return w.clone() if _is_zero(step) else torch.where(self._kept(w, step), w, 0)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self.check_weight(w)
        step = _ready(step, w)
        return w if _is_zero(step) else w.masked_fill_(~self._kept(w, step), 0)

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """|grad| where w ≠ 0; elsewhere 0 if n of the block are not zero, and |grad| if more may be.

        That is the distance from −grad to the regular normal cone; infinite in a block with more than n.
        """
        self.check_weight(w)
        g = checked_weight(grad)
        used = self._used(w).expand(self._blocks(w).shape).reshape(w.shape)
        return _residual(w, g, w != 0, used, self.n)

    def _axis(self, shape: Sequence[int]) -> int:
        """The dimension, counted from the front."""
        dim = min(1, len(shape) - 1) if self.dim is None else self.dim
        if not -len(shape) <= dim < len(shape) or not shape:
            asked = "a dimension" if self.dim is None else f"a dimension {dim}"
            raise ValueError(f"Expected a weight with {asked} for {self.n}:{self.m} sparsity, got {tuple(shape)}.")
        dim %= len(shape)
        if shape[dim] % self.m:
            raise ValueError(
                f"Expected m={self.m} of {self.n}:{self.m} sparsity to divide the size {shape[dim]} of dimension {dim} "
                f"of the weight's shape {tuple(shape)}."
            )
        return dim

    def _blocks(self, x: Tensor) -> Tensor:
        """A view of ``x`` with one more dimension, after the one that is cut: the place in a block."""
        dim = self._axis(x.shape)
        return x.view(*x.shape[:dim], x.shape[dim] // self.m, self.m, *x.shape[dim + 1 :])

    def _used(self, w: Tensor) -> Tensor:
        """How many weights of each block are not zero."""
        return (self._blocks(w) != 0).sum(self._axis(w.shape) + 1, keepdim=True)

    def _kept(self, w: Tensor, step: Step) -> Tensor:
        """For every weight, whether it is kept."""
        scores = arithmetic(w.detach()).abs()
        if isinstance(step, Tensor) and step.numel() != 1:
            scores = _score(scores, step)
        scores = torch.where(torch.isnan(scores), math.inf, scores)
        kept = largest_along(self._blocks(scores), self._axis(w.shape) + 1, self.n).reshape(w.shape)
        kept = (kept & (w != 0)) | torch.isnan(w)
        return kept | (step == 0) if isinstance(step, Tensor) else kept


def _at_weights(cut: Cut, values: Tensor, w: Tensor) -> Tensor:
    """The value of each group at all its weights, in the shape of ``w``."""
    return cut.spread(values).expand(cut.arranged(w).shape).reshape(w.shape)


def _alive(cut: Cut, w: Tensor) -> Tensor:
    """Which groups are not zero."""
    return cut.sums((cut.arranged(w) != 0).to(torch.int32)) > 0


def _norms(cut: Cut, scores: Tensor) -> Tensor:
    """‖·‖₂ of each group of non-negative numbers, whose squares may leave the range."""
    y = cut.arranged(scores)
    if isinstance(cut.sizes, int) and cut.sizes <= 1:
        return y.reshape(-1) if cut.sizes else y.new_zeros(cut.count)
    peaks = cut.maxima(y) if y.numel() else y.new_zeros(cut.count)
    unit = torch.where((peaks > 0) & torch.isfinite(peaks), peaks, 1)
    return cut.norms(y / cut.spread(unit)) * unit


def _score(m: Tensor, step: Step) -> Tensor:
    """The square root of twice what setting each weight to zero costs: |w|/√τ."""
    step = step.detach() if isinstance(step, Tensor) else torch.full((), step, dtype=m.dtype, device=m.device)
    free = torch.where(m > 0, math.inf, 0.0).to(m.dtype)
    return torch.where(step > 0, m / torch.where(step > 0, step, 1).sqrt(), free)


def _residual(w: Tensor, grad: Tensor, is_used: Tensor, used: Tensor, k: int) -> Tensor:
    """|grad| where a weight may move, with ``used`` of its kind that are not zero and at most k."""
    g = arithmetic(grad).abs()
    residual = torch.where(is_used | (used < k), g, 0)
    return torch.where(torch.isnan(w), math.nan, torch.where(used > k, math.inf, residual))


def _is_zero(step: Step) -> bool:
    return not isinstance(step, Tensor) and step == 0
