"""Three ways to have L1 under Adam, against scikit-learn's Lasso: what does the strength do?

Run `python benchmarks/compare_routes.py`. The same lasso (make_regression, 200 × 500, 10 informative) is solved at many
strengths, full batch, float64, with the learning rate decaying to zero. Draws docs/routes.png and writes
benchmarks/results/routes.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.datasets import make_regression
from sklearn.linear_model import Lasso
from torch import Tensor, nn

import torchreg
from torchreg import L1, ProxAdamW, Regularizer, plots

ROOT = Path(__file__).parent.parent
FACTORS = tuple(10 ** (-2 + i / 5) for i in range(11))
"""Strengths, as fractions of the smallest one that zeroes all weights."""
LR, STEPS = 0.02, 4000
LEAST = 1e-12


@dataclass(frozen=True)
class Problem:
    """½‖Xw − y‖²/n, through the Gram matrix: a step costs p², not n·p."""

    gram: Tensor
    moment: Tensor
    half_power: float

    def loss(self, w: Tensor) -> Tensor:
        return 0.5 * w @ (self.gram @ w) - self.moment @ w + self.half_power

    def objective(self, w: Tensor, strength: float) -> float:
        return (self.loss(w) + strength * w.abs().sum()).item()

    @property
    def strength_max(self) -> float:
        return self.moment.abs().max().item()


@dataclass(frozen=True)
class Outcome:
    """Of one way at one strength: exact zeros, and the objective relative to the optimum's."""

    factor: float
    zeros: float
    excess: float


def load() -> tuple[Problem, Tensor, Tensor]:
    x, y = make_regression(n_samples=200, n_features=500, n_informative=10, noise=5.0, random_state=0)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    y = (y - y.mean()) / y.std()
    n = len(y)
    return Problem(x.T @ x / n, x.T @ y / n, 0.5 * (y @ y).item() / n), x, y


Way = Callable[[nn.Parameter, float], tuple[torch.optim.Optimizer, Callable[[], Tensor]]]
"""Of a weight and a strength: an optimizer, and what is added to the loss."""


def trained(problem: Problem, way: Way, strength: float) -> Tensor:
    w = nn.Parameter(torch.zeros_like(problem.moment))
    with torch.no_grad():
        w.copy_(0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype))
    optimizer, term = way(w, strength)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)))
    for _ in range(STEPS):
        optimizer.zero_grad()
        (problem.loss(w) + term()).backward()
        optimizer.step()
        schedule.step()
    return w.detach()


def loss_term(w: nn.Parameter, strength: float):
    reg = Regularizer(nn.ParameterList([w]), {"*": L1(strength)})
    return torch.optim.Adam([w], lr=LR), reg


def thresholded(w: nn.Parameter, strength: float):
    return ProxAdamW([w], lr=LR, weight_decay=0.0, penalty=L1(strength), metric="identity"), lambda: 0.0


def proximal(w: nn.Parameter, strength: float):
    return ProxAdamW([w], lr=LR, weight_decay=0.0, penalty=L1(strength)), lambda: 0.0


WAYS = {
    "Adam, L1 in the loss": loss_term,
    "AdamW, then thresholding by lr·λ": thresholded,
    "ProxAdamW": proximal,
}
TRUTH = "scikit-learn's Lasso"
COLORS = {"Adam, L1 in the loss": "#b0413e", "AdamW, then thresholding by lr·λ": "#e0a030", "ProxAdamW": "#3b6ea8"}


def measured() -> dict[str, list[Outcome]]:
    problem, x, y = load()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*WAYS, TRUTH)}
    for factor in FACTORS:
        strength = factor * problem.strength_max
        lasso = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
        truth = torch.from_numpy(lasso.coef_)
        solutions = {name: trained(problem, way, strength) for name, way in WAYS.items()}
        for name, w in {**solutions, TRUTH: truth}.items():
            excess = problem.objective(w, strength) / problem.objective(truth, strength) - 1
            outcomes[name].append(Outcome(factor, (w == 0).double().mean().item(), excess))
    return outcomes


def draw(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    plots.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in outcomes.items():
        factors = [row.factor for row in rows]
        style = {"color": COLORS.get(name, "black"), "label": name}
        if name == TRUTH:
            left.plot(factors, [100 * row.zeros for row in rows], "k--", linewidth=1.2, label=name)
            continue
        left.plot(factors, [100 * row.zeros for row in rows], "o-", markersize=4, **style)
        right.plot(factors, [max(row.excess, LEAST) for row in rows], "o-", markersize=4, **style)
    left.set_ylabel("weights exactly zero, %")
    left.set_ylim(-3, 103)
    left.legend(frameon=False, fontsize="small", loc=(0.25, 0.13))
    right.set_yscale("log")
    right.set_ylabel("objective above the optimum, relative (at least 1e-12)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("strength / the smallest one that zeroes all")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"make_regression, 200 × 500, 10 informative; full batch, float64, {STEPS} steps, lr {LR} decaying by a cosine",
        fontsize="small",
        color="#555555",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "routes.png")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "routes.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    outcomes = measured()
    for name, rows in outcomes.items():
        print(name)
        for row in rows:
            print(f"  {row.factor:7.3f}  zeros {100 * row.zeros:5.1f} %  excess {row.excess:.1e}")
    draw(outcomes, options.figure)
    settings = {"lr": LR, "steps": STEPS, "torch": torch.__version__, "torchreg": torchreg.__version__}
    document = {"settings": settings, "outcomes": {name: [asdict(r) for r in rows] for name, rows in outcomes.items()}}
    options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
