"""Sparse by reparametrisation: a weight as the product of two factors, on which L2 acts like L1 on the weight."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchreg.assignments import Assignment
from torchreg.penalties import L1, L2, Penalty
from torchreg.regularizer import Regularizer
from torchreg.rules import Rules, assign


class Product(nn.Module):
    """The parametrization w = u·v, elementwise."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return u * v

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Factors with u² − v² = mean |w| > 0: were they balanced from the start, no weight could change its sign."""
        wide = w.abs().to(torch.promote_types(w.abs().dtype, torch.float32))
        mean = wide.mean() if wide.numel() else wide.sum()
        mean = torch.where(mean == 0, 1, mean)
        u = ((torch.hypot(2 * wide, mean) + mean) / 2).sqrt().to(w.abs().dtype)
        return u, w / u


def factorize(model: nn.Module, rules: Rules) -> Regularizer:
    """Replace weights by products of two factors, w = u·v elementwise, for L1 by plain gradient descent.

    Since u² + v² ≥ 2|u·v|, with equality at |u| = |v|,

        min over u, v of  f(u·v) + ½λ Σ(u² + v²)   =   min over w of  f(w) + λ Σ|w|

    with the same minimisers w, and no other local minima where f has none. So L2 with half the strength on both factors
    (torch's ``weight_decay=λ`` in SGD) is the lasso, smooth enough for any optimizer. The weights get close to zero,
    not to it: `defactorize` has a threshold. It takes some 1/(learning rate·λ) steps until the factors are balanced and
    the penalty is L1; a weight whose factors have become tiny together hardly wakes again. A proximal optimizer needs
    neither and half the memory, and its zeros are exact.

    The factors are parameters of their own, ``parametrizations.weight.original0`` and ``original1`` of each layer:
    build the optimizer afterwards. They start with u² − v² = mean |w| (1 where all are zero) and a product that equals
    the weight up to one unit in the last place, a zero exactly. A state dict of the factorized model fits a model that
    is factorized likewise.

    Args:
        model: changed in place.
        rules: as for `torchreg.Regularizer`: L1, or rules that give L1 or None. Weights that don't require gradients
            are left as they are.

    Returns:
        A regularizer over the factors with L2(λ/2), to be used by any route: ``loss + reg()``,
        ``reg.attach(optimizer)`` or ``reg.param_groups()``.

    Raises:
        TypeError: if the rules are of the wrong kind.
        ValueError: if a rule matches no parameter, gives another penalty than L1, or selects a weight that is tied to
            another one, parametrized already or a recurrent layer's. Nothing is changed then.

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(3, 1)
    >>> reg = torchreg.factorize(model, torchreg.L1(0.1))
    >>> bool(reg() > 0.1 * model.weight.abs().sum())  # until the factors are balanced
    True
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = reg.attach(optimizer)
    >>> _ = torchreg.defactorize(model)

    Source: Ziyin and Wang, spred: solving L1 penalty with SGD, ICML 2023; Hoff, Lasso, fractional norm and structured
    sparse estimation using a Hadamard product parametrization, Computational Statistics & Data Analysis, 2017.
    """
    chosen = [a for a in assign(model, rules) if a.penalty is not None and a.parameter.requires_grad]
    for a in chosen:
        _check(a, model)
    if not chosen:
        raise ValueError("The rules select no trainable weight.")
    factors = {id(a): _register(a) for a in chosen}
    pairs: list[tuple[Any, Penalty | None]] = []
    for index in sorted({a.rule_index for a in chosen if a.rule_index is not None}):
        group = [a for a in chosen if a.rule_index == index]
        members = {id(factor) for a in group for factor in factors[id(a)]}
        penalty = group[0].penalty
        assert isinstance(penalty, L1)
        pairs.append((_selector(_plain(group[0].rule), members), L2(penalty.strength / 2)))
    return Regularizer(model, pairs)


def defactorize(model: nn.Module, threshold: float = 0.0) -> nn.Module:
    """Undo `factorize`: plain weights with the products as values. Optimizers have to be built anew.

    Args:
        model: changed in place. Other parametrizations are left alone.
        threshold: weights of at most this modulus become exactly zero.

    Returns:
        The model.

    Raises:
        TypeError: if the model is no module or the threshold no number.
        ValueError: if the threshold is negative, nothing is factorized, or another parametrization has been put on top
            of a product. Nothing is changed then.

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(3, 1)
    >>> _ = torchreg.factorize(model, torchreg.L1(0.1))
    >>> torchreg.defactorize(model)
    Linear(in_features=3, out_features=1, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be an nn.Module, got {type(model).__name__}.")
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"Expected `threshold` to be a non-negative number, got {threshold!r}.")
    if not 0 <= float(threshold) < math.inf:
        raise ValueError(f"Expected `threshold` to be a non-negative number, got {threshold}.")
    found = []
    for prefix, module in model.named_modules():
        for attribute, stack in getattr(module, "parametrizations", {}).items():
            if not any(isinstance(part, Product) for part in stack):
                continue
            if len(stack) > 1:
                name = f"{prefix}.{attribute}".lstrip(".")
                raise ValueError(f"{name!r} has another parametrization beside its factors: remove that one first.")
            found.append((module, attribute, stack))
    if not found:
        raise ValueError("No weight of the model is factorized.")
    for module, attribute, stack in found:
        trainable = stack.original0.requires_grad
        stack.original0.requires_grad_(True)  # else what is put back is a buffer
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        weight = getattr(module, attribute).requires_grad_(trainable)
        with torch.no_grad():
            weight.masked_fill_(weight.abs() <= threshold, 0)
    return model


def _check(a: Assignment, model: nn.Module) -> None:
    """Raise unless the weight can be factorized."""
    if not isinstance(a.penalty, L1):
        raise ValueError(
            f"Expected rule {a.rule} to give L1, got {type(a.penalty).__name__} for {a.name!r}: L2 on the factors is "
            "the same as L1 on their product."
        )
    if isinstance(a.module, nn.RNNBase):
        raise ValueError(
            f"Parameter {a.name!r} is a recurrent layer's, which does not read its weights where parametrizations put "
            "them; leave it alone."
        )
    holders = {
        (id(module), attribute)
        for module in model.modules()
        for attribute, p in module._parameters.items()
        if p is a.parameter
    }
    if len(holders) > 1:
        raise ValueError(f"Parameter {a.name!r} is tied to another one: a parametrization would untie them.")


def _register(a: Assignment) -> tuple[Tensor, Tensor]:
    parametrize.register_parametrization(a.module, a.attribute, Product())
    stack: Any = a.module.parametrizations[a.attribute]  # type: ignore[index]
    stack.penalizable = True  # unlike other originals: see torchreg.rules
    return stack.original0, stack.original1


def _own_class(module: nn.Module) -> None:
    """A class for this module alone: a deepcopy has the same, from which torch would take the weight away for both."""
    cls = type(module)
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)


def _selector(rule: str, members: set[int]) -> Callable[[str, nn.Parameter], bool]:
    """A predicate for the factors of one rule, under the rule's name."""

    def factors(name: str, p: nn.Parameter) -> bool:
        return id(p) in members

    factors.__name__ = rule
    return factors


def _plain(rule: str) -> str:
    """A rule's label without the quotes of a glob."""
    return rule[1:-1] if rule[:1] in ("'", '"') else rule
