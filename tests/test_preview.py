"""A preview tells where weights will be between descent and prox, changes nothing, and lets the strength be chosen."""

import copy

import pytest
import torch
from torch import nn

from torchreg import L1, ProxAdamW, ProxSGD

OPTIMIZERS = {
    "SGD": (ProxSGD, {}),
    "momentum": (ProxSGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (ProxSGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "dampening": (ProxSGD, {"momentum": 0.9, "dampening": 0.3}),
    "foreach": (ProxSGD, {"momentum": 0.9, "foreach": True}),
    "AdamW": (ProxAdamW, {}),
    "Adam": (ProxAdamW, {"decoupled_weight_decay": False, "weight_decay": 0.1, "amsgrad": True}),
    "identity": (ProxAdamW, {"metric": "identity", "maximize": True}),
}
every_optimizer = pytest.mark.parametrize(("make", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)


def build(make, options, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((7, 5), (3,), (), (4, 2, 3))]
    params.append(nn.Parameter(torch.randn(6, 5).to(dtype).t()))  # not contiguous
    groups = [
        {"params": params, "penalty": L1(0.1), "strength_scale": scale},
        {"params": [nn.Parameter(torch.ones(2))]},
    ]
    return make(groups, lr=0.05, **options)


def give_gradients(optimizer, k):
    generator = torch.Generator().manual_seed(k)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.param_groups[0]["params"][k % 3].grad = None  # not all have one, and counters differ


def everywhere(group, params):
    return [None] * len(params)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("some", [False, True])
def test_it_is_what_a_step_in_two_passes_passes_through(make, options, dtype, some):
    if dtype.is_complex and make is ProxAdamW and options.get("metric") != "identity":
        pytest.skip("Adam's metric treats the parts of complex weights apart")

    def sampler(group, params):
        return [torch.arange(0, p.numel(), 2) if some else None for p in params]

    one, two = build(make, options, dtype), build(make, {**options, "stochastic_rounding": False}, dtype)
    seen, expected = [], []
    one.register_prox_preview_hook(lambda _, points: seen.extend(points), sampler)
    two.register_prox_pre_hook(lambda _, points: expected.append(copy.deepcopy(points[0])))
    for k in range(4):
        one.load_state_dict(copy.deepcopy(two.state_dict()))
        for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
            a.data.copy_(b.data)
        for optimizer in (one, two):
            give_gradients(optimizer, k)
            optimizer.step()
    assert len(seen) == len(expected) == 4
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    for point, full in zip(seen, expected, strict=True):
        assert len(point.params) == len(point.origins) == len(full.params) == 4
        for w, step, at, whole, its_step in zip(
            point.params, point.steps, point.positions, full.params, full.steps, strict=True
        ):
            at = torch.arange(whole.numel()) if at is None else at
            torch.testing.assert_close(w.to(whole.dtype), whole.flatten()[at], **tolerance)
            if isinstance(step, torch.Tensor):
                torch.testing.assert_close(step, its_step.flatten()[at].to(step.dtype), **tolerance)
            else:
                assert step == its_step


@every_optimizer
def test_looking_changes_nothing(make, options):
    one, two = build(make, options), build(make, options)
    one.register_prox_preview_hook(lambda *_: None, everywhere)
    for k in range(4):
        for optimizer in (one, two):
            give_gradients(optimizer, k)
            optimizer.step()
    torch.testing.assert_close(one.state_dict()["state"], two.state_dict()["state"], rtol=0, atol=0)
    for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


@every_optimizer
@pytest.mark.parametrize("scale", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_the_step_takes_the_strength_that_is_chosen(make, options, scale):
    one, two = build(make, options, scale=copy.copy(scale)), build(make, options, scale=0.25)

    def choose(optimizer, points):
        points[0].group["strength_scale"] = 0.25

    one.register_prox_preview_hook(choose, everywhere)
    for optimizer in (one, two):
        give_gradients(optimizer, 0)
        optimizer.step()
    for a, b in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_groups_that_are_not_wanted_or_not_penalised_are_left_out():
    optimizer = build(ProxSGD, {})
    seen = []
    handle = optimizer.register_prox_preview_hook(lambda _, points: seen.append(points), lambda *_: None)
    give_gradients(optimizer, 0)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [[]]


def test_copies_do_not_have_the_hook():
    optimizer = build(ProxSGD, {})
    seen = []
    optimizer.register_prox_preview_hook(lambda *_: seen.append(1), everywhere)
    twin = copy.deepcopy(optimizer)
    give_gradients(twin, 0)
    twin.step()
    assert seen == []
