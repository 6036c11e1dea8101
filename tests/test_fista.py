"""FISTA: the solution, how few iterations it takes, and that it never makes things worse."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import identical, snapshot
from sklearn import linear_model
from sklearn.datasets import make_regression
from test_adaptive_solved_problems import assert_solved, objective, penalty_at, quadratic
from torch import Tensor, nn

import torchreg
from torchreg import FISTA, L1, MCP, SCAD, ElasticNet, ProxSGD, Regularizer
from torchreg.optim.anderson import History
from torchreg.optim.composite import Composite, difference

FRACTIONS = [1 / 3, 1 / 10, 1 / 30]
fractions = pytest.mark.parametrize("fraction", FRACTIONS, ids=["1/3", "1/10", "1/30"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Quadratic:
    """½·w·Gw − b·w + c as a closure, which counts its calls."""

    def __init__(self, gram: Tensor, moment: Tensor, rest: float = 0.0) -> None:
        self.gram, self.moment, self.rest, self.calls = gram, moment, rest, 0
        self.w = nn.Parameter(torch.zeros_like(moment))

    def __call__(self) -> Tensor:
        self.calls += 1
        product = torch.mv(self.gram, self.w.detach())
        self.w.grad = product - self.moment
        return self.w.detach() @ (product / 2 - self.moment) + self.rest


def proximal_gradient(problem: Quadratic, penalty: Any, residual: float) -> int:
    """Iterations of plain proximal gradient, at the step 1/L, until the optimality conditions hold to ``residual``."""
    opt = ProxSGD([problem.w], lr=1 / torch.linalg.eigvalsh(problem.gram)[-1].item(), penalty=penalty)
    for iteration in range(200_000):
        problem()
        if penalty.optimality_residual(problem.w.detach(), problem.w.grad).max() <= residual:
            return iteration
        opt.step()
    raise AssertionError("proximal gradient did not converge")


@fractions
@pytest.mark.parametrize("penalty", ["L1", "ElasticNet"])
def test_the_objective_and_the_support_are_scikit_learns(penalty, fraction):
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=penalty_at(fraction, penalty))
    opt.step(problem)
    assert opt.converged
    assert_solved(problem.w.detach(), fraction, penalty)
    assert problem.calls == opt.n_evaluations <= 3 * opt.n_iter + 1


@pytest.mark.parametrize(
    ("penalty", "fraction", "times"),
    [
        ("L1", 1 / 3, 15),
        ("L1", 1 / 10, 12),
        ("L1", 1 / 30, 11),
        ("ElasticNet", 1 / 3, 3),
        ("ElasticNet", 1 / 10, 3),
        ("ElasticNet", 1 / 30, 4),
    ],
)
def test_it_takes_a_fraction_of_proximal_gradients_iterations(penalty, fraction, times):
    """These problems are well conditioned: next to the ridge, proximal gradient takes as few as 16 iterations."""
    problem, plain = Quadratic(*quadratic()), Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=penalty_at(fraction, penalty), tolerance_kkt=1e-9)
    opt.step(problem)
    residual = 1e-9 * problem.moment.abs().max().item()
    assert opt.kkt_residual <= residual
    assert times * opt.n_iter <= proximal_gradient(plain, penalty_at(fraction, penalty), residual)
    assert opt.n_evaluations <= 1.25 * opt.n_iter


@pytest.mark.parametrize("seed", range(1, 10))
def test_other_draws_take_as_few(seed):
    x, y = make_regression(n_samples=200, n_features=500, n_informative=10, random_state=seed)
    x, y = torch.tensor(x), torch.tensor(y)
    gram, moment = x.T @ x / 200, x.T @ (y - y.mean()) / 200
    largest = moment.abs().max().item()
    for fraction in FRACTIONS:
        problem, plain = Quadratic(gram, moment), Quadratic(gram, moment)
        opt = FISTA([problem.w], penalty=L1(largest * fraction), tolerance_kkt=1e-9)
        opt.step(problem)
        assert 9.9 * opt.n_iter <= proximal_gradient(plain, L1(largest * fraction), 1e-9 * largest)


def conjugate_gradients(problem: Quadratic, penalty: Any, solution: Tensor, residual: float) -> int:
    """Iterations of conjugate gradients that are told the support and the signs: no method of gradients takes fewer."""
    support, (l1, l2) = solution != 0, penalty.parts()
    curvature = problem.gram[support][:, support] + 2 * l2 * torch.eye(int(support.sum()), dtype=torch.float64)
    rest = direction = (problem.moment - l1 * solution.sign())[support]
    iteration = 0
    while rest.abs().max() > residual:
        bent = curvature @ direction
        left = rest - (rest @ rest) / (direction @ bent) * bent
        direction = left + (left @ left) / (rest @ rest) * direction
        rest, iteration = left, iteration + 1
    return iteration


@fractions
def test_next_to_the_ridge_it_is_near_what_any_method_needs_which_is_more_than_a_tenth(fraction):
    problem, plain = Quadratic(*quadratic()), Quadratic(*quadratic())
    penalty = penalty_at(fraction, "ElasticNet")
    opt = FISTA([problem.w], penalty=penalty, tolerance_kkt=1e-9)
    opt.step(problem)
    residual = 1e-9 * problem.moment.abs().max().item()
    fewest = conjugate_gradients(problem, penalty, problem.w.detach(), residual)
    assert opt.n_iter <= 1.3 * fewest
    assert 10 * fewest > proximal_gradient(plain, penalty, residual)


@fractions
@pytest.mark.parametrize(("rank", "times"), [(20, 10), (5, 30)])
def test_it_takes_a_tenth_of_proximal_gradients_iterations_where_inputs_are_correlated(fraction, rank, times):
    x, y = make_regression(n_samples=200, n_features=500, n_informative=10, effective_rank=rank, random_state=0)
    x, y = torch.tensor(x), torch.tensor(y)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    gram, moment = x.T @ x / 200, x.T @ (y - y.mean()) / 200
    largest = moment.abs().max().item()
    problem, plain = Quadratic(gram, moment), Quadratic(gram, moment)
    opt = FISTA([problem.w], penalty=L1(largest * fraction))
    opt.step(problem)
    assert opt.converged
    iterations = proximal_gradient(plain, L1(largest * fraction), 1e-6 * largest)
    assert times * opt.n_iter <= iterations
    assert times / 2 * opt.n_evaluations <= iterations


def ill_conditioned() -> Quadratic:
    """Curvatures from 1 down to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64)).Q
    curvatures = torch.logspace(0, -3, 100, dtype=torch.float64)
    moment = basis @ (curvatures.sqrt() * torch.randn(100, generator=generator, dtype=torch.float64))
    return Quadratic((basis * curvatures) @ basis.T, moment)


