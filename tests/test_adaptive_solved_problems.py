"""Adaptive optimizers reach scikit-learn's Lasso and Elastic Net, each in its own metric.

The problems are `test_solved_problems`' make_regression at fractions of the largest useful strength, full batch, with a
decaying learning rate and a number of steps for each optimizer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sklearn import linear_model
from test_solved_problems import RATIO, problem, smoothness
from torch import Tensor, nn

from torchreg import L1, ElasticNet, ProxAdamW, Proximal
from torchreg.penalties import Penalty

SGD_LR = 0.27  # 1.8 / L


def _around(cls: type[torch.optim.Optimizer], **options: Any) -> Any:
    return lambda w, penalty, lr: Proximal(cls([w], lr=lr, **options), penalty=penalty)


def _prox_adamw(w: nn.Parameter, penalty: Penalty, lr: float) -> ProxAdamW:
    return ProxAdamW([w], lr=lr, weight_decay=0, penalty=penalty)


OPTIMIZERS: dict[str, tuple[Any, float, int]] = {  # with the learning rate and the number of steps
    "ProxAdamW": (_prox_adamw, 3.0, 1000),
    "SGD": (_around(torch.optim.SGD, momentum=0.9), SGD_LR, 500),
    "Adam": (_around(torch.optim.Adam), 3.0, 1000),
    "RMSprop": (_around(torch.optim.RMSprop), 1.0, 800),
    "Adagrad": (_around(torch.optim.Adagrad), 30.0, 800),
}
OTHERS: dict[str, tuple[Any, float, int]] = {
    "SGD nesterov": (_around(torch.optim.SGD, momentum=0.9, nesterov=True), SGD_LR / 2, 500),
    "SGD dampening": (_around(torch.optim.SGD, momentum=0.9, dampening=0.5), SGD_LR, 800),
    "Adam amsgrad": (_around(torch.optim.Adam, amsgrad=True), 3.0, 1000),
    "AdamW": (_around(torch.optim.AdamW, weight_decay=0), 3.0, 1000),
    "NAdam": (_around(torch.optim.NAdam), 3.0, 1000),
    "RAdam": (_around(torch.optim.RAdam), 3.0, 1000),
    "Adamax": (_around(torch.optim.Adamax, betas=(0.9, 0.99)), 3.0, 1000),
    "RMSprop momentum": (_around(torch.optim.RMSprop, momentum=0.9), 0.1, 1000),
    "Adagrad lr_decay": (_around(torch.optim.Adagrad, lr_decay=1e-3), 30.0, 1000),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def penalty_at(fraction: float, penalty: str) -> Penalty:
    """The penalty at a fraction of the strength from which on all weights are zero."""
    largest = problem("make_regression").moment.abs().max().item()
    if penalty == "L1":
        return L1(largest * fraction)
    return ElasticNet.from_ratio(largest * fraction / RATIO, RATIO)


@cache
def solution(fraction: float, penalty: str) -> Tensor:
    p = problem("make_regression")
    alpha = p.moment.abs().max().item() * fraction
    options = {"fit_intercept": False, "tol": 1e-15, "max_iter": 1_000_000}
    model = (
        linear_model.Lasso(alpha=alpha, **options)
        if penalty == "L1"
        else linear_model.ElasticNet(alpha=alpha / RATIO, l1_ratio=RATIO, **options)
    )
    return torch.tensor(model.fit(p.x.numpy(), p.y.numpy()).coef_)


@cache
def quadratic() -> tuple[Tensor, Tensor, float]:
    """The loss ½·w·Gw − b·w + c as (G, b, c)."""
    p = problem("make_regression")
    return p.gram, p.moment, (p.y @ p.y / len(p.y) / 2).item()


def objective(w: Tensor, penalty: Penalty) -> float:
    gram, moment, rest = quadratic()
    return (0.5 * w @ torch.mv(gram, w) - moment @ w + rest + penalty.value(w)).item()


def descend(row: tuple[Any, float, int], penalty: Penalty) -> Tensor:
    make, lr, steps = row
    gram, moment, _ = quadratic()
    w = nn.Parameter(torch.zeros(len(moment), dtype=torch.float64))
    opt = make(w, penalty, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    for _ in range(steps):
        w.grad = torch.mv(gram, w.detach()).sub_(moment)
        opt.step()
        scheduler.step()
    return w.detach()


def assert_solved(w: Tensor, fraction: float, penalty: str) -> None:
    expected = solution(fraction, penalty)
    optimum = objective(expected, penalty_at(fraction, penalty))
    assert objective(w, penalty_at(fraction, penalty)) <= optimum * (1 + 1e-6)
    assert torch.equal(w != 0, expected != 0)


@pytest.mark.pairs
@pytest.mark.parametrize("row", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("penalty", ["L1", "ElasticNet"])
@pytest.mark.parametrize("fraction", [1 / 3, 1 / 10, 1 / 30], ids=["1/3", "1/10", "1/30"])
def test_the_objective_and_the_support_are_scikit_learns(row, penalty, fraction):
    assert_solved(descend(row, penalty_at(fraction, penalty)), fraction, penalty)


@pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS)
def test_every_metric_and_gain_solves_the_problem_that_was_asked_for(row):
    assert_solved(descend(row, penalty_at(1 / 10, "ElasticNet")), 1 / 10, "ElasticNet")


def test_the_learning_rate_of_sgd_is_near_the_largest_stable_one():
    assert pytest.approx(1.8 / smoothness(problem("make_regression")), rel=0.05) == SGD_LR


def test_shrinking_all_weights_alike_after_adams_step_would_solve_another_problem():
    """The reason for the metric: lr·λ in its place, the decoupled form."""
    penalty = penalty_at(1 / 10, "L1")
    w = descend(
        (lambda w, p, lr: Proximal(torch.optim.Adam([w], lr=lr), metric="identity", penalty=p), 3.0, 1000), penalty
    )
    assert objective(w, penalty) > 1.01 * objective(solution(1 / 10, "L1"), penalty)
