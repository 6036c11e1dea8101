"""Lasso, multi-task and group lasso fits, paths and cross-validation beside scikit-learn, celer, skglm and adelie.

Run `python benchmarks/linear.py`; peers that are not installed are left out. All solvers take turns on one thread, on
the same fresh random data; what counts is CPU time, whose medians are kept in benchmarks/results/linear-cpu.json with
the machine's name. Each solution's duality gap is computed from its coefficients. What is to be reached on a GPU is
measured by linear_gpu.py.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"  # before the libraries are imported

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_group_contenders as grouped
import numpy as np
import torch
from linear_contenders import TOLERANCE, contenders, data, relative_gap
from linear_report import judged, show, told
from measurement import machine

FRACTIONS = {
    "wide": (10, 100),
    "correlated": (10, 100, 1000),
    "tall": (10, 100),
    "diabetes": (10, 100),
    "sparse": (10, 100),
    "multitask": (3, 10, 30),
    "groups": (3, 10, 30),
}
LEAST = {
    "wide": 1e-2,
    "correlated": 1e-2,
    "tall": 1e-3,
    "diabetes": 1e-3,
    "sparse": 1e-2,
    "multitask": 5e-2,
    "groups": 5e-2,
}
STEPS = {"multitask": 30, "groups": 30}
"""Strengths of a path, where they are not 100."""
VALIDATED = ("wide", "tall", "diabetes")
"""Designs on which cross-validation is measured, whose scikit-learn runs take longest."""


def seconds(run: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """CPU seconds of one run, the mean of some."""
    start = time.process_time()
    for _ in range(repeat):
        result = run()
    return (time.process_time() - start) / repeat, result


def measure(design: str, task: str, alphas: Any, rounds: int, scale: float) -> dict[str, Any]:
    """Each contender's times and worst gap, over rounds of fresh data; `alphas` are fractions of the largest."""
    together = design in grouped.DESIGNS
    solvers = grouped.contenders(design) if together else contenders()
    repeat = 20 if design == "diabetes" else 1
    gap_of = grouped.relative_gap if together else relative_gap
    times: dict[str, list[float]] = {name: [] for name in solvers}
    gaps: dict[str, float] = dict.fromkeys(solvers, 0.0)
    for seed in range(-1, rounds):  # the first round compiles
        x, y = grouped.data(design, seed + 1, scale) if together else data(design, seed + 1, scale)
        strengths = (grouped.largest(x, y) if together else np.abs(x.T @ y).max() / len(y)) * np.asarray(alphas)
        order = np.random.default_rng(seed + 1).permutation(len(solvers))
        for name in np.array(list(solvers))[order]:
            taken, coefs = seconds(lambda name=name: solvers[name][task](x, y, strengths), repeat)  # noqa: B023
            if seed >= 0:
                times[name].append(taken)
                worst = max(gap_of(x, y, coefs[..., i], a) for i, a in enumerate(strengths))
                gaps[name] = max(gaps[name], worst)
    return {name: {"seconds": statistics.median(times[name]), "gap": gaps[name]} for name in solvers}


def cross_validation(design: str, rounds: int, scale: float) -> dict[str, Any]:
    """LassoCV, 5 folds and 100 strengths, against scikit-learn's at its own tolerance."""
    import sklearn.linear_model

    import torchreg.linear

    models = {"torchreg": torchreg.linear.LassoCV(cv=5), "sklearn": sklearn.linear_model.LassoCV(cv=5)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(-1, rounds):  # the first round, of a smaller design, compiles
        x, y = data(design, seed + 1, scale if seed >= 0 else 0.1 * scale)
        for name in np.random.default_rng(seed + 1).permutation(list(models)):
            taken, _ = seconds(lambda name=name: models[name].fit(x, y), 1)  # noqa: B023
            if seed >= 0:
                times[name].append(taken)
    return {name: {"seconds": statistics.median(times[name])} for name in models}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", nargs="+", choices=FRACTIONS, default=list(FRACTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="fresh data sets for each measurement")
    parser.add_argument("--scale", type=float, default=1.0, help="of the designs' sizes")
    parser.add_argument("--skip-cv", action="store_true", help="without cross-validation")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/linear-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for design in options.designs:
        tasks = {f"alpha_max/{f}": ("fit", [1 / f]) for f in FRACTIONS[design]}
        steps = STEPS.get(design, 100)
        tasks[f"path of {steps}"] = ("path", np.geomspace(1, LEAST[design], steps))
        for title, (task, alphas) in tasks.items():
            rows[f"{design}, {title}"] = measure(design, task, alphas, options.rounds, options.scale)
            show(f"{design}, {title}", rows[f"{design}, {title}"])
        if design in VALIDATED and not options.skip_cv:
            rows[f"{design}, LassoCV"] = cross_validation(design, max(1, options.rounds // 2), options.scale)
            show(f"{design}, LassoCV", rows[f"{design}, LassoCV"])
    bars = judged(rows)
    print("\n".join(map(told, bars)))
    report = {
        "machine": machine(torch.device("cpu")),
        "peers_tolerance": TOLERANCE,
        "scale": options.scale,
        "rows": rows,
        "bars": bars,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
