"""What holds of MCP, SCAD, log-sum, L1/2 and L0 beyond the properties that all penalties share."""

import math
import re

import pytest
import torch
from descent import descend
from penalty_table import PENALTIES

from torchreg import L0, L1, MCP, SCAD, LHalf, LogSum, ProxAdamW, ProxSGD, Regularizer, kkt_residual, strength_max
from torchreg.penalties import from_dict

F64 = torch.float64
NONCONVEX = [case for case in PENALTIES if not case.convex]

every_nonconvex = pytest.mark.parametrize("case", NONCONVEX, ids=lambda case: case.name)


def moduli(count=60, largest=8.0):
    return torch.linspace(0, largest, count, dtype=F64)


# The proximal operator


@every_nonconvex
@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 2.5, 2.9, 3.1, 4.0, 4.9, 30.0])
@pytest.mark.parametrize("multiple", [0.3, 1.0])
def test_prox_of_steps_per_weight_is_the_global_argmin_however_long_they_are(case, step, multiple):
    w = moduli()
    penalty = case.penalty().scaled(multiple)
    best = penalty.prox(w, torch.full_like(w, step))
    grid = torch.linspace(0, 8, 20001, dtype=F64)

    def objective(v):
        return 0.5 * (v - w.unsqueeze(-1)) ** 2 + multiple * step * case.brute_value(v)

    assert (objective(best.unsqueeze(-1)).squeeze(-1) <= objective(grid).min(-1).values + 1e-12).all()
    assert (best <= w).all()
    assert torch.equal(penalty.prox(w, torch.tensor([step], dtype=F64)), best)


@every_nonconvex
def test_steps_that_differ_by_orders_of_magnitude_are_each_their_own(case):
    steps = torch.logspace(-6, 3, 40, dtype=F64)
    w = 3 * torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(0))
    alone = [case.penalty().prox(w[i], steps[i : i + 1].expand(1)[0].reshape(())) for i in range(25)]
    torch.testing.assert_close(case.penalty().prox(w, steps)[:25], torch.stack(alone), rtol=1e-14, atol=1e-14)


@every_nonconvex
@pytest.mark.parametrize("step", [1e-3, 0.5, 2.0])
def test_a_number_and_a_tensor_of_steps_mean_the_same(case, step):
    w = torch.cat([moduli(500), -moduli(500)])
    together = case.penalty().prox(w, torch.full_like(w, step))
    torch.testing.assert_close(case.penalty().prox(w, step), together, rtol=1e-14, atol=1e-14)


@every_nonconvex
@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 2.9, 3.5, 4.6, 5.0, 40.0])
def test_threshold_is_the_modulus_up_to_which_prox_gives_zero(case, step):
    for penalty in (case.penalty(), case.penalty().scaled(0.7)):
        threshold = penalty.threshold(torch.full((1,), step, dtype=F64))
        assert threshold == pytest.approx(penalty.threshold(step), rel=1e-14)
        w = torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=F64) * threshold
        zero, kept = penalty.prox(w, torch.full((2,), step, dtype=F64))
        assert zero == 0
        assert kept > 0
        per_weight = case.make(torch.tensor([0.1, *case.strengths], dtype=F64)).scaled(0.7)
        assert per_weight.threshold(step) == pytest.approx(case.penalty().scaled(0.7).threshold(step), rel=1e-14)
    assert isinstance(case.penalty().threshold(step), float)
    assert case.penalty().threshold(0.0) == 0
    assert case.make(torch.empty(0)).threshold(1.0) == 0


@every_nonconvex
def test_at_a_tie_the_sparser_point_is_taken(case):
    for step in (0.5, 1.0, 2.0):
        threshold = case.penalty().threshold(step)
        if case.soft or isinstance(case.penalty(), (L0, LHalf)):
            assert case.penalty().prox(torch.tensor(threshold, dtype=F64), step) == 0


def test_mcp_beyond_gamma_is_a_hard_threshold():
    w, steps = moduli(), torch.full((60,), 12.0, dtype=F64)
    hard = torch.where(w <= 0.5 * 6, 0, w)  # λ√(τγ)
    assert torch.equal(MCP(0.5, 3.0).prox(w, steps), hard)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("large", [1e8, 1e300])
