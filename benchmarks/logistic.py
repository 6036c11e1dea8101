"""L1-penalised logistic regression beside scikit-learn's liblinear and saga, celer and skglm, on one thread.

Run `python benchmarks/logistic.py`; peers that are not installed are left out. All solvers take turns on the same fresh
random data; what counts is CPU time, whose medians are kept in benchmarks/results/logistic-cpu.json with the machine's
name. Each solution's duality gap is computed from its coefficients.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"  # before the libraries are imported

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear import seconds, show
from logistic_contenders import contenders, data, relative_gap
from measurement import machine

FRACTIONS = {"wide": (10, 100), "correlated": (10, 100), "tall": (10, 100), "sparse": (10, 100)}


def measure(design: str, fraction: float, rounds: int, scale: float, without: list[str]) -> dict[str, Any]:
    """Each contender's median time and worst gap, over rounds of fresh data; the first round, which compiles, is not
    counted."""
    solvers = {name: solver for name, solver in contenders().items() if name not in without}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    gaps: dict[str, float] = dict.fromkeys(solvers, 0.0)
    for seed in range(-1, rounds):
        x, y = data(design, seed + 1, scale if seed >= 0 else scale / 4)
        alpha = np.abs(x.T @ y).max() / (2 * len(y)) * fraction
        for name in np.random.default_rng(seed + 1).permutation(list(solvers)):
            taken, w = seconds(lambda name=name: solvers[name](x, y, alpha), 1)  # noqa: B023
            if seed >= 0:
                times[name].append(taken)
                gaps[name] = max(gaps[name], relative_gap(x, y, w, alpha))
    return {name: {"seconds": statistics.median(times[name]), "gap": gaps[name]} for name in solvers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", nargs="+", choices=FRACTIONS, default=list(FRACTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="fresh data sets for each measurement")
    parser.add_argument("--scale", type=float, default=1.0, help="of the designs' sizes")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/logistic-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for design in options.designs:
        for fraction in FRACTIONS[design]:
            title = f"{design}, alpha_max/{fraction}"
            rows[title] = measure(design, 1 / fraction, options.rounds, options.scale, options.without)
            show(title, rows[title])
    report = {"machine": machine(torch.device("cpu")), "scale": options.scale, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
