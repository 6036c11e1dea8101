"""Penalties in skorch's nets, by a callback (extra ``skorch``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.monitor import sparsity

_skorch = required("skorch.callbacks", "skorch")

__all__ = ["RegularizationCallback"]


class RegularizationCallback(_skorch.Callback):  # type: ignore[name-defined]
    """Penalises the module of a skorch net.

    It attaches to ``net.optimizer_`` when the training begins. Its arguments are parameters of the net as skorch's
    callbacks' are, so that a grid search may choose the strength:
    ``net.set_params(callbacks__regularization__rules=L1(1e-3))`` for a callback named ``"regularization"``.

    The state is ``net.regularization_``: ``net.save_params(f_params=..., f_optimizer=..., f_regularization=...)`` saves
    it, as does ``Checkpoint(f_regularization=...)``. To resume, let ``LoadInitState`` come after this callback in the
    net's list; or call `attach` after ``net.initialize()``, then ``net.load_params``.

    Args:
        rules: a penalty, or rules as `torchreg.Regularizer` takes them for ``net.module_``.
        route: ``"hook"``, ``"proximal"`` or ``"groups"``; see `torchreg.integrations.Regularization`. With
            ``"proximal"`` put the callback before skorch's ``LRScheduler``.
        schedule: a function of the optimizer (of the regularizer for the route ``"hook"``) that returns a schedule or a
            `torchreg.TargetSparsity`, or several.
        every: optimizer steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`.
        writer: what the monitor writes to, such as the SummaryWriter that skorch's TensorBoard callback has; or None.

    The fraction of exact zeros is in the net's history as ``sparsity``, one number for each epoch.

    Raises:
        ImportError: on import, if skorch is missing.
        ValueError, TypeError: as `Regularization` and its ``attach``, when the training begins.
    """

    def __init__(
        self,
        rules: Any = None,
        route: str = "hook",
        schedule: Callable[[Any], Any] | None = None,
        every: int = 100,
        monitor: Mapping[str, Any] | None = None,
        writer: Any = None,
    ) -> None:
        self.rules = rules
        self.route = route
        self.schedule = schedule
        self.every = every
        self.monitor = monitor
        self.writer = writer

    def initialize(self) -> RegularizationCallback:
        """Called when the net is initialised: what it has learnt is forgotten."""
        self.fresh_ = True
        return self

    def attach(self, net: Any) -> None:
        """Attach to the optimizer of an initialised net, unless it is attached to it already.

        Raises:
            ValueError: if another callback is.
        """
        old = getattr(net, "regularization_", None)
        if old is not None and old.is_attached_to(net.optimizer_):
            if old is not getattr(self, "made_", None):
                raise ValueError("The net has a RegularizationCallback already: give all rules to one, as a mapping.")
            return
        new = Regularization(
            self.rules, route=self.route, schedule=self.schedule, every=self.every, monitor=self.monitor
        )
        if old is not None:
            old.detach()
            if not getattr(self, "fresh_", True):  # a copied net goes on
                new.load_state_dict(old.state_dict())
                if self.route == "proximal":
                    new.adopt(net.module_, net.optimizer_)
        found = new.attach(net.module_, [net.optimizer_], writer=self.writer, watch=False)
        (net.optimizer_,), net.regularization_, self.fresh_ = found, new, False
        self.made_ = new

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Attach to the optimizer."""
        self.attach(net)

    def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        """Log, if the optimizer has made a step."""
        if training:
            net.regularization_.watch(kwargs.get("loss"))

    def on_epoch_end(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        """Write the fraction of zeros into the history."""
        net.history.record("sparsity", sparsity(net.regularization_.regularizer or net.module_).fraction)

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Write the last log. The penalty stays for a ``partial_fit``."""
        if net.regularization_.monitor is not None:
            net.regularization_.monitor.close()
