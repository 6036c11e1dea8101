"""What compaction buys: a ResNet-18 and a transformer of which half of the channels, heads and units are zero.

Run `python benchmarks/compact.py`. The ideal is the same network built with half of them. Results:
benchmarks/results/compact-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measurement import machine
from torch import Tensor, nn
from torch.nn import functional as F

from torchreg.coupling import coupled_groups
from torchreg.coupling.stand_ins import Example
from torchreg.export import compact
from torchreg.export.equality import flops

RESULTS = Path(__file__).parent / "results"
HEADS, UNITS, WIDTH = 8, 2048, 512


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., CVPR 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = width
    for stage in range(4):
        for i in range(2):
            layers.append(Block(before, width << stage, 2 if stage and not i else 1))
            before = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Transformer(nn.Module):
    """Six encoder layers of torch's, as wide as that of Vaswani et al. (NeurIPS, 2017)."""

    def __init__(self, units: int = UNITS, heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, heads, units, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


def transformer_flops(tokens: Tensor, units: int, heads: int) -> int:
    """Operations of the products of a transformer with so many heads of 64, counted by hand."""
    n, length = tokens.shape
    inner = heads * (WIDTH // HEADS)
    layer = 2 * n * length * (4 * WIDTH * inner + 2 * WIDTH * units) + 4 * n * length * length * inner
    return 6 * layer + 2 * n * length * WIDTH * 1000


@torch.no_grad()
def halve(model: nn.Module, example: Tensor) -> None:
    """Make every other channel, head and unit zero, at random."""
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    tensors = dict(model.named_parameters())
    for coupling in coupled_groups(model, example):
        gone = torch.zeros(coupling.count, dtype=torch.bool)
        gone[torch.randperm(coupling.count, generator=random)[: coupling.count // 2]] = True
        for member in coupling.makers:
            tensors[member.name].index_fill_(member.dim, member.slices(gone), 0)


def measured(model: nn.Module, example: Tensor, ideal: int, seconds: float) -> dict[str, Any]:
    model.eval()
    halve(model, example)
    small, report = (result := compact(model, example, seconds=seconds)).model, result.report
    print(report, end="\n\n")
    with torch.no_grad():
        expected, got = model(example), small(example)
    assert report.latency is not None
    return {
        "input": list(example.shape),
        "parameters": report.parameters,
        "flops": report.flops,
        "ideal_flops": ideal,
        "flops_over_ideal": report.flops[1] / ideal,
        "milliseconds": [1e3 * t for t in report.latency],
        "times_faster": report.latency[0] / report.latency[1],
        "error_float64": report.error,
        "error_float32": float((got - expected).abs().max() / expected.abs().max()),
        "error_float32_absolute": float((got - expected).abs().max()),
    }


def docs_table(results: dict[str, Any]) -> str:
    """The table of docs/smaller.md."""
    lines = ["| half of it zero | parameters | FLOPs | FLOPs / ideal | ms | times faster | largest error |"]
    lines.append("| --- " * 7 + "|")
    for name, r in results.items():
        millions, billions, times = (
            " → ".join(f"{number / unit:.3g}" for number in r[key])
            for key, unit in (("parameters", 1e6), ("flops", 1e9), ("milliseconds", 1))
        )
        ratios = f"{r['flops_over_ideal']:.2f} | {times} | {r['times_faster']:.2f} | {r['error_float32']:.0e}"
        lines.append(f"| {name} | {millions} M | {billions} G | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30, help="how long to time each pair of models")
    parser.add_argument("--out", type=Path, default=RESULTS / "compact-cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images, tokens = torch.randn(1, 3, 224, 224), torch.randint(1000, (4, 128))
    ideal = flops(resnet18(32), Example.of(images))
    results = {
        "ResNet-18": measured(resnet18(), images, ideal, arguments.seconds),
        "transformer": measured(
            Transformer(), tokens, transformer_flops(tokens, UNITS // 2, HEADS // 2), arguments.seconds
        ),
    }
    facts = machine(torch.device("cpu"))
    arguments.out.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(docs_table(results))


if __name__ == "__main__":
    main()
