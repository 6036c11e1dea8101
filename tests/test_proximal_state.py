"""Checkpoints: what they hold, that they resume exactly, and that a wrong one changes nothing."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import (
    PENALTIES,
    OptimizerCase,
    identical,
    optimizers,
    optimizers_and_hyperparameters,
    parameters,
    penalties,
    set_gradients,
    snapshot,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from torchreg import L1, ElasticNet, ProxAdamW, ProxSGD, Regularizer


def saved(state: Any) -> Any:
    """Through a file and back, as safely as torch can."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in [key, *leaves(value)]]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, scheduler: Any = None) -> None:
    for step in steps:
        set_gradients(params, step)
        opt.step()
        if scheduler:
            scheduler.step()


def trained(case: OptimizerCase, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(dtype)
    opt = case(params, **{**case.usual, "penalty": ElasticNet(0.3, 0.2), **kwargs})
    train(opt, params, range(3))
    return opt, params


def contents(opt: torch.optim.Optimizer) -> tuple[list[Tensor], Any]:
    """All that a failed load must leave alone: weights, state tensors, groups."""
    params = [p for group in opt.param_groups for p in group["params"]]
    states = [entry for state in opt.state.values() for entry in state.values()]
    return snapshot(params) + snapshot(states), [
        {**g, "strength_scale": float(g["strength_scale"])} for g in opt.param_groups
    ]


@optimizers_and_hyperparameters
@penalties
def test_a_state_dict_holds_numbers_strings_and_tensors(case, hyper, penalty):
    opt, _ = trained(
        case, torch.bfloat16, penalty=penalty, strength_scale=torch.tensor(0.5), lr=torch.tensor(0.1), **hyper
    )
    state = opt.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {int, float, bool, str, Tensor, type(None)}
    opt.load_state_dict(saved(state))
    assert opt.param_groups[0]["penalty"] == penalty
    assert contents(opt)[1][0]["strength_scale"] == 0.5


@optimizers_and_hyperparameters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_an_optimizer_go_on_exactly(case, hyper, dtype, copied):
    params = parameters(dtype)
    opt = case(params, penalty=ElasticNet(0.3, 0.2), strength_scale=torch.tensor(0.5), **hyper)
    train(opt, params, range(2))
    clones, clone = copied((params, opt))
    assert clone.param_groups[0]["params"][0] is clones[0]
    train(opt, params, range(2, 5))
    train(clone, clones, range(2, 5))
    assert identical(snapshot(params), snapshot(clones))


@pytest.mark.pairs
@optimizers_and_hyperparameters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR", None], ids=str)
@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
def test_resuming_is_exact(case, hyper, dtype, scheduler, penalty):
    def start() -> tuple[list[nn.Parameter], Any, Any]:
        params = parameters(dtype)
        opt = case(params, penalty=penalty, **hyper)
        if scheduler == "OneCycleLR":  # moves the momentum, too
            cycles = bool(hyper.get("momentum"))
            return params, opt, OneCycleLR(opt, max_lr=0.2, total_steps=10, cycle_momentum=cycles)
        return params, opt, StepLR(opt, step_size=2) if scheduler else None

    params, opt, lr = start()
    train(opt, params, range(5), lr)
    checkpoint = saved([snapshot(params), opt.state_dict(), lr and lr.state_dict()])
    train(opt, params, range(5, 9), lr)

    resumed, other, other_lr = start()
    weights, state, lr_state = checkpoint
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    other.load_state_dict(state)
    if other_lr:
        other_lr.load_state_dict(lr_state)
    train(other, resumed, range(5, 9), other_lr)
    assert identical(snapshot(params), snapshot(resumed))
    assert contents(opt)[1][0].keys() == contents(other)[1][0].keys()


@optimizers
def test_penalty_and_strength_scale_of_the_checkpoint_win(case):
    opt, _ = trained(case, penalty=L1(0.3), strength_scale=0.5)
    other = case(parameters(), penalty=ElasticNet(1.0, 1.0), strength_scale=2.0)
    other.load_state_dict(saved(opt.state_dict()))
    assert other.param_groups[0]["penalty"] == L1(0.3)
    assert other.param_groups[0]["strength_scale"] == 0.5


@optimizers
def test_a_state_dict_keeps_the_strength_scale_of_its_moment(case):
    scale = torch.tensor(0.5)
    opt, _ = trained(case, strength_scale=scale)
    state = opt.state_dict()
    scale.fill_(3.0)
    opt.load_state_dict(state)
    assert scale.item() == 0.5


@optimizers
def test_a_shared_strength_scale_stays_shared(case):
    def start() -> tuple[Regularizer, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        reg = Regularizer(model, {"0.weight": L1(0.1), "1.weight": ElasticNet(0.1, 0.2)})
        return reg, case(reg.param_groups(), **case.flat)

    reg, opt = start()
    reg.strength_scale = 0.25
    other, loaded = start()
    loaded.load_state_dict(saved(opt.state_dict()))
    assert all(group["strength_scale"] is other.strength_scale for group in loaded.param_groups)
    assert other.strength_scale == 0.25
    other.strength_scale = 0.75
    assert case.optimizer.effective_step(loaded.param_groups[0]) == pytest.approx(0.1 * 0.75)
    clone, copied = copy.deepcopy((other, loaded))
    assert copied.param_groups[1]["strength_scale"] is clone.strength_scale


@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "fused": True}], ids=str)
def test_a_checkpoint_of_torch_sgd_loads_and_keeps_the_penalty(kwargs):
    params = parameters()[:2]
    theirs = torch.optim.SGD(params, lr=0.3, **kwargs)
    theirs.step()
    scale = torch.tensor(0.5)
    opt = ProxSGD(params, lr=0.1, penalty=L1(0.3), strength_scale=scale)
    opt.load_state_dict(saved(theirs.state_dict()))
    group = opt.param_groups[0]
    assert (group["penalty"], group["lr"], group["momentum"]) == (L1(0.3), 0.3, kwargs.get("momentum", 0))
    assert group["strength_scale"] is scale
    if kwargs:
        assert identical(
            [opt.state[p]["momentum_buffer"] for p in params], [theirs.state[p]["momentum_buffer"] for p in params]
        )
    opt.step()


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("exp_avg_sq", None, "lacks 'exp_avg_sq'"),
        ("step", None, "lacks 'step'"),
        ("step", torch.ones(3), r"got \(3,\)"),
        ("step", torch.tensor(-5.0), r"got -5.0"),
        ("step", math.nan, "got nan"),
    ],
)
def test_a_state_that_is_not_adams_is_refused_and_changes_nothing(entry, value, said, fused):
    params = parameters()[:2]
    opt = ProxAdamW(params, lr=0.1, penalty=L1(0.1), fused=fused)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    state["state"][1][entry] = value
    if value is None:
        del state["state"][1][entry]
    before = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(ValueError, match=rf"loaded .* parameter 1 of group 0.* {said}"):
        opt.load_state_dict(state)
    torch.testing.assert_close(opt.state_dict()["state"], before, rtol=0, atol=0)


