"""The results of a comparison as a table, as sentences, and as a document for JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

import torchreg
from torchreg import tables
from torchreg.cli.data import Dataset
from torchreg.cli.methods import METHODS, MOMENTUM, Settings
from torchreg.cli.training import Result, Run

Results = Mapping[str, Sequence[Result]]

QUANTITIES = tuple(f.name for f in fields(Result) if f.name != "seed")
REFIT = "-refit"
LABELS = {method.name: method.label for method in METHODS}
LABELS |= {m.name + REFIT: f"{m.label}, refitted" for m in METHODS if m.route == "prox"}
TOLERANCE = 0.005
"""Beyond this a target is called missed, as by `torchreg.TargetSparsity`."""
GREAT_LOSS = 0.02
"""Accuracy lost from which on the strength is called too great."""


def heading(data: Dataset, settings: Settings) -> str:
    """What is trained, in two lines."""
    s = settings
    return (
        f"{data.name}: {len(data.x_train)} training and {len(data.x_test)} test samples, network "
        f"{data.inputs}-{s.hidden}-{data.classes}, {s.seeds} seed{'s' * (s.seeds > 1)}\n"
        f"{s.steps} steps of {s.batch} samples, SGD momentum {MOMENTUM}, lr {s.lr:g} (Adam: {s.adam_lr:g}) to 0 "
        f"(cosine), strengths l1 = {s.l1:g}, l2 = {s.l2:g}"
    )


def by_row(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Result]]:
    """The results of each method, and after those of a proximal one the results of its refits."""
    rows = {}
    for name, group in runs.items():
        rows[name] = [run.result for run in group]
        if refits := [run.refitted for run in group if run.refitted is not None]:
            rows[name + REFIT] = refits
    return rows


def table(results: Results) -> str:
    """One row per method; mean ± standard deviation where there are several seeds."""
    columns = ("", "accuracy %", "zeros %", "inputs used", "‖w‖₁", "‖w‖₂", "max |w|", "KKT residual", "µs/step")
    rows = []
    for name, runs in results.items():
        cells = [
            _cell([100 * r.accuracy for r in runs], 1),
            _cell([100 * r.sparsity for r in runs], 1),
            _cell([r.inputs_used for r in runs], 0 if len(runs) == 1 else 1),
            _cell([r.l1_norm for r in runs], 0),
            _cell([r.l2_norm for r in runs], 1),
            _cell([r.largest_weight for r in runs], 2),
            "–" if name.endswith(REFIT) else _cell([r.kkt_residual for r in runs], None),
            _cell([1e6 * r.step_time for r in runs], 0),
        ]
        rows.append(("  refitted" if name.endswith(REFIT) else LABELS[name], *cells))
    return tables.render(columns, rows, narrow=True)


def notes(results: Results, settings: Settings) -> list[str]:
    """What a target and a refit have done."""
    texts = []
    prox = [method for method in METHODS if method.route == "prox"]
    if settings.target is not None:
        found = []
        for method in prox:
            runs = results[method.name]
            l1, l2 = (_cell([r.strength_scale * s for r in runs], None) for s in method.strengths(settings))
            missed = abs(mean(runs, "sparsity") - settings.target) > TOLERANCE
            strengths = f"l1 = {l1}, l2 = {l2}" if "l2" in method.uses else f"l1 = {l1}"
            reached = f", missed: {_percent(mean(runs, 'sparsity'))}" if missed else ""
            found.append(f"{strengths} ({method.label}{reached})")
        texts.append(f"{_percent(settings.target)} zeros were held at these strengths: {'; '.join(found)}.")
    if settings.refit:
        texts.append(
            f"Refitted: the zeros frozen, the other weights trained for {settings.refit} more "
            f"epoch{'s' * (settings.refit > 1)} without a penalty."
        )
    return texts


def conclusion(results: Results, data: Dataset, settings: Settings) -> list[str]:
    """What the numbers say, in a few sentences that depend on them."""
    diverged = [LABELS[name] for name, runs in results.items() if not all(math.isfinite(r.l2_norm) for r in runs)]
    if diverged:
        return [f"Diverged: {', '.join(diverged)}. Take a smaller --lr or smaller strengths."]
    return [_zeros_sentence(results, data, settings), _adam_sentence(results, settings), _accuracy_sentence(results)]


def _zeros_sentence(results: Results, data: Dataset, settings: Settings) -> str:
    prox, loss, l2 = results["l1-prox"], results["l1-loss"], results["l2-loss"]
    if mean(prox, "sparsity") == 0:
        if settings.target is not None:
            return "L1 by ProxSGD left no weight exactly zero; take a larger --target."
        return (
            "L1 by ProxSGD left no weight exactly zero: its strength is too small for these steps; take a larger --l1."
        )
    gap = mean(prox, "accuracy") - mean(results["none"], "accuracy")
    unread = data.inputs - mean(prox, "inputs_used")
    text = (
        f"Want zeros? L1 by ProxSGD: {_percent(mean(prox, 'sparsity'))} of the weights are exactly zero and "
        f"{unread:.0f} of {data.inputs} inputs are no longer read, for {_points(gap)} in accuracy. "
    )
    text += _in_the_loss(settings, first=True)
    if mean(loss, "sparsity") or mean(l2, "sparsity"):
        text += f" has {_percent(mean(loss, 'sparsity'))}, L2 {_percent(mean(l2, 'sparsity'))}."
    else:
        text += f" has none, though its ‖w‖₁ is {_cell([mean(loss, 'l1_norm')], 0)} "
        text += f"(ProxSGD: {_cell([mean(prox, 'l1_norm')], 0)}), and neither has L2."
    if gap < -GREAT_LOSS:
        text += f" A smaller {'--l1' if settings.target is None else '--target'} would cost less."
    return text


def _adam_sentence(results: Results, settings: Settings) -> str:
    prox, loss = results["l1-prox-adam"], results["l1-loss-adam"]
    return (
        f"Under Adam: ProxAdamW leaves {_percent(mean(prox, 'sparsity'))} zeros at {_percent(mean(prox, 'accuracy'))}, "
        f"{_in_the_loss(settings)} {_percent(mean(loss, 'sparsity')) if mean(loss, 'sparsity') else 'none'} at "
        f"{_percent(mean(loss, 'accuracy'))}."
    )


def _in_the_loss(settings: Settings, first: bool = False) -> str:
    """With a target the proximal methods have strengths of their own."""
    if settings.target is not None:
        return "L1 in the loss"
    return f"{'The' if first else 'the'} same L1 in the loss"


def _accuracy_sentence(results: Results) -> str:
    accuracies = {name: mean(runs, "accuracy") for name, runs in results.items()}
    best = max(accuracies, key=lambda name: accuracies[name])
    gain = accuracies[best] - accuracies["none"]
    if best == "none":
        text = f"Want accuracy? The network without a penalty, {_percent(accuracies[best])}, is not beaten here."
    else:
        text = f"Want accuracy? {LABELS[best]}: {_percent(accuracies[best])}, {_points(gain)} against no penalty"
        text += ", within the seeds' spread." if len(results[best]) > 1 and gain <= _spread(results) else "."
    net, prox = results["elastic-net-prox"], results["l1-prox"]
    if mean(net, "sparsity") > 0 and mean(net, "largest_weight") < mean(prox, "largest_weight"):
        text += (
            f" Elastic Net leaves {_percent(mean(net, 'sparsity'))} zeros at {_percent(mean(net, 'accuracy'))} with "
            f"smaller weights: the largest is {mean(net, 'largest_weight'):.1f} instead of "
            f"{mean(prox, 'largest_weight'):.1f}."
        )
    return text


def document(results: Results, data: Dataset, settings: Settings) -> dict[str, Any]:
    """Plain values for strict JSON: NaN and infinite numbers become None. All but the times repeat for a seed."""
    baseline = mean(results["none"], "step_time")
    methods = []
    for name, runs in results.items():
        methods.append(
            {
                "method": name,
                "label": LABELS[name],
                "mean": {q: mean(runs, q) for q in QUANTITIES},
                "std": {q: deviation(runs, q) for q in QUANTITIES},
                "step_time_ratio": mean(runs, "step_time") / baseline,
                "runs": [asdict(r) for r in runs],
            }
        )
    plain = {
        "torchreg": torchreg.__version__,
        "torch": torch.__version__,
        "data": {
            "name": data.name,
            "train": len(data.x_train),
            "test": len(data.x_test),
            "inputs": data.inputs,
            "classes": data.classes,
        },
        "settings": {**asdict(settings), "momentum": MOMENTUM},
        "methods": methods,
        "notes": notes(results, settings),
        "conclusion": conclusion(results, data, settings),
    }
    return _finite(plain)


def mean(runs: Sequence[Result], quantity: str) -> float:
    """The mean over the seeds."""
    return sum(getattr(r, quantity) for r in runs) / len(runs)


def deviation(runs: Sequence[Result], quantity: str) -> float | None:
    """The standard deviation over the seeds (n − 1), None for a single one."""
    values = [getattr(r, quantity) for r in runs]
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _spread(results: Results) -> float:
    """The largest standard deviation of the accuracy; 0 for a single seed."""
    return max(deviation(runs, "accuracy") or 0.0 for runs in results.values())


def _cell(values: Sequence[float], digits: int | None) -> str:
    """Mean ± standard deviation with so many decimals; as a power of ten where there are none or they don't fit."""
    center = sum(values) / len(values)
    if not math.isfinite(center):
        return str(center)
    # a tiny number must not look like an exact zero
    fixed = digits is not None and (center == 0 or 0.5 * 10**-digits <= abs(center) < 1e6)
    text = f"{center:.{digits}f}" if fixed else f"{center:.1e}"
    if len(values) == 1:
        return text
    spread = statistics.stdev(values)
    return f"{text} ± {spread:.{digits}f}" if fixed else f"{text} ± {spread:.0e}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points".replace("-", "−")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
