"""Train one network under each penalty, everything else equal: initial weights, batches, learning rates."""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchreg
from torchreg.cli.data import Dataset
from torchreg.cli.methods import Method, Settings

LOGS_PER_RUN = 10
SHOWN: dict[str, Any] = {"histograms": True, "images": True, "custom_scalars": True, "text": True}


@dataclass(frozen=True)
class Result:
    """What one run ended with.

    Attributes:
        accuracy: the fraction of the test samples that are classified correctly.
        sparsity: the fraction of the penalised weights that are exactly zero.
        inputs_used: inputs with at least one non-zero weight in the first layer.
        data_loss: the mean cross-entropy over all training data.
        objective: the data's loss plus the penalty.
        kkt_residual: the largest violation of the optimality conditions, in units of the strength. NaN after a refit,
            which leaves that problem.
        strength_scale: what the strengths of ``settings`` were multiplied with: 1, or, with a target, the median over
            the second half of the steps of what held it.
        step_time: the median of a training step, in seconds.
    """

    seed: int
    accuracy: float
    sparsity: float
    inputs_used: int
    l1_norm: float
    l2_norm: float
    largest_weight: float
    data_loss: float
    objective: float
    kkt_residual: float
    strength_scale: float
    step_time: float


@dataclass(frozen=True)
class Run:
    """A finished run: its result before and after a refit, and the last weights of its layers, the first's first."""

    result: Result
    refitted: Result | None
    weights: list[Tensor]