def test_a_momentum_buffer_that_was_none_starts_anew():
    """torch.optim.SGD has saved such checkpoints."""
    fresh, loaded = parameters()[:1], parameters()[:1]
    opt = ProxSGD(loaded, lr=0.1, momentum=0.9, dampening=0.5)
    opt.load_state_dict({**opt.state_dict(), "state": {0: {"momentum_buffer": None}}})
    opt.step()
    ProxSGD(fresh, lr=0.1, momentum=0.9, dampening=0.5).step()
    assert identical(snapshot(loaded), snapshot(fresh))


def spoiled(state: dict[str, Any], how: str, optimizer: OptimizerCase) -> Any:
    state = copy.deepcopy(state)
    group = state["param_groups"][0]
    match how:
        case "not a dict":
            return "weights.pt"
        case "a model's state dict":
            return nn.Linear(2, 2).state_dict()
        case "groups are no list":
            state["param_groups"] = {"params": [0]}
        case "state of a parameter is no dict":
            state["state"][0] = torch.ones(2)
        case "another optimizer's":
            return torch.optim.Adagrad(parameters()).state_dict()
        case "other shapes":
            state["state"][3][optimizer.buffer] = torch.ones(7, 3)
        case "more groups":
            state["param_groups"].append({**group, "params": []})
        case "fewer parameters":
            group["params"] = group["params"][:-1]
        case "unknown penalty":
            group["penalty"] = {"type": "L0.5", "strength": 0.1}
        case "negative strength":
            group["penalty"] = {"type": "L1", "strength": -0.1}
        case "penalty of other shapes":
            group["penalty"] = {"type": "L1", "strength": torch.ones(7)}
        case "penalty is a number":
            group["penalty"] = 0.1
        case "bad strength scale":
            group["strength_scale"] = float("nan")
        case "bad learning rate":
            group["lr"] = -1.0
        case "hyperparameter out of range":
            name, value = optimizer.invalid
            group[name] = value
        case "learning rate is text":
            group["lr"] = "0.1"
        case "buffer is text":
            state["state"][3][optimizer.buffer] = "none"
    return state