@pytest.mark.parametrize(
    "penalty", [L1(5.0), ElasticNet(5.0, 1.0), MCP(5.0, gamma=3.0)], ids=["L1", "ElasticNet", "MCP"]
)
def test_where_the_last_points_lead_to_saves_calls_of_the_closure(penalty):
    with_it, without = Quadratic(*quadratic()), Quadratic(*quadratic())
    opt = FISTA([with_it.w], penalty=penalty, tolerance_kkt=1e-9)
    bare = FISTA([without.w], penalty=penalty, tolerance_kkt=1e-9, history_size=0)
    opt.step(with_it)
    bare.step(without)
    assert opt.converged
    assert bare.converged
    assert with_it.calls <= 0.95 * without.calls
    torch.testing.assert_close(with_it.w, without.w, rtol=1e-6, atol=1e-6)
    assert torch.equal(with_it.w == 0, without.w == 0)
    assert "history" not in bare.state[without.w]


def test_it_takes_a_tenth_of_the_original_momentums_iterations_where_the_problem_is_ill_conditioned():
    """The original has its best step, 1/L."""
    ours, theirs, options = ill_conditioned(), ill_conditioned(), {"penalty": L1(1e-3), "max_iter": 4000}
    opt = FISTA([ours.w], **options)
    original = FISTA([theirs.w], **options, backtracking=False, restart=False)
    opt.step(ours)
    original.step(theirs)
    assert opt.converged
    assert 10 * opt.n_iter <= original.n_iter


def test_there_is_momentum_even_where_the_penalty_limits_the_steps_so_that_none_is_refused():
    problem = ill_conditioned()
    opt = FISTA([problem.w], penalty=MCP(1e-3, gamma=3.0))
    opt.step(problem)
    assert opt.converged
    assert opt.n_iter <= 450