def train(
    method: Method, data: Dataset, settings: Settings, seed: int, writer: Any, advance: Callable[[int], None]
) -> Run:
    """Train the network of ``seed`` with ``method``.

    The caller's random state is neither read nor changed. With the same seed all methods start from the same
    weights and see the same batches.

    Args:
        method: the penalty and its route.
        data: the data.
        settings: sizes, strengths and learning rate.
        seed: of the initial weights and the order of the batches.
        writer: a TensorBoard SummaryWriter for the curves.
        advance: called now and then with the number of steps done since the last call.
    """
    model = network(data.inputs, settings.hidden, data.classes, seed)
    reg = torchreg.Regularizer(model, method.penalty(settings))
    order = batches(len(data.x_train), settings.batch, settings.steps + refit_steps(data, settings), seed)
    phases = _Phases(model, reg, data, writer, advance, every=max(1, settings.steps // LOGS_PER_RUN))
    lr, proximal = method.lr(settings), method.route == "prox"
    optimizer = method.proximal(reg, lr) if proximal else method.optimizer(model, lr)
    held = None if settings.target is None or not proximal else _Held(settings.target, optimizer, reg, settings.until)
    with _said_elsewhere():
        term = reg if method.route == "loss" else None
        step_time = phases.run(optimizer, lr, islice(order, settings.steps), settings.steps, term, held)
        if held is not None:
            reg.strength_scale.fill_(held.scale())
        result, refitted = _result(model, reg, data, seed, step_time), None
        if settings.refit and proximal:
            with torchreg.freeze_zeros(reg):
                step_time = phases.run(method.optimizer(model, lr), lr, order, refit_steps(data, settings))
            refitted = replace(_result(model, reg, data, seed, step_time), kkt_residual=math.nan)
    metrics = {f"final/{name}": value for name, value in asdict(result).items() if name != "seed"}
    if refitted is not None:
        metrics |= {f"refit/{name}": getattr(refitted, name) for name in ("accuracy", "data_loss", "l1_norm")}
    phases.monitor.hparams({"method": method.name, "seed": seed, **_hparams(method, settings)}, metrics)
    return Run(result, refitted, [p.detach().clone() for _, p, _ in reg.penalized()])


class _Phases:
    """The loop of a training, whose steps count on from one phase to the next."""

    def __init__(
        self,
        model: nn.Module,
        reg: torchreg.Regularizer,
        data: Dataset,
        writer: Any,
        advance: Callable[[int], None],
        every: int,
    ) -> None:
        self.model, self.reg, self.data, self.writer, self.advance = model, reg, data, writer, advance
        self.every = every
        self.monitor = torchreg.SparsityMonitor(reg, writer, every=every)

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        first_lr: float,
        order: Iterator[Tensor],
        steps: int,
        term: Callable[[], Tensor] | None = None,
        held: _Held | None = None,
    ) -> float:
        """Train for ``steps`` and return the median of a step's time, in seconds."""
        data, writer, done = self.data, self.writer, self.monitor.steps
        self.monitor = torchreg.SparsityMonitor(self.reg, writer, every=self.every, optimizer=optimizer, **SHOWN)
        self.monitor.load_state_dict({"steps": done})
        times = []
        with self.monitor as monitor:
            for step, index in enumerate(order):
                lr = first_lr * (1 + math.cos(math.pi * step / steps)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = lr
                x, y = data.x_train[index], data.y_train[index]
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(self.model(x), y)
                (loss if term is None else loss + term()).backward()
                optimizer.step()
                if held is not None:
                    held.step()
                times.append(time.perf_counter() - start)
                monitor.step(loss=loss)
                if monitor.steps % self.every == 0:
                    writer.add_scalar("accuracy/test", accuracy(self.model, data.x_test, data.y_test), monitor.steps)
                    writer.add_scalar("lr", lr, monitor.steps)
                    self.advance(self.every)
            self.advance(monitor.steps % self.every - done % self.every)
        return statistics.median(times)


class _Held:
    """A target, and the strength scales that hold it once it is reached."""

    def __init__(self, target: float, optimizer: Any, reg: torchreg.Regularizer, until: int) -> None:
        self.target, self.reg = torchreg.TargetSparsity(optimizer, target, until=until), reg
        self.scales: list[float] = []

    def step(self) -> None:
        """After a step of the optimizer."""
        self.target.step()
        if self.target.last_epoch >= self.target.until:
            self.scales.append(float(self.reg.strength_scale))

    def scale(self) -> float:
        """Their median: as the learning rate vanishes, single ones are noise."""
        return statistics.median(self.scales)


def refit_steps(data: Dataset, settings: Settings) -> int:
    """Steps of a refit."""
    return settings.refit * (len(data.x_train) // settings.batch)


@contextmanager
def _said_elsewhere() -> Iterator[None]:
    """Leave a target that is missed, zeros that there are none or too many of, and divergence to the table."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"At step \d+ .*(finite|the loss is)", RuntimeWarning)
        emptiness = r"The target of|Parameter .* zero everywhere|Freezing |No weight is exactly zero"
        warnings.filterwarnings("ignore", emptiness, UserWarning)
        yield


def network(inputs: int, hidden: int, classes: int, seed: int) -> nn.Sequential:
    """Linear, ReLU, Linear: torch's default initialisation, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float32, device="cpu")
        for fan_in, fan_out in ((inputs, hidden), (hidden, classes))
    ]
    with torch.no_grad():
        for layer in layers:
            bound = 1 / math.sqrt(layer.in_features)
            for p in layer.parameters():
                p.uniform_(-bound, bound, generator=generator)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The indices of ``steps`` batches: a new order for each pass over the data, its incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # not the one of the weights
    per_pass = samples // size
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(samples, generator=generator)
        position = step % per_pass * size
        yield order[position : position + size]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of correct predictions."""
    return int((model(x).argmax(1) == y).sum()) / len(y)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: fastest for layers this small, and the same sums on every machine of a kind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def writer_for(directory: Path) -> Any:
    """A SummaryWriter; imported here because TensorBoard is slow to import."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))


@contextmanager
def strict_writers() -> Iterator[None]:
    """Let a failed write end the body as an OSError, instead of as a monitor's warning and a thread's traceback."""
    hook, threads = threading.excepthook, set(threading.enumerate())
    threading.excepthook = lambda raised: None if isinstance(raised.exc_value, OSError) else hook(raised)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"SummaryWriter\.", RuntimeWarning)
            yield
    except RuntimeWarning as warning:
        raise warning.__context__ or warning from None
    finally:
        for thread in set(threading.enumerate()) - threads:
            thread.join(timeout=1)  # one that fails needs the hook until its end
        threading.excepthook = hook


def _result(model: nn.Sequential, reg: torchreg.Regularizer, data: Dataset, seed: int, step_time: float) -> Result:
    losses = []

    def closure() -> Tensor:
        loss = F.cross_entropy(model(data.x_train), data.y_train)
        losses.append(float(loss.detach()))
        return loss

    residual = float(torchreg.kkt_residual(reg, closure))
    with torch.no_grad():
        penalty = float(reg())
        largest = max(float(p.abs().max()) for _, p, _ in reg.penalized())
    report = torchreg.sparsity(reg)
    first = report.tensors[0]
    return Result(
        seed=seed,
        accuracy=accuracy(model, data.x_test, data.y_test),
        sparsity=report.fraction,
        inputs_used=data.inputs - (first.zero_columns or 0),
        l1_norm=report.total.l1_norm,
        l2_norm=report.total.l2_norm,
        largest_weight=largest,
        data_loss=losses[0],
        objective=losses[0] + penalty,
        kkt_residual=residual,
        strength_scale=float(reg.strength_scale),
        step_time=step_time,
    )


def _hparams(method: Method, settings: Settings) -> dict[str, Any]:
    """This run's strengths, and what all share under names that sort last: TensorBoard's table opens with five."""
    l1, l2 = method.strengths(settings)
    shared = {f"shared/{name}": value for name, value in asdict(settings).items() if name not in ("seeds", "l1", "l2")}
    return {"l1": l1, "l2": l2, **{name: value for name, value in shared.items() if value is not None}}
