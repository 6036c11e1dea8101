"""Who takes part with groups: the rows of every tensor (of a vector, each entry) are zero together or not at all.

Their formulas are given rows, not single weights.
"""

from __future__ import annotations

import torch
from adam_contenders import adam_moments, built
from contenders import GAIN, LR, MOMENTUM, STRENGTH, Contender, Formula, Step, no_pat, nothing_missing, prox_sgd
from torch import Tensor
from workload import Workload

from torchreg import GroupLasso, ProxAdamW, SparseGroupLasso
from torchreg.kernels import selection
from torchreg.penalties import Penalty

PENALTIES: dict[str, Penalty] = {
    "GroupLasso": GroupLasso(STRENGTH, "rows"),
    "SparseGroupLasso": SparseGroupLasso(STRENGTH, STRENGTH, "rows", l2=STRENGTH),
}
FUSED = tuple(f"ProxSGD {name} by rows, fused" for name in PENALTIES)
PAT = "torchao PAT group lasso by rows"
SLOW = 50_000_000


def proximal(l1: float, norm: float, l2: float) -> Formula:
    def formula(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        m, tau = torch.zeros_like(w), LR * GAIN
        for _ in range(steps):
            m = MOMENTUM * m + g
            w = w - LR * m
            w = _shrunk(w - w.clamp(-tau * l1, tau * l1), tau * norm) / (1 + 2 * tau * l2)
        return w, g

    return formula


def dual_averaging(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """PAT: SGD on latent weights, whose groups are shrunk by λ·Σlr (without the gain of momentum)."""
    latent, _ = proximal(0.0, 0.0, 0.0)(w, g, steps)
    return _shrunk(latent, steps * LR * STRENGTH), g


def adaptive(penalty: Penalty) -> Formula:
    """In Adam's metric no formula says what is left of a group: the reference in float64 does."""

    def formula(w: Tensor, g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        for direction, tau in adam_moments(g, steps):
            w = penalty.prox(w - tau * direction, tau)
        return w, g

    return formula


def _shrunk(w: Tensor, threshold: float) -> Tensor:
    norms = w.norm(dim=1, keepdim=True)
    return w * (1 - threshold * w.shape[1] ** 0.5 / norms).clamp_min(0)


def pat_group_lasso(work: Workload) -> Step:
    from torchao.prototype.pat.optim import PruneOptimizer

    groups = [{"params": work.params, "prox_type": "ProxGroupLasso", "group_type": "Dim0Grouper"}]
    base = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
    return PruneOptimizer(base, reg_lambda=STRENGTH).step


def no_fused_groups(metric: bool):
    def missing(work: Workload) -> str | None:
        reasons = (selection.obstacle(p, PENALTIES["GroupLasso"], metric) for p in work.params)
        return next(filter(None, reasons), None) or selection.unavailable(work.device)

    return missing


def slow(work: Workload) -> str | None:
    return "takes ten seconds a step" if work.device.type == "cpu" and work.size > SLOW else None


def _ours(name: str, penalty: Penalty) -> list[Contender]:
    sgd, in_adams_metric = proximal(*penalty.parts()), adaptive(penalty)
    rows = []
    for form in ("fused", "eager"):
        fused = form == "fused"
        rows += [
            Contender(
                f"ProxSGD {name} by rows, {form}",
                lambda work, fused=fused: prox_sgd(work, penalty, fused=fused).step,
                sgd,
                missing=no_fused_groups(metric=False) if fused else nothing_missing,
                by_rows=True,
            ),
            Contender(
                f"ProxAdamW {name} by rows, {form}",
                lambda work, fused=fused: built(ProxAdamW, work, penalty=penalty, fused=fused).step,
                in_adams_metric,
                missing=no_fused_groups(metric=True) if fused else slow,
                by_rows=True,
            ),
        ]
    return rows


CONTENDERS = [
    *(contender for name, penalty in PENALTIES.items() for contender in _ours(name, penalty)),
    Contender(PAT, pat_group_lasso, dual_averaging, missing=no_pat, by_rows=True),
]
