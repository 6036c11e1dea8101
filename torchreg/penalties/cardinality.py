"""Constraints on how many weights, or groups of weights, are not zero: of a tensor, or of all tensors of a rule."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.cuts import Cut, Grid, Runs
from torchreg.groups import Groups, Shared, as_groups
from torchreg.penalties.base import Step, arithmetic, checked_weight, paired
from torchreg.penalties.constraints import _Constraint, _ready
from torchreg.penalties.grouping import TakesGroups
from torchreg.penalties.largest import largest

_SCOPES = ("tensor", "rule")


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(TakesGroups, _Constraint):
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
            value of `torchreg.groups`; None counts single weights. Groups of different sizes count alike. Of groups
            that several tensors share, such as `torchreg.coupled_groups`, k of each of their parts (a layer's channels,
            say) are kept, or with ``scope="rule"`` of all parts together, which may leave a layer without any; what is
            in none of them is kept.

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
    def is_joint(self) -> bool:
        """Whether the tensors of a rule are taken together."""
        return self.scope == "rule" or super().is_joint

    def count(self, there: int) -> int:
        """How many of so many weights, or groups, are kept."""
        wanted = self.k if self.k is not None else round((self.fraction or 0.0) * there)
        return min(wanted, there)

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless the groups fit a weight of this shape."""
        if not isinstance(self.groups, Shared):
            self._cut(shape)

    def check_together(self, shapes: Sequence[torch.Size]) -> None:
        """Raise ``ValueError`` unless the groups that all weights of a rule share fit them."""
        if isinstance(self.groups, Shared):
            self.groups.of_all(shapes)

    def violated(self, w: Tensor) -> Tensor:  # noqa: D102
        return self._excess([w], self._alive([w])) > 0

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:  # noqa: D102
        if not self.is_joint or len(weights) == 1:
            return super().value_all(weights)
        for w in weights:
            self.check_weight(w)
        real = arithmetic(weights[0]).real.dtype
        wrong = torch.where((self._excess(weights, self._alive(weights)) > 0).any(), math.inf, 0.0).to(real)
        unknown = torch.stack([torch.isnan(w).any().to(wrong.device) for w in weights]).any()
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
        alive = self._alive(weights)
        excess = self._excess(weights, alive)
        free = self._at_weights(weights, alive | (excess < 0), loose=True)
        over = self._at_weights(weights, (excess > 0).expand(alive.shape), loose=False)
        return [_residual(w, g, f, o) for w, g, f, o in zip(weights, grads, free, over, strict=True)]

    def strengths_max(self, grads: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        if not self.is_joint:
            return super().strengths_max(grads)
        residuals = self.residual_all([torch.zeros_like(g) for g in grads], grads)
        free = torch.stack([(r == 0).all().to(grads[0].device) for r in residuals]).all()
        return [torch.where(free, 0.0, math.inf).to(residuals[0].dtype)]

    def _cut(self, shape: Sequence[int]) -> Cut:
        """The groups of a weight, or every weight as one."""
        if isinstance(self.groups, Groups):
            return self.groups.of(shape)
        return Grid(tuple(shape), tuple(range(len(shape))))

    def _pieces(self, weights: Sequence[Tensor]) -> list[int]:
        """How many groups (or weights) of these tensors, in their order, count together."""
        if not isinstance(self.groups, Shared):
            return [sum(self._cut(w.shape).count for w in weights)]
        parts = [count for _, count in self.groups.parts]
        return parts if parts and self.scope == "tensor" else [self.groups.total]

    def _alive(self, weights: Sequence[Tensor]) -> Tensor:
        """Which groups (or weights) of these tensors are not zero: a vector."""
        if isinstance(self.groups, Shared):
            return _shared(self.groups, weights).alive(weights)
        alive = [self._cut(w.shape).alive([w]) for w in weights]
        return alive[0] if len(alive) == 1 else torch.cat([a.to(alive[0].device) for a in alive])

    def _excess(self, weights: Sequence[Tensor], alive: Tensor) -> Tensor:
        """By how many each piece is beyond what is allowed: one number, or one for each entry of ``alive``."""
        pieces = self._pieces(weights)
        each = torch.stack([torch.count_nonzero(part) - self.count(len(part)) for part in alive.split(pieces)])
        if len(pieces) == 1:
            return each
        return each.repeat_interleave(torch.tensor(pieces, device=alive.device), output_size=len(alive))

    def _at_weights(self, weights: Sequence[Tensor], values: Tensor, loose: bool) -> list[Tensor]:
        """For every weight the value of its group (or its own), ``loose`` where it is in none."""
        if isinstance(self.groups, Shared):
            cut = _shared(self.groups, weights)
            values = torch.cat([values, values.new_full((1,), loose)]) if cut.loose else values
            return cut.parted(cut.spread(values))
        cuts = [self._cut(w.shape) for w in weights]
        parts = [part.to(w.device) for part, w in zip(values.split([c.count for c in cuts]), weights, strict=True)]
        return [
            cut.spread(part).expand(cut.arranged(w).shape).reshape(w.shape)
            for cut, part, w in zip(cuts, parts, weights, strict=True)
        ]

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
        weights, scores = [w for w, _ in pairs], self._scores(each)
        chosen = [largest(part, self.count(len(part))) for part in scores.split(self._pieces(weights))]
        masks = self._at_weights(weights, chosen[0] if len(chosen) == 1 else torch.cat(chosen), loose=True)
        kept = []
        for w, step, mask in zip(weights, steps, masks, strict=True):
            mask = (mask & (w != 0)) | torch.isnan(w)
            kept.append(mask | (step == 0) if isinstance(step, Tensor) or step == 0 else mask)
        return kept

    def _scores(self, each: Sequence[Tensor]) -> Tensor:
        """What groups (or weights) of these tensors are ranked by, from the scores of the weights: a vector."""
        if isinstance(self.groups, Shared):
            cut = _shared(self.groups, each)
            return _norms(cut, cut.gathered(each))[: self.groups.total]
        norms = [_norms(self._cut(scores.shape), scores) for scores in each]
        return norms[0] if len(norms) == 1 else torch.cat([n.to(norms[0].device) for n in norms])


def _shared(groups: Shared, weights: Sequence[Tensor]) -> Runs:
    return groups.of_all([w.shape for w in weights], weights[0].device)


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


def _residual(w: Tensor, grad: Tensor, is_free: Tensor, is_over: Tensor) -> Tensor:
    """|grad| where a weight may move, infinite where more are not zero than may be."""
    residual = torch.where(is_free, arithmetic(grad).abs(), 0)
    return torch.where(torch.isnan(w), math.nan, torch.where(is_over, math.inf, residual))


def _is_zero(step: Step) -> bool:
    return not isinstance(step, Tensor) and step == 0
