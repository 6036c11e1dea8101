"""Who takes part with Adam: torch.optim.AdamW, what people write beside it, and ProxAdamW."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contenders import LR, OURS, STRENGTH, Contender, Formula, Step, no_fused_sgd, no_fused_step, nothing_missing
from torch import Tensor
from workload import Workload

from torchreg import ProxAdamW
from torchreg.penalties import Penalty

BETAS, EPS = (0.9, 0.999), 1e-3  # ε tames the first steps, which otherwise go by a gradient's sign alone


def adam_moments(g: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The direction m̂ and the step lr/(√v̂ + ε) of every weight, for a gradient that is always the same."""
    m, v = torch.zeros_like(g), torch.zeros_like(g)
    for t in range(1, steps + 1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        yield m / (1 - BETAS[0] ** t), LR / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)


def adam(l1: float = 0.0, l2: float = 0.0, metric: bool = True) -> Formula:
    def formula(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        for direction, tau in adam_moments(g, steps):
            w = w - tau * direction
            tau = tau if metric else torch.full_like(tau, LR)
            w = (w - w.clamp(-tau * l1, tau * l1)) / (1 + 2 * tau * l2)
        return w, g

    return formula


def built(kind: type, work: Workload, **kwargs) -> torch.optim.Optimizer:
    optimizer = kind(work.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, **kwargs)
    for p, m, v, t in zip(work.params, work.buffers, work.squares, work.counters, strict=True):
        counter = t if kwargs.get("fused") else t.cpu()
        optimizer.state[p] = {"step": counter.zero_(), "exp_avg": m, "exp_avg_sq": v}
    return optimizer


def _ours(penalty: Penalty | None, **form: bool):
    return lambda work: built(ProxAdamW, work, penalty=penalty, **form).step


def softshrink_after_adam(work: Workload) -> Step:
    """The decoupled form, as people write it: all weights shrink by lr·λ."""
    optimizer = built(torch.optim.AdamW, work, fused=True)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for p in work.params:
            torch.ops.aten.softshrink.out(p, LR * STRENGTH, out=p)

    return step


BASELINE = "AdamW, fused"
FUSED = tuple(f"ProxAdamW {name}, fused" for name in OURS)

CONTENDERS = [
    Contender(BASELINE, lambda work: built(torch.optim.AdamW, work, fused=True).step, adam(), missing=no_fused_sgd),
    Contender("AdamW, foreach", lambda work: built(torch.optim.AdamW, work, foreach=True).step, adam()),
    *(
        Contender(name, _ours(penalty, fused=True), adam(*penalty.parts()), missing=no_fused_step)
        for name, penalty in zip(FUSED, OURS.values(), strict=True)
    ),
    Contender("ProxAdamW L1, foreach", _ours(OURS["L1"], foreach=True), adam(STRENGTH), missing=nothing_missing),
    Contender(
        "AdamW fused + softshrink in place",
        softshrink_after_adam,
        adam(STRENGTH, metric=False),
        missing=no_fused_sgd,
    ),
]
