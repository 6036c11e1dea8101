"""The tensors that are stepped: lists of shapes of real models and of extreme ones, and memory for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """He et al., Deep residual learning, CVPR 2016, as in torchvision: 25.6 M weights in 161 tensors."""

    def conv(out: int, into: int, size: int) -> list[Shape]:  # and its batch norm
        return [(out, into, size, size), (out,), (out,)]

    shapes, width = conv(64, 3, 7), 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(planes, width, 1) + conv(planes, planes, 3) + conv(4 * planes, planes, 1)
            shapes += conv(4 * planes, width, 1) if block == 0 else []  # the shortcut
            width = 4 * planes
    return [*shapes, (1000, width), (1000,)]


def gpt2() -> list[Shape]:
    """Radford et al., Language models are unsupervised multitask learners, 2019: small, 124 M weights, 148 tensors."""
    n = 768
    norm: list[Shape] = [(n,), (n,)]

    def linear(into: int, out: int) -> list[Shape]:
        return [(into, out), (out,)]

    block = norm + linear(n, 3 * n) + linear(n, n) + norm + linear(n, 4 * n) + linear(4 * n, n)
    return [(50257, n), (1024, n), *(12 * block), *norm]


LISTS: dict[str, list[Shape]] = {
    "4 × 4 M": [(2_000, 2_000)] * 4,
    "60 × 20 k": [(100, 200)] * 60,
    "1000 × 1 k": [(25, 40)] * 1000,
    "ResNet-50": resnet50(),
    "GPT-2": gpt2(),
    "1 B": [(4096, 4096)] * 60,
}
QUICK = ("4 × 4 M", "60 × 20 k")
LARGE = 100_000_000
"""Weights from which the bars for large models count."""


def count(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def too_large(shapes: list[Shape], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a list is left out, or None: the slowest contenders need memory for 17 copies of the weights."""
    if device.type == "cpu":
        return "on GPUs only" if count(shapes) > 5 * LARGE else None
    needed, free = 17 * count(shapes) * dtype.itemsize, torch.cuda.mem_get_info(device)[0]
    return f"needs {needed / 2**30:.0f} GiB, free are {free / 2**30:.0f}" if needed > free else None


class Workload:
    """Weights, gradients and the optimizers' buffers. All contenders work on these same ones, in turns."""

    def __init__(self, shapes: list[Shape], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def tensors() -> list[Tensor]:
            return [0.1 * torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes]

        self.device, self.dtype, self.size = device, dtype, count(shapes)
        self.start, self.start_grads = tensors(), tensors()
        self.params = [nn.Parameter(w.clone()) for w in self.start]
        self.buffers = [torch.zeros_like(w) for w in self.start]
        self.squares = [torch.zeros_like(w) for w in self.start]
        self.counters = [torch.zeros((), device=device) for _ in self.start]
        for p, g in zip(self.params, self.start_grads, strict=True):
            p.grad = g.clone()

    @torch.no_grad()
    def reset(self) -> None:
        for p, w, g in zip(self.params, self.start, self.start_grads, strict=True):
            p.copy_(w)
            p.grad.copy_(g)
        for t in (*self.buffers, *self.squares, *self.counters):
            t.zero_()
