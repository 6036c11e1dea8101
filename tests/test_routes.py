"""The loss term and the optimizer hook: right gradients, one strength whatever the loop does, nothing left behind."""

import copy
import gc
import io
import math
import pickle
import re
import weakref

import pytest
import torch
from penalty_table import every_frugal_penalty, every_penalty_with_a_gradient
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, hessian, vmap

from torchreg import L1, L2, ElasticNet, ProxSGD, Regularizer, kkt_residual

F64 = torch.float64
LR = 0.1


def linear(seed=0, dtype=F64):
    torch.manual_seed(seed)
    return nn.Linear(5, 3, dtype=dtype)


def data_loss(model, seed=0):
    x = torch.randn(8, 5, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(model.weight.dtype)
    return (model(x) - 1).square().mean()


def data_grads(model):
    return torch.autograd.grad(data_loss(model), list(model.parameters()))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The loss term


@every_penalty_with_a_gradient
def test_the_loss_term_is_the_penalty_and_its_gradient(case):
    model = nn.ModuleDict(
        {
            "double_": nn.Linear(3, 2, dtype=F64),
            "single_": nn.Linear(3, 2),
            "half_": nn.Linear(3, 2, dtype=torch.bfloat16),
            "complex_": nn.Linear(3, 2, dtype=torch.complex64),
            "empty_": nn.Linear(3, 0),
            "other_": nn.Linear(3, 2),
        }
    )
    reg = Regularizer(model, {"other_.*": None, "*.weight": case.penalty()})
    reg.strength_scale = 0.5
    weights = [p for _, p, _ in reg.penalized()]
    exact = [w.detach().to(torch.complex128 if w.is_complex() else F64).requires_grad_() for w in weights]
    by_hand = 0.5 * sum(case.brute_value(w).sum() for w in exact)
    value = reg()
    torch.testing.assert_close(value.to(F64), by_hand, rtol=1e-5, atol=1e-6)
    (3 * value).backward()
    for w, expected in zip(weights, torch.autograd.grad(3 * by_hand, exact), strict=True):
        assert w.grad.dtype == w.dtype
        torch.testing.assert_close(
            w.grad, expected.to(w.dtype), rtol=1e-2 if w.dtype == torch.bfloat16 else 1e-5, atol=0
        )
    assert all(p.grad is None for p in model["other_"].parameters())
    assert model["double_"].bias.grad is None


def peak_bytes(function):
    """The most memory that the function held at a time, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@every_frugal_penalty
@pytest.mark.parametrize("factor", [1.0, torch.rand(256, 256)], ids=["number", "tensor"])
def test_the_loss_terms_backward_makes_the_gradient_and_nothing_else_of_its_size(case, factor):
    model = nn.Linear(256, 256, bias=False)
    reg = Regularizer(model, case.penalty(factor))
    loss = reg()
    allowed = 1.1 if isinstance(factor, float) else 2.1  # a tensor strength may need a product of its own
    assert model.weight.nbytes <= peak_bytes(loss.backward) <= allowed * model.weight.nbytes


@every_frugal_penalty
def test_the_loss_terms_forward_makes_nothing_of_the_weights_size(case):
    model = nn.Linear(256, 256, bias=False)
    assert peak_bytes(Regularizer(model, case.penalty())) <= 0.1 * model.weight.nbytes


@every_penalty_with_a_gradient
def test_the_loss_term_is_differentiable_twice(case):
    model = linear()
    reg = Regularizer(model, case.penalty())

    def gradient_norm(value):
        (g,) = torch.autograd.grad(value, model.weight, create_graph=True)
        (gg,) = torch.autograd.grad((g * torch.arange(15, dtype=F64).view(3, 5)).sum(), model.weight, allow_unused=True)
        return torch.zeros_like(g) if gg is None else gg

    expected = gradient_norm(case.brute_value(model.weight).sum())
    torch.testing.assert_close(gradient_norm(reg()), expected)


@pytest.mark.parametrize("make", [L1, L2, lambda s: ElasticNet(s, 2 * s)], ids=["L1", "L2", "ElasticNet"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5)])
def test_strengths_that_require_grad_get_one(make, shape):
    model = linear()
    model.weight.data.add_(2 * model.weight.data.sign())
    strength = (torch.rand(shape, dtype=F64) + 0.1).requires_grad_()

    def value(strength, weight):
        model.weight.data.copy_(weight.detach())
        reg = Regularizer(model, make(strength))
        (grad_w,) = torch.autograd.grad(reg(), model.weight, create_graph=True)
        return reg() + (0 * weight).sum(), grad_w

    assert gradcheck(lambda s: value(s, model.weight)[0], (strength,))
    grad_w = value(strength, model.weight)[1]
    torch.testing.assert_close(grad_w, make(strength.detach()).grad(model.weight.detach()))


@every_penalty_with_a_gradient
def test_a_compiled_loss_is_one_graph_that_follows_the_strength_scale(case):
    torch.compiler.reset()
    model = linear()
    reg = Regularizer(model, case.penalty())
    x = torch.ones(4, 5, dtype=F64)

    def loss():
        return model(x).square().mean() + reg()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 0.5):
            reg.strength_scale = scale
            torch.testing.assert_close(*(torch.autograd.grad(f(), model.weight) for f in (compiled, loss)))


def test_weights_that_changed_before_the_backward_pass_are_noticed():
    model = linear()
    value = Regularizer(model, L1(0.1))()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_loss_term_of_frozen_weights_is_zero_and_adds_to_any_loss():
    model = linear().requires_grad_(False)
    reg = Regularizer(model, L1(0.1))
    assert reg().item() == 0
    bias = nn.Parameter(torch.ones(2))
    (bias.sum() + reg()).backward()
    assert torch.equal(bias.grad, torch.ones(2))


class Objective(nn.Module):
    def __init__(self, penalty):
        super().__init__()
        self.net = linear()
        self.reg = Regularizer(self.net, penalty)

    def forward(self):
        return self.net(torch.eye(5, dtype=F64)).square().mean() + self.reg()


@every_penalty_with_a_gradient
def test_the_loss_term_under_torch_func_is_the_penalty(case):
    objective = Objective(case.penalty())
    name, weights = "net.weight", torch.randn(4, 3, 5, dtype=F64)

    def penalised(w):
        return functional_call(objective, {name: w}, ())

    def by_hand(w):
        outputs = functional_call(objective.net, {"weight": w}, torch.eye(5, dtype=F64))
        return outputs.square().mean() + case.brute_value(w).sum()

    expected = torch.stack([grad(by_hand)(w) for w in weights])
    torch.testing.assert_close(vmap(penalised)(weights), torch.stack([by_hand(w) for w in weights]))
    torch.testing.assert_close(vmap(grad(penalised))(weights), expected)
    torch.testing.assert_close(grad(lambda w: vmap(penalised)(w).sum())(weights), expected)
    torch.testing.assert_close(hessian(penalised)(weights[0]), hessian(by_hand)(weights[0]))


# The strength scale


@pytest.mark.parametrize("scale", [0.25, 1, 0, torch.tensor(0.25), torch.tensor([0.5], dtype=F64)])
def test_the_strength_scale_multiplies_every_route(scale):
    model = linear()
    reg = Regularizer(model, L1(0.1))
    optimizer = ProxSGD(reg.param_groups(), lr=LR)
    shared = reg.strength_scale
    reg.strength_scale = scale
    assert reg.strength_scale is shared
    assert all(group["strength_scale"] is shared for group in optimizer.param_groups)
    number = float(scale)
    torch.testing.assert_close(reg(), number * 0.1 * model.weight.abs().sum())
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(model.weight.data, L1(0.1).prox(before, LR * number))


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (-1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (torch.tensor(-1.0), ValueError),
        (torch.ones(2), ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (torch.tensor(1), TypeError),
    ],
    ids=str,
)
def test_what_is_no_strength_scale_is_refused(scale, error):
    reg = Regularizer(linear(), L1(0.1))
    with pytest.raises(error, match=r"^Expected `strength_scale` to be"):
        reg.strength_scale = scale
    assert reg.strength_scale.item() == 1


def test_the_strength_scale_is_all_of_the_state():
    model = linear()
    reg = Regularizer(model, L1(0.1))
    reg.strength_scale = 0.25
    state = through_file(reg.state_dict())
    assert state == {"strength_scale": torch.tensor(0.25)}
    again = Regularizer(model, L1(0.1))
    shared = again.strength_scale
    again.load_state_dict(state)
    assert again.strength_scale is shared
    assert shared.item() == 0.25


@pytest.mark.parametrize(
    "move",
    [
        lambda reg: reg.double(),
        lambda reg: reg.half(),
        lambda reg: reg.to("cpu", torch.bfloat16),
        lambda reg: reg.to("meta"),
        lambda reg: reg.to_empty(device="cpu"),
        lambda reg: reg.share_memory(),
        lambda reg: reg.load_state_dict({"strength_scale": torch.tensor(0.3)}, assign=True),
    ],
    ids=["double", "half", "to", "meta", "empty", "share", "assign"],
)
def test_the_strength_scale_stays_the_tensor_and_number_that_groups_share(move):
    reg = Regularizer(linear(), L1(0.1))
    reg.strength_scale = 0.3
    shared = reg.param_groups()[0]["strength_scale"]
    move(reg)
    assert reg.strength_scale is shared
    assert torch.equal(shared, torch.tensor(0.3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_strength_scale_moves_to_a_device_within_its_tensor():
    reg = Regularizer(linear(), L1(0.1))
    shared = reg.param_groups()[0]["strength_scale"]
    reg.to("cuda", torch.float16)
    reg.strength_scale = 0.3
    assert reg.strength_scale is shared
    assert shared.is_cuda
    assert torch.equal(shared.cpu(), torch.tensor(0.3))


def test_a_model_built_without_values_has_a_strength_scale():
    with torch.device("meta"):
        task = Task()
    task.to_empty(device="cpu")
    assert task.whole.strength_scale.item() == 1


@pytest.mark.parametrize(
    ("scale", "error"),
    [(torch.tensor(-1.0), ValueError), (torch.tensor(math.nan), ValueError), (torch.ones(2), ValueError)],
    ids=str,
)
@pytest.mark.parametrize("assigned", [False, True])
def test_a_state_without_a_strength_scale_is_refused(scale, error, assigned):
    reg = Regularizer(linear(), L1(0.1))
    with pytest.raises(error, match=r"^Expected `strength_scale` to be"):
        reg.load_state_dict({"strength_scale": scale}, assign=assigned)
    assert reg.strength_scale.item() == 1


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()
        self.whole = Regularizer(self, L1(0.1))
        self.part = Regularizer(self.net, {"weight": L2(0.1)})


def test_a_regularizer_is_a_good_submodule_of_the_model_it_penalises():
    task = Task()
    assert set(task.state_dict()) == {"net.weight", "net.bias", "whole.strength_scale", "part.strength_scale"}
    assert len(list(task.parameters())) == 2
    task.whole.strength_scale = 0.5
    for again in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert again.whole.model is again
        ((name, weight, penalty),) = again.whole.penalized()
        assert (name, penalty) == ("net.weight", L1(0.1))
        assert weight is again.net.weight is not task.net.weight
        assert again.whole().item() == task.whole().item()
        assert [p is q for p, q in zip(again.part.model.parameters(), again.net.parameters(), strict=True)] == [
            True
        ] * 2
    alone = copy.deepcopy(task.part)
    assert alone.assignments[0].parameter is alone.model.weight is not task.net.weight
    assert repr(task.whole) in repr(task)


def test_moving_the_model_to_another_dtype_keeps_its_penalties():
    model = nn.Sequential(linear(), linear())
    reg = Regularizer(model, L1(torch.full((5,), 0.1)))
    model.to(torch.bfloat16)
    assert reg().dtype == torch.float32
    reg().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


# Param groups


def test_param_groups_hold_every_parameter_once_with_its_penalty():
    model = nn.Sequential(linear(), linear(), linear())
    reg = Regularizer(model, {"2.weight": L2(0.2), "0.weight": L1(0.1), "1.weight": L1(0.1), "2.bias": None})
    groups = reg.param_groups()
    assert [group["penalty"] for group in groups] == [L2(0.2), L1(0.1), L1(0.1), None]
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == 6
    assert groups[0]["params"][0] is model[2].weight


def test_param_groups_follow_loaded_penalties():
    model = nn.Sequential(linear(), linear())
    one, two = Regularizer(model, L1(0.1)), Regularizer(model, {"0.weight": L1(0.5), "1.weight": L2(0.7)})
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    with one.attach(sgd) as handle, two.attach(sgd) as other:
        handle.load_state_dict(other.state_dict())
    groups = one.param_groups()
    assert [(group["penalty"], len(group["params"])) for group in groups] == [(L1(0.5), 1), (L2(0.7), 1), (None, 2)]


def test_a_torch_optimizer_of_param_groups_penalises_once_attached():
    model = linear()
    reg = Regularizer(model, L2(0.5))
    optimizer = sgd()(reg.param_groups())
    model.weight.grad = torch.zeros_like(model.weight)
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    reg.attach(optimizer)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - LR))


# The hook: the right gradient


def sgd(**options):
    return lambda params: torch.optim.SGD(params, lr=LR, **options)


def plain(model, optimizer, reg):
    data_loss(model).backward()
    optimizer.step()


def accumulated(model, optimizer, reg):
    for _ in range(4):
        (data_loss(model) / 4).backward()
    optimizer.step()


def clipped(model, optimizer, reg):
    data_loss(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()


def scaled(model, optimizer, reg):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(data_loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_unscaled(model, optimizer, reg):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        scaler.scale(data_loss(model) / 4).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()


def grad_scale_set(model, optimizer, reg):
    (1024 * data_loss(model)).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1024.0]), torch.zeros(1)
    optimizer.step()


def with_closure(model, optimizer, reg):
    def closure():
        optimizer.zero_grad()
        loss = data_loss(model)
        loss.backward()
        return loss

    expected = (data_loss(model) + reg()).item()
    assert optimizer.step(closure).item() == pytest.approx(expected, rel=1e-12)


LOOPS = [plain, accumulated, clipped, scaled, scaled_and_unscaled, with_closure]
OPTIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
LOOPS_AND_OPTIONS = [(loop, options) for loop in LOOPS for options in OPTIONS] + [(grad_scale_set, {"fused": True})]


@pytest.mark.parametrize(("loop", "options"), LOOPS_AND_OPTIONS, ids=lambda x: getattr(x, "__name__", str(x)))
@every_penalty_with_a_gradient
def test_the_hook_has_the_same_strength_in_every_training_loop(case, loop, options):
    model = linear()
    g_weight, g_bias = data_grads(model)
    expected = [model.weight - LR * (g_weight + case.penalty(0.3).grad(model.weight)), model.bias - LR * g_bias]
    reg = Regularizer(model, case.penalty(0.3))
    optimizer = sgd(**options)(model.parameters())
    reg.attach(optimizer)
    loop(model, optimizer, reg)
    torch.testing.assert_close(list(model.parameters()), [e.detach() for e in expected])


def test_clipping_clips_the_datas_gradient_alone():
    model = linear()
    grads = data_grads(model)
    shrunk = 0.01 * grads[0] / torch.cat([g.flatten() for g in grads]).norm()
    expected = model.weight - LR * (shrunk + 0.5 * model.weight.sign())
    optimizer = sgd()(model.parameters())
    Regularizer(model, L1(0.5)).attach(optimizer)
    data_loss(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    torch.testing.assert_close(model.weight, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True, "momentum": 0.9, "nesterov": True}, {"fused": True}], ids=str
)
def test_the_hook_leaves_the_gradient_the_same_tensor_and_value(options):
    model = linear()
    optimizer = sgd(**options)(model.parameters())
    Regularizer(model, L1(0.5)).attach(optimizer)
    data_loss(model).backward()
    grads, values = [p.grad for p in model.parameters()], [p.grad.clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(model.weight.grad, values[0])


@pytest.mark.parametrize("slope", [0.3, math.inf], ids=["step", "skipped"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"foreach": True}, torch.float32)] + [({"fused": True}, dtype) for dtype in (torch.float16, torch.float32, F64)],
    ids=str,
)
def test_the_gradient_after_a_scaled_step_is_the_one_without_the_hook(options, dtype, unscaled, slope):
    if unscaled and dtype == torch.float16:
        pytest.skip("torch refuses to unscale float16")
    seen = []
    for hooks in range(3):
        model = nn.ParameterDict({name: torch.ones(size, dtype=dtype) for name, size in (("a", (3, 2)), ("b", ()))})
        optimizer = torch.optim.Adam(model.parameters(), lr=LR, **options)
        for _ in range(hooks):
            Regularizer(model, {"*": L1(0.5)}).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scaler.scale(sum(slope * p.sum().float() for p in model.values())).backward()
        grads = [p.grad for p in model.values()]
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert all(p.grad is g for p, g in zip(model.values(), grads, strict=True))
        seen.append(torch.cat([g.flatten() for g in grads]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_kkt_residual_after_a_fused_scaled_step_is_that_of_the_data():
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    reg = Regularizer(model, L1(0.1))
    reg.attach(optimizer)
    g_weight, g_bias = data_grads(model)
    scaled(model, optimizer, reg)
    expected = torch.maximum(L1(0.1).optimality_residual(model.weight, g_weight).max(), g_bias.abs().max())
    torch.testing.assert_close(kkt_residual(reg), expected.detach())


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_with_found_inf_changes_no_weight(options):
    model = linear()
    optimizer = sgd(momentum=0.9, **options)(model.parameters())
    Regularizer(model, L1(0.5)).attach(optimizer)
    plain(model, optimizer, None)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(data_loss(model) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("closure", [False, True])
def test_maximising_still_shrinks(options, closure):
    model = linear()
    before = model.weight.detach().clone()
    reg = Regularizer(model, L2(0.5))
    optimizer = sgd(maximize=True, **options)(model.parameters())
    reg.attach(optimizer)

    def gain():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return torch.tensor(7.0)

    expected = 7.0 - reg().item()
    value = optimizer.step(gain) if closure else (gain(), optimizer.step())[1]
    assert value is None or value.item() == pytest.approx(expected)
    torch.testing.assert_close(model.weight.data, before * (1 - LR))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_added_in_float32_and_rounded_once(dtype):
    model = linear(dtype=dtype)
    seen = []
    reg = Regularizer(model, L2(0.317))
    optimizer = sgd()(model.parameters())
    reg.attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad))
    model.weight.grad = torch.randn_like(model.weight)
    expected = (model.weight.grad.float() + L2(0.317).grad(model.weight.detach().float())).to(dtype)
    optimizer.step()
    assert torch.equal(seen[0], expected)


def test_frozen_weights_and_those_without_gradient_are_skipped_until_they_are_not():
    model = nn.Sequential(linear(), linear())
    frozen, idle = model[0].weight.requires_grad_(False), model[1].weight
    optimizer = sgd()(model.parameters())
    Regularizer(model, L1(0.5)).attach(optimizer)
    frozen.grad = torch.zeros_like(frozen)
    before = [frozen.clone(), idle.detach().clone()]
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(idle, before[1])
    frozen.requires_grad_(True)
    idle.grad = torch.zeros_like(idle)
    optimizer.step()
    for w, old in zip((frozen, idle), before, strict=True):
        torch.testing.assert_close(w.detach(), old - LR * 0.5 * old.sign())


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize(
    "options", [{}, {"foreach": True, "momentum": 0.9, "nesterov": True}, {"fused": True}], ids=str
)
def test_gradients_that_another_hook_zeroes_stay_zero(options, when):
    model = linear()
    optimizer = sgd(**options)(model.parameters())
    attaching = [
        lambda: Regularizer(model, L1(0.5)).attach(optimizer),
        lambda: Regularizer(model, L2(0.3)).attach(optimizer),
    ]
    attaching.insert(
        ["before", "between", "after"].index(when),
        lambda: optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none=False)),
    )
    for attach in attaching:
        attach()
    data_loss(model).backward()
    grad = model.weight.grad
    optimizer.step()
    assert model.weight.grad is grad
    assert grad.count_nonzero() == 0


# The hook: optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
    ],
    ids=["Adam", "Adam-fused", "AdamW-foreach", "RMSprop", "Adagrad", "NAdam"],
)
def test_the_hook_equals_the_loss_term_in_any_optimizer(make):
    models = linear(), linear()
    regs = [Regularizer(model, ElasticNet(0.1, 0.2)) for model in models]
    optimizers = [make(model.parameters()) for model in models]
    regs[0].attach(optimizers[0])
    for step in range(5):
        for model, optimizer, term in zip(models, optimizers, (0, regs[1]), strict=True):
            optimizer.zero_grad()
            (data_loss(model, step) + (term and term())).backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_weight_decay_by_the_hook_is_torchs():
    models = linear(), linear()
    hooked = sgd(momentum=0.9)(models[0].parameters())
    decayed = sgd(momentum=0.9)([{"params": [models[1].weight], "weight_decay": 0.2}, {"params": [models[1].bias]}])
    Regularizer(models[0], L2(0.1)).attach(hooked)
    for _ in range(5):
        for model, optimizer in zip(models, (hooked, decayed), strict=True):
            optimizer.zero_grad()
            plain(model, optimizer, None)
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.parametrize("route", ["hook", "loss term"])
def test_lbfgs_with_line_search_reaches_the_penalised_optimum(route):
    torch.manual_seed(0)
    x, y = torch.randn(40, 6, dtype=F64), torch.randn(40, 1, dtype=F64)
    model = nn.Linear(6, 1, bias=False, dtype=F64)
    reg = Regularizer(model, L2(0.7))
    optimizer = torch.optim.LBFGS(
        model.parameters(), line_search_fn="strong_wolfe", max_iter=100, tolerance_grad=1e-12, tolerance_change=0
    )
    if route == "hook":
        reg.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() + (reg() if route == "loss term" else 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    ridge = torch.linalg.solve(x.T @ x + 1.4 * torch.eye(6, dtype=F64), x.T @ y)
    torch.testing.assert_close(model.weight.detach().T, ridge, rtol=1e-8, atol=1e-10)
    if route == "hook":
        torch.testing.assert_close(model.weight.grad, -1.4 * model.weight.detach(), rtol=1e-6, atol=1e-8)


def test_sgd_with_a_closure_reaches_the_penalised_optimum():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6, dtype=F64), torch.randn(40, 1, dtype=F64)
    model = nn.Linear(6, 1, bias=False, dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    Regularizer(model, L2(0.7)).attach(optimizer)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = 0.5 * (model(x) - y).square().sum()
        loss.backward()
        return loss

    for _ in range(300):
        optimizer.step(closure=closure)
    ridge = torch.linalg.solve(x.T @ x + 1.4 * torch.eye(6, dtype=F64), x.T @ y)
    torch.testing.assert_close(model.weight.detach().T, ridge, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("returned", [None, 2.5])
def test_a_closure_may_return_a_number_or_nothing(returned):
    model = linear()
    reg = Regularizer(model, L1(0.5))
    optimizer = sgd()(model.parameters())
    reg.attach(optimizer)
    model.weight.grad = torch.zeros_like(model.weight)
    expected = None if returned is None else pytest.approx(returned + reg().item())
    assert optimizer.step(lambda: returned) == expected


# The hook: failures


def test_a_closure_that_raises_leaves_the_datas_gradient():
    model = linear()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    Regularizer(model, L1(0.5)).attach(optimizer)
    calls = []

    def closure():
        if len(calls) == 2:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = data_loss(model)
        loss.backward()
        calls.append(model.weight.grad)
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert model.weight.grad is calls[-1]


class Failing(torch.optim.SGD):
    fail = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("no step today")
        return super().step(closure)


@pytest.mark.parametrize("how", ["next step", "remove"])
def test_after_a_step_that_raises_the_gradient_is_put_back(how):
    model = linear()
    optimizer = Failing(model.parameters(), lr=LR)
    handle = Regularizer(model, L1(0.5)).attach(optimizer)
    data_loss(model).backward()
    grad, value, before = model.weight.grad, model.weight.grad.clone(), model.weight.detach().clone()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no step today"):
            optimizer.step()
    if how == "remove":
        handle.remove()
    else:
        optimizer.fail = False
        optimizer.step()
        torch.testing.assert_close(model.weight.data, before - LR * (value + 0.5 * before.sign()))
    assert model.weight.grad is grad
    assert torch.equal(grad, value)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_after_a_step_that_raises_new_gradients_are_not_lost(set_to_none):
    model = linear()
    optimizer = Failing(model.parameters(), lr=LR)
    Regularizer(model, L1(0.5)).attach(optimizer)
    data_loss(model, seed=1).backward()
    with pytest.raises(RuntimeError, match="no step today"):
        optimizer.step()
    optimizer.fail = False
    expected = model.weight - LR * (data_grads(model)[0] + 0.5 * model.weight.sign())
    optimizer.zero_grad(set_to_none=set_to_none)
    plain(model, optimizer, None)
    torch.testing.assert_close(model.weight, expected)


def test_a_sparse_gradient_is_refused_with_every_gradient_as_it_was():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "embed": nn.Embedding(5, 2, sparse=True)})
    optimizer = torch.optim.SGD(
        [{"params": model["head"].parameters()}, {"params": model["embed"].parameters()}], lr=LR
    )
    first = Regularizer(model, {"head.weight": L2(0.1)}).attach(optimizer)
    Regularizer(model, {"*.weight": L1(0.1)}).attach(optimizer)
    model["head"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"Parameter 'embed.weight' has a sparse gradient; penalties need dense ones"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first.remove()


def test_unpenalised_sparse_gradients_are_nobodys_business():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2))
    optimizer = sgd()(model.parameters())
    Regularizer(model, L1(0.1)).attach(optimizer)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


# The handle


def test_two_regularizers_on_one_optimizer_add_up_and_leave_nothing():
    model = linear()
    optimizer = sgd()(model.parameters())
    expected = model.weight.detach() - LR * (0.5 * model.weight.sign() + 2 * 0.3 * model.weight).detach()
    handles = [Regularizer(model, penalty).attach(optimizer) for penalty in (L1(0.5), L2(0.3))]
    model.weight.grad = grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(model.weight.data, expected)
    assert model.weight.grad is grad
    closure_loss = optimizer.step(lambda: torch.tensor(0.0, dtype=F64))
    assert closure_loss.item() == pytest.approx(
        L1(0.5).value(expected).item() + L2(0.3).value(expected).item(), rel=1e-9
    )
    assert model.weight.grad is grad
    handles[0].remove()
    optimizer.step()
    assert model.weight.grad is grad
    assert grad.count_nonzero() == 0


def test_a_removed_handle_does_nothing_and_may_be_attached_again():
    model = linear()
    optimizer = sgd()(model.parameters())
    reg = Regularizer(model, L1(0.5))
    with reg.attach(optimizer):
        pass
    handle = reg.attach(optimizer)
    handle.remove()
    handle.remove()
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight.data, before)
    reg.attach(optimizer)
    optimizer.step()
    assert not torch.equal(model.weight.data, before)


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_are_unwrapped():
    model = linear()
    optimizer = sgd()(model.parameters())
    reg = Regularizer(model, L1(0.5))
    reg.attach(Wrapper(Wrapper(optimizer)))
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        reg.attach(optimizer)


def test_what_cannot_be_attached_to_is_refused():
    model = linear()
    reg = Regularizer(model, L1(0.5))
    optimizer = sgd()(model.parameters())
    reg.attach(optimizer)
    with pytest.raises(ValueError, match=r"attached to this optimizer already; remove\(\) the first handle first"):
        reg.attach(optimizer)
    with pytest.raises(ValueError, match=r"ProxSGD applies penalties itself: build it from reg\.param_groups"):
        reg.attach(ProxSGD(model.parameters(), lr=LR))
    for params in (linear().parameters(), [model.bias]):
        with pytest.raises(ValueError, match="holds none of the regularizer's penalised parameters"):
            reg.attach(sgd()(params))
    for thing in (model, None, Wrapper(None), torch.optim.SGD):
        with pytest.raises(TypeError, match=r"Expected `optimizer` to be a torch.optim.Optimizer, got"):
            reg.attach(thing)


def test_the_state_of_a_handle_survives_a_file_and_is_taken_over():
    model = nn.Sequential(linear(), linear())
    saved = Regularizer(model, {"0.weight": L1(torch.rand(5)), "1.weight": ElasticNet(0.1, torch.tensor(0.2))})
    saved.strength_scale = 0.25
    state = through_file(saved.attach(sgd()(model.parameters())).state_dict())
    reg = Regularizer(model, {"*.weight": L2(0.7)})
    shared = reg.strength_scale
    handle = reg.attach(sgd()(model.parameters()))
    handle.load_state_dict(state)
    assert [p for *_, p in reg.penalized()] == [p for *_, p in saved.penalized()]
    assert reg.strength_scale is shared
    assert shared.item() == 0.25
    assert handle.state_dict()["penalties"].keys() == {"0.weight", "1.weight"}
    handle.state_dict()["strength_scale"].fill_(9.0)
    assert shared.item() == 0.25


GOOD = {"strength_scale": torch.tensor(0.5), "penalties": {"weight": L2(0.3).to_dict()}}


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({}, ValueError, "Expected the state of a PenaltyHandle, with the keys"),
        ([], ValueError, "Expected the state of a PenaltyHandle"),
        ({**GOOD, "penalties": []}, TypeError, "Expected the saved penalties to be a dict by parameter, got list"),
        (
            {**GOOD, "penalties": {"bias": L2(0.3).to_dict()}},
            ValueError,
            "for other parameters: ['bias', 'weight'] are",
        ),
        ({**GOOD, "penalties": {"weight": {"type": "L9"}}}, ValueError, "Expected the penalty type to be one of"),
        ({**GOOD, "penalties": {"weight": None}}, TypeError, "Expected a penalty's dict form"),
        (
            {**GOOD, "penalties": {"weight": L1(torch.ones(9)).to_dict()}},
            ValueError,
            "Parameter 'weight': Expected `str",
        ),
        ({**GOOD, "strength_scale": torch.tensor(-1.0)}, ValueError, "Expected `strength_scale` to be a non-negative"),
        ({**GOOD, "strength_scale": torch.ones(2)}, ValueError, "`strength_scale` to be one number"),
        ({**GOOD, "strength_scale": "1"}, TypeError, "Expected `strength_scale` to be a non-negative float"),
    ],
    ids=["empty", "list", "penalties", "names", "type", "none", "shape", "negative", "vector", "text"],
)
def test_a_wrong_checkpoint_is_refused_with_nothing_changed(state, error, said):
    model = linear()
    reg = Regularizer(model, L1(0.5))
    handle = reg.attach(sgd()(model.parameters()))
    with pytest.raises(error, match=re.escape(said)):
        handle.load_state_dict(state)
    assert [p for *_, p in reg.penalized()] == [L1(0.5)]
    assert reg.strength_scale.item() == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_has_lost_the_hook_and_takes_it_again(copied):
    model = linear()
    optimizer = sgd()(model.parameters())
    reg = Regularizer(model, L1(0.5))
    reg.attach(optimizer)
    (again, model_again), reg_again = copied((optimizer, model)), None
    model_again.weight.grad = torch.zeros_like(model_again.weight)
    before = model_again.weight.detach().clone()
    again.step()
    assert torch.equal(model_again.weight.data, before)
    reg_again = Regularizer(model_again, L1(0.5))
    reg_again.attach(again)
    again.step()
    torch.testing.assert_close(model_again.weight.data, before - LR * 0.5 * before.sign())


def test_a_hook_keeps_nothing_alive():
    model = linear()
    model.optimizer = sgd()(model.parameters())  # the optimizer is part of what the regularizer refers to
    Regularizer(model, L1(0.5)).attach(model.optimizer)
    model.weight.grad = torch.zeros_like(model.weight)
    before = model.weight.detach().clone()
    gc.collect()
    model.optimizer.step()  # although nobody holds the handle
    assert not torch.equal(model.weight.data, before)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
