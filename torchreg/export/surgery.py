"""Cutting channels out of a model's tensors, and telling its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.compacted.attention import ATTENTIONS, CompactAttention
from torchreg.compacted.selection import SelectedLinear, pays, unread
from torchreg.coupling.heads import Attention
from torchreg.coupling.values import Coupling

Cuts = Sequence[tuple[Coupling, Tensor]]
"""Couplings and which of their channels are to go: bool vectors."""


def without(model: nn.Module, cuts: Cuts, described: Mapping[str, Attention], select: bool) -> nn.Module:
    """A copy of a model without some channels. Tied weights stay tied.

    torch-pruning's functions for single layers are not used: they cut a tied weight once for each of its layers, and
    know neither whole groups of convolutions and norms nor attention with fewer heads.

    Args:
        model: the model, which is not changed.
        cuts: what to remove.
        described: attention modules of the user's own, by name (see `torchreg.coupling.Attention`).
        select: whether linear layers shall leave out further columns that are zero (see `SelectedLinear`).
    """
    small = copy.deepcopy(model)
    sizes = {name: _sizes(module) for name, module in small.named_modules()}
    touched = _cut(small, cuts)
    for name, module in list(small.named_modules()):
        if touched & {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}:
            _resize(module, sizes[name])
    heads = {coupling.name: gone for coupling, gone in cuts if coupling.heads}
    for name, module in list(small.named_modules()):
        if name in described and name in heads:
            setattr(module, described[name].num_heads, int((~heads[name]).sum()))
        elif isinstance(module, ATTENTIONS):
            parts = {id(p) for p in module.parameters()}
            if parts & touched:
                kept = range(module.num_heads) if name not in heads else (~heads[name]).nonzero().flatten().tolist()
                small = replaced(small, module, CompactAttention(module, kept))
    for module in small.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, CompactAttention) for m in module.modules()):
            module.use_nested_tensor = False
    if select:
        small = _select(small)
    for p in small.parameters():
        p.grad = None
    return small


def _cut(model: nn.Module, cuts: Cuts) -> set[int]:
    """Cut all tensors; ids of the new ones."""
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    keep: dict[str, dict[int, Tensor]] = {}
    for coupling, gone in cuts:
        for member in coupling.members:
            size = tensors[member.name].shape[member.dim]
            kept = keep.setdefault(member.name, {}).setdefault(member.dim, torch.ones(size, dtype=torch.bool))
            kept[member.slices(gone)] = False
    new: dict[int, Tensor] = {}
    for name, dims in keep.items():
        old = tensors[name]
        cut = old.detach()
        for dim, kept in dims.items():
            cut = cut.index_select(dim, kept.nonzero().flatten().to(cut.device))
        if cut.shape != old.shape:
            new[id(old)] = nn.Parameter(cut, old.requires_grad) if isinstance(old, nn.Parameter) else cut
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is not None and id(tensor) in new:
                    held[attribute] = new[id(tensor)]  # type: ignore[assignment]
    return {id(tensor) for tensor in new.values()}


def _sizes(module: nn.Module) -> int | None:
    """The size of a grouped layer's first dimension, which tells after the cut how many groups are left."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm)) and isinstance(module.weight, Tensor):
        return module.weight.shape[0]
    return None


def _resize(module: Any, before: int | None) -> None:
    """Make a layer's own numbers those of its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = module.groups * first // (before or first)
            second *= module.groups
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif isinstance(module, SelectedLinear):
        module.out_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        module.num_features = len(module.weight if module.weight is not None else module.running_mean)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
        module.num_groups = module.num_groups * module.num_channels // (before or module.num_channels)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another layer in all places of ``old``; the layer itself if that is the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if model is old else model


def _select(model: nn.Module) -> nn.Module:
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    fused = {id(child) for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for child in m.children()}
    for module in list(model.modules()):
        if id(module) in fused:
            continue  # their weights are read by a kernel for the whole layer
        # exactly nn.Linear: subclasses may compute something else
        if type(module) is nn.Linear and "weight" in module._parameters and owners[id(module.weight)] == 1:
            zero = unread(module)
            if pays(module, int(zero.sum())):
                model = replaced(model, module, SelectedLinear(module, (~zero).nonzero().flatten()))
    return model
