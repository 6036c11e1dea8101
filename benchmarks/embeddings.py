"""What do sparse gradients of a large embedding save? Writes benchmarks/results/embeddings-cpu.json.

Run `python benchmarks/embeddings.py`. A table of a million rows by 16 columns has some of its rows looked up in each
step, at random. Training with sparse gradients and with dense ones takes turns; counted is one thread's CPU time in
whole iterations: zeroed gradients, forward, backward, step. The weights of ProxSGD are compared with float64's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measurement import machine
from torch import nn

import torchreg
from torchreg import FTRL, L1, ProxAdamW, ProxSGD

ROOT = Path(__file__).parent.parent
ROWS, COLUMNS = 1_000_000, 16
BLOCK = 5

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], bool]] = {  # and whether to compare
    "ProxSGD, L1": (ProxSGD, {"lr": 0.1, "penalty": L1(1e-4)}, True),
    "FTRL, L1": (FTRL, {"lr": 0.1, "penalty": L1(1e-4)}, False),
    "ProxAdamW, L1": (ProxAdamW, {"lr": 1e-3, "weight_decay": 0, "penalty": L1(1e-6)}, False),
}


def measure(case: str, rows: int, touched: int, steps: int) -> dict[str, Any]:
    """Milliseconds of an iteration with sparse and with dense gradients, and how far their weights are apart."""
    make, hyper, same = CASES[case]
    generator = torch.Generator().manual_seed(0)
    start = 0.05 * torch.randn(rows, COLUMNS, generator=generator)
    runs = {}
    for name in ("sparse", "dense", *(["exact"] if same else [])):
        dtype = torch.float64 if name == "exact" else torch.float32
        table = nn.Embedding.from_pretrained(start.to(dtype, copy=True), freeze=False, sparse=name == "sparse")
        runs[name] = table, make(table.parameters(), **hyper)
    runs["sparse"][1].settle_lookups(runs["sparse"][0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for first in range(0, steps, BLOCK):
        batches = [
            (
                torch.randint(0, rows, (touched,), generator=generator),
                torch.randn(touched, COLUMNS, generator=generator),
            )
            for _ in range(min(BLOCK, steps - first))
        ]
        for name, (table, optimizer) in runs.items():
            for index, pull in batches:
                begun = time.process_time()
                optimizer.zero_grad()
                (table(index) * pull).sum().backward()
                optimizer.step()
                times[name].append(1e3 * (time.process_time() - begun))
    medians = {
        name: statistics.median(entries[BLOCK:] or entries) for name, entries in times.items() if name != "exact"
    }
    result = {"case": case, "touched": touched / rows, "ratio": medians["dense"] / medians["sparse"], **medians}
    least = {name: min(entries[BLOCK:] or entries) for name, entries in times.items()}
    result["ratio_of_minima"] = least["dense"] / least["sparse"]
    if same:
        runs["sparse"][1].flush()
        sparse, dense, exact = (runs[name][0].weight.detach().double() for name in ("sparse", "dense", "exact"))
        result["from_dense"] = (sparse - dense).abs().max().item()
        result["from_exact"] = (sparse - exact).abs().max().item()
        result["dense_from_exact"] = (dense - exact).abs().max().item()
    return result


def docs_table(results: list[dict[str, Any]]) -> str:
    """The results as docs/embeddings.md shows them."""
    lines = [
        "| 1 M × 16, one step | rows touched | sparse, ms | dense, ms | times less | by minima | largest difference "
        "from float64 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        apart = f"{row['from_exact']:.0e}" if "from_exact" in row else "–"
        least = f"{row['ratio_of_minima']:.1f}" if "ratio_of_minima" in row else "–"
        lines.append(
            f"| {row['case']} | {100 * row['touched']:g} % | {row['sparse']:.2f} | {row['dense']:.1f} | "
            f"{row['ratio']:.1f} | {least} | {apart} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure all, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/embeddings-cpu.json")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shares = (0.01, 0.001)
    results = [
        measure(case, options.rows, max(1, round(share * options.rows)), options.steps)
        for case in CASES
        for share in shares
    ]
    facts = {**machine(torch.device("cpu")), "threads": 1, "torchreg": torchreg.__version__}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(docs_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
