"""The problem min f(w) + R(w) as full-batch solvers see it: f by a closure, R by param groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg.optim.groups import acting
from torchreg.penalties import Penalty
from torchreg.sharding import is_sharded


@dataclass
class Point:
    """Weights, with the loss f and its gradient there, and f + R once it has been asked for."""

    weights: list[Tensor]
    loss: float
    grads: list[Tensor]
    value: float | None = None


@dataclass
class _Part:
    """A group's parameters: their place among all, and the penalty on them, also at its scale."""

    where: slice
    lr: float
    scale: float
    penalty: Penalty | None
    scaled: Penalty | None


class Composite:
    """f + R on the parameters that have a gradient after the closure has been called.

    The metric is that of the groups' learning rates: ‖d‖² = Σ ‖d_g‖²/lr_g.

    Args:
        groups: param groups.
        closure: zeroes the gradients, computes f without the penalty, calls backward and returns f.

    Attributes:
        noise: the largest rounding of the parameters' types.

    Raises:
        ValueError: if f is no finite number, or no parameter has a gradient.
        TypeError: if a gradient is sparse.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], closure: Callable[[], Any]) -> None:
        self._closure = closure
        self.evaluations = 0
        loss = self._called()
        stepped = [(g, [p for p in g["params"] if p.grad is not None]) for g in groups]
        self.params = [p for _, params in stepped for p in params]
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
        self.noise = max(torch.finfo(p.dtype).eps for p in self.params)
        self._rates = [float(g["lr"]) for g, params in stepped for _ in params]
        self._parts = list(_parts(stepped))

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
        for part in self._parts:
            if part.penalty is not None:
                mine = moved[part.where]
                part.penalty.prox_all_(mine, [step * part.lr * part.scale] * len(mine))
        return moved

    def check_step(self, step: float) -> None:
        """Raise ``ValueError`` where a penalty refuses so long a step."""
        for part in self._parts:
            if part.penalty is not None:
                part.penalty.check_step(step * part.lr * part.scale)

    def objective(self, point: Point) -> float:
        """f + R."""
        if point.value is None:
            point.value = point.loss
            for part in self._parts:
                if part.scaled is not None:
                    point.value += float(part.scaled.value_all(point.weights[part.where]))
        return point.value

    def residual(self, point: Point) -> float:
        """The largest violation of the optimality conditions; see `torchreg.kkt_residual`."""
        worst: list[Tensor] = []
        for part in self._parts:
            weights, grads = point.weights[part.where], point.grads[part.where]
            worst += [g.abs() for g in grads] if part.scaled is None else part.scaled.residual_all(weights, grads)
        return max(_numbers([r.max() for r in worst if r.numel()]), default=0.0)

    def steepest(self, point: Point) -> float:
        """The largest modulus in ∇f."""
        return max(_numbers([g.abs().max() for g in point.grads if g.numel()]), default=0.0)

    def dot(self, a: list[Tensor], b: list[Tensor], *, metric: bool = False) -> float:
        """⟨a, b⟩, with ``metric`` that of the groups."""
        products = _numbers([_dot(x, y) for x, y in zip(a, b, strict=True)])
        return math.fsum(x / lr for x, lr in zip(products, self._rates, strict=True)) if metric else math.fsum(products)

    def gram(self, matrices: Iterable[Tensor]) -> Tensor:
        """All ⟨a, b⟩ in the groups' metric, in float64 on the CPU, of vectors given as rows for each parameter."""
        first = self.params[0].device
        dtype = torch.float64 if any(p.dtype.to_real() == torch.float64 for p in self.params) else torch.float32
        products = []
        for rows, lr in zip(matrices, self._rates, strict=True):
            with torch.autocast(rows.device.type, enabled=False):
                products.append(((rows @ rows.T) / lr).to(first, dtype))
        return torch.stack(products).sum(0).cpu().double()

    def _called(self) -> float:
        self.evaluations += 1
        with torch.enable_grad():
            loss = self._closure()
        if loss is None:
            raise ValueError("Expected the closure to return the loss, got None.")
        return float(loss)

    def _grads(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.params]


def _parts(stepped: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> Iterator[_Part]:
    """One part for each group of which something is stepped."""
    at = 0
    for group, params in stepped:
        if not params:
            continue
        scale, penalty = float(group["strength_scale"]), group["penalty"]
        if penalty is not None:
            penalty = acting(penalty, group, params)
        yield _Part(slice(at, at + len(params)), float(group["lr"]), scale, penalty, penalty and penalty.scaled(scale))
        at += len(params)


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