def test_flat_enough_they_are_the_lasso(dtype, large):
    w = torch.linspace(-4, 4, 81, dtype=dtype)
    for penalty in (MCP(0.7, large), SCAD(0.7, large), LogSum(0.7, min(large, 1e30))):
        tight = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 2e-8}
        for step in (0.9, torch.rand(81, dtype=dtype, generator=torch.Generator().manual_seed(0))):
            torch.testing.assert_close(penalty.prox(w, step), L1(0.7).prox(w, step), **tight)
            assert torch.equal(penalty.prox(w, step) == 0, L1(0.7).prox(w, step) == 0)
        torch.testing.assert_close(penalty.value(w), L1(0.7).value(w), **tight)
        torch.testing.assert_close(penalty.grad(w), L1(0.7).grad(w), **tight)
        torch.testing.assert_close(penalty.optimality_residual(w, w), L1(0.7).optimality_residual(w, w), **tight)


@every_nonconvex
def test_an_infinite_weight_stays_so_whatever_the_step(case):
    w = torch.tensor([math.inf, -math.inf, 1.0])
    for penalty in (case.penalty(), MCP(0.5, 1e300), SCAD(0.5, 1e300)):
        for step in (1e-3, torch.tensor([1e-3, 0.0, 0.0]), torch.tensor([0.0, 1e-30, 1e-45])):
            assert torch.equal(penalty.prox(w, step)[:2], w[:2])


def test_mcp_and_scad_leave_large_weights_as_they_are():
    w = torch.tensor([1.5, 40.0, -1e30, 3e38, math.inf])
    for penalty in (MCP(0.5, 3.0), SCAD(0.4, 3.7)):
        for step in (0.3, torch.full((5,), 0.3), torch.full((5,), 5.0)):
            assert torch.equal(penalty.prox(w, step)[1:], w[1:])
        assert torch.equal(penalty.grad(w), torch.zeros(5))


@every_nonconvex
@pytest.mark.parametrize("step", [1e-7, 1e-3, 0.3])
def test_in_float32_what_is_taken_away_is_rounded_once_however_little_it_is(case, step):
    """A relative error of every weight in every step would add up to more than the penalty."""
    w = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 1e-4
    exact = case.penalty().prox(w.double(), step)
    half_ulp = torch.finfo(torch.float32).eps * w.double() / 2
    for given in (step, torch.full_like(w, step)):
        error = (case.penalty().prox(w, given).double() - exact).abs()
        assert (error <= 1.05 * half_ulp).double().mean() > 0.85
        assert (error <= 4 * half_ulp).double().mean() > 0.999


@every_nonconvex
def test_huge_and_tiny_numbers_neither_overflow_nor_make_nan(case):
    w = torch.tensor([1e-45, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e20, 1e38, 3.4e38])
    for step in (1e-38, 1e-20, 1e-3, 1.0, 2.0):
        exact = case.penalty().prox(w.double(), step)
        for given in (step, torch.full_like(w, step)):
            result = case.penalty().prox(w, given)
            assert torch.isfinite(result).all()
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-37)
    for step in (1e10, 1e38):
        assert not torch.isnan(case.penalty().prox(w, torch.full_like(w, step))).any()
    assert not torch.isnan(case.penalty().grad(w)).any()
    strong = case.make(1e300)
    assert strong.prox(torch.tensor([1.0, math.nan, math.inf]), 1.0)[0] == 0


@every_nonconvex
def test_a_learned_strength_has_finite_gradients_also_at_zeros(case):
    w = torch.tensor([0.0, 1e-3, 0.1, 2.0], dtype=F64, requires_grad=True)
    strength = torch.tensor(0.5, dtype=F64, requires_grad=True)
    for step in (0.4, torch.full((4,), 0.4, dtype=F64)):
        shrunk = case.make(strength).prox(w, step).sum()
        for g in torch.autograd.grad(shrunk, (w, strength), allow_unused=True):
            assert g is None or torch.isfinite(g).all()
    if case.gradient:
        (g,) = torch.autograd.grad(case.penalty().value(w), w)
        torch.testing.assert_close(g, case.penalty().grad(w.detach()))