SPOILED = [
    "not a dict",
    "a model's state dict",
    "groups are no list",
    "state of a parameter is no dict",
    "another optimizer's",
    "other shapes",
    "more groups",
    "fewer parameters",
    "unknown penalty",
    "negative strength",
    "penalty of other shapes",
    "penalty is a number",
    "bad strength scale",
    "bad learning rate",
    "hyperparameter out of range",
    "learning rate is text",
    "buffer is text",
]


@optimizers
@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(case, how):
    opt, _ = trained(case, strength_scale=torch.tensor(0.5))
    state = opt.state_dict()
    state["param_groups"][0]["strength_scale"] = 4.0
    scale = opt.param_groups[0]["strength_scale"]
    before, groups = contents(opt)
    with pytest.raises(TypeError if how.endswith((" number", " text")) else ValueError):
        opt.load_state_dict(spoiled(state, how, case))
    after, groups_after = contents(opt)
    assert identical(before, after)
    assert groups == groups_after
    assert opt.param_groups[0]["strength_scale"] is scale


@optimizers_and_hyperparameters
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoints_change_no_weight(case, hyper, lr, dtype):
    """They create an optimizer's state by a step with zero gradients and learning rate 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
    reg = Regularizer(model, {"0.weight": L1(0.1), "1.weight": ElasticNet(0.1, 0.2)})
    opt = case(reg.param_groups(), lr=lr, **hyper)
    params = list(model.parameters())
    before = snapshot(params)
    empty = get_optimizer_state_dict(model, opt)
    assert identical(snapshot(params), before)
    assert all(group["lr"] == 0.1 for group in opt.param_groups)

    train(opt, params, range(2))
    weights, state = snapshot(params), saved(get_optimizer_state_dict(model, opt))
    assert {g["penalty"]["type"] for g in state["param_groups"] if g["penalty"]} == {"L1", "ElasticNet"}
    train(opt, params, range(2, 4))

    resumed = copy.deepcopy(model)
    other = case(
        Regularizer(resumed, {"0.weight": L1(0.5), "1.weight": ElasticNet(0.1, 0.2)}).param_groups(), lr=lr, **hyper
    )
    others = list(resumed.parameters())
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
        p.grad = None
    set_optimizer_state_dict(resumed, other, state)
    assert identical(snapshot(others), weights)
    train(other, others, range(2, 4))
    assert identical(snapshot(others), snapshot(params))
    assert empty.keys() == state.keys()
