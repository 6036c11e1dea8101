"""What one step of a proximal optimizer does and leaves alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import math

import pytest
import torch
from optimizer_cases import (
    FORMS,
    OPTIMIZERS,
    forms,
    forms_and_dtypes,
    identical,
    optimizers,
    optimizers_and_hyperparameters,
    parameters,
    penalties,
    set_gradients,
    snapshot,
)
from torch import nn

import torchreg
from torchreg import (
    L1,
    L2,
    MCP,
    ElasticNet,
    GroupLasso,
    NonNegative,
    ProxAdamW,
    Proximal,
    ProxSGD,
    Regularizer,
    SparseGroupLasso,
    TopK,
    kernels,
)
from torchreg.penalties import base as penalties_base

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def scalar(value: float, grad: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.tensor([value], dtype=dtype))
    p.grad = torch.tensor([grad], dtype=dtype)
    return p


# What a step computes


@pytest.mark.pairs
@optimizers_and_hyperparameters
@penalties
@forms_and_dtypes(DTYPES)
def test_implementations_agree_with_the_reference(case, hyper, penalty, dtype, form):
    reference, other = parameters(dtype), parameters(dtype)
    a = case(reference, penalty=penalty, foreach=False, **hyper)
    b = case(other, penalty=penalty, **form, **hyper)
    for step in range(4):
        for params in (reference, other):
            set_gradients(params, step)
            if step == 2:  # divergence must not be hidden
                params[0].grad[0, 0], params[0].grad[1, 1], params[3].grad[0, 0] = math.nan, math.inf, -math.inf
        a.step()
        b.step()
    for expected, got in zip(reference, other, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert torch.isnan(torch.view_as_real(other[0].data)[0, 0] if dtype.is_complex else other[0][0, 0]).any()


@pytest.mark.parametrize(
    "penalty", [None, L1(0.3), L2(0.4), ElasticNet(0.3, 0.4), L1(torch.tensor([0.1, 0.5, 0.9]))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
def test_multi_tensor_operations_agree_with_the_reference(penalty, dtype):
    """The ones for accelerators, which the step does not choose on the CPU."""
    results = []
    for update in (kernels.reference.prox_sgd, kernels.foreach._update):
        params = parameters(dtype)
        params[0].grad[0, 0], params[0].grad[1, 1] = math.nan, math.inf
        tensors = kernels.SGDTensors(
            params, [p.grad for p in params], [torch.ones_like(p) for p in params], [False] * 6
        )
        step = kernels.SGDStep(0.1, 0.9, 0.5, 0.1, False, True, penalty, 0.5, False)
        with torch.no_grad():
            update(tensors, step)
        results.append(snapshot(params) + tensors.momentum_buffers)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
        if not dtype.is_complex:
            assert not torch.signbit(got[got == 0]).any()


@pytest.mark.pairs
@forms
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=["plain", "all"])
@pytest.mark.parametrize("penalty", [L1(0.01), ElasticNet(0.01, 0.02)], ids=["L1", "ElasticNet"])
@pytest.mark.parametrize("shape", [(torchreg.penalties.tiles.TILE + 1000,), (3, 100_000), (4, 8, 100, 100)], ids=str)
def test_large_tensors_agree_with_torch_sgd_and_a_prox(form, hyper, penalty, shape):
    assert_large_agree(form, hyper, penalty, shape, rtol=1e-14)  # fused multiply-add may differ by an ulp


@pytest.mark.pairs
@forms
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=["plain", "all"])
@pytest.mark.parametrize("penalty", [GroupLasso, functools.partial(SparseGroupLasso, 0.01, l2=0.1)], ids=["one", "two"])
@pytest.mark.parametrize("shape", [(700, 500), (2, 150_000), (1, 300_000)], ids=str)
def test_large_tensors_with_groups_agree_with_torch_sgd_and_a_prox(form, hyper, penalty, shape):
    assert_large_agree(form, hyper, penalty(10 / shape[1] ** 0.5, groups="columns"), shape, rtol=1e-10)


def assert_large_agree(form, hyper, penalty, shape, rtol):
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64)
    if len(shape) > 1:
        start = start.transpose(0, 1)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = ProxSGD([ours], lr=0.1, penalty=penalty, **form, **hyper)
    b = torch.optim.SGD([theirs], lr=0.1, **hyper)
    for _ in range(2):
        grad = torch.randn(theirs.shape, dtype=torch.float64)
        ours.grad, theirs.grad = (grad if form.get("foreach") else torch.empty_like(start).copy_(grad)), grad.clone()
        a.step()
        b.step()
        theirs.data = penalty.prox(theirs.data, ProxSGD.effective_step(a.param_groups[0]))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)
    assert torch.equal(ours == 0, theirs == 0)


@forms_and_dtypes(DTYPES[:4])
@pytest.mark.parametrize("penalty", [L1(0.1), ElasticNet(0.1, 0.2)], ids=["L1", "ElasticNet"])
def test_a_shrunk_away_weight_is_plus_zero(form, dtype, penalty):
    p = nn.Parameter(torch.tensor([-0.01, 0.01, -0.0, 0.0], dtype=dtype))
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=1.0, penalty=penalty, **form).step()
    assert torch.equal(p, torch.zeros_like(p))
    assert not torch.signbit(p).any()


@forms_and_dtypes(DTYPES[:4])
@pytest.mark.parametrize("penalty", [L1(0.1), L2(0.1), ElasticNet(0.1, 0.1)], ids=str)
def test_nan_and_infinite_weights_stay(form, penalty, dtype):
    p = nn.Parameter(torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype))
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=1.0, penalty=penalty, **form).step()
    assert p[:3].tolist() == pytest.approx([math.nan, math.inf, -math.inf], nan_ok=True)
    assert 0 < p[3] < 1


@optimizers
@forms
def test_maximize_flips_only_the_gradient_of_the_data(case, form):
    ascending, descending = parameters(), parameters()
    for p in ascending:
        p.grad.neg_()
    case(ascending, penalty=ElasticNet(0.3, 0.1), **form, maximize=True).step()
    case(descending, penalty=ElasticNet(0.3, 0.1), **form).step()
    assert identical(snapshot(ascending), snapshot(descending))


@optimizers_and_hyperparameters
@forms_and_dtypes(DTYPES)
def test_learning_rate_zero_is_the_identity(case, hyper, form, dtype):
    params = parameters(dtype)
    before = snapshot(params)
    for lr in (0.0, torch.tensor(0.0))[: 1 if form.get("foreach") and not case.tensor_lr_foreach else 2]:
        opt = case(params, lr=lr, penalty=ElasticNet(0.3, 0.2), **form, **hyper)
        opt.step()
        opt.step()
        assert identical(snapshot(params), before)


@pytest.mark.pairs
@optimizers_and_hyperparameters
@forms_and_dtypes(DTYPES)
@pytest.mark.parametrize("penalty", [None, ElasticNet(0.3, 0.2)], ids=str)
def test_gradients_are_never_modified(case, hyper, form, penalty, dtype):
    params = parameters(dtype)
    grads = [p.grad for p in params]
    before = [g.clone() for g in grads]
    opt = case(params, penalty=penalty, **form, **hyper)
    for _ in range(2):
        opt.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert identical(grads, before)


@optimizers
@forms
def test_what_has_no_gradient_or_is_frozen_is_left_alone(case, form):
    params = parameters()
    params[0].grad = None
    params[1].grad = None
    params[1].requires_grad_(False)
    before = snapshot(params)
    opt = case(params, penalty=L1(0.3), **case.usual, **form)
    opt.step()
    assert identical(snapshot(params)[:2], before[:2])
    assert params[0] not in opt.state
    assert not torch.equal(params[3], before[3])


@optimizers
@forms
def test_a_parameter_unfrozen_late_has_its_own_first_step(case, form):
    hyper = {**case.usual, "penalty": L1(0.3), **form}
    late, early = parameters(), parameters()
    opt = case(late, **hyper)
    for p in late[:1]:
        p.grad = None
    opt.step()
    opt.step()
    set_gradients(late[:1], 0)
    opt.step()
    case(early, **hyper).step()
    assert identical(snapshot(late[:1]), snapshot(early[:1]))


@forms
def test_the_threshold_counts_the_gain_of_momentum(form):
    for hyper, gain in (
        ({}, 1),
        ({"momentum": 0.9}, 10),
        ({"momentum": 0.9, "dampening": 0.5}, 5),
        ({"momentum": 0.9, "nesterov": True}, 10),
    ):
        p = scalar(1.0, dtype=torch.float64)
        opt = ProxSGD([p], lr=0.1, penalty=L1(0.3), **form, **hyper)
        opt.step()
        assert p.item() == pytest.approx(1 - 0.1 * gain * 0.3, rel=1e-12)
        assert ProxSGD.effective_step(opt.param_groups[0]) == pytest.approx(0.1 * gain)


# Hyperparameters as tensors, moved between steps


@optimizers
@forms
def test_the_strength_scale_multiplies_the_strength_of_the_next_step(case, form):
    scale = torch.tensor(1.0)
    shared, own = parameters(), parameters()
    a = case(shared, penalty=ElasticNet(0.3, 0.1), strength_scale=scale, **form)
    b = case(own, penalty=ElasticNet(0.3, 0.1), **form)
    for value in (1.0, 0.5, 0.0, 2.0):
        scale.fill_(value)
        b.param_groups[0]["penalty"] = ElasticNet(0.3 * value, 0.1 * value)
        a.step()
        b.step()
        for x, y in zip(shared, own, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, -0.1])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_bad_strength_scales_are_refused_when_given_and_when_moved(scale, kind):
    with pytest.raises(ValueError, match="strength_scale"):
        ProxSGD([scalar(1.0)], penalty=L1(0.1), strength_scale=kind(scale))
    p = scalar(1.0, 1.0)
    opt = ProxSGD([{"params": [scalar(1.0, 1.0)]}, {"params": [p]}], lr=0.1, momentum=0.9, penalty=L1(0.1))
    opt.param_groups[1]["strength_scale"] = kind(scale)
    with pytest.raises(ValueError, match="strength_scale"):
        opt.step()
    assert all(q.item() == 1.0 and not opt.state for group in opt.param_groups for q in group["params"])


@optimizers
@pytest.mark.parametrize("scale", ["1", None, True, torch.ones(2), torch.tensor(1)], ids=str)
def test_what_is_no_strength_scale_is_refused(case, scale):
    with pytest.raises((TypeError, ValueError), match="strength_scale"):
        case([scalar(1.0)], penalty=L1(0.1), strength_scale=scale)
    refused_when_moved(case, "strength_scale", scale)


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", (1.0, 0.9)), ("betas", (0.9,)), ("betas", 0.9), ("metric", "identiy"), ("lr", "0.1"), ("lr", -0.1)],
    ids=str,
)
def test_adams_hyperparameters_are_checked_again_when_moved(key, value):
    refused_when_moved(OPTIMIZERS["ProxAdamW"], key, value)


def refused_when_moved(case, key, value):
    p, q = scalar(1.0, 1.0), scalar(1.0, 1.0)
    opt = case([p], penalty=L1(0.1))
    opt.add_param_group({"params": [q]})
    opt.param_groups[1][key] = value
    with pytest.raises((TypeError, ValueError), match="beta" if key == "betas" else key):
        opt.step()
    assert p.item() == q.item() == 1.0
    assert not opt.state


@pytest.mark.pairs
@optimizers_and_hyperparameters
@forms
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("penalty", [None, ElasticNet(0.3, 0.1)], ids=str)
def test_tensor_learning_rates_and_capturable_give_equal_results(case, hyper, form, shape, penalty):
    results = []
    kinds = [(0.125, False), (torch.full(shape, 0.125), False), (torch.full(shape, 0.125), True)]
    if form.get("foreach") and not case.tensor_lr_foreach:
        del kinds[1]
    if not case.capturable_on_cpu and not form.get("fused"):
        kinds.pop()
    for lr, capturable in kinds:
        params = parameters(torch.float64)
        opt = case(params, lr=lr, capturable=capturable, penalty=penalty, **form, **hyper)
        for step in range(3):
            set_gradients(params, step)
            opt.step()
        results.append(snapshot(params))
    if kinds[-1][1] is False:
        assert all(identical(results[0], other) for other in results[1:])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "hyper", OPTIMIZERS["ProxSGD"].hyperparameters.values(), ids=OPTIMIZERS["ProxSGD"].hyperparameters
)
@pytest.mark.parametrize("penalty", [None, L1(0.3), L2(0.4), ElasticNet(0.3, 0.4)], ids=str)
def test_a_differentiable_step_has_the_right_derivatives(hyper, penalty):
    """With respect to the weight, the gradient, the momentum buffer, the learning rate and the weight decay."""

    def step(w, grad, buffer, lr, weight_decay):
        w = w.clone()
        w.grad = grad
        kwargs = {**hyper, "lr": lr, "weight_decay": weight_decay}
        opt = ProxSGD([w], penalty=penalty, differentiable=True, **kwargs)
        if opt.defaults["momentum"]:
            opt.state[w]["momentum_buffer"] = buffer.clone()
        opt.step()
        return w, *[entry for entry in opt.state[w].values() if entry.requires_grad]

    torch.manual_seed(0)
    given = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    given += [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.05)]
    assert torch.autograd.gradcheck(step, given)


def test_a_strength_scale_can_be_learned_through_a_differentiable_step():
    def step(scale):
        w = torch.tensor([1.0, -2.0, 0.01], dtype=torch.float64, requires_grad=True).clone()
        w.grad = torch.ones_like(w)
        ProxSGD([w], lr=0.1, penalty=ElasticNet(0.3, 0.4), strength_scale=scale, differentiable=True).step()
        return w

    assert torch.autograd.gradcheck(step, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))


# Between the descent and the proximal operator


@pytest.mark.pairs
@optimizers_and_hyperparameters
@forms_and_dtypes([torch.float64, torch.bfloat16])
@pytest.mark.parametrize("penalty", [L1(0.3), ElasticNet(0.3, torch.tensor([0.2, 0.0, 0.4]))], ids=str)
def test_a_hook_sees_the_moved_weights_and_their_steps(case, hyper, form, dtype, penalty):
    hooked, plain = parameters(dtype), parameters(dtype)
    kwargs = {"stochastic_rounding": False, "strength_scale": 0.5, **form, **hyper}
    a, b = case(hooked, penalty=penalty, **kwargs), case(plain, penalty=penalty, **kwargs)
    seen = []
    handle = a.register_prox_pre_hook(lambda _, points: seen.extend(points))
    for step in range(2):
        for params in (hooked, plain):
            set_gradients(params, step)
        moved = snapshot(plain)
        case_without = case(plain, **{**kwargs, "penalty": None})
        case_without.load_state_dict(copied_state(b))
        case_without.param_groups[0]["penalty"] = None
        case_without.step()
        moved, start = snapshot(plain), moved
        for p, w in zip(plain, start, strict=True):
            p.data.copy_(w)
        a.step()
        (point,) = seen
        assert point.group is a.param_groups[0]
        assert [id(p) for p in point.params] == [id(p) for p in hooked]
        tolerance = {} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.05}  # it is rounded twice
        for p, w, tau in zip(hooked, moved, point.steps, strict=True):
            torch.testing.assert_close(p, penalty.prox(w.double(), tau * 0.5).to(dtype), **tolerance)
        b.step()
        torch.testing.assert_close(hooked, plain, **tolerance)
        seen.clear()
    handle.remove()
    a.step()
    assert not seen


def copied_state(opt):
    return copy.deepcopy(opt.state_dict())


@optimizers
@forms
def test_a_hook_may_choose_the_strength_of_this_step(case, form):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a = case(ours, penalty=L1(0.3), strength_scale=torch.tensor(7.0), **form, **case.usual)
    b = case(theirs, penalty=L1(0.3), strength_scale=2.0, **form, **case.usual)
    a.register_prox_pre_hook(lambda opt, points: points[0].group["strength_scale"].fill_(2.0))
    a.step()
    b.step()
    torch.testing.assert_close(ours, theirs)
    assert a.step_counts() is None  # counted before the weights were shrunk


@optimizers
@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "fused"], ids=str)
def test_a_joint_penalty_is_given_all_weights_of_its_group(case, form):
    opt = case(
        [{"params": parameters(torch.float64), "penalty": TopK(10, scope="rule")}, {"params": parameters()}],
        **form,
        **case.usual,
    )
    for step in range(3):
        for group in opt.param_groups:
            set_gradients(group["params"], step)
        opt.step()
        assert sum(int((p != 0).sum()) for p in opt.param_groups[0]["params"]) == 10
        assert all((p != 0).all() for p in opt.param_groups[1]["params"])


@optimizers
def test_a_penalty_that_refuses_the_step_or_the_weight_does_so_before_anything_changes(case):
    opt = case([{"params": [scalar(1.0, 1.0)]}, {"params": [scalar(1.0, 1.0)], "penalty": MCP(0.1, 1.5)}], **case.flat)
    with torch.no_grad():
        opt.param_groups[1]["lr"] = 2.0
    with unchanged(opt), pytest.raises(ValueError, match=r"MCP.*1\.5"):
        opt.step()
    weight = scalar(1.0, 1.0, torch.complex64)
    opt = case([{"params": [scalar(1.0, 1.0)]}, {"params": [weight]}], **case.flat)
    with unchanged(opt), pytest.raises(TypeError, match=r"complex"):
        opt.add_param_group({"params": [scalar(1.0, 1.0, torch.complex64)], "penalty": NonNegative()})
    opt.param_groups[1]["penalty"] = NonNegative()
    with unchanged(opt), pytest.raises(TypeError, match=r"complex"):
        opt.step()


# Loss scaling


@optimizers_and_hyperparameters
@forms
def test_found_inf_changes_nothing_and_grad_scale_divides(case, hyper, form):
    params, plain = parameters(), parameters()
    before = snapshot(params)
    opt = case(params, penalty=L1(0.3), **form, **hyper)
    for p in params:
        p.grad.mul_(1024)
    opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    opt.step()
    assert identical(snapshot(params), before)
    assert not opt.state
    opt.found_inf.zero_()
    opt.step()
    case(plain, penalty=L1(0.3), **form, **hyper).step()
    assert identical(snapshot(params), snapshot(plain))


@optimizers
def test_grad_scaler_skips_steps_that_overflow_and_scales_nothing_else(case):
    def train(scaler):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        opt = case(Regularizer(model, L1(0.05)).param_groups(), **case.usual)
        x = torch.randn(20, 3)
        for step in range(6):
            opt.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler and step == 3:
                model.weight.grad[0, 0] = math.inf
                before = snapshot(list(model.parameters())), [s[case.buffer].clone() for s in opt.state.values()]
                scaler.step(opt)
                after = snapshot(list(model.parameters())), [s[case.buffer].clone() for s in opt.state.values()]
                assert all(identical(a, b) for a, b in zip(before, after, strict=True))
                scaler.update()
            elif step != 3:
                scaler.step(opt) if scaler else opt.step()
                scaler and scaler.update()
        return snapshot(list(model.parameters()))

    assert identical(train(torch.amp.GradScaler("cpu", init_scale=1024.0)), train(None))


# torch.optim's ways of being used


@optimizers
def test_a_closure_is_called_once_and_its_loss_returned(case):
    p = scalar(1.0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        p.grad = None
        loss = (2 * p).sum()
        loss.backward()
        return loss

    opt = case([p], lr=0.25, penalty=L1(0.1), **case.flat)
    assert opt.step(closure).item() == 2.0
    assert calls == [True]
    moved = 0.25 * (2 if case.optimizer is ProxSGD else 1)  # Adam's first step goes by the gradient's sign
    assert p.item() == pytest.approx(1 - moved - 0.25 * 0.1)


@optimizers
def test_hooks_run_around_the_step_and_schedulers_accept_the_optimizer(case):
    p = scalar(1.0)
    opt = case([("w", p)], lr=0.5, penalty=L1(0.1), **case.flat)
    assert opt.param_groups[0]["param_names"] == ["w"]
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(p.item()))
    opt.register_step_post_hook(lambda *_: seen.append(p.item()))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    opt.step()
    scheduler.step()
    assert seen == pytest.approx([1.0, 0.95])
    assert opt.param_groups[0]["lr"] == 0.25
    opt.add_param_group({"params": [("v", scalar(1.0))], "penalty": None})  # beside the scheduler's own keys
    opt.step()
    assert seen[2:] == pytest.approx([0.95, 0.925])
    torch.optim.lr_scheduler.ReduceLROnPlateau(opt)
    torch.optim.swa_utils.SWALR(opt, swa_lr=0.01)
    repr(opt)


@optimizers
@forms
def test_groups_have_their_own_penalties(case, form):
    a, b, c = (scalar(1.0) for _ in range(3))
    groups = [{"params": [a], "penalty": L1(0.1)}, {"params": [b], "penalty": None}, {"params": [c]}]
    case(groups, lr=1.0, penalty=L1(0.2), **form, **case.flat).step()
    assert [p.item() for p in (a, b, c)] == pytest.approx([0.9, 1.0, 0.8])


# What is refused, and changes nothing


@contextlib.contextmanager
def unchanged(opt):
    params = [p for group in opt.param_groups for p in group["params"]]
    before, groups = snapshot(params), [dict(group) for group in opt.param_groups]
    yield
    assert identical(snapshot([p for group in opt.param_groups for p in group["params"]]), before)
    assert opt.param_groups == groups
    assert not opt.state


@optimizers
def test_sparse_gradients_of_an_unfit_penalty_are_refused_before_anything_changes(case):
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    groups = [{"params": [("w", scalar(1.0, 1.0))]}, {"params": [("table", table.weight)], "penalty": MCP(0.1, 3.0)}]
    opt = case(groups, lr=0.01)
    with unchanged(opt), pytest.raises(TypeError, match=r"table.*MCP can't.*closed form.*sparse=False"):
        opt.step()


@optimizers
def test_unknown_group_keys_are_refused(case):
    opt = case([scalar(1.0)], penalty=L1(0.1))
    with unchanged(opt), pytest.raises(ValueError, match=r"'wieght_decay'.*allowed.*'weight_decay'"):
        opt.add_param_group({"params": [scalar(2.0)], "wieght_decay": 0.1})
    with pytest.raises(ValueError, match="'strength'"):
        case([{"params": [scalar(1.0)], "strength": 0.1}])


@optimizers
@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (L1, "the class L1"),
        (0.1, "float"),
        ("l1", "str"),
        ({"*.weight": L1(0.1)}, r"dict; rules.*Regularizer"),
    ],
    ids=["class", "number", "string", "rules"],
)
def test_what_is_no_penalty_is_refused(case, penalty, message):
    with pytest.raises(TypeError, match=message):
        case([scalar(1.0)], penalty=penalty)
    opt = case([scalar(1.0)])
    with unchanged(opt), pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [scalar(1.0)], "penalty": penalty})
    opt.param_groups[0]["penalty"] = penalty
    with unchanged(opt), pytest.raises(TypeError, match=message):
        opt.step()


@optimizers
def test_a_penalty_that_does_not_fit_is_refused_before_anything_changes(case):
    params = parameters()
    opt = case([{"params": params[:1]}, {"params": params[1:]}], **case.usual)
    opt.param_groups[1]["penalty"] = L1(torch.ones(7))
    before = snapshot(params)
    with pytest.raises(ValueError, match=r"broadcast.*\(7,\)"):
        opt.step()
    assert identical(before, snapshot(params))
    assert not opt.state


@optimizers
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_parameters_that_cannot_be_penalised_are_refused(case):
    opt = case([scalar(1.0)], penalty=L1(0.1))
    twice = scalar(2.0)
    integer = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    non_leaf = torch.ones(2, requires_grad=True) * 2
    for params, error, message in (
        ([twice, twice], ValueError, "Parameter 1 of group 1 is listed twice"),
        ([integer], TypeError, "torch.int64"),
        ([non_leaf], ValueError, "non-leaf"),
        ([("w", torch.ones(2, 5))], ValueError, "names"),
        (["w"], TypeError, "Tensors"),
    ):
        with unchanged(opt), pytest.raises(error, match=message):
            opt.add_param_group({"params": params})
    with unchanged(opt), pytest.raises(ValueError, match=r"Parameter 0 of group 1.*\(5,\).*\(2,\)"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(5))], "penalty": L1(torch.ones(2))})


def test_momentum_without_a_finite_gain_is_refused_beside_a_penalty():
    for hyper in ({"momentum": 1.0}, {"momentum": 1.5}, {"momentum": 0.9, "dampening": 1.5}):
        with pytest.raises(ValueError, match=r"`(momentum|dampening)`.*beside a penalty"):
            ProxSGD([scalar(1.0)], penalty=L1(0.1), **hyper)
    opt = ProxSGD([scalar(1.0, 1.0)], lr=0.1, momentum=0.9, penalty=L1(0.1))
    opt.param_groups[0]["momentum"] = 1.0
    with unchanged(opt), pytest.raises(ValueError, match="`momentum`"):
        opt.step()


def test_a_negative_or_nan_learning_rate_is_refused_beside_a_penalty():
    opt = ProxSGD([scalar(1.0, 1.0)], lr=0.1, penalty=L1(0.1))
    for lr in (-0.1, math.nan, torch.tensor(-0.1)):
        opt.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match="`lr`"):
            opt.step()
        assert opt.param_groups[0]["params"][0].item() == 1.0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"foreach": True, "differentiable": True},
    ],
    ids=str,
)
def test_implementations_that_do_not_exist_are_refused(kwargs):
    with pytest.raises(RuntimeError, match=r"fused|foreach"):
        ProxSGD([scalar(1.0)], **kwargs)


class _HalfShrunk(L1):
    """A user's own penalty, made from a known one."""

    def prox(self, w, step=1.0):
        return w / 2

    prox_ = penalties_base.Penalty.prox_