# Multiples of a penalty


@every_nonconvex
def test_the_prox_of_a_multiple_is_that_of_a_longer_step(case):
    w = torch.linspace(-4, 4, 81, dtype=F64)
    for factor in (0.5, torch.tensor(0.5, dtype=F64), torch.full((81,), 0.5, dtype=F64)):
        scaled = case.penalty().scaled(factor)
        torch.testing.assert_close(scaled.prox(w, 1.2), case.penalty().prox(w, 0.6))
        torch.testing.assert_close(scaled.grad(w), 0.5 * case.penalty().grad(w))
        torch.testing.assert_close(scaled.optimality_residual(w, w), 0.5 * case.penalty().optimality_residual(w, 2 * w))
        assert case.penalty().scaled(0.0).prox(w, 1.2).equal(w)
    assert case.penalty().scaled(2.0).scaled(0.5) == case.penalty()
    assert from_dict(case.penalty().scaled(0.5).to_dict()) == case.penalty().scaled(0.5)


def test_a_multiple_of_mcp_is_the_mcp_that_its_docstring_says():
    w = torch.linspace(-4, 4, 81, dtype=F64)
    torch.testing.assert_close(MCP(0.5, 3.0).scaled(2.0).value(w), MCP(1.0, 1.5).value(w))
    torch.testing.assert_close(MCP(0.5, 3.0).scaled(2.0).prox(w, 0.7), MCP(1.0, 1.5).prox(w, 0.7))


# Large weights


@every_nonconvex
def test_a_large_weight_is_taken_in_pieces_with_the_same_results(case):
    w = torch.randn(700, 800, generator=torch.Generator().manual_seed(0)).T
    by_tensor = case.make(torch.tensor(case.strengths))  # of one element: read by no one, and not cut up
    torch.testing.assert_close(case.penalty().value(w), by_tensor.value(w), rtol=1e-5, atol=0)
    torch.testing.assert_close(case.penalty().grad(w), by_tensor.grad(w))
    torch.testing.assert_close(case.penalty().prox_(w.clone(), 0.3), by_tensor.prox(w, 0.3))
    assert case.penalty().grad(w).stride() == w.stride()


@every_nonconvex
def test_a_large_weight_needs_no_temporaries_of_its_size(case):
    w = torch.randn(1 << 23)
    for method, allowed in ((case.penalty().value, 0.4), (case.penalty().prox_, 0.4), (case.penalty().grad, 1.4)):
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            method(w)
        live = peak = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        assert peak <= allowed * w.nbytes


# Problems


def lasso_like(n=60, p=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, p, dtype=F64, generator=generator)
    truth = torch.zeros(p, dtype=F64)
    truth[:3] = torch.tensor([3.0, -2.0, 1.5])
    y = x @ truth + 0.1 * torch.randn(n, dtype=F64, generator=generator)
    return x, y, truth


def solve(penalty, steps=1500, scale=1.0, adam=False):
    x, y, truth = lasso_like()
    model = torch.nn.Linear(20, 1, bias=False, dtype=F64)
    torch.nn.init.constant_(model.weight, 1.0 if adam else 0.0)
    reg = Regularizer(model, penalty)
    reg.strength_scale = scale
    groups = reg.param_groups()
    optimizer = ProxAdamW(groups, lr=0.05, weight_decay=0) if adam else ProxSGD(groups, lr=0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps or 1, power=2.0 if adam else 0.0)

    def closure():
        return 0.5 * (model(x).squeeze() - y).square().mean()

    def step():
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        schedule.step()

    descend(step, model.parameters(), steps, still=0 if adam else 1e-14)
    return model.weight.detach().squeeze(), reg, closure, truth


