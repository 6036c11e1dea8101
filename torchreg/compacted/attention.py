"""Multi-head attention that has lost heads, or whose heads are narrower than its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CompactAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with fewer heads than its width would hold.

    torch's layer can't have them: its heads are as wide as embed_dim/num_heads. Parameters, their names, the arguments
    of `forward` and its results are those of torch's layer; attention weights are those of the heads that are left.

    This differs from torch's layer in:
        1. Nested tensors, ``add_bias_kv`` and ``add_zero_attn`` are not supported.
        2. `nn.TransformerEncoderLayer` does not take its fused path with it, which knows only whole layers.

    Args:
        attention: the layer with its tensors cut already; one that has lost heads before may lose more.
        kept: which of its heads they hold.

    >>> import torch
    >>> from torchreg.export import compact
    >>> layer = torch.nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    >>> layer.self_attn.out_proj.weight.data[:, 2:4] = 0  # nothing reads the second head
    >>> compact(layer, torch.randn(2, 5, 8), seconds=0).model.self_attn
    CompactAttention(
      8, heads=3 of 4, head_dim=2
      (out_proj): NonDynamicallyQuantizableLinear(in_features=6, out_features=8, bias=True)
    )

    Reference:
        P. Michel, O. Levy, G. Neubig (NeurIPS, 2019), Are Sixteen Heads Really Better than One?
    """

    def __init__(self, attention: Any, kept: Sequence[int]) -> None:
        super().__init__()
        self.original_heads, self.kept = attention.num_heads, tuple(kept)
        if isinstance(attention, CompactAttention):
            self.original_heads = attention.original_heads
            self.kept = tuple(attention.kept[i] for i in kept)
        self.num_heads, self.head_dim = len(self.kept), attention.head_dim
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.in_proj_weight: nn.Parameter | None
        self.in_proj_bias: nn.Parameter | None
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(attention, name))
        self.out_proj: nn.Linear = attention.out_proj
        self.out_proj.out_features, self.out_proj.in_features = attention.out_proj.weight.shape
        self.embed_dim = self.out_proj.out_features
        self._qkv_same_embed_dim = False  # what keeps nn.TransformerEncoderLayer off its fused path
        self.training = attention.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights of attention if they are wanted.

        Args:
            query: (L, N, E) or (L, E), or (N, L, E) if ``batch_first``; likewise `key` and `value`.
            key_padding_mask: (N, S), true (or −inf) where a key is to be ignored.
            need_weights: whether to return the weights.
            attn_mask: (L, S), or (N·heads, L, S) with the number of heads there once were.
            average_attn_weights: whether the weights are averaged over the heads that are left.
            is_causal: a hint that torch's layer takes; the mask says the same.

        Raises:
            ValueError: for ``is_causal`` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("Expected `attn_mask` with is_causal=True, which is only a hint.")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(projected) for projected in self._projected(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        width = self.num_heads * self.head_dim
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split(width, dim=-1)
        weights: Sequence[Any] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(width)
        biases: Sequence[Any] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(width)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """Both masks as one that is added to the scores (N, heads, L, S)."""
        total = None
        if mask is not None:
            total = _added(mask, q)
            if mask.ndim == 3:
                total = total.unflatten(0, (-1, self.original_heads))[:, list(self.kept)]
        if padding is not None:
            added = _added(padding, q).view(-1, 1, 1, keys)
            total = added if total is None else total + added
        return total

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.embed_dim}, heads={self.num_heads} of {self.original_heads}, head_dim={self.head_dim}"


ATTENTIONS = (nn.MultiheadAttention, CompactAttention)


def input_widths(attention: Any) -> tuple[int, ...]:
    """How wide the query, key and value of an attention of `ATTENTIONS` are."""
    weights: list[Any] = [attention.in_proj_weight] * 3
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    return tuple(w.shape[1] for w in weights)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
