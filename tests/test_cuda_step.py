"""The step on a GPU: the CPU's results, no stall, and ready for CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from feature_cases import FEATURES, PENALTIES, STEPS, Part, batch, data_loss, network
from optimizer_cases import (
    forms,
    forms_and_dtypes,
    optimizers,
    optimizers_and_hyperparameters,
    parameters,
    penalties,
    set_gradients,
    snapshot,
)
from torch import nn

from torchreg import L1, ElasticNet, GroupLasso, Proximal, ProxSGD, Regularizer, SparseGroupLasso, freeze_zeros
from torchreg.kernels import triton_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(params: list[nn.Parameter]) -> list[nn.Parameter]:
    moved = [nn.Parameter(p.detach().cuda()) for p in params]
    for p, cpu in zip(moved, params, strict=True):
        p.grad = cpu.grad.cuda()
    return moved


@optimizers_and_hyperparameters
@penalties
@forms_and_dtypes([torch.float64, torch.float32, torch.bfloat16, torch.complex64], fused=triton_step.DTYPES)
def test_results_are_those_of_the_cpu(case, hyper, penalty, form, dtype):
    params = parameters(dtype)
    moved = on_gpu(params)
    a = case(params, penalty=penalty, **hyper)
    b = case(moved, penalty=penalty.to("cuda"), **form, **hyper)
    for step in range(3):
        set_gradients(params, step)
        for p, cpu in zip(moved, params, strict=True):
            p.grad = cpu.grad.cuda()
        if step == 1:
            params[0].grad[0, 0] = moved[0].grad[0, 0] = torch.nan
        a.step()
        b.step()
    for expected, got in zip(params, moved, strict=True):
        torch.testing.assert_close(got.cpu(), expected, equal_nan=True)


@optimizers_and_hyperparameters
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [GroupLasso(0.05), SparseGroupLasso(0.02, 0.03, l2=0.1)], ids=str)
def test_groups_are_those_of_the_cpu(case, hyper, penalty, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (50, 16), (9, 1000), (2, 5000), (2, 20_000), (4, 3, 5, 5)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    set_gradients(params, 0)
    moved = on_gpu(params)
    a, b = case(params, penalty=penalty, **hyper), case(moved, penalty=penalty.to("cuda"), **hyper)
    for step in range(3):
        set_gradients(params, step)
        for p, cpu in zip(moved, params, strict=True):
            p.grad = cpu.grad.cuda()
        a.step()
        b.step()
    assert b.step_counts() is not None or case.optimizer is not ProxSGD
    for expected, got in zip(params, moved, strict=True):
        torch.testing.assert_close(got.cpu(), expected)


@optimizers_and_hyperparameters
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", ["float", "cpu", "cuda"])
def test_no_step_waits_for_the_device(case, hyper, form, dtype, scale):
    params = on_gpu(parameters(dtype))
    strength_scale = 0.5 if scale == "float" else torch.tensor(0.5, device=scale)
    opt = case(params, penalty=ElasticNet(0.3, 0.2), strength_scale=strength_scale, **form, **hyper)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(opt):
    """The graph of a step, after one that was taken."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


@optimizers
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_replays_the_step_with_new_numbers(case, form, dtype):
    def start():
        params = on_gpu(parameters(dtype))
        lr, scale = torch.tensor(0.1, device="cuda"), torch.tensor(1.0, device="cuda")
        kwargs = {**case.usual, "penalty": L1(0.3), "capturable": True, **form}
        return params, lr, scale, case(params, lr=lr, strength_scale=scale, **kwargs)

    params, lr, scale, opt = start()
    others, other_lr, other_scale, other = start()
    graph = captured(opt)
    other.step()
    for i in range(3):
        for rate, s in ((lr, scale), (other_lr, other_scale)):
            rate.fill_(0.1 / (i + 1))
            s.fill_(1 + 0.1 * i)
        graph.replay()
        other.step()
    for a, b in zip(snapshot(params), snapshot(others), strict=True):
        torch.testing.assert_close(a, b)


@optimizers
def test_a_graph_is_right_after_other_steps_have_been_taken(case):
    """Which have other gradients and learning rates, and send tables of their own."""

    def start():
        params = on_gpu(parameters(torch.float32))
        strength = torch.full(params[0].shape, 0.3, device="cuda")
        groups = [{"params": params[:1], "penalty": L1(strength)}, {"params": params[1:], "penalty": L1(0.3)}]
        return params, strength, case(groups, **{**case.usual, "lr": torch.tensor(0.1, device="cuda")}, capturable=True)

    params, strength, opt = start()
    others, other_strength, other = start()
    graph = captured(opt)
    other.step()
    fixed = [p.grad for p in params]
    for i in range(4):
        for s in (strength, other_strength):
            s.fill_(0.3 + i)
        if i % 2:
            for p, grad in zip((*params, *others), fixed * 2, strict=True):
                p.grad = grad + i
            opt.step()
            torch.cuda.empty_cache()
            _ = [torch.full((1 << 20,), 7, dtype=torch.int64, device="cuda") for _ in range(4)]  # over what was freed
        else:
            for p, grad in zip((*params, *others), fixed * 2, strict=True):
                p.grad = grad
            graph.replay()
        other.step()
        for a, b in zip(snapshot(params), snapshot(others), strict=True):
            torch.testing.assert_close(a, b)


CAPTURED = {  # the feature's own optimizer is not made for capture
    "Proximal": lambda reg: Part(Proximal(torch.optim.SGD(reg.param_groups(), lr=0.1, momentum=0.9))),
    "freeze_zeros": lambda reg: Part(
        torch.optim.Adam(reg.model.parameters(), lr=0.1, capturable=True), kept=[freeze_zeros(reg)]
    ),
}


def trained_by_captured_steps(feature, penalty, captured):
    """What a feature ends with after steps whose gradients change in place, replayed or taken one by one."""
    model = network(feature).cuda()
    reg = Regularizer(model, PENALTIES[penalty])
    part = CAPTURED.get(feature, FEATURES[feature])(reg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def backward(step):
        part.optimizer.zero_grad(set_to_none=False)
        data_loss(model, *batch(step, "cuda")).backward()

    backward(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        part.optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    part.after_step()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            part.optimizer.step()
    for step in range(1, STEPS):
        backward(step)
        graph.replay() if captured else part.optimizer.step()
        part.after_step()
    return [*snapshot(model.parameters()), *part.found()]


@pytest.mark.parametrize(
    ("penalty", "feature"),
    [
        *(("L1", name) for name in ("hook", "Proximal", "SparsityMonitor", "freeze_zeros", "compact")),
        ("GroupLasso", "ProxSGD"),
    ],
)
def test_a_captured_step_of_a_feature_replays_with_new_gradients(penalty, feature):
    replayed, plain = (trained_by_captured_steps(feature, penalty, captured) for captured in (True, False))
    for a, b in zip(replayed, plain, strict=True):
        torch.testing.assert_close(a, b)
