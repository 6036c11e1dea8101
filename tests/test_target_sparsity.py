"""TargetSparsity reaches and holds the fraction that is asked for, says so if it can't, and resumes bit for bit."""

import dataclasses
import io
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import torchreg
from torchreg import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    LHalf,
    LogSum,
    ProxAdamW,
    Proximal,
    ProxSGD,
    Regularizer,
    TargetSparsity,
    target,
)
from torchreg.penalties import Penalty
from torchreg.penalties.base import strength_field

OPTIMIZERS = {
    "ProxSGD": lambda groups: ProxSGD(groups, lr=0.05, momentum=0.9),
    "ProxSGD nesterov": lambda groups: ProxSGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "ProxSGD fused": lambda groups: ProxSGD(groups, lr=0.05, momentum=0.9, fused=None),
    "ProxAdamW": lambda groups: ProxAdamW(groups, lr=1e-2),
    "ProxAdamW amsgrad": lambda groups: ProxAdamW(groups, lr=1e-2, amsgrad=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture(autouse=True)
def _no_warnings(request):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The target of")
        yield


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30, dtype=dtype), nn.ReLU(), nn.Linear(30, 5, dtype=dtype))


def train(model, optimizer, steps, *targets, first=0, watch=None):
    """Minibatches that depend on the step alone."""
    for k in range(first, first + steps):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(16, 20, generator=generator).to(model[0].weight.dtype)
        y = (x[:, :5].argmax(1) + (x[:, 5] > 0)) % 5
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        for one in targets:
            one.step()
        if watch is not None:
            watch(k + 1)


def zeros(reg):
    return torchreg.sparsity(reg).fraction


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The bar


def digits():
    pytest.importorskip("sklearn")
    from torchreg.cli import data, training

    return data.load_digits(), training


@pytest.mark.parametrize(
    ("make", "lr", "options", "loss"),
    [
        pytest.param(ProxSGD, 0.2, {"momentum": 0.9}, 0.01, id="ProxSGD"),
        pytest.param(ProxAdamW, 3e-2, {"weight_decay": 0}, 0.01, id="ProxAdamW", marks=pytest.mark.slow),
    ],
)
def test_ninety_percent_on_the_digits(make, lr, options, loss):
    data, training = digits()
    accuracies = {0.0: [], 0.9: []}
    steps, until = 700, 300
    with training.one_thread():
        for wanted, seed in itertools.product(accuracies, range(2)):
            model = training.network(data.inputs, 128, data.classes, seed)
            reg = Regularizer(model, L1(1e-3)) if wanted else None
            optimizer = make(reg.param_groups() if reg else model.parameters(), lr=lr, **options)
            aim = TargetSparsity(optimizer, wanted, until=until) if wanted else None
            worst = 0.0
            for k, index in enumerate(training.batches(len(data.x_train), 128, steps, seed)):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * k / steps)) / 2
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(data.x_train[index]), data.y_train[index]).backward()
                optimizer.step()
                if aim:
                    aim.step()
                    if k + 1 >= until and k % 20 == 0:
                        worst = max(worst, abs(zeros(reg) - wanted))
            if aim:
                assert max(worst, abs(zeros(reg) - wanted)) < 0.005
            accuracies[wanted].append(training.accuracy(model, data.x_test, data.y_test))
    dense, sparse = (sum(found) / len(found) for found in accuracies.values())
    assert dense > 0.96
    assert sparse > dense - loss


# Reaching and holding


@every_optimizer
@pytest.mark.parametrize("wanted", [0.3, 0.9, 0.99])
def test_it_is_reached_and_held_at_each_step(make, wanted):
    model = network()
    reg = Regularizer(model, L1(1e-3))
    optimizer = make(reg.param_groups())
    aim = TargetSparsity(optimizer, wanted, until=40)
    seen = []
    train(model, optimizer, 80, aim, watch=lambda _: seen.append(zeros(reg)))
    assert all(abs(fraction - wanted) < 0.002 for fraction in seen[39:])
    assert max(seen) < wanted + 0.01  # no overshooting on the way
    assert aim.reached() == {"all": pytest.approx(zeros(reg))}


