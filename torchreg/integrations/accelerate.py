"""Penalties that Accelerate saves, loads and logs (extra ``accelerate``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.writers import MetricsWriter, writer_of

required("accelerate", "accelerate")

__all__ = ["AcceleratedRegularization"]


class AcceleratedRegularization(Regularization):
    """Penalties in a loop with an ``accelerate.Accelerator``: attached, saved with its states, logged by its trackers.

    Make it after ``accelerator.prepare``; nothing else in the loop changes. It attaches to the optimizer inside
    Accelerate's wrapper, so that gradient accumulation, clipping, mixed precision and skipped steps leave the strength
    as it is, and is registered for checkpointing: ``save_state`` and ``load_state`` keep penalties, schedules and
    targets. What the monitor measures goes to all trackers; a TensorBoard tracker gets pictures and histograms too.

    For exact zeros build the optimizer from `torchreg.Regularizer.param_groups` (as `torchreg.ProxAdamW`, or any in
    `torchreg.Proximal`) before it is prepared, and take the route ``"groups"`` with that regularizer as the rules.

    Args:
        accelerator: the Accelerator.
        model: whose parameters are penalised, prepared or not.
        optimizer: the prepared optimizer.
        rules: a penalty, rules as `torchreg.Regularizer` takes them, or a Regularizer of the model.
        route: ``"hook"`` or ``"groups"``; see `torchreg.integrations.Regularization`.
        schedule: a function of the optimizer (of the regularizer for the route ``"hook"``) that returns a schedule or a
            `torchreg.TargetSparsity`, or several.
        every: optimizer steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`.
        watch: False if the loop calls ``watch(loss)`` after its steps, to have the data's loss in the logs.

    Raises:
        ImportError: on import, if accelerate is missing.
        ValueError, TypeError: as `Regularization` and its ``attach``; the route ``"proximal"`` is refused.

    Call ``detach()`` before ``accelerator.end_training()``: it writes the last log.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        rules: Any = None,
        *,
        route: str = "hook",
        schedule: Callable[[Any], Any] | None = None,
        every: int = 100,
        monitor: Mapping[str, Any] | None = None,
        watch: bool = True,
    ) -> None:
        super().__init__(rules, route=route, schedule=schedule, every=every, monitor=monitor)
        if route == "proximal":
            raise ValueError(
                "The route 'proximal' would replace the prepared optimizer: build it from Regularizer.param_groups() "
                "before accelerator.prepare(), and use the route 'groups'."
            )
        main = accelerator.is_main_process
        self.attach(model, [optimizer], writer=_Trackers(accelerator) if main else None, watch=watch)
        accelerator.register_for_checkpointing(self)


class _Trackers:
    """The accelerator's trackers as a writer: those of now, since they may be initialised after this is made."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._made: list[Any] = []
        self._writer: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        trackers = list(self._accelerator.trackers)
        if trackers != self._made:
            self._made, self._writer = trackers, writer_of(map(_writer, trackers))
        return getattr(self._writer, name, _nothing)


def _writer(tracker: Any) -> Any:
    """A tracker's own SummaryWriter, if it has one, or what hands numbers to it."""
    inner = getattr(tracker, "tracker", None)
    if callable(getattr(inner, "add_histogram_raw", None)):
        return inner
    return MetricsWriter(lambda metrics, step: tracker.log(metrics, step=step))


def _nothing(*_: Any, **__: Any) -> None:
    pass
