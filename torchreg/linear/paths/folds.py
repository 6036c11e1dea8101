"""Paths of all folds of a cross-validation, and their errors on the samples left out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.linear.data.columns import HARMLESS
from torchreg.linear.data.design import inner, weighted_mean
from torchreg.linear.data.inputs import Data
from torchreg.linear.lasso.full_gram import Normal, paths
from torchreg.linear.lasso.problem import Problem, Strength
from torchreg.linear.lasso.solver import is_narrow, solve
from torchreg.linear.paths.path import warn_if_far

_LEFT = 1e-6  # of a column's square: with less than this left the Gram matrix of the rest is no longer a difference
_CLOSE = 1e-6  # of the targets' square: smaller errors are computed from predictions


@dataclass(frozen=True)
class Moments:
    """Sums over some samples of weights, and of products of X and y less fixed offsets."""

    weight: float
    x: Tensor
    y: float
    xx: Tensor
    xy: Tensor
    yy: float

    def __add__(self, other: Moments) -> Moments:
        return self._each(operator.add, other)

    def __sub__(self, other: Moments) -> Moments:
        return self._each(operator.sub, other)

    def _each(self, operation: Callable[[Any, Any], Any], other: Moments) -> Moments:
        return Moments(*(operation(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def spread(self) -> Tensor:
        """Each column's sum of squares around its own mean."""
        return self.xx.diagonal() - self.x.square() / self.weight

    def normal(self, centred: bool, samples: int, positive: bool) -> Normal:
        """The normal equations of these samples, centred at their own means if there is an intercept."""
        v = self.weight
        gram, moment, power = self.xx / v, self.xy / v, self.yy / v
        if centred:
            gram = gram.addr(self.x / v, self.x / v, alpha=-1)
            moment = moment - (self.x / v) * (self.y / v)
            power -= (self.y / v) ** 2
        return Normal(gram, moment, max(0.0, power), samples, positive)

    def errors(self, w: Tensor, intercepts: Tensor) -> Tensor:
        """The mean squared error of rows w with their intercepts, all relative to the offsets: shape (m,)."""
        v = self.weight
        fitted = ((w @ self.xx) * w).sum(1) - 2 * (w @ self.xy) + self.yy
        return fitted / v - 2 * intercepts * (self.y - w @ self.x) / v + intercepts.square()