def test_the_ramp_is_cubic():
    model = network()
    reg = Regularizer(model, L1(1e-3))
    optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
    aim = TargetSparsity(optimizer, 0.8, until=50, after=10, every=4)
    seen = [0.0]
    train(model, optimizer, 60, aim, watch=lambda _: seen.append(zeros(reg)))
    assert seen[:11] == [0.0] * 11
    for k in [*range(14, 50, 4), *range(50, 61)]:
        wanted = 0.8 * (1 - (1 - min((k - 10) / 40, 1)) ** 3)
        assert seen[k] == pytest.approx(wanted, abs=0.002)
        assert aim.wanted(k) == {"all": pytest.approx(wanted)}


def test_it_starts_from_the_zeros_that_are_there():
    model = network()
    with torch.no_grad():
        model[0].weight[:20] = 0
        model[0].weight[:20, :2] = 0.01
    reg = Regularizer(model, L1(1e-3))
    optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
    aim = TargetSparsity(optimizer, 0.9, until=50)
    assert aim.wanted() == {"all": pytest.approx(zeros(reg))} == {"all": pytest.approx(360 / 750)}


def test_it_goes_down_to_a_target_below():
    model = network()
    with torch.no_grad():
        model[0].weight[torch.rand(30, 20) < 0.6] = 0
    reg = Regularizer(model, L1(1e-3))
    optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
    train(model, optimizer, 60, TargetSparsity(optimizer, 0.2, until=30))
    assert zeros(reg) == pytest.approx(0.2, abs=0.002)


def test_the_strength_given_does_not_matter():
    def run(strength):
        model = network(torch.float64)
        reg = Regularizer(model, L1(strength))
        optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
        train(model, optimizer, 40, TargetSparsity(optimizer, 0.7, until=20))
        return model[0].weight.detach(), float(reg.strength_scale) * strength

    (w, acting), (other, also) = run(1e-4), run(3.0)
    assert acting == pytest.approx(also, rel=1e-4)
    torch.testing.assert_close(w, other, rtol=1e-3, atol=1e-5)


def test_the_regularizer_sees_the_strength_that_acts():
    model = network()
    reg = Regularizer(model, L1(1e-3))
    optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
    train(model, optimizer, 20, TargetSparsity(optimizer, 0.7, until=10))
    assert optimizer.param_groups[0]["strength_scale"] is reg.strength_scale
    assert reg.strength_scale > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_precisions(dtype):
    model = network(dtype)
    reg = Regularizer(model, L1(1e-3))
    optimizer = ProxSGD(reg.param_groups(), lr=0.05, momentum=0.9)
    train(model, optimizer, 40, TargetSparsity(optimizer, 0.7, until=20))
    assert zeros(reg) == pytest.approx(0.7, abs=0.005)


def test_a_group_of_one_float_scale():
    weights = [nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(k))) for k in range(2)]
    optimizer = ProxSGD(weights, lr=0.1, penalty=ElasticNet(0.1, 0.01))
    aim = TargetSparsity(optimizer, 0.5, until=1)
    for w in weights:
        w.grad = torch.zeros(200)
    optimizer.step()
    aim.step()
    assert aim.reached() == {"all": 0.5}


def test_relative_strengths_decide_who_is_zeroed():
    one, two = (nn.Parameter(torch.linspace(0.1, 1, 100)) for _ in range(2))
    optimizer = ProxSGD([{"params": [one], "penalty": L1(3.0)}, {"params": [two], "penalty": L1(1.0)}], lr=0.1)
    aim = TargetSparsity(optimizer, 0.5, until=1)
    one.grad, two.grad = torch.zeros(100), torch.zeros(100)
    optimizer.step()
    aim.step()
    assert aim.reached() == {"all": 0.5}
    assert (one == 0).sum() > 70
    assert 0 < (two == 0).sum() < 30


def test_weights_of_their_own_strengths():
    w = nn.Parameter(torch.ones(100))
    strengths = torch.linspace(0.1, 1.0, 100)
    strengths[-10:] = 0  # left alone
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(strengths))
    aim = TargetSparsity(optimizer, 0.3, until=1)
    w.grad = torch.zeros(100)
    optimizer.step()
    aim.step()
    assert (w == 0).nonzero().flatten().tolist() == list(range(60, 90))


# Per rule


def test_every_rule_has_a_target():
    model = network()
    reg = Regularizer(model, {"0.weight": L1(1e-3), "2.weight": L1(2e-3)})
    optimizer = OPTIMIZERS["ProxAdamW"](reg.param_groups())
    aim = TargetSparsity(optimizer, {"0.weight": 0.8, 1: 0.4}, until=20)
    train(model, optimizer, 40, aim)
    assert aim.reached() == {"0.weight": pytest.approx(0.8, abs=0.002), "1": pytest.approx(0.4, abs=0.005)}
    assert torchreg.sparsity({"w": model[0].weight}).fraction == aim.reached()["0.weight"]


