"""Train one network under each penalty, everything else equal: initial weights, batches, learning rates."""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchreg
from torchreg.cli.data import Dataset
from torchreg.penalties import Penalty

MOMENTUM = 0.9
LOGS_PER_RUN = 10


@dataclass(frozen=True)
class Settings:
    """What all runs share. Strengths are in objective units: the loss is the mean cross-entropy."""

    seeds: int
    steps: int
    hidden: int
    batch: int
    lr: float
    l1: float
    l2: float


@dataclass(frozen=True)
class Method:
    """The parts of the penalty that act, and the route by which they do: none, the loss, or ProxSGD."""

    name: str
    label: str
    route: str
    uses: tuple[str, ...]

    def strengths(self, settings: Settings) -> tuple[float, float]:
        """The strengths of L1 and of L2, 0 where the method does not use them."""
        return settings.l1 if "l1" in self.uses else 0.0, settings.l2 if "l2" in self.uses else 0.0

    def penalty(self, settings: Settings) -> Penalty:
        """The penalty by its usual name."""
        l1, l2 = self.strengths(settings)
        if "l2" not in self.uses:
            return torchreg.L1(l1)
        return torchreg.ElasticNet(l1, l2) if "l1" in self.uses else torchreg.L2(l2)


METHODS = (
    Method("none", "no penalty", "none", ()),
    Method("l2-loss", "L2 in the loss", "loss", ("l2",)),
    Method("l1-loss", "L1 in the loss", "loss", ("l1",)),
    Method("l1-prox", "L1 by ProxSGD", "prox", ("l1",)),
    Method("elastic-net-prox", "Elastic Net by ProxSGD", "prox", ("l1", "l2")),
)


@dataclass(frozen=True)
class Result:
    """What one run ended with.

    Attributes:
        accuracy: the fraction of the test samples that are classified correctly.
        sparsity: the fraction of the penalised weights that are exactly zero.
        inputs_used: inputs with at least one non-zero weight in the first layer.
        data_loss: the mean cross-entropy over all training data.
        objective: the data's loss plus the penalty.
        kkt_residual: the largest violation of the optimality conditions, in units of the strength.
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
    step_time: float


@dataclass(frozen=True)
class Run:
    """A finished run: its result and the weights of its layers, the first layer's first."""

    result: Result
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
    optimizer: torch.optim.Optimizer
    if method.route == "prox":
        optimizer = torchreg.ProxSGD(reg.param_groups(), lr=settings.lr, momentum=MOMENTUM)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    every = max(1, settings.steps // LOGS_PER_RUN)
    times = []
    with torchreg.SparsityMonitor(reg, writer, every=every, optimizer=optimizer) as monitor:
        for step, index in enumerate(batches(len(data.x_train), settings.batch, settings.steps, seed)):
            lr = settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr
            x, y = data.x_train[index], data.y_train[index]
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + reg() if method.route == "loss" else loss).backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            monitor.step(loss=loss)
            if (step + 1) % every == 0:
                writer.add_scalar("accuracy/test", accuracy(model, data.x_test, data.y_test), step + 1)
                writer.add_scalar("lr", lr, step + 1)
                advance(every)
        advance(settings.steps % every)
    result = _result(model, reg, data, seed, statistics.median(times))
    monitor.hparams(
        {"method": method.name, "seed": seed, **_hparams(method, settings)},
        {f"final/{name}": value for name, value in asdict(result).items() if name != "seed"},
    )
    return Run(result, [p.detach().clone() for _, p, _ in reg.penalized()])


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
        step_time=step_time,
    )


def _hparams(method: Method, settings: Settings) -> dict[str, float]:
    """This run's strengths, and what all share under names that sort last: TensorBoard's table opens with five."""
    l1, l2 = method.strengths(settings)
    shared = {f"shared/{name}": value for name, value in asdict(settings).items() if name not in ("seeds", "l1", "l2")}
    return {"l1": l1, "l2": l2, **shared}
