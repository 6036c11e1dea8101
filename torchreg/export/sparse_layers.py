"""Linear layers in the sparse forms that torch computes with: CSR on a CPU, 2:4 on GPUs that have it."""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreg import tables
from torchreg.export.surgery import replaced

_ROUNDS, _SHORTEST = 9, 2e-4
"""Interleaved measurements, and the seconds that each of them takes at least."""

_SEMI_STRUCTURED = (torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class LayerChoice:
    """What became of a linear layer.

    Attributes:
        name: its name in the model.
        shape: (out, in).
        sparsity: the fraction of zeros in its weight.
        converted: whether it is sparse now.
        gain: how many times faster it became (or would have become), None where that was not measured.
        reason: why it was left alone, empty if it was not.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    converted: bool
    gain: float | None
    reason: str


@dataclass(frozen=True)
class Converted:
    """A model with sparse layers, and what became of each linear layer; ``print()`` shows a table."""

    model: nn.Module
    layers: tuple[LayerChoice, ...]

    @property
    def count(self) -> int:
        """How many layers are sparse now."""
        return sum(layer.converted for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model)",
                "×".join(map(str, layer.shape)),
                "sparse" if layer.converted else layer.reason,
                f"{100 * layer.sparsity:.1f} %",
                "–" if layer.gain is None else f"{layer.gain:.2f} ×",
            )
            for layer in self.layers
        ]
        return tables.render(("layer", "shape", "became", "zeros", "faster"), rows, left=3)


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored in the CSR format; for inference.

    y = x·Wᵀ + b for x of shape (…, in), as `torch.nn.Linear`. The entries that are not zero, their columns and where
    the rows begin are buffers, so that ``state_dict`` holds them.

    >>> import torch
    >>> from torchreg.export import SparseLinear
    >>> dense = torch.nn.Linear(4, 3)
    >>> _ = dense.weight.data.mul_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    >>> layer, x = SparseLinear.of(dense), torch.randn(5, 4)
    >>> layer.values.numel(), torch.allclose(layer(x), dense(x))
    (3, True)
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, crow: Tensor, col: Tensor, values: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)
        self.register_buffer("values", values)
        self.register_buffer("bias", None)

    @classmethod
    def of(cls, linear: nn.Linear) -> SparseLinear:
        """The same layer with its zeros left out."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            csr = linear.weight.detach().to_sparse_csr()
        layer = cls(linear.in_features, linear.out_features, csr.crow_indices(), csr.col_indices(), csr.values())
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight, a sparse CSR tensor."""
        size = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, size, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1:
            y = nn.functional.linear(rows, self.weight, self.bias)
        elif self.bias is None:
            y = torch.mm(self.weight, rows.T).T
        else:
            y = torch.addmm(self.bias[:, None], self.weight, rows.T).T
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes and the number of entries."""
        return f"in_features={self.in_features}, out_features={self.out_features}, entries={self.values.numel()}"


def to_sparse_csr(model: nn.Module, example_input: Any, *, gain: float = 1.1) -> Converted:
    """Replace linear layers with many zeros by `SparseLinear`, where that was measured to be faster on this CPU.

    Every layer is timed, dense and sparse by turns, with what it is given when the model runs on the example: take a
    batch of the size that matters, since the gain depends on it, and as many threads. Layers whose owner reads their
    weights itself, such as those inside `torch.nn.TransformerEncoderLayer`, are left alone.

    Args:
        model: a module on the CPU. It is not changed.
        example_input: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        gain: how many times faster a layer must be.

    Returns:
        A copy of the model in eval mode with sparse layers, whose outputs have been compared with the model's, and what
        became of each layer.

    Raises:
        ValueError: if ``gain`` is no positive number, the model is not on the CPU, fails on the example, or its outputs
            would change by more than rounding.
        TypeError: if ``model`` is no module.

    >>> import torch
    >>> from torchreg.export import to_sparse_csr
    >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2))
    >>> _ = model[0].weight.data.mul_(torch.rand(512, 512) > 0.99)
    >>> converted = to_sparse_csr(model, torch.randn(32, 512), gain=1e-6)  # whatever the time: it is an example
    >>> converted.model[0].values.numel() == torch.count_nonzero(model[0].weight)
    tensor(True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be an nn.Module, got {type(model).__name__}.")
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
        raise ValueError(f"Expected `gain` to be a positive number, got {gain!r}.")
    elsewhere = next((name for name, p in model.named_parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(f"Expected a model on the CPU, got {elsewhere!r} on {model.get_parameter(elsewhere).device}.")
    new = copy.deepcopy(model).eval()
    expected, given = _inputs(new, example_input)
    choices = []
    for name, layer in _linear_layers(new):
        choice, sparse = _csr_choice(name, layer, given.get(layer), _tied(new, layer), gain)
        if sparse is not None:
            new = replaced(new, layer, sparse)
            try:
                _compare(_called(new, example_input), expected, name)
            except (RuntimeError, TypeError, AttributeError, NotImplementedError):
                new = replaced(new, sparse, layer)
                choice = LayerChoice(name, choice.shape, choice.sparsity, False, choice.gain, "its owner reads it")
        choices.append(choice)
    return Converted(new, tuple(choices))


def to_semi_structured(model: nn.Module, example_input: Any = None) -> Converted:
    """Hand linear layers with 2:4 sparsity to torch's semi-structured kernels, where the GPU has them.

    That is compute capability 8.0 and higher, and float16, bfloat16 or int8 weights, in which of every 4 consecutive
    weights of a row at most 2 are not zero: train them with `torchreg.NM`.

    Args:
        model: any module. It is not changed.
        example_input: on request what the model is called with, to compare the outputs.

    Returns:
        A copy of the model in eval mode, and what became of each linear layer, with the reason where it was left alone.

    Raises:
        ValueError: if the model fails on the example, or its outputs would change by more than rounding.
        TypeError: if ``model`` is no module.

    >>> import torch
    >>> from torchreg.export import to_semi_structured
    >>> print(to_semi_structured(torch.nn.Linear(64, 64)))
    layer         shape   became                                    zeros   faster
    ──────────────────────────────────────────────────────────────────────────────
    (the model)   64×64   it is on the cpu: the kernels need CUDA   0.0 %        –

    Source: Mishra et al., Accelerating sparse deep neural networks, arXiv 2021.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be an nn.Module, got {type(model).__name__}.")
    new = copy.deepcopy(model).eval()
    expected = None if example_input is None else _outputs(new, example_input)
    choices = []
    for name, layer in _linear_layers(new):
        reason = _no_semi_structure(layer.weight)
        sparsity = _sparsity(layer.weight)
        if not reason:
            try:
                sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            except (RuntimeError, ValueError) as error:
                reason = _misfit(str(error))
            else:
                layer.weight = nn.Parameter(sparse, requires_grad=False)
        choices.append(LayerChoice(name, (layer.out_features, layer.in_features), sparsity, not reason, None, reason))
    if expected is not None:
        _compare(_outputs(new, example_input), expected, "the converted layers")
    return Converted(new, tuple(choices))


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m.weight.numel()]


