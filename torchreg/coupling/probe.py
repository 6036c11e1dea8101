"""Whether channels are what a trace says, found out by running the model with other weights.

Two facts make channels removable: with zero users it does not matter what the makers hold; and with zero makers it does
not matter what the users hold. Both are tested on a copy with random weights, because those of the model may hide
a dependence (they may be zero, for one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchreg.coupling.stand_ins import Example, output_tensors
from torchreg.coupling.values import Coupling
from torchreg.groups import Member

DRAWS = 8
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Probe:
    """A model with random weights (of a copy that is its own), on an example."""

    def __init__(self, copy: nn.Module, example: Example, seed: int = 0) -> None:
        self.model, self.example = copy, example
        self.random = torch.Generator().manual_seed(seed)
        self.tensors = {**dict(copy.named_buffers()), **dict(copy.named_parameters())}
        self.renew()

    def renew(self) -> None:
        """Draw other weights."""
        with torch.no_grad():
            for name, w in self.tensors.items():
                if w.is_floating_point() and (isinstance(w, nn.Parameter) or "running_" in name):
                    w.copy_(self._noise(name, w))
        self.output = self.run()

    def run(self) -> list[Tensor]:
        """The model's outputs."""
        torch.manual_seed(0)  # for models that draw random numbers
        with torch.no_grad():
            return [t.detach().clone() for t in output_tensors(self.example.call(self.model))]

    def works(self) -> bool:
        """Whether the outputs of random weights are numbers: without that nothing can be found out."""
        return not any(bool(t.isnan().any()) for t in self.output)

    def matters(self, coupling: Coupling, channels: Tensor) -> bool:
        """Whether the outputs change when the users of some channels become zero: with these weights or with others."""
        for _ in range(DRAWS):
            with _Changed(self, coupling.users, channels, zero=True):
                if not _same(self.run(), self.output):
                    return True
            self.renew()  # a few units of a ReLU may all be silent
        return False

    def unused_without_users(self, coupling: Coupling, channels: Tensor) -> bool:
        """Whether the makers of some channels have no effect if their users are zero."""
        return self._independent(coupling.users, coupling.makers, channels)

    def zero_without_makers(self, coupling: Coupling, channels: Tensor, makers: Sequence[Member] | None = None) -> bool:
        """Whether the users of some channels have no effect if their makers (or those given) are zero."""
        return self._independent(coupling.makers if makers is None else makers, coupling.users, channels)

    def _independent(self, zero: Iterable[Member], of: Iterable[Member], channels: Tensor) -> bool:
        with _Changed(self, of, channels, zero=False), _Changed(self, zero, channels, zero=True):
            before = self.run()
        with _Changed(self, of, channels, zero=False), _Changed(self, zero, channels, zero=True):
            return _same(self.run(), before)

    def _noise(self, name: str, w: Tensor) -> Tensor:
        if w.ndim < 2:
            positive = name.endswith(("weight", "running_var"))
            noise = torch.rand(w.shape, generator=self.random) + 0.5
            if not positive:
                noise = torch.randn(w.shape, generator=self.random) / 2
        else:
            noise = torch.randn(w.shape, generator=self.random) * (max(1, w.numel()) / max(1, w.shape[0])) ** -0.5
        return noise.to(w)


class _Changed:
    """Slices of some channels made zero or random, while it lasts."""

    def __init__(self, probe: Probe, members: Iterable[Member], channels: Tensor, *, zero: bool) -> None:
        self.probe, self.members, self.channels, self.zero = probe, tuple(members), channels, zero
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        with torch.no_grad():
            for member in self.members:
                w = self.probe.tensors[member.name]
                index = member.slices(self.channels).to(w.device)
                self.kept.append((w, w.clone()))
                value = torch.zeros_like(w) if self.zero else self.probe._noise(member.name, w)
                w.index_copy_(member.dim, index, value.index_select(member.dim, index))

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for w, before in reversed(self.kept):
                w.copy_(before)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return False
        finite = b[b.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        if not bool(((a == b) | ((a - b).abs() <= TOLERANCES.get(a.dtype, 1e-5) * scale)).all()):
            return False
    return True