class _OneStep(L1):
    """A penalty whose proximal operator takes one step for all weights only."""

    takes_steps = False


def test_a_penalty_without_a_prox_in_adams_metric_is_refused_there():
    for make in (ProxAdamW, lambda params, **kwargs: Proximal(torch.optim.RMSprop(params), **kwargs)):
        with pytest.raises(TypeError, match=r'_OneStep has no known proximal operator.*metric="identity"'):
            make([scalar(1.0)], penalty=_OneStep(0.1))
        make([scalar(1.0)], penalty=_OneStep(0.1), metric="identity")
    opt = ProxAdamW([scalar(1.0, 1.0)], penalty=L1(0.1))
    opt.param_groups[0]["penalty"] = _OneStep(0.1)
    with unchanged(opt), pytest.raises(TypeError, match="_OneStep"):
        opt.step()
    Proximal(torch.optim.SGD([scalar(1.0, 1.0)], lr=0.1), penalty=_OneStep(0.1)).step()
    ProxSGD([scalar(1.0, 1.0)], penalty=_OneStep(0.1)).step()


@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "fused"], ids=str)
@pytest.mark.parametrize("size", [3, 1 << 17])
def test_a_subclass_with_its_own_prox_is_taken_at_its_word(form, size):
    p = nn.Parameter(torch.ones(size))
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=0.1, penalty=_HalfShrunk(0.1), **form).step()
    assert (p == 0.5).all()
    with pytest.raises(RuntimeError, match="HalfShrunk"):
        ProxSGD([p], lr=0.1, penalty=_HalfShrunk(0.1), fused=True)