def test_a_rule_without_a_target_keeps_its_scale():
    model = network()
    reg = Regularizer(model, {"0.weight": L1(1e-3), "2.weight": L2(2e-3)})
    optimizer = OPTIMIZERS["ProxSGD"](reg.param_groups())
    train(model, optimizer, 20, TargetSparsity(optimizer, {"0.weight": 0.8}, until=10))
    assert optimizer.param_groups[1]["strength_scale"] is reg.strength_scale
    assert reg.strength_scale == 1
    assert (model[0].weight == 0).float().mean() == pytest.approx(0.8, abs=0.002)


# Other penalties, by the law of their threshold


@dataclasses.dataclass(frozen=True, eq=False)
class _HalfPower(Penalty):
    """Zeroes where |w| ≤ 2·(step·λ)^⅔ and keeps the rest, nearly as L1/2 does."""

    strength: float = strength_field()

    def value(self, w):
        return w.new_zeros(())

    def grad(self, w):
        return torch.zeros_like(w)

    def prox(self, w, step=1.0):
        return torch.where(w.abs() <= self.threshold(step), 0, w)

    def optimality_residual(self, w, grad):
        return grad.abs()

    def strength_max(self, grad):
        return grad.abs().max()

    def threshold(self, step):
        return 2 * (step * self.strength) ** (2 / 3)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joint(_HalfPower):
    """One that looks at all weights together."""

    is_joint = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Rowwise(_HalfPower):
    """One whose threshold is not a single weight's."""

    def prox(self, w, step=1.0):
        return torch.where(w.norm() <= self.threshold(step), 0, w)


def test_a_threshold_that_is_a_power_of_the_strength():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1000))
    optimizer = ProxSGD([w], lr=0.1, penalty=_HalfPower(0.3))
    aim = TargetSparsity(optimizer, 0.6, until=1)
    w.grad = torch.zeros(1000)
    optimizer.step()
    aim.step()
    assert aim.reached() == {"all": 0.6}


CONCAVE = [
    MCP(1e-3, 3.0),
    SCAD(1e-3),
    LogSum(1e-3, 1e-3),
    LogSum(1e-3, 10.0),
    LHalf(1e-3),
    L0(1e-3),
    MCP(0.1, 3.0).scaled(2.0),
]


@pytest.mark.parametrize("penalty", CONCAVE, ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_concave_penalties_reach_it_in_adams_metric(penalty, wrapped):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(2000))
    group = {"params": [w], "penalty": penalty}
    optimizer = Proximal(torch.optim.Adam([group], lr=1e-2)) if wrapped else ProxAdamW([group], lr=1e-2)
    aim = TargetSparsity(optimizer, 0.9, until=5)
    for _ in range(8):
        w.grad = torch.randn(2000) * torch.logspace(-4, 0, 2000)
        optimizer.step()
        aim.step()
    assert aim.reached()["all"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("penalty", [MCP(1e-3, 3.0), SCAD(1e-3), MCP(1.0, 3.0), SCAD(1.0)], ids=str)
@pytest.mark.parametrize("make", [ProxSGD, lambda groups, lr: Proximal(torch.optim.SGD(groups, lr=lr))])
def test_a_step_stays_as_short_as_the_penalty_wants_it(penalty, make):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1000))
    optimizer = make([{"params": [w], "penalty": penalty}], lr=0.1)
    aim = TargetSparsity(optimizer, 0.6, until=1)
    w.grad = torch.zeros(1000)
    optimizer.step()
    if penalty.strength == 1.0:
        aim.step()
        assert aim.reached() == {"all": 0.6}
        return
    with pytest.warns(UserWarning, match="MCP and SCAD zero none beyond"):
        aim.step()
    assert 0 < aim.reached()["all"] < 0.01


# Large models


