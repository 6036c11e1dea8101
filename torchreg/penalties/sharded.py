"""Penalties of weights that are spread over processes (DTensors): each process treats its parts.

What takes each weight by itself, or groups that no process shares with another one, acts on the parts as they are. For
groups that reach over several processes the sums of squares are added up, those of all tensors of a step in one
collective; in a diagonal metric once for every evaluation of the secular equation. Anything else (`TopK`,
`NuclearNorm`, N:M blocks along a sharded dimension, a user's own) is computed from the whole weights, which are
gathered for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torchreg import sharding
from torchreg.groups import Groups
from torchreg.penalties import secular
from torchreg.penalties.base import Penalty, Step, arithmetic, checked_step
from torchreg.penalties.grouped import Grouped, over_step, remaining
from torchreg.penalties.parts import adds_up, of_part
from torchreg.penalties.separable import _is_zero, soft_threshold
from torchreg.spanning import Spanning, joined, spanning

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclasses.dataclass
class Shrinking:
    """Weights of one rule that are to be shrunk.

    Attributes:
        penalty: the rule's, on these weights.
        weights: the parameters, DTensors or plain tensors.
        parts: what is here of them, moved by the gradient, in computing precision; overwritten.
        steps: those of the parts.
    """

    penalty: Penalty
    weights: Sequence[Tensor]
    parts: Sequence[Tensor]
    steps: Sequence[Step]


def prox_all_(rules: Sequence[Shrinking]) -> None:
    """Overwrite the parts of all weights of these rules with the proximal operators."""
    together: list[tuple[Shrinking, list[int]]] = []
    for rule in rules:
        crossing = []
        for i, (p, part, step) in enumerate(zip(rule.weights, rule.parts, rule.steps, strict=True)):
            own = of_part(rule.penalty, p)
            if own is None:
                crossing.append(i)
            elif part.numel():
                own.prox_(part, step)
        if not crossing:
            continue
        if adds_up(rule.penalty):
            together.append((rule, crossing))
            continue
        chosen = [rule.weights[i] for i in crossing]
        wholes = [_gathered(rule.parts[i], rule.weights[i]) for i in crossing]
        steps = [_gathered(rule.steps[i], rule.weights[i]) for i in crossing]
        rule.penalty.prox_all_(wholes, steps)
        for i, p, new in zip(crossing, chosen, wholes, strict=True):
            rule.parts[i].copy_(sharding.layout(p).part(new))
    _shrink(together)


def value_all(rules: Sequence[tuple[Penalty, Sequence[Tensor]]]) -> Tensor:
    """R of all weights of these rules, in all processes: a 0-d tensor on the device of the first."""
    values, layouts = [], []
    for penalty, weights in rules:
        crossing = []
        for p in weights:
            own = of_part(penalty, p)
            if own is None:
                crossing.append(p)
            else:
                values.append(own.value(sharding.local(p)))
                layouts.append(sharding.layout(p))
        if crossing:
            grouped = adds_up(penalty)
            values.append(_value(penalty, crossing) if grouped else penalty.value_all(_all_gathered(crossing)))
            layouts.append(sharding.WHOLE)
    total, *others = sharding.summed(_added(values, layouts), list(dict.fromkeys(layouts)))
    return sum((value.to(total.device) for value in others), start=total)


def grad_all(rules: Sequence[tuple[Penalty, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """For each rule the parts that are here of R's gradient at its weights, in computing precision."""
    found: list[dict[int, Tensor]] = []
    together: list[tuple[Grouped, Any, list[int], dict[int, Tensor]]] = []
    for penalty, weights in rules:
        if not sharding.any_sharded(weights):
            found.append(dict(enumerate(penalty.grad_all([arithmetic(p) for p in weights]))))
            continue
        owns = [of_part(penalty, p) for p in weights]
        grads = {i: own.grad(arithmetic(sharding.local(weights[i]))) for i, own in enumerate(owns) if own is not None}
        found.append(grads)
        crossing = [i for i, own in enumerate(owns) if own is None]
        chosen = [weights[i] for i in crossing]
        if chosen and adds_up(penalty):
            r = penalty.ready(*_ready(penalty, chosen, map(sharding.local, chosen)))
            together.append((penalty, r, crossing, grads))
        elif chosen:
            pulls = penalty.grad_all([arithmetic(w) for w in _all_gathered(chosen)])
            grads.update((i, sharding.layout(weights[i]).part(g)) for i, g in zip(crossing, pulls, strict=True))
    if together:
        cut = joined([r.cut for _, r, _, _ in together])
        norms = cut.norms(torch.cat([r.x.abs() for _, r, _, _ in together]))
        of_each = norms.split([r.cut.count for _, r, _, _ in together])
        for (penalty, r, crossing, grads), own in zip(together, of_each, strict=True):
            parts = zip(crossing, r.parted(penalty._grad(r, own.to(r.x.real.dtype))), strict=True)
            grads.update(parts)
    return [[grads[i] for i in range(len(weights))] for (_, weights), grads in zip(rules, found, strict=True)]