@pytest.mark.parametrize("penalty", [L1(1e-3), MCP(1e-3, gamma=3.0)], ids=["L1", "MCP"])
def test_the_objective_never_rises_under_momentum(penalty):
    problem, last = ill_conditioned(), math.inf
    opt = FISTA([problem.w], penalty=penalty, max_iter=1)
    for _ in range(150):
        loss = opt.step(problem)
        value = (loss + penalty.value(problem.w.detach())).item()
        assert value <= last + 1e-13 * abs(value)
        last = value
    assert problem.calls > 1.5 * 150, "there was no momentum"


def test_it_goes_on_where_the_objective_falls_by_less_than_its_rounding():
    problem, penalty = Quadratic(*quadratic()), MCP(5.0, gamma=3.0)
    opt = FISTA([problem.w], penalty=penalty, tolerance_kkt=1e-12, max_iter=60)
    opt.step(problem)
    assert opt.converged
    assert opt.n_evaluations <= 2 * opt.n_iter


@pytest.mark.parametrize("penalty", [L1(5.0), MCP(5.0, gamma=3.0), SCAD(5.0)], ids=["L1", "MCP", "SCAD"])
def test_the_objective_never_rises_and_single_iterations_add_up_to_the_solve(penalty):
    whole, single = Quadratic(*quadratic()), Quadratic(*quadratic())
    opt, one = FISTA([whole.w], penalty=penalty), FISTA([single.w], penalty=penalty, max_iter=1)
    opt.step(whole)
    assert opt.converged
    assert penalty.optimality_residual(whole.w.detach(), whole.w.grad).max() == opt.kkt_residual
    last, iterations = math.inf, 0
    while not one.converged:
        loss = one.step(single)
        iterations += one.n_iter
        value = objective(single.w.detach(), penalty)
        assert loss == pytest.approx(value - penalty.value(single.w.detach()).item())
        assert value <= last * (1 + 1e-14)
        last = value
    assert iterations == opt.n_iter
    assert identical([single.w.detach()], [whole.w.detach()])


def test_without_restart_and_backtracking_it_is_the_algorithm_of_2009():
    gram, moment, rest = quadratic()
    penalty, step = penalty_at(1 / 10, "L1"), 0.15
    problem = Quadratic(gram, moment, rest)
    opt = FISTA([problem.w], lr=step, penalty=penalty, max_iter=20, backtracking=False, restart=False)
    opt.step(problem)
    x = y = torch.zeros_like(moment)
    t = 1.0
    for _ in range(20):
        new = penalty.prox(y - step * (gram @ y - moment), step)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        x, y = new, new + (last - 1) / t * (new - x)
    torch.testing.assert_close(problem.w.detach(), x, rtol=1e-10, atol=1e-10)


_L1 = {} if "deprecated" in str(linear_model.LogisticRegression().penalty) else {"penalty": "elasticnet"}


def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 20, generator=generator, dtype=torch.float64)
    y = x[:, 0] - 2 * x[:, 1] + 0.5 + torch.randn(120, generator=generator) > 0
    return x.numpy(), y.double().numpy()


def logistic() -> tuple[nn.Linear, Any]:
    """A classifier with a penalised weight and a free bias, and its closure's loss."""
    x, y = map(torch.tensor, data())
    model = nn.Linear(20, 1, dtype=torch.float64)
    return model, lambda: nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)


def solved(groups: Any, loss: Any, **options: Any) -> FISTA:
    opt = FISTA(groups, **options)

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    opt.step(closure)
    return opt


def test_logistic_regression_is_scikit_learns():
    model, loss = logistic()
    reg = Regularizer(model, L1(0.02))
    opt = solved(reg.param_groups(), loss, tolerance_kkt=1e-10)
    assert opt.converged
    assert torchreg.kkt_residual(reg).item() == opt.kkt_residual
    options = {"C": 1 / (0.02 * 120), "solver": "saga", "tol": 1e-12, "max_iter": 100_000}
    theirs = linear_model.LogisticRegression(l1_ratio=1.0, **options, **_L1).fit(*data())
    assert torch.allclose(model.weight.detach(), torch.tensor(theirs.coef_), atol=1e-6)
    assert torch.equal(model.weight == 0, torch.tensor(theirs.coef_) == 0)
    assert model.bias.item() == pytest.approx(theirs.intercept_.item(), abs=1e-6)


