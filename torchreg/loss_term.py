"""The penalty as a term of the loss: what autograd calls for its value and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchreg import kernels, sharding
from torchreg.penalties import Penalty, sharded


class PenaltyTerm(torch.autograd.Function):
    """Σ scale·R(w): the forward pass keeps only the weights, the backward pass makes one gradient for each.

    Where a weight has a gradient already, to which autograd would add this one, and nobody else is to see it, the
    backward pass adds it itself: that takes no memory, and less than half of the traffic.
    """

    @staticmethod
    def forward(ctx: Any, penalties: list[Penalty], scale: float | Tensor, *weights: Tensor) -> Tensor:
        """The value, a 0-d tensor."""
        ctx.sum, ctx.scale = kernels.PenaltySum(penalties, weights), scale
        ctx.save_for_backward(*weights)
        return ctx.sum.value(weights) * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """The gradients of the weights; None where it has been added."""
        weights = ctx.saved_tensors  # raises if one has been changed
        nodes = [node for node, _ in ctx.next_functions[-len(weights) :]]
        recorded = torch.is_grad_enabled() or torch.is_anomaly_enabled()
        into = [None if recorded else _accumulated(w, node) for w, node in zip(weights, nodes, strict=True)]
        return None, None, *ctx.sum.gradients(weights, grad_output * ctx.scale, into)


def _accumulated(w: Tensor, node: Any) -> Tensor | None:
    """The ``w.grad`` that autograd is about to add to in place, where only it would see what is added; else None.

    Others would if gradients were returned (`torch.autograd.grad`), if hooks were called with them, or if what is there
    is part of another term, whose backward pass is still to come. The caller has asked whether they are recorded, or
    looked at for NaN.
    """
    if w.device.type != "cpu" or not w.is_leaf or w._backward_hooks or w._post_accumulate_grad_hooks:
        return None
    if type(grad := w.grad) is not Tensor or grad.layout is not torch.strided or grad.requires_grad:
        return None
    users: int = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    if users > 2 or grad._use_count() > 2:  # type: ignore[attr-defined]  # the weight, and the object in Python
        return None
    try:
        return grad if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # gradients are returned
        return None


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
