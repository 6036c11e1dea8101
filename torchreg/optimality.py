"""How far from optimal the weights are, and from which strength on everything is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchreg import sharding, unsettled
from torchreg.assignments import Assignment, PenalizedModel, by_rule, check_current
from torchreg.groups import Shared
from torchreg.penalties import Penalty, sharded
from torchreg.penalties.base import host_scalar


@torch.no_grad()
def kkt_residual(reg: PenalizedModel, closure: Callable[[], Tensor] | None = None) -> Tensor:
    """The largest violation of the optimality conditions of ``min f(w) + R(w)``, a 0-d tensor.

    It is the largest distance, over all trainable parameters, from −∇f to the subdifferential of the penalty:
    ``|∇f + λ·sign(w)|`` where w ≠ 0 and ``max(|∇f| − λ, 0)`` where w = 0 for L1, and ``|∇f|`` for what is left alone.
    It has the unit of a gradient: compare it with the strength. Zero means a stationary point.

    Args:
        reg: the regularizer that states the problem.
        closure: computes the data's loss f without the penalty. By default the gradients now in ``.grad`` are used:
            after ``loss.backward()`` of the data's loss alone, unscaled. (The hook leaves them so; with the loss term
            in the loss, or minibatches, pass a closure over all data.) ``.grad`` is left as it is.

    Raises:
        ValueError: if no parameter has a gradient.
        RuntimeError: if the model's parameters are no longer those that the rules were applied to.

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> reg = torchreg.Regularizer(model, torchreg.L1(0.5))
    >>> torchreg.kkt_residual(reg, lambda: 0.75 * model(torch.ones(1, 1)).sum())
    tensor(0.2500)
    """
    check_current(reg.model, reg.assignments)
    _check_shapes(reg.assignments)
    scale = host_scalar(reg.strength_scale)  # a float keeps the strengths of float64 weights exact
    assignments = [a for a in reg.assignments if a.parameter.requires_grad]
    unsettled.settle(a.parameter for a in assignments)
    grads = _gradients(reg.model, assignments, closure) if closure else [a.parameter.grad for a in assignments]
    known = {id(a): _dense(g) for a, g in zip(assignments, grads, strict=True) if g is not None and g.numel()}
    worst, layouts = [], []
    for penalty, chosen in by_rule(a for a in assignments if id(a) in known):
        weights: list[Tensor] = [a.parameter for a in chosen]
        layouts += list(map(sharding.layout, weights))
        for residual in _residuals(penalty, scale, weights, [known[id(a)] for a in chosen]):
            largest = residual.max() if residual.numel() else residual.new_zeros(())
            worst.append(largest.to(torch.promote_types(residual.dtype, torch.float32)))
    worst = sharding.largest(worst, layouts)
    if not worst:
        raise ValueError("No parameter has a gradient: call backward() on the data's loss first, or pass a closure.")
    return torch.stack([w.to(worst[0]) for w in worst]).max()


def strength_max(
    reg: PenalizedModel, closure: Callable[[], Tensor], *, per_parameter: bool = False
) -> float | dict[str, float]:
    """The smallest strength at which all penalised weights stay zero: strengths are worth trying below it.

    That is beside the present ``strength_scale`` s, which multiplies it in the objective: halving s doubles it, and at
    s = 0 no strength is enough (infinite, unless the gradient is zero).

    The gradient of f is taken with the penalised weights at zero and everything else as it is (also the entries
    that a tensor-valued strength leaves alone with a zero); for L1 the result is
    its largest modulus. It is in units of the penalty's strength (of l1 for Elastic Net), and infinite for L2. With
    rules of different strengths it is the one that all of them would need.

    In a network of several layers all-zero weights pass no gradient, so that the result is near zero and says little.
    ``per_parameter=True`` zeroes one parameter at a time instead, the others staying as they are: at which strength
    this layer would empty now. Parameters that share groups are zeroed together, as the penalty does, and have one
    strength.

    Args:
        reg: the regularizer; its strengths do not matter, except for tensor-valued ones, whose factor it gives.
        closure: computes the data's loss f without the penalty, over all data. Weights, gradients and buffers are put
            back afterwards, also when it raises.
        per_parameter: return a dict from names to strengths.

    Raises:
        ValueError: if nothing is penalised, or the loss does not depend on the penalised parameters.
        RuntimeError: if the model's parameters are no longer those that the rules were applied to.

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> reg = torchreg.Regularizer(model, torchreg.L1(0.1))
    >>> x, y = torch.eye(2), torch.tensor([[4.0], [1.0]])
    >>> torchreg.strength_max(reg, lambda: 0.5 * torch.nn.functional.mse_loss(model(x), y))
    2.0

    Source: Friedman, Hastie and Tibshirani, Regularization paths for GLMs, JSS, 2010, section 2.5.
    """
    check_current(reg.model, reg.assignments)
    _check_shapes(reg.assignments)
    chosen = [a for a in reg.assignments if a.penalty is not None and a.parameter.requires_grad]
    unsettled.settle(a.parameter for a in chosen)
    if not chosen:
        raise ValueError("The regularizer penalises no trainable parameter.")
    if per_parameter:
        each = {}
        for some in _apart(chosen):
            strength = max(_strengths_max(reg, some, closure), default=0.0)
            each.update({id(a): strength for a in some})
        return {a.name: each[id(a)] for a in chosen}
    largest = _strengths_max(reg, chosen, closure)
    if not largest:
        raise ValueError("The closure's loss does not depend on the penalised parameters.")
    return max(largest)


def _residuals(
    penalty: Penalty | None, scale: float | Tensor, weights: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """The violations at all weights of one rule."""
    if penalty is None:
        return [sharding.beside(grad, w).abs() for w, grad in zip(weights, grads, strict=True)]
    if sharding.any_sharded(weights):
        return sharded.residual_all(penalty.scaled(scale), weights, grads)
    if penalty.is_joint:
        return penalty.scaled(scale).residual_all(weights, grads)
    residuals = []
    for w, grad in zip(weights, grads, strict=True):
        factor = scale.to(grad.device, grad.real.dtype) if isinstance(scale, Tensor) else scale
        residuals.append(penalty.scaled(factor).optimality_residual(w, grad))
    return residuals


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


def _apart(chosen: list[Assignment]) -> Iterator[list[Assignment]]:
    """The parameters one by one, those that share groups together."""
    for penalty, some in by_rule(chosen):
        groups = getattr(penalty, "groups", None)
        for positions in groups.connected() if isinstance(groups, Shared) else [[i] for i in range(len(some))]:
            yield [some[i] for i in positions]


def _strengths_max(reg: PenalizedModel, chosen: list[Assignment], closure: Callable[[], Tensor]) -> list[float]:
    """One strength for each chosen parameter that the loss depends on, or for those that act together."""
    with _zeroed(chosen):
        grads = _gradients(reg.model, chosen, closure)
    known = {id(a): _dense(grad) for a, grad in zip(chosen, grads, strict=True) if grad is not None}
    scaled = [
        float(strength)
        for penalty, some in by_rule(a for a in chosen if id(a) in known)
        if penalty is not None
        for strength in _of_rule(penalty, [a.parameter for a in some], [known[id(a)] for a in some])
    ]
    scale = float(reg.strength_scale)
    return [s / scale if scale else s * math.inf if s else 0.0 for s in scaled]


def _of_rule(penalty: Penalty, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    if sharding.any_sharded(weights):
        return sharded.strengths_max(penalty, weights, grads)
    return penalty.strengths_max(grads)


@contextmanager
def _zeroed(chosen: list[Assignment]) -> Iterator[None]:
    saved = [(a.parameter, a.parameter.detach().clone()) for a in chosen]
    try:
        with torch.no_grad():
            for a in chosen:
                sharding.local(a.parameter).masked_fill_(_reached(a.penalty, a.parameter), 0)
        yield
    finally:
        with torch.no_grad():
            for p, old in saved:
                p.copy_(old)


def _reached(penalty: Penalty | None, p: Tensor) -> Tensor:
    """Where a large enough multiple of the penalty makes zeros: all but the zero entries of its leading strength."""
    leading = next(iter(penalty.strengths().values()), None) if penalty is not None else None
    if isinstance(leading, Tensor) and leading.ndim:
        return sharding.beside(leading, p).to(p.device) > 0
    return torch.ones((), dtype=torch.bool, device=p.device)


def _check_shapes(assignments: list[Assignment]) -> None:
    if any(sharding.is_flat(a.parameter) for a in assignments):
        raise ValueError(
            "FullyShardedDataParallel holds the parameters as shares of one flat vector, of which nothing can be told "
            "here: shard by torch.distributed.fsdp.fully_shard."
        )


def _gradients(model: nn.Module, wanted: list[Assignment], closure: Callable[[], Tensor]) -> list[Tensor | None]:
    """The gradients of the closure's loss, whether or not it calls backward itself; the model is left as it was."""
    parameters, targets = list(model.parameters()), [a.parameter for a in wanted]
    saved_grads = [p.grad for p in parameters]
    saved_buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
            loss = loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else loss
        if any(p.grad is not None for p in parameters):
            return [p.grad for p in targets]
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError("Expected the closure to return the loss, a tensor of one element.")
        if not loss.requires_grad:
            return [None] * len(targets)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            loss.backward()  # gradients meet there, not in autograd.grad
            return [p.grad for p in targets]
        return list(torch.autograd.grad(loss, targets, allow_unused=True))
    finally:
        for p, grad in zip(parameters, saved_grads, strict=True):
            p.grad = grad
        with torch.no_grad():
            for module, name, buffer, old in saved_buffers:
                module._buffers[name] = buffer.copy_(old)