def _csr_choice(
    name: str, layer: nn.Linear, x: Tensor | None, tied: str, gain: float
) -> tuple[LayerChoice, SparseLinear | None]:
    """What is to become of a layer, and the sparse one if it is to be replaced."""
    shape, sparsity = (layer.out_features, layer.in_features), _sparsity(layer.weight)
    if tied:
        return LayerChoice(name, shape, sparsity, False, None, f"its weight is also {tied}"), None
    if x is None:
        return LayerChoice(name, shape, sparsity, False, None, "the example does not reach it"), None
    if layer.weight.dtype not in (torch.float32, torch.float64):
        return LayerChoice(name, shape, sparsity, False, None, f"{layer.weight.dtype} has no CSR product"), None
    sparse = SparseLinear.of(layer)
    measured = _gain(lambda: layer(x), lambda: sparse(x))
    if measured < gain:
        return LayerChoice(name, shape, sparsity, False, measured, "dense is as fast"), None
    return LayerChoice(name, shape, sparsity, True, measured, ""), sparse


def _no_semi_structure(weight: Tensor) -> str:
    """Why torch's 2:4 kernels can't take a weight; empty if they can."""
    if weight.device.type != "cuda":
        return f"it is on the {weight.device.type}: the kernels need CUDA"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU has no sparse tensor cores"
    if weight.dtype not in _SEMI_STRUCTURED:
        return f"{weight.dtype} is not float16, bfloat16 or int8"
    if weight.shape[1] % 4:
        return "4 does not divide its inputs"
    if bool(((weight != 0).view(len(weight), -1, 4).sum(2) > 2).any()):
        return "it is not 2:4 sparse"
    return ""


def _misfit(error: str) -> str:
    """What torch's rules about sizes say of a weight, whose error is given."""
    sizes = re.search(r"multiple of \((\d+), (\d+)\)", error)
    return f"its sizes are no multiples of {sizes[1]} and {sizes[2]}" if sizes else error.splitlines()[0]


def _sparsity(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())


def _tied(model: nn.Module, layer: nn.Linear) -> str:
    """Another name of the layer's weight, held by another module."""
    owners = [(name, m) for name, m in model.named_modules() if m is not layer]
    return next((f"{name}.{key}" for name, m in owners for key, p in m._parameters.items() if p is layer.weight), "")


@torch.no_grad()
def _inputs(model: nn.Module, example: Any) -> tuple[list[Tensor], dict[nn.Module, Tensor]]:
    """The model's outputs on the example, and the largest input of each linear layer."""
    given: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if layer not in given or arguments[0].numel() > given[layer].numel():
            given[layer] = arguments[0].detach().clone()

    handles = [layer.register_forward_pre_hook(keep) for _, layer in _linear_layers(model)]
    try:
        return _outputs(model, example), given
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that the model returns; ValueError if it fails."""
    try:
        return _called(model, example)
    except Exception as error:  # the model's own code may raise anything
        raise ValueError(f"The model fails on the example: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _called(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that the model returns."""
    if isinstance(example, Mapping):
        out = model(**example)
    else:
        out = model(*example) if isinstance(example, (tuple, list)) else model(example)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _compare(found: list[Tensor], expected: list[Tensor], name: str) -> None:
    for a, b in zip(found, expected, strict=True):
        numbers = b[b.isfinite()]  # masked outputs are infinite
        scale = numbers.abs().max().item() if numbers.numel() and b.dtype != torch.bool else 0.0
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(b.dtype, 2e-2) * max(scale, 1e-30)
        if a.shape != b.shape or not bool(torch.isclose(a, b, rtol=0, atol=tolerance, equal_nan=True).all()):
            raise ValueError(f"The outputs of the model change with a sparse {name}.")


@torch.no_grad()
def _gain(dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> float:
    """How many times faster the second one is: the median of interleaved measurements."""
    repeats = [max(1, math.ceil(_SHORTEST / max(_seconds(call, 1), 1e-9))) for call in (dense, sparse)]
    ratios = [_seconds(dense, repeats[0]) / _seconds(sparse, repeats[1]) for _ in range(_ROUNDS)]
    return statistics.median(ratios)


def _seconds(call: Callable[[], Tensor], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