class _Computed(L1):
    """L1 whose strength is not the field."""

    def parts(self):
        return self.current[0], 0.0


def computed() -> _Computed:
    penalty = _Computed(0.3)
    object.__setattr__(penalty, "current", [0.3])
    return penalty


ALTERATIONS = {
    "lr": ({}, lambda group: group.update(lr=0.03)),
    "lr in place": ({"lr": torch.tensor(0.1)}, lambda group: group["lr"].mul_(0.3)),
    "scale": ({}, lambda group: group.update(strength_scale=0.2)),
    "scale in place": ({"strength_scale": torch.tensor(1.0)}, lambda group: group["strength_scale"].mul_(0.3)),
    "scale behind autograd's back": (
        {"strength_scale": torch.tensor(1.0)},
        lambda group: group["strength_scale"].data.mul_(0.3),
    ),
    "penalty": ({}, lambda group: group.update(penalty=L1(0.1))),
    "strength in place": ({"penalty": ElasticNet(torch.tensor(0.3), 0.2)}, lambda group: group["penalty"].l1.mul_(0.3)),
    "computed strength": ({"penalty": computed()}, lambda group: group["penalty"].current.__setitem__(0, 0.1)),
    "weight decay": ({}, lambda group: group.update(weight_decay=0.4)),
    "direction": ({}, lambda group: group.update(maximize=not group["maximize"])),
    "betas in place": ({"betas": [0.9, 0.99]}, lambda group: group["betas"].__setitem__(0, 0.3)),
}


@optimizers
@forms
@pytest.mark.parametrize(("given", "alter"), ALTERATIONS.values(), ids=ALTERATIONS)
def test_what_is_altered_between_steps_acts_at_once(case, form, given, alter):
    params = parameters()
    if not given.keys() <= case(params).defaults.keys() or (
        given and form.get("foreach") and not case.tensor_lr_foreach
    ):
        pytest.skip("this optimizer has no such hyperparameter")
    opt = case(params, **{**case.usual, "penalty": ElasticNet(0.3, 0.2), **form, **copy.deepcopy(given)})
    set_gradients(params, 0)
    opt.step()
    opt.step()
    as_before = copy.deepcopy(opt)
    alter(opt.param_groups[0])
    fresh = copy.deepcopy(opt)  # knows nothing of the steps before
    copies = [other.param_groups[0]["params"] for other in (fresh, as_before)]
    for some in (params, *copies):
        set_gradients(some, 1)
    for other in (opt, fresh, as_before):
        other.step()
    assert identical(snapshot(params), snapshot(copies[0]))
    assert not identical(snapshot(params), snapshot(copies[1]))
