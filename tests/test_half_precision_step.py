"""Half-precision weights with a penalty: float32 arithmetic, rounded once, at random by default."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from optimizer_cases import identical, optimizers, optimizers_and_hyperparameters, parameters, set_gradients, snapshot
from torch import Tensor, nn

from torchreg import L1, ElasticNet, ProxSGD
from torchreg.kernels.rounding import stochastic_round_

HALF = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALF, ids=str)


def ulp(dtype: torch.dtype) -> float:
    """The distance from 1 to the next larger number, twice that to the next smaller one."""
    return torch.finfo(dtype).eps


def rounded(values: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    target = torch.empty_like(values, dtype=dtype)
    stochastic_round_(target, values, seed)
    return target


@optimizers_and_hyperparameters
@halves
def test_nearest_rounding_rounds_a_float32_step_once(case, hyper, dtype):
    params = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    kwargs = {"penalty": ElasticNet(0.3, 0.2), **hyper}
    for p, w in zip(params, wide, strict=True):
        w.grad = p.grad.float()
    case(params, stochastic_rounding=False, **kwargs).step()
    case(wide, foreach=False, **kwargs).step()  # the specification, to the last bit
    assert all(torch.equal(p, w.to(dtype)) for p, w in zip(params, wide, strict=True))


@optimizers
@halves
def test_stochastic_rounding_shrinks_where_nearest_rounding_sticks(case, dtype):
    strength = 0.1 * ulp(dtype)  # a fifth of what moves a weight at 1 under nearest rounding
    means = []
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(10_000, dtype=dtype))
        opt = case([p], lr=1.0, penalty=L1(strength), stochastic_rounding=stochastic, **case.flat)
        p.grad = torch.zeros_like(p)
        for _ in range(20):
            opt.step()
        means.append(1 - p.double().mean().item())
    assert means[0] == 0
    assert means[1] == pytest.approx(20 * strength, rel=0.05)


@halves
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-3, 250.0, 3e-6, 2e-8], ids=str)
def test_the_expectation_is_the_exact_value(dtype, value):
    """3e-6 and 2e-8 are subnormal in float16, 2e-8 lies below its smallest number."""
    low = torch.tensor(value).to(dtype).abs().float()
    bits = low.to(dtype).view(torch.int16)
    spacing = ((bits + 1).view(dtype).float() - low).item()
    values = torch.full((200_000,), math.copysign(low.item() + 0.3 * spacing, value))
    got = rounded(values, dtype)
    assert len(got.unique()) == 2
    deviation = spacing * math.sqrt(0.3 * 0.7 / len(values))
    assert got.double().mean().item() == pytest.approx(values.double().mean().item(), abs=5 * deviation)
    # over seeds, too, at one and the same element
    seeds = torch.stack([rounded(values[:7], dtype, seed) for seed in range(2000)]).double().mean(0)
    assert (seeds - values[0].double()).abs().max() <= 5 * spacing * math.sqrt(0.3 * 0.7 / 2000)


@halves
def test_what_the_type_holds_is_kept_and_so_are_infinities_and_nan(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = rounded(every.float(), dtype, seed=3)
    assert torch.equal(got.isnan(), every.isnan())
    numbers = ~every.isnan()
    assert torch.equal(got[numbers], every[numbers])
    assert not torch.signbit(got[got == 0]).any()
    largest = torch.finfo(dtype).max
    assert rounded(torch.tensor([3.4e38, -3.4e38]), dtype).isinf().all() or dtype == torch.bfloat16
    assert rounded(torch.tensor([largest, -largest]), dtype).tolist() == [largest, -largest]


@halves
def test_results_are_the_two_neighbours(dtype):
    torch.manual_seed(0)
    values = torch.randn(50_000) * torch.logspace(-9, 4, 50_000)
    got, nearest = rounded(values, dtype, seed=5), values.to(dtype)
    error, spacing = (got.float() - values).abs(), (nearest.float() - values).abs()
    step = ((nearest.abs().view(torch.int16) + 1).view(dtype).float() - nearest.abs().float()).clamp_min(spacing)
    assert (error <= step).all()
    assert (got.sign() * values.sign() >= 0).all()
    assert (got != nearest).float().mean() > 0.1


@optimizers_and_hyperparameters
@halves
def test_exact_zeros_stay_exact(case, hyper, dtype):
    params = [nn.Parameter(torch.zeros(1000, dtype=dtype))]
    opt = case(params, penalty=L1(2.0), **hyper)
    for step in range(5):
        set_gradients(params, step)
        params[0].grad.clamp_(-0.05, 0.05)
        opt.step()
        assert not params[0].any()


@optimizers
@halves
def test_replicas_agree_and_runs_repeat(case, dtype):
    runs = []
    for memory_format in (torch.contiguous_format, torch.contiguous_format, torch.channels_last):
        torch.manual_seed(len(runs))  # torch's generator plays no part
        params = parameters(dtype)
        params[4].data = params[4].data.contiguous(memory_format=memory_format)
        opt = case(params, penalty=L1(0.01), **case.usual)
        for step in range(4):
            set_gradients(params, step)
            opt.step()
        runs.append(snapshot(params))
    assert identical(runs[0], runs[1])
    assert identical(runs[0][:4], runs[2][:4])


@halves
def test_the_random_numbers_follow_the_memory_not_the_indices(dtype):
    values = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    last = values.to(memory_format=torch.channels_last)
    target = torch.empty_like(last, dtype=dtype)
    stochastic_round_(target, last, 7)
    assert torch.equal(target.permute(0, 2, 3, 1), rounded(last.permute(0, 2, 3, 1).contiguous(), dtype, 7))
    assert not torch.equal(target, rounded(values, dtype, 7))


@optimizers
@pytest.mark.parametrize("stochastic", [True, False])
def test_what_rounds_to_zero_is_positive_zero(case, stochastic):
    p = nn.Parameter(torch.full((1000,), -6e-8, dtype=torch.float16))  # the smallest number, to be halved
    p.grad = torch.zeros_like(p)
    case([p], lr=1.0, penalty=ElasticNet(0.0, 1.5), stochastic_rounding=stochastic, **case.flat).step()
    assert (p == 0).any()
    assert not torch.signbit(p[p == 0]).any()


@optimizers
@halves
def test_rounding_differs_between_steps_and_parameters(case, dtype):
    a, b = (nn.Parameter(torch.full((1000,), 1.0, dtype=dtype)) for _ in range(2))
    opt = case([{"params": [a]}, {"params": [b]}], lr=1.0, penalty=L1(0.25 * ulp(dtype)), **case.flat)
    outcomes = []
    for _ in range(2):
        for p in (a, b):
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        opt.step()
        outcomes += [(p == 1).float() for p in (a, b)]
    correlations = torch.corrcoef(torch.stack(outcomes)) - torch.eye(4)
    assert correlations.abs().max() < 0.15


@optimizers
@halves
def test_rounding_is_per_element_and_has_no_pattern(case, dtype):
    """Neighbours, halves and bits of the offset are uncorrelated."""
    p = nn.Parameter(torch.ones(1 << 14, dtype=dtype))
    p.grad = torch.zeros_like(p)
    case([p], lr=1.0, penalty=L1(0.25 * ulp(dtype)), **case.flat).step()
    ups = (p == 1).double() - 0.5
    for lag in (1, 2, 64, 1 << 13):
        assert abs((ups[lag:] * ups[:-lag]).mean()) < 0.25 * 6 / math.sqrt(len(ups) - lag)


THOUSAND_STEPS = """
import hashlib
import sys
import torch
from torchreg import L1, ProxSGD