def test_rules_may_have_steps_of_their_own():
    model, loss = logistic()
    one = solved(Regularizer(model, L1(0.02)).param_groups(), loss, tolerance_kkt=1e-10)
    other, other_loss = logistic()
    groups = Regularizer(other, L1(0.02)).param_groups()
    groups[0]["lr"] = 5.0
    assert one.converged
    assert solved(groups, other_loss, tolerance_kkt=1e-10).converged
    torch.testing.assert_close(other.weight, model.weight)


def test_single_precision_ends_where_its_rounding_does():
    gram, moment, rest = quadratic()
    problem = Quadratic(gram.float(), moment.float(), rest)
    opt = FISTA([problem.w], penalty=penalty_at(1 / 10, "L1"), tolerance_kkt=1e-9, max_iter=200)
    opt.step(problem)
    assert opt.kkt_residual <= 1e-5 * moment.abs().max()
    assert_solved(problem.w.detach().double(), 1 / 10, "L1")


def test_a_strength_that_moves_between_calls_is_followed():
    problem = Quadratic(*quadratic())
    scale = torch.tensor(30 / 3)
    opt = FISTA([problem.w], penalty=penalty_at(1 / 30, "L1"), strength_scale=scale)
    for fraction, value in zip(FRACTIONS, (10, 3, 1), strict=True):
        scale.fill_(value)
        opt.step(problem)
        assert opt.converged
        assert_solved(problem.w.detach(), fraction, "L1")


@torch.no_grad()
def composite() -> tuple[Composite, History]:
    """Two groups with steps of their own, one of them complex, and a history of three points."""
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 3, generator=generator, dtype=dtype)) for dtype in (torch.float64, torch.complex128)
    ]

    def closure() -> Tensor:
        for p in params:
            p.grad = p.detach() * 2
        return sum((p.detach().abs() ** 2).sum() for p in params)

    groups = [
        {"params": [p], "lr": lr, "penalty": L1(0.1), "strength_scale": 1.0}
        for p, lr in zip(params, (0.1, 0.3), strict=True)
    ]
    problem = Composite(groups, closure)
    history = History(problem, 3, 0.5)
    for i in range(3):
        history.add(problem.at([w + i * w.sin() + i * i * w.cos() for w in problem.start.weights]), 0.5)
    return problem, history


def test_the_last_points_are_combined_in_the_groups_metric():
    problem, history = composite()
    assert len(history.points) == 3
    residuals = [difference(p.weights, problem.forward_backward(p, 0.5)) for p in history.points]
    mix, fall = history.mixed()
    assert fall == pytest.approx(problem.dot(residuals[-1], residuals[-1], metric=True))  # over 2·½

    def length(a: float, b: float) -> float:
        combined = [a * x + b * y + (1 - a - b) * z for x, y, z in zip(*residuals, strict=True)]
        return problem.dot(combined, combined, metric=True)

    weights = [torch.view_as_real(w) if w.is_complex() else w for w in mix.weights]
    points = [[torch.view_as_real(w) if w.is_complex() else w for w in p.weights] for p in history.points]
    columns = torch.stack([torch.cat([w.flatten() for w in p]) for p in points], 1)
    shares = torch.linalg.lstsq(columns, torch.cat([w.flatten() for w in weights])[:, None]).solution.flatten()
    assert shares.sum().item() == pytest.approx(1)
    a, b = shares[:2].tolist()
    for da, db in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert length(a, b) < length(a + da, b + db)


@pytest.mark.parametrize("changed", ["weights", "grads", "nothing"])
def test_points_are_kept_between_calls_where_the_problem_is_the_same(changed):
    problem, history = composite()
    last = history.points[-1]
    kept = history.pack(last)
    problem.start = copy.deepcopy(last)
    if changed != "nothing":
        getattr(problem.start, changed)[1][2, 1] += 1e-3
    resumed = History(problem, 3, 0.5)
    resumed.unpack(kept)
    assert len(resumed.points) == (2 if changed == "nothing" else 0)


def test_points_are_dropped_where_none_are_asked_for():
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=penalty_at(1 / 10, "L1"), max_iter=4)
    opt.step(problem)
    assert opt.state[problem.w]["history"].shape == (5, 2, 500)
    opt.param_groups[0]["history_size"] = 0
    opt.step(problem)
    assert "history" not in opt.state[problem.w]


