"""Which channels of a model can only be removed together: rows, norms and columns that hang together."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.assignments import unwrapped
from torchreg.coupling import heads as attention_heads
from torchreg.coupling.components import Assembly, Found, found
from torchreg.coupling.heads import Attention
from torchreg.coupling.probe import Probe
from torchreg.coupling.stand_ins import Example, private_copy, traceable, undisturbed
from torchreg.coupling.tracing import trace
from torchreg.coupling.values import Coupling, Couplings, LeftAlone
from torchreg.groups import Member

__all__ = ["Attention", "Coupling", "Couplings", "LeftAlone", "Member", "coupled_groups"]

_DECLARED = "heads are described"


def coupled_groups(
    model: nn.Module,
    example_input: Any,
    ignore: Sequence[str] = (),
    heads: Mapping[str, Attention] | None = None,
) -> Couplings:
    """Find the channels of a model that can only be removed together, and all tensors that hold them.

    An out-channel of a convolution can go only with its batch-norm scale and shift and with the in-channel of the next
    layer; the channels of a residual stream only from every layer that writes or reads it. So a penalty whose zeros
    shall make the model smaller has to take all of them as one group. torch-pruning's dependency graph says how layers
    hang together. Then each coupling is put to the test on a copy of the model with random weights: with zero users the
    makers must not matter, and with zero makers the users must not. What fails is left alone, with the reason, such as
    the channels that a layer norm averages over.

    The model is copied; its mode, buffers, gradients and hooks and the state of random number generators stay as they
    are.

    Args:
        model: any module, on one device.
        example_input: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        ignore: globs on the names of layers, or of modules that hold some, whose out-channels shall not be removed.
        heads: for attention modules other than `torch.nn.MultiheadAttention`, how they name their parts, by globs on
            the modules' names.

    Returns:
        A sequence of `Coupling`; ``print()`` shows it, its ``left_alone`` says what can't be removed.

    Raises:
        ImportError: if torch-pruning is missing.
        TypeError: if an argument is not what it should be.
        ValueError: if the model can't be copied, run or traced, or a name matches nothing.

    >>> import torch, torchreg
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    ...     torch.nn.Flatten(), torch.nn.Linear(288, 2),
    ... )
    >>> couplings = torchreg.coupled_groups(model, torch.randn(1, 3, 8, 8))
    >>> print(couplings)
    coupling   channels   made by                              used by
    ───────────────────────────────────────────────────────────────────
    0          8          0.weight, 0.bias, 1.weight, 1.bias   4.weight
    <BLANKLINE>
    left alone   channels   because
    ──────────────────────────────────────────────
    4            2          the model returns them
    >>> couplings["0"].users[0].labels[30:42]  # a channel is 36 columns of the linear layer
    tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])

    Reference:
        G. Fang, X. Ma, M. Song, M. Bi Mi, X. Wang (CVPR, 2023), DepGraph: Towards Any Structural Pruning.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be an nn.Module, got {type(model).__name__}.")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("The model has parameters that are not initialised yet: run one forward pass first.")
    model = unwrapped(model)
    example = Example.of(example_input)
    refused = _refused(model, ignore)
    described = attention_heads.declared(model, heads)
    for name, attention in described.items():
        layers, _ = attention_heads.parts(name, attention)
        refused |= dict.fromkeys(layers, _DECLARED)
    with undisturbed(example), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = traceable(model)
        assembly = Assembly(trace(copy, example), copy, model, refused)
        del copy
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        candidates = [f for f in found(assembly.components(), tensors) if f.refusal != _DECLARED]
        candidates += [Found(c, refused.get(c.name, "")) for c in attention_heads.couplings(model, described)]
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        candidates.sort(key=lambda f: order.get(f.coupling.name, len(order)))
        return _proved(candidates, Probe(private_copy(model), example))


def _refused(model: nn.Module, ignore: Sequence[str]) -> dict[str, str]:
    if isinstance(ignore, str) or not all(isinstance(glob, str) for glob in ignore):
        raise TypeError(f"Expected `ignore` to be a list of names of layers, got {ignore!r}.")
    modules = dict(model.named_modules())
    names = [*modules, *(name for name, _ in model.named_parameters())]
    refused: dict[str, str] = {}
    for glob in ignore:
        matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(f"The name {glob!r} in `ignore` matches none of {len(modules)} modules.")
        containers = tuple(f"{name}." for name in matched if name in modules and not modules[name]._parameters)
        matched += [name for name in names if name.startswith(containers)]
        refused |= dict.fromkeys(matched, f"{glob!r} is ignored")
    return refused


def _proved(candidates: Sequence[Found], probe: Probe) -> Couplings:
    proved: list[Coupling] = []
    left: list[LeftAlone] = []
    for candidate in candidates:
        coupling, reason = candidate.coupling, candidate.refusal
        if not reason and coupling.count == 1:
            reason = "there is only one"
        if not reason and not coupling.users:
            reason = "nothing uses them"
        if not reason:
            coupling, reason = _tested(coupling, probe)
        if reason:
            left.append(LeftAlone(coupling.name, coupling.count, reason))
        else:
            proved.append(coupling)
    return Couplings(tuple(proved), tuple(left))


def _tested(coupling: Coupling, probe: Probe) -> tuple[Coupling, str]:
    """The coupling with what the tests say of it, and why it is to be left alone, if it is."""
    if not probe.works():
        return coupling, "the outputs are not finite for random weights, so nothing can be proved"
    if not probe.matters(coupling, _half(coupling.count)):
        return coupling, "they have no influence on the output for this example"
    for candidate in (coupling, *_in_blocks(coupling)):
        some = _half(candidate.count)
        if probe.unused_without_users(candidate, some):
            return dataclasses.replace(candidate, vanishes=probe.zero_without_makers(candidate, some)), ""
    return coupling, "one affects the others even where nothing uses it (a normalisation or mean over them?)"


def _in_blocks(coupling: Coupling) -> Iterator[Coupling]:
    """The same channels in blocks of neighbours, small ones first: such are attention heads."""
    for size in range(2, coupling.count // 2 + 1):
        if coupling.count % size == 0:
            makers, users, others = (
                tuple(Member(m.name, m.dim, torch.where(m.labels < 0, m.labels, m.labels // size)) for m in held)
                for held in (coupling.makers, coupling.users, coupling.others)
            )
            yield Coupling(coupling.name, coupling.count // size, makers, users, others, heads=True)


def _half(count: int) -> Tensor:
    some = torch.zeros(count, dtype=torch.bool)
    some[torch.randperm(count, generator=torch.Generator().manual_seed(count))[: (count + 1) // 2]] = True
    return some
