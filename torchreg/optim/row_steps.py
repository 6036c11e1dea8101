"""Steps of rows: those of a table that have a gradient, each as a parameter of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchreg import kernels
from torchreg.kernels import native_rows, pages
from torchreg.kernels.rounding import store
from torchreg.optim.missed import column
from torchreg.optim.settling import RowStep, put, taken
from torchreg.penalties.base import HALF, arithmetic


def sgd_rows(rows: RowStep, state: dict[str, Any], seed: int | Tensor | None) -> None:
    """SGD with momentum, then the proximal operator; see `torchreg.ProxSGD`. Only these rows' momentum moves."""
    step: kernels.SGDStep = rows.step
    if step.momentum != 0 and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = pages.zeros_like(rows.p)
    if rows.entries is not None:
        native_rows.step(
            "sgd",
            rows.p,
            rows.entries,
            rows.grads,
            sign=-1.0 if step.maximize else 1.0,
            lr=float(step.lr),
            decay=float(step.weight_decay),
            momentum=step.momentum,
            nesterov=step.nesterov,
            **_shrinkage(rows),
            **({"buffer": state["momentum_buffer"]} if step.momentum != 0 else {}),
        )
        return
    w = arithmetic(taken(rows.p.detach(), rows.rows))
    grad = -rows.grads if step.maximize else rows.grads
    if step.weight_decay != 0:
        grad = grad + w * float(step.weight_decay)
    if step.momentum != 0:
        momentum = arithmetic(taken(state["momentum_buffer"], rows.rows)) * step.momentum + grad
        put(state["momentum_buffer"], rows.rows, momentum)
        grad = grad + momentum * step.momentum if step.nesterov else momentum
    w = torch.add(w, grad, alpha=-float(step.lr))
    if step.penalty is not None:
        step.penalty.prox_(w, float(step.prox_step))
    _write(rows, w, seed)


def adam_rows(rows: RowStep, state: dict[str, Any], seed: int | Tensor | None) -> None:
    """Adam, then the proximal operator in its metric; see `torchreg.ProxAdamW`. Only these rows' moments move."""
    step: kernels.AdamStep = rows.step
    beta1, beta2, lr = float(step.beta1), float(step.beta2), float(step.lr)
    if rows.entries is not None:
        native_rows.step(
            "adam",
            rows.p,
            rows.entries,
            rows.grads,
            (beta1, beta2),
            sign=-1.0 if step.maximize else 1.0,
            lr=lr,
            mean=state["exp_avg"],
            square=state["exp_avg_sq"],
            top=state["max_exp_avg_sq"] if step.amsgrad else None,
            steps=state["row_steps"],
            identity=step.identity,
            penalised=step.penalty is not None,
            l1=rows.strengths.l1,
            eps=float(step.eps),
            tau=float(step.prox_step),
            **_shrinkage(rows),
        )
        return
    count = taken(state["row_steps"], rows.rows) + 1
    put(state["row_steps"], rows.rows, count)
    grad = -rows.grads if step.maximize else rows.grads
    mean = arithmetic(taken(state["exp_avg"], rows.rows)).lerp(grad, 1 - beta1)
    square = (arithmetic(taken(state["exp_avg_sq"], rows.rows)) * beta2).addcmul_(grad, grad, value=1 - beta2)
    put(state["exp_avg"], rows.rows, mean)
    put(state["exp_avg_sq"], rows.rows, square)
    if step.amsgrad:
        square = torch.maximum(arithmetic(taken(state["max_exp_avg_sq"], rows.rows)), square)
        put(state["max_exp_avg_sq"], rows.rows, square)
    metric = inverse_root(square, count, beta2, step.eps)
    w = arithmetic(taken(rows.p.detach(), rows.rows))
    w = w - mean * metric * column(lr / (1 - beta1**count), w)
    if step.penalty is not None:
        tau = float(step.prox_step)
        step.penalty.prox_(w, tau if step.identity else metric * tau)
    _write(rows, w, seed)


def _shrinkage(rows: RowStep) -> dict[str, Any]:
    """The proximal operator where all weights have one step."""
    tau = float(rows.step.prox_step)
    return {"threshold": tau * rows.strengths.l1, "divisor": 1 + 2 * tau * rows.strengths.l2}


def inverse_root(square: Tensor, count: Tensor, beta2: float, eps: float) -> Tensor:
    """1/(√v̂ + ε) with v̂ = v/(1 − β₂^t), t being the number of gradients that a row has had; 0 before its first."""
    corrected = square.sqrt() / column((1 - beta2 ** count.clamp_min(1)).sqrt(), square) + eps
    return torch.where(column(count, square) > 0, 1 / corrected, 0)


def _write(rows: RowStep, w: Tensor, seed: int | Tensor | None) -> None:
    """Overwrite the rows, which are rounded to half precision stochastically if there is a seed."""
    if rows.p.dtype in HALF and seed is not None:
        rounded = torch.empty_like(w, dtype=rows.p.dtype)
        store(rounded, w, seed)
        w = rounded
    put(rows.p, rows.rows, w)
