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
from torchreg.coupling.values import Coupling, Member


@dataclass
class _Reader:
    """A linear layer or convolution that reads channels, and the range of values that each of its inputs took."""

    name: str
    module: Any
    member: Member
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def dim(self) -> int:
        """The dimension of the channels in its input, from the end."""
        return -1 if isinstance(self.module, nn.Linear) else -len(self.module.kernel_size) - 1

    def see(self, x: Tensor) -> None:
        """Widen the ranges to the values of an input."""
        flat = x.detach().movedim(self.dim, 0).flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def holds(self) -> Tensor:
        """Which of its inputs it can do without: constants that a bias can stand for, and zeros."""
        assert self.low is not None
        assert self.high is not None
        constant = (self.high - self.low).abs() <= 1e-12 * self.high.abs()
        return constant & (self.high == 0) if _zero_padded(self.module) else constant


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
    for coupling in couplings:
        tensors = dict(result.model.named_parameters())
        weights = [member for member in coupling.makers if tensors[member.name].ndim > 1]
        candidates = coupling.zero_channels(tensors, weights) & ~coupling.zero_channels(tensors, coupling.users)
        if not bool(candidates.any()) or _readers(result.model, coupling) is None:
            continue
        seen = _seen(result.model, coupling, inputs)
        for reader in seen or ():
            alike = reader.holds().cpu()
            labels = reader.member.labels
            candidates[labels[(labels >= 0) & ~alike]] = False
        if seen and bool(candidates.any()):
            if result.model is model:
                result.model = copy.deepcopy(model)
            for reader in seen:
                layer: Any = result.model.get_submodule(reader.name)
                had_bias = layer.bias is not None
                result.rounded |= _fold(layer, reader, candidates)
                if layer.bias is not None and not had_bias:
                    result.couplings = [_with_bias(c, reader.name) for c in result.couplings]
    return result


def _with_bias(coupling: Coupling, layer: str) -> Coupling:
    """The coupling with a layer's new bias among what makes it, if the layer does."""
    rows = [m for m in coupling.makers if m.name == (f"{layer}.weight" if layer else "weight") and m.dim == 0]
    biases = tuple(Member(m.name.removesuffix("weight") + "bias", 0, m.labels) for m in rows)
    return dataclasses.replace(coupling, makers=coupling.makers + biases) if biases else coupling


def _readers(model: nn.Module, coupling: Coupling) -> list[_Reader] | None:
    """The layers that read the channels of a coupling; None if others than plain ones do."""
    names = dict(model.named_modules())
    holders: dict[int, list[str]] = {}
    for name, owner in names.items():
        for p in owner._parameters.values():
            holders.setdefault(id(p), []).append(name)
    parameters = dict(model.named_parameters())
    readers = []
    for member in coupling.users:
        holding = holders.get(id(parameters[member.name]), [])
        if len(holding) != 1 or member.name.rpartition(".")[2] != "weight":
            return None
        module: Any = names[holding[0]]
        plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and getattr(module, "groups", 1) == 1
        if not plain or member.dim != 1:
            return None
        readers.append(_Reader(holding[0], module, member))
    return readers


def _seen(model: nn.Module, coupling: Coupling, inputs: Sequence[Example]) -> list[_Reader] | None:
    """The layers that read a coupling's channels, with what they read; None if one does so unseen."""
    for precision in (torch.float64, None):
        twin = copy.deepcopy(model).eval()
        readers = _readers(twin, coupling) or []
        for reader in readers:
            reader.module.register_forward_pre_hook(lambda _, args, reader=reader: reader.see(args[0]))
        try:
            _run(twin, inputs, precision)
        except Exception:  # a type that is written into the model's code
            if precision is None:
                raise
            continue
        return None if any(reader.low is None for reader in readers) else readers
    return None


def _run(model: nn.Module, inputs: Iterable[Example], precision: torch.dtype | None) -> None:
    if precision is not None:
        model.to(precision)
    for given in inputs:
        cast = given.map(lambda t: t.to(precision) if precision is not None and t.is_floating_point() else t)
        with undisturbed(cast), torch.no_grad():
            torch.manual_seed(0)
            cast.call(model)


@torch.no_grad()
def _fold(module: Any, reader: _Reader, channels: Tensor) -> bool:
    """Move what a layer makes of constants into its bias; whether there was anything but zeros."""
    assert reader.high is not None
    index = reader.member.slices(channels).to(module.weight.device)
    columns, values = module.weight.index_select(1, index).double(), reader.high[index].double()
    module.weight.index_fill_(1, index, 0)
    if not bool((values != 0).any()):
        return False
    added = (columns.flatten(2).sum(2) if columns.ndim > 2 else columns) @ values
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(added, dtype=module.weight.dtype), module.weight.requires_grad)
    module.bias.copy_(module.bias.double() + added)
    return True


def _zero_padded(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or any(module.padding) if module.padding != "valid" else False
