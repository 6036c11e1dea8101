"""Without a penalty ProxAdamW is torch.optim.AdamW, to the last bit and in what it refuses."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from optimizer_cases import identical
from test_prox_sgd_is_torch_sgd import implementations, train, weights
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
    optim_inputs_func_adamw,
)

from torchreg import ProxAdamW

INPUTS = optim_inputs_func_adamw("cpu", torch.float64)
COUPLED = optim_inputs_func_adam("cpu", torch.float64)
ERRORS = optim_error_inputs_func_adam("cpu", torch.float64) + get_error_inputs_for_all_optims("cpu", torch.float64)
TENSOR_FOREACH = "as a Tensor is not supported for capturable=False and foreach=True"


def assert_equal_training(given, foreach, dtype, theirs_class, **ours_only) -> None:
    ours, theirs = weights(dtype), weights(dtype)
    kwargs = {**given.kwargs, "foreach": foreach}
    makers = (
        lambda ps: ProxAdamW(ps, **ours_only, **deepcopy(kwargs)),
        lambda ps: theirs_class(ps, **deepcopy(kwargs)),
    )
    if foreach and any(isinstance(v, torch.Tensor) for v in [kwargs.get("lr"), *kwargs.get("betas", ())]):
        for make in makers:
            with pytest.raises(ValueError, match=TENSOR_FOREACH):
                make(ours)
        return
    a, b = makers[0](ours), makers[1](theirs)
    train(a, ours)
    train(b, theirs)
    assert identical([p.data for p in ours], [p.data for p in theirs])
    assert {k: v for k, v in a.state_dict()["param_groups"][0].items() if k in b.defaults} == {
        k: v for k, v in b.state_dict()["param_groups"][0].items() if k in b.defaults
    }
    for p, q in zip(ours, theirs, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert identical(list(a.state[p].values()), list(b.state[q].values()))


@pytest.mark.pairs
@pytest.mark.parametrize("given", INPUTS, ids=[i.desc for i in INPUTS])
@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_weights_and_state_are_equal(given, foreach, dtype):
    assert_equal_training(given, foreach, dtype, torch.optim.AdamW)


@pytest.mark.parametrize("given", COUPLED, ids=[i.desc for i in COUPLED])
@implementations
def test_with_coupled_weight_decay_it_is_torch_adam(given, foreach):
    kwargs = {"weight_decay": 0, **given.kwargs}
    given = type(given)(given.params, kwargs, given.desc)
    assert_equal_training(given, foreach, torch.float64, torch.optim.Adam, decoupled_weight_decay=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@implementations
def test_lower_precisions_are_equal_too(dtype, foreach):
    kwargs = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "foreach": foreach}
    ours, theirs = weights(dtype), weights(dtype)
    train(ProxAdamW(ours, **kwargs), ours, gaps=False)
    train(torch.optim.AdamW(theirs, **kwargs), theirs, gaps=False)
    assert identical([p.data for p in ours], [p.data for p in theirs])


@pytest.mark.parametrize("given", ERRORS, ids=[e.optimizer_error_input.desc for e in ERRORS])
def test_errors_and_warnings_are_the_same(given):
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = given.optimizer_error_input.params or [Parameter(torch.ones(1, 1))]
    kwargs = given.optimizer_error_input.kwargs
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            ProxAdamW(params, **kwargs)
    else:
        with pytest.raises(given.error_type, match=re.compile(given.error_regex)):
            ProxAdamW(params, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": "0.1"}, TypeError),
        ({"weight_decay": -1.0}, ValueError),
        ({"eps": -1e-8}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": 0.9}, TypeError),
        ({"betas": (0.9,)}, TypeError),
        ({"betas": (0.9, "0.999")}, TypeError),
        ({"metric": "newton"}, ValueError),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(kwargs, error):
    with pytest.raises(error, match=r"Invalid|Expected"):
        ProxAdamW([Parameter(torch.ones(1))], **kwargs)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("theirs_class", [torch.optim.AdamW, torch.optim.Adam])
def test_a_checkpoint_of_torch_goes_on_exactly(theirs_class, amsgrad):
    start = weights()
    theirs = theirs_class(start, lr=0.05, weight_decay=0.1, amsgrad=amsgrad)
    train(theirs, start, steps=3)
    params = [Parameter(p.detach().clone()) for p in start]
    ours = ProxAdamW(params)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["decoupled_weight_decay"] is (theirs_class is torch.optim.AdamW)
    train(theirs, start, steps=3)
    train(ours, params, steps=3)
    assert identical([p.data for p in start], [p.data for p in params])
