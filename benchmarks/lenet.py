"""How few weights LeNet-300-100 and LeNet-5 need on MNIST: the test error of what ProxSGD leaves of them.

Run `python benchmarks/lenet.py --data mnist.npz` (the file that Keras distributes). Every figure is of the last
iterate, and of the network of full size; weights are counted without biases. With `--validate` 5,000 training images,
others for each seed, are left out of training and judge instead of the test images, which are then not looked at:
that is how the recipes in lenet_recipes.py were chosen. One thread, so that processor time says what it costs. The
results go to benchmarks/results/lenet-cpu.json. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import lenet_data
import torch
from lenet_networks import expand, size, weights
from lenet_published import PUBLISHED
from lenet_recipes import RECIPES, Recipe
from lenet_training import error, run, start
from measurement import machine

import torchreg
from torchreg.tables import render

RESULTS = Path(__file__).parent / "results" / "lenet-cpu.json"
BARS = {
    "LeNet-300-100": {68: 1.60, 100: 1.65, 150: 1.85, 200: 2.0},
    "LeNet-5": {200: 0.85, 280: 0.75},
}
"""Mean test errors in percent that are to be reached, by compression."""

README_NOTE = (
    "Those of torchreg: the last iterate after training on all 60,000 images and on copies of them that are turned, "
    "scaled and shifted a little, with the run's own dense network as a teacher; recipes chosen on training images "
    "left out. Those of others are as printed in their papers."
)

Result = dict[str, Any]


def one_seed(recipe: Recipe, train: lenet_data.Images, judge: lenet_data.Images, seed: int) -> Result:
    """Error in percent, weights that are left and processor time in seconds: of the dense network and by compression.

    A compression's seconds are those of its own phases and of the shared ones, as if it were alone.
    """
    state, images = start(recipe, train, seed)
    results: Result = {}
    for i, phase in enumerate(recipe.shared):
        state = run(phase, state, images, 1000 * seed + i, _teller(f"seed {seed}, shared phase {i + 1}"))
        if i == 0:
            results["dense"] = _result(state.network, judge, state.seconds)
    for compression, phases in recipe.then.items():
        own = state
        for i, phase in enumerate(phases):
            own = run(
                phase, own, images, 1000 * seed + 100 + i, _teller(f"seed {seed}, {compression} ×, phase {i + 1}")
            )
        results[str(compression)] = _result(own.network, judge, own.seconds)
    _teller("")("")
    return results


def _result(network: torch.nn.Module, judge: lenet_data.Images, seconds: float) -> Result:
    full = expand(network)
    total = torchreg.sparsity(weights(full)).total
    return {"error": round(error(full, judge), 4), "weights": total.size - total.zeros, "seconds": round(seconds, 1)}


def summary(seeds: dict[int, Result], recipe: Recipe, bars: dict[int, float]) -> Result:
    """All seeds' values by compression, their mean and deviation, and whether the bar is met."""
    rows: Result = {}
    for key in next(iter(seeds.values())):
        values = {what: [seed[key][what] for seed in seeds.values()] for what in ("error", "weights", "seconds")}
        rows[key] = values | {"mean": round(statistics.mean(values["error"]), 4)}
        rows[key]["deviation"] = round(statistics.stdev(values["error"]), 4) if len(seeds) > 1 else None
        if key.isdigit():
            bar = bars.get(int(key))
            rows[key] |= {"bar": bar, "met": None if bar is None else rows[key]["mean"] <= bar}
    return {"weights": size(recipe.network()), "seeds": list(seeds), "compressions": rows}


def table(name: str, result: Result) -> str:
    """The figures of one network."""
    rows = []
    for key, row in result["compressions"].items():
        spread = "" if row["deviation"] is None else f"± {row['deviation']:.2f}"
        left, bar = max(row["weights"]), row.get("bar")
        verdict = "" if bar is None else f"{bar:.2f} {'met' if row['met'] else 'MISSED'}"
        title = key if key == "dense" else f"{key} ×"
        rows.append(
            (title, f"{left:,}", f"{row['mean']:.3f}", spread, verdict, f"{statistics.mean(row['seconds']):.0f}")
        )
    return render((name, "weights", "error %", "", "bar", "CPU s a seed"), rows)


def readme_table(networks: Result) -> str:
    """The rows that README.md quotes, in Markdown: published ones and, in bold, those measured here."""
    parts = []
    for name, result in networks.items():
        rows = [(p.compression, f"{p.compression} ×", p.method, p.error, f"{p.kept:g}") for p in PUBLISHED[name]]
        for key, row in result["compressions"].items():
            if key == "dense":
                continue
            method, spread = f"**torchreg, mean of {len(row['error'])}**", row["deviation"]
            figure = f"**{row['mean']:.2f}**" + ("" if spread is None else f" ± {spread:.2f}")
            rows.append(
                (int(key), f"**{key} ×**", method, figure, f"{100 * max(row['weights']) / result['weights']:.2g}")
            )
        header = f"| {name}, {result['weights']:,} weights | fewer | test error % | weights kept % |"
        lines = [f"| {method} | {fewer} | {figure} | {kept} |" for _, fewer, method, figure, kept in sorted(rows)]
        parts.append("\n".join([header, "| --- | --- | --- | --- |", *lines]))
    return "\n\n".join([*parts, README_NOTE])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("mnist.npz"), help="MNIST as mnist.npz of Keras")
    parser.add_argument("--networks", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 to 4")
    parser.add_argument("--validate", action="store_true", help="judge by training images that are left out; no file")
    parser.add_argument("--json", type=Path, help="where the results go; other networks' stay in it")
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"no file {options.data}: get mnist.npz, e.g. by keras.datasets.mnist.load_data()")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    train, test = lenet_data.load(options.data)
    facts = machine(torch.device("cpu"))
    path = options.json or (None if options.validate or options.seeds else RESULTS)
    networks: Result = {}
    print(f"{facts['cpu']}, 1 thread, torch {torch.__version__}\n")
    for name in options.networks:
        recipe, seeds = RECIPES[name], {}
        for seed in options.seeds or range(5):
            images, judge = train.split(seed) if options.validate else (train, test)
            seeds[seed] = one_seed(recipe, images, judge, seed)
            shown = {key: value["error"] for key, value in seeds[seed].items()}
            print(f"{name}, seed {seed}: {shown}", flush=True)
            result = summary(seeds, recipe, {} if options.validate else BARS[name])
            result["judged_by"] = (
                f"{lenet_data.HELD_OUT} training images left out" if options.validate else "test images"
            )
            result["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            result |= {"machine": facts, "recipe": dataclasses.asdict(recipe) | {"network": name}}
            networks = _saved(path, name, result) if path else networks | {name: result}
        print(f"\n{table(name, result)}\n", flush=True)
    if path:
        print(f"written to {path}\n")
    print(f"for README.md:\n\n{readme_table(networks)}")
    rows = [row for result in networks.values() for row in result["compressions"].values()]
    return int(any(row.get("met") is False for row in rows))


def _saved(path: Path, name: str, result: Result) -> Result:
    """Put one network's result into the file, beside the others' that are in it; returns them all."""
    networks = json.loads(path.read_text(encoding="utf-8"))["networks"] if path.exists() else {}
    networks[name] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"networks": networks}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return networks


def _teller(what: str) -> Any:
    def tell(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what} {text}".rstrip(), end="\r", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
