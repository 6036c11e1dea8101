"""Penalties in Lightning's Trainer, by a callback (extra ``lightning``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torchreg.averaging import reprox
from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.writers import MetricsWriter, writer_of
from torchreg.penalties import Penalty
from torchreg.regularizer import Regularizer
from torchreg.schedules import StrengthScheduler
from torchreg.target import TargetSparsity

_lightning = required("lightning.pytorch", "lightning", "pytorch_lightning")

__all__ = ["RegularizationCallback"]


class RegularizationCallback(_lightning.Callback):  # type: ignore[name-defined]
    """Penalises a LightningModule's parameters, without a change in the module.

    It attaches to the optimizers of ``configure_optimizers`` when the fit starts, inside Lightning's wrappers: gradient
    accumulation, clipping, mixed precision and skipped steps leave the strength as it is. It logs through all loggers
    of the trainer (a TensorBoard logger gets pictures and histograms too, if ``monitor`` asks for them), and
    ``sparsity/total`` is a metric that other callbacks may monitor. Regularizer, schedules and targets are in the
    checkpoints, which load with ``weights_only=True``. Several callbacks, such as one for each network of a GAN, need
    names.

    Args:
        rules: a penalty; a mapping from globs (or the other selectors of `torchreg.Regularizer`) to penalties; or a
            Regularizer of the module. Names are the module's own, such as ``"net.0.weight"``.
        route: ``"hook"``, ``"proximal"`` or ``"groups"``; see `torchreg.integrations.Regularization`.
        schedule: a function of the optimizer (of the regularizer for the route ``"hook"``) that returns a schedule or a
            `torchreg.TargetSparsity`, or several.
        every: optimizer steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`.
        reprox: whether the average that a callback of Lightning keeps (``WeightAveraging``, ``EMAWeightAveraging``,
            ``StochasticWeightAveraging``) gets the exact zeros of the weights when the training ends, by
            `torchreg.reprox`. This callback goes before that one.
        name: of this callback among several: what it logs begins with it (``generator/sparsity/total``), and so does
            its state in a checkpoint.

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
        rules: Penalty | dict[Any, Penalty | None] | Regularizer | None = None,
        route: str = "hook",
        schedule: Callable[[Any], TargetSparsity] | Callable[[Any], StrengthScheduler] | None = None,
        every: int = 100,
        monitor: dict[str, Any] | None = None,
        reprox: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        watched = {"weights": name, **(monitor or {})} if name else monitor
        self.regularization = Regularization(rules, route=route, schedule=schedule, every=every, monitor=watched)
        self.reprox = reprox
        self.name = name

    @property
    def state_key(self) -> str:
        """What the state is called in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]" if self.name else type(self).__qualname__

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers.

        Raises:
            ValueError: see `Regularization.attach`; or if ``reprox`` finds no average, or one that comes first.
        """
        if self.reprox:
            self._check_averages(trainer)
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

    def _check_averages(self, trainer: Any) -> None:
        averages = _averages(trainer)
        if not averages:
            raise ValueError("`reprox=True` takes a callback that averages weights, such as WeightAveraging; got none.")
        if any(trainer.callbacks.index(averaging) < trainer.callbacks.index(self) for averaging in averages):
            raise ValueError("Place this callback before the one that averages weights: `reprox` needs the weights.")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, if the optimizer has made a step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        report = self.regularization.watch(loss)
        if report is not None:
            pl_module.log(self._tag("sparsity/total"), report.fraction, logger=False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the weights are averages: SWA's last epoch is for BatchNorm alone."""
        ends = [getattr(averaging, "swa_end", math.inf) for averaging in _averages(trainer)]
        if self.regularization.monitor is not None and any(trainer.current_epoch > end for end in ends):
            self.regularization.monitor.weights = self._tag("averaged")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Where weights are averaged, log before the averages take the place of the weights."""
        for averaging in _averages(trainer):
            if self.regularization.monitor is not None:
                self.regularization.monitor.close()
            if trainer.current_epoch == getattr(averaging, "swa_end", None):
                self._reprox(averaging, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last log, and let go of the optimizers."""
        for averaging in _averages(trainer):
            if not hasattr(averaging, "swa_end"):
                self._reprox(averaging, pl_module)
            elif self.reprox and trainer.current_epoch - 1 > averaging.swa_end:
                reprox(pl_module, averaging._average_model)  # Lightning makes a step in the epoch for BatchNorm
        self.regularization.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the optimizers."""
        with suppress(Exception):  # the first error is the one to see
            self.regularization.detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers after a fit with ``max_steps=0`` too, whose training has no end."""
        self.regularization.detach()

    def _tag(self, tag: str) -> str:
        return f"{self.name}/{tag}" if self.name else tag

    def _reprox(self, averaging: Any, pl_module: Any) -> None:
        if self.reprox:
            average = averaging._average_model
            reprox(average, self.regularization.regularizer or pl_module)

    def state_dict(self) -> dict[str, Any]:
        """See `Regularization.state_dict`."""
        return self.regularization.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Regularization.load_state_dict`."""
        self.regularization.load_state_dict(state_dict)


def _averages(trainer: Any) -> list[Any]:
    """The callbacks that put averages in the place of the weights when the training ends."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "_average_model")]


def _writer(logger: Any) -> Any:
    """A logger's own SummaryWriter, if it has one, or what hands numbers to it."""
    experiment = logger.experiment
    if callable(getattr(experiment, "add_histogram_raw", None)):
        return experiment
    return MetricsWriter(lambda metrics, step: logger.log_metrics(metrics, step=step))
