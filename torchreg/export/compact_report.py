"""What compaction removed, what it could not, and what that saves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torchreg import tables
from torchreg.coupling.values import LeftAlone


@dataclass(frozen=True)
class Shrunk:
    """Channels (or the inputs that a linear layer reads) before and after.

    Attributes:
        name: the first layer that makes them, or the layer that reads them.
        before: how many there were.
        after: how many are left.
        layers: the layers whose tensors were cut.
        constant: how many channels that stay are constants: their weights are zero, but not their bias or the shift of
            their norm, and a convolution with zero padding reads them, say. A penalty on all that makes them (see
            `torchreg.coupled_groups`) would have let them go.
    """

    name: str
    before: int
    after: int
    layers: tuple[str, ...] = ()
    constant: int = 0


@dataclass(frozen=True)
class CompactReport:
    """What `torchreg.export.compact` did; ``print()`` shows tables.

    Attributes:
        parameters: how many there are before and after.
        flops: floating-point operations for the example before and after, as torch's ``FlopCounterMode`` counts them.
        latency: the median seconds of one call on the example before and after; None if not measured.
        error: the largest difference between the outputs, relative to the largest output.
        checked_in: the precision in which both models were compared.
        couplings: channels of each coupling before and after, those that did not shrink too.
        inputs: inputs that linear layers read before and after, for those that read fewer.
        left_alone: channels that can't be removed, and why.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    latency: tuple[float, float] | None
    error: float
    checked_in: str
    couplings: tuple[Shrunk, ...]
    inputs: tuple[Shrunk, ...]
    left_alone: tuple[LeftAlone, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        savings = [
            ("parameters", f"{self.parameters[0]:,}", f"{self.parameters[1]:,}", _ratio(*self.parameters)),
            ("FLOPs", f"{self.flops[0]:,}", f"{self.flops[1]:,}", _ratio(*self.flops)),
        ]
        if self.latency is not None:
            before, after = self.latency
            savings.append(("latency", f"{1e3 * before:.3g} ms", f"{1e3 * after:.3g} ms", _ratio(before, after)))
        parts = [tables.render(("", "before", "after", "times smaller"), savings)]
        rows = [(s.name, str(s.before), str(s.after), str(s.constant)) for s in self.couplings]
        rows += [(f"{s.name} (inputs read)", str(s.before), str(s.after), "") for s in self.inputs]
        if rows:
            columns = ("channels made by", "before", "after", "constant")
            width = 4 if any(s.constant for s in self.couplings) else 3
            parts.append(tables.render(columns[:width], [row[:width] for row in rows]))
        if self.left_alone:
            rest = [(left.name, str(left.count), left.reason) for left in self.left_alone]
            parts.append(tables.render(("left alone", "channels", "because"), rest, left=3))
        parts.append(f"Outputs differ by at most {self.error:.1e} of the largest ({self.checked_in}).")
        return "\n\n".join(parts)


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}" if after else "—"
