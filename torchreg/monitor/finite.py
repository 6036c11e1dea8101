"""What a log tells of values that are NaN or infinite."""

from __future__ import annotations

import math

from torchreg.monitor.log import Log
from torchreg.monitor.report import SparsityReport

LOSS = "loss/data"
"""The scalar that the loss is logged as."""


def nonfinite(log: Log, report: SparsityReport) -> str:
    """What is not finite, with the first tensor's name in the model's order; empty if loss and weights are finite.

    Gradients are told of only beside those: of a step that a GradScaler has skipped they are infinite, as they should.
    """
    loss = next((float(value) for tag, value in log.received("scalar") if tag == LOSS), 0.0)
    found = [f"the loss is {loss}"] if not math.isfinite(loss) else []
    weights = [entry.name for entry in report.tensors if not math.isfinite(entry.l1_norm)]
    if not found and not weights:
        return ""
    gradients = [name for name, largest in log.received("gradient") if not math.isfinite(largest)]
    for what, names in (("the gradient of", gradients), ("the weight", weights)):
        if names:
            more = f" and {len(names) - 1} more of {len(log.shapes)}" if len(names) > 1 else ""
            found.append(f"{what} {names[0]!r}{more} {'are' if more else 'is'} not finite")
    return f"At step {log.step} {', '.join(found)}."
