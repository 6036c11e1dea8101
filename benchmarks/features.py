"""Fifty features for a network, by FeatureSelector and by LassoNet: the accuracy of a network that sees only those.

Run `python benchmarks/features.py --data FOLDER`. Two protocols: LassoNet's (10,000 images split 80 to 20, hidden width
d // 3) and the whole of MNIST (60,000 and 10,000, hidden width 67). FeatureSelector has its defaults, which were chosen
on training images left out; with `--validate` such images judge instead of the test images. LassoNet, where it is
installed, runs beside it by its authors' script, and a network is fitted to its features as to ours. One thread; what
counts is processor time. The results go to benchmarks/results/features-cpu.json, which keeps what is not run again.
The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import features_data
import features_lassonet
import torch
from features_data import Split
from features_published import PUBLISHED, SOURCES
from measurement import machine

from torchreg import FeatureSelector
from torchreg.tables import render

RESULTS = Path(__file__).parent / "results" / "features-cpu.json"
FEATURES = 50
HELD_OUT = {"LassoNet's": 8, "whole": 6}
"""The part of the training samples, one of so many, that judge with --validate."""
BARS = {
    "LassoNet's": {"MNIST": 0.915, "Fashion-MNIST": 0.815, "Mice Protein": 0.98},
    "whole": {"MNIST": 0.956, "Fashion-MNIST": 0.854},
}
Result = dict[str, Any]


def hidden(protocol: str, split: Split) -> int:
    """The width of the hidden layer."""
    return 67 if protocol == "whole" else split.x.shape[1] // 3


def ours(split: Split, width: int, seed: int, **settings: Any) -> Result:
    """One run of FeatureSelector."""
    begin = time.process_time()
    selector = FeatureSelector(FEATURES, hidden=(width,), random_state=seed, device="cpu", **settings)
    selector.fit(split.x, split.y)
    seconds = time.process_time() - begin
    accuracy = selector.score(split.x_judge, split.y_judge)
    chosen = selector.get_support(indices=True).tolist()
    return {"accuracy": round(accuracy, 4), "seconds": round(seconds, 1), "features": chosen}


def refitted(split: Split, chosen: list[int], width: int, seed: int, **settings: Any) -> float:
    """The accuracy of our last network on features that another method selected."""
    settings |= {"dense_epochs": 1}  # there is nothing to select
    everything = FeatureSelector(1.0, hidden=(width,), random_state=seed, device="cpu", **settings)
    everything.fit(split.x[:, chosen], split.y)
    return round(everything.score(split.x_judge[:, chosen], split.y_judge), 4)


def theirs(split: Split, width: int, seed: int, **settings: Any) -> Result:
    """One run of LassoNet, and our network on its features."""
    result = features_lassonet.run(split, FEATURES, width, seed)
    return result | {"refitted": refitted(split, result["features"], width, seed, **settings)}


def table(protocol: str, results: Result) -> str:
    """One protocol's figures."""
    rows = []
    for name, result in results.items():
        runs, bar = list(result["torchreg"].values()), BARS[protocol][name]
        lassonet = list(result.get("lassonet", {}).values())
        figures = [
            f"{_mean(runs, 'accuracy'):.4f}",
            f"± {statistics.stdev(r['accuracy'] for r in runs):.4f}" if len(runs) > 1 else "",
            f"{bar:.3f} {'met' if met(protocol, name, result) else 'MISSED'}" if result["judged_by"] == "test" else "",
            f"{_mean(runs, 'seconds'):.0f}",
        ]
        if lassonet:
            figures += [f"{_mean(lassonet, what):.4f}" for what in ("accuracy", "refitted")]
            figures += [f"{_mean(lassonet, 'seconds'):.0f} ({len(lassonet)} run{'s'[: len(lassonet) > 1]})"]
        else:
            figures += ["", "", ""]
        published = ", ".join(f"{method} {figure:.3f}" for method, figure in PUBLISHED[protocol][name].items())
        rows.append((name, *figures, published))
    return render(
        (
            f"{protocol} protocol",
            f"torchreg, {FEATURES} features",
            "",
            "bar",
            "CPU s",
            "LassoNet here",
            "its features, our network",
            "CPU s",
            "published",
        ),
        rows,
    )


def met(protocol: str, name: str, result: Result) -> bool:
    """Whether the mean accuracy reaches the bar."""
    return _mean(list(result["torchreg"].values()), "accuracy") >= BARS[protocol][name]


def _mean(runs: list[Result], what: str) -> float:
    return statistics.mean(run[what] for run in runs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(), help="folder of mnist.npz, fashion_mnist.npz, mice_protein.npz"
    )
    parser.add_argument("--protocols", nargs="+", choices=BARS, default=list(BARS), help="default: both")
    parser.add_argument("--only", nargs="+", choices=features_data.FILES, default=list(features_data.FILES))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--lassonet-seeds", nargs="*", type=int, metavar="SEED", default=[0], help="default: 0")
    parser.add_argument("--skip-torchreg", action="store_true", help="run LassoNet only; our runs in the file stay")
    parser.add_argument("--validate", action="store_true", help="judge by training samples that are left out; no file")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="of FeatureSelector; no file")
    options = parser.parse_args(arguments)
    if (problem := features_data.missing(options.data, options.only)) is not None:
        parser.error(problem)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    path = options.json or (None if options.validate or options.settings else RESULTS)
    document = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {"protocols": {}}
    document["machine"] = machine(torch.device("cpu"))
    seeds = options.lassonet_seeds
    if seeds and not features_lassonet.is_installed():
        print("left out: LassoNet, which is not installed (make bench-features does)\n")
        seeds = []
    missed = False
    for protocol in options.protocols:
        known = document["protocols"].setdefault(protocol, {})
        shown = {}
        for name in (name for name in options.only if name in BARS[protocol]):
            result = known.setdefault(name, {})
            result["judged_by"] = "left-out" if options.validate else "test"
            result["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            for method, chosen in (("torchreg", options.seeds), ("lassonet", seeds if protocol != "whole" else [])):
                if not chosen or (method == "torchreg" and options.skip_torchreg):
                    continue
                result[method] = {}
                for seed in chosen:
                    split = features_data.load(options.data, name, protocol == "whole", seed)
                    if options.validate:
                        split = split.validation(seed, len(split.y) // HELD_OUT[protocol])
                    run = ours if method == "torchreg" else theirs
                    result[method][str(seed)] = run(split, hidden(protocol, split), seed, **options.settings)
                    figures = {k: v for k, v in result[method][str(seed)].items() if k != "features"}
                    print(f"{protocol} protocol, {name}, seed {seed}, {method}: {figures}", flush=True)
                    _save(path, document)
            if "torchreg" in result:
                shown[name] = result
                missed |= not options.validate and not met(protocol, name, result)
        print(f"\n{table(protocol, shown)}\n", flush=True)
    _save(path, document)
    print(SOURCES + (f"\nwritten to {path}" if path else ""))
    return int(missed)


def _save(path: Path | None, document: Result) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