class Folds:
    """The folds of a cross-validation.

    Args:
        data: all samples, one target.
        splits: indices of training and test samples, one pair for each fold.
        centred: whether an intercept is fitted.
        positive: whether coefficients are bound to be non-negative.
        method: the name of a solver.
    """

    def __init__(
        self, data: Data, splits: list[tuple[Any, Any]], centred: bool, positive: bool, method: str = "auto"
    ) -> None:
        self.method = method
        self.data, self.centred, self.positive = data, centred, positive
        device = data.y.device
        self.splits = [(_indices(train, device), _indices(test, device)) for train, test in splits]
        self._eps = data.design(False)[0].eps
        self._sums_of: list[tuple[Moments, Normal, Moments]] | None = None
        self._whole: Moments | None = None

    def check_weights(self) -> None:
        """Raise ``ValueError`` if a fold has no weight to train with, or none to be judged by."""
        y, weights = self.data.y, self.data.weights
        for i, parts in enumerate(self.splits):
            for name, part in zip(("training", "test"), parts, strict=True):
                if not len(part) or (weights is not None and not bool((weights[part] > 0).any())):
                    raise ValueError(
                        f"Expected each fold to have {name} samples of positive weight, fold {i} of "
                        f"{len(self.splits)} has none among {len(part)} of {len(y)} samples: shuffle the folds, or "
                        "leave out samples without weight."
                    )

    def errors(self, strengths: list[Strength], limit: int, tol: float) -> Any:
        """Mean squared errors on the samples left out, shape (folds, strengths), for falling strengths."""
        design, _ = self.data.design(False)
        if self.method in ("cd", "fista") or not is_narrow(design, len(strengths) * len(self.splits)):
            rows = [self._wide(train, test, strengths, limit, tol) for train, test in self.splits]
        else:
            if self._sums_of is None:
                self._sums_of = self._moments()
            found = paths([normal for _, normal, _ in self._sums_of], strengths, limit)
            rows = [self._by_moments(i, w, strengths, tol) for i, (w, _) in enumerate(found)]
        return torch.stack(rows).cpu().numpy()

    def gram(self) -> Tensor | None:
        """ZᵀZ/n of all samples, if it has been computed on the way."""
        whole = self._whole
        if whole is None or not bool((whole.spread() >= _LEFT * whole.xx.diagonal()).all()):
            return None
        return whole.normal(self.centred, len(self.data.y), self.positive).gram

    def _wide(self, train: Tensor, test: Tensor, strengths: list[Strength], limit: int, tol: float) -> Tensor:
        """By a path on the training samples: the others have no weight, so that X is not copied."""
        data = self._training(train)
        design, mean = data.design(self.centred)
        targets, target_mean = data.targets(self.centred)
        problem = Problem(design, targets[0], self.positive, data.moment(design))
        found = solve(problem, strengths, limit=limit, method=self.method)
        warn_if_far(max(s.gap for s in found), problem.power, self._eps, tol)
        coefs = torch.stack([s.full(design.features) for s in found])
        intercepts = target_mean - (coefs @ mean if mean is not None else torch.zeros_like(coefs[:, 0]))
        return self._predicted(test, coefs, intercepts)

    def _training(self, train: Tensor) -> Data:
        weights = torch.bincount(train, minlength=len(self.data.y)).double()
        if self.data.weights is not None:
            weights = weights * self.data.weights
        return replace(self.data, weights=weights * (len(weights) / weights.sum()), writeable=False)

    def _predicted(self, test: Tensor, coefs: Tensor, intercepts: Tensor) -> Tensor:
        """Errors on test samples from their predictions."""
        x, y = self.data.x, self.data.y[test, 0]
        support = torch.nonzero(coefs.any(0)).squeeze(1)
        if isinstance(x, Tensor):
            fitted = x[test[:, None], support].double() @ coefs[:, support].T
        else:
            part = x[:, support.numpy()][test.numpy()]
            fitted = torch.from_numpy(np.asarray(part @ coefs[:, support].T.numpy(), dtype=np.float64))
        squares = (fitted + intercepts - y[:, None]).square()
        if self.data.weights is None:
            return squares.mean(0)
        weights = self.data.weights[test]
        return weights @ squares / weights.sum()

    def _moments(self) -> list[tuple[Moments, Normal, Moments]]:
        """For each fold the training samples' sums and normal equations, and the test samples' sums."""
        n = len(self.data.y)
        left_out = torch.stack([torch.bincount(test, minlength=n) for _, test in self.splits])
        kept = torch.stack([torch.bincount(train, minlength=n) for train, _ in self.splits])
        tests = [self._sums(test) for _, test in self.splits]
        partition = bool((left_out.sum(0) == 1).all())
        whole = reduce(operator.add, tests) if partition else self._sums(torch.arange(n, device=self.data.y.device))
        if partition and self.data.weights is None:
            self._whole = whole
        result = []
        for i, (train, _) in enumerate(self.splits):
            complement = bool((left_out[i] + kept[i] == 1).all())
            training = whole - tests[i] if complement else self._sums(train)
            if bool((training.spread() >= _LEFT * whole.xx.diagonal()).all()):
                normal = training.normal(self.centred, n, self.positive)
            else:
                normal = self._own_normal(train)
            result.append((training, normal, tests[i]))
        return result

    def _own_normal(self, train: Tensor) -> Normal:
        """The normal equations of training samples from themselves alone."""
        data = self._training(train)
        return Normal.of(Problem(data.design(self.centred)[0], data.targets(self.centred)[0][0], self.positive))

    @cached_property
    def _offsets(self) -> tuple[Tensor, float]:
        """What is taken off X and y before sums: their means, or zero where there is no intercept."""
        if not self.centred:
            return torch.zeros(self.data.x.shape[1], dtype=torch.float64, device=self.data.y.device), 0.0
        mean = self.data.mean if self.data.weights is None else weighted_mean(self.data.x, None)
        return mean, float(self.data.y.mean())

    def _sums(self, index: Tensor) -> Moments:
        """Over some samples, relative to the offsets."""
        mean, target_mean = self._offsets
        y = self.data.y[index, 0] - target_mean
        v = torch.ones_like(y) if self.data.weights is None else self.data.weights[index]
        rows = self._neighbours(index)
        if rows is not None:
            (total, xy), weight = torch.stack([torch.ones_like(y), y]) @ rows, float(len(rows))
            x_sum = total - weight * mean
            xx = inner(rows).addr_(total, mean, alpha=-1).addr_(mean, x_sum, alpha=-1)
            if bool((mean.square() <= HARMLESS * xx.diagonal() / weight).all()):
                return Moments(weight, x_sum, float(y.sum()), xx, xy - y.sum() * mean, float(y @ y))
        x_sum, xy = torch.zeros_like(mean), torch.zeros_like(mean)
        xx = mean.new_zeros(len(mean), len(mean))
        for part, target, weight in zip(*(t.split(_block(len(mean))) for t in (index, y, v)), strict=True):
            block = self.data.x[part].double() - mean
            x_sum += weight @ block
            xy += (weight * target) @ block
            if self.data.weights is not None:
                block *= weight.sqrt()[:, None]
            xx += inner(block)
        return Moments(float(v.sum()), x_sum, float(v @ y), xx, xy, float((v * y) @ y))

    def _neighbours(self, index: Tensor) -> Tensor | None:
        """Rows of X as a view, if they lie one after the other and have no weights."""
        x = self.data.x
        if self.data.weights is not None or not isinstance(x, Tensor) or x.dtype != torch.float64 or not len(index):
            return None
        first = int(index[0])
        is_range = torch.equal(index, torch.arange(first, first + len(index), device=index.device))
        return x[first : first + len(index)] if is_range else None

    def _by_moments(self, fold: int, w: Tensor, strengths: list[Strength], tol: float) -> Tensor:
        """From the path (strengths, features) of the training samples."""
        assert self._sums_of is not None
        training, normal, test = self._sums_of[fold]
        warn_if_far(max(normal.gaps(w, strengths)), normal.power, self._eps, tol)
        centre = (training.y - w @ training.x) / training.weight if self.centred else torch.zeros_like(w[:, 0])
        errors = test.errors(w, centre)
        if bool((errors > _CLOSE * test.yy / test.weight).all()):
            return errors
        mean, target_mean = self._offsets
        return self._predicted(self.splits[fold][1], w, centre + target_mean - w @ mean)


def _block(features: int) -> int:
    return max(1, (1 << 22) // max(1, features))


def _indices(given: Any, device: torch.device) -> Tensor:
    """Of samples, from indices or a mask."""
    array = np.asarray(given)
    return torch.as_tensor(np.flatnonzero(array) if array.dtype == bool else array, device=device)
