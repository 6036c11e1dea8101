"""Linear models with a known solution: every route and hyperparameter reaches scikit-learn's coefficients.

The data's loss is ½·mean squared error without an intercept, on centred data: scikit-learn's Lasso(alpha) is L1(alpha),
its ElasticNet is `ElasticNet.from_ratio`, and Ridge(alpha·n) is L2(alpha / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from optimizer_cases import forms
from sklearn import linear_model
from sklearn.datasets import load_diabetes, make_regression
from torch import Tensor, nn

import torchreg
from torchreg import L1, L2, ElasticNet, ProxSGD, Regularizer

MOMENTA = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
RATIO = 0.7


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of small steps: waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Problem:
    x: Tensor
    y: Tensor
    alpha: float

    @property
    def gram(self) -> Tensor:
        return self.x.T @ self.x / len(self.x)

    @property
    def moment(self) -> Tensor:
        return self.x.T @ self.y / len(self.x)


@cache
def problem(name: str) -> Problem:
    if name == "diabetes":
        x, y = load_diabetes(return_X_y=True)
        alpha = 2.0
    else:
        x, y = make_regression(n_samples=200, n_features=500, n_informative=10, random_state=0)
        alpha = 5.0
    x, y = torch.tensor(x), torch.tensor(y)
    return Problem((x - x.mean(0)) / x.std(0, correction=0), y - y.mean(), alpha)


@cache
def solution(name: str, penalty: str) -> Tensor:
    p = problem(name)
    options = {"fit_intercept": False, "tol": 1e-15, "max_iter": 1_000_000}
    model = {
        "L1": lambda: linear_model.Lasso(alpha=p.alpha, **options),
        "ElasticNet": lambda: linear_model.ElasticNet(alpha=p.alpha, l1_ratio=RATIO, **options),
        "L2": lambda: linear_model.Ridge(alpha=p.alpha * len(p.x), fit_intercept=False, solver="svd"),
    }[penalty]()
    return torch.tensor(model.fit(p.x.numpy(), p.y.numpy()).coef_)


def penalty_for(name: str, penalty: str) -> torchreg.penalties.Penalty:
    alpha = problem(name).alpha
    return {"L1": L1(alpha), "ElasticNet": ElasticNet.from_ratio(alpha, RATIO), "L2": L2(alpha / 2)}[penalty]


def smoothness(p: Problem) -> float:
    return torch.linalg.eigvalsh(p.gram)[-1].item()


def step_size(p: Problem, hyper: dict) -> float:
    """Half of the largest stable one: heavy-ball momentum allows 2(1+μ)/L, Nesterov's 1/L and a little more."""
    return (0.9 if "momentum" not in hyper or hyper.get("nesterov") else 1.8) / smoothness(p)


def descend(p: Problem, optimizer: torch.optim.Optimizer, w: nn.Parameter, steps: int) -> None:
    """Full-batch steps from the Gram matrix, until the weights stand still for longer than momentum remembers."""
    gram, moment = p.gram, p.moment
    before = w.detach().clone()
    for step in range(1, steps + 1):
        w.grad = gram @ w.detach() - moment
        optimizer.step()
        if step % 200 == 0:
            if torch.allclose(before, w.detach(), rtol=1e-11, atol=0):
                break
            before = w.detach().clone()


