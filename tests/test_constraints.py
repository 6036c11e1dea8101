"""NonNegative, Box and TopK, against brute force, scipy and their own definitions."""

import copy
import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
from descent import descend
from penalty_table import PENALTIES
from scipy.optimize import lsq_linear, nnls
from torch import nn

from torchreg import (
    L0,
    L1,
    Box,
    NonNegative,
    ProxAdamW,
    ProxSGD,
    Regularizer,
    SparsityMonitor,
    TopK,
    kkt_residual,
    strength_max,
)
from torchreg.penalties import from_dict

F64 = torch.float64
CONSTRAINTS = [NonNegative(), Box(-0.5, 1.0), Box(0.25, math.inf), TopK(3), TopK(fraction=0.4), TopK(3, scope="rule")]
INTERVALS = [c for c in CONSTRAINTS if not isinstance(c, TopK)]
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
every_interval = pytest.mark.parametrize("constraint", INTERVALS, ids=repr)
every_scope = pytest.mark.parametrize("scope", ["tensor", "rule"])


def some_weights(*shape, dtype=F64, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The proximal operator


@every_interval
def test_prox_is_the_nearest_allowed_point(constraint):
    w = some_weights(50)
    grid = torch.linspace(-4, 4, 8001, dtype=F64)
    low, high = constraint.bounds()
    grid = torch.cat([grid[(grid >= low) & (grid <= high)], torch.tensor([low, high]).clamp(-9, 9)])
    nearest = (grid - w.unsqueeze(-1)).abs().min(-1).values
    for step in (1.0, 1e-9, torch.rand(50, dtype=F64) + 1e-6):
        shrunk = constraint.prox(w, step)
        assert constraint.value(shrunk) == 0
        assert ((shrunk - w).abs() <= nearest).all()


@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("seed", range(5))
@every_scope
def test_top_k_is_the_argmin_over_all_supports_in_a_diagonal_metric(k, seed, scope):
    w = some_weights(6, seed=seed)
    metric = torch.logspace(-2, 2, 6, dtype=F64)[torch.randperm(6, generator=torch.Generator().manual_seed(seed))]
    for step in (0.7, torch.tensor(0.7), metric):
        cost = w**2 / (2 * torch.as_tensor(step, dtype=F64).expand(6))
        best = min(sum(cost[i] for i in zeroed) for zeroed in itertools.combinations(range(6), 6 - k))
        shrunk = TopK(k, scope=scope).prox(w, step)
        assert shrunk.count_nonzero() == k
        assert torch.equal(shrunk, torch.where(shrunk != 0, w, 0))
        torch.testing.assert_close(cost[shrunk == 0].sum(), torch.as_tensor(best, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [0, 1, 4, 7, 11, 100])
@pytest.mark.parametrize("per_weight", [False, True])
def test_jointly_the_largest_of_all_tensors_are_kept(k, per_weight):
    weights = [some_weights(2, 3), some_weights(4, seed=1), some_weights(1, 1, dtype=torch.float32, seed=2)]
    steps = [torch.rand(w.shape, dtype=F64) + 0.1 if per_weight else 0.3 for w in weights]
    flat = torch.cat([(w / torch.as_tensor(t).sqrt()).flatten().to(F64) for w, t in zip(weights, steps, strict=True)])
    least = flat.abs().sort(descending=True).values[:k].min() if k else math.inf
    expected = [
        torch.where((w / torch.as_tensor(t).sqrt()).abs() >= least - 1e-6, w, 0)
        for w, t in zip(weights, steps, strict=True)
    ]
    TopK(k, scope="rule").prox_all_(weights, steps)
    assert all(map(torch.equal, weights, expected))
    assert sum(int(w.count_nonzero()) for w in weights) == min(k, 11)


def test_of_each_tensor_the_largest_are_kept():
    weights = [some_weights(5), some_weights(7, seed=1)]
    expected = [TopK(2).prox(w) for w in weights]
    TopK(2).prox_all_(weights, [1.0, 1.0])
    assert all(map(torch.equal, weights, expected))
    assert [int(w.count_nonzero()) for w in weights] == [2, 2]
    with pytest.raises(ValueError, match="Expected one step for each of 2 weights, got 1"):
        TopK(2, scope="rule").prox_all_(weights, [1.0])


@pytest.mark.parametrize("n", [1, 10, 1000, 100_003])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_exactly_k_survive_also_of_equal_weights(n, fraction, dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(1, 4, (n,), generator=generator).to(dtype) * (1 - 2 * torch.randint(2, (n,), generator=generator))
    for step in (1.0, torch.full((n,), 0.5)):
        shrunk = TopK(fraction=fraction).prox(w, step)
        k = round(fraction * n)
        assert shrunk.count_nonzero() == k
        order = torch.argsort(w.abs(), descending=True, stable=True)  # of equal ones the first
        assert (shrunk[order[:k]] == w[order[:k]]).all()


@pytest.mark.parametrize("order", ["as drawn", "ascending", "heavy tail", "mostly zero", "misleading"])
@pytest.mark.parametrize("fraction", [0.0001, 0.03, 0.5, 0.97, 0.9999])
def test_of_many_weights_the_largest_are_found_in_any_order(order, fraction):
    w = some_weights(1 << 18)
    if order == "ascending":
        w = w.sort().values
    elif order == "heavy tail":
        w = w**9
    elif order == "mostly zero":
        w[::3] = w[1::3] = 0
    elif order == "misleading":
        w[::64] *= 1e-6  # what a sample at equal distances sees
    k = round(fraction * len(w))
    expected = torch.zeros_like(w)
    chosen = torch.argsort(w.abs(), descending=True, stable=True)[:k]
    expected[chosen] = w[chosen]
    assert torch.equal(TopK(k).prox(w), expected)


def test_a_weight_whose_step_is_zero_is_kept():
    w, step = torch.tensor([0.1, 5.0, 4.0, 0.0, 0.2]), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])
    assert TopK(3).prox(w, step).tolist() == pytest.approx([0.1, 5.0, 0.0, 0.0, 0.2])
    assert TopK(1).prox(w, step).tolist() == pytest.approx([0.1, 0.0, 0.0, 0.0, 0.2])
    weights = [w.clone(), torch.tensor([9.0, 1.0])]
    TopK(2, scope="rule").prox_all_(weights, [0.0, 1.0])
    assert torch.equal(weights[0], w)
    assert weights[1].tolist() == [0, 0]
    assert NonNegative().prox(-w, step).tolist() == pytest.approx([-0.1, 0.0, 0.0, 0.0, -0.2])


@every_constraint
@pytest.mark.parametrize("dtype", REAL)
def test_a_step_of_zero_changes_nothing(constraint, dtype):
    w = some_weights(40, dtype=dtype)
    for step in (0, 0.0, torch.tensor(0.0), torch.zeros(40)):
        assert torch.equal(constraint.prox(w, step), w)
        assert torch.equal(constraint.prox_(w.clone(), step), w)
        assert constraint.prox(w, step).data_ptr() != w.data_ptr()
        weights = [w.clone()]
        constraint.prox_all_(weights, [step])
        assert torch.equal(weights[0], w)
    tiny = torch.full((40,), 1e-12)  # no zero, also in half precision
    assert torch.equal(constraint.prox(w, tiny), constraint.prox(w))


@every_constraint
@pytest.mark.parametrize("dtype", REAL)
def test_nan_is_kept_and_zeros_are_positive(constraint, dtype):
    w = torch.tensor([math.nan, -2.0, 0.5, -0.25, math.inf, 0.125, -1e-3, -0.0], dtype=dtype)
    for step in (1.0, torch.ones(8)):
        for result in (constraint.prox(w, step), constraint.prox_(w.clone(), step)):
            assert torch.equal(torch.isnan(result), torch.isnan(w))
            assert not torch.signbit(result[result == 0]).any()
            assert result.dtype == dtype
    assert torch.isnan(constraint.value(w))
    assert torch.isnan(constraint.optimality_residual(w, w)[0])


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prox_in_place_equals_prox(constraint, dtype):
    base = some_weights(60, 140, dtype=dtype)
    weights = [some_weights(10_000, dtype=dtype), base.t(), base[:, ::3], some_weights(dtype=dtype)]
    for w in (*weights, torch.empty(0, 3, dtype=dtype), some_weights(3, 4, 5, dtype=dtype).permute(2, 0, 1)):
        for step in (0.7, torch.tensor(0.7), torch.full(w.shape[-1:], 0.3)):
            expected, target = constraint.prox(w, step), copy.deepcopy(w)
            assert constraint.prox_(target, step) is target
            assert torch.equal(target, expected)
            assert constraint.value(target) == 0
            assert constraint.grad(w).shape == w.shape


def test_bounds_are_those_that_the_type_holds():
    for dtype in REAL:
        w = torch.tensor([-1.0, 0.2, 1.0], dtype=dtype)
        shrunk = Box(-0.3, 0.3).prox(w)
        assert Box(-0.3, 0.3).value(shrunk) == 0
        assert torch.equal(shrunk, torch.tensor([-0.3, 0.2, 0.3], dtype=dtype))
        residual = Box(-0.3, 0.3).optimality_residual(shrunk, -w)
        assert torch.equal(residual, torch.tensor([0.0, 0.2, 0.0], dtype=dtype).to(residual.dtype))
        assert torch.equal(Box(-1e300, 1e300).prox(w), w)


@pytest.mark.parametrize("penalty", [*(case.penalty() for case in PENALTIES), *CONSTRAINTS], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_on_the_host(penalty, dtype):
    """Tensors on the meta device have nothing to be read."""
    with torch.device("meta"):
        w, steps = torch.empty(8, 4, dtype=dtype), (torch.empty(()), torch.empty(8, 4), torch.empty(1, 1))
    for step in (0.5, *steps):
        assert penalty.prox(w, step).is_meta
        penalty.prox_(w, step)
        penalty.prox_all_([w, w], [step, step])
    for result in (penalty.value(w), penalty.grad(w), penalty.optimality_residual(w, w), penalty.strength_max(w)):
        assert result.is_meta
    penalty.threshold(steps[0])


# Optimality


@every_interval
def test_the_residual_is_the_distance_to_the_normal_cone(constraint):
    low, high = constraint.bounds()
    w = torch.tensor([low, high, 0.5, 0.75], dtype=F64).clamp(-3, 3)
    for g in (-1.0, 0.0, 2.0):
        grad = torch.full((4,), g, dtype=F64)
        expected = [
            0.0 if (x == low and g >= 0) or (x == high and g <= 0) else abs(g) for x in w.tolist()
        ]  # at a bound the constraint holds against what pushes outwards
        assert constraint.optimality_residual(w, grad).tolist() == expected
        moved = constraint.prox(w - 1e-3 * grad, 1e-3)
        assert torch.equal(moved == w, torch.tensor(expected) == 0)
    outside = torch.tensor([low - 1, high + 1], dtype=F64)
    outside = outside[torch.isfinite(outside)]
    assert constraint.optimality_residual(outside, outside).isinf().all()
    assert constraint.value(outside) == math.inf


@every_scope
def test_the_residual_of_top_k(scope):
    grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
    constraint = TopK(2, scope=scope)
    assert constraint.optimality_residual(torch.tensor([0.0, 5.0, 6.0, 0.0]), grad).tolist() == [0, 2, 3, 0]
    assert constraint.optimality_residual(torch.tensor([0.0, 5.0, 0.0, 0.0]), grad).tolist() == [1, 2, 3, 0]
    assert constraint.optimality_residual(torch.tensor([0.0, 5.0, 6.0, 7.0]), grad).isinf().all()
    assert TopK(9, scope=scope).optimality_residual(torch.ones(4), grad).tolist() == [1, 2, 3, 0]


def test_the_joint_residual_and_value_count_over_all_tensors():
    weights, grads = [torch.tensor([0.0, 5.0]), torch.tensor([6.0, 0.0])], [torch.ones(2), torch.ones(2)]
    for k, expected, value in ((2, [[0, 1], [1, 0]], 0), (3, [[1, 1], [1, 1]], 0), (1, [[math.inf] * 2] * 2, math.inf)):
        constraint = TopK(k, scope="rule")
        assert [r.tolist() for r in constraint.residual_all(weights, grads)] == expected
        assert constraint.value_all(weights) == value
    assert [r.tolist() for r in TopK(1).residual_all(weights, grads)] == [[0, 1], [1, 0]]
    assert TopK(1).value_all(weights) == 0
    assert L1(0.5).value_all(weights) == 5.5
    assert TopK(1, scope="rule").is_joint
    assert not TopK(1).is_joint


def test_strength_max_is_zero_where_zero_is_optimal_and_else_infinite():
    g = torch.tensor([1.0, 0.0])
    assert NonNegative().strength_max(g) == 0
    assert NonNegative().strength_max(-g) == math.inf
    assert Box(-1, 0).strength_max(-g) == 0
    assert Box(-1, 1).strength_max(g) == math.inf
    assert Box(-1, 1).strength_max(0 * g) == 0
    assert Box(0.5, 1).strength_max(g) == math.inf
    assert TopK(0).strength_max(g) == 0
    assert TopK(1).strength_max(g) == math.inf
    for constraint in CONSTRAINTS:
        assert constraint.threshold(0.5) == 0
        assert not constraint.strength_max(torch.tensor([math.nan, 1.0])) < math.inf


# Problems


def regression(n=40, p=8):
    x = some_weights(n, p)
    truth = torch.tensor([2.0, -1.0, 0.5, 0.0, -0.2, 0.8, 0.0, -3.0], dtype=F64)
    return x, x @ truth + 0.3 * some_weights(n, seed=1)


def solve(penalty, layers=1, steps=1500, optimizer=lambda groups: ProxSGD(groups, lr=0.1), cool=False):
    x, y = regression()
    model = nn.ModuleList(nn.Linear(8 // layers, 1, bias=False, dtype=F64) for _ in range(layers))
    for layer in model:
        nn.init.zeros_(layer.weight)
    reg = Regularizer(model, penalty)
    optimizer = optimizer(reg.param_groups())
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps or 1, power=2.0 if cool else 0.0)

    def closure():
        parts = x.chunk(layers, dim=1)
        output = sum(layer(part) for layer, part in zip(model, parts, strict=True))
        return 0.5 * (output.squeeze() - y).square().mean()

    def step():
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        schedule.step()

    descend(step, model.parameters(), steps, still=0 if cool else 1e-14)
    return torch.cat([layer.weight.detach().flatten() for layer in model]), reg, closure


def test_nonnegative_least_squares_is_scipys():
    w, reg, closure = solve(NonNegative())
    expected, _ = nnls(*(t.numpy() for t in regression()))
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-10)
    assert torch.equal(w == 0, torch.tensor(expected == 0))
    assert kkt_residual(reg, closure) < 1e-10
    with torch.no_grad():
        reg.model[0].weight[0, 0] = -1e-6
    assert kkt_residual(reg, closure) == math.inf


@pytest.mark.parametrize("constraint", [NonNegative(), Box(-0.5, 1.0), TopK(3), TopK(3, scope="rule")], ids=repr)
def test_in_adams_metric_the_constrained_problem_is_the_same(constraint):
    def adam(groups):
        return ProxAdamW(groups, lr=0.05, weight_decay=0)

    w, reg, closure = solve(constraint, layers=2, steps=1000, optimizer=adam, cool=True)
    assert kkt_residual(reg, closure) < 1e-8
    if isinstance(constraint, NonNegative):
        np.testing.assert_allclose(w, nnls(*(t.numpy() for t in regression()))[0], rtol=0, atol=1e-8)
    if isinstance(constraint, TopK):
        assert int(w.count_nonzero()) == (3 if constraint.is_joint else 6)


def test_box_constrained_least_squares_is_scipys():
    w, reg, closure = solve(Box(-0.5, 1.0))
    expected = lsq_linear(*(t.numpy() for t in regression()), bounds=(-0.5, 1.0), tol=1e-14).x
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-7)
    assert kkt_residual(reg, closure) < 1e-10


@pytest.mark.parametrize(
    ("constraint", "layers", "each"), [(TopK(2), 2, [2, 2]), (TopK(fraction=0.25), 1, [2]), (TopK(3), 1, [3])]
)
def test_iterative_hard_thresholding_refits_on_its_support(constraint, layers, each):
    w, reg, closure = solve(constraint, layers)
    assert [int(part.count_nonzero()) for part in w.chunk(layers)] == each
    assert kkt_residual(reg, closure) < 1e-10
    x, y = regression()
    torch.testing.assert_close(w[w != 0], torch.linalg.lstsq(x[:, w != 0], y).solution, rtol=0, atol=1e-9)


def test_top_k_of_a_rule_takes_its_layers_together():
    w, reg, closure = solve(TopK(3, scope="rule"), layers=2)
    assert int(w.count_nonzero()) == 3
    assert kkt_residual(reg, closure) < 1e-10
    with torch.no_grad():
        assert reg() == 0
        reg.model[0].weight.fill_(1.0)
        assert reg() == math.inf


def test_strength_max_of_a_model():
    _, reg, closure = solve(NonNegative(), steps=0)
    assert strength_max(reg, closure) == math.inf


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = value


@pytest.mark.parametrize("penalty", [NonNegative(), TopK(2, scope="rule"), L0(0.1)], ids=repr)
def test_the_monitor_logs_what_has_no_gradient(penalty):
    _, reg, closure = solve(penalty, steps=50)
    writer = Writer()
    monitor = SparsityMonitor(reg, writer, every=1)
    monitor.step(loss=closure().detach())
    monitor.close()
    with torch.no_grad():
        expected = float(reg())
    assert writer.scalars["loss/penalty"] == pytest.approx(expected)
    assert math.isfinite(expected)


# Routes


@pytest.mark.parametrize("penalty", [L0(0.1), *CONSTRAINTS], ids=repr)
def test_without_a_gradient_the_loss_term_and_the_hook_refuse_and_say_what_to_do(penalty):
    model = nn.Linear(3, 2)
    reg = Regularizer(model, penalty)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = rf"^{type(penalty).__name__} of parameter 'weight' has no gradient .*reg\.param_groups\(\).*ProxSGD"
    with pytest.raises(ValueError, match=said):
        reg()
    with pytest.raises(ValueError, match=said):
        reg.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    with torch.no_grad():
        assert reg() in (0, math.inf) or isinstance(penalty, L0)
    handle = Regularizer(model, L1(0.1)).attach(optimizer)
    state = handle.state_dict()
    state["penalties"]["weight"] = penalty.to_dict()
    with pytest.raises(ValueError, match=said):
        handle.load_state_dict(state)
    ProxSGD(reg.param_groups(), lr=0.1)


@every_interval
def test_complex_weights_have_no_order(constraint):
    model = nn.Linear(3, 2, dtype=torch.complex64)
    name = type(constraint).__name__
    with pytest.raises(
        TypeError, match=rf"^Parameter 'weight': Expected a real weight for {name}, got torch.complex64"
    ):
        Regularizer(model, constraint)
    for method in (constraint.prox, constraint.prox_, constraint.value, constraint.grad, constraint.strength_max):
        with pytest.raises(TypeError, match="Expected a real weight"):
            method(model.weight.detach())
    kept = TopK(2).prox(torch.tensor([1 + 1j, 0.5j, -3.0]))
    assert kept.tolist() == [1 + 1j, 0, -3]


@pytest.mark.parametrize(
    ("penalty", "shown"),
    [
        (NonNegative(), "NonNegative"),
        (Box(-1, 0.5), "Box low=-1, high=0.5"),
        (TopK(10), "TopK k=10"),
        (TopK(fraction=0.1, scope="rule"), "TopK fraction=0.1, scope=rule"),
        (L0(0.1), "L0 0.1"),
    ],
)
def test_the_table_shows_the_fields(penalty, shown):
    row = next(line for line in str(Regularizer(nn.Linear(3, 2), penalty)).splitlines() if "default" in line)
    assert row.split("default")[1].strip() == shown


# As values


@every_constraint
def test_a_constraint_is_a_value(constraint):
    file = io.BytesIO()
    torch.save(constraint.to_dict(), file)
    file.seek(0)
    written = eval(repr(constraint), {**globals(), "inf": math.inf})
    for again in (from_dict(torch.load(file, weights_only=True)), copy.deepcopy(constraint), written):
        assert again == constraint
        assert hash(again) == hash(constraint)
    assert constraint.scaled(0.5) == constraint
    assert constraint.strengths() == {}
    assert len({repr(c) for c in CONSTRAINTS}) == len(set(CONSTRAINTS)) == len(CONSTRAINTS)


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Box(1, 0), ValueError, "Expected `low` ≤ `high`, got low=1.0 and high=0.0."),
        (lambda: Box(math.nan, 0), ValueError, "got low=nan and high=0.0"),
        (lambda: Box(math.inf, math.inf), ValueError, "got low=inf and high=inf"),
        (lambda: Box("0", 1), TypeError, "Expected `low` to be a number, got '0'."),
        (lambda: Box(0, None), TypeError, "Expected `high` to be a number, got None."),
        (lambda: TopK(), ValueError, "Expected either `k` or `fraction`, got k=None and fraction=None."),
        (lambda: TopK(3, 0.5), ValueError, "got k=3 and fraction=0.5"),
        (lambda: TopK(-1), ValueError, "Expected `k` to be 0 or more, got -1."),
        (lambda: TopK(0.1), TypeError, "Expected `k` to be a whole number (a fraction is TopK(fraction=…)), got 0.1."),
        (lambda: TopK(True), TypeError, "got True"),
        (lambda: TopK(fraction=1.5), ValueError, "Expected `fraction` to be in [0, 1], got 1.5."),
        (lambda: TopK(fraction=math.nan), ValueError, "got nan"),
        (lambda: TopK(fraction="1"), TypeError, "Expected `fraction` to be a number in [0, 1], got '1'."),
        (lambda: TopK(3, scope="layer"), ValueError, "Expected `scope` to be 'tensor' or 'rule', got 'layer'."),
        (lambda: from_dict({"type": "TopK", "k": 3}), ValueError, "Expected the fields of TopK to be"),
    ],
)
def test_what_is_no_constraint_is_refused(make, error, said):
    with pytest.raises(error, match=re.escape(said)):
        make()


@every_constraint
def test_what_is_no_weight_or_step_is_refused(constraint):
    for method in (constraint.prox, constraint.prox_, constraint.value, constraint.grad):
        with pytest.raises(TypeError, match=r"floating point or complex, got a tensor of torch\.int64"):
            method(torch.tensor([1, 2]))
    w = torch.ones(2, 3)
    for step in (-1, math.nan, math.inf, torch.ones(2)):
        for method in (constraint.prox, constraint.prox_):
            with pytest.raises(ValueError, match="Expected `step`"):
                method(w, step)
    assert torch.equal(w, torch.ones(2, 3))


@pytest.mark.parametrize(
    "penalty", [*(case.penalty() for case in PENALTIES if not case.convex), *CONSTRAINTS], ids=repr
)
def test_the_prox_compiles_to_one_graph(penalty):
    torch.compiler.reset()
    w, steps = some_weights(40), torch.rand(40, dtype=F64) + 0.1
    compiled = torch.compile(penalty.prox, backend="aot_eager", fullgraph=True)
    for step in (0.5, steps):
        torch.testing.assert_close(compiled(w, step), penalty.prox(w, step))
