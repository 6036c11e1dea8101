"""N:M sparsity: of every block of m weights at most n are not zero, as sparse tensor cores want them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.penalties.base import Step, arithmetic, checked_weight
from torchreg.penalties.cardinality import _is_zero, _residual, _score
from torchreg.penalties.constraints import _Constraint, _ready
from torchreg.penalties.largest import largest_along


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
        return _residual(w, g, (w != 0) | (used < self.n), used > self.n)

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
