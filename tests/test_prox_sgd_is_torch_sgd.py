"""Without a penalty ProxSGD is torch.optim.SGD, to the last bit and in what it refuses."""

from __future__ import annotations

import re
import warnings
from copy import deepcopy

import pytest
import torch
from optimizer_cases import identical
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
)

from torchreg import ProxSGD

INPUTS = optim_inputs_func_sgd("cpu", torch.float64)
ERRORS = optim_error_inputs_func_sgd("cpu", torch.float64) + get_error_inputs_for_all_optims("cpu", torch.float64)

inputs = pytest.mark.parametrize("given", INPUTS, ids=[i.desc for i in INPUTS])
implementations = pytest.mark.parametrize("foreach", [False, True, None], ids=["loop", "foreach", "default"])


def weights(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    torch.manual_seed(0)
    shapes = [(5, 3), (), (7,), (0, 3), (181, 183)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors.append(torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last))
    tensors.append(torch.randn(3, 6, dtype=dtype).T)
    return [Parameter(t) for t in tensors]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = 20, gaps: bool = True) -> None:
    """With gaps, the second weight has a gradient in two steps of three, and the third is unfrozen after seven."""
    generator = torch.Generator().manual_seed(1)
    params[2].requires_grad_(not gaps)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            p.grad = grad.as_strided(p.shape, p.stride()) if grad.numel() and grad.is_contiguous() else grad
            if gaps and ((i == 1 and step % 3 == 0) or (i == 2 and step < 7)):
                p.grad = None
        params[2].requires_grad_(not gaps or step >= 7)
        optimizer.step()


@pytest.mark.pairs
@inputs
@implementations
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_weights_and_momentum_buffers_are_equal(given, foreach, dtype):
    ours, theirs = weights(dtype), weights(dtype)
    a = ProxSGD(ours, foreach=foreach, **deepcopy(given.kwargs))
    b = torch.optim.SGD(theirs, foreach=foreach, **deepcopy(given.kwargs))
    train(a, ours)
    train(b, theirs)
    assert identical([p.data for p in ours], [p.data for p in theirs])
    assert {k: v for k, v in a.state_dict()["param_groups"][0].items() if k in b.defaults} == {
        k: v for k, v in b.state_dict()["param_groups"][0].items() if k in b.defaults
    }
    buffers = [[o.state[p]["momentum_buffer"] for p in ps if o.state[p]] for o, ps in ((a, ours), (b, theirs))]
    assert len(buffers[0]) == (len(ours) if a.defaults["momentum"] else 0)
    assert identical(*buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@implementations
def test_lower_precisions_are_equal_too(dtype, foreach):
    kwargs = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": foreach}
    ours, theirs = weights(dtype), weights(dtype)
    train(ProxSGD(ours, **kwargs), ours, gaps=False)
    train(torch.optim.SGD(theirs, **kwargs), theirs, gaps=False)
    assert identical([p.data for p in ours], [p.data for p in theirs])


@pytest.mark.parametrize("given", ERRORS, ids=[e.optimizer_error_input.desc for e in ERRORS])
def test_errors_and_warnings_are_the_same(given):
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = given.optimizer_error_input.params or [Parameter(torch.ones(1, 1))]
    kwargs = given.optimizer_error_input.kwargs
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            ProxSGD(params, **kwargs)
    else:
        with pytest.raises(given.error_type, match=re.compile(given.error_regex)):
            ProxSGD(params, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"momentum": 0.0, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
        ProxSGD([Parameter(torch.ones(1))], **kwargs)


def test_momentum_of_one_and_more_is_allowed_without_a_penalty():
    ours, theirs = weights(), weights()
    train(ProxSGD(ours, lr=0.1, momentum=1.0), ours)
    train(torch.optim.SGD(theirs, lr=0.1, momentum=1.0), theirs)
    assert identical([p.data for p in ours], [p.data for p in theirs])


def test_a_step_without_gradients_creates_no_state():
    opt = ProxSGD([Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert not opt.state
