"""Linear models of several tasks with a known solution: a feature's coefficients are zero for all tasks or for none.

The data's loss is ½/n·‖Y − XWᵀ‖² with W of shape (tasks, features), as in torch.nn.Linear: scikit-learn's
MultiTaskLasso(alpha) is GroupLasso(alpha, "columns", group_weight="none"). Sparse group lasso has no solver there: its
solution is certified by the optimality conditions instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sklearn.linear_model import MultiTaskLasso
from torch import Tensor, nn

import torchreg
from torchreg import FISTA, GroupLasso, ProxAdamW, Proximal, ProxSGD, SparseGroupLasso
from torchreg.penalties import Penalty

TASKS, FEATURES, SAMPLES = 4, 60, 100


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def data() -> tuple[Tensor, Tensor]:
    """Correlated features of different scales, eight of which matter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x = (normal(SAMPLES, FEATURES) + 0.7 * normal(SAMPLES, 1)) * torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
    w = torch.zeros(TASKS, FEATURES, dtype=torch.float64)
    w[:, ::8] = normal(TASKS, 8)
    y = x @ w.T + 0.5 * normal(SAMPLES, TASKS)
    return x - x.mean(0), y - y.mean(0)


@cache
def quadratic() -> tuple[Tensor, Tensor, float]:
    """The loss ½⟨W, WG⟩ − ⟨M, W⟩ + c as (G, M, c)."""
    x, y = data()
    return x.T @ x / SAMPLES, y.T @ x / SAMPLES, (y**2).sum().item() / (2 * SAMPLES)


def objective(w: Tensor, penalty: Penalty) -> float:
    gram, moment, rest = quadratic()
    return (0.5 * (w * (w @ gram)).sum() - (moment * w).sum() + rest + penalty.value(w)).item()


def gradient(w: Tensor) -> Tensor:
    gram, moment, _ = quadratic()
    return w @ gram - moment


def alpha(fraction: float) -> float:
    """A fraction of the strength from which on all coefficients are zero."""
    _, moment, _ = quadratic()
    return fraction * moment.norm(dim=0).max().item()


@cache
def solution(fraction: float) -> Tensor:
    x, y = data()
    model = MultiTaskLasso(alpha=alpha(fraction), fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.tensor(model.fit(x.numpy(), y.numpy()).coef_)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(TASKS, FEATURES, dtype=torch.float64))


def smoothness() -> float:
    return torch.linalg.eigvalsh(quadratic()[0])[-1].item()


def _sgd(w: nn.Parameter, penalty: Penalty) -> ProxSGD:
    return ProxSGD([w], lr=1.8 / smoothness(), momentum=0.9, penalty=penalty)


def _adam(w: nn.Parameter, penalty: Penalty) -> ProxAdamW:
    return ProxAdamW([w], lr=0.1, weight_decay=0, penalty=penalty)


def _rmsprop(w: nn.Parameter, penalty: Penalty) -> Proximal:
    return Proximal(torch.optim.RMSprop([w], lr=0.03), penalty=penalty)


OPTIMIZERS: dict[str, Any] = {"ProxSGD": _sgd, "ProxAdamW": _adam, "RMSprop": _rmsprop}


def descend(make: Any, penalty: Penalty, steps: int = 700) -> Tensor:
    w = weight()
    opt = make(w, penalty)
    adaptive = not isinstance(opt, ProxSGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: (1 - t / steps) if adaptive else 1.0)
    for _ in range(steps):
        w.grad = gradient(w.detach())
        opt.step()
        schedule.step()
    return w.detach()


def solve(penalty: Penalty) -> Tensor:
    w = weight()
    opt = FISTA([w], lr=1 / smoothness(), penalty=penalty, tolerance_kkt=1e-10, max_iter=20_000)

    def closure() -> Tensor:
        opt.zero_grad()
        gram, moment, rest = quadratic()
        loss = 0.5 * (w * (w @ gram)).sum() - (moment * w).sum() + rest
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.converged
    return w.detach()


def assert_solved(w: Tensor, expected: Tensor, penalty: Penalty) -> None:
    assert objective(w, penalty) <= objective(expected, penalty) * (1 + 1e-6)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fraction", [1 / 3, 1 / 10, 1 / 30], ids=["1/3", "1/10", "1/30"])
def test_the_objective_and_the_zero_features_are_scikit_learns(make, fraction):
    penalty = GroupLasso(alpha(fraction), "columns", group_weight="none")
    assert_solved(descend(make, penalty), solution(fraction), penalty)


@pytest.mark.parametrize("fraction", [1 / 3, 1 / 10, 1 / 30], ids=["1/3", "1/10", "1/30"])
@pytest.mark.parametrize("group_weight", ["none", "sqrt"])
def test_fista_reaches_the_coefficients_themselves(fraction, group_weight):
    strength = alpha(fraction) / (2 if group_weight == "sqrt" else 1)  # √4 tasks
    penalty = GroupLasso(strength, "columns", group_weight=group_weight)
    w, expected = solve(penalty), solution(fraction)
    assert_solved(w, expected, penalty)
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-6)
    assert penalty.optimality_residual(expected, gradient(expected)).max() <= 1e-6 * strength


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_the_sparse_group_lasso_is_solved_alike_by_all(make, l2):
    a = alpha(1 / 10)
    penalty = SparseGroupLasso(a / 4, a / 2, "columns", group_weight="none", l2=l2)
    expected = solve(penalty)
    assert penalty.optimality_residual(expected, gradient(expected)).max() <= 1e-8
    zero = expected == 0
    assert 0 < zero.all(0).sum() < zero.any(0).sum() < FEATURES  # whole features, and single coefficients
    assert_solved(descend(make, penalty), expected, penalty)


@pytest.mark.parametrize("factor", [1.001, 0.999])
@pytest.mark.parametrize("sparse", [False, True])
def test_strength_max_is_where_the_last_feature_vanishes(factor, sparse):
    penalty: Any = SparseGroupLasso(0.3, 0.7, "columns") if sparse else GroupLasso(1.0, "columns")
    largest = penalty.strength_max(gradient(torch.zeros(TASKS, FEATURES, dtype=torch.float64)))
    w = solve(penalty.scaled(factor * largest.item()))
    assert (w.count_nonzero() == 0) == (factor > 1)


def test_a_linear_layer_trained_by_autograd_is_the_estimator():
    x, y = data()
    model = nn.Linear(FEATURES, TASKS, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    reg = torchreg.Regularizer(model, GroupLasso(alpha(1 / 10), "in_features", group_weight="none"))
    opt = ProxSGD(reg.param_groups(), lr=1.8 / smoothness(), momentum=0.9)

    def loss() -> Tensor:
        return 0.5 * (model(x) - y).square().sum() / SAMPLES

    for _ in range(1000):
        opt.zero_grad()
        loss().backward()
        opt.step()
    torch.testing.assert_close(model.weight.detach(), solution(1 / 10), rtol=0, atol=1e-6)
    assert torchreg.kkt_residual(reg, loss) <= 1e-6
    assert torchreg.strength_max(reg, loss) == pytest.approx(alpha(1.0))


def test_shrinking_all_coefficients_alike_after_adams_step_would_solve_another_problem():
    """The reason for the secular equation: the closed form in its place, with lr·λ for all."""
    penalty = GroupLasso(alpha(1 / 10), "columns", group_weight="none")
    w = descend(lambda w, p: ProxAdamW([w], lr=0.1, weight_decay=0, penalty=p, metric="identity"), penalty)
    assert objective(w, penalty) > 1.001 * objective(solution(1 / 10), penalty)
