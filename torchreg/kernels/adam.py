"""The proximal AdamW step: torch's own Adam, then the proximal operator. The specification of fused kernels."""

from __future__ import annotations

from torch.optim.adam import adam

from torchreg.kernels.problem import AdamStep, AdamTensors
from torchreg.kernels.proximal import shrink
from torchreg.kernels.rounding import store
from torchreg.penalties.base import HALF


def prox_adam(tensors: AdamTensors, step: AdamStep, foreach: bool | None) -> None:
    """One step of every parameter, in place.

    With a penalty, half-precision tensors are read as float32 and each is rounded once when it is written back;
    without one all is torch's.
    """
    half = [i for i, p in enumerate(tensors.params) if p.dtype in HALF] if step.penalty is not None else []
    if not half:
        _update(tensors, step, foreach)
        return
    rest = sorted(set(range(len(tensors.params))) - set(half))
    if rest:
        _update(tensors.take(rest), step, foreach)
    rounded = tensors.take(half)
    wide = AdamTensors(
        [p.float() for p in rounded.params],
        [g.float() for g in rounded.grads],
        [m.float() for m in rounded.exp_avgs],
        [v.float() for v in rounded.exp_avg_sqs],
        [v.float() for v in rounded.max_exp_avg_sqs],
        rounded.state_steps,
    )
    _descend(wide, step, foreach)
    for name, buffers in rounded.buffers().items():
        for buffer, value in zip(buffers, wide.buffers()[name], strict=True):
            buffer.copy_(value)
    _shrink(wide, step)
    for i, p in enumerate(rounded.params):
        store(p, wide.params[i], rounded.seeds[i] if step.stochastic_rounding else None)


def _update(tensors: AdamTensors, step: AdamStep, foreach: bool | None) -> None:
    _descend(tensors, step, foreach)
    _shrink(tensors, step)


def _shrink(tensors: AdamTensors, step: AdamStep) -> None:
    if step.penalty is not None:
        shrink(tensors.params, step.penalty, step.prox_steps(tensors), differentiable=step.differentiable)


def _descend(tensors: AdamTensors, step: AdamStep, foreach: bool | None) -> None:
    """All of torch.optim.AdamW."""
    adam(
        tensors.params,
        tensors.grads,
        tensors.exp_avgs,
        tensors.exp_avg_sqs,
        list(tensors.max_exp_avg_sqs),  # whose entries torch replaces by views where they are complex
        tensors.state_steps,
        foreach=foreach,
        capturable=step.capturable,
        differentiable=step.differentiable,
        fused=False if foreach is not None else None,
        has_complex=any(p.is_complex() for p in tensors.params),
        decoupled_weight_decay=step.decoupled_weight_decay,
        amsgrad=step.amsgrad,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.lr,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=step.maximize,
    )