def test_a_sample_of_a_large_model_is_spread_and_right(monkeypatch):
    monkeypatch.setattr(target, "SAMPLE", 20_000)
    torch.manual_seed(0)
    # Rows and columns of very different size, which a sample of every k-th weight would see a part of.
    w = nn.Parameter(torch.randn(512, 512) * torch.logspace(-2, 0, 512) * torch.logspace(-2, 0, 512)[:, None])
    v = nn.Parameter(torch.randn(100))
    optimizer = ProxSGD([w, v], lr=0.1, penalty=L1(1.0))
    aim = TargetSparsity(optimizer, 0.7, until=1)
    w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v)
    optimizer.step()
    aim.step()
    assert aim.reached()["all"] == pytest.approx(0.7, abs=0.005)
    index = next(iter(aim._samples.values()))
    assert len(index.unique()) == len(index) >= 19_000


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 2), (10, 10), (512, 100), (10_007, 5000)])
def test_sampled_positions_are_different_and_inside(size, count):
    index = torchreg.sampling.spread(size, count, torch.device("cpu"))
    assert len(index.unique()) == count
    assert index.min() >= 0
    assert index.max() < size


# What must not poison it


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_diverged_weights_count_as_nonzero(bad):
    w = nn.Parameter(torch.linspace(0.01, 1, 100))
    with torch.no_grad():
        w[:10] = bad
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(0.5))
    aim = TargetSparsity(optimizer, 0.5, until=1)
    w.grad = torch.zeros(100)
    optimizer.step()
    aim.step()
    assert aim.reached() == {"all": 0.5}
    assert (w[10:60] == 0).all()


def test_a_model_of_nans_keeps_the_scale():
    w = nn.Parameter(torch.full((10,), math.nan))
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(0.5), strength_scale=torch.tensor(0.25))
    aim = TargetSparsity(optimizer, 0.5, until=2)
    w.grad = torch.zeros(10)
    optimizer.step()
    assert optimizer.param_groups[0]["strength_scale"] == 0.25
    aim.remove()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", [ProxSGD, ProxAdamW])
def test_a_step_of_length_zero_changes_nothing(make, lr):
    """As torch.distributed.checkpoint takes one to create the state."""
    model = network()
    reg = Regularizer(model, L1(1e-3))
    optimizer = make(reg.param_groups(), lr=0.05)
    aim = TargetSparsity(optimizer, 0.5, until=5)
    train(model, optimizer, 10, aim)
    weight, scale = model[0].weight.detach().clone(), reg.strength_scale.item()
    for group in optimizer.param_groups:
        group["lr"] = lr
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model[0].weight, weight)
    assert reg.strength_scale.item() == scale
    assert aim.last_epoch == 10


def test_a_step_without_gradients_changes_nothing():
    model = network()
    reg = Regularizer(model, L1(1e-3))
    optimizer = ProxSGD(reg.param_groups(), lr=0.05)
    TargetSparsity(optimizer, 0.5, until=5)
    optimizer.step()
    assert reg.strength_scale == 1


def test_a_choice_that_was_skipped_is_made_later():
    w = nn.Parameter(torch.linspace(0.1, 1, 10))
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(0.1))
    aim = TargetSparsity(optimizer, 0.9, until=100, after=50)
    w.grad = torch.zeros(10)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    aim.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    aim.step()
    assert optimizer.param_groups[0]["strength_scale"] == 0
    assert torch.equal(w.detach(), torch.linspace(0.1, 1, 10))


def test_between_choices_the_optimizer_steps_as_ever():
    model = network()
    optimizer = ProxSGD(Regularizer(model, L1(1e-3)).param_groups(), lr=0.05)
    aim = TargetSparsity(optimizer, 0.5, until=25, every=10)
    armed = []
    for _ in range(30):
        armed.append(len(optimizer._preview_hooks))
        train(model, optimizer, 1, aim)
    assert [k + 1 for k, hooks in enumerate(armed) if hooks] == [1, 10, 20, *range(25, 31)]
    aim.remove()
    aim.remove()
    aim.step()
    assert not optimizer._preview_hooks


# Saying so


def test_a_target_out_of_reach_is_warned_about_once():
    w = nn.Parameter(torch.ones(100))
    strengths = torch.ones(100)
    strengths[:40] = 0
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(strengths))
    aim = TargetSparsity(optimizer, 0.9, until=3, every=1)

    def step():
        w.grad = torch.zeros(100)
        optimizer.step()
        aim.step()

    step()
    step()
    with pytest.warns(UserWarning, match=r"90.0% zeros \(all\) is missed: [0-6]\d?\.\d% at step 3"):
        step()
    for _ in range(5):
        step()


