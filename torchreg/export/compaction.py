"""A smaller model from one with zeros: channels, heads and inputs that do nothing are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchreg import unsettled
from torchreg.assignments import unwrapped
from torchreg.compacted.attention import ATTENTIONS
from torchreg.compacted.selection import SelectedLinear
from torchreg.coupling import coupled_groups
from torchreg.coupling.heads import Attention, declared
from torchreg.coupling.probe import Probe
from torchreg.coupling.stand_ins import Example, private_copy, undisturbed
from torchreg.coupling.values import Coupling, Couplings, LeftAlone
from torchreg.export import equality
from torchreg.export.compact_report import CompactReport, Shrunk
from torchreg.export.constants import Folded, fold_constants
from torchreg.export.equality import Reference
from torchreg.export.removable import removable
from torchreg.export.surgery import without

Cut = tuple[Coupling, Tensor]


@dataclass(frozen=True)
class Compacted:
    """A smaller model, and what was done; see `compact`."""

    model: nn.Module
    report: CompactReport


def compact(
    model: nn.Module,
    example_input: Any,
    *,
    ignore: Sequence[str] = (),
    heads: Mapping[str, Attention] | None = None,
    fold: bool = True,
    select_inputs: bool = True,
    seconds: float = 1.0,
) -> Compacted:
    """Remove the channels, units and attention heads of a model that are zero or unused: same outputs, less work.

    A channel goes, from every tensor that holds it, if what makes it is exactly zero (its weight row and bias; or the
    scale and shift of the norm behind it, whatever the row holds), or if all that reads it is; see
    `torchreg.coupled_groups` for what hangs together. A channel whose weights are zero, but not its bias or its norm's
    shift, is a constant: it goes, too, where it is zero behind its activation, or where biases of the layers that read
    it can stand for it, which those of convolutions with zero padding can't. One channel of each layer stays.

    A linear layer with many zero columns for inputs that others need (those of the model, for one) gets to read only
    the others (`torchreg.export.SelectedLinear`); `nn.MultiheadAttention` that loses heads becomes a
    `torchreg.export.CompactAttention`.

    What can't be removed exactly is left alone and named in the report: channels that a layer norm, a softmax or a mean
    runs over; single channels of a convolution's group or of a group norm, which lose whole groups only; heads of an
    attention module that is not described.

    Both models are compared before anything is returned: on the example and on random inputs of its shape and range,
    in eval mode and, where the model can be run so, in float64. The model itself is not changed.

    Args:
        model: any module, on one device.
        example_input: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        ignore: globs on the names of layers, or of modules that hold some, whose out-channels shall stay.
        heads: how attention modules other than `nn.MultiheadAttention` name their parts, by globs on their names.
        fold: whether the biases of next layers may take the part of channels that are constants.
        select_inputs: whether linear layers may leave out zero columns of inputs that stay.
        seconds: how long to measure the latency of both models, about; 0 measures none.

    Returns:
        The smaller model, in the mode of the one given and without gradients, and a report.

    Raises:
        ImportError: if torch-pruning is missing.
        TypeError: if an argument is not what it should be.
        ValueError: if the model can't be traced, or the outputs would differ: the message names the coupling to blame.

    >>> import torch
    >>> from torchreg.export import compact
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> with torch.no_grad():
    ...     model[0].weight[2:], model[0].bias[2:] = 0, 0
    >>> small, report = (result := compact(model, torch.randn(3, 4), seconds=0)).model, result.report
    >>> small[0].weight.shape, report.parameters, report.flops
    (torch.Size([2, 4]), (58, 16), (288, 72))

    Reference:
        G. Fang, X. Ma, M. Song, M. Bi Mi, X. Wang (CVPR, 2023), DepGraph: Towards Any Structural Pruning.
    """
    if not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"Expected `seconds` to be a number of at least 0, got {seconds!r}.")
    couplings = coupled_groups(model, example_input, ignore, heads)
    model, example = unwrapped(model), Example.of(example_input)
    unsettled.settle(model.parameters())
    described = declared(model, heads)
    usable, left = usable_couplings(model, couplings, described)
    reference = Reference(model, example)
    folded = fold_constants(model, usable, reference.inputs) if fold else Folded(model, usable)
    usable = folded.couplings
    with undisturbed(example):
        gone = removable(folded.model, usable, Probe(private_copy(folded.model), example))
    cuts = [(coupling, dead) for coupling, dead in zip(usable, gone, strict=True) if bool(dead.any())]
    small, error, refused = _cut(model, folded, cuts, described, reference, select_inputs)
    left += refused.values()
    tensors = dict(folded.model.named_parameters())
    sizes = [
        Shrunk(c.name, c.count, c.count - int(dead.sum()), _layers(c), _constant(c, dead, tensors))
        for c, dead in zip(usable, gone, strict=True)
        if id(c) not in refused
    ]
    timed = equality.latencies((model, small), example, seconds) if seconds else None
    report = CompactReport(
        parameters=(equality.parameters(model), equality.parameters(small)),
        flops=(equality.flops(model, example), equality.flops(small, example)),
        latency=timed,
        error=error,
        checked_in=str(reference.dtype).removeprefix("torch."),
        couplings=tuple(sizes),
        inputs=tuple(
            Shrunk(name, m.in_features, len(m.inputs), (name,))
            for name, m in small.named_modules()
            if isinstance(m, SelectedLinear) and not isinstance(model.get_submodule(name), SelectedLinear)
        ),
        left_alone=tuple(left),
    )
    return Compacted(small, report)


def usable_couplings(
    model: nn.Module, couplings: Couplings, described: Mapping[str, Attention]
) -> tuple[list[Coupling], list[LeftAlone]]:
    """Couplings that surgery can cut, and those that it can't."""
    fixed = {
        name: "is a subclass" if type(m) is not nn.MultiheadAttention else "has `bias_k` or `add_zero_attn`"
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention)
        and (type(m) is not nn.MultiheadAttention or m.bias_k is not None or m.add_zero_attn)
    }
    usable, left = [], list(couplings.left_alone)
    for coupling in couplings:
        owners = {part for m in coupling.members for part in _ancestors(m.name)}
        blocked = sorted(owners & set(fixed))
        module = model.get_submodule(coupling.name) if coupling.heads and not _is_tensor(model, coupling.name) else None
        if blocked:
            left.append(LeftAlone(coupling.name, coupling.count, f"the attention {blocked[0]!r} {fixed[blocked[0]]}"))
        elif coupling.heads and coupling.name not in described and not isinstance(module, ATTENTIONS):
            reason = "they look like attention heads: describe the module in `heads`"
            left.append(LeftAlone(coupling.name, coupling.count, reason))
        else:
            usable.append(coupling)
    return usable, left


