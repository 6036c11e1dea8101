"""Who takes part: torch.optim.SGD, what people write beside it, torchao's PAT, torch.compile, and torchreg.

Each comes with a formula in float64 that its weights and gradients are checked by.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workload import Workload

from torchreg import L1, L2, ElasticNet, ProxSGD, Regularizer
from torchreg.kernels import selection, triton_step
from torchreg.penalties import Penalty

LR, MOMENTUM, STRENGTH = 0.1, 0.9, 0.01
GAIN = 1 / (1 - MOMENTUM)
THRESHOLD = LR * GAIN * STRENGTH
MOST_COMPILED = 200

Step = Callable[[], Tensor | None]
Formula = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Of weights, gradients and number of steps: the weights and gradients afterwards. They are vectors, or matrices."""


def proximal(l1: float = 0.0, l2: float = 0.0) -> Formula:
    def formula(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        m, tau = torch.zeros_like(w), LR * GAIN
        for _ in range(steps):
            m = MOMENTUM * m + g
            w = _soft(w - LR * m, tau * l1) / (1 + 2 * tau * l2)
        return w, g

    return formula


def dual_averaging(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """PAT: SGD on latent weights, of which λ·Σlr is cut off (without the gain of momentum)."""
    latent, _ = proximal()(w, g, steps)
    return _soft(latent, steps * LR * STRENGTH), g


def subgradient(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    m = torch.zeros_like(w)
    for _ in range(steps):
        m = MOMENTUM * m + g + STRENGTH * w.sign()
        w = w - LR * m
    return w, g


def accumulated(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return w, g + steps * STRENGTH * w.sign()


def _soft(w: Tensor, threshold: float) -> Tensor:
    return w - w.clamp(-threshold, threshold)


def _sgd(work: Workload, **form: bool) -> torch.optim.Optimizer:
    return _with_buffers(torch.optim.SGD(work.params, lr=LR, momentum=MOMENTUM, **form), work)


def prox_sgd(work: Workload, penalty: Penalty, **form: bool) -> ProxSGD:
    return _with_buffers(ProxSGD(work.params, lr=LR, momentum=MOMENTUM, penalty=penalty, **form), work)


def _with_buffers(optimizer, work: Workload):
    for p, buffer in zip(work.params, work.buffers, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer
    return optimizer


def softshrink_in_place(work: Workload) -> Step:
    optimizer = _sgd(work, fused=True)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for p in work.params:
            torch.ops.aten.softshrink.out(p, THRESHOLD, out=p)

    return step


def soft_threshold_foreach(work: Workload) -> Step:
    optimizer = _sgd(work, foreach=True)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        shrunk = torch._foreach_abs(work.params)
        torch._foreach_sub_(shrunk, THRESHOLD)
        torch._foreach_clamp_min_(shrunk, 0)
        torch._foreach_mul_(shrunk, torch._foreach_sign(work.params))
        torch._foreach_copy_(work.params, shrunk)

    return step


def soft_threshold_naive(work: Workload) -> Step:
    optimizer = _sgd(work)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for p in work.params:
            p.copy_(p.sign() * (p.abs() - THRESHOLD).clamp(min=0))

    return step


def pat_lasso(work: Workload) -> Step:
    from torchao.prototype.pat.optim import PruneOptimizer

    groups = [{"params": work.params, "prox_type": "ProxLasso", "group_type": "ElemGrouper"}]
    base = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)  # PAT wants an optimizer without a state
    return PruneOptimizer(base, reg_lambda=STRENGTH).step


def compiled(work: Workload) -> Step:
    torch.compiler.reset()  # no dynamic shapes because an earlier list had others
    return torch.compile(prox_sgd(work, L1(STRENGTH), foreach=True).step, dynamic=False)


def counts_read(work: Workload) -> Step:
    """The zeros that the step counted itself: cheaper than a pass over the weights."""
    optimizer = prox_sgd(work, L1(STRENGTH), fused=True)

    def step() -> Tensor:
        optimizer.step()
        return torch.cat(optimizer.step_counts().take_counts())[:, 0].sum()

    return step


def loss_by_hand(work: Workload) -> Step:
    def step() -> Tensor:
        term = STRENGTH * sum(p.abs().sum(dtype=torch.float32) for p in work.params)
        term.backward()
        return term.detach()

    return step


def _regularizer(work: Workload) -> Regularizer:
    return Regularizer(nn.ParameterList(work.params), {"*": L1(STRENGTH)})


def loss_term(work: Workload) -> Step:
    reg = _regularizer(work)

    def step() -> Tensor:
        term = reg()
        term.backward()
        return term.detach()

    return step


def hook(work: Workload) -> Step:
    optimizer = _sgd(work, fused=True)
    _regularizer(work).attach(optimizer)
    return optimizer.step


def zeros(work: Workload) -> float:
    return float(sum((p == 0).sum().item() for p in work.params))


def penalty_value(work: Workload) -> float:
    return STRENGTH * sum(p.detach().abs().sum(dtype=torch.float64).item() for p in work.params)


def nothing_missing(work: Workload) -> str | None:
    return None


def no_fused_sgd(work: Workload) -> str | None:
    if work.device.type == "cpu" and work.dtype != torch.float32:
        return "torch's fused SGD skips half-precision weights on the CPU (pytorch issue 191763)"
    return None


def no_fused_step(work: Workload) -> str | None:
    return selection.obstacle(work.params[0], None) or selection.unavailable(work.device)


def no_pat(work: Workload) -> str | None:
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # it warns of kernels that the step does not need
    try:
        import torchao.prototype.pat.optim  # noqa: F401
    except ImportError as error:
        return f"torchao's PAT can't be imported ({error})"
    return no_fused_sgd(work)


def no_compiler(work: Workload) -> str | None:
    if len(work.params) > MOST_COMPILED:
        return f"compiling {len(work.params)} tensors takes minutes"
    if work.device.type == "cuda":
        return triton_step.unavailable()
    found = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return None if found else "no C++ compiler"


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    Attributes:
        name: what it is called in the results.
        build: makes its step of a workload.
        formula: what a number of steps computes.
        figure: what the step's own result is to agree with, if it has one.
        missing: why it can't take part, or None.
        patient: whether it takes too long for --quick.
        by_rows: whether the formula is one for rows, and given those.
    """

    name: str
    build: Callable[[Workload], Step]
    formula: Formula
    figure: Callable[[Workload], float] | None = None
    missing: Callable[[Workload], str | None] = nothing_missing
    patient: bool = False
    by_rows: bool = False


BASELINE = "SGD, fused"
SOFT_FOREACH = "SGD foreach + soft threshold foreach"
PAT = "torchao PAT lasso"
OURS = {"L1": L1(STRENGTH), "L2": L2(STRENGTH), "Elastic Net": ElasticNet(STRENGTH, STRENGTH)}
FUSED = tuple(f"ProxSGD {name}, fused" for name in OURS)
COUNTS_READ = "ProxSGD L1, fused, counts read at each step"
BY_HAND = "added by λ·Σ p.abs().sum() in the loss"
LOSS_TERM = "added by Regularizer's loss term"


def _ours() -> list[Contender]:
    rows = []
    for name, penalty in OURS.items():
        formula = proximal(*penalty.parts())
        for form, wish in {"fused": {"fused": True}, "default": {}, "foreach": {"foreach": True}}.items():
            rows.append(
                Contender(
                    f"ProxSGD {name}, {form}",
                    lambda work, penalty=penalty, wish=wish: prox_sgd(work, penalty, **wish).step,
                    formula,
                    missing=no_fused_step if form == "fused" else nothing_missing,
                )
            )
    return rows


CONTENDERS = [
    Contender(BASELINE, lambda work: _sgd(work, fused=True).step, proximal(), missing=no_fused_sgd),
    Contender("SGD, foreach", lambda work: _sgd(work, foreach=True).step, proximal()),
    Contender("SGD, loop", lambda work: _sgd(work, foreach=False).step, proximal()),
    *_ours(),
    Contender(COUNTS_READ, counts_read, proximal(STRENGTH), figure=zeros, missing=no_fused_step),
    Contender("ProxSGD L1, foreach, torch.compile", compiled, proximal(STRENGTH), missing=no_compiler, patient=True),
    Contender("SGD fused + softshrink in place", softshrink_in_place, proximal(STRENGTH), missing=no_fused_sgd),
    Contender(SOFT_FOREACH, soft_threshold_foreach, proximal(STRENGTH)),
    Contender("SGD + sign·clamp(|w| − t)", soft_threshold_naive, proximal(STRENGTH)),
    Contender(PAT, pat_lasso, dual_averaging, missing=no_pat),
    Contender("SGD fused + Regularizer's hook", hook, subgradient, missing=no_fused_sgd),
    Contender(BY_HAND, loss_by_hand, accumulated, figure=penalty_value),
    Contender(LOSS_TERM, loss_term, accumulated, figure=penalty_value),
]