def test_a_constant_that_hides_the_falls_of_the_loss_does_not_stall_it():
    generator = torch.Generator().manual_seed(73634)
    x = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    true = torch.zeros(60, dtype=torch.float64)
    true[:5] = 3 * torch.randn(5, generator=generator, dtype=torch.float64)
    y = x @ true + torch.randn(40, generator=generator, dtype=torch.float64)
    penalty = MCP(0.03 * (x.T @ y / 40).abs().max().item(), gamma=3.0)
    w, x, y = nn.Parameter(torch.zeros(60)), x.float(), y.float()
    opt = solved(
        [w],
        lambda: (x @ w - y).square().sum() / 80 + 1e6,
        lr=100.0,
        penalty=penalty,
        tolerance_kkt=1e-5,
        max_iter=2000,
    )
    assert opt.converged


def test_single_iterations_add_up_where_weights_are_not_contiguous():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 33, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 33, dtype=torch.float64)
    y = torch.randn(60, 57, generator=generator, dtype=torch.float64)
    found = []
    for calls in (1, 30):
        w = nn.Parameter(torch.zeros(57, 33, dtype=torch.float64).t())
        opt = FISTA([w], penalty=torchreg.GroupLasso(0.002, "rows"), max_iter=30 // calls, tolerance_kkt=1e-12)

        def closure(w: Tensor = w, opt: FISTA = opt) -> Tensor:
            opt.zero_grad()
            loss = (x @ w - y).square().mean()
            loss.backward()
            return loss

        for _ in range(calls):
            opt.step(closure)
        found.append(w.detach())
    assert torch.equal(*found)


def test_a_loss_that_is_not_finite_everywhere_is_stayed_away_from():
    w = nn.Parameter(torch.tensor([0.01], dtype=torch.float64))
    opt = FISTA([w], lr=100.0, penalty=L1(2.0))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = -torch.log(w).sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.converged
    assert w.item() == pytest.approx(0.5, rel=1e-4)


def test_what_has_no_gradient_stays_and_complex_weights_are_solved():
    w = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    still = nn.Parameter(torch.ones(3))
    opt = FISTA([w, still], penalty=L1(1.0))
    target = torch.tensor([3 + 4j, 0.3 + 0.4j], dtype=torch.complex128)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (w - target).abs().square().sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    torch.testing.assert_close(w.detach(), torch.tensor([2.4 + 3.2j, 0], dtype=torch.complex128))
    assert torch.equal(still.detach(), torch.ones(3))


def test_constraints_are_solved():
    """Non-negative least squares, and the best of three weights together."""
    gram, moment, rest = quadratic()
    problem = Quadratic(gram[:20, :20], moment[:20], rest)
    opt = FISTA([problem.w], penalty=torchreg.NonNegative())
    opt.step(problem)
    assert opt.converged
    assert (problem.w >= 0).all()
    slope = problem.gram @ problem.w.detach() - problem.moment
    assert torch.minimum(problem.w.detach(), slope).abs().max() <= 1e-5 * problem.moment.abs().max()
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    targets = [torch.tensor([3.0, 0.1, -2.0]), torch.tensor([0.2, 4.0])]
    opt = FISTA(params, penalty=torchreg.TopK(3, scope="rule"))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum((p - target).square().sum() for p, target in zip(params, targets, strict=True)) / 2
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.allclose(torch.cat([p.detach() for p in params]), torch.tensor([3.0, 0, -2, 0, 4]))


# Checkpoints


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resuming_is_exact(how):
    penalty = penalty_at(1 / 30, "ElasticNet")
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=penalty, max_iter=4, strength_scale=torch.tensor(1.0))
    opt.step(problem)
    if how == "state_dict":
        other = Quadratic(*quadratic())
        other.w.data.copy_(problem.w)
        resumed = FISTA([other.w], penalty=L1(1.0), max_iter=7)
        resumed.load_state_dict(saved(opt.state_dict()))
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((problem, opt))
    else:
        other, resumed = pickle.loads(pickle.dumps((problem, opt)))
    for solver, closure in ((opt, problem), (resumed, other)):
        for _ in range(3):
            solver.step(closure)
    assert identical([other.w.detach()], [problem.w.detach()])
    assert (resumed.n_iter, resumed.kkt_residual) == (opt.n_iter, opt.kkt_residual)
    assert resumed.param_groups[0]["penalty"] == penalty


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda s: s["param_groups"][0].pop("max_iter"), ValueError),
        (lambda s: s["param_groups"][0].update(lr=0.0), ValueError),
        (lambda s: s["param_groups"][0].update(penalty=0.1), TypeError),
        (lambda s: s["state"][0].update(previous=torch.ones(3)), ValueError),
        (lambda s: s["state"][0].update(history=torch.ones(3, 2, 499)), ValueError),
        (lambda s: s["state"][0].update(history=torch.ones(500)), ValueError),
        (lambda s: s["state"][0].update(history="yes"), TypeError),
        (lambda s: s["state"][0].update(history=torch.ones(3, 2, 500).to_sparse()), TypeError),
    ],
    ids=["other optimizer", "learning rate", "penalty", "shape", "history", "no points", "no tensor", "sparse"],
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(spoil, error):
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=L1(5.0), max_iter=3)
    opt.step(problem)
    state = copy.deepcopy(opt.state_dict())
    spoil(state)
    before, groups = snapshot([problem.w, opt.state[problem.w]["previous"]]), opt.param_groups
    with pytest.raises(error):
        opt.load_state_dict(state)
    assert identical(before, snapshot([problem.w, opt.state[problem.w]["previous"]]))
    assert opt.param_groups is groups


