"""Values and gradients of penalties over many weights: what the loss term and the optimizer hook compute.

Large sets of plain weights are passed over once, by compiled kernels; the penalty's own ``value`` and ``grad``, tensor
after tensor, are the specification and do all the rest. The choice between them is made here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchreg.kernels import native_penalty, pages, selection, triton_penalty
from torchreg.kernels.likeness import Likeness
from torchreg.kernels.penalty_table import PenaltyTable
from torchreg.penalties import Penalty
from torchreg.penalties.base import arithmetic, host_scalar
from torchreg.penalties.separable import _Shrinkage, is_shrinkage
from torchreg.penalties.tiles import is_dense

Numbers = tuple[float, float]
"""The strengths (l1, l2) of a penalty that kernels know."""

_PLAIN = frozenset((Tensor, nn.Parameter))

Fused = dict[tuple[torch.device, torch.dtype], list[int]]
"""For each device and dtype, the positions of the weights that one pass takes."""


Signs = list[Tensor | None]
"""The signs of weights: for every device and dtype those that one pass takes, or None where they are not noted."""


class PenaltySum:
    """Σ R(w) over many weights: its value, and its gradients at all of them.

    Args:
        penalties: R of every weight.
        weights: the weights w. What is found out about them is kept, they are not.
    """

    def __init__(self, penalties: Sequence[Penalty], weights: Sequence[Tensor]) -> None:
        self._penalties = tuple(penalties)
        self._distinct = _distinct(penalties)
        self._numbers = _by_id(self._distinct)
        numbers = [self._numbers[id(penalty)] for penalty in penalties]
        self._fused, self._alone = _arranged(numbers, weights)
        self._tables = [
            PenaltyTable.of([weights[i] for i in chosen], _strengths(numbers, chosen))
            for chosen in self._fused.values()
        ]
        self._likeness = Likeness([weights[i] for chosen in self._fused.values() for i in chosen])
        self._grads = [Likeness([]) for _ in self._tables]  # of the gradients that each table's weights had
        self._room: list[Signs] = []

    def holds(self, penalties: Sequence[Penalty], weights: Sequence[Tensor]) -> bool:
        """Whether it is what a new one of these would be. (False where kernels don't take all weights.)"""
        return (
            not _is_traced()
            and not self._alone
            and len(penalties) == len(self._penalties)
            and all(map(operator.is_, penalties, self._penalties))
            and _by_id(self._distinct) == self._numbers
            and all(_has_kernel(*kind) for kind in self._fused)
            and self._is_of(weights)
        )

    def room(self) -> Signs:
        """Memory for what `value` may note of the weights, so that `gradients` need not read them again."""
        try:
            return self._room.pop()
        except IndexError:
            return [native_penalty.room(table) for table in self._tables]

    def give_back(self, signs: Signs) -> None:
        """Lend this memory to the next who asks for room: new memory takes long, page after page."""
        self._room[:] = [signs]

    def value(self, weights: Sequence[Tensor], signs: Signs | None = None) -> Tensor:
        """Σ R(w), a real 0-d tensor on the device of the first weight."""
        values = [self._penalties[i].value(weights[i]) for i in self._alone]
        for table, noted in self._noted_in(signs):
            if table.device.type == "cpu":
                values.append(torch.tensor(native_penalty.value(table, noted), dtype=table.dtype, device=table.device))
            else:
                values.append(triton_penalty.value(table))
        total = values[0].to(device=weights[0].device)
        for value in values[1:]:
            total = total + value.to(device=total.device)
        return total

    def gradients(
        self,
        weights: Sequence[Tensor],
        factor: float | Tensor,
        into: Sequence[Tensor | None],
        signs: Signs | None = None,
    ) -> list[Tensor | None]:
        """``factor·∇R(w)`` for every weight. Differentiable where autograd records.

        Args:
            weights: the weights w, with the values that they had.
            factor: a number, or a tensor with one.
            into: for every weight a tensor on the CPU that its gradient may be added to in place, or None. Where one
                pass over memory does so, the result is None.
            signs: what `value` has noted.
        """
        fused = self._fused if self._still_holds(weights, factor) else {}
        results: list[Tensor | None] = [None] * len(weights)
        for i in self._alone if fused else range(len(weights)):
            results[i] = _gradient(self._penalties[i], weights[i], factor).to(weights[i].dtype)
        for k, (chosen, (table, noted)) in enumerate(zip(fused.values(), self._noted_in(signs), strict=bool(fused))):
            here = [weights[i] for i in chosen]
            sums = self._those_like(k, [into[i] for i in chosen], here)
            outs = [t if t is not None else pages.advised(torch.empty_like(w)) for t, w in zip(sums, here, strict=True)]
            _write(table.writing(sums, outs), factor, noted)
            for i, t, out in zip(chosen, sums, outs, strict=True):
                if t is None:
                    results[i] = out
            torch.autograd.graph.increment_version([t for t in sums if t is not None])
        return results

    @torch.no_grad()
    def added(self, weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
        """``grad + factor·∇R(w)`` for every weight, as new tensors; half-precision ones are added in float32.

        The weights must be those it was made with, or of which it ``holds``.

        Raises:
            RuntimeError: if a gradient is not of its weight's shape.
        """
        results: dict[int, Tensor] = {}
        apart = list(self._alone)
        for k, (chosen, table) in enumerate(zip(self._fused.values(), self._tables, strict=True)):
            here, theirs = [weights[i] for i in chosen], [grads[i] for i in chosen]
            likes = self._those_like(k, theirs, here)
            if any(t is None and _kind(g) != _kind(w) for t, g, w in zip(likes, theirs, here, strict=True)):
                apart += chosen
                continue
            outs = [pages.advised(torch.empty_like(w)) for w in here]
            ordered = [out.copy_(g) if t is None else t for t, g, out in zip(likes, theirs, outs, strict=True)]
            _write(table.writing(ordered, outs), factor)
            results.update(zip(chosen, outs, strict=True))
        for i in apart:
            results[i] = _gradient(self._penalties[i], weights[i], factor).add_(grads[i]).to(grads[i].dtype)
        return [results[i] for i in range(len(weights))]

    def _noted_in(self, signs: Signs | None) -> list[tuple[PenaltyTable, Tensor | None]]:
        return list(zip(self._tables, signs or [None] * len(self._tables), strict=True))

    def _still_holds(self, weights: Sequence[Tensor], factor: float | Tensor) -> bool:
        """Whether the weights that one pass takes are where they were, and nothing records what is done to them."""
        if not self._fused:
            return True
        if _is_traced() or (torch.is_grad_enabled() and _recorded([*weights, factor])):
            return False
        return self._is_of(weights)

    def _is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights that one pass takes lie where they were, and are what they were."""
        parts = [[weights[i] for i in chosen] for chosen in self._fused.values()]
        together = [w for here in parts for w in here]
        alike = self._likeness.holds(together)
        for here, table in zip(parts, self._tables, strict=True):
            if not table.lies_at(here) or not (alike or (table.fits(here) and all(_are_plain(here)))):
                return False
        if not alike:
            self._likeness = Likeness(together)
        return True

    def _those_like(self, k: int, grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients that lie in memory as the weights of a table do, where a kernel can read both; else None."""
        given = [g for g in grads if g is not None]
        if len(given) == len(weights) and all(map(Tensor.is_contiguous, weights)) and all(map(Tensor.data_ptr, given)):
            if self._grads[k].holds(given):
                return list(given)
            if _are_contiguous(given) and self._tables[k].fits(given):
                self._grads[k] = Likeness(given)
                return list(given)
        pairs = zip(grads, weights, strict=True)
        return [g if g is not None and _is_plain(w) and _is_like(g, w) else None for g, w in pairs]


def shrinkage(penalty: Penalty | None, step: float | Tensor) -> tuple[float, float] | None:
    """The (threshold, divisor) of a penalty whose prox is a shrinkage by plain numbers, else None."""
    if not is_shrinkage(penalty) or isinstance(step, Tensor):
        return None
    assert isinstance(penalty, _Shrinkage)
    return penalty.shrinkage(step)


def _gradient(penalty: Penalty, w: Tensor, factor: float | Tensor) -> Tensor:
    grad = penalty.grad(arithmetic(w))
    if isinstance(factor, Tensor):
        factor = factor.to(device=grad.device, dtype=grad.real.dtype).reshape(())
    return grad * factor if torch.is_grad_enabled() else grad.mul_(factor)


def _write(table: PenaltyTable, factor: float | Tensor, signs: Tensor | None = None) -> None:
    if table.device.type == "cpu":
        native_penalty.gradient(table, float(factor), signs)
    else:
        triton_penalty.gradient(table, factor)


def _arranged(numbers: Sequence[Numbers | None], weights: Sequence[Tensor]) -> tuple[Fused, list[int]]:
    """Which weights one pass takes, per device and dtype, and which it does not take."""
    if _is_traced() or (torch.is_grad_enabled() and _recorded(weights)):
        return {}, list(range(len(weights)))
    kinds: Fused = {}
    alone = []
    usable = _are_plain(weights)
    for i, w in enumerate(weights):
        if usable[i] and numbers[i] is not None:
            kinds.setdefault((w.device, w.dtype), []).append(i)
        else:
            alone.append(i)
    fused = {kind: chosen for kind, chosen in kinds.items() if _pays(*kind, [weights[i] for i in chosen])}
    if len(fused) != len(kinds):
        alone = sorted(alone + [i for kind, chosen in kinds.items() if kind not in fused for i in chosen])
    return fused, alone


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _pays(device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for these, and on the CPU enough to do for it."""
    if device.type == "cpu" and sum(map(Tensor.numel, weights)) < selection.SMALLEST:
        return False
    return _has_kernel(device, dtype)


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":
        return dtype in native_penalty.DTYPES and native_penalty.unavailable() is None
    return device.type == "cuda" and dtype in triton_penalty.DTYPES and triton_penalty.unavailable() is None


def _recorded(values: Sequence[object]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _are_plain(tensors: Sequence[Tensor]) -> list[bool]:
    """Which a kernel could read: plain dense tensors that have their memory (sharded training gives it back)."""
    if _are_contiguous(tensors) and all(map(Tensor.data_ptr, tensors)):
        return [True] * len(tensors)
    return list(map(_is_plain, tensors))


def _are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors, and contiguous: asked of all together, that takes half the time."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and {t.layout for t in tensors} == {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def _is_plain(w: Tensor) -> bool:
    """One of `_are_plain`, which asks the same of all together."""
    return (
        type(w) in _PLAIN
        and w.layout is torch.strided
        and (w.is_contiguous() or is_dense(w))
        and not w.is_neg()
        and w.data_ptr() != 0
    )


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return t.shape, t.dtype, t.device


def _is_like(grad: Tensor, w: Tensor) -> bool:
    return (
        _is_plain(grad)
        and _kind(grad) == _kind(w)
        and (grad.stride() == w.stride() or (grad.is_contiguous() and w.is_contiguous()))
    )


def _distinct(penalties: Sequence[Penalty]) -> list[Penalty]:
    """Each penalty once: one that many weights share is looked at once."""
    return list({id(penalty): penalty for penalty in penalties}.values())


def _by_id(distinct: Sequence[Penalty]) -> dict[int, Numbers | None]:
    return {id(penalty): _numbers(penalty) for penalty in distinct}


def _numbers(penalty: Penalty) -> Numbers | None:
    """The strengths of a penalty whose value and gradient are those of elastic net by plain numbers, else None."""
    if not isinstance(penalty, _Shrinkage) or not penalty.has_gradient or penalty.is_joint:
        return None
    if type(penalty).value is not _Shrinkage.value or type(penalty).grad is not _Shrinkage.grad:
        return None  # a subclass's own
    if torch.compiler.is_compiling():
        return None
    l1, l2 = (host_scalar(part) for part in penalty.parts())
    return None if isinstance(l1, Tensor) or isinstance(l2, Tensor) else (l1, l2)


def _strengths(numbers: Sequence[Numbers | None], chosen: Sequence[int]) -> list[Numbers]:
    return [pair for i in chosen if (pair := numbers[i]) is not None]
