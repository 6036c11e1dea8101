"""The penalty as a term of the loss: what autograd calls for its value and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _storage_Use_Count, _will_engine_execute_node
from torch._C._autograd import _get_current_graph_task_keep_graph

from torchreg import kernels, sharding
from torchreg.penalties import Penalty, sharded


class PenaltyTerm(torch.autograd.Function):
    """Σ scale·R(w): the forward pass keeps the weights, or their signs, the backward pass makes one gradient for each.

    Where a weight has a gradient already, to which autograd would add this one, and nobody else is to see it, the
    backward pass adds it itself: that takes no memory, and less than half of the traffic.
    """

    @staticmethod
    def forward(ctx: Any, penalties: kernels.PenaltySum, scale: float | Tensor, *weights: Tensor) -> Tensor:
        """The value, a 0-d tensor."""
        ctx.sum, ctx.scale, ctx.signs = penalties, scale, penalties.room()
        ctx.save_for_backward(*weights)
        return penalties.value(weights, ctx.signs) * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """The gradients of the weights; None where it has been added."""
        weights = ctx.saved_tensors  # raises if one has been changed
        into = _accumulated(weights, ctx.next_functions[-len(weights) :])
        grads = ctx.sum.gradients(weights, grad_output * ctx.scale, into, ctx.signs)
        if not _get_current_graph_task_keep_graph():
            ctx.sum.give_back(ctx.signs)
        return None, None, *grads


def _accumulated(weights: Sequence[Tensor], edges: Sequence[tuple[Any, int]]) -> list[Tensor | None]:
    """Every ``w.grad`` that autograd is about to add to in place, where only it would see what is added; else None.

    Others would if gradients were recorded or looked at for NaN, if they were returned (`torch.autograd.grad`), if
    hooks were called with them, or if what is there is part of another term, whose backward pass is still to come.
    """
    if torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return [None] * len(weights)
    try:
        wanted = [node is not None and _will_engine_execute_node(node) for node, _ in edges]
    except RuntimeError:  # gradients are returned
        return [None] * len(weights)
    return [
        grad
        if executed
        and w.is_cpu
        and w.is_leaf
        and not w._backward_hooks
        and not w._post_accumulate_grad_hooks
        and type(grad := w.grad) is Tensor
        and grad.layout is torch.strided
        and not grad.requires_grad
        and _storage_Use_Count(grad.untyped_storage()._cdata) <= 2  # the weight, and the object in Python
        and grad._use_count() <= 2  # type: ignore[attr-defined]
        else None
        for w, executed in zip(weights, wanted, strict=True)
    ]


class ShardedPenaltyTerm(torch.autograd.Function):
    """As `PenaltyTerm`, for weights that are spread over processes: each makes the gradients of its parts."""

    @staticmethod
    def forward(ctx: Any, rules: list[tuple[Penalty, list[Tensor]]], scale: Tensor, *weights: Tensor) -> Tensor:
        """The value, a 0-d tensor that is the same in all processes."""
        ctx.rules, ctx.scale = rules, scale
        ctx.save_for_backward(*weights)
        value = sharded.value_all(rules)
        return value * scale.to(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """The gradients of the weights, spread as they are."""
        saved = iter(ctx.saved_tensors)  # raises if a weight has been changed
        rules = [(penalty, [next(saved) for _ in weights]) for penalty, weights in ctx.rules]
        grads = []
        for (_, weights), pulls in zip(rules, sharded.grad_all(rules), strict=True):
            for p, pull in zip(weights, pulls, strict=True):
                factor = grad_output.to(pull.device) * ctx.scale.to(pull.device)
                grads.append(sharding.sharded_like((pull * factor.to(pull.real.dtype)).to(p.dtype), p))
        return None, None, *grads