# Errors


def test_no_closure():
    with pytest.raises(TypeError, match="FISTA needs a closure"):
        FISTA([nn.Parameter(torch.ones(2))]).step()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_the_start(loss):
    problem = Quadratic(*quadratic())
    problem.rest = loss
    with pytest.raises(ValueError, match="finite loss"):
        FISTA([problem.w], penalty=L1(5.0)).step(problem)
    assert torch.count_nonzero(problem.w) == 0


def test_a_loss_that_never_falls():
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=L1(5.0))

    def closure() -> Tensor:
        problem()
        return torch.tensor(float(torch.count_nonzero(problem.w)))

    with pytest.raises(ValueError, match="no step down to"):
        opt.step(closure)
    assert torch.count_nonzero(problem.w) == 0


def test_a_closure_that_raises_leaves_the_best_weights():
    problem = Quadratic(*quadratic())
    opt = FISTA([problem.w], penalty=L1(5.0), max_iter=3)
    opt.step(problem)
    best = snapshot([problem.w])

    def closure() -> Tensor:
        if not torch.equal(problem.w, best[0]):
            raise KeyboardInterrupt
        return problem()

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert identical(snapshot([problem.w]), best)


def test_a_closure_without_backward_or_loss():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="must call backward"):
        FISTA([w]).step(lambda: w.sum())
    with pytest.raises(ValueError, match="return the loss"):
        FISTA([w]).step(lambda: None)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 0.0}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"backtracking": "no"}, TypeError),
        ({"restart": 0}, TypeError),
        ({"max_iter": 0}, ValueError),
        ({"max_iter": 2.5}, TypeError),
        ({"history_size": -1}, ValueError),
        ({"history_size": 2.5}, TypeError),
        ({"tolerance_kkt": -1.0}, ValueError),
        ({"penalty": 0.1}, TypeError),
        ({"strength_scale": math.inf}, ValueError),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range(options, error):
    with pytest.raises(error):
        FISTA([nn.Parameter(torch.ones(2))], **options)


def test_half_precision_and_settings_that_differ_between_groups():
    with pytest.raises(TypeError, match="bfloat16"):
        FISTA([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = FISTA([{"params": params[:1]}, {"params": params[1:], "max_iter": 3}])
    with pytest.raises(ValueError, match=r"max_iter.*same in all"):
        opt.step(lambda: None)
    opt = FISTA([{"params": params[:1]}, {"params": params[1:], "history_size": 3}])
    with pytest.raises(ValueError, match=r"history_size.*same in all"):
        opt.step(lambda: None)
    with pytest.raises(ValueError, match="Unknown key"):
        FISTA([{"params": params, "momentum": 0.9}])
    with pytest.raises(ValueError, match="applies penalties itself"):
        Regularizer(nn.Linear(2, 2), ElasticNet(0.1, 0.1)).attach(FISTA(params))
