"""Which slices of a layer's tensors hold its channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from torchreg.compacted.attention import ATTENTIONS, input_widths
from torchreg.compacted.selection import SelectedLinear
from torchreg.coupling.stand_ins import stand_in_parameters

Role = Literal["maker", "user", "other"]
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Site:
    """Where a layer holds its channels: one slice per channel along ``dim`` of a tensor.

    Attributes:
        tensor: its name, relative to the layer.
        dim: the dimension.
        role: what the slices do.
        writes: whether they are the channels that the layer writes (or reads).
    """

    tensor: str
    dim: int
    role: Role
    writes: bool


@dataclass(frozen=True)
class Layer:
    """What a layer holds of its channels.

    Attributes:
        reads, writes: how many channels it reads and writes; None if it can't tell.
        sites: where it holds them.
        read_block, write_block: how many neighbours can only be removed together: those of a convolution's group, or of
            a group norm's.
        through: whether block i that is read is also block i that is written (a convolution's groups).
        refusal: why its channels can't be removed; empty if they can.
        read_refusal: why those that it reads can't.
    """

    reads: int | None
    writes: int | None
    sites: tuple[Site, ...] = ()
    read_block: int = 1
    write_block: int = 1
    through: bool = False
    refusal: str = ""
    read_refusal: str = ""


def layer(name: str, module: nn.Module | Tensor) -> Layer | None:
    """The channels of a layer that torch-pruning knows; None for an operation without parameters.

    Args:
        name: for messages.
        module: the layer, or a parameter that stands by itself.
    """
    if isinstance(module, Tensor):
        dims = [d for d, size in enumerate(module.shape) if size > 1]  # as torch-pruning has it
        return Layer(module.shape[dims[-1]], module.shape[dims[-1]], (Site("", dims[-1], "maker", True),))
    if isinstance(module, _CONVOLUTIONS):
        return _convolution(module)
    if isinstance(module, SelectedLinear):
        refusal = f"{name!r} reads only some of them"
        sites = [Site("weight", 0, "maker", True), *_bias(module)]
        return Layer(module.in_features, module.out_features, tuple(sites), read_refusal=refusal)
    if isinstance(module, nn.Linear):
        sites = [Site("weight", 0, "maker", True), Site("weight", 1, "user", False), *_bias(module)]
        return Layer(module.in_features, module.out_features, tuple(sites))
    if isinstance(module, _BATCH_NORMS):
        n = module.num_features
        statistics = [Site(s, 0, "other", True) for s in ("running_mean", "running_var")]
        held = [s for s in statistics if getattr(module, s.tensor) is not None]
        return Layer(n, n, (*_norm(module), *held))
    if isinstance(module, nn.GroupNorm):
        n, block = module.num_channels, module.num_channels // module.num_groups
        refusal = "" if module.affine else f"the group norm {name!r} has no weights that say how many there are"
        return Layer(n, n, tuple(_norm(module)), block, block, refusal=refusal)
    if isinstance(module, nn.LayerNorm):
        refusal = f"the layer norm {name!r} normalises over them: without one, the others change"
        if len(module.normalized_shape) > 1:
            return Layer(None, None, refusal=refusal)
        n = module.normalized_shape[0]
        return Layer(n, n, tuple(_norm(module)), refusal=refusal)
    if isinstance(module, nn.PReLU):
        if module.num_parameters == 1:
            return None
        return Layer(module.num_parameters, module.num_parameters, (Site("weight", 0, "other", True),))
    if isinstance(module, nn.Embedding):
        return Layer(module.embedding_dim, module.embedding_dim, (Site("weight", 1, "maker", True),))
    if isinstance(module, nn.RNNBase):
        return Layer(None, None, refusal=f"the recurrent layer {name!r} takes part")
    if isinstance(module, ATTENTIONS):
        return Layer(None, None, refusal=f"the attention {name!r} takes part")
    return None


def attention_sites(attention: Any, part: str) -> Layer:
    """The channels that one layer of an attention's stand-in stands for (see `stand_ins.AttentionStandIn`)."""
    names = stand_in_parameters(attention)[part]
    if part == "out":
        held = [n for n in names if n != "out_proj.bias" or attention.out_proj.bias is not None]
        return Layer(None, len(attention.out_proj.weight), tuple(Site(n, 0, "maker", True) for n in held))
    reads = input_widths(attention)[("query", "key", "value").index(part)]
    return Layer(reads, None, tuple(Site(n, 1, "user", False) for n in names))


def _convolution(module: nn.modules.conv._ConvNd) -> Layer:
    out_dim = int(module.transposed)
    groups = module.groups
    if groups == 1:
        sites = [Site("weight", out_dim, "maker", True), Site("weight", 1 - out_dim, "user", False), *_bias(module)]
        return Layer(module.in_channels, module.out_channels, tuple(sites))
    # a group's weights are slices of dimension 0: of the channels written, or, transposed, of those read
    sites = [Site("weight", 0, "maker", not module.transposed), *_bias(module)]
    blocks = module.in_channels // groups, module.out_channels // groups
    return Layer(module.in_channels, module.out_channels, tuple(sites), *blocks, through=True)


def _bias(module: nn.Module) -> Iterator[Site]:
    if getattr(module, "bias", None) is not None:
        yield Site("bias", 0, "maker", True)


def _norm(module: nn.Module) -> Iterator[Site]:
    for tensor in ("weight", "bias"):
        if getattr(module, tensor, None) is not None:
            yield Site(tensor, 0, "maker", True)
