"""Penalties on a model: as a loss term, as an optimizer hook, or as param groups for a proximal optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg import kernels, sharding, tables, unsettled
from torchreg.assignments import Assignment, by_rule, check_current, is_trainable, outdated, shape_text, strengths_text
from torchreg.hook import PenaltyHandle, check_gradients
from torchreg.loss_term import PenaltyTerm, ShardedPenaltyTerm
from torchreg.penalties import Penalty
from torchreg.penalties.base import checked_strength, host_scalar
from torchreg.rules import Rules, assign


class Regularizer(nn.Module):
    """Penalties on the parameters of a model: ``min f(w) + scale·Σ R(w)``.

    The same penalties serve three routes, which share their minimiser:

    1. a loss term: ``loss = criterion(model(x), y) + reg()``;
    2. a hook: ``handle = reg.attach(optimizer)``, the training loop untouched;
    3. param groups: ``torchreg.ProxSGD(reg.param_groups(), lr=0.1)``, which alone reaches exact zeros.

    Use one of them, not two. With param groups it is the optimizer's penalties that act: after its
    ``load_state_dict`` they may differ from the regularizer's, which ``print()`` and `kkt_residual` go by.

    The rules are applied once. A layer that is replaced, added, parametrized or pruned afterwards makes the
    regularizer out of date: using it is an error until a new one is built.

    Args:
        model: the module whose parameters are penalised. It is referred to, not registered as a submodule.
        rules: a penalty, or a mapping (or list of pairs) from selectors to penalties. The first match wins, and
            ``None`` leaves alone. A selector is a glob on qualified names, a compiled regex (searched in them), a
            module class, a predicate ``(name, parameter) -> bool``, a parameter, or a tuple or list of parameters.
            A bare penalty applies to the weights of linear, convolution, bilinear, recurrent and attention layers,
            not to biases, norm layers and embeddings (`torchreg.rules.WEIGHTS` is that selection as a key).

    Attributes:
        strength_scale: a 0-d tensor (a buffer, part of ``state_dict()``) that multiplies all strengths. Assigning
            a number or a one-element tensor fills it in place; the param groups share it. It stays the same tensor
            with the same dtype when the regularizer is moved or cast.

    Raises:
        TypeError: if the model or the rules are of the wrong kind.
        ValueError: if a rule matches no parameter, or one that can't be penalised.

    >>> import torch
    >>> from torchreg import L1, Regularizer
    >>> model = torch.nn.Linear(3, 1)
    >>> _ = torch.nn.init.constant_(model.weight, -2.0)
    >>> reg = Regularizer(model, L1(0.5))
    >>> reg().item()
    3.0
    >>> print(reg)
    parameter   shape   rule      strength
    ──────────────────────────────────────
    weight      1×3     default   L1 0.5
    <BLANKLINE>
    left alone   shape   why
    ─────────────────────────
    bias         1       bias
    """

    model: nn.Module
    strength_scale: Tensor

    def __init__(self, model: nn.Module, rules: Rules) -> None:
        super().__init__()
        assignments = assign(model, rules)
        self.__dict__["model"] = model  # not a submodule: its state belongs to the user's checkpoint
        self.assignments: list[Assignment] = assignments
        self._sum: kernels.PenaltySum | None = None  # of the last loss term
        self._layers: list[tuple[nn.Module, dict[str, nn.Module | None]]] = _layers(model)
        meta = torch.get_default_device().type == "meta"  # where there are no values, the scale still has one
        self.register_buffer("strength_scale", torch.ones((), device="cpu" if meta else None))

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "strength_scale":
            super().__setattr__(name, value)
            return
        scale = _checked_scale(value)
        with torch.no_grad():
            self.strength_scale.copy_(scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        """Keep the scale the tensor that the param groups share, in its dtype; only its device follows ``fn``."""
        scale = self.strength_scale
        super()._apply(fn, recurse)
        device = self._buffers["strength_scale"].device  # type: ignore[union-attr]
        if device.type != "meta":
            scale.data = scale.data.to(device)
        self._buffers["strength_scale"] = scale
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sum": None}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}strength_scale"
        if key in state_dict:
            _checked_scale(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def penalized(self) -> Iterator[tuple[str, nn.Parameter, Penalty]]:
        """The (name, parameter, penalty) of every parameter that a rule penalises, frozen ones left out.

        Raises:
            RuntimeError: if a layer has been replaced, added, parametrized or pruned since the rules were applied.
        """
        if not torch.compiler.is_compiling() and any(layer._modules != parts for layer, parts in self._layers):
            check_current(self.model, self.assignments)
            self._layers = _layers(self.model)
        for a in self.assignments:
            if a.penalty is not None and is_trainable(p := a.parameter):
                yield a.name, p, a.penalty

    def forward(self) -> Tensor:
        """The penalty ``scale·Σ R(w)`` of all penalised parameters, a real 0-d tensor: add it to the loss.

        Its backward computes one gradient per weight and nothing else of the model's size; on the CPU it adds to
        gradients that are there in one pass, and with L1 alone goes by the signs of the weights, which are kept from
        one to the other (two bits each, where weights have 32). To maximise an objective, subtract it.

        Raises:
            ValueError: if a penalty has no gradient (`L0`, constraints). Under ``torch.no_grad()`` the value of all
                penalties is given; that of a constraint is 0 or infinite.
        """
        entries = list(self.penalized())
        if not entries:
            return self.strength_scale.new_zeros(())
        names, weights, penalties = zip(*entries, strict=True)
        unsettled.settle(weights)
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        known = None if traced else self._sum
        if known is None or not known.holds(penalties, weights):
            distinct = {id(penalty): penalty for penalty in penalties}.values()
            if torch.is_grad_enabled() and not all(penalty.has_gradient for penalty in distinct):
                check_gradients(zip(names, penalties, strict=True))
            if sharding.any_sharded(weights):
                return self._sharded_value()
            if any(map(sharding.is_flat, weights)):
                raise ValueError(_FLAT)
            if any(penalty.is_joint for penalty in distinct):
                return self._joint_value()
            strengths = [s for penalty in distinct for s in penalty.strengths().values()]
            learned = any(isinstance(s, Tensor) and s.requires_grad for s in strengths)
            if learned or traced:
                total = kernels.PenaltySum(penalties, weights).value(weights)  # autograd records, and a compiler fuses
                return total * host_scalar(self.strength_scale)
            with torch.no_grad():
                known = self._sum = kernels.PenaltySum(penalties, weights)
        scale = host_scalar(self.strength_scale)
        if not torch.is_grad_enabled():
            return known.value(weights) * scale
        return PenaltyTerm.apply(known, scale, *weights)

    def _joint_value(self) -> Tensor:
        """The penalty where some of them take all weights of a rule together."""
        total = self.strength_scale.new_zeros(())
        for penalty, chosen in by_rule(a for a in self.assignments if a.trainable):
            if penalty is not None:
                value = penalty.value_all([a.parameter for a in chosen])
                total = total.to(torch.promote_types(total.dtype, value.dtype)) + value.to(total.device)
        return total * self.strength_scale

    def _sharded_value(self) -> Tensor:
        """The penalty where weights are spread over processes: a plain tensor, the same in all of them."""
        chosen = [(penalty, some) for penalty, some in by_rule(a for a in self.assignments if a.trainable) if penalty]
        rules = [(penalty, [a.parameter for a in some]) for penalty, some in chosen if penalty is not None]
        strengths = [s for penalty, _ in rules for s in penalty.strengths().values()]
        if torch.is_grad_enabled() and any(isinstance(s, Tensor) and s.requires_grad for s in strengths):
            raise ValueError("Strengths can't be learned where parameters are sharded over processes.")
        return ShardedPenaltyTerm.apply(rules, self.strength_scale, *(p for _, weights in rules for p in weights))

    def attach(self, optimizer: Optimizer) -> PenaltyHandle:
        """Add the penalty's gradient inside ``optimizer.step()``, whatever the training loop does before.

        The strength is independent of gradient accumulation, clipping and loss scaling, since the gradient is
        added to what the step reads and taken away again afterwards: ``p.grad`` is never changed. Under
        ``maximize=True`` the penalty still shrinks. A closure's loss gets the penalty's value added.

        Returns:
            A handle with ``remove()``, ``state_dict()`` and ``load_state_dict()``. Optimizers lose hooks when they
            are copied or pickled: attach again to the copy.

        A torch optimizer built from `param_groups()` does nothing with their penalties; attached to, it applies
        them, once.

        Raises:
            RuntimeError: if the model's parameters are no longer those that the rules were applied to.
            TypeError: if ``optimizer`` is no ``torch.optim.Optimizer``.
            ValueError: if the optimizer applies penalties itself, has this regularizer attached already, or
                holds none of the penalised parameters.
        """
        check_current(self.model, self.assignments)
        return PenaltyHandle(self, optimizer)

    def param_groups(self) -> list[dict[str, Any]]:
        """One param group per penalty, and one for what is left alone: for a proximal optimizer.

        Each holds ``params``, ``penalty``, ``strength_scale`` (this regularizer's own tensor) and, beside a penalty,
        the rule's key as its ``name``, by which a schedule may choose groups. Optimizers of torch keep keys that they
        do not know and ignore them: ``torch.optim.Adam(reg.param_groups())`` penalises nothing until `attach` is called
        on it.

        Raises:
            RuntimeError: if the model's parameters are no longer those that the rules were applied to.
        """
        check_current(self.model, self.assignments)
        groups: dict[tuple[int | None, Penalty] | None, dict[str, Any]] = {}
        for a in self.assignments:
            key = None if a.penalty is None else (a.rule_index, a.penalty)
            if key not in groups:
                penalty = a.penalty and a.penalty.to(a.parameter.device)
                name = {} if penalty is None else {"name": a.rule.strip("'") if a.rule[:1] == "'" else a.rule}
                groups[key] = {"params": [], "penalty": penalty, "strength_scale": self.strength_scale, **name}
            groups[key]["params"].append(a.parameter)
        order = sorted(groups, key=lambda key: (key is None, key and key[0]))
        return [groups[key] for key in order]

    def extra_repr(self) -> str:
        """The summary inside ``repr()``; ``print()`` shows the table."""
        count = sum(a.penalty is not None for a in self.assignments)
        return f"{count} of {len(self.assignments)} parameters penalised"

    def __str__(self) -> str:
        here = [a for a in self.assignments if a.module._parameters.get(a.attribute) is not None]
        chosen = [a for a in here if a.penalty is not None]
        alone = [a for a in here if a.penalty is None]
        parts = []
        if chosen:
            rows = [(a.name, shape_text(a.parameter), a.rule, strengths_text(a)) for a in chosen]
            parts.append(tables.render(("parameter", "shape", "rule", "strength"), rows, left=4))
        if alone:
            reasons = [(a.name, shape_text(a.parameter), a.reason) for a in alone]
            parts.append(tables.render(("left alone", "shape", "why"), reasons, left=3))
        scale = float(self.strength_scale)
        if scale != 1:
            parts.append(f"all strengths × {scale:g}")
        if message := outdated(self.model, self.assignments):
            parts.append(f"out of date: {message}")
        return "\n\n".join(parts)


_FLAT = (
    "FullyShardedDataParallel holds the parameters as shares of one flat vector, of which no loss term can be made: "
    "use reg.param_groups() or attach(), or shard by torch.distributed.fsdp.fully_shard."
)


def _layers(model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module | None]]]:
    """Every module with its children: comparing them costs a step next to nothing, unlike naming all parameters."""
    return [(module, dict(module._modules)) for module in model.modules()]


def _checked_scale(value: Any) -> Tensor:
    scale = torch.as_tensor(checked_strength("strength_scale", value))
    if scale.numel() != 1:
        raise ValueError(f"Expected `strength_scale` to be one number, got a tensor of shape {tuple(scale.shape)}.")
    return scale.reshape(())