@pytest.mark.parametrize("penalty", [MCP(0.3, 3.0), SCAD(0.3), LogSum(0.3, 0.1), LHalf(0.3), L0(0.1)], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_prox_sgd_ends_in_a_stationary_point_with_the_true_support(penalty, scale):
    w, reg, closure, truth = solve(penalty, scale=scale)
    assert kkt_residual(reg, closure) < 1e-12
    assert torch.equal(w != 0, truth != 0)
    assert (w - truth).abs().max() < 0.2


@pytest.mark.parametrize("penalty", [MCP(0.3, 3.0), SCAD(0.3), LogSum(0.3, 0.1), LHalf(0.3), L0(0.1)], ids=repr)
def test_in_adams_metric_too(penalty):
    w, reg, closure, truth = solve(penalty, steps=1000, adam=True)
    assert kkt_residual(reg, closure) < 1e-9
    if not isinstance(penalty, (L0, LHalf)):  # which hold a weight on its way through zero
        assert torch.equal(w != 0, truth != 0)


def test_the_lasso_is_biased_where_mcp_is_not():
    x, y, truth = lasso_like()
    support = truth != 0
    refit = torch.linalg.lstsq(x[:, support], y).solution
    torch.testing.assert_close(solve(MCP(0.3, 3.0))[0][support], refit, rtol=0, atol=1e-10)
    assert (solve(L1(0.3))[0][support] - refit).abs().max() > 0.2


def test_with_a_huge_gamma_the_solution_is_the_lassos():
    torch.testing.assert_close(solve(MCP(0.3, 1e8))[0], solve(L1(0.3))[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("make", "soft"), [(lambda s: MCP(s, 3.0), True), (SCAD, True), (L0, False), (LHalf, False)])
def test_strength_max_of_a_model(make, soft):
    _, reg, closure, _ = solve(make(0.3), steps=0)
    x, y, _ = lasso_like()
    expected = (x.T @ y).abs().max().item() / 60 if soft else 0.0
    assert strength_max(reg, closure) == pytest.approx(expected, rel=1e-12)


# Bad input


@pytest.mark.parametrize("step", [3.0, 4, torch.tensor(3.0), torch.tensor(5.0, dtype=F64)])
def test_a_step_that_the_host_can_read_must_be_below_gamma(step):
    w = torch.randn(3)
    before = w.clone()
    for method in (MCP(1.0, 3.0).prox, MCP(1.0, 3.0).prox_):
        with pytest.raises(ValueError, match=r"^MCP with gamma=3 needs step < gamma, got the step"):
            method(w, step)
    for method in (SCAD(1.0, 4.0).prox, SCAD(1.0, 4.0).prox_):
        with pytest.raises(ValueError, match=r"^SCAD with a=4 needs step < a − 1, got the step"):
            method(w, step)
    for penalty in (MCP(1.0, 3.0), SCAD(1.0, 4.0)):
        with pytest.raises(ValueError, match=re.escape("needs step < ")):
            penalty.check_step(step)
        penalty.check_step(2.9)
        with pytest.raises(ValueError, match=re.escape("got the step 2 times the factor 2: ")):
            penalty.scaled(2).prox(w, 2.0)
    assert torch.equal(w, before)
    for penalty in (LogSum(1.0, 0.1), LHalf(1.0), L0(1.0)):
        penalty.prox(w, step)
        penalty.check_step(step)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda v: MCP(1.0, v), "gamma", "a positive number"),
        (lambda v: SCAD(1.0, v), "a", "a number above 1"),
        (lambda v: LogSum(1.0, v), "epsilon", "a positive number"),
    ],
    ids=["MCP", "SCAD", "LogSum"],
)
def test_a_shape_that_is_none_is_refused(make, name, said):
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^Expected `{name}` to be {said}, got {bad}\.$"):
            make(bad)
    for bad in (None, True, "3", 1j, torch.tensor(3.0)):
        with pytest.raises(TypeError, match=rf"^Expected `{name}` to be {said}, got "):
            make(bad)
    assert make(5) == make(5.0)
    with pytest.raises(ValueError, match="Expected the fields of"):
        from_dict({"type": type(make(5)).__name__, "strength": 1.0})


@every_nonconvex
def test_the_zeroing_step_is_the_shortest_that_gives_zero(case):
    penalty = case.penalty()
    m = torch.logspace(-3, 3, 50, dtype=torch.float64)
    steps = penalty.zeroing_step(m, float(penalty.strength)) / float(penalty.multiple())
    assert torch.equal(penalty.prox(m, steps * (1 + 1e-6)), torch.zeros_like(m))
    assert bool((penalty.prox(m, steps * (1 - 1e-6)) > 0).all())
