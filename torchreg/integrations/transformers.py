"""Penalties in Hugging Face's Trainer, by a callback that also makes its optimizer (extra ``transformers``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg.integrations.regularization import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.writers import MetricsWriter

_transformers = required("transformers", "transformers")
_callbacks = required("transformers.trainer_callback", "transformers")

__all__ = ["RegularizationCallback"]

_UNDECAYED = ("bias", "norm")
"""Parts of the names of parameters that the Trainer gives no weight decay."""


class RegularizationCallback(_callbacks.TrainerCallback, _callbacks.ExportableState):  # type: ignore[name-defined]
    """Penalises a model's parameters in a ``transformers.Trainer``.

    It attaches to the optimizer inside Accelerate's wrapper when the training begins: gradient accumulation, clipping,
    mixed precision and skipped steps leave the strength as it is. Its state is in each checkpoint's
    ``trainer_state.json``, as plain numbers, and a resumed training goes on with it.

    For exact zeros give the route ``"proximal"``, and to the Trainer the `optimizer` of this callback as its
    ``optimizer_cls_and_kwargs``: it builds its optimizer before any callback runs.

    Args:
        rules: a penalty, rules as `torchreg.Regularizer` takes them, or a Regularizer of the model; None with the route
            ``"groups"``.
        route: ``"hook"``, ``"groups"``, or ``"proximal"`` with `optimizer`; see `torchreg.integrations.Regularization`.
        schedule: a function of the optimizer (of the regularizer for the route ``"hook"``) that returns a schedule or a
            `torchreg.TargetSparsity`, or several.
        every: optimizer steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`.
        writer: what the monitor writes to: a SummaryWriter, a ``TensorBoardCallback``, whose writer is shared, or None.
            `add_to` finds the trainer's own.

    Attributes:
        regularization: the `Regularization` that does the work.

    Raises:
        ImportError: on import, if transformers is missing.
        ValueError, TypeError: as `Regularization`, the latter's ``attach`` included, when the training begins.
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
        super().__init__()
        self.regularization = Regularization(rules, route=route, schedule=schedule, every=every, monitor=monitor)
        self.writer = writer
        kind = type(self)

        def again(new: RegularizationCallback) -> None:
            new.__dict__.update(self.__dict__)

        # With `restore_callback_states_from_checkpoint` the Trainer replaces the callback by type(callback)().
        self.__class__ = type(kind.__name__, (kind,), {"__init__": again, "__module__": kind.__module__})

    def optimizer(self, kind: type[Optimizer], args: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
        """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, for an optimizer with exact zeros.

        Args:
            kind: a class of optimizers: one of torch's, which is wrapped in `torchreg.Proximal`, or one of torchreg's,
                such as `torchreg.ProxAdamW`.
            args: the trainer's TrainingArguments, for the learning rate, the weight decay (which biases and norms are
                spared, as the Trainer does) and Adam's β and ε.
            options: more arguments for the class, which come before those.

        Raises:
            ValueError: if the callback's route is not ``"proximal"``.
        """
        if self.regularization.route != "proximal":
            raise ValueError(f"Expected the route 'proximal' for an optimizer, got {self.regularization.route!r}.")
        settings = {**_settings(kind, args), **options}

        def factory() -> Callable[..., Optimizer]:
            def build(model: nn.Module, **kwargs: Any) -> Optimizer:
                optimizer = kind(_groups(model, kwargs.pop("weight_decay", 0.0)), **kwargs)
                return self.regularization.made_proximal(model, optimizer)

            return build

        return factory, settings

    def add_to(self, trainer: Any) -> RegularizationCallback:
        """Add it to a trainer, and log where that does: by its TensorBoardCallback's writer, or by ``trainer.log``."""
        trainer.add_callback(self)
        kind = _transformers.integrations.TensorBoardCallback
        boards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]
        if self.writer is None:
            self.writer = boards[0] if boards else MetricsWriter(lambda metrics, step: trainer.log(metrics))
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer, and go on where a checkpoint was saved."""
        self.regularization.detach()  # after a training that raised
        if state.global_step:
            self.regularization.load_state_dict(_tensors(_saved(state, type(self).__name__)))
        optimizer = kwargs["optimizer"]
        if self.regularization.route == "proximal" and not _penalized(optimizer):
            raise ValueError(
                "The route 'proximal' needs an optimizer of the callback's: "
                "Trainer(optimizer_cls_and_kwargs=callback.optimizer(torch.optim.AdamW, args))."
            )
        writer = _Shared(self.writer) if hasattr(self.writer, "tb_writer") else self.writer
        self.regularization.attach(kwargs["model"], [optimizer], writer=writer if state.is_world_process_zero else None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last log while TensorBoard's writer is open."""
        if control.should_training_stop and self.regularization.monitor is not None:
            self.regularization.monitor.close()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_step_end`."""
        self.on_step_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self.regularization.detach()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in its checkpoints."""
        return {"args": {}, "attributes": {"saved": _plain(self.regularization.state_dict())}}


class _Shared:
    """The writer of a TensorBoardCallback, which has one only during the training."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def __getattr__(self, name: str) -> Any:
        writer = self.__dict__["_callback"].tb_writer
        return getattr(writer, name) if writer is not None else lambda *args, **kwargs: None


def _settings(kind: type[Optimizer], args: Any) -> dict[str, Any]:
    """What the TrainingArguments say of the optimizer, as far as it knows that."""
    if args is None:
        return {}
    known = inspect.signature(kind).parameters
    settings = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return {name: value for name, value in settings.items() if name in known}


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The param groups of the Trainer: with weight decay, and without."""
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()}
    groups: dict[float, list[Tensor]] = {weight_decay: [], 0.0: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = id(p) in norms or any(part in name.lower() for part in _UNDECAYED)
            groups[0.0 if exempt else weight_decay].append(p)
    return [{"params": some, "weight_decay": decay} for decay, some in groups.items() if some]


def _penalized(optimizer: Any) -> bool:
    return any(group.get("penalty") is not None for group in optimizer.param_groups)


def _saved(state: Any, name: str) -> Any:
    """The callback's entry in a loaded TrainerState."""
    entry = state.stateful_callbacks.get(name, {})
    if not isinstance(entry, Mapping):
        raise ValueError(f"The checkpoint is of {len(entry)} callbacks named {name}; only one can be resumed.")
    return entry.get("attributes", {}).get("saved") or {}


def _plain(value: Any) -> Any:
    """A state in JSON's types; numbers keep all their digits."""
    if isinstance(value, Tensor):
        return {"tensor": value.detach().double().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> Any:
    """The state that `_plain` was given."""
    if isinstance(value, Mapping):
        if set(value) == {"tensor", "dtype"}:
            return torch.tensor(value["tensor"], dtype=torch.float64).to(getattr(torch, value["dtype"]))
        return {key: _tensors(entry) for key, entry in value.items()}
    return [_tensors(entry) for entry in value] if isinstance(value, list) else value