def assert_solved(w: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert torch.linalg.vector_norm(w - expected) <= rtol * torch.linalg.vector_norm(expected)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.pairs
@pytest.mark.parametrize("data", ["diabetes", "make_regression"])
@pytest.mark.parametrize("penalty", ["L1", "L2", "ElasticNet"])
@pytest.mark.parametrize("hyper", MOMENTA.values(), ids=MOMENTA)
@forms
def test_prox_sgd_reaches_the_coefficients_and_their_zeros(data, penalty, hyper, form):
    p = problem(data)
    w = nn.Parameter(torch.zeros(p.x.shape[1], dtype=torch.float64))
    opt = ProxSGD([w], lr=step_size(p, hyper), penalty=penalty_for(data, penalty), **form, **hyper)
    descend(p, opt, w, steps=20_000)
    assert_solved(w.detach(), solution(data, penalty))
    residual = penalty_for(data, penalty).optimality_residual(w.detach(), p.gram @ w.detach() - p.moment)
    assert residual.max() <= 1e-6 * p.alpha


def linear(p: Problem) -> nn.Linear:
    model = nn.Linear(p.x.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def loss(model: nn.Linear, p: Problem) -> Tensor:
    return 0.5 * nn.functional.mse_loss(model(p.x).squeeze(1), p.y)


@pytest.mark.parametrize("penalty", ["L1", "L2", "ElasticNet"])
def test_a_linear_layer_trained_by_autograd_is_the_estimator(penalty):
    p = problem("diabetes")
    model = linear(p)
    reg = Regularizer(model, penalty_for("diabetes", penalty))
    opt = ProxSGD(reg.param_groups(), lr=1.8 / smoothness(p), momentum=0.9)
    for _ in range(2500):
        opt.zero_grad()
        loss(model, p).backward()
        opt.step()
    assert_solved(model.weight.detach()[0], solution("diabetes", penalty))
    assert torchreg.kkt_residual(reg, lambda: loss(model, p)) <= 1e-6


@pytest.mark.pairs
@pytest.mark.parametrize("penalty", ["L1", "L2", "ElasticNet"])
@pytest.mark.parametrize("route", ["loss", "hook"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_the_loss_term_and_the_hook_approach_the_same_optimum(penalty, route, optimizer):
    p = problem("diabetes")
    model = linear(p)
    reg = Regularizer(model, penalty_for("diabetes", penalty))
    adam = optimizer is torch.optim.Adam
    opt = optimizer(model.parameters(), lr=1.0 if adam else 1.8 / smoothness(p), **({} if adam else {"momentum": 0.9}))
    steps = 1500
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (1 - step / steps) ** 2)
    if route == "hook":
        reg.attach(opt)
    for _ in range(steps):
        opt.zero_grad()
        (loss(model, p) + reg() if route == "loss" else loss(model, p)).backward()
        opt.step()
        scheduler.step()
    expected = solution("diabetes", penalty)
    with torch.no_grad():
        reached = loss(model, p) + reg()
        model.weight.copy_(expected)
        optimum = loss(model, p) + reg()
        assert optimum <= reached <= optimum * (1 + 1e-5)


@pytest.mark.parametrize("data", ["diabetes", "make_regression"])
@pytest.mark.parametrize("penalty", ["L1", "ElasticNet"])
@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_strength_max_is_where_the_last_weight_vanishes(data, penalty, factor):
    p = problem(data)
    model = linear(p)
    largest = torchreg.strength_max(Regularizer(model, penalty_for(data, penalty)), lambda: loss(model, p))
    assert largest == pytest.approx(p.moment.abs().max().item())
    strength = L1(largest * factor) if penalty == "L1" else ElasticNet(largest * factor, 0.1)
    w = nn.Parameter(torch.ones(p.x.shape[1], dtype=torch.float64))
    opt = ProxSGD([w], lr=1.8 / smoothness(p), momentum=0.9, penalty=strength)
    descend(p, opt, w, steps=10_000)
    assert (torch.count_nonzero(w) == 0) == (factor > 1)


def test_no_ridge_strength_empties_a_model():
    p = problem("diabetes")
    model = linear(p)
    assert torchreg.strength_max(Regularizer(model, L2(1.0)), lambda: loss(model, p)) == float("inf")


def test_thresholding_without_the_gain_of_momentum_would_solve_another_problem():
    """The reason for G: the same steps with λ·(1−μ) in its place, which is what lr·λ amounts to, are far off."""
    p = problem("diabetes")
    w = nn.Parameter(torch.zeros(p.x.shape[1], dtype=torch.float64))
    opt = ProxSGD([w], lr=1.8 / smoothness(p), momentum=0.9, penalty=L1(p.alpha * (1 - 0.9)))
    descend(p, opt, w, steps=20_000)
    assert (w - solution("diabetes", "L1")).abs().max() > 5