torch.set_num_threads(1)
w = torch.nn.Parameter(torch.ones(int(sys.argv[1]), dtype=torch.bfloat16))
w.grad = torch.zeros_like(w)
opt = ProxSGD([w], lr=0.01, penalty=L1(0.01))
for _ in range(1000):
    opt.step()
print(w.double().mean().item(), hashlib.sha256(w.detach().view(torch.int16).numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("weights", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_thousand_tiny_shrinkages_add_up_alike_in_two_processes(weights):
    """Each is a fortieth of what moves a bfloat16 weight of 1 under nearest rounding."""
    command = [sys.executable, "-c", THOUSAND_STEPS, str(weights)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (mean, bits), (_, other_bits) = (process.communicate()[0].split() for process in running)
    assert float(mean) == pytest.approx(0.9, abs=0.001)
    assert bits == other_bits


def test_only_penalised_half_precision_weights_are_counted():
    a, b = parameters(torch.bfloat16)[:1], parameters(torch.float32)[:1]
    opt = ProxSGD([{"params": a, "penalty": L1(0.1)}, {"params": b, "penalty": L1(0.1)}], lr=0.1)
    opt.step()
    assert {len(opt.state[p]) for p in [*a, *b]} == {1}  # all parameters have a state or none has
    for kwargs in ({"stochastic_rounding": False, "penalty": L1(0.1)}, {"penalty": None}):
        other = ProxSGD(a, lr=0.1, **kwargs)
        other.step()
        assert not other.state
    copy.deepcopy(opt).step()
