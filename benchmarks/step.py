"""What a proximal step costs beside torch.optim.SGD and AdamW, fused, what people write by hand, and torchao's PAT.

Run `python benchmarks/step.py`. All contenders take turns in one process, on the same memory. Each is first compared
with a float64 reference: if one is off, no speed is printed. The results are also written to
benchmarks/results/step-<device>.json. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import adam_contenders
import contenders
import group_contenders
import torch
import workload
from bars import judged
from measurement import Disagreement, bandwidth, check, free_memory, machine, measure, peak_memory
from workload import Workload

from torchreg.tables import render

DTYPES = ("float32", "bfloat16")
RESULTS = Path(__file__).parent / "results"
README_LISTS = ("4 × 4 M", "60 × 20 k")
README_ROWS = {
    "`ProxSGD`, L1": "ProxSGD L1, fused",
    "`ProxSGD`, Elastic Net": "ProxSGD Elastic Net, fused",
    "`SGD(fused=True)`, then `softshrink` in place": "SGD fused + softshrink in place",
    "`torchao.prototype.pat`, lasso": contenders.PAT,
    "`AdamW(fused=True)`": adam_contenders.BASELINE,
    "`ProxAdamW`, L1": adam_contenders.FUSED[0],
    "added by L1 in the loss: by hand": contenders.BY_HAND,
    "added by L1 in the loss: `Regularizer`": contenders.LOSS_TERM,
}
GROUP_ROWS = {
    "`ProxSGD`, GroupLasso": group_contenders.FUSED[0],
    "`ProxSGD`, SparseGroupLasso with L2": group_contenders.FUSED[1],
    "`ProxSGD(fused=False)`, GroupLasso": "ProxSGD GroupLasso by rows, eager",
    "`torchao.prototype.pat`, group lasso": group_contenders.PAT,
    "`AdamW(fused=True)`": adam_contenders.BASELINE,
    "`ProxAdamW`, GroupLasso": "ProxAdamW GroupLasso by rows, fused",
    "`ProxAdamW`, SparseGroupLasso with L2": "ProxAdamW SparseGroupLasso by rows, fused",
    "`ProxAdamW(fused=False)`, GroupLasso": "ProxAdamW GroupLasso by rows, eager",
}
BASELINES = (contenders.BASELINE, adam_contenders.BASELINE)

Result = dict[str, Any]


def compare(work: Workload, quick: bool, seconds: float, tell: Callable[[str], None], only: str = "") -> Result:
    """Check and time every contender that can take part, and is a baseline or has ``only`` in its name.

    Raises:
        Disagreement: if the output of one is wrong; nothing is timed then.
    """
    steps, skipped = {}, {}
    for contender in (*contenders.CONTENDERS, *adam_contenders.CONTENDERS, *group_contenders.CONTENDERS):
        if only.lower() not in contender.name.lower() and contender.name not in BASELINES:
            continue
        reason = "left out by --quick" if quick and contender.patient else contender.missing(work)
        if reason:
            skipped[contender.name] = reason
            continue
        tell(f"checking {contender.name}")
        steps[contender.name] = contender.build(work)
        check(contender, steps[contender.name], work)
    tell("timing")
    times = measure(steps, work, seconds, fewest=5 if quick else 7)
    speed = bandwidth(work.device)
    baseline, rows = times[contenders.BASELINE], {}
    for name, time in times.items():
        ratios, done = time.ratios(baseline), statistics.median(time.done)
        first, _, third = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(first, 3), round(third, 3)],
            "ms": _significant(1e3 * done),
            "host_ms": _significant(1e3 * statistics.median(time.returned)) if work.device.type == "cuda" else None,
            "bytes_per_parameter": _significant(done * speed / work.size),
            "extra_bytes_per_parameter": _significant(peak_memory(steps[name], work) / work.size),
        }
    return {
        "parameters": work.size,
        "tensors": len(work.params),
        "rounds": len(baseline.done),
        "copy_gb_per_s": _significant(speed / 1e9),
        "floor_bytes_per_parameter": 5 * work.dtype.itemsize,
        "contenders": rows,
        "skipped": skipped,
    }


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def table(title: str, result: Result) -> str:
    """The contenders of one tensor list."""
    rows = []
    for name, row in result["contenders"].items():
        added = "+" if name.startswith("added") else ""
        host = "" if row["host_ms"] is None else f"{row['host_ms']:.3f}"
        traffic, extra = row["bytes_per_parameter"], row["extra_bytes_per_parameter"]
        rows.append((name, f"{added}{row['ratio']:.2f}", f"{row['ms']:.3f}", host, f"{traffic:.1f}", f"{extra:.1f}"))
    header = (title, "× fused SGD", "ms", "host ms", "bytes moved", "peak extra bytes")
    remarks = [f"{name}: {reason}" for name, reason in result["skipped"].items()]
    note = (
        f"{result['rounds']} rounds. Bytes are per parameter; moved: what a copy (on a CPU: in place) moves in that "
        f"time ({result['copy_gb_per_s']:.1f} GB/s), at least {result['floor_bytes_per_parameter']}."
    )
    return "\n".join([render(header, rows), note, *remarks])


def readme_table(document: Result, rows: Mapping[str, str] = MappingProxyType(README_ROWS)) -> str:
    """The rows that README.md quotes, or others, in Markdown."""
    lines = [f"| time, `SGD(fused=True)` = 1 | {' | '.join(README_LISTS)} |", "| --- | --- | --- |"]
    for label, name in rows.items():
        ratios = [document["lists"][key]["float32"]["contenders"].get(name) for key in README_LISTS]
        cells = ["not measured" if r is None else f"{'+' * ('added' in label)}{r['ratio']:.2f}" for r in ratios]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32, on a GPU both")
    parser.add_argument("--lists", nargs="+", metavar="LIST", choices=workload.LISTS, help="some tensor lists only")
    parser.add_argument("--quick", action="store_true", help="two lists, few rounds, no torch.compile, no file")
    parser.add_argument("--only", default="", metavar="WORD", help="contenders with this in their name, and baselines")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing per list and dtype, about")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory announces each use

    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    dtypes = options.dtype or (DTYPES[:1] if on_cpu else DTYPES)
    if on_cpu and "bfloat16" in dtypes:
        parser.error("on the CPU only float32 is compared: torch's fused SGD skips others (pytorch issue 191763)")
    lists = options.lists or (workload.QUICK if options.quick else tuple(workload.LISTS))
    seconds = min(options.seconds, 8.0) if options.quick else options.seconds
    facts = machine(device)
    document: Result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": facts,
        "settings": {"lr": contenders.LR, "momentum": contenders.MOMENTUM, "strength": contenders.STRENGTH},
        "baseline": contenders.BASELINE,
        "lists": {},
        "left_out": {},
    }
    threads = f", {facts['threads']} thread" if on_cpu else ""
    print(f"{facts['cpu'] if on_cpu else facts['device']}{threads}, torch {torch.__version__}\n")
    for name in lists:
        for dtype in dtypes:
            reason = workload.too_large(workload.LISTS[name], device, getattr(torch, dtype))
            if reason:
                document["left_out"][f"{name}, {dtype}"] = reason
                print(f"{name}, {dtype}: left out, {reason}\n")
                continue
            title = f"{name}, {dtype}"
            work = Workload(workload.LISTS[name], device, getattr(torch, dtype))
            try:
                tell = functools.partial(_progress, title)
                result = compare(work, options.quick, seconds, tell, options.only)
            except Disagreement as error:
                sys.exit(f"{title}: {error}. No speed is reported.")
            document["lists"].setdefault(name, {})[dtype] = result
            print(table(title, result) + "\n", flush=True)
            del work
            free_memory(device)

    document["bars"] = bars = judged(document["lists"], device.type)
    for bar in bars:
        met = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
        print(f"{met}: {bar['text']}" + ("" if bar["measured"] is None else f" ({bar['measured']:.3g})"))
    some = options.quick or options.lists or options.only
    path = options.json or (None if some else RESULTS / f"step-{_slug(facts['device'])}.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")
    if all("float32" in document["lists"].get(name, {}) for name in README_LISTS):
        for page, rows in {"README.md": README_ROWS, "docs/groups.md": GROUP_ROWS}.items():
            print(f"\nfor {page}:\n\n{readme_table(document, rows)}")
    return int(any(bar["met"] is False for bar in bars))


def _progress(title: str, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{title}: {what}", end="\r", file=sys.stderr, flush=True)


def _slug(name: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
