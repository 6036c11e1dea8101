"""A dense Lasso path and cross-validation on a GPU beside the peers on all of the host's cores, and cuML's Lasso.

Run `python benchmarks/linear_gpu.py`; without a GPU it says so. Seconds are by the clock, and X lies where each solver
wants it before that runs. The rows, with whether they reach what they are to, are kept in results/linear-gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear_contenders import TOLERANCE, Solver, contenders, relative_gap
from linear_report import judged, show, told
from measurement import machine

import torchreg.linear

Run = Callable[[], Any]
FOLDS, STRENGTHS, LEAST = 5, 100, 1e-2


def made(samples: int, features: int) -> tuple[Any, Any]:
    """Independent features, a hundred of which matter, centred."""
    rng = np.random.default_rng(0)
    x = np.empty((samples, features), order="F")
    for j in range(features):
        x[:, j] = rng.standard_normal(samples)
    x -= x.mean(0)
    y = x[:, :100] @ (100 * rng.uniform(size=min(100, features))) + 10 * rng.standard_normal(samples)
    return x, y - y.mean()


def paths(x: Any, y: Any, alphas: Any, device: str) -> dict[str, Run]:
    """The solvers' paths, and cuML's if it is installed: it has no path, and fits one strength after the other."""
    z, t = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    peers: dict[str, dict[str, Solver]] = contenders(os.cpu_count() or 1)
    runs: dict[str, Run] = {"torchreg": lambda: torchreg.linear.lasso_path(z, t, alphas=alphas)[1]}
    runs |= {name: (lambda s=s: s["path"](x, y, alphas)) for name, s in peers.items() if name != "torchreg"}
    try:
        from cuml.linear_model import Lasso
    except ImportError as error:
        print(f"left out: {error}")
        return runs

    def fitted(alpha: float) -> Any:
        return np.asarray(Lasso(alpha=alpha, fit_intercept=False, tol=TOLERANCE).fit(z, t).coef_)

    return runs | {"cuml": lambda: np.stack([fitted(alpha) for alpha in alphas], 1)}


def validations(x: Any, y: Any, device: str) -> dict[str, Run]:
    """Those that cross-validate, at the same strengths."""
    import sklearn.linear_model

    z, t = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    settings = {"cv": FOLDS, "eps": LEAST, "alphas": STRENGTHS}
    return {
        "torchreg": lambda: torchreg.linear.LassoCV(**settings).fit(z, t),
        "sklearn": lambda: sklearn.linear_model.LassoCV(**settings, tol=TOLERANCE, n_jobs=-1).fit(x, y),
    }


def timed(run: Run, rounds: int) -> tuple[float, Any]:
    """The median of the clock's seconds, and the last result."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), result


def measured(samples: int, features: int, device: str, rounds: int) -> dict[str, Any]:
    """The rows."""
    x, y = made(samples, features)
    alphas = np.geomspace(1, LEAST, STRENGTHS) * np.abs(x.T @ y).max() / len(y)
    rows: dict[str, Any] = {"GPU, path of 100": {}, "GPU, LassoCV": {}}
    for name, run in paths(x, y, alphas, device).items():
        seconds, coefs = timed(run, rounds if name == "torchreg" else 1)
        w = coefs.cpu().numpy() if isinstance(coefs, torch.Tensor) else np.asarray(coefs)
        gap = max(relative_gap(x, y, w[:, i], alphas[i]) for i in (0, STRENGTHS // 2, STRENGTHS - 1))
        rows["GPU, path of 100"][name] = {"seconds": seconds, "gap": gap}
    show("GPU, path of 100", rows["GPU, path of 100"])
    for name, run in validations(x, y, device).items():
        rows["GPU, LassoCV"][name] = {"seconds": timed(run, 1)[0]}
    show("GPU, LassoCV", rows["GPU, LassoCV"])
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="runs of ours")
    parser.add_argument("--device", default="cuda", help="where ours runs")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/linear-gpu.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("GPU: not measured yet, there is no CUDA device")
        return 0
    warnings.simplefilter("ignore")
    rows = measured(options.samples, options.features, options.device, options.rounds)
    bars = [bar for bar in judged(rows) if bar["text"].startswith("GPU")]
    print("\n".join(map(told, bars)))
    report = {
        "machine": machine(torch.device(options.device)),
        "peers_tolerance": TOLERANCE,
        "rows": rows,
        "bars": bars,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
