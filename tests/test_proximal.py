"""`Proximal` around torch's optimizers: its steps are theirs, then the proximal operator in their metric."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import PENALTIES, identical, parameters, set_gradients, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import torchreg
from torchreg import L1, ElasticNet, ProxAdamW, Proximal, ProxSGD, Regularizer
from torchreg.optim.metrics import ProxSteps
from torchreg.penalties.base import strength_field

INNER: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "SGD momentum": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "SGD nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {}),
    "Adam amsgrad": (Adam, {"amsgrad": True}),
    "Adam maximize": (Adam, {"maximize": True}),
    "AdamW": (AdamW, {"weight_decay": 0}),
    "NAdam": (NAdam, {}),
    "RAdam": (RAdam, {}),
    "RMSprop": (RMSprop, {}),
    "RMSprop centered": (RMSprop, {"centered": True}),
    "RMSprop momentum": (RMSprop, {"momentum": 0.9}),
    "Adagrad": (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adamax": (Adamax, {}),
}
inner_optimizers = pytest.mark.parametrize(("cls", "hyper"), INNER.values(), ids=INNER)


def groups(params: list[nn.Parameter], penalty: Any, scale: Any = 1.0) -> list[dict[str, Any]]:
    """Two groups: one with the penalty, and one without."""
    return [{"params": params[:-1], "penalty": penalty, "strength_scale": scale}, {"params": params[-1:]}]


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, scheduler: Any = None) -> None:
    for step in steps:
        set_gradients(params, step)
        opt.step()
        if scheduler:
            scheduler.step()


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@inner_optimizers
def test_without_a_penalty_it_is_the_optimizer_bit_for_bit(cls, hyper):
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    train(Proximal(cls(mine, lr=0.1, **hyper)), mine, range(5))
    train(cls(theirs, lr=0.1, **hyper), theirs, range(5))
    assert identical(snapshot(mine), snapshot(theirs))


@inner_optimizers
@pytest.mark.parametrize("foreach", [False, True])
def test_a_constant_gradient_moves_each_weight_by_its_step(cls, hyper, foreach):
    """What the penalty of a weight is balanced against: from the first step on, or once the momentum has built up."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    w = nn.Parameter(start.clone())
    if cls is RMSprop and hyper.get("momentum"):
        hyper = {**hyper, "alpha": 0.9}  # settles sooner
    opt = Proximal(cls([w], lr=0.01, foreach=foreach, **hyper), penalty=L1(0.0))
    seen = []
    opt.register_prox_pre_hook(lambda _, points: seen.append((points[0].steps[0], points[0].params[0].clone())))
    gradient = torch.linspace(0.1, 3, 9, dtype=torch.float64)
    sign = 1 if hyper.get("maximize") else -1
    momentum = hyper.get("momentum", 0) != 0
    steps = 400 if momentum else 40
    for t in range(steps):
        before = w.detach().clone()
        w.grad = gradient.clone()
        opt.step()
        step, after = seen[-1]
        if not momentum or t == steps - 1:
            torch.testing.assert_close(after - before, sign * step * gradient, rtol=1e-6, atol=1e-12)


@inner_optimizers
def test_the_proximal_operator_follows_the_step(cls, hyper):
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    scale = torch.tensor(0.5)
    opt = Proximal(cls(groups(mine, ElasticNet(0.3, 0.2), scale), lr=0.1, **hyper))
    bare = cls(groups(theirs, None), lr=0.1, **hyper)
    steps: list[Any] = []
    opt.register_prox_pre_hook(lambda _, points: steps.extend(zip(points[0].params, points[0].steps, strict=True)))
    train(opt, mine, range(1))
    train(bare, theirs, range(1))
    assert len(steps) == len(mine) - 1
    for (p, step), q in zip(steps, theirs, strict=False):
        assert torch.equal(p, ElasticNet(0.3, 0.2).prox(q.detach(), step * 0.5))
    assert torch.equal(mine[-1], theirs[-1])


