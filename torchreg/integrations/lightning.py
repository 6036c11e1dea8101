"""Penalties in Lightning's Trainer, by a callback (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.writers import MetricsWriter, writer_of
from torchreg.penalties import Penalty

_lightning = required("lightning.pytorch", "lightning", "pytorch_lightning")

__all__ = ["RegularizationCallback"]


class RegularizationCallback(_lightning.Callback):  # type: ignore[name-defined]
    """Penalises a LightningModule's parameters, without a change in the module.

    It attaches to the optimizers of ``configure_optimizers`` when the fit starts, inside Lightning's wrappers: gradient
    accumulation, clipping, mixed precision and skipped steps leave the strength as it is. It logs through all loggers
    of the trainer (a TensorBoard logger gets pictures and histograms too, if ``monitor`` asks for them), and
    ``sparsity/total`` is a metric that other callbacks may monitor. Regularizer, schedules and targets are in the
    checkpoints, which load with ``weights_only=True``.

    Args:
        rules: a penalty; a mapping from globs (or the other selectors of `torchreg.Regularizer`) to penalties; or a
            Regularizer of the module. Names are the module's own, such as ``"net.0.weight"``.
        route: ``"hook"``, ``"proximal"`` or ``"groups"``; see `torchreg.integrations.Regularization`.
        schedule: a function of the optimizer (of the regularizer for the route ``"hook"``) that returns a schedule or a
            `torchreg.TargetSparsity`, or several.
        every: optimizer steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`.
        reprox: whether an average that one of Lightning's callbacks keeps (``WeightAveraging``, ``EMAWeightAveraging``)
            gets the zeros of the weights (`torchreg.reprox`) when the training ends. This one goes before it.

    Attributes:
        regularization: the `Regularization` that does the work.

    In a LightningCLI's file the class is ``torchreg.integrations.lightning.RegularizationCallback``, and penalties and
    schedules are given by ``class_path`` and ``init_args``.

    Raises:
        ImportError: on import, if Lightning is missing.
        ValueError, TypeError: as `Regularization`, the latter's ``attach`` included, when the fit starts.
    """

    def __init__(
        self,
        rules: Penalty | Mapping[str, Penalty | None] | Any | None = None,
        route: str = "hook",
        schedule: Callable[[Any], Any] | None = None,
        every: int = 100,
        monitor: dict[str, Any] | None = None,
        reprox: bool = False,
    ) -> None:
        super().__init__()
        self.regularization = Regularization(rules, route=route, schedule=schedule, every=every, monitor=monitor)
        self.reprox = reprox

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers."""
        strategy = trainer.strategy
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        old = list(strategy.optimizers)
        found = self.regularization.attach(
            pl_module,
            old,
            lr_schedulers=schedulers,
            writer=writer_of(map(_writer, trainer.loggers)) if trainer.is_global_zero else None,
            watch=False,
        )
        if any(new is not before for new, before in zip(found, old, strict=True)):
            strategy.optimizers = found

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, if the optimizer has made a step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        report = self.regularization.watch(loss)
        if report is not None:
            pl_module.log("sparsity/total", report.fraction, logger=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last log, and let go of the optimizers."""
        self.regularization.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the optimizers."""
        with suppress(Exception):  # the first error is the one to see
            self.regularization.detach()

    def state_dict(self) -> dict[str, Any]:
        """See `Regularization.state_dict`."""
        return self.regularization.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Regularization.load_state_dict`."""
        self.regularization.load_state_dict(state_dict)


def _writer(logger: Any) -> Any:
    """A logger's own SummaryWriter, if it has one, or what hands numbers to it."""
    experiment = logger.experiment
    if callable(getattr(experiment, "add_histogram_raw", None)):
        return experiment
    return MetricsWriter(lambda metrics, step: logger.log_metrics(metrics, step=step))
