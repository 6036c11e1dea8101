"""Channels without weights, which bias or shift alone make: constants, that the next layers' biases can hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.coupling.stand_ins import Example, undisturbed
from torchreg.coupling.values import Coupling
from torchreg.groups import Member


@dataclass
class _Reader:
    """A linear layer or convolution, and the range of values that each of its inputs took."""

    module: Any
    low: Tensor | None = None
    high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Widen the ranges to the values of an input."""
        dim = -1 if isinstance(self.module, nn.Linear) else -len(self.module.kernel_size) - 1
        flat = x.detach().movedim(dim, 0).flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def holds(self, asked: Tensor) -> Tensor:
        """Which inputs it can do without: zeros, and constants that a bias can stand for; none if it was not called."""
        if self.low is None or self.high is None:
            return torch.zeros_like(asked)
        constant = (self.high - self.low).abs() <= 1e-12 * self.high.abs()
        return (constant & (self.high == 0) if _zero_padded(self.module) else constant).cpu()


@dataclass
class Folded:
    """A model of the same outputs in which some constants are biases.

    Attributes:
        model: the model, or, where anything was folded, a copy.
        couplings: its channels: those of the model, with the biases that layers without one have got.
        rounded: whether biases have changed, which rounds them.
    """

    model: nn.Module
    couplings: list[Coupling]
    rounded: bool = False


def fold_constants(model: nn.Module, couplings: Sequence[Coupling], inputs: Sequence[Example]) -> Folded:
    """Let biases take the part of channels that don't depend on the input: the columns that read them become zero.

    A channel whose weights are all zero is what its bias or its norm's shift make of it. A linear layer that reads it,
    or a convolution without zero padding, gets the same from a bias: b + W·c. A channel that is zero behind its
    activation need not be read at all.

    Args:
        model: the model, which is not changed.
        couplings: its channels.
        inputs: on which to see what is constant.
    """
    result = Folded(model, list(couplings))
    seen: dict[str, _Reader] | None = None
    for coupling in couplings:
        tensors = dict(result.model.named_parameters())
        weights = [member for member in coupling.makers if tensors[member.name].ndim > 1]
        candidates = coupling.zero_channels(tensors, weights) & ~coupling.zero_channels(tensors, coupling.users)
        readers = _readers(result.model, coupling)
        if not bool(candidates.any()) or not readers:
            continue
        zeros = coupling.zero_channels(tensors, coupling.makers) & coupling.vanishes
        if bool((candidates & ~zeros).any()):
            if seen is None:  # once is enough: what layers read stays the same
                seen = _seen(model, couplings, inputs)
            for member, name in readers:
                alike = seen[name].holds(member.labels >= 0)
                candidates[member.labels[(member.labels >= 0) & ~alike]] = False
        candidates |= zeros
        if not bool(candidates.any()):
            continue
        if result.model is model:
            result.model = copy.deepcopy(model)
        for member, name in readers:
            layer: Any = result.model.get_submodule(name)
            had_bias = layer.bias is not None
            result.rounded |= _fold(layer, member.slices(candidates & ~zeros), seen[name].high if seen else None)
            layer.weight.detach().index_fill_(1, member.slices(candidates).to(layer.weight.device), 0)
            if layer.bias is not None and not had_bias:
                result.couplings = [_with_bias(c, name) for c in result.couplings]
    return result


def _with_bias(coupling: Coupling, layer: str) -> Coupling:
    """The coupling with a layer's new bias among what makes it, if the layer does."""
    rows = [m for m in coupling.makers if m.name == (f"{layer}.weight" if layer else "weight") and m.dim == 0]
    biases = tuple(Member(m.name.removesuffix("weight") + "bias", 0, m.labels) for m in rows)
    return dataclasses.replace(coupling, makers=coupling.makers + biases) if biases else coupling


def _readers(model: nn.Module, coupling: Coupling) -> list[tuple[Member, str]]:
    """The layers that read the channels of a coupling, by name; none if others than plain ones do."""
    names = dict(model.named_modules())
    holders: dict[int, list[str]] = {}
    for name, owner in names.items():
        for p in owner._parameters.values():
            holders.setdefault(id(p), []).append(name)
    parameters = dict(model.named_parameters())
    readers = []
    for member in coupling.users:
        holding = holders.get(id(parameters[member.name]), [])
        if len(holding) != 1 or member.name.rpartition(".")[2] != "weight" or member.dim != 1:
            return []
        module: Any = names[holding[0]]
        if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or getattr(module, "groups", 1) > 1:
            return []
        readers.append((member, holding[0]))
    return readers


def _seen(model: nn.Module, couplings: Sequence[Coupling], inputs: Sequence[Example]) -> dict[str, _Reader]:
    """What the layers read that read channels, in float64 where the model can be run so."""
    names = {name for coupling in couplings for _, name in _readers(model, coupling)}
    for precision in (torch.float64, None):
        twin = copy.deepcopy(model).eval()
        readers = {name: _Reader(twin.get_submodule(name)) for name in names}
        for reader in readers.values():
            reader.module.register_forward_pre_hook(lambda _, args, reader=reader: reader.see(args[0]))
        try:
            _run(twin, inputs, precision)
        except Exception:  # a type that is written into the model's code
            if precision is None:
                raise
            continue
        break
    return readers


def _run(model: nn.Module, inputs: Iterable[Example], precision: torch.dtype | None) -> None:
    if precision is not None:
        model.to(precision)
    for given in inputs:
        cast = given.map(lambda t: t.to(precision) if precision is not None and t.is_floating_point() else t)
        with undisturbed(cast), torch.no_grad():
            torch.manual_seed(0)
            cast.call(model)


@torch.no_grad()
def _fold(module: Any, index: Tensor, values: Tensor | None) -> bool:
    """Add what a layer makes of constants to its bias; whether there was anything but zeros."""
    if values is None or not len(index):
        return False
    index = index.to(module.weight.device)
    columns, constants = module.weight.index_select(1, index).double(), values[index].double()
    if not bool((constants != 0).any()):
        return False
    added = (columns.flatten(2).sum(2) if columns.ndim > 2 else columns) @ constants
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(added, dtype=module.weight.dtype), module.weight.requires_grad)
    module.bias.copy_(module.bias.double() + added)
    return True


def _zero_padded(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or any(module.padding) if module.padding != "valid" else False
