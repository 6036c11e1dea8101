"""The nuclear norm: its mathematics against float64 decompositions, and solved problems through every route."""

import copy
import io
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import torchreg
from torchreg import (
    FISTA,
    L1,
    RMDA,
    GroupLasso,
    NuclearNorm,
    ProxAdamW,
    Proximal,
    ProxSGD,
    Regularizer,
    SparsityMonitor,
    kkt_residual,
    strength_max,
)
from torchreg.penalties import from_dict, singular

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
SHAPES = ((4, 6), (6, 4), (5, 5), (1, 7), (7,), (3, 2, 2, 2), ())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else F64, generator=generator).to(dtype)


def rotation(n, seed=0, dtype=F64):
    return torch.linalg.qr(some(n, n, seed=seed, dtype=dtype)).Q


def matrix(values, columns, seed=0, dtype=F64):
    """A matrix with these singular values."""
    left, right = rotation(len(values), seed, dtype), rotation(columns, seed + 1, dtype)
    return (left * values.to(F64)) @ right[: len(values)]


def as_matrix(w):
    return w.reshape(w.shape[0] if w.ndim else 1, -1).numpy()


def shrunk(w, t):
    """The proximal operator by numpy."""
    u, s, vh = np.linalg.svd(as_matrix(w), full_matrices=False)
    return torch.from_numpy((u * np.maximum(s - t, 0)) @ vh).reshape(w.shape)


# The proximal operator


@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_prox_is_the_argmin(shape, dtype):
    for seed in range(5):
        w = some(*shape, seed=seed, dtype=dtype)
        for step in (0.3, 1.0, torch.tensor(2.0)):
            v = NuclearNorm(0.6).prox(w, step)
            torch.testing.assert_close(v, shrunk(w, 0.6 * float(step)))
            # what is taken away, over step·λ, is in the subdifferential: of spectral norm 1, and aligned with v
            gone = as_matrix((w - v) / (0.6 * step))
            assert np.linalg.norm(gone, 2) <= 1 + 1e-12
            assert np.sum(gone.conj() * as_matrix(v)).real == pytest.approx(np.linalg.svd(as_matrix(v))[1].sum())


def test_no_point_near_the_prox_has_a_lower_objective():
    penalty, w = NuclearNorm(0.9), some(4, 6)
    v = penalty.prox(w, 0.7)

    def objective(v):
        return 0.5 * (v - w).square().sum() + 0.7 * penalty.value(v)

    for seed in range(50):
        for size in (1e-1, 1e-3):
            assert objective(v) < objective(v + size * some(4, 6, seed=100 + seed))


def test_prox_is_firmly_nonexpansive():
    for seed in range(20):
        u, v = some(4, 6, seed=seed), some(4, 6, seed=100 + seed)
        moved = NuclearNorm(1.0).prox(u) - NuclearNorm(1.0).prox(v)
        assert moved.square().sum() <= (moved * (u - v)).sum() + 1e-12


def test_moreau_a_projection_on_the_spectral_ball_is_what_is_taken_away():
    w = some(4, 6)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    projected = (u * s.clamp(max=0.42)) @ vh
    torch.testing.assert_close(NuclearNorm(0.6).prox(w, 0.7) + projected, w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_rotating_rows_and_columns_commutes_with_prox(dtype):
    w, penalty = some(4, 6, dtype=dtype), NuclearNorm(0.8)
    left, right, g = rotation(4, 3, dtype), rotation(6, 4, dtype), some(4, 6, seed=5, dtype=dtype)
    rotated = left @ w @ right
    torch.testing.assert_close(penalty.prox(rotated), left @ penalty.prox(w) @ right)
    torch.testing.assert_close(penalty.value(rotated), penalty.value(w))
    torch.testing.assert_close(penalty.grad(rotated), left @ penalty.grad(w) @ right)
    torch.testing.assert_close(penalty.prox(w.mH), penalty.prox(w).mH)
    torch.testing.assert_close(penalty.strength_max(left @ g @ right), penalty.strength_max(g))
    low = penalty.prox(w, 2.0)
    norm = penalty.optimality_residual(low, g).norm()
    torch.testing.assert_close(penalty.optimality_residual(left @ low @ right, left @ g @ right).norm(), norm)


def test_of_a_diagonal_matrix_it_is_l1_of_the_diagonal():
    d, g = torch.tensor([3.0, -2.0, 0.5, 0.0], dtype=F64), torch.tensor([1.0, -0.2, -0.4, 0.9], dtype=F64)
    w = torch.diag(d)
    for step in (0.3, 1.0):
        torch.testing.assert_close(NuclearNorm(0.7).prox(w, step), torch.diag(L1(0.7).prox(d, step)))
    torch.testing.assert_close(NuclearNorm(0.7).value(w), L1(0.7).value(d))
    torch.testing.assert_close(NuclearNorm(0.7).grad(w), torch.diag(L1(0.7).grad(d)))
    residual = NuclearNorm(0.7).optimality_residual(w, torch.diag(g))
    torch.testing.assert_close(residual, torch.diag(L1(0.7).optimality_residual(d, g)))
    torch.testing.assert_close(NuclearNorm(0.7).strength_max(torch.diag(g)), L1(0.7).strength_max(g))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1), (1, 3, 2)])
