"""A copy of a model that torch-pruning can trace: all that is on a channel's way is an operation that it knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from torchreg.compacted.attention import ATTENTIONS, input_widths


@dataclass(frozen=True)
class Example:
    """A model's arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @staticmethod
    def of(example_input: Any) -> Example:
        """Arguments from a tensor, a tuple or list of arguments, or a dict of keyword arguments.

        Raises:
            TypeError: if it is nothing of that kind, or holds no tensor.
        """
        allowed = "Expected `example_input` to be a tensor, a tuple of arguments or a dict of keyword arguments"
        if isinstance(example_input, Tensor):
            example = Example((example_input,))
        elif isinstance(example_input, Mapping):
            if not all(isinstance(key, str) for key in example_input):
                raise TypeError(f"{allowed}, got a dict whose keys are no strings.")
            example = Example((), dict(example_input))
        elif isinstance(example_input, (tuple, list)):
            example = Example(tuple(example_input))
        else:
            raise TypeError(f"{allowed}, got {type(example_input).__name__}.")
        if not example.tensors():
            raise TypeError(f"{allowed}, got one without a tensor.")
        return example

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        leaves, _ = tree_flatten((self.args, dict(self.kwargs or {})))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def cuda_devices(self) -> list[int]:
        """The CUDA devices that they are on."""
        return sorted({t.get_device() for t in self.tensors() if t.is_cuda})

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """The arguments with every tensor replaced by ``function(tensor)``."""

        def on_tensors(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return Example(tree_map(on_tensors, self.args), tree_map(on_tensors, dict(self.kwargs or {})))

    def call(self, model: nn.Module) -> Any:
        """The model's output for these arguments."""
        return model(*self.args, **(self.kwargs or {}))


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output."""
    if not isinstance(output, (Tensor, tuple, list, Mapping)) and hasattr(output, "__dict__"):
        output = vars(output)
    leaves, _ = tree_flatten(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def undisturbed(example: Example) -> Iterator[None]:
    """Random numbers drawn inside don't count outside, and attention takes no fast path that hides its weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(example.cuda_devices()),
            torch.autocast("cpu", enabled=False),
        ):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def private_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters all want gradients.

    Raises:
        ValueError: if the model can't be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"The model can't be copied: {error}") from error
    twin.eval()
    for p in twin.parameters():
        p.grad = None
        if p.is_floating_point():
            p.requires_grad_(True)
    return twin


class AttentionStandIn(nn.Module):
    """What `nn.MultiheadAttention` does to channels: columns of its inputs, rows of its output, nothing in between.

    torch-pruning takes the layer as one whose input and output channels are the same.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": attention.out_proj.weight.device, "dtype": attention.out_proj.weight.dtype}
        e = attention.embed_dim
        self.query, self.key, self.value = (nn.Linear(n, e, bias=False, **like) for n in input_widths(attention))
        self.out = nn.Linear(e, e, **like)
        self.batch_first, self.num_heads, self.embed_dim = attention.batch_first, attention.num_heads, e
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fast path

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, need_weights: bool = True, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output for these shapes; the weights are zeros."""
        dim = 1 if self.batch_first and query.ndim == 3 else 0
        mixed = self.query(query) + self.key(key).mean(dim, keepdim=True) + self.value(value).mean(dim, keepdim=True)
        weights = query.new_zeros(*query.shape[:-2], query.shape[1 - dim], key.shape[dim]) if need_weights else None
        return self.out(mixed), weights


def traceable(model: nn.Module) -> nn.Module:
    """A private copy with stand-ins for attention, and with the buffers that take part in sums made parameters."""
    twin = private_copy(model)
    if isinstance(twin, ATTENTIONS):
        return twin
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ATTENTIONS):
                setattr(module, name, AttentionStandIn(child).eval())
        if hasattr(module, "running_mean"):
            continue
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and buffer.ndim:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer))
    return twin


def stand_in_parameters(attention: Any) -> dict[str, Sequence[str]]:
    """Which parameters of the attention hold the channels of the stand-in's layers: names relative to the layer."""
    packed = attention.in_proj_weight is not None
    return {
        "query": ("in_proj_weight" if packed else "q_proj_weight",),
        "key": ("in_proj_weight" if packed else "k_proj_weight",),
        "value": ("in_proj_weight" if packed else "v_proj_weight",),
        "out": ("out_proj.weight", "out_proj.bias"),
    }