def residual_all(penalty: Penalty, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The part that is here of the optimality residual of each weight of a rule; ``grads`` are laid out like them."""
    found = {}
    for i, (p, grad) in enumerate(zip(weights, grads, strict=True)):
        own = of_part(penalty, p)
        if own is not None:
            found[i] = own.optimality_residual(sharding.local(p), sharding.beside(grad, p))
    crossing = [i for i in range(len(weights)) if i not in found]
    chosen = [weights[i] for i in crossing]
    if chosen and adds_up(penalty):
        r = penalty.ready(*_ready(penalty, chosen, map(sharding.local, chosen)))
        assert isinstance(r.cut, Spanning)
        slopes = [arithmetic(sharding.beside(grads[i], weights[i])) for i in crossing]
        found.update(zip(crossing, r.cut.parted(penalty._residual(r, r.cut.gathered(slopes))), strict=True))
    elif chosen:
        residuals = penalty.residual_all(_all_gathered(chosen), _all_gathered([grads[i] for i in crossing]))
        found.update((i, sharding.layout(weights[i]).part(r)) for i, r in zip(crossing, residuals, strict=True))
    return [found[i] for i in range(len(weights))]


def strengths_max(penalty: Penalty, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The `Penalty.strength_max` of the weights of a rule, the largest of which is that of all, in all processes."""
    found, layouts, crossing = [], [], []
    for p, grad in zip(weights, grads, strict=True):
        own = of_part(penalty, p)
        if own is None:
            crossing.append((p, grad))
        else:
            found.append(own.strength_max(sharding.beside(grad, p)))
            layouts.append(sharding.layout(p))
    if crossing and adds_up(penalty):
        chosen = [p for p, _ in crossing]
        unit = penalty._unit()
        r = unit.ready(*_ready(penalty, chosen, [sharding.beside(grad, p) for p, grad in crossing]))
        factors = unit._factors(r)
        if r.cut.loose and _is_zero(r.l1):
            factors = factors[:-1]  # no strength makes them zero
        found.append(factors.max() if factors.numel() else r.x.real.new_zeros(()))
        layouts.append(sharding.WHOLE)
    elif crossing:
        found += penalty.strengths_max(_all_gathered([grad for _, grad in crossing]))
        layouts += [sharding.WHOLE] * (len(found) - len(layouts))
    return sharding.largest(found, layouts)


def zeroing_scales(penalty: Grouped, weights: Sequence[Tensor], parts: Any, steps: Sequence[Step]) -> list[Tensor]:
    """`Grouped.zeroing_scales` of the parts."""
    found = {}
    for i, (p, part, step) in enumerate(zip(weights, parts, steps, strict=True)):
        own = of_part(penalty, p)
        if own is not None:
            assert isinstance(own, Grouped)
            found[i] = own.zeroing_scales([part], [step])[0] if part.numel() else part.new_zeros(part.shape)
    crossing = [i for i in range(len(weights)) if i not in found]
    if crossing:
        r = penalty.ready(*_ready(penalty, [weights[i] for i in crossing], [parts[i] for i in crossing]))
        assert isinstance(r.cut, Spanning)
        r = dataclasses.replace(r, x=r.cut.gathered([over_step(parts[i], steps[i]) for i in crossing]))
        found.update(zip(crossing, r.parted(penalty.zeroing(r)), strict=True))
    return [found[i] for i in range(len(weights))]


def group_scales(penalty: Grouped, weights: Sequence[Tensor], parts: Any, steps: Sequence[Step]) -> Tensor:
    """`Grouped.group_scales` of whole weights, in all processes, from their parts."""
    r = penalty.ready(*_ready(penalty, weights, parts))
    scaled = [over_step(part, step) for part, step in zip(parts, steps, strict=True)]
    return penalty.group_zeroing(dataclasses.replace(r, x=r.gathered(scaled)))


def alive_groups(penalty: Grouped, weights: Sequence[Tensor]) -> Tensor:
    """`Grouped.alive_groups` of whole weights, in all processes."""
    if not sharding.any_sharded(weights):
        return penalty.alive_groups(weights)
    parts = [sharding.local(w) for w in weights]
    return _ready(penalty, weights, parts)[1].alive(parts)


def _shrink(rules: Sequence[tuple[Shrinking, list[int]]]) -> None:
    """Group penalties that span processes: those with one step for all weights together, and those in a metric."""
    alike: list[tuple[Shrinking, list[int]]] = []
    metric: list[tuple[Shrinking, list[int]]] = []
    for rule, crossing in rules:
        steps = [rule.steps[i] for i in crossing]
        one = all(s is steps[0] or (isinstance(s, float) and s == steps[0]) for s in steps)
        one = one and (not isinstance(steps[0], Tensor) or steps[0].ndim == 0)
        if not (one and _is_zero(steps[0])):
            (alike if one else metric).append((rule, crossing))
    if alike:
        _shrink_alike(alike)
    if metric:
        _shrink_in_metric(metric)


def _shrink_alike(rules: Sequence[tuple[Shrinking, list[int]]]) -> None:
    moduli, cuts, thresholds, divisors, softened = [], [], [], [], []
    for rule, crossing in rules:
        r, _ = _prepared(rule, crossing)
        step = checked_step(rule.steps[crossing[0]], r.x)
        y = r.x if _is_zero(r.l1) else soft_threshold(r.x, r.l1 * step)
        ones = y.real.new_ones(r.cut.count)
        softened.append(y)
        moduli.append(y.abs())
        cuts.append(r.cut)
        thresholds.append(ones * r.group * step)
        divisors.append(ones * (1 + 2 * r.l2 * step))
    cut = joined(cuts)
    ratios = remaining(cut.norms(torch.cat(moduli)), torch.cat(thresholds)) / torch.cat(divisors)
    _multiply(rules, softened, cut.spread(ratios))


def _shrink_in_metric(rules: Sequence[tuple[Shrinking, list[int]]]) -> None:
    moduli, pulls, cuts, divisors, softened = [], [], [], [], []
    for rule, crossing in rules:
        r, cut = _prepared(rule, crossing)
        tau = cut.gathered([_of_each(rule.steps[i], rule.parts[i]) for i in crossing])
        y = r.x if _is_zero(r.l1) else soft_threshold(r.x, r.l1 * tau)
        divisor = 1 + 2 * r.l2 * tau
        group = cut.spread(r.group) if isinstance(r.group, Tensor) and r.group.ndim else r.group
        softened.append(y)
        moduli.append(y.abs() / divisor)
        pulls.append(tau * group / divisor)
        cuts.append(cut)
        divisors.append(divisor)
    ratios = secular.ratios(joined(cuts), torch.cat(moduli), torch.cat(pulls)) / torch.cat(divisors)
    _multiply(rules, softened, ratios)


def _multiply(rules: Sequence[tuple[Shrinking, list[int]]], softened: Sequence[Tensor], ratios: Tensor) -> None:
    """Overwrite the parts by what is left of the softened weights."""
    for (rule, crossing), y, ratio in zip(rules, softened, ratios.split([y.numel() for y in softened]), strict=True):
        new = torch.complex(y.real * ratio, y.imag * ratio) if y.is_complex() else y * ratio
        at = 0
        for i in crossing:
            part = rule.parts[i]
            piece = new[at : at + part.numel()].view(part.shape) + 0
            part.copy_(piece if part.is_complex() or not piece.is_complex() else piece.real)
            at += part.numel()


def _prepared(rule: Shrinking, crossing: Sequence[int]) -> tuple[Any, Spanning]:
    assert isinstance(rule.penalty, Grouped)
    x, cut = _ready(rule.penalty, [rule.weights[i] for i in crossing], [rule.parts[i] for i in crossing])
    return rule.penalty.ready(x, cut), cut


def _ready(penalty: Grouped, weights: Sequence[Tensor], parts: Any) -> tuple[Tensor, Spanning]:
    """The parts as one vector, and their groups, which are kept as long as the weights."""
    entries = _known.setdefault(weights[0], [])
    layouts = [sharding.layout(w) for w in weights]
    key = (penalty.groups, *map(id, weights))
    for known, where, found in entries:
        if isinstance(known, tuple) and known == key and all(a is b for a, b in zip(where, layouts, strict=True)):
            return found.gathered([arithmetic(part) for part in parts]), found
    assert isinstance(penalty.groups, Groups)
    cut = spanning(penalty.groups, weights)
    entries[:] = [*entries[-7:], (key, layouts, cut)]
    return cut.gathered([arithmetic(part) for part in parts]), cut


def _value(penalty: Penalty, weights: Sequence[Tensor]) -> Tensor:
    assert isinstance(penalty, Grouped)
    r = penalty.ready(*_ready(penalty, weights, map(sharding.local, weights)))
    m = r.x.abs()
    squares, moduli = r.cut.sums_of(m * m, m)
    return (r.group * squares.sqrt()).sum() + r.l1 * moduli.sum() + r.l2 * squares.sum()


def _added(values: Sequence[Tensor], layouts: Sequence[sharding.Layout]) -> list[Tensor]:
    """The sums of values of the same layout."""
    totals: dict[sharding.Layout, Tensor] = {}
    for value, where in zip(values, layouts, strict=True):
        known = totals.get(where)
        totals[where] = value if known is None else known + value.to(known.device)
    return list(totals.values())


def _all_gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [sharding.whole(t) for t in tensors]


def _gathered(part: Any, p: Tensor) -> Any:
    """All of what is laid out like ``p``; one number as it is. A new tensor."""
    if not isinstance(part, Tensor) or (part.ndim == 0 and p.ndim):
        return part
    return sharding.whole(sharding.sharded_like(part, p)) if sharding.is_sharded(p) else part.clone()


def _of_each(step: Step, part: Tensor) -> Tensor:
    return torch.as_tensor(step, dtype=part.real.dtype, device=part.device).expand(part.shape)
