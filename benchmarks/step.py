"""What a proximal step costs beside torch.optim.SGD: medians of interleaved runs in one process, as ratios.

Run `python benchmarks/step.py`. Outputs are first compared with a float64 reference, and no speed is printed if one
is off. The table is also written to benchmarks/results/step-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import torchreg
from torchreg import L1, ElasticNet, ProxSGD
from torchreg.tables import render

LR, MOMENTUM, STRENGTH = 0.01, 0.9, 1e-3
BASELINE = "torch.optim.SGD, foreach"
BAR = {"ProxSGD L1, foreach": 1.6}
LISTS = {"4 × 4 M": [4_000_000] * 4, "60 × 20 k": [20_000] * 60}
TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results" / "step-cpu.json"

Step = Callable[[], object]


def torch_sgd(params: list[nn.Parameter], foreach: bool) -> Step:
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, foreach=foreach).step


def prox_sgd(params: list[nn.Parameter], foreach: bool | None, penalty: torchreg.penalties.Penalty) -> Step:
    return ProxSGD(params, lr=LR, momentum=MOMENTUM, penalty=penalty, foreach=foreach).step


def by_hand(params: list[nn.Parameter]) -> Step:
    """What people write: SGD, then sign·clamp(|w| − lr·λ) as multi-tensor operations (with the gain of momentum)."""
    optimizer = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, foreach=True)
    threshold = LR * STRENGTH / (1 - MOMENTUM)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        shrunk = torch._foreach_abs(params)
        torch._foreach_sub_(shrunk, threshold)
        torch._foreach_clamp_min_(shrunk, 0)
        torch._foreach_mul_(shrunk, torch._foreach_sign(params))
        torch._foreach_copy_(params, shrunk)

    return step


CONTENDERS: dict[str, tuple[Callable[[list[nn.Parameter]], Step], float, float]] = {  # and their l1 and l2
    BASELINE: (lambda p: torch_sgd(p, True), 0.0, 0.0),
    "torch.optim.SGD, loop": (lambda p: torch_sgd(p, False), 0.0, 0.0),
    "ProxSGD L1, foreach": (lambda p: prox_sgd(p, True, L1(STRENGTH)), STRENGTH, 0.0),
    "ProxSGD L1, default": (lambda p: prox_sgd(p, None, L1(STRENGTH)), STRENGTH, 0.0),
    "ProxSGD L1, loop": (lambda p: prox_sgd(p, False, L1(STRENGTH)), STRENGTH, 0.0),
    "ProxSGD Elastic Net, foreach": (lambda p: prox_sgd(p, True, ElasticNet(STRENGTH, STRENGTH)), STRENGTH, STRENGTH),
    "SGD and soft threshold by hand": (by_hand, STRENGTH, 0.0),
}


def weights(sizes: list[int]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for p in params:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return params


def expected(param: nn.Parameter, l1: float, l2: float, steps: int) -> Tensor:
    """The weight after some steps with a constant gradient, in float64."""
    w, grad = param.detach().double(), param.grad.double()
    buffer, tau = torch.zeros_like(w), LR / (1 - MOMENTUM)
    for _ in range(steps):
        buffer = MOMENTUM * buffer + grad
        w = w - LR * buffer
        w = (w - w.clamp(-tau * l1, tau * l1)) / (1 + 2 * tau * l2)
    return w


def check(steps: int = 3) -> None:
    """Exit unless every contender computes what it says, on tensors of all the sizes that are timed."""
    for sizes in LISTS.values():
        for name, (make, l1, l2) in CONTENDERS.items():
            params, start = weights(sizes[:1]), weights(sizes[:1])
            step = make(params)
            for _ in range(steps):
                step()
            reference = expected(start[0], l1, l2, steps)
            error = (params[0].double() - reference).abs().max().item()
            if not error <= TOLERANCE:
                sys.exit(f"{name}: off by {error:.1e} from the float64 reference; no speed is reported.")


def measure(sizes: list[int], repetitions: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds per step. The contenders take turns, so that what else the machine does hits all alike."""
    steps = {name: make(weights(sizes)) for name, (make, _, _) in CONTENDERS.items()}
    inner = max(1, 4_000_000 // sum(sizes))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm_up + repetitions):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                step()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchreg": torchreg.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=51)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()

    check()
    medians = {name: measure(sizes, options.repetitions) for name, sizes in LISTS.items()}
    ratios = {name: {key: m[key] / m[BASELINE] for key in CONTENDERS} for name, m in medians.items()}
    where = machine()
    rows = [
        (key, *(f"{ratios[name][key]:.2f} ({1e3 * medians[name][key]:.2f} ms)" for name in LISTS)) for key in CONTENDERS
    ]
    print(render(("step of float32 weights", *LISTS), rows))
    print(f"\n{where['cpu']}, {where['threads']} threads, torch {where['torch']}; {options.repetitions} repetitions")
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": where,
        "repetitions": options.repetitions,
        "baseline": BASELINE,
        "bar": BAR,
        "ratios": {name: {key: round(value, 3) for key, value in row.items()} for name, row in ratios.items()},
        "median_ms": {name: {key: round(1e3 * t, 4) for key, t in row.items()} for name, row in medians.items()},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    missed = [f"{key} on {name}" for name in LISTS for key, bar in BAR.items() if ratios[name][key] > bar]
    if missed:
        print(f"\nAbove the bar of {BAR}: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