def test_of_a_vector_it_is_the_group_lasso_of_one_group(shape):
    w, g, plain = some(*shape), some(*shape, seed=1), GroupLasso(0.7, "tensor", group_weight="none")
    penalty = NuclearNorm(0.7)
    for step in (0.3, 1.0, 9.0):
        torch.testing.assert_close(penalty.prox(w, step), plain.prox(w, step))
    torch.testing.assert_close(penalty.value(w), plain.value(w))
    torch.testing.assert_close(penalty.grad(w), plain.grad(w))
    for at in (w, 0 * w):
        torch.testing.assert_close(penalty.optimality_residual(at, g), plain.optimality_residual(at, g))
    torch.testing.assert_close(penalty.strength_max(g), plain.strength_max(g))


def test_convolutions_are_matrices_of_out_channels():
    w = some(5, 3, 2, 2)
    assert torch.equal(NuclearNorm(0.7).prox(w), NuclearNorm(0.7).prox(w.flatten(1)).reshape(w.shape))
    channels_last = w.to(memory_format=torch.channels_last)
    torch.testing.assert_close(NuclearNorm(0.7).prox(channels_last), NuclearNorm(0.7).prox(w))
    torch.testing.assert_close(NuclearNorm(0.7).prox_(channels_last.clone()), NuclearNorm(0.7).prox(w))


@every_shape
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_zero_and_strength_zero_are_the_identity(shape, dtype):
    w = some(*shape, dtype=dtype)
    for penalty, step in (
        (NuclearNorm(0.6), 0.0),
        (NuclearNorm(0.0), 1.0),
        (NuclearNorm(0.6), torch.tensor(0.0)),
        (NuclearNorm(torch.tensor(0.0)), 1.0),
    ):
        assert torch.equal(penalty.prox(w, step), w)
        assert torch.equal(penalty.prox_(w.clone(), step), w)
        assert penalty.prox(w, step).data_ptr() != w.data_ptr()


@every_shape
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_shrunk_away_is_plus_zero_and_zero_stays(shape, dtype):
    for w in (-0.01 * some(*shape, dtype=dtype), -torch.zeros(shape, dtype=dtype)):
        for v in (NuclearNorm(9.0).prox(w), NuclearNorm(9.0).prox_(w.clone(), torch.tensor(1.0))):
            assert v.shape == w.shape
            assert v.count_nonzero() == 0
            assert not torch.signbit(torch.view_as_real(v) if dtype.is_complex else v).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spoils_the_weight_and_an_infinite_one_stays(dtype):
    w = some(4, 6, dtype=dtype)
    g, penalty = some(4, 6, seed=1, dtype=dtype), NuclearNorm(0.6)
    w[1, 2] = math.inf
    for step in (0.5, torch.tensor(0.5)):
        assert torch.equal(penalty.prox(w, step), w)
    assert penalty.value(w) == penalty.strength_max(w) == math.inf
    w[2, 2] = math.nan
    for step in (0.5, torch.tensor(0.5)):
        assert torch.isnan(penalty.prox(w, step)).all()
    assert torch.isnan(penalty.value(w))
    assert torch.isnan(penalty.strength_max(w))
    assert torch.isnan(penalty.grad(w)).all()
    assert torch.isnan(penalty.optimality_residual(w, g)).all()
    assert torch.isnan(penalty.optimality_residual(g, w)).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