@inner_optimizers
def test_large_tensors_are_shrunk_in_tiles_that_agree_with_the_whole(cls, hyper):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(600, 500, generator=generator).T, torch.randn(300_001, generator=generator)]
    tiled, whole = ([nn.Parameter(w.clone()) for w in starts] for _ in range(2))
    opts = [
        Proximal(cls(tiled, lr=0.1, **hyper), penalty=L1(0.3)),
        Proximal(cls(whole, lr=0.1, **hyper), penalty=L1(torch.full((1,), 0.3))),
    ]
    for step in range(2):
        for params, opt in zip((tiled, whole), opts, strict=True):
            set_gradients(params, step)
            opt.step()
    assert any((p == 0).any() for p in tiled) or cls in (SGD, Adagrad, RAdam)
    for p, q in zip(tiled, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_around_sgd_it_is_prox_sgd(momentum):
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    train(Proximal(SGD(mine, lr=0.02, momentum=momentum), penalty=L1(0.3)), mine, range(6))
    train(ProxSGD(theirs, lr=0.02, momentum=momentum, penalty=L1(0.3)), theirs, range(6))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(p == 0, q == 0)


@pytest.mark.parametrize("metric", [None, "identity"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_around_adamw_it_is_prox_adamw(metric, amsgrad):
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    options = {"lr": 0.02, "weight_decay": 0.1, "amsgrad": amsgrad}
    train(Proximal(AdamW(mine, **options), penalty=L1(0.3), metric=metric), mine, range(6))
    train(ProxAdamW(theirs, **options, penalty=L1(0.3), metric=metric or "adam"), theirs, range(6))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(p == 0, q == 0)


@inner_optimizers
def test_a_learning_rate_of_zero_changes_nothing(cls, hyper):
    params = parameters()
    before = snapshot(params)
    opt = Proximal(cls(params, lr=0.0, **hyper), penalty=L1(5.0))
    train(opt, params, range(2))
    assert identical(snapshot(params), before)


@inner_optimizers
def test_a_learning_rate_may_be_a_tensor(cls, hyper):
    mine, theirs = parameters(), parameters()
    train(Proximal(cls(mine, lr=torch.tensor(0.1), foreach=False, **hyper), penalty=L1(0.3)), mine, range(3))
    train(Proximal(cls(theirs, lr=0.1, foreach=False, **hyper), penalty=L1(0.3)), theirs, range(3))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_only_weights_with_a_gradient_are_shrunk():
    params = parameters()
    params[0].grad = None
    before = snapshot(params)
    Proximal(SGD(params, lr=0.1), penalty=L1(50.0)).step()
    assert torch.equal(params[0], before[0])
    assert torch.count_nonzero(params[1]) == 0


def test_what_is_shrunk_away_is_positive_zero_and_nan_stays():
    w = nn.Parameter(torch.tensor([-0.1, 0.1, float("nan"), float("inf")]))
    w.grad = torch.zeros(4)
    Proximal(SGD([w], lr=1.0), penalty=L1(1.0)).step()
    assert identical([w.detach()], [torch.tensor([0.0, 0.0, float("nan"), float("inf")])])


# Which optimizers


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        (torch.optim.Adafactor, "whole tensor"),
        (LBFGS, "curvature"),
        (Adadelta, "none of those"),
        (type("Lion", (SGD,), {}), "sign"),
        (type("MyAdam", (Adam,), {}), "subclass of torch.optim.Adam that may"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_optimizer_without_a_known_metric_is_refused_until_one_is_given(cls, word):
    params = parameters()[:2]
    with pytest.raises(TypeError, match=f'{cls.__name__} has no metric.*{word}.*metric="identity"'):
        Proximal(cls(params, lr=0.1))
    opt = Proximal(cls(params, lr=0.1), metric="identity", penalty=L1(0.1))
    assert opt.effective_step(opt.param_groups[0]) == 0.1
    with pytest.raises(TypeError, match="Expected `metric`"):
        Proximal(cls(params, lr=0.1), metric="euclid")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_has_no_metric():
    w = parameters()[0]
    with pytest.raises(TypeError, match="orthogonalises"):
        Proximal(torch.optim.Muon([w], lr=0.1))


def test_the_identity_keeps_the_gain_of_a_momentum_that_is_known():
    w = nn.Parameter(torch.ones(2))
    opt = Proximal(RMSprop([w], lr=0.1, momentum=0.9), metric="identity", penalty=L1(0.1))
    assert opt.effective_step(opt.param_groups[0]) == pytest.approx(1.0)


def test_a_metric_may_be_a_function():
    class Half(torch.optim.Optimizer):
        """Moves by half of the gradient and has no learning rate."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.5 * p.grad)

    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    calls = []

    def metric(optimizer, group, parameter):
        calls.append((optimizer, group, parameter))
        return torch.tensor([0.0, 1.0, 4.0])

    inner = Half([w], {})
    opt = Proximal(inner, metric=metric, penalty=L1(0.5), strength_scale=0.5)
    opt.step()
    assert torch.equal(w.detach(), torch.tensor([1.0, 0.75, 0.0]))
    assert calls[0][0] is inner
    assert calls[0][1] is opt.param_groups[0]
    assert calls[0][2] is w
    with pytest.raises(ValueError, match="no `lr`"):
        Proximal(Half([w], {}), metric="identity", penalty=L1(0.5))


@pytest.mark.parametrize("make", [lambda p: ProxSGD(p, lr=0.1), lambda p: Proximal(SGD(p, lr=0.1))])
def test_penalties_are_not_applied_twice(make):
    with pytest.raises(TypeError, match="applies penalties itself"):
        Proximal(make(parameters()))


def test_a_regularizer_and_this_exclude_each_other():
    model = nn.Linear(3, 1)
    reg = Regularizer(model, L1(0.1))
    inner = SGD(reg.param_groups(), lr=0.1)
    with reg.attach(inner), pytest.raises(ValueError, match="attached"):
        Proximal(inner)
    opt = Proximal(inner)
    for optimizer in (inner, opt):
        with pytest.raises(ValueError, match="applies penalties itself"):
            reg.attach(optimizer)


@pytest.mark.parametrize("given", [SGD, None, nn.Linear(2, 2)], ids=["class", "None", "module"])
def test_what_is_no_optimizer_is_refused(given):
    with pytest.raises(TypeError, match="Expected `optimizer`"):
        Proximal(given)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"penalty": 0.1}, TypeError),
        ({"penalty": L1(torch.ones(7))}, ValueError),
        ({"strength_scale": -1.0}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"differentiable": True}, ValueError),
    ],
    ids=["penalty", "shape", "scale", "momentum", "differentiable"],
)
def test_a_group_that_can_not_be_shrunk_is_refused_and_nothing_changes(change, error):
    good, bad = parameters()[:2], parameters()[:2]
    group = {"params": bad, "penalty": L1(0.1), **change}
    inner = SGD([{"params": good}, group], lr=0.1)
    keys = [set(g) for g in inner.param_groups]
    with pytest.raises(error):
        Proximal(inner)
    assert [set(g) for g in inner.param_groups] == keys
    assert "penalty" not in inner.defaults
    opt = Proximal(SGD(good, lr=0.1))
    with pytest.raises(error):
        opt.add_param_group({"params": bad, "penalty": L1(0.1), **change})
    assert len(opt.param_groups) == 1


def test_a_step_too_long_for_the_penalty_is_refused_before_any_change():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    opt = Proximal(SGD([w], lr=0.2, momentum=0.9), penalty=torchreg.MCP(0.1, gamma=1.5))
    with pytest.raises(ValueError, match="gamma"):
        opt.step()
    assert torch.equal(w.detach(), torch.ones(2))
    opt.param_groups[0]["lr"] = 0.1
    opt.step()


LONG = {
    "Adam": lambda groups: Proximal(Adam(groups, lr=0.1)),
    "RAdam, not rectified yet": lambda groups: Proximal(RAdam(groups, lr=0.1)),
    "a function": lambda groups: Proximal(SGD(groups, lr=0.1), metric=lambda opt, group, p: 0.1),
    "ProxAdamW": lambda groups: ProxAdamW(groups, lr=0.1),
    "ProxAdamW, hooked": lambda groups: hooked(ProxAdamW(groups, lr=0.1)),
}


def hooked(optimizer):
    optimizer.register_prox_pre_hook(lambda opt, points: None)
    return optimizer


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
@pytest.mark.parametrize("start", [0.01, 0.5])
@pytest.mark.parametrize("penalty", [torchreg.MCP(0.1, gamma=0.05), torchreg.SCAD(0.1, a=1.05)], ids=str)
def test_a_long_step_of_a_metric_is_taken_whatever_the_shape(make, start, penalty):
    weights = [nn.Parameter(torch.full(shape, start)) for shape in ((), (1,), (2, 3))]
    for w in weights:
        w.grad = torch.full_like(w, 0.1)
    make([{"params": weights, "penalty": penalty}]).step()
    assert {round(value, 6) for w in weights for value in w.flatten().tolist()} == {round(weights[0].item(), 6)}


@pytest.mark.parametrize("scale", [-1.0, torch.tensor(-1.0), "1", torch.ones(2)], ids=str)
@pytest.mark.parametrize("metric", [None, "identity", lambda opt, group, p: 0.1], ids=["own", "identity", "function"])
def test_a_strength_scale_that_became_none_is_refused_before_any_change(scale, metric):
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    opt = Proximal(SGD([w], lr=0.2), penalty=L1(0.1), metric=metric)
    opt.param_groups[0]["strength_scale"] = scale
    with pytest.raises((TypeError, ValueError), match="strength_scale"):
        opt.step()
    assert torch.equal(w.detach(), torch.ones(2))


def test_complex_weights_need_a_metric_that_keeps_their_parts_together():
    params = parameters(torch.complex64)[:2]
    with pytest.raises(TypeError, match="complex"):
        Proximal(Adam(params, lr=0.1), penalty=L1(0.1))
    mine = Proximal(SGD(params, lr=0.1), penalty=L1(0.1))
    theirs = parameters(torch.complex64)[:2]
    mine.step()
    ProxSGD(theirs, lr=0.1, penalty=L1(0.1)).step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_sparse_gradient_beside_a_penalty_is_refused_before_any_change():
    emb = nn.Embedding(4, 2, sparse=True)
    other = nn.Parameter(torch.ones(2))
    opt = Proximal(SGD([other, emb.weight], lr=0.1), penalty=L1(0.1))
    emb(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(TypeError, match="sparse"):
        opt.step()
    assert torch.equal(other.detach(), torch.ones(2))
    opt.param_groups[0]["penalty"] = None
    opt.step()


# It stays an optimizer


@inner_optimizers
@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("scheduler", [StepLR, OneCycleLR])
def test_schedulers_work_on_either(cls, hyper, on, scheduler):
    if scheduler is OneCycleLR and cls is Adagrad:
        pytest.skip("OneCycleLR needs momentum or betas")
    results = []
    for wrapped in (False, True):
        params = parameters(torch.float64)
        inner = cls(params, lr=0.1, **hyper)
        opt = Proximal(inner) if wrapped else inner
        held = opt if on == "wrapper" else inner
        cycles = bool(hyper.get("momentum")) or "betas" in inner.defaults
        lr = (
            StepLR(held, 2)
            if scheduler is StepLR
            else OneCycleLR(held, max_lr=0.2, total_steps=9, cycle_momentum=cycles)
        )
        train(opt, params, range(5), lr)
        results.append(snapshot(params))
    assert identical(*results)


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_strength_schedules_work_on_either(on):
    w = nn.Parameter(torch.ones(2))
    inner = SGD([w], lr=0.5)
    opt = Proximal(inner, penalty=L1(0.5))
    schedule = torchreg.schedules.WarmupStrength(opt if on == "wrapper" else inner, until=2)
    values = []
    for _ in range(3):
        w.grad = torch.zeros(2)
        opt.step()
        values.append(w[0].item())
        schedule.step()
    assert values == [1.0, 0.875, 0.625]


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_groups_may_be_added_to_either(on):
    params = parameters()
    inner = Adam(params[:1], lr=0.1)
    opt = Proximal(inner, penalty=L1(50.0))
    target = opt if on == "wrapper" else inner
    target.add_param_group({"params": params[1:2]})
    target.add_param_group({"params": params[3:4], "penalty": None})
    assert [g["penalty"] for g in opt.param_groups] == [L1(50.0), L1(50.0), None]
    before = snapshot(params)
    opt.step()
    assert torch.count_nonzero(params[1]) == 0
    assert not torch.equal(params[3], before[3])
    assert torch.count_nonzero(params[3]) == params[3].numel()


def test_hooks_run_around_the_step():
    w = nn.Parameter(torch.ones(1))
    inner = SGD([w], lr=1.0)
    opt = Proximal(inner, penalty=L1(0.25))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(("outer", w.item())))
    opt.register_step_post_hook(lambda *_: seen.append(("outer done", w.item())))
    inner.register_step_pre_hook(lambda *_: seen.append(("inner", w.item())))
    inner.register_step_post_hook(lambda *_: seen.append(("inner done", w.item())))
    both = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: both.append(optimizer))
    w.grad = torch.full((1,), 0.5)
    opt.step()
    handle.remove()
    assert seen == [("outer", 1.0), ("inner", 1.0), ("inner done", 0.5), ("outer done", 0.25)]
    assert both == [inner, opt]
    assert isinstance(opt, torch.optim.Optimizer)
    assert "SGD" in repr(opt)
    opt.zero_grad()
    assert w.grad is None


def test_a_hook_before_the_proximal_operators_may_move_the_strength():
    params = parameters()
    opt = Proximal(Adam(groups(params, L1(0.3)), lr=0.1))
    seen = []

    def hook(optimizer, points):
        seen.append((optimizer, [len(point.params) for point in points]))
        for point in points:
            point.group["strength_scale"] = 1e6

    handle = opt.register_prox_pre_hook(hook)
    opt.step()
    assert seen == [(opt, [5])]
    assert all(torch.count_nonzero(p) == 0 for p in params[:-1])
    handle.remove()
    opt.step()
    assert len(seen) == 1


@pytest.mark.parametrize("cls", [SGD, Adam, RMSprop])
def test_a_target_sparsity_is_reached(cls):
    params = [p for p in parameters() if p.numel()]
    opt = Proximal(cls(params, lr=0.02), penalty=L1(0.1))
    target = torchreg.TargetSparsity(opt, 0.5, until=40)
    for step in range(80):
        set_gradients(params, step)
        opt.step()
        target.step()
    zeros = sum(int((p == 0).sum()) for p in params)
    assert abs(zeros / sum(p.numel() for p in params) - 0.5) < 0.02


def test_a_closure_is_evaluated_once_and_its_loss_returned():
    w = nn.Parameter(torch.tensor([2.0]))
    opt = Proximal(SGD([w], lr=0.5), penalty=L1(0.5))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    assert opt.step(closure).item() == 2.0
    assert calls == [True]
    assert w.item() == 0.75


def test_an_unknown_optimizer_gets_its_closure():
    w = nn.Parameter(torch.tensor([2.0, 0.1]))
    opt = Proximal(LBFGS([w], lr=0.1), metric="identity", penalty=L1(1.5))

    def closure():
        opt.zero_grad()
        loss = (w - torch.tensor([2.0, 0.1])).square().sum() / 2
        loss.backward()
        return loss

    assert opt.step(closure).item() == 0.0
    assert torch.allclose(w.detach(), torch.tensor([1.85, 0.0]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Largest(torchreg.penalties.Penalty):
    """Keeps the largest weight of a rule, whatever the step: for this test."""

    strength: float = strength_field()

    is_joint = True

    def value(self, w):
        raise NotImplementedError

    grad = prox = optimality_residual = strength_max = threshold = value

    def prox_all_(self, weights, steps):
        assert len(weights) == len(steps)
        largest = torch.stack([w.abs().max() for w in weights]).max()
        for w in weights:
            w.masked_fill_(w.abs() < largest, 0)


def test_a_joint_penalty_gets_all_weights_of_its_rule():
    params = [p for p in parameters() if p.numel()]
    opt = Proximal(Adam(params, lr=0.1), penalty=_Largest(1.0))
    opt.step()
    assert sum(int(torch.count_nonzero(p)) for p in params) == 1
    assert not opt._step_supports_amp_scaling


# Half precision


@pytest.mark.parametrize(("cls", "hyper"), [(SGD, {}), (Adam, {"eps": 1e-3})], ids=["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shrinkage_below_half_an_ulp_acts_on_average(cls, hyper, dtype):
    w = nn.Parameter(torch.ones(4096, dtype=dtype))
    opt = Proximal(cls([w], lr=1e-4, **hyper), metric="identity", penalty=L1(1.0))
    for _ in range(100):
        w.grad = torch.zeros_like(w)
        opt.step()
    assert w.float().mean().item() == pytest.approx(0.99, abs=2e-3)
    nearest = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = Proximal(cls([nearest], lr=1e-4, **hyper), metric="identity", penalty=L1(1.0), stochastic_rounding=False)
    nearest.grad = torch.zeros_like(nearest)
    opt.step()
    assert torch.equal(nearest.detach(), torch.ones(4, dtype=dtype))


# GradScaler


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, Adagrad])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_scaled_loss_takes_the_same_steps_and_skips_those_that_overflow(cls, fused, hooked):
    """Also the very first one, when the optimizer has no state that a metric could be taken from."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [Proximal(cls(m.parameters(), lr=0.05, fused=fused), penalty=L1(0.1)) for m in models]
    if hooked:
        opts[0].register_prox_pre_hook(lambda *_: None)
    supported = getattr(opts[0].inner, "_step_supports_amp_scaling", False)
    assert supported == (fused is True) or cls is Adagrad  # not in every torch
    assert opts[0]._step_supports_amp_scaling == (supported and not hooked)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflows = step in (0, 3)
        before = snapshot(list(models[0].parameters()))
        opts[0].zero_grad()
        scaler.scale(models[0](x).square().mean() * (float("inf") if overflows else 1.0)).backward()
        scaler.step(opts[0])
        scaler.update()
        if overflows:
            assert identical(snapshot(list(models[0].parameters())), before)
            continue
        opts[1].zero_grad()
        models[1](x).square().mean().backward()
        opts[1].step()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert not hasattr(opts[0].inner, "found_inf")
    assert (models[0].weight == 0).any() or cls in (SGD, Adagrad)


# Checkpoints


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in [key, *leaves(value)]]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


@inner_optimizers
@pytest.mark.parametrize("penalty", [L1(0.3), PENALTIES["ElasticNet per coordinate"]], ids=["L1", "ElasticNet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_is_exact(cls, hyper, penalty, dtype):
    def start() -> tuple[list[nn.Parameter], Proximal]:
        params = parameters(dtype)
        return params, Proximal(cls(groups(params, penalty, torch.tensor(0.5)), lr=0.1, **hyper))

    if cls is NAdam and dtype is torch.bfloat16:
        pytest.skip("torch rounds mu_product to the weights' type when it loads a state")
    params, opt = start()
    train(opt, params, range(3))
    state = opt.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {int, float, bool, str, Tensor, type(None)}
    checkpoint = saved([snapshot(params), state])
    train(opt, params, range(3, 6))
    resumed, other = start()
    for p, w in zip(resumed, checkpoint[0], strict=True):
        p.data.copy_(w)
    scale = other.param_groups[0]["strength_scale"]
    other.load_state_dict(checkpoint[1])
    assert other.param_groups[0]["penalty"] == penalty
    assert other.param_groups[0]["strength_scale"] is scale
    train(other, resumed, range(3, 6))
    assert identical(snapshot(params), snapshot(resumed))


@inner_optimizers
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_copies_go_on_exactly(cls, hyper, copied):
    params = parameters(torch.bfloat16)
    opt = Proximal(cls(groups(params, L1(0.3), torch.tensor(0.5)), lr=0.1, **hyper))
    StepLR(opt, 2)
    train(opt, params, range(2))
    clones, clone = copied((params, opt))
    assert clone.param_groups[0]["params"][0] is clones[0]
    assert clone.inner is not opt.inner
    train(opt, params, range(2, 5))
    train(clone, clones, range(2, 5))
    assert identical(snapshot(params), snapshot(clones))
    with pytest.raises(ValueError, match="applies penalties itself"):
        Regularizer(nn.Linear(2, 2), L1(0.1)).attach(clone.inner)


@inner_optimizers
def test_a_checkpoint_of_the_bare_optimizer_loads_and_keeps_the_penalty(cls, hyper):
    params = parameters()
    bare = cls(params, lr=0.3, **hyper)
    train(bare, params, range(2))
    scale = torch.tensor(0.5)
    opt = Proximal(cls(params, lr=0.1, **hyper), penalty=L1(0.3), strength_scale=scale)
    opt.load_state_dict(saved(bare.state_dict()))
    group = opt.param_groups[0]
    assert (group["penalty"], group["lr"]) == (L1(0.3), 0.3)
    assert group["strength_scale"] is scale
    opt.step()


def test_a_checkpoint_loaded_behind_its_back_is_noticed():
    params = parameters()
    opt = Proximal(Adam(params, lr=0.1), penalty=L1(0.3))
    opt.inner.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="lost its penalty"):
        opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    opt.inner.load_state_dict(Adam(params, lr=0.1).state_dict())
    with pytest.raises(RuntimeError, match="lost its penalty"):
        opt.step()


SPOILED: dict[str, Any] = {
    "not a dict": lambda s: "weights.pt",
    "another optimizer's": lambda s: SGD(parameters(), lr=0.1).state_dict(),
    "other shapes": lambda s: s["state"][3].update(exp_avg=torch.ones(7, 3)),
    "buffer is text": lambda s: s["state"][3].update(exp_avg="none"),
    "more groups": lambda s: s["param_groups"].append({**s["param_groups"][0], "params": []}),
    "fewer parameters": lambda s: s["param_groups"][0].update(params=s["param_groups"][0]["params"][:-1]),
    "unknown penalty": lambda s: s["param_groups"][0].update(penalty={"type": "L0.5", "strength": 0.1}),
    "penalty of other shapes": lambda s: s["param_groups"][0].update(penalty={"type": "L1", "strength": torch.ones(7)}),
    "penalty is a number": lambda s: s["param_groups"][0].update(penalty=0.1),
    "bad strength scale": lambda s: s["param_groups"][0].update(strength_scale=float("nan")),
    "bad learning rate": lambda s: s["param_groups"][0].update(lr=-1.0),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(how):
    params = parameters()
    opt = Proximal(Adam(groups(params, ElasticNet(0.3, 0.2), torch.tensor(0.5)), lr=0.1))
    train(opt, params, range(3))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["strength_scale"] = 4.0
    state = SPOILED[how](state) or state
    tensors = [entry for s in opt.state.values() for entry in s.values()]
    before = snapshot(params + tensors)
    kept = [{**g, "strength_scale": float(g["strength_scale"])} for g in opt.param_groups]
    with pytest.raises(TypeError if how.endswith((" number", " text")) else ValueError):
        opt.load_state_dict(state)
    assert identical(snapshot(params + tensors), before)
    assert next(entry for s in opt.state.values() for entry in s.values()) is tensors[0]
    assert [{**g, "strength_scale": float(g["strength_scale"])} for g in opt.param_groups] == kept


@pytest.mark.parametrize("cls", [SGD, Adam, NAdam, RAdam, RMSprop, Adagrad, Adamax])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoints_resume_exactly_and_change_no_weight(cls, dtype):
    def start(model: nn.Module) -> Proximal:
        reg = Regularizer(model, {"0.weight": L1(0.1), "1.weight": ElasticNet(0.1, 0.2)})
        return Proximal(cls(reg.param_groups(), lr=0.1))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
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


def test_state_dict_hooks_run():
    opt = Proximal(SGD(parameters(), lr=0.1), penalty=L1(0.1))
    seen = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("save"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append(state.pop("extra")))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save", 1, "loaded"]


def test_the_support_can_be_frozen():
    params = parameters()
    opt = Proximal(Adam(params, lr=0.1), penalty=L1(0.3))
    train(opt, params, range(3))
    zeros = [p == 0 for p in params]
    with torchreg.freeze_zeros(params):
        train(opt, params, range(3, 6))
        assert all((p[zero] == 0).all() for p, zero in zip(params, zeros, strict=True))


@inner_optimizers
def test_a_metric_reads_nothing_from_a_device(cls, hyper):
    """The meta device holds no values: reading one there raises, where on CUDA it would wait."""
    w = nn.Parameter(torch.ones(3))
    opt = cls([w], lr=0.1, **hyper)
    w.grad = torch.ones(3)
    opt.step()
    group = {**opt.param_groups[0], "lr": torch.tensor(0.1, device="meta")}
    opt.state[w] = {key: value.to("meta") for key, value in opt.state[w].items() if value is not None}
    step = ProxSteps(opt, None).unit(group, w)
    assert step.device.type == "meta"
    assert step.shape in ((), (3,))
