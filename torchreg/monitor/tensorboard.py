"""Sparsity in TensorBoard, while the training runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from torchreg.monitor.counting import changed, counted_all, largest, named_weights, which_weights
from torchreg.monitor.finite import nonfinite
from torchreg.monitor.guarded import GuardedWriter, check_writer, warn
from torchreg.monitor.layout import layout
from torchreg.monitor.living import group_sparsity, has_groups, living_groups
from torchreg.monitor.log import STRENGTH_SCALE, Log
from torchreg.monitor.pictures import Barcode, Histogram, enlarged, mask_image, nonzero_histogram
from torchreg.monitor.report import SparsityReport, sparsity
from torchreg.monitor.text import groups_text, penalties_text, sparsity_text
from torchreg.monitor.transfer import Transfer
from torchreg.sharding import local, whole


class SparsityMonitor:
    """Writes to TensorBoard how sparse a model is.

    Call ``step()`` after each optimizer step. Every ``every`` steps, and when it is closed, it logs:

    - ``sparsity/total`` and ``sparsity/<parameter>``: the fraction of exact zeros;
    - ``loss/data`` (where a loss is given) and ``loss/penalty`` (for a `Regularizer`);
    - where a proximal optimizer is given, ``strength_scale/group<i>``, which schedules and targets move, and
      ``threshold/group<i>``: the modulus up to which the last proximal step gave zero, lr·G·λ (not in Adam's metric and
      the like, where each weight has its own);
    - ``zeros/new`` and ``zeros/revived``: how many weights became zero, and left zero, since the last log;
    - for a `Regularizer` with group penalties ``groups/<parameter>``, how many groups are not zero, and with ``images``
      ``barcode/<parameter>``: a column for each group and a row for each log, white where it was alive.

    A log is one transfer from the device to the host; between logs nothing is read and nothing waits. One byte per
    weight on the device tells which were zero.

    With an ``optimizer`` whose fused step counts the zeros on its way (`ProxSGD`, `ProxAdamW`), logs take its counts:
    no pass over the weights, no bytes kept, and on a GPU no wait either: a log is written with the next one, or by
    ``flush``.
    ``zeros/new`` and ``zeros/revived`` then count every change of every step, and reports have no rows and columns,
    except those of ``log()``. Such an optimizer is for one monitor, which resets its counts.

    A log that finds the loss or a weight NaN or infinite warns once, with the first such tensor's name in the model's
    order, and the first such gradient's where gradients are still there; ``every=1`` tells the very step.

    A writer that fails never stops the training. After an OSError (full disk, closed writer) nothing more is written;
    after another error of one of its methods, that method is called no more. Each is reported once, as a warning.

    Args:
        source: a `Regularizer` (its penalised parameters are watched), a module (all its parameters), or anything
            else that `torchreg.sparsity` takes, such as ``model.named_parameters()``.
        writer: any object with ``add_scalar(tag, value, step)``, such as torch's or tensorboardX's SummaryWriter; its
            method ``end_log(step)``, if it has one, is called after the last number of each log. The monitor flushes it
            when it is closed; closing it is its owner's task. None writes nothing: of several
            processes all have a monitor, since sharded weights are counted by all, and one of them the writer.
        every: steps between logs.
        optimizer: the optimizer whose proximal steps' thresholds are logged, and whose counts are used.
        histograms: also log histograms of the non-zero weights (``weights/<parameter>``).
        images: also log images of the masks (``mask/<parameter>``): white where weights are, black for zeros.
        custom_scalars: also write a layout for TensorBoard's Custom Scalars page. TensorBoard keeps only the last
            layout of a run: leave it off where you write your own.
        text: also write tables for TensorBoard's Text page: ``torchreg/penalties`` with the first log (for a
            `Regularizer`), and when the monitor is closed ``torchreg/sparsity`` and ``torchreg/groups``.
        measures: more to log, by tag: functions that return a number, or a dict of them for several tags below that
            one, such as ``{"compacted": torchreg.export.CompactedSize(model, x)}``. One that fails is left out from
            then on, with a warning.
        weights: which weights are watched, if not those that are trained: a word, such as ``"averaged"``, that all tags
            then begin with (``averaged/sparsity/total``) and that the reports have. A
            ``torch.optim.swa_utils.AveragedModel`` is called so by itself.

    Raises:
        TypeError: if the writer has no method for what it is asked to log, the source holds no tensors, or a measure
            can't be called.
        ValueError: if ``every`` is not a positive integer, or a tensor holds no values (on the meta device).

    >>> import torch, torchreg
    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, round(value, 3))
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> monitor = torchreg.SparsityMonitor(model, Printer(), every=1)
    >>> monitor.step(loss=0.5)
    1 sparsity/total 1.0
    1 sparsity/weight 1.0
    1 zeros/new 0
    1 zeros/revived 0
    1 loss/data 0.5
    """

    def __init__(
        self,
        source: Any,
        writer: Any,
        *,
        every: int = 100,
        optimizer: Any = None,
        histograms: bool = False,
        images: bool = False,
        custom_scalars: bool = False,
        text: bool = False,
        measures: Mapping[str, Callable[[], float | Mapping[str, float]]] | None = None,
        weights: str | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Expected `every` to be a positive integer, got {every!r}.")
        check_writer(writer, histograms=histograms, images=images, custom_scalars=custom_scalars, text=text)
        self.source: Any = list(source) if isinstance(source, Iterator) else source
        self.writer = writer
        self._guard = GuardedWriter(writer)
        self.every = every
        self.optimizer = optimizer
        self.histograms = histograms
        self.measures = _checked_measures(measures)
        self.images = images
        self.text = text
        self.weights = which_weights(self.source) if weights is None else str(weights)
        self.steps = 0
        self.report: SparsityReport | None = None
        self._logged_at = -1
        self._ended_at = 0
        self._told = self._introduced = False
        self._loss: Tensor | float | None = None
        self._pending: tuple[Log, Transfer] | None = None
        watched = list(named_weights(self.source))
        if not watched:
            raise TypeError("There is no floating point parameter to watch.")
        self._were_zero, _ = changed({}, watched)
        self._barcodes: dict[str, Barcode] = {}
        if custom_scalars:
            threshold = hasattr(optimizer, "effective_step")
            chosen = layout(self.weights, threshold=threshold, groups=has_groups(self.source))
            self._write("add_custom_scalars", chosen)

    def step(self, loss: Tensor | float | None = None) -> None:
        """Count an optimizer step, and log when it is time.

        Args:
            loss: the data's loss of this step, without the penalty. It is read only when it is logged.

        Raises:
            ValueError: if the loss is a tensor of several elements.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"Expected `loss` to be one number, got a tensor of the shape {tuple(loss.shape)}.")
        self.steps += 1
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        if self.steps % self.every == 0:
            self._begin(quick=True)

    def log(self) -> SparsityReport:
        """Log now, and return the counts (they are also kept as ``monitor.report``)."""
        self._begin(quick=False)
        self.flush()
        assert self.report is not None
        return self.report

    def flush(self) -> None:
        """Write the log that is on its way from the device, if there is one, and flush the writer."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._finish(*pending)
        if self._guard.can("flush"):
            self._write("flush")

    @torch.no_grad()
    def _begin(self, quick: bool) -> None:
        """Ask for all that a log needs, and write it when it has arrived: at once, or with the next log.

        Args:
            quick: take what the optimizer's step has counted instead of counting again.
        """
        log = Log(self.steps, self.weights)
        weights = list(named_weights(self.source))
        self._ask_counts(log, {id(w): name for name, w in weights})
        log.shapes = {name: tuple(w.shape) for name, w in weights}
        passed = [(name, w) for name, w in weights if not quick or name not in log.positions]
        for (name, _), counts in zip(passed, counted_all([w for _, w in passed]), strict=True):
            log.ask("weight", name, counts)
        uncounted = [(name, w) for name, w in weights if name not in log.positions]
        before = {name: was for name, was in self._were_zero.items() if name not in log.earlier}
        self._were_zero, changes = changed(before, uncounted)
        log.ask("changes", "", changes)
        for tag, value in self._scalars(log if quick else None):
            log.ask("scalar", tag, _tensor(value))
        if has_groups(self.source):
            for name, _, alive in living_groups(self.source):
                log.ask("groups", name, alive)
        for name, w in weights:
            if isinstance(w.grad, Tensor) and w.grad.layout == torch.strided and local(w.grad).numel():
                log.ask("gradient", name, largest(local(w.grad)))
            if self.histograms or self.images:
                w = whole(w)
            if self.histograms:
                log.ask("histogram", name, nonzero_histogram(w))
            if self.images and w.ndim >= 2 and w.numel():
                log.ask("mask", name, mask_image(w))
        log.measured = dict(self._measured())
        self._logged_at = self.steps
        transfer = Transfer(list(log.asked.values()), wait=not log.positions)
        if self._pending is not None:
            self._finish(*self._pending)
        self._pending = log, transfer
        if transfer.arrived:
            self._pending = None
            self._finish(log, transfer)

    def _finish(self, log: Log, transfer: Transfer) -> None:
        log.take(transfer.tensors())
        self.report = log.report()
        message = nonfinite(log, self.report)
        if message and not self._told:
            warn(f"{message} The training goes on; it is said once.")
        self._told = bool(message)
        self._scalar(log, "sparsity/total", self.report.fraction)
        for tensor in self.report.tensors:
            self._scalar(log, f"sparsity/{tensor.name}", tensor.fraction)
        new, revived = log.changes()
        self._scalar(log, "zeros/new", new)
        self._scalar(log, "zeros/revived", revived)
        for tag, value in log.received("scalar"):
            self._scalar(log, tag, float(value))
        if log.penalties:
            self._scalar(log, "loss/penalty", log.penalty())
        for tag, measured in log.measured.items():
            self._scalar(log, tag, measured)
        for name, alive in log.received("groups"):
            self._scalar(log, f"groups/{name}", int(alive.sum()))
            if self.images and len(alive):
                barcode = self._barcodes.setdefault(name, Barcode(len(alive)))
                barcode.add(alive)
                self._write("add_image", log.tag(f"barcode/{name}"), barcode.image(), log.step, dataformats="HWC")
        for name, vector in log.received("histogram"):
            self._histogram(log, f"weights/{name}", Histogram.from_vector(vector))
        for name, picture in log.received("mask"):
            self._write("add_image", log.tag(f"mask/{name}"), enlarged(picture), log.step, dataformats="HWC")
        if self.text and not self._introduced:
            self._introduced = True
            self._text("penalties", penalties_text(self.source), log.step)
        if self._guard.can("end_log"):
            self._write("end_log", log.step)

    def hparams(self, hparams: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write a row of TensorBoard's HParams page into this very run (torch's default makes a run of its own).

        Call it last, after the monitor is closed: the row is a file of its own in the run, and a TensorBoard that has
        gone on to it reads nothing more from the file before.

        Args:
            hparams: settings by name; what is no bool, string or number is written as text.
            metrics: final results by name.

        Raises:
            TypeError: if a metric is no number, or the writer has no ``add_hparams``.
        """
        if not hasattr(self.writer, "add_hparams"):
            raise TypeError(f"The writer {type(self.writer).__name__} has no method add_hparams.")
        plain = {k: v if isinstance(v, (bool, str, int, float)) else str(v) for k, v in hparams.items()}
        results = {name: _number(name, value) for name, value in metrics.items()}
        known = inspect.signature(self.writer.add_hparams).parameters
        place: dict[str, Any] = {"run_name": "."} if "run_name" in known else {"name": "."} if "name" in known else {}
        if "global_step" in known:
            place["global_step"] = self.steps  # the results' dots stand where the curves end
        self._write("add_hparams", plain, results, **place)

    def close(self) -> None:
        """Log the last steps if they are not logged yet, write the final tables, and flush the writer."""
        if self.steps > self._logged_at and self.steps > 0:
            self._begin(quick=True)
        self.flush()
        if self.text and self.steps > self._ended_at:
            self._ended_at = self.steps
            self._text("sparsity", sparsity_text(sparsity(self.source)), self.steps)
            if has_groups(self.source):
                self._text("groups", groups_text(group_sparsity(self.source)), self.steps)
            self.flush()

    def __enter__(self) -> SparsityMonitor:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(Exception) if error is not None else nullcontext():  # the first error is the one to see
            self.close()

    def state_dict(self) -> dict[str, int]:
        """The number of steps: a resumed run goes on along the same axis."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over the number of steps; zeros are compared with the weights of now.

        Raises:
            ValueError: if it is not the state of a monitor.
        """
        if not isinstance(state, Mapping) or set(state) != {"steps"}:
            raise ValueError(f"Expected the state of a SparsityMonitor, with the key 'steps', got {state!r:.200}.")
        self.steps = self._logged_at = self._ended_at = int(state["steps"])
        self._were_zero, _ = changed({}, list(named_weights(self.source)))

    def _ask_counts(self, log: Log, names: Mapping[int, str]) -> None:
        """Ask for what the optimizer's last step counted, if it did, of the weights that have a name, by id."""
        counts = getattr(self.optimizer, "step_counts", _nothing)()
        if counts is None:
            return
        for i, rows in enumerate(counts.take_counts()):
            log.ask("counts", str(i), rows)
        log.positions = {names[id(p)]: row for row, p in enumerate(counts.counted()) if id(p) in names}
        for i, (rows, sums) in enumerate(counts.take_changes()):
            log.ask("earlier", str(i), sums)
            log.earlier |= {names[p]: (str(i), row) for p, row in rows.items() if p in names}

    def _scalars(self, log: Log | None) -> Iterator[tuple[str, Tensor | float]]:
        if self._loss is not None:
            yield "loss/data", self._loss
        if hasattr(self.source, "penalized"):
            if log is not None and log.can_sum(list(self.source.penalized())):
                yield STRENGTH_SCALE, self.source.strength_scale
            else:
                yield "loss/penalty", self.source()
        effective_step = getattr(self.optimizer, "effective_step", None)
        if effective_step is not None:
            for i, group in enumerate(self.optimizer.param_groups):
                if group["penalty"] is None:
                    continue
                yield f"strength_scale/group{i}", group["strength_scale"]
                step = effective_step(group)
                if step is not None:
                    yield f"threshold/group{i}", group["penalty"].threshold(step)

    def _measured(self) -> Iterator[tuple[str, float]]:
        for tag, measure in list(self.measures.items()):
            try:
                found = measure()
                values = {f"{tag}/{k}": v for k, v in found.items()} if isinstance(found, Mapping) else {tag: found}
                yield from [(name, _number(name, value)) for name, value in values.items()]
            except Exception as error:
                del self.measures[tag]
                warn(
                    f"The measure {tag!r} failed ({type(error).__name__}: {error}); it is not logged any more, the "
                    "training goes on."
                )

    def _scalar(self, log: Log, tag: str, value: float) -> None:
        if tag != STRENGTH_SCALE:
            self._write("add_scalar", log.tag(tag), value, log.step)

    def _histogram(self, log: Log, tag: str, h: Histogram | None) -> None:
        if h is not None:
            moments = (h.least, h.greatest, h.count, h.total, h.total_squares)
            self._write("add_histogram_raw", log.tag(tag), *moments, h.limits, h.counts, log.step)

    def _text(self, name: str, text: str | None, step: int) -> None:
        if text:
            self._write(
                "add_text", f"{self.weights}/torchreg/{name}" if self.weights else f"torchreg/{name}", text, step
            )

    def _write(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._guard.call(method, *args, **kwargs)


def _nothing() -> None:
    return None


def _checked_measures(measures: Any) -> dict[str, Callable[[], Any]]:
    found = dict(measures or {})
    for tag, measure in found.items():
        if not callable(measure):
            raise TypeError(f"Expected the measure {tag!r} to be a function, got {type(measure).__name__}.")
    return found


def _tensor(value: Tensor | float) -> Tensor:
    return (
        value.detach().double().reshape(()) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    )


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for several elements
        pass
    raise TypeError(f"Expected the metric {name!r} to be a number, got {value!r}.")