def test_empty_weights_are_left_alone(shape):
    w, penalty = torch.zeros(shape), NuclearNorm(0.6)
    assert penalty.prox(w).shape == penalty.grad(w).shape == penalty.optimality_residual(w, w).shape == shape
    assert penalty.value(w) == penalty.strength_max(w) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    w, penalty = some(4, 6, dtype=dtype), NuclearNorm(0.6)
    assert torch.equal(penalty.prox(w, 0.377), penalty.prox(w.float(), 0.377).to(dtype))
    assert torch.equal(penalty.value(w), penalty.value(w.float()))
    assert torch.equal(penalty.grad(w), penalty.grad(w.float()).to(dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_leave_the_range(scale):
    w = matrix(torch.tensor([3.0, 2.0, 1.0, 0.5]), 6)
    expected = shrunk(w, 1.2)
    v = NuclearNorm(1.2).prox((w * scale).float(), scale)
    torch.testing.assert_close(v.double() / scale, expected, rtol=0, atol=1e-5)


def test_prox_has_derivatives():
    w, step, strength = (torch.as_tensor(x, dtype=F64).requires_grad_() for x in (some(4, 4), 0.3, 0.6))
    assert torch.autograd.gradcheck(lambda w, t, s: NuclearNorm(s).prox(w, t), (w, step, strength))
    assert torch.autograd.gradcheck(lambda w, s: NuclearNorm(s).value(w), (w, strength))


# Large matrices


def spectra(n):
    head = torch.linspace(1, 0.1, 12, dtype=F64)
    return {
        "low rank": torch.cat([head, torch.zeros(n - 12, dtype=F64)]),
        "rank 1": torch.cat([torch.ones(1, dtype=F64), torch.zeros(n - 1, dtype=F64)]),
        "noise": torch.cat([head, 0.02 * torch.linspace(1, 0, n - 12, dtype=F64)]),
        "geometric": 0.8 ** torch.arange(n, dtype=F64),
        "harmonic": 1 / torch.arange(1, n + 1, dtype=F64),
        "flat": torch.ones(n, dtype=F64),
        "flat below": torch.full((n,), 0.049, dtype=F64),
        "near the threshold": torch.cat([head, torch.full((n - 12,), 0.05 * (1 - 1e-7), dtype=F64)]),
        "above the threshold": torch.cat([head, torch.full((n - 12,), 0.05 * (1 + 1e-3), dtype=F64)]),
        "at the threshold": torch.cat([head, torch.full((n - 12,), 0.05, dtype=F64)]),
    }


REFUSED = ("harmonic", "flat", "near the threshold", "above the threshold", "at the threshold")


@pytest.mark.parametrize("name", spectra(20))
def test_the_randomised_result_is_the_exact_one_or_none(name):
    values = spectra(200)[name]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-7)):
        for columns in (200, 300):
            w = matrix(values, columns).to(dtype)
            for a in (w, w.T):
                found, expected = singular.randomized(a, 0.05), shrunk(a.double(), 0.05)
                if found is None:
                    assert name in REFUSED
                    continue
                assert name not in ("flat", "above the threshold")
                assert found.dtype == dtype
                assert (found - expected).norm() <= tolerance * values.norm()
                ranks = [torch.linalg.matrix_rank(x.double(), rtol=1e-5) for x in (found, expected)]
                assert ranks[0] == ranks[1]


def test_the_randomised_method_takes_complex_and_zero_matrices():
    w = matrix(spectra(200)["noise"], 230, dtype=torch.complex128)
    found = singular.randomized(w, 0.05)
    assert found is not None
    torch.testing.assert_close(found, shrunk(w, 0.05))
    for a in (torch.zeros(200, 230), 1e-3 * some(200, 230).float()):
        assert torch.equal(singular.randomized(a, 0.05), torch.zeros(200, 230))


@pytest.mark.parametrize("scale", [1e-35, 1e30])
def test_the_randomised_method_takes_any_scale(scale):
    w = matrix(spectra(200)["noise"], 200)
    found = singular.randomized((w * scale).float(), 0.05 * scale)
    torch.testing.assert_close(found.double() / scale, shrunk(w, 0.05), rtol=0, atol=1e-6)


