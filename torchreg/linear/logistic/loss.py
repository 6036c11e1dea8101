"""The logistic loss of two classes and of several: value, slopes, curvature, and the divergence of its dual."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

_LEAST = 1e-18  # the share of a class, for the intercept of one whose samples have no weight


class Curvature(ABC):
    """The second derivative of Σ v·loss at some scores: a matrix (rows, rows) for each sample."""

    @abstractmethod
    def between(self, first: int, second: int) -> Tensor:
        """One entry of each sample's matrix, shape (n,)."""

    @abstractmethod
    def times(self, scores: Tensor) -> Tensor:
        """Each sample's matrix times its column of (rows, n)."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum of all samples' matrices."""

    @abstractmethod
    def eliminated(self) -> Tensor:
        """The pseudoinverse of the total, (rows, rows): what the best intercepts move by where slopes change."""


class Loss(ABC):
    """Σ v·loss of scores (rows, n), for labels and weights v that sum to 1. All in float64."""

    rows: int
    """Scores for each sample: 1 for two classes, else the number of classes."""
    weights: Tensor

    @abstractmethod
    def value(self, scores: Tensor) -> Tensor:
        """Σ v·loss."""

    @abstractmethod
    def slopes(self, scores: Tensor) -> Tensor:
        """Its gradient in the scores, (rows, n), accurate also where it is tiny."""

    @abstractmethod
    def curvature(self, scores: Tensor) -> Curvature:
        """Its second derivative."""

    @abstractmethod
    def constant(self) -> Tensor:
        """The scores (rows,) that fit best without features."""

    @abstractmethod
    def divergence(self, scores: Tensor, scale: float) -> Tensor:
        """Σ v·KL(q‖p) for the probabilities p of the scores and q = (1 − scale)·labels + scale·p."""

    @abstractmethod
    def moved(self, scores: Tensor, by: Tensor) -> Tensor:
        """Σ v·KL(q‖p) for q = p + p′(by), the first-order change of p; infinite where q is none."""


class Binomial(Loss):
    """log(1 + exp(−±score)) of two classes, for labels 0 and 1."""

    rows = 1

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        self.weights = weights
        self.sign = 2.0 * labels.to(weights.dtype) - 1

    def value(self, scores: Tensor) -> Tensor:
        """Σ v·loss."""
        return -(self.weights @ logsigmoid(self.sign * scores[0]))

    def slopes(self, scores: Tensor) -> Tensor:
        """−v·(±1)·σ(−±score)."""
        return (-self.weights * self.sign * torch.sigmoid(-self.sign * scores[0])).unsqueeze(0)

    def curvature(self, scores: Tensor) -> Curvature:
        """v·σ(score)·σ(−score)."""
        return _Scalar(self.weights * torch.sigmoid(scores[0]) * torch.sigmoid(-scores[0]))

    def constant(self) -> Tensor:
        """The log-odds."""
        share = (self.weights @ (self.sign > 0).double()).clamp(_LEAST, 1 - _LEAST)
        rest = (self.weights @ (self.sign < 0).double()).clamp(_LEAST)
        return (share.log() - rest.log()).unsqueeze(0)

    def divergence(self, scores: Tensor, scale: float) -> Tensor:
        """Σ v·KL(q‖p)."""
        margin = self.sign * scores[0]
        return self._divergence(margin, scale * torch.sigmoid(-margin))

    def moved(self, scores: Tensor, by: Tensor) -> Tensor:
        """Σ v·KL(q‖p)."""
        margin = self.sign * scores[0]
        wrong = torch.sigmoid(-margin)
        return self._divergence(margin, wrong - wrong * torch.sigmoid(margin) * self.sign * by[0])

    def _divergence(self, margin: Tensor, wrong: Tensor) -> Tensor:
        right = torch.xlogy(1 - wrong, 1 - wrong) - (1 - wrong) * logsigmoid(margin)
        terms = right + torch.xlogy(wrong, wrong) - wrong * logsigmoid(-margin)
        return (self.weights @ terms).nan_to_num(nan=torch.inf).clamp(min=0)


class Multinomial(Loss):
    """log Σ exp(scores) − the label's score, for labels 0, 1, … of several classes."""

    def __init__(self, labels: Tensor, weights: Tensor, rows: int) -> None:
        self.weights, self.rows = weights, rows
        self.labels = labels.to(torch.int64).unsqueeze(0)
        self.is_label = one_hot(labels.to(torch.int64), rows).T.bool()

    def value(self, scores: Tensor) -> Tensor:
        """Σ v·loss."""
        return -(self.weights @ torch.log_softmax(scores, 0).gather(0, self.labels)[0])

    def _shares(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities p and 1 − p, where that of the label is the sum of the others'."""
        p = torch.softmax(scores, 0)
        wrong = p.masked_fill(self.is_label, 0).sum(0)
        return p, torch.where(self.is_label, wrong, 1 - p)

    def slopes(self, scores: Tensor) -> Tensor:
        """v·(p − labels)."""
        p, rest = self._shares(scores)
        return self.weights * torch.where(self.is_label, -rest, p)

    def curvature(self, scores: Tensor) -> Curvature:
        """v·(diag p − ppᵀ)."""
        return _Matrix(self.weights, *self._shares(scores))

    def constant(self) -> Tensor:
        """The logarithms of the shares, whose sum is 0."""
        logs = (self.is_label.double() @ self.weights).clamp(min=_LEAST).log()
        return logs - logs.mean()

    def divergence(self, scores: Tensor, scale: float) -> Tensor:
        """Σ v·KL(q‖p)."""
        p, rest = self._shares(scores)
        return self._divergence(scores, torch.where(self.is_label, 1 - scale * rest, scale * p))

    def moved(self, scores: Tensor, by: Tensor) -> Tensor:
        """Σ v·KL(q‖p)."""
        p = torch.softmax(scores, 0)
        return self._divergence(scores, p + p * (by - (p * by).sum(0)))

    def _divergence(self, scores: Tensor, q: Tensor) -> Tensor:
        terms = (torch.xlogy(q, q) - q * torch.log_softmax(scores, 0)).sum(0)
        return (self.weights @ terms).nan_to_num(nan=torch.inf).clamp(min=0)


class _Scalar(Curvature):
    def __init__(self, curvature: Tensor) -> None:
        self._curvature = curvature

    def between(self, first: int, second: int) -> Tensor:
        return self._curvature

    def times(self, scores: Tensor) -> Tensor:
        return self._curvature * scores

    def total(self) -> Tensor:
        return self._curvature.sum().reshape(1, 1)

    def eliminated(self) -> Tensor:
        return 1 / self.total().clamp(min=torch.finfo(torch.float64).tiny)


class _Matrix(Curvature):
    def __init__(self, weights: Tensor, p: Tensor, rest: Tensor) -> None:
        self._weights, self._p, self._rest = weights, p, rest

    def between(self, first: int, second: int) -> Tensor:
        other = self._rest[first] if first == second else -self._p[second]
        return self._weights * self._p[first] * other

    def times(self, scores: Tensor) -> Tensor:
        return self._weights * self._p * (scores - (self._p * scores).sum(0))

    def total(self) -> Tensor:
        weighted = self._weights * self._p
        total = -weighted @ self._p.T
        total.diagonal().copy_((weighted * self._rest).sum(1))
        return total

    def eliminated(self) -> Tensor:
        return torch.linalg.pinv(self.total(), hermitian=True)
