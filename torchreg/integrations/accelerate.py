"""Penalties that Accelerate saves, loads and logs, and its trackers as a writer (extra ``accelerate``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.writers import MetricsWriter, writer_of
from torchreg.monitor.text import markdown, table_of

_tracking = required("accelerate.tracking", "accelerate")

__all__ = ["AcceleratedRegularization", "TrackersWriter", "WriterTracker"]

_ONE_IMAGE = ("aim", "clearml")
"""Trackers whose ``log_images`` takes an image for each name; the others take lists of them."""


class AcceleratedRegularization(Regularization):
    """Penalties in a loop with an ``accelerate.Accelerator``: attached, saved with its states, logged by its trackers.

    Make it after ``accelerator.prepare``; nothing else in the loop changes. It attaches to the optimizer inside
    Accelerate's wrapper, so that gradient accumulation, clipping, mixed precision and skipped steps leave the strength
    as it is, and is registered for checkpointing: ``save_state`` and ``load_state`` keep penalties, schedules and
    targets. What the monitor measures goes to all trackers, as `TrackersWriter` says.

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
        self.attach(model, [optimizer], writer=TrackersWriter(accelerator), watch=watch)
        accelerator.register_for_checkpointing(self)


class TrackersWriter:
    """The trackers of an Accelerator as the writer of a `torchreg.SparsityMonitor`.

    A TensorBoard tracker's own SummaryWriter gets everything, in the run that ``accelerator.log`` writes to. The others
    get the numbers of a log together, by their ``log``; pictures and tables by ``log_images`` and ``log_table``, where
    they have them; and no histograms. Only the main process writes. The trackers are those of the moment: they may be
    initialised later.

    Args:
        accelerator: the Accelerator.

    >>> import accelerate, torch, torchreg
    >>> from torchreg.integrations.accelerate import TrackersWriter
    >>> accelerator = accelerate.Accelerator(cpu=True)
    >>> monitor = torchreg.SparsityMonitor(torch.nn.Linear(2, 2), TrackersWriter(accelerator), images=True)
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._made: list[Any] = []
        self._writer: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        trackers = list(self._accelerator.trackers) if self._accelerator.is_main_process else []
        if trackers != self._made:
            self._made, self._writer = trackers, writer_of(map(_writer, trackers))
        return getattr(self._writer, name, _nothing)


class WriterTracker(_tracking.GeneralTracker):  # type: ignore[name-defined]
    """A SummaryWriter of your own as a tracker: ``accelerator.log`` writes to it, and so do all that share it.

    Args:
        writer: a SummaryWriter of torch or tensorboardX; closing it is its owner's task. None on processes that are
            not the main one, which write nothing.

    >>> from accelerate import Accelerator
    >>> from torchreg.integrations.accelerate import WriterTracker
    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> accelerator = Accelerator(cpu=True, log_with=WriterTracker(Printer()))
    >>> accelerator.init_trackers("run")
    >>> accelerator.log({"loss": 0.5}, step=3)
    3 loss 0.5
    """

    name = "writer"
    requires_logging_directory = False

    def __init__(self, writer: Any) -> None:
        super().__init__()
        self.writer = writer

    @property
    def tracker(self) -> Any:
        """The writer: what ``accelerator.get_tracker("writer", unwrap=True)`` returns."""
        return self.writer

    @_tracking.on_main_process
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the settings as a table, ``config``."""
        rows = [(name, str(value)) for name, value in values.items()]
        self.writer.add_text("config", markdown(("setting", "value"), rows, left=2), 0)

    @_tracking.on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write numbers as scalars, strings as texts, and each entry of a dict below its tag."""
        for tag, value in values.items():
            if isinstance(value, Mapping):
                self.log({f"{tag}/{key}": entry for key, entry in value.items()}, step, **kwargs)
            elif isinstance(value, str):
                self.writer.add_text(tag, value, step, **kwargs)
            else:
                self.writer.add_scalar(tag, value, step, **kwargs)

    @_tracking.on_main_process
    def finish(self) -> None:
        """Flush the writer."""
        if hasattr(self.writer, "flush"):
            self.writer.flush()


class _TrackerWriter(MetricsWriter):
    """A tracker as a writer, as far as it can take what a monitor writes."""

    def __init__(self, tracker: Any) -> None:
        super().__init__(lambda metrics, step: tracker.log(metrics, step=step))
        self._tracker = tracker
        if hasattr(tracker, "log_images"):
            self.add_image = self._image
        if hasattr(tracker, "log_table"):
            self.add_text = self._table

    def _image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        self._tracker.log_images({tag: image if self._tracker.name in _ONE_IMAGE else [image]}, step=step)

    def _table(self, tag: str, text: str, step: int) -> None:
        columns, rows = table_of(text)
        self._tracker.log_table(tag, columns=columns, data=rows, step=step)


def _writer(tracker: Any) -> Any:
    """A tracker's own SummaryWriter, if it has one, or what hands the numbers to it."""
    inner = getattr(tracker, "tracker", None)
    return inner if callable(getattr(inner, "add_histogram_raw", None)) else _TrackerWriter(tracker)


def _nothing(*_: Any, **__: Any) -> None:
    pass