def test_a_result_that_misses_a_singular_value_is_not_certified():
    """A start that is orthogonal to one of them: the largest found is below the threshold, and still it is wrong."""
    values, missed = spectra(200)["noise"], torch.zeros(200, dtype=F64)
    values[5] = missed[5] = 0.7
    w, hidden = matrix(values, 200), matrix(missed, 200)
    found = singular._leading(w - hidden, 0.05, 1e-12)
    assert found is not None
    u, s, vh = found
    rest = w - (u * s) @ vh
    assert not singular._is_within(rest, 0.05, 1e-14)
    assert singular._is_within(rest - hidden, 0.05, 1e-14)
    for t in (0.7 * (1 - 1e-6), 0.7 * (1 + 1e-6)):
        assert singular._is_within(rest, t, 1e-14) == (t > 0.7)


def large(dtype=torch.float32, n=singular.SMALLEST):
    return matrix(spectra(n)["noise"], n).to(dtype)


def test_large_weights_are_shrunk_alike_each_time_and_no_random_state_moves(monkeypatch):
    w, penalty = large(), NuclearNorm(0.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = penalty.prox(w, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(penalty.prox(w, 0.1), first)
    assert torch.equal(penalty.prox_(w.clone(), torch.tensor(0.1, dtype=F64)), first)
    torch.testing.assert_close(first.double(), shrunk(w.double(), 0.05), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(first) == 12
    monkeypatch.setattr(torch.linalg, "svd", _small_only(torch.linalg.svd))
    assert torch.equal(penalty.prox(w, 0.1), first)
    assert torch.equal(penalty.prox(w.bfloat16(), 0.1), penalty.prox(w.bfloat16().float(), 0.1).bfloat16())
    with torch.autocast("cpu"):
        assert torch.equal(penalty.prox(w, 0.1), first)


def _small_only(svd):
    def checked(a, *args, **kwargs):
        assert min(a.shape) < singular.SMALLEST / 2
        return svd(a, *args, **kwargs)

    return checked


def test_large_weights_that_autograd_records_or_of_many_ranks_are_decomposed_fully():
    w, penalty = large().requires_grad_(), NuclearNorm(0.5)
    v = penalty.prox(w, 0.1)
    assert v.requires_grad
    flat = matrix(torch.ones(singular.SMALLEST), singular.SMALLEST).float()
    torch.testing.assert_close(penalty.prox(flat, 0.1), 0.95 * flat)


def test_autocast_does_not_round_the_result():
    w, penalty = some(20, 30).float(), NuclearNorm(0.5)
    with torch.autocast("cpu"):
        inside = penalty.prox(w, 0.1), penalty.grad(w), penalty.optimality_residual(w, w)
    outside = penalty.prox(w, 0.1), penalty.grad(w), penalty.optimality_residual(w, w)
    assert all(map(torch.equal, inside, outside))


# Values, gradients, optimality


@every_shape
def test_value_is_the_sum_of_singular_values_and_grad_its_derivative(shape):
    w, penalty = some(*shape).requires_grad_(), NuclearNorm(0.6)
    assert penalty.value(w).item() == pytest.approx(0.6 * np.linalg.svd(as_matrix(w.detach()))[1].sum())
    (expected,) = torch.autograd.grad(penalty.value(w), w)
    torch.testing.assert_close(penalty.grad(w), expected)


def test_at_a_matrix_of_low_rank_grad_is_the_subgradient_of_least_norm_and_autograd_agrees():
    for dtype in (torch.float64, torch.float32):
        w = matrix(torch.tensor([3.0, 1.0, 0.0, 0.0]), 6).to(dtype).requires_grad_()
        grad = NuclearNorm(0.6).grad(w)
        assert torch.linalg.svdvals(grad.double()).tolist() == pytest.approx([0.6, 0.6, 0, 0], abs=1e-6)
        (expected,) = torch.autograd.grad(NuclearNorm(0.6).value(w), w)
        torch.testing.assert_close(grad, expected)
    zero = torch.zeros(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(NuclearNorm(0.6).value(zero), zero)
    assert grad.count_nonzero() == NuclearNorm(0.6).grad(zero).count_nonzero() == 0


def test_grad_is_a_subgradient_everywhere():
    penalty = NuclearNorm(0.6)
    for w in (some(4, 6), matrix(torch.tensor([3.0, 1.0, 0.0, 0.0]), 6), torch.zeros(4, 6, dtype=F64)):
        g, here = penalty.grad(w), penalty.value(w)
        for seed in range(20):
            v = some(4, 6, seed=seed)
            assert penalty.value(v) >= here + (g * (v - w)).sum() - 1e-12


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_residual_is_the_least_norm_of_gradient_plus_subdifferential(rank, dtype):
    penalty, g = NuclearNorm(0.6), some(4, 6, seed=7, dtype=dtype)
    values = torch.tensor([3.0, 2.0, 1.5, 1.0])
    values[rank:] = 0
    w = matrix(values, 6, dtype=dtype)
    residual = penalty.optimality_residual(w, g)
    best = (penalty.prox(w - 1e-7 * g, 1e-7) - w) / 1e-7  # minus the least-norm element, where no kink is near
    torch.testing.assert_close(best.abs(), residual, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_the_residual_is_zero_at_a_minimiser_in_every_precision(dtype):
    target, penalty = some(20, 30), NuclearNorm(4.0)
    w = penalty.prox(target).to(dtype)
    assert 0 < torch.linalg.matrix_rank(penalty.prox(target)) < 20
    residual = penalty.optimality_residual(w, w - target.to(dtype))
    assert residual.max() <= 50 * torch.finfo(dtype).eps
    moved = penalty.optimality_residual(w + 0.1 * some(20, 30, seed=9).to(dtype), w - target.to(dtype))
    assert moved.max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_strength_max_is_exact(dtype):
    target = some(4, 6, dtype=dtype)
    largest = NuclearNorm(0.3).strength_max(-target)  # of ½‖w − target‖²
    for factor, zero in ((1.0001, True), (0.9999, False)):
        assert (NuclearNorm(factor * largest).prox(target).count_nonzero() == 0) == zero
        assert bool((NuclearNorm(factor * largest).optimality_residual(0 * target, -target) == 0).all()) == zero


def test_threshold_is_of_singular_values():
    assert NuclearNorm(0.5).threshold(0.2) == pytest.approx(0.1)
    assert NuclearNorm(torch.tensor(0.5)).threshold(torch.tensor(0.2)) == pytest.approx(0.1)
    assert NuclearNorm(0.5).value_of_sums(1.0, 1.0) is None


# A metric


def test_steps_of_single_weights_are_refused_everywhere():
    w, penalty = torch.ones(4, 6), NuclearNorm(0.5)
    for step in (torch.ones(4, 6), torch.ones(6), torch.ones(4, 1)):
        for method in (penalty.prox, penalty.prox_):
            with pytest.raises(ValueError, match=r'Expected one `step` for NuclearNorm.*ProxSGD.*metric="identity"'):
                method(w, step)
    assert torch.equal(penalty.prox(w, torch.full((1, 1), 0.5)), penalty.prox(w, 0.5))
    p = nn.Parameter(w.clone())
    said = 'NuclearNorm has no known proximal operator in .* metric.*metric="identity"'
    with pytest.raises(TypeError, match=said):
        ProxAdamW([p], penalty=penalty)
    with pytest.raises(TypeError, match=said):
        Proximal(torch.optim.RMSprop([p]), penalty=penalty)
    for opt in (
        ProxAdamW([p], lr=0.1, penalty=penalty, metric="identity", weight_decay=0),
        Proximal(torch.optim.AdamW([p], lr=0.1), penalty=penalty, metric="identity"),
        Proximal(torch.optim.SGD([p], lr=0.1), penalty=penalty),
    ):
        p.grad = some(4, 6).float()
        other = nn.Parameter(p.detach().clone())
        other.grad = p.grad.clone()
        inner = torch.optim.SGD if isinstance(getattr(opt, "inner", None), torch.optim.SGD) else torch.optim.AdamW
        inner([other], lr=0.1, weight_decay=opt.param_groups[0]["weight_decay"]).step()
        opt.step()
        torch.testing.assert_close(p.detach(), penalty.prox(other.detach(), 0.1))


# Solved problems


def regression(tasks=6, features=8, samples=60):
    x, truth = some(samples, features), some(tasks, 2, seed=1) @ some(2, features, seed=2)
    return x, x @ truth.T + 0.5 * some(samples, tasks, seed=3)


def solution(strength):
    """Of ½/n·‖Y − XWᵀ‖² + λ‖W‖_*, by proximal gradient in numpy."""
    x, y = (t.numpy() for t in regression())
    gram, moment, step = x.T @ x / len(x), y.T @ x / len(x), len(x) / np.linalg.norm(x, 2) ** 2
    w = np.zeros_like(moment)
    for _ in range(2000):
        u, s, vh = np.linalg.svd(w - step * (w @ gram - moment), full_matrices=False)
        w = (u * np.maximum(s - step * strength, 0)) @ vh
    return torch.from_numpy(w), step


def loss_of(w):
    """The loss of that problem, and its gradient in ``w.grad``."""
    x, y = regression()
    loss = 0.5 * (x @ w.T - y).square().sum() / len(x)
    (w.grad,) = torch.autograd.grad(loss, w)
    return loss


OPTIMIZERS = {
    "ProxSGD": (lambda groups, step: ProxSGD(groups, lr=step, momentum=0.9), 1e-9),
    "SGD": (lambda groups, step: Proximal(torch.optim.SGD(groups, lr=step, momentum=0.9)), 1e-9),
    "RMDA": (lambda groups, step: RMDA(groups, lr=step, momentum=0.0), 3e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_solve_a_regression_of_low_rank(name):
    make, tolerance = OPTIMIZERS[name]
    x, y = regression()
    expected, step = solution(0.8)
    model = nn.Linear(8, 6, bias=False, dtype=F64)
    torch.nn.init.zeros_(model.weight)
    reg = Regularizer(model, NuclearNorm(0.8))
    opt = make(reg.param_groups(), step)

    def loss():
        return 0.5 * (model(x) - y).square().sum() / len(x)

    for _ in range(500):
        opt.zero_grad()
        loss().backward()
        opt.step()
    assert 0 < torch.linalg.matrix_rank(expected) < 6
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=tolerance)
    assert torch.linalg.matrix_rank(model.weight) == torch.linalg.matrix_rank(expected)
    assert kkt_residual(reg, loss) <= 10 * tolerance
    assert strength_max(reg, loss) == pytest.approx(np.linalg.norm((y.T @ x).numpy() / len(x), 2))


def test_fista_solves_it_too_and_the_strength_max_is_where_it_vanishes():
    x, y = regression()
    largest = np.linalg.norm((y.T @ x).numpy() / len(x), 2)
    for strength in (0.8, largest * 1.001, largest * 0.999):
        w = nn.Parameter(torch.zeros(6, 8, dtype=F64))
        opt = FISTA([w], penalty=NuclearNorm(strength), tolerance_kkt=1e-10)
        opt.step(lambda w=w: loss_of(w))
        assert opt.converged
        if strength == 0.8:
            torch.testing.assert_close(w.detach(), solution(0.8)[0], rtol=0, atol=1e-8)
        else:
            assert (w.count_nonzero() == 0) == (strength > largest)


@pytest.mark.parametrize("make", ["ProxSGD", "FISTA"])
def test_denoising_has_a_closed_form(make):
    noisy = some(12, 3, seed=1) @ some(3, 10, seed=2) + 0.3 * some(12, 10, seed=3)
    w, penalty = nn.Parameter(torch.zeros(12, 10, dtype=F64)), NuclearNorm(3.0)
    opt = ProxSGD([w], lr=0.1, momentum=0.9, penalty=penalty) if make == "ProxSGD" else FISTA([w], penalty=penalty)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (w - noisy).square().sum()
        loss.backward()
        return loss

    for _ in range(600 if make == "ProxSGD" else 1):
        opt.step(closure)
    torch.testing.assert_close(w.detach(), shrunk(noisy, 3.0), rtol=0, atol=1e-9)
    assert torch.linalg.matrix_rank(w) == 3


def test_the_loss_term_and_the_hook_have_the_same_minimiser_where_it_is_smooth():
    expected, step = solution(0.01)  # of full rank: no kink is near
    assert torch.linalg.matrix_rank(expected) == 6
    x, y = regression()
    for route in ("loss term", "hook"):
        model = nn.Linear(8, 6, bias=False, dtype=F64)
        with torch.no_grad():
            model.weight.copy_(expected + 0.01 * some(6, 8))
        reg = Regularizer(model, NuclearNorm(0.01))
        opt = torch.optim.SGD(model.parameters(), lr=step)
        if route == "hook":
            reg.attach(opt)
        for _ in range(400):
            opt.zero_grad()
            loss = 0.5 * (model(x) - y).square().sum() / len(x)
            (loss + reg() if route == "loss term" else loss).backward()
            opt.step()
        torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)


# As values, and in models


def _through_file(penalty):
    file = io.BytesIO()
    torch.save(penalty.to_dict(), file)
    file.seek(0)
    return from_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("round_trip", [_through_file, lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_penalty_survives_files_and_copies(round_trip):
    for penalty in (NuclearNorm(0.5), NuclearNorm(torch.tensor(0.5))):
        assert round_trip(penalty) == penalty == penalty.to("cpu")
        assert hash(round_trip(penalty)) == hash(penalty)
    assert NuclearNorm(0.5).scaled(2.0) == NuclearNorm(1.0)
    assert repr(NuclearNorm(0.5)) == "NuclearNorm(strength=0.5)"


def test_training_resumes_bit_for_bit():
    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
        return model, ProxSGD(Regularizer(model, NuclearNorm(0.3)).param_groups(), lr=0.05, momentum=0.9)

    def train(model, opt, n):
        for _ in range(n):
            opt.zero_grad()
            model(torch.ones(1, 2, 4, 4)).square().sum().backward()
            opt.step()

    model, opt = started()
    train(model, opt, 6)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    train(model, opt, 6)
    again, resumed = started()
    state, opt_state = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    resumed.load_state_dict(opt_state)
    train(again, resumed, 6)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_the_monitor_logs_the_penalty_and_the_table_shows_it():
    logged = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            logged[tag] = value

    model = nn.Linear(6, 4)
    reg = Regularizer(model, NuclearNorm(1e-3))
    opt = ProxSGD(reg.param_groups(), lr=0.1)
    monitor = SparsityMonitor(reg, Writer(), every=1, optimizer=opt)
    model(torch.ones(1, 6)).sum().backward()
    opt.step()
    monitor.step()
    monitor.close()
    assert logged["loss/penalty"] == pytest.approx(reg().item(), rel=1e-5)
    assert logged["threshold/group0"] == pytest.approx(1e-4)
    assert "NuclearNorm 0.001" in str(reg)
    with pytest.raises(ValueError, match="NuclearNorm, whose strength does not zero weights"):
        torchreg.TargetSparsity(opt, 0.5, until=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_on_the_host_of_a_device_that_holds_nothing(dtype):
    w, step = torch.empty(600, 600, device="meta", dtype=dtype), torch.empty((), device="meta")
    penalty = NuclearNorm(0.5)
    for t in (0.5, step):
        assert penalty.prox(w, t).shape == penalty.prox_(w, t).shape == w.shape
    assert penalty.grad(w).shape == penalty.optimality_residual(w, w).shape == w.shape
    assert penalty.value(w).shape == penalty.strength_max(w).shape == ()


def test_prox_compiles_to_one_graph_and_can_be_vectorised():
    torch.compiler.reset()
    w, penalty = some(4, 6), NuclearNorm(0.6)
    compiled = torch.compile(lambda w, t: penalty.prox(w, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(w, torch.tensor(0.7, dtype=F64)), penalty.prox(w, 0.7))
    batch = some(3, 4, 6)
    together = torch.func.vmap(lambda w: penalty.prox(w, 0.7))(batch)
    for i in range(3):
        torch.testing.assert_close(together[i], penalty.prox(batch[i], 0.7))


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: NuclearNorm(-1.0), ValueError, "Expected `strength` to be a non-negative float or tensor, got -1.0"),
        (lambda: NuclearNorm(math.nan), ValueError, "Expected `strength`"),
        (lambda: NuclearNorm("a"), TypeError, "Expected `strength`"),
        (lambda: NuclearNorm(torch.ones(4)), ValueError, "Expected `strength` of NuclearNorm to be one number for all"),
        (lambda: NuclearNorm(1.0).scaled(torch.ones(2)).value(torch.ones(2, 2)), ValueError, "one number for all"),
        (lambda: NuclearNorm(1.0).prox(torch.ones(2, 2), -1.0), ValueError, "Expected `step`"),
        (lambda: NuclearNorm(1.0).prox(torch.ones(2, 2), torch.ones(3)), ValueError, "Expected `step` to broadcast"),
        (lambda: NuclearNorm(1.0).prox(torch.ones(2, 2).long()), TypeError, "floating point or complex"),
    ],
)
def test_what_is_no_penalty_step_or_weight_is_refused(make, error, said):
    with pytest.raises(error, match=re.escape(said)):
        make()
