"""RMDA: the published algorithm, its solution, and a support that settles under minibatch noise."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import PENALTIES, identical, parameters, set_gradients, snapshot
from sklearn import linear_model
from sklearn.datasets import make_regression
from test_adaptive_solved_problems import assert_solved, penalty_at, quadratic
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import StepLR

import torchreg
from torchreg import L1, MCP, RMDA, ElasticNet, ProxSGD, Regularizer


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        opt.step()


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The algorithm


@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_the_published_algorithm(penalty, momentum, maximize):
    """With two learning rates, a moved strength scale and a restart."""
    params = parameters(torch.float64)
    opt = RMDA(params, lr=0.1, momentum=momentum, penalty=penalty, strength_scale=0.5, maximize=maximize)
    weights = [p.detach().clone() for p in params]
    sums, alpha, start, t = [torch.zeros_like(w) for w in weights], 0.0, weights, 0
    c = 1 - momentum
    for step, (lr, scale) in enumerate([(0.1, 0.5), (0.1, 0.5), (0.05, 0.5), (0.05, 1.0), (0.02, 1.0)]):
        if step == 3:
            opt.restart()
            sums, alpha, start, t = [torch.zeros_like(w) for w in weights], 0.0, weights, 0
        opt.param_groups[0].update(lr=lr, strength_scale=scale)
        set_gradients(params, step)
        opt.step()
        t += 1
        alpha += lr * t**0.5
        sign = -1 if maximize else 1
        sums = [v + sign * lr * t**0.5 * p.grad for v, p in zip(sums, params, strict=True)]
        averaged = [w0 - v / t**0.5 for w0, v in zip(start, sums, strict=True)]
        if penalty is not None:
            averaged = [penalty.prox(w, scale * alpha / t**0.5) for w in averaged]
        weights = [(1 - c) * w + c * new for w, new in zip(weights, averaged, strict=True)]
        for p, w in zip(params, weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
        if penalty is not None:
            assert opt.effective_step(opt.param_groups[0]) == pytest.approx(scale * alpha / t**0.5)


def test_a_weight_that_is_averaged_away_decays_and_is_zero_without_momentum():
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    opt = RMDA([w], lr=1.0, momentum=0.5, penalty=L1(10.0))
    for expected in (0.5, 0.25):
        w.grad = torch.zeros(2)
        opt.step()
        assert torch.equal(w.detach(), torch.tensor([expected, -expected]))
    opt.param_groups[0]["momentum"] = 0.0
    opt.step()
    assert identical([w.detach()], [torch.zeros(2)])


def test_settling_takes_the_momentum_to_zero():
    opt = RMDA(parameters(), momentum=0.5)
    values = []
    for count in range(1, 6):
        opt.settle(count)
        values.append(opt.param_groups[0]["momentum"])
    assert values == pytest.approx([0.5, 1 - 0.5 * 2**0.5, 1 - 0.5 * 3**0.5, 0, 0])
    assert values[3:] == [0.0, 0.0]
    other = RMDA(parameters(), momentum=0.9)
    other.load_state_dict(saved(opt.state_dict()))
    other.settle(2)
    assert other.param_groups[0]["momentum"] == pytest.approx(1 - 0.5 * 2**0.5)
    for wrong, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="count"):
            opt.settle(wrong)


# The solution


@pytest.mark.parametrize("penalty", ["L1", "ElasticNet"])
@pytest.mark.parametrize("fraction", [1 / 3, 1 / 10, 1 / 30], ids=["1/3", "1/10", "1/30"])
def test_with_restarts_it_reaches_scikit_learns_objective_and_support(penalty, fraction):
    gram, moment, _ = quadratic()
    w = nn.Parameter(torch.zeros_like(moment))
    opt = RMDA([w], lr=0.2, momentum=0.0, penalty=penalty_at(fraction, penalty))
    for _ in range(5):
        for _ in range(100):
            w.grad = torch.mv(gram, w.detach()).sub_(moment)
            opt.step()
        opt.restart()
    assert_solved(w.detach(), fraction, penalty)


class Noisy:
    """A lasso on minibatches: 400 observations of 100 inputs of which 10 matter, and noise."""

    def __init__(self) -> None:
        x, y = make_regression(n_samples=400, n_features=100, n_informative=10, noise=20.0, random_state=0)
        x, y = torch.tensor(x), torch.tensor(y)
        self.x, self.y = (x - x.mean(0)) / x.std(0, correction=0), y - y.mean()
        alpha = (self.x.T @ self.y / 400).abs().max().item() / 10
        self.penalty = L1(alpha)
        model = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
        self.solution = torch.tensor(model.fit(self.x.numpy(), self.y.numpy()).coef_)

    def objective(self, w: Tensor) -> float:
        return (0.5 * (self.x @ w - self.y).square().mean() + self.penalty.value(w)).item()

    def train(self, opt: Any, w: nn.Parameter, lr: float, seed: int) -> float:
        """Three stages of falling learning rates; how many weights a step woke or zeroed in the last fifth."""
        generator = torch.Generator().manual_seed(seed)
        changes = []
        for stage, steps in enumerate((600, 600, 1200)):
            opt.param_groups[0]["lr"] = lr * 0.3**stage
            if stage and isinstance(opt, RMDA):
                opt.restart()
            for step in range(steps):
                batch = torch.randint(400, (20,), generator=generator)
                w.grad = self.x[batch].T @ (self.x[batch] @ w.detach() - self.y[batch]) / 20
                before = w.detach() == 0
                opt.step()
                if stage == 2 and step % 5 == 4 and isinstance(opt, RMDA):
                    opt.settle(step // 5 + 1)
                changes.append((before != (w == 0)).sum().item())
        last = changes[-len(changes) // 5 :]
        return sum(last) / len(last)


@pytest.mark.parametrize("seed", range(3))
def test_the_support_settles_where_that_of_proximal_sgd_does_not(seed):
    problem = Noisy()
    settled, awake = nn.Parameter(torch.zeros(100).double()), nn.Parameter(torch.zeros(100).double())
    changes = problem.train(RMDA([settled], momentum=0.9, penalty=problem.penalty), settled, lr=0.05, seed=seed)
    others = problem.train(ProxSGD([awake], penalty=problem.penalty), awake, lr=0.05, seed=seed)
    assert changes <= 0.01
    assert others >= 10
    assert torch.equal(settled == 0, problem.solution == 0)
    assert problem.objective(settled.detach()) <= 1.001 * problem.objective(problem.solution)
    error = torch.linalg.vector_norm(settled.detach() - problem.solution)
    assert error <= 0.02 * torch.linalg.vector_norm(problem.solution)


# It is an optimizer


def test_a_learning_rate_of_zero_changes_nothing_also_later():
    params = parameters()
    opt = RMDA(params, lr=0.0, momentum=0.5, penalty=L1(5.0))
    before = snapshot(params)
    train(opt, params, range(2))
    assert identical(snapshot(params), before)
    opt.param_groups[0]["lr"] = 0.1
    train(opt, params, range(2, 4))
    between, state = snapshot(params), copy.deepcopy(opt.state_dict()["state"])
    opt.param_groups[0]["lr"] = 0.0
    train(opt, params, range(4, 6))
    assert identical(snapshot(params), between)
    assert opt.state[params[0]]["step"] == state[0]["step"] == 2
    fresh = parameters()
    train(RMDA(fresh, lr=0.1, momentum=0.5, penalty=L1(5.0)), fresh, range(2, 4))
    assert identical(snapshot(fresh), between)


def test_learning_rate_and_strength_scale_may_be_tensors():
    mine, theirs = parameters(), parameters()
    scale = torch.tensor(0.5)
    train(RMDA(mine, lr=torch.tensor(0.1), momentum=0.5, penalty=L1(0.3), strength_scale=scale), mine, range(4))
    train(RMDA(theirs, lr=0.1, momentum=0.5, penalty=L1(0.15)), theirs, range(4))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_weights_without_a_gradient_rest_and_count_from_their_first():
    params = parameters(torch.float64)
    late = params[0]
    before = late.detach().clone()
    opt = RMDA(params, lr=0.1, momentum=0.0, penalty=L1(0.3))
    set_gradients(params, 0)
    late.grad = None
    opt.step()
    assert torch.equal(late.detach(), before)
    set_gradients(params, 1)
    opt.step()
    torch.testing.assert_close(late.detach(), L1(0.3).prox(before - 0.1 * late.grad, 0.1))


def test_complex_weights_shrink_by_their_modulus():
    w = nn.Parameter(torch.tensor([3 + 4j, 0.3 + 0.4j], dtype=torch.complex128))
    opt = RMDA([w], lr=1.0, momentum=0.0, penalty=L1(1.0))
    w.grad = torch.zeros_like(w)
    opt.step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.4 + 3.2j, 0], dtype=torch.complex128))


def test_gradients_stay_and_a_closure_is_evaluated_once():
    w = nn.Parameter(torch.tensor([2.0]))
    opt = RMDA([w], lr=0.5, momentum=0.0, penalty=L1(0.5))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    assert opt.step(closure).item() == 2.0
    assert w.item() == 0.75
    assert w.grad.item() == 2.0


def test_schedules_of_learning_rate_and_strength_work():
    params = parameters()
    opt = RMDA(params, lr=0.1, penalty=L1(0.3))
    lr, strength = StepLR(opt, 1, gamma=0.5), torchreg.schedules.WarmupStrength(opt, until=2)
    train(opt, params, range(1))
    lr.step()
    strength.step()
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["strength_scale"]) == (0.05, 0.5)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaled_loss_takes_the_same_step_or_none(overflows):
    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    before = snapshot(list(model.parameters()))
    opt, other = (RMDA(m.parameters(), momentum=0.5, penalty=L1(0.1)) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones(4, 3)
    scaler.scale(model(x).square().mean() * (math.inf if overflows else 1.0)).backward()
    scaler.step(opt)
    plain(x).square().mean().backward()
    other.step()
    expected = before if overflows else snapshot(list(plain.parameters()))
    assert identical(snapshot(list(model.parameters())), expected)


# Checkpoints


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in [key, *leaves(value)]]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
@pytest.mark.parametrize("restarted", [False, True])
def test_resuming_is_exact(how, penalty, restarted):
    params = parameters()
    opt = RMDA(params, lr=torch.tensor(0.1), momentum=0.9, penalty=penalty, strength_scale=torch.tensor(0.5))
    train(opt, params, range(3))
    if restarted:
        opt.restart()
    if how == "state_dict":
        state = opt.state_dict()
        assert {type(leaf) for leaf in leaves(state)} <= {int, float, bool, str, Tensor, type(None)}
        others = parameters()
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q)
        resumed = RMDA(others, penalty=L1(5.0), strength_scale=torch.tensor(3.0))
        scale = resumed.param_groups[0]["strength_scale"]
        resumed.load_state_dict(saved(state))
        assert resumed.param_groups[0]["strength_scale"] is scale
    elif how == "deepcopy":
        others, resumed = copy.deepcopy((params, opt))
    else:
        others, resumed = pickle.loads(pickle.dumps((params, opt)))
    train(opt, params, range(3, 6))
    train(resumed, others, range(3, 6))
    assert identical(snapshot(others), snapshot(params))
    assert resumed.param_groups[0]["penalty"] == penalty


def test_distributed_checkpoints_resume_exactly_and_change_no_weight():
    def start(model: nn.Module) -> RMDA:
        reg = Regularizer(model, {"0.weight": L1(0.1), "1.weight": ElasticNet(0.1, 0.2)})
        return RMDA(reg.param_groups(), lr=0.1, momentum=0.5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    opt, params = start(model), list(model.parameters())
    before = snapshot(params)
    get_optimizer_state_dict(model, opt)
    assert identical(snapshot(params), before)
    train(opt, params, range(2))
    weights, state = snapshot(params), saved(get_optimizer_state_dict(model, opt))
    train(opt, params, range(2, 4))
    resumed = copy.deepcopy(model)
    other, others = start(resumed), list(resumed.parameters())
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
        p.grad = None
    set_optimizer_state_dict(resumed, other, state)
    assert identical(snapshot(others), weights)
    train(other, others, range(2, 4))
    assert identical(snapshot(others), snapshot(params))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda s: s["param_groups"][0].pop("maximize"), ValueError),
        (lambda s: s["param_groups"][0].update(lr=-1.0), ValueError),
        (lambda s: s["param_groups"][0].update(momentum=1.0), ValueError),
        (lambda s: s["param_groups"][0].update(penalty=0.1), TypeError),
        (lambda s: s["state"][3].update(grad_sum=torch.ones(7, 3)), ValueError),
    ],
    ids=["other optimizer", "learning rate", "momentum", "penalty", "shape"],
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(spoil, error):
    params = parameters()
    opt = RMDA(params, penalty=ElasticNet(0.3, 0.2), strength_scale=torch.tensor(0.5))
    train(opt, params, range(2))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["strength_scale"] = 4.0
    spoil(state)
    tensors = [v for entries in opt.state.values() for v in entries.values() if isinstance(v, Tensor)]
    before, groups = snapshot(params + tensors), opt.param_groups
    with pytest.raises(error):
        opt.load_state_dict(state)
    assert identical(snapshot(params + tensors), before)
    assert opt.param_groups is groups
    assert groups[0]["strength_scale"] == 0.5


# Errors


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -0.1}, ValueError),
        ({"lr": math.inf}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"momentum": -0.1}, ValueError),
        ({"momentum": None}, TypeError),
        ({"penalty": 0.1}, TypeError),
        ({"strength_scale": -1.0}, ValueError),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range(options, error):
    with pytest.raises(error):
        RMDA(parameters(), **options)


def test_parameters_that_it_can_not_take():
    with pytest.raises(TypeError, match="bfloat16"):
        RMDA(parameters(torch.bfloat16))
    with pytest.raises(ValueError, match="Unknown key"):
        RMDA([{"params": parameters(), "weight_decay": 0.1}])
    with pytest.raises(ValueError, match="applies penalties itself"):
        Regularizer(nn.Linear(2, 2), L1(0.1)).attach(RMDA(parameters()))
    emb, other = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    opt = RMDA([other, emb.weight], penalty=L1(0.1))
    emb(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(TypeError, match="sparse"):
        opt.step()
    assert torch.equal(other.detach(), torch.ones(2))
    assert not opt.state


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("penalty", [None, L1(0.1), torchreg.GroupLasso(0.1, "tensor")], ids=str)
def test_infinity_stays_infinite_and_nan_nan(momentum, penalty):
    w = nn.Parameter(torch.zeros(2, 2))
    opt = RMDA([w], lr=0.1, momentum=momentum, penalty=penalty)
    for _ in range(3):
        w.grad = torch.tensor([[torch.inf, -1.0], [1.0, -torch.inf]])
        opt.step()
    assert w[0, 0] == -torch.inf
    assert w[1, 1] == torch.inf
    assert w[0, 1] > 0 > w[1, 0]
    w.grad = torch.tensor([[0.0, torch.nan], [1.0, 0.0]])
    opt.step()
    assert w[0, 1].isnan()


@pytest.mark.parametrize("kind", [RMDA, torchreg.FTRL])
def test_a_step_can_not_be_captured(kind, monkeypatch):
    """A CUDAGraph would replay the numbers of its steps; here one is only said to be captured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    params = parameters()
    before = [p.detach().clone() for p in params]
    opt = kind(params, penalty=L1(0.1))
    with pytest.raises(RuntimeError, match=f"{kind.__name__} can't be captured"):
        opt.step()
    assert all(map(torch.equal, before, params))


def test_a_joint_penalty_gets_all_weights_of_its_rule():
    params = [p for p in parameters() if p.numel()]
    opt = RMDA(params, momentum=0.0, penalty=torchreg.TopK(3, scope="rule"))
    opt.step()
    assert sum(int(torch.count_nonzero(p)) for p in params) == 3


def test_a_step_that_has_grown_too_long_for_the_penalty_is_refused_before_any_change():
    plain, penalised = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [plain]}, {"params": [penalised], "penalty": MCP(0.1, gamma=1.5)}]
    optimizer = RMDA(groups, lr=0.5, momentum=0.5)
    for p in (plain, penalised):
        p.grad = torch.full_like(p, 0.1)
    for _ in range(3):
        optimizer.step()
    before = copy.deepcopy((plain, penalised, optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=r"gamma=1.5 needs step < gamma, got the step 1.53"):
        optimizer.step()
    torch.testing.assert_close((plain, penalised, optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    optimizer.restart()
    optimizer.step()
