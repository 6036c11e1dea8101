"""Least squares with an L2 penalty for several targets, seen from the smaller side of the data."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from torchreg.linear.data.design import Dense, Design, inner
from torchreg.linear.data.inputs import Data
from torchreg.linear.data.sparse_design import Sparse

_HARMLESS = 100.0  # a mean square this many times the variance costs a digit of a product with X


class RidgeProblem:
    """‖z − Zw‖² + alpha·‖w‖² for each target z: Z is X centred and weighted, and only X is held.

    Args:
        data: with weights that sum to the number of samples.
        centred: whether an intercept is fitted.
        overwrite: whether X may be centred in place.
    """

    def __init__(self, data: Data, centred: bool, overwrite: bool = False) -> None:
        self.design: Design
        self.design, self.mean = data.design(centred, overwrite)
        self.targets, self.target_mean = data.targets(centred)
        """(targets, samples) in float64."""
        self.centred = centred
        self.dual = self.design.samples <= self.design.features
        root = torch.ones_like(self.targets[0]) if data.weights is None else data.weights.sqrt()
        self.root = root
        """Square roots of the weights (samples,); with an intercept ZᵀR = 0 and Rᵀz = 0 for this R."""

    @cached_property
    def gram(self) -> Tensor:
        """ZᵀZ, or ZZᵀ if there are no more samples than features."""
        return self._products[0]

    @property
    def squares(self) -> Tensor:
        """Sums of squares of Z's columns, zero for constant ones if they are centred."""
        if isinstance(self.design, Sparse):
            return torch.from_numpy(self.design.squares * self.design.samples)
        return self._products[1]

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        if not self.dual:
            gram = self.design.gram().mul_(self.design.samples)
            return gram, gram.diagonal().clone()
        if isinstance(self.design, Sparse):
            return self._sparse_outer(self.design), torch.empty(0, device="cpu")
        assert isinstance(self.design, Dense)
        outer = self.targets.new_zeros(self.design.samples, self.design.samples)
        squares = self.targets.new_empty(self.design.features)
        for here, rows in self.design.centred():
            outer += inner(rows)
            torch.sum(rows.square_(), 1, out=squares[here])
        return outer, squares

    def _sparse_outer(self, design: Sparse) -> Tensor:
        """ZZᵀ: XXᵀ weighted, and centred from both sides."""
        root = self.root.numpy()
        x = design.x.astype(np.float64)
        if self.centred:  # a large constant column would leave only rounding of the others
            x = x[:, design.squares > 0]
        x = sparse.csr_array(x).multiply(root[:, None]).tocsr()
        outer = np.asarray((x @ x.T).toarray())
        if self.centred:
            outer -= np.outer(root, root @ outer) / len(root)
            outer -= np.outer(outer @ root, root) / len(root)
        return torch.from_numpy(outer)

    @cached_property
    def _in_blocks(self) -> Dense | None:
        """The design, if products with X itself would lose digits of Z's."""
        design = self.design
        if not isinstance(design, Dense):
            return None
        exact = design.x.dtype == torch.float64
        if exact and design.mean is not None:
            exact = bool((design.mean.square() * design.samples <= _HARMLESS * self.squares).all())
        return None if exact else design

    def fitted(self, w: Tensor) -> Tensor:
        """WZᵀ in float64 for rows of coefficients: (m, features) -> (m, samples)."""
        if self._in_blocks is None:
            return self.design.fitted(w)
        return self._in_blocks.centred_sum(w)

    def pull(self, residuals: Tensor) -> Tensor:
        """RZ in float64 for rows of residuals: (m, samples) -> (m, features)."""
        if self._in_blocks is None:
            return self.design.correlations(residuals) * self.design.samples
        return self._in_blocks.centred_products(residuals)

    def matrix(self) -> Tensor | None:
        """A dense Z, (samples, features) in float64; None for a sparse one."""
        if not isinstance(self.design, Dense):
            return None
        return self.design.rows(torch.arange(self.design.features, device=self.design.device)).T
