"""Whether two models compute the same, and how fast they do."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchreg.coupling.stand_ins import Example, output_tensors, undisturbed

RANDOM_INPUTS = 3
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference of outputs that rounding explains, relative to the largest output."""
FOLDED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same where biases have changed, by the type that they were rounded to."""
ROUNDS = (5, 200)


def inputs_like(example: Example, seed: int = 0) -> Iterator[Example]:
    """The example, and random inputs of its shape, type and range; integers are permutations of those given."""
    random = torch.Generator().manual_seed(seed)

    def another(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.numel() and bool(t.isfinite().all()):
            low, high = float(t.min()), float(t.max())
            return (torch.rand(t.shape, generator=random, dtype=torch.float64) * (high - low) + low).to(t)
        if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
            return t  # masks
        order = torch.randperm(t.numel(), generator=random).to(t.device)
        return t.flatten()[order].view(t.shape)

    yield example
    for _ in range(RANDOM_INPUTS):
        yield example.map(another)


class Reference:
    """A model's outputs in eval mode, in float64 where it can be run so, for the example and for random inputs."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.inputs = list(inputs_like(example))
        self.double = True
        try:
            self.outputs = self._run(model)
        except Exception:  # a type that is written into its code, or a device without float64
            self.double = False
            self.outputs = self._run(model)
        self.usual = self._usually(model)

    def difference(self, model: nn.Module) -> float:
        """The largest difference of another model's outputs, relative to the largest output; inf for other shapes."""
        usual, tolerance = self._usually(model), max(TOLERANCES.get(t.dtype, 1e-4) for t in self.usual)
        worst = _farthest(usual, self.usual)
        if not worst <= tolerance:
            return worst
        return max(_farthest(a, b) for a, b in zip(self._run(model), self.outputs, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """The type in which outputs are compared: the narrowest among them."""
        types = {t.dtype for outputs in self.outputs for t in outputs}
        return max(types, key=lambda dtype: torch.finfo(dtype).eps)

    def _run(self, model: nn.Module) -> list[list[Tensor]]:
        twin = copy.deepcopy(model).eval()
        if self.double:
            twin = twin.double()
        return [output_tensors(_call(twin, self._cast(given))) for given in self.inputs]

    def _usually(self, model: nn.Module) -> list[Tensor]:
        """The outputs for the example as they come in use: in the model's precision, by torch's fast paths."""
        with torch.no_grad(), torch.random.fork_rng(self.inputs[0].cuda_devices()):
            torch.manual_seed(0)
            return output_tensors(self.inputs[0].call(copy.deepcopy(model).eval()))

    def _cast(self, example: Example) -> Example:
        return example.map(lambda t: t.double() if self.double and t.is_floating_point() else t)


def _call(model: nn.Module, example: Example) -> object:
    with undisturbed(example), torch.no_grad():  # in this order: leaving inference mode brings gradients back
        torch.manual_seed(0)
        return example.call(model)


def _farthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if len(ours) != len(theirs):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    finite = theirs[theirs.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    off = float((ours - theirs).abs()[~same].max())
    return off / scale if scale and off == off else float("inf")


def parameters(model: nn.Module) -> int:
    """How many numbers its parameters hold; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, example: Example) -> int:
    """Floating-point operations of one call, as torch counts them, with those inside attention."""
    twin = copy.deepcopy(model).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels count as nothing
        _call(twin, example)
    return counter.get_total_flops()


def latencies(models: tuple[nn.Module, nn.Module], example: Example, seconds: float) -> tuple[float, float]:
    """The median seconds of one call of each model in eval mode; the calls take turns."""
    twins = [copy.deepcopy(model).eval() for model in models]
    devices = example.cuda_devices()
    times: list[list[float]] = [[], []]
    with torch.inference_mode(), torch.random.fork_rng(devices):
        for twin in twins:
            example.call(twin)
        begin = time.perf_counter()
        while len(times[0]) < ROUNDS[0] or (time.perf_counter() - begin < seconds and len(times[0]) < ROUNDS[1]):
            for twin, taken in zip(twins, times, strict=True):
                start = time.perf_counter()
                example.call(twin)
                for device in devices:
                    torch.cuda.synchronize(device)
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
