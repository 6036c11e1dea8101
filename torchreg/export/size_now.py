"""How large a model would be if it were compacted now: for looking on while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchreg import unsettled
from torchreg.assignments import unwrapped
from torchreg.coupling import coupled_groups
from torchreg.coupling.heads import Attention, declared
from torchreg.coupling.probe import Probe
from torchreg.coupling.stand_ins import Example, private_copy, undisturbed
from torchreg.export import equality
from torchreg.export.compaction import usable_couplings
from torchreg.export.removable import removable
from torchreg.export.surgery import without


class CompactedSize:
    """Parameters and FLOPs of a model if `compact` took it now, for ``SparsityMonitor(..., measures=...)``.

    What hangs together is found once. A call copies the model, cuts what is zero out of the copy and counts; no outputs
    are compared and no latency is measured, so that it takes about as long as a few steps.

    Args:
        model: the model that is trained.
        example_input: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        ignore: globs on the names of layers whose out-channels shall stay.
        heads: how attention modules other than `torch.nn.MultiheadAttention` name their parts; see `compact`.

    Raises:
        ImportError: if torch-pruning is missing.
        TypeError: if an argument is not what it should be.
        ValueError: if the model can't be traced.

    >>> import torch
    >>> from torchreg.export import CompactedSize
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> size = CompactedSize(model, torch.randn(3, 4))
    >>> size()
    {'parameters': 58, 'flops': 288}
    >>> with torch.no_grad():
    ...     model[0].weight[2:], model[0].bias[2:] = 0, 0
    >>> size()
    {'parameters': 16, 'flops': 72}
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        ignore: Sequence[str] = (),
        heads: Mapping[str, Attention] | None = None,
    ) -> None:
        couplings = coupled_groups(model, example_input, ignore, heads)
        self._model, self._example = unwrapped(model), Example.of(example_input)
        self._described = declared(self._model, heads)
        self._usable, _ = usable_couplings(self._model, couplings, self._described)

    def __call__(self) -> dict[str, float]:
        """``{"parameters": ..., "flops": ...}`` as of now."""
        unsettled.settle(self._model.parameters())
        with undisturbed(self._example):
            gone = removable(self._model, self._usable, Probe(private_copy(self._model), self._example))
        cuts = [(c, dead) for c, dead in zip(self._usable, gone, strict=True) if bool(dead.any())]
        small = without(self._model, cuts, self._described, select=False)
        return {"parameters": equality.parameters(small), "flops": equality.flops(small, self._example)}
