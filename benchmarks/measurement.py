"""Checks of outputs, interleaved timing, memory, and what machine it was."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import Contender, Step
from workload import Workload

STEPS = 3
SAMPLE = 1 << 20
"""Weights of a tensor that are compared, about."""
MOST_ROUNDS = 51


class Disagreement(Exception):
    """A contender does not compute what it says."""


@torch.no_grad()
def check(contender: Contender, step: Step, work: Workload) -> None:
    """Compare some steps with the formula in float64, on at most two tensors of each shape.

    Raises:
        Disagreement: if weights, gradients or the step's own result are off.
    """
    work.reset()
    for _ in range(STEPS):
        with torch.enable_grad():
            result = step()
    eps, seen = torch.finfo(work.dtype).eps, Counter()
    for i, p in enumerate(work.params):
        seen[p.shape] += 1
        if seen[p.shape] > 2:
            continue
        every = p.numel() // SAMPLE | 1
        shape = (len(p), -1) if contender.by_rows else (-1,)
        start, start_grad, w, g = (
            t.view(shape)[::every].double() for t in (work.start[i], work.start_grads[i], p, p.grad)
        )
        expected_w, expected_g = contender.formula(start, start_grad, STEPS)
        for what, got, expected, scale in (("weight", w, expected_w, start), ("gradient", g, expected_g, start_grad)):
            error = ((got - expected).norm() / scale.norm()).item()
            zeros = abs((got == 0).sum() - (expected == 0).sum()).item()
            if not (error <= 2 * STEPS * eps and zeros <= 2 + 0.01 * w.numel()):
                raise Disagreement(f"{contender.name}: {what} {i} is off by {error:.1e}, and by {zeros} zeros")
    if contender.figure is not None:
        expected, got = contender.figure(work), float(result)
        if not abs(got - expected) <= max(1e-4, 2 * eps) * abs(expected):
            raise Disagreement(f"{contender.name}: {got} instead of {expected}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Let go of the last list's tensors: compiled code and reference cycles hold them."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Times:
    """Seconds per step, one entry per round: until the work is done, and until step() returned."""

    done: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)

    def ratios(self, other: Times) -> list[float]:
        return [a / b for a, b in zip(self.done, other.done, strict=True)]


def measure(steps: Mapping[str, Step], work: Workload, seconds: float, fewest: int) -> dict[str, Times]:
    """Time all contenders in rounds, in another order each time: what else the machine does hits all alike."""
    cpu = work.device.type == "cpu"
    inner = min(20, max(1, 8_000_000 // work.size) if cpu else max(3, 200_000_000 // work.size))
    names, order = list(steps), random.Random(0)

    def one_round(times: dict[str, Times]) -> float:
        begin = time.perf_counter()
        order.shuffle(names)
        for name in names:
            step = steps[name]
            synchronize(work.device)
            start = time.perf_counter()
            for _ in range(inner):
                step()
            returned = time.perf_counter()
            synchronize(work.device)
            times[name].done.append((time.perf_counter() - start) / inner)
            times[name].returned.append((returned - start) / inner)
        return time.perf_counter() - begin

    warm_up = [one_round({name: Times() for name in names}) for _ in range(2)]
    times = {name: Times() for name in steps}
    for _ in range(min(MOST_ROUNDS, max(fewest, int(seconds / warm_up[-1])))):
        one_round(times)
    return times


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written: of a large tensor's copy on a GPU, of a pass in place on the CPU.

    On the CPU a copy also fetches the lines that it overwrites, so that it moves more than it is counted for.
    """
    source = torch.ones((1 << 26) if device.type == "cpu" else (1 << 28), device=device)
    target, times = source if device.type == "cpu" else torch.empty_like(source), []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        torch.neg(source, out=target) if target is source else target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[2:])


def peak_memory(step: Step, work: Workload) -> int:
    """Bytes of tensors that one step needs beyond what was there before it."""
    if work.device.type == "cuda":
        before = torch.cuda.memory_allocated(work.device)
        torch.cuda.reset_peak_memory_stats(work.device)
        step()
        return torch.cuda.max_memory_allocated(work.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def machine(device: torch.device) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, object] = {
        "device": "cpu",
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"device": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "driver": _driver(device)}
        facts |= {"capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}
    names = {"torch": "torch", "torchreg": "torchreg-sparse", "torchao": "torchao", "triton": "triton"}
    facts["versions"] = {"python": platform.python_version()} | {n: _version(n, d) for n, d in names.items()}
    return facts


def _version(module: str, distribution: str) -> str | None:
    if module in ("torch", "torchreg"):
        return str(__import__(module).__version__)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
