"""Attention heads as channels: the rows of query, key and value and the columns of the output projection."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.compacted.attention import ATTENTIONS
from torchreg.coupling.values import Coupling
from torchreg.groups import Member


@dataclass(frozen=True)
class Attention:
    """How an attention module of one's own names its parts.

    Args:
        qkv: the linear layers of query, key and value, or the one that makes them all, one after the other.
        out: the linear layer that mixes the heads.
        num_heads: the attribute that says how many heads there are; `torchreg.export.compact` sets it. The module's
            forward must take the size of a head from elsewhere (or leave it to ``view(…, num_heads, -1)``).

    >>> import torch, torchreg
    >>> from torchreg.coupling import Attention
    >>> class SelfAttention(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv, self.proj, self.num_heads = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8), 4
    ...     def forward(self, x):
    ...         q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
    ...         y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ...         return self.proj(y.transpose(1, 2).flatten(2))
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), SelfAttention())
    >>> found = torchreg.coupled_groups(model, torch.randn(2, 5, 3), heads={"1": Attention("qkv", "proj")})
    >>> found["1"].count, found["1"].users[0].labels
    (4, tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    """

    qkv: str | Sequence[str]
    out: str
    num_heads: str = "num_heads"


def declared(model: nn.Module, heads: Mapping[str, Attention] | None) -> dict[str, Attention]:
    """The modules that the globs of ``heads`` match, by name.

    Raises:
        TypeError: if ``heads`` is no mapping from globs to `Attention`.
        ValueError: if a glob matches no module, or a module lacks what its description says.
    """
    if heads is None:
        return {}
    if not isinstance(heads, Mapping) or not all(isinstance(value, Attention) for value in heads.values()):
        raise TypeError("Expected `heads` to be a mapping from names of modules to torchreg.coupling.Attention.")
    modules = dict(model.named_modules())
    result: dict[str, Attention] = {}
    for glob, attention in heads.items():
        matched = [name for name in modules if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(f"The name {glob!r} in `heads` matches none of {len(modules)} modules.")
        for name in matched:
            _check(name, modules[name], attention)
            result.setdefault(name, attention)
    return result


def parts(name: str, attention: Attention) -> tuple[list[str], str]:
    """The names of the layers of query, key and value (one if they are packed) and of the output projection."""
    qkv = [attention.qkv] if isinstance(attention.qkv, str) else list(attention.qkv)
    return [f"{name}.{part}" if name else part for part in qkv], f"{name}.{attention.out}" if name else attention.out


def couplings(model: nn.Module, described: Mapping[str, Attention]) -> Iterator[Coupling]:
    """The heads of the attention modules that are described, and of every `nn.MultiheadAttention`."""
    names = {id(p): name for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if name in described:
            layers, out = parts(name, described[name])
            count = getattr(module, described[name].num_heads)
            packed = 3 if len(layers) == 1 else 1
            makers = [
                (model.get_submodule(layer), attribute, 0, packed)
                for layer in layers
                for attribute in ("weight", "bias")
            ]
            users = [(model.get_submodule(out), "weight", 1, 1)]
        elif isinstance(module, ATTENTIONS):
            count = module.num_heads
            makers = [(module, "in_proj_weight", 0, 3), (module, "in_proj_bias", 0, 3)]
            makers += [(module, f"{part}_proj_weight", 0, 1) for part in "qkv"]
            makers += [(module, "bias_k", 2, 1), (module, "bias_v", 2, 1)]
            users = [(module.out_proj, "weight", 1, 1)]
        else:
            continue
        tensors = [
            [
                (names[id(p)], p, dim, packed)
                for m, attribute, dim, packed in held
                if (p := m._parameters.get(attribute)) is not None
            ]
            for held in (makers, users)
        ]
        if all(tensors):
            made, used = (tuple(_member(*entry, count) for entry in held) for held in tensors)
            yield Coupling(name, count, made, used, heads=True)


def _member(name: str, tensor: Tensor, dim: int, packed: int, count: int) -> Member:
    size = tensor.shape[dim] // (packed * count)
    return Member(name, dim, torch.arange(count).repeat_interleave(size).repeat(packed))


def _check(name: str, module: nn.Module, attention: Attention) -> None:
    layers, out = parts("", attention)
    count: Any = getattr(module, attention.num_heads, None)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"Expected {name!r} to have an integer attribute {attention.num_heads!r}, got {count!r}.")
    if len(layers) not in (1, 3):
        raise ValueError(f"Expected the query, key and value layers of {name!r} to be one or three, got {layers}.")
    for path, packed, rows in [(layer, 3 if len(layers) == 1 else 1, True) for layer in layers] + [(out, 1, False)]:
        layer = dict(module.named_modules()).get(path)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"Expected {path!r} of {name!r} to be a linear layer, got {type(layer).__name__}.")
        size = layer.out_features if rows else layer.in_features
        if size % (packed * count):
            raise ValueError(f"Expected {packed * count} parts in the {size} channels of {path!r} of {name!r}.")