def _how(error: float, model: nn.Module) -> str:
    """How outputs change that are so far off."""
    if math.isfinite(error):
        return f" by {error:.1e} of the largest"
    tensors = (*model.named_parameters(), *model.named_buffers())
    broken = next((name for name, t in tensors if not bool(t.isfinite().all())), None)
    return "" if broken is None else f": {broken!r} holds NaN or infinite numbers, which zero times is NaN"


def _cut(
    model: nn.Module,
    folded: Folded,
    cuts: Sequence[Cut],
    described: Mapping[str, Attention],
    reference: Reference,
    select: bool,
) -> tuple[nn.Module, float, dict[int, LeftAlone]]:
    """The smaller model, how far its outputs are off, and couplings (by id) that its own code does not let go."""
    tolerance = equality.TOLERANCES.get(reference.dtype, 1e-4)
    if folded.rounded:
        types = {p.dtype for p in folded.model.parameters() if p.is_floating_point()}
        tolerance = max(tolerance, *(equality.FOLDED.get(dtype, 1e-5) for dtype in types))

    def attempt(some: Sequence[Cut], selecting: bool) -> tuple[nn.Module, float]:
        small = without(folded.model, some, described, selecting)
        return small, reference.difference(small)

    try:
        small, error = attempt(cuts, select)
        if error <= tolerance:
            return small, error, {}
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        pass  # whose fault it is comes out below
    kept: list[Cut] = []
    refused: dict[int, LeftAlone] = {}
    for cut in cuts:
        try:
            _, error = attempt([*kept, cut], selecting=False)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as fault:
            reason = f"the model's code fails without them: {type(fault).__name__}: {str(fault).splitlines()[0]}"
            refused[id(cut[0])] = LeftAlone(cut[0].name, cut[0].count, reason)
            continue
        if not error <= tolerance:
            raise ValueError(
                f"Removing {int(cut[1].sum())} of the {cut[0].count} channels of {cut[0].name!r} would change the "
                f"outputs{_how(error, model)}. Leave them alone with ignore=[{cut[0].name!r}]."
            )
        kept.append(cut)
    try:
        small, error = attempt(kept, select)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        error = float("inf")
    if not error <= tolerance:
        small, error = attempt(kept, selecting=False)
    return small, error, refused


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _is_tensor(model: nn.Module, name: str) -> bool:
    return name in {n for n, _ in model.named_parameters()}


def _constant(coupling: Coupling, gone: Tensor, tensors: Mapping[str, Tensor]) -> int:
    """How many channels that stay have no weights, only biases or shifts."""
    weights = [member for member in coupling.makers if tensors[member.name].ndim > 1]
    zero = coupling.zero_channels(tensors, coupling.makers)  # the one that a dead layer keeps
    return int((coupling.zero_channels(tensors, weights) & ~zero & ~gone).sum())


def _layers(coupling: Coupling) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member.name.rpartition(".")[0] for member in coupling.members))