@pytest.mark.parametrize("named", [True, False])
def test_a_tensor_that_is_emptied_is_named_once(named):
    large, small = nn.Parameter(torch.linspace(1, 2, 60)), nn.Parameter(torch.linspace(0.01, 0.02, 20))
    nothing = nn.Parameter(torch.empty(0))
    params = [("large", large), ("nothing", nothing), ("small", small)] if named else [large, nothing, small]
    optimizer = ProxSGD(params, lr=0.1, penalty=L1(1.0))
    goal = TargetSparsity(optimizer, 0.5, until=3)

    def train():
        for _ in range(205):
            for p in (large, small, nothing):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            goal.step()

    with pytest.warns(UserWarning, match="zero everywhere") as caught:
        train()
    name = "small" if named else "2"
    (message,) = [str(w.message) for w in caught]
    assert message.startswith(f"Parameter '{name}' is zero everywhere at step 3: ")
    assert goal.reached() == {"all": 0.5}


def test_dead_zeros_are_warned_about():
    w = nn.Parameter(torch.zeros(100))
    with torch.no_grad():
        w[:30] = 1.0
    optimizer = ProxSGD([w], lr=0.1, penalty=L1(0.1))
    aim = TargetSparsity(optimizer, 0.4, until=1)
    w.grad = torch.zeros(100)
    optimizer.step()
    with pytest.warns(UserWarning, match="40.0% zeros .* is missed: 70.0% at step 1"):
        aim.step()


# Checkpoints


@every_optimizer
@pytest.mark.parametrize("at", [5, 20, 33])
def test_resuming_is_bit_exact(make, at):
    def start():
        model = network()
        reg = Regularizer(model, {"0.*": L1(1e-3), "2.weight": L1(1e-2)})
        optimizer = make(reg.param_groups())
        return model, optimizer, TargetSparsity(optimizer, {0: 0.8, 1: 0.5}, until=30, every=4)

    whole, half, again = start(), start(), start()
    train(*whole[:2], 45, whole[2])
    train(*half[:2], at, half[2])
    for fresh, old in zip(again, half, strict=True):
        fresh.load_state_dict(through_file(old.state_dict()))
    train(*again[:2], 45 - at, again[2], first=at)
    assert torch.equal(again[0][0].weight, whole[0][0].weight)
    assert torch.equal(again[0][2].weight, whole[0][2].weight)


def test_a_foreign_state_is_refused_and_changes_nothing():
    model = network()
    optimizer = ProxSGD(Regularizer(model, L1(1e-3)).param_groups(), lr=0.05)
    aim = TargetSparsity(optimizer, 0.5, until=25)
    train(model, optimizer, 3, aim)
    good = aim.state_dict()
    scales = ({"scales": scales} for scales in ([], [-1.0], [torch.ones(3)]))
    for change in ({"last_epoch": -1}, {"start": [0.1, 0.2]}, {"start": [2.0]}, {"other": 1}, *scales):
        with pytest.raises(ValueError, match=r"Expected|saved state"):
            aim.load_state_dict({**good, **change})
    for change in ({"start": 3}, {"start": ["a"]}, {"scales": 5}, {"scales": ["a"]}):
        with pytest.raises(TypeError, match=r"^Expected"):
            aim.load_state_dict({**good, **change})
    with pytest.raises(TypeError, match="last_epoch"):
        aim.load_state_dict({**good, "last_epoch": 1.5})
    with pytest.raises(ValueError, match="state of a TargetSparsity"):
        aim.load_state_dict(None)
    assert aim.last_epoch == 3
    assert aim.state_dict() == good


def test_a_state_that_began_at_zeros_alone_is_loaded():
    w = nn.Parameter(torch.zeros(10))
    aim = TargetSparsity(ProxSGD([w], lr=0.1, penalty=L1(0.1)), 0.4, until=5)
    aim.load_state_dict(through_file(aim.state_dict()))
    assert aim.wanted(0) == {"all": 1.0}


# Bad input


def prox(rules=None):
    return ProxSGD(Regularizer(network(), rules or L1(0.1)).param_groups(), lr=0.1)


