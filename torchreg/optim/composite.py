"""The problem min f(w) + R(w) as full-batch solvers see it: f by a closure, R by param groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg.optim.groups import acting
from torchreg.penalties import Penalty
from torchreg.sharding import is_sharded


@dataclass
class Point:
    """Weights, with the loss f and its gradient there."""

    weights: list[Tensor]
    loss: float
    grads: list[Tensor]


class Composite:
    """f + R on the parameters that have a gradient after the closure has been called.

    The metric is that of the groups' learning rates: ‖d‖² = Σ ‖d_g‖²/lr_g.

    Args:
        groups: param groups.
        closure: zeroes the gradients, computes f without the penalty, calls backward and returns f.

    Raises:
        ValueError: if f is no finite number, or no parameter has a gradient.
        TypeError: if a gradient is sparse.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], closure: Callable[[], Any]) -> None:
        self._closure = closure
        self.evaluations = 0
        loss = self._called()
        self._groups = [(g, [p for p in g["params"] if p.grad is not None]) for g in groups]
        self.params = [p for _, params in self._groups for p in params]
        if not self.params:
            raise ValueError("No parameter has a gradient after the closure: it must call backward() on the loss.")
        for p in self.params:
            if is_sharded(p):
                raise TypeError(
                    f"A parameter of shape {tuple(p.shape)} is sharded over processes, which FISTA can't solve for: "
                    "use RMDA or ProxSGD, or whole tensors."
                )
            if p.grad.layout != torch.strided:
                raise TypeError(f"A parameter of shape {tuple(p.shape)} has a gradient that is {p.grad.layout}.")
        self.start = Point([p.detach().clone() for p in self.params], loss, self._grads())
        if not math.isfinite(loss):
            raise ValueError(f"Expected the closure to return a finite loss, got {loss} at the weights given.")
        self._scales = [float(g["strength_scale"]) for g, _ in self._groups]
        self._rates = [float(g["lr"]) for g, params in self._groups for _ in params]

    def at(self, weights: list[Tensor]) -> Point:
        """Evaluate f and its gradient."""
        self.put(weights)
        loss = self._called()
        return Point(weights, loss, self._grads())

    def put(self, weights: list[Tensor], grads: list[Tensor] | None = None) -> None:
        """Write weights, and gradients if given, to the parameters."""
        for p, w in zip(self.params, weights, strict=True):
            p.copy_(w)
        for p, g in zip(self.params, grads or [], strict=False):
            p.grad = g.clone()

    def forward_backward(self, point: Point, step: float) -> list[Tensor]:
        """``prox_{step·R}(w − step·∇f(w))``, in the groups' metric."""
        moved = [
            torch.add(w, g, alpha=-step * lr) for w, g, lr in zip(point.weights, point.grads, self._rates, strict=True)
        ]
        at = 0
        for (group, params), scale in zip(self._groups, self._scales, strict=True):
            penalty, mine = group["penalty"], moved[at : at + len(params)]
            at += len(params)
            if penalty is not None and mine:
                acting(penalty, group, params).prox_all_(mine, [step * float(group["lr"]) * scale] * len(mine))
        return moved

    def check_step(self, step: float) -> None:
        """Raise ``ValueError`` where a penalty refuses so long a step."""
        for (group, _), scale in zip(self._groups, self._scales, strict=True):
            if group["penalty"] is not None:
                group["penalty"].check_step(step * float(group["lr"]) * scale)

    def objective(self, point: Point) -> float:
        """f + R."""
        total, at = point.loss, 0
        for penalty, count in self._penalties():
            if penalty is not None and count:
                total += float(penalty.value_all(point.weights[at : at + count]))
            at += count
        return total

    def residual(self, point: Point) -> float:
        """The largest violation of the optimality conditions; see `torchreg.kkt_residual`."""
        worst, at = [], 0
        for penalty, count in self._penalties():
            weights, grads = point.weights[at : at + count], point.grads[at : at + count]
            worst += [g.abs() for g in grads] if penalty is None else penalty.residual_all(weights, grads)
            at += count
        return max(_numbers([r.max() for r in worst if r.numel()]), default=0.0)

    def steepest(self, point: Point) -> float:
        """The largest modulus in ∇f."""
        return max(_numbers([g.abs().max() for g in point.grads if g.numel()]), default=0.0)

    def dot(self, a: list[Tensor], b: list[Tensor], *, metric: bool = False) -> float:
        """⟨a, b⟩, with ``metric`` that of the groups."""
        products = _numbers([_dot(x, y) for x, y in zip(a, b, strict=True)])
        return math.fsum(x / lr for x, lr in zip(products, self._rates, strict=True)) if metric else math.fsum(products)

    def _penalties(self) -> list[tuple[Penalty | None, int]]:
        """Each group's penalty at its scale, and the number of its parameters."""
        return [
            (group["penalty"] and acting(group["penalty"], group, params).scaled(scale), len(params))
            for (group, params), scale in zip(self._groups, self._scales, strict=True)
        ]

    def _called(self) -> float:
        self.evaluations += 1
        with torch.enable_grad():
            loss = self._closure()
        if loss is None:
            raise ValueError("Expected the closure to return the loss, got None.")
        return float(loss)

    def _grads(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.params]


def difference(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """a − b."""
    return [x - y for x, y in zip(a, b, strict=True)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.conj()).real.sum() if a.is_complex() else (a * b).sum()


def _numbers(values: list[Tensor]) -> list[float]:
    """The values of 0-d tensors, with one wait for a device."""
    if not values:
        return []
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    return torch.stack([v.to(values[0].device, dtype) for v in values]).tolist()
