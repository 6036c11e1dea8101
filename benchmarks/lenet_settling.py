"""Do the zeros settle? LeNet-300-100 on MNIST by ProxSGD and by RMDA, with one strength.

Run `python benchmarks/lenet_settling.py --data mnist.npz`. Same start, same batches, same strength, 15 epochs: ProxSGD
with a constant learning rate, ProxSGD with one that decays, RMDA in three stages. Counted are the weights that are left
at the end, and how many become zero or leave zero in each step of the last epoch. RMDA's learning rate was chosen from
four on training images left out (``--validate``), ProxSGD's are usual ones. Results:
benchmarks/results/lenet-settling.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lenet_data
import torch
import torch.nn.functional as F
from lenet_networks import LeNet300, nonzero, size, weights
from lenet_training import error
from measurement import machine

import torchreg

RESULTS = Path(__file__).parent / "results" / "lenet-settling.json"
STRENGTH, EPOCHS, BATCH = 2e-4, 15, 128
COLUMNS = ("error", "weights", "changes_per_step")
Tick = Callable[[int, int], None]
"""Called before each step with the number of the step and of all: moves the learning rate."""


@dataclass(frozen=True)
class Way:
    """An optimizer with its learning rate."""

    name: str
    lr: float
    build: Callable[[Any, float], tuple[torch.optim.Optimizer, Tick]]


def constant(groups: Any, lr: float) -> tuple[torch.optim.Optimizer, Tick]:
    return torchreg.ProxSGD(groups, lr=lr, momentum=0.9), lambda step, steps: None


def decaying(groups: Any, lr: float) -> tuple[torch.optim.Optimizer, Tick]:
    optimizer = torchreg.ProxSGD(groups, lr=lr, momentum=0.9)

    def tick(step: int, steps: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, tick


def dual_averaging(groups: Any, lr: float) -> tuple[torch.optim.Optimizer, Tick]:
    """Three stages, each with a tenth of the last one's learning rate; in the last the momentum goes to 0."""
    optimizer = torchreg.RMDA(groups, lr=lr, momentum=0.99)

    def tick(step: int, steps: int) -> None:
        epoch, start = divmod(step * EPOCHS, steps)
        stage = 3 * epoch // EPOCHS
        if start >= EPOCHS or epoch == 0:  # within an epoch
            return
        if stage != 3 * (epoch - 1) // EPOCHS:
            optimizer.restart()
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.1**stage
        if stage == 2:
            optimizer.settle(20 * (epoch - 2 * EPOCHS // 3) ** 2 + 1)

    return optimizer, tick


WAYS = (
    Way("ProxSGD, constant rate", 0.01, constant),
    Way("ProxSGD, decaying rate", 0.05, decaying),
    Way("RMDA", 1.0, dual_averaging),
)


def trained(way: Way, train: lenet_data.Images, judge: lenet_data.Images, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    network = LeNet300()
    optimizer, tick = way.build(torchreg.Regularizer(network, torchreg.L1(STRENGTH)).param_groups(), way.lr)
    generator = torch.Generator().manual_seed(seed)
    steps, step, changes = EPOCHS * (len(train) // BATCH), 0, 0
    for epoch in range(EPOCHS):
        for rows in train.batches(BATCH, generator):
            tick(step, steps)
            optimizer.zero_grad()
            F.cross_entropy(network(train.rows(rows)), train.labels[rows % len(train)]).backward()
            before = [w == 0 for w in weights(network)] if epoch == EPOCHS - 1 else []
            optimizer.step()
            changes += sum(int(((w == 0) != zero).sum()) for w, zero in zip(weights(network), before, strict=False))
            step += 1
    return {
        "error": round(error(network, judge), 3),
        "weights": nonzero(network),
        "changes_per_step": round(changes / (steps / EPOCHS), 2),
    }


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """The means in Markdown, as docs/quality.md quotes them."""
    lines = [f"| of {size(LeNet300()):,} weights | test error % | left | changes a step, last epoch |"]
    lines.append("| --- | --- | --- | --- |")
    for name, results in runs.items():
        error, left, changes = (statistics.mean(run[key] for run in results) for key in COLUMNS)
        lines.append(f"| {name} | {error:.2f} | {left:,.0f} | {changes:,.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("mnist.npz"), help="MNIST as mnist.npz of Keras")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true", help="judge by training images that are left out; no file")
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"no file {options.data}: get mnist.npz, e.g. by keras.datasets.mnist.load_data()")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train, test = lenet_data.load(options.data)
    runs: dict[str, list[dict[str, float]]] = {way.name: [] for way in WAYS}
    for seed in options.seeds:
        images, judge = train.split(seed) if options.validate else (train, test)
        for way in WAYS:
            runs[way.name].append(trained(way, images, judge, seed))
            print(f"seed {seed}, {way.name}: {runs[way.name][-1]}", file=sys.stderr, flush=True)
    print(table(runs))
    if not options.validate:
        document = {"strength": STRENGTH, "epochs": EPOCHS, "lr": {way.name: way.lr for way in WAYS}, "runs": runs}
        document |= {"seeds": options.seeds, "machine": machine(torch.device("cpu"))}
        RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