BAD = {
    "one": (ValueError, r"\[0, 1\), got 1.0", lambda: TargetSparsity(prox(), 1.0, until=5)),
    "negative": (ValueError, "got -0.1", lambda: TargetSparsity(prox(), -0.1, until=5)),
    "percent": (ValueError, "got 90.0", lambda: TargetSparsity(prox(), 90, until=5)),
    "nan": (ValueError, "got nan", lambda: TargetSparsity(prox(), math.nan, until=5)),
    "text": (TypeError, "'0.9'", lambda: TargetSparsity(prox(), "0.9", until=5)),
    "in a rule": (ValueError, "target of 'default'", lambda: TargetSparsity(prox(), {"default": 1.5}, until=5)),
    "no rules": (ValueError, "at least one rule", lambda: TargetSparsity(prox(), {}, until=5)),
    "until 0": (ValueError, "`until`.*at least 1, got 0", lambda: TargetSparsity(prox(), 0.5, until=0)),
    "until 2.5": (TypeError, "`until`.*got 2.5", lambda: TargetSparsity(prox(), 0.5, until=2.5)),
    "until after": (ValueError, "greater than `after`", lambda: TargetSparsity(prox(), 0.5, until=5, after=5)),
    "every 0": (ValueError, "`every`", lambda: TargetSparsity(prox(), 0.5, until=5, every=0)),
    "unknown rule": (ValueError, "closest: 'default'", lambda: TargetSparsity(prox(), {"defualt": 0.5}, until=5)),
    "rule twice": (ValueError, "once", lambda: TargetSparsity(prox(), {"default": 0.5, 0: 0.5}, until=5)),
    "no penalty": (
        ValueError,
        "None of the 1 param groups has a penalty",
        lambda: TargetSparsity(ProxSGD(network().parameters()), 0.5, until=5),
    ),
    "rule without": (ValueError, "group 1 has no penalty", lambda: TargetSparsity(prox(), {1: 0.5}, until=5)),
    "torch's": (
        ValueError,
        "SGD applies no penalties.*ProxSGD",
        lambda: TargetSparsity(torch.optim.SGD(network().parameters(), lr=0.1), 0.5, until=5),
    ),
    "a regularizer": (
        TypeError,
        "register_prox_pre_hook.*got Regularizer",
        lambda: TargetSparsity(Regularizer(network(), L1(0.1)), 0.5, until=5),
    ),
    "L2": (ValueError, "has L2, whose strength does not zero", lambda: TargetSparsity(prox(L2(0.1)), 0.5, until=5)),
    "L1 of 0": (ValueError, "has L1, whose", lambda: TargetSparsity(prox(L1(0.0)), 0.5, until=5)),
    "L2 beside L1": (
        ValueError,
        "group 1 has L2.*for each of the other rules",
        lambda: TargetSparsity(prox({"0.weight": L1(0.1), "2.weight": L2(0.1)}), 0.5, until=5),
    ),
    "joint": (ValueError, "has _Joint", lambda: TargetSparsity(prox(_Joint(0.1)), 0.5, until=5)),
    "rows": (ValueError, "has _Rowwise", lambda: TargetSparsity(prox(_Rowwise(0.1)), 0.5, until=5)),
}


@pytest.mark.parametrize(("error", "message", "make"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_refused_input_leaves_no_hook_and_no_scale():
    model = network()
    reg = Regularizer(model, {"0.weight": L1(0.1), "2.weight": L2(0.1)})
    optimizer = ProxSGD(reg.param_groups(), lr=0.1)
    with pytest.raises(ValueError, match="has L2"):
        TargetSparsity(optimizer, {0: 0.5, 1: 0.5}, until=5)
    assert not optimizer._preview_hooks
    assert all(group["strength_scale"] is reg.strength_scale for group in optimizer.param_groups)


@pytest.mark.parametrize("wrapped", [False, True], ids=["ProxSGD", "Proximal"])
def test_a_step_on_the_ramp_can_not_be_captured(wrapped, monkeypatch):
    """A CUDAGraph would replay its fraction; here one is only said to be captured."""
    w = nn.Parameter(torch.arange(1.0, 11.0))
    groups = [{"params": [w], "penalty": L1(1.0)}]
    optimizer = Proximal(torch.optim.SGD(groups, lr=0.1)) if wrapped else ProxSGD(groups, lr=0.1)
    asked = TargetSparsity(optimizer, 0.3, until=2)
    w.grad = torch.zeros(10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture one from step 2 on; this is step 1"):
        optimizer.step()
    assert torch.equal(w.detach(), torch.arange(1.0, 11.0))
    asked.step()
    optimizer.step()
    assert asked.reached() == {"all": 0.3}
