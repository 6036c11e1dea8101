"""The mathematics of the penalties, against brute force, autograd and their own definitions."""

import copy
import io
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penalty_table import (
    PENALTIES,
    every_convex_penalty,
    every_penalty,
    every_penalty_with_a_gradient,
    every_soft_threshold,
    every_threshold,
)
from torch.autograd import gradcheck, gradgradcheck

from torchreg import L1, L2, ElasticNet
from torchreg.penalties import from_dict, soft_threshold, tiles

properties = settings(max_examples=40, derandomize=True, deadline=None)
F64 = torch.float64
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

entries = st.one_of(st.floats(-4, 4), st.sampled_from([0.0, -0.0, 0.7, -0.5]))
weights = st.lists(entries, min_size=1, max_size=6).map(lambda values: torch.tensor(values, dtype=F64))
positive = st.floats(0, 2)


@st.composite
def pairs(draw, *more):
    """A weight and tensors of its shape, each drawn from its own range."""
    w = draw(weights)
    return w, *(torch.tensor(draw(st.lists(r, min_size=len(w), max_size=len(w))), dtype=F64) for r in more)


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def positive_zero(w):
    w = torch.view_as_real(w) if w.is_complex() else w
    return bool(((w == 0) & ~torch.signbit(w)).all())


def some_weights(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.complex128 if dtype.is_complex else F64
    return (1.5 * torch.randn(shape, dtype=parts, generator=generator)).to(dtype)


# The proximal operator


@every_penalty
@properties
@given(pairs(positive, positive))
def test_prox_is_the_argmin(case, drawn):
    w, step, factor = drawn
    grid = torch.cat([torch.linspace(-5, 5, 8001, dtype=F64), torch.zeros(1, dtype=F64)])

    def objective(v, step, factor):
        return 0.5 * (v - w.unsqueeze(-1)) ** 2 + step * case.brute_value(v, factor)

    for t, c in ((step, factor), (float(step[0]), factor), (step, float(factor[0])), (float(step[0]), factor[0])):
        best = case.penalty(c).prox(w, t)
        t_, c_ = (x.reshape(-1, 1) if isinstance(x, torch.Tensor) and x.ndim else x for x in (t, c))
        on_grid, where = objective(grid, t_, c_).min(-1)
        assert (objective(best.unsqueeze(-1), t_, c_).squeeze(-1) <= on_grid + 1e-12).all()
        if case.convex:  # else two far apart may be as good as each other
            assert ((best - grid[where]).abs() <= 10 / 8000 + 1e-12).all()


@every_penalty
def test_prox_of_complex_weights_is_the_argmin(case):
    w = some_weights(5, dtype=torch.complex128)
    radii, angles = torch.linspace(0, 6, 601, dtype=F64), torch.linspace(0, 2 * math.pi, 361, dtype=F64)
    candidates = torch.polar(*torch.meshgrid(radii, angles, indexing="ij")).flatten()
    near = case.penalty().prox(w, 0.8)
    candidates = torch.cat([candidates, near, *(near + 1e-5 * torch.exp(torch.tensor(1j * a)) for a in range(6))])

    def objective(v):
        return 0.5 * (v - w.unsqueeze(-1)).abs() ** 2 + 0.8 * case.brute_value(v)

    assert (objective(near.unsqueeze(-1)).squeeze(-1) <= objective(candidates).min(-1).values + 1e-12).all()


@every_penalty
@properties
@given(pairs(st.floats(0.01, 2), positive))
def test_what_prox_takes_away_is_a_subgradient_there(case, drawn):
    # Moreau's decomposition: w − prox(w) is step times an element of the subdifferential at prox(w).
    w, step, factor = drawn
    penalty = case.penalty(factor)
    v = penalty.prox(w, step)
    assert (penalty.optimality_residual(v, (v - w) / step) <= 1e-12 / step).all()


@properties
@given(weights, positive)
def test_moreau_of_the_lasso_is_a_projection(w, step):
    projected = torch.clamp(w, -0.7 * step, 0.7 * step)
    torch.testing.assert_close(L1(0.7).prox(w, step) + projected, w, rtol=1e-15, atol=1e-15)


@every_convex_penalty
@properties
@given(pairs(st.floats(-4, 4), positive, positive))
def test_prox_is_firmly_nonexpansive(case, drawn):
    u, v, step, factor = drawn
    penalty = case.penalty(factor)
    moved = penalty.prox(u, step) - penalty.prox(v, step)
    assert (moved**2 <= moved * (u - v) + 1e-12).all()


@every_penalty
@properties
@given(weights, positive)
def test_prox_is_odd(case, w, step):
    assert torch.equal(case.penalty().prox(-w, step), -case.penalty().prox(w, step))


@every_penalty
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_step_zero_and_strength_zero_are_the_identity(case, dtype):
    w = some_weights(40, dtype=dtype)
    for penalty, step in ((case.penalty(), 0), (case.penalty(0.0), 1.0), (case.penalty(torch.tensor(0.0)), 2)):
        assert same_bits(penalty.prox(w, step), w)
        assert same_bits(penalty.prox_(w.clone(), step), w)
    per_weight = case.penalty(torch.zeros(40))
    assert torch.equal(per_weight.prox(w, torch.ones(40)), w)
    assert torch.equal(case.penalty().prox(w, torch.zeros(40)), w)


@every_penalty
def test_prox_makes_a_new_tensor(case):
    w = some_weights(7)
    before = w.clone()
    for penalty, step in ((case.penalty(), 1.0), (case.penalty(0.0), 1.0), (case.penalty(), 0.0)):
        assert penalty.prox(w, step).data_ptr() != w.data_ptr()
        assert torch.equal(w, before)


@every_threshold
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_what_is_shrunk_away_is_plus_zero(case, dtype):
    w = torch.tensor([-0.4, 0.4, -0.1, -1e-6, -0.0, 0.0], dtype=dtype)
    if dtype.is_complex:
        w = torch.cat([w, 0.2j * w.real, w * (0.3 - 0.3j)])
    ones = torch.ones(len(w))
    for penalty in (case.penalty(), case.penalty(ones), case.penalty(torch.tensor(1.0))):
        for step in (1.0, ones):
            assert positive_zero(penalty.prox(w, step))
            assert positive_zero(penalty.prox_(w.clone(), step))


@every_soft_threshold
@pytest.mark.parametrize("dtype", HALF)
def test_what_rounding_to_half_precision_takes_away_is_plus_zero(case, dtype):
    tiny = torch.finfo(dtype).tiny
    w = torch.tensor([-tiny, tiny], dtype=dtype)
    step = tiny * (1 - 2.0**-20) / case.strengths[0]  # leaves less than the type's smallest number
    assert case.penalty().prox(w.float(), step).count_nonzero() == 2
    assert positive_zero(case.penalty().prox(w, step))


@every_penalty
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_nan_and_infinity_are_kept(case, dtype):
    w = torch.tensor([math.nan, math.inf, -math.inf, 2.0], dtype=dtype)
    for factor in (1.0, torch.full((4,), 1.0)):
        for result in (case.penalty(factor).prox(w, 0.5), case.penalty(factor).prox_(w.clone(), 0.5)):
            assert torch.equal(torch.isnan(result.real), torch.tensor([True, False, False, False]))
            assert torch.equal(result[1:3], w[1:3])


def _layouts(dtype):
    big, rows = tiles.TILE + 5, math.isqrt(tiles.TILE) // 6
    yield "0-d", some_weights(dtype=dtype)
    yield "empty", torch.empty(0, 3, dtype=dtype)
    yield "large", some_weights(big, dtype=dtype)
    images = some_weights(2, 6, 2 * rows + 11, 2 * rows + 12, dtype=dtype)
    yield "channels last", images.to(memory_format=torch.channels_last)
    yield "transposed", some_weights(7 * rows, 8 * rows, dtype=dtype).t()
    yield "sliced", some_weights(7 * rows, 18 * rows, dtype=dtype)[:, ::3]
    yield "offset", some_weights(big + 7, dtype=dtype)[7:]


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_prox_in_place_equals_prox_bit_for_bit(case, dtype, monkeypatch):
    if dtype != torch.float32:  # for which the tiles are as large as they are
        monkeypatch.setattr(tiles, "TILE", 1 << 12)
    for name, w in _layouts(dtype):
        if w.numel():
            w[(0,) * w.ndim] = -0.0
        for step in (0.0, 0.7, torch.tensor(0.7), torch.full(w.shape[-1:], 0.3)):
            expected = case.penalty().prox(w, step)
            storage = torch.empty_like(w) if name != "sliced" else w.new_empty(w.shape[0], 3 * w.shape[1])[:, ::3]
            target = storage.copy_(w)
            assert target.stride() == w.stride()
            assert case.penalty().prox_(target, step) is target
            assert same_bits(target, expected), (name, step)


@every_penalty
def test_prox_in_place_leaves_the_neighbours_of_a_slice_alone(case):
    base = some_weights(2 * tiles.TILE + 20)
    before = base.clone()
    case.penalty().prox_(base[10:-10])
    assert torch.equal(base[:10], before[:10])
    assert torch.equal(base[-10:], before[-10:])
    assert torch.equal(base[10:-10], case.penalty().prox(before[10:-10]))


# Values and gradients


@every_penalty
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_value_is_the_formula_in_any_shape_and_dtype(case, dtype, shape):
    w = some_weights(*shape, dtype=dtype)
    exact = w.to(torch.complex128 if dtype.is_complex else F64)
    real = torch.float32 if dtype in HALF else w.real.dtype
    for factor in (1.0, torch.tensor(0.5), torch.rand(shape, dtype=F64)):
        value = case.penalty(factor).value(w)
        assert value.shape == ()
        assert value.dtype == real
        torch.testing.assert_close(value.to(F64), case.brute_value(exact, factor).sum(), rtol=1e-5, atol=1e-6)
    for method in (case.penalty().grad, case.penalty().prox, lambda w: case.penalty().prox_(w.clone())):
        assert method(w).shape == w.shape
        assert method(w).dtype == dtype
    residual = case.penalty().optimality_residual(w, w)
    assert residual.shape == w.shape
    assert residual.dtype == real


@every_penalty
def test_value_of_a_large_tensor_is_accurate_in_float32(case):
    """torch's own norms are off by more than 1e-5 here: of one sign, all weights add to the same running sums."""
    large = torch.rand(2048, 4096, generator=torch.Generator().manual_seed(0))
    exact = case.brute_value(large.double())
    some, first = exact[:, ::2].sum(), exact[:1024].sum()
    sums = (large, exact.sum()), (large.t(), exact.sum()), (large[:, ::2], some), (large[:1024].requires_grad_(), first)
    for weight, expected in sums:
        assert abs(case.penalty().value(weight).item() / expected.item() - 1) < 4e-6


@every_penalty_with_a_gradient
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *COMPLEX])
def test_grad_is_autograds_of_value(case, dtype):
    w = some_weights(4, 5, dtype=dtype).requires_grad_()
    for factor in (1.0, torch.tensor(0.5), torch.rand(5)):
        (expected,) = torch.autograd.grad(case.penalty(factor).value(w), w)
        torch.testing.assert_close(case.penalty(factor).grad(w), expected)


@every_convex_penalty
@properties
@given(pairs(positive))
def test_grad_is_the_least_norm_subgradient(case, drawn):
    w, factor = drawn
    penalty, v = case.penalty(factor), torch.linspace(-5, 5, 201, dtype=F64)
    g = penalty.grad(w)
    for wi, gi, ci in zip(w, g, factor, strict=True):
        below = case.brute_value(wi, ci) + gi * (v - wi)
        assert (case.brute_value(v, ci) >= below - 1e-12).all()
    assert (g[w == 0] == 0).all()


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_autograd_is_right_to_second_order(case, dtype):
    w = some_weights(2, 3, dtype=dtype)
    w = (w + 0.9 * torch.sgn(w)).requires_grad_()  # away from zero and from the threshold's kink
    step = torch.full((2, 3), 0.6, dtype=F64, requires_grad=True)
    strengths = tuple(torch.full((3,), s + 0.1, dtype=F64, requires_grad=True) for s in case.strengths)
    for method in ("value", "grad", "prox") if case.gradient else ("prox",):

        def evaluate(w, *args, method=method):
            arguments, values = (args[:1], args[1:]) if method == "prox" else ((), args)
            return getattr(case.make(*values), method)(w, *arguments)

        inputs = (w, *((step,) if method == "prox" else ()), *strengths)
        assert gradcheck(evaluate, inputs)
        assert gradgradcheck(evaluate, inputs)


@every_penalty
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32_and_rounded_once(case, dtype):
    w = some_weights(1000, dtype=dtype)
    penalty = case.penalty(1.2345)
    for step in (0.377, torch.rand(1000)):
        assert torch.equal(penalty.prox(w, step), penalty.prox(w.float(), step).to(dtype))
    assert torch.equal(penalty.grad(w), penalty.grad(w.float()).to(dtype))
    assert torch.equal(penalty.value(w), penalty.value(w.float()))


def test_soft_threshold_is_its_definition():
    x = some_weights(50)
    assert torch.allclose(soft_threshold(x, 0.3), x.sign() * (x.abs() - 0.3).clamp_min(0), atol=1e-15)
    z = some_weights(50, dtype=torch.complex128)
    torch.testing.assert_close(soft_threshold(z, 0.3), z / z.abs() * (z.abs() - 0.3).clamp_min(0))


# Strengths


@every_penalty
def test_every_kind_of_strength_means_the_same(case):
    w = some_weights(3, 4)
    expected = case.penalty().prox(w, 0.5)
    kinds = (float, np.float64, torch.tensor, lambda s: torch.tensor([s]), lambda s: torch.full((3, 1), s, dtype=F64))
    for kind in kinds:
        penalty = case.make(*(kind(s) for s in case.strengths))
        torch.testing.assert_close(penalty.prox(w, 0.5), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(penalty.value(w), case.penalty().value(w), rtol=1e-6, atol=1e-7)
    whole = case.make(*(2 for _ in case.strengths))
    assert whole == case.make(*(np.int64(2) for _ in case.strengths)) == case.make(*(2.0 for _ in case.strengths))
    assert case.make(*(np.float32(0.5) for _ in case.strengths)) == case.make(*(0.5 for _ in case.strengths))
    for step in (2, np.int64(2), np.float32(2), torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2)):
        torch.testing.assert_close(case.penalty().prox(w, step), case.penalty().prox(w, 2.0))


@every_penalty
def test_a_zero_entry_leaves_its_weight_alone(case):
    w, strength = some_weights(3, 4), torch.tensor([1.0, 0.0, 2.0, 0.0])
    penalty = case.penalty(strength)
    for shrunk in (penalty.prox(w, 0.5), penalty.prox_(w.clone(), 0.5)):
        assert torch.equal(shrunk[:, 1::2], w[:, 1::2])
        assert (shrunk[:, ::2].abs() <= w[:, ::2].abs()).all()
        assert not case.convex or (shrunk[:, ::2] != w[:, ::2]).all()
    assert (penalty.grad(w)[:, 1::2] == 0).all()
    torch.testing.assert_close(penalty.value(w), case.penalty(strength[::2]).value(w[:, ::2]))


@every_penalty
def test_scaled_multiplies_the_penalty(case):
    w = some_weights(6)
    for factor in (0.5, torch.tensor(0.5), torch.rand(6, dtype=F64)):
        torch.testing.assert_close(case.penalty().scaled(factor).value(w), (factor * case.brute_value(w)).sum())
    assert (case.penalty().scaled(2.0) == case.penalty(2.0)) == case.multiples


# Optimality


@every_penalty
@properties
@given(pairs(st.floats(-1, 1), positive))
def test_optimality_residual_is_zero_exactly_where_minus_the_gradient_is_a_subgradient(case, drawn):
    w, inside, factor = drawn
    penalty = case.penalty(factor)
    threshold = case.strengths[0] * factor if case.threshold else torch.zeros_like(factor)
    grad = torch.where(w == 0, inside * threshold, -penalty.grad(w))
    assert torch.equal(penalty.optimality_residual(w, grad), torch.zeros_like(w))
    if case.convex:  # else there may be a lower point far away
        torch.testing.assert_close(penalty.prox(w - 0.3 * grad, 0.3), w, rtol=0, atol=1e-14)


@every_penalty
@properties
@given(pairs(st.floats(-3, 3), positive))
def test_optimality_residual_is_the_distance_to_the_subdifferential(case, drawn):
    w, grad, factor = drawn
    factor = torch.where(factor < 1e-6, 0, factor)
    h = torch.where(w == 0, 1e-30, 1e-7)  # so small that an infinite slope is seen
    slopes = [  # one-sided derivatives of the formula: the ends of the subdifferential
        ((case.brute_value(w + s * h, factor) - case.brute_value(w, factor)) / (s * h)).where(
            (w == 0) | (w.abs() > 0.1), math.nan
        )
        for s in (-1, 1)
    ]
    expected = torch.maximum(slopes[0] + grad, -grad - slopes[1]).clamp_min(0)
    residual = case.penalty(factor).optimality_residual(w, grad)
    known = ~torch.isnan(expected)
    torch.testing.assert_close(residual[known], expected[known], rtol=0, atol=1e-5)


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_strength_max_is_exact(case, dtype):
    target = some_weights(6, dtype=dtype)  # minimise ½‖w − target‖²; the gradient at zero is −target
    largest = case.penalty().strength_max(-target)
    assert largest.shape == ()
    if isinstance(case.penalty(), L2):
        assert largest == math.inf
        assert case.penalty().strength_max(torch.zeros(6)) == 0
        return
    if case.penalty().optimality_residual(torch.zeros(6, dtype=dtype), -target).max() == 0:
        assert largest == 0  # whatever the gradient
        return
    if not case.soft:
        return  # from this strength on w = 0 is stationary, and below it may still be the global minimiser
    for factor, zero in ((1.001, True), (0.999, False)):
        penalty = case.make(factor * largest, *case.strengths[1:])
        assert (penalty.prox(target).count_nonzero() == 0) == zero


@every_soft_threshold
def test_strength_max_of_a_tensor_is_its_factor(case):
    target, strength = some_weights(6), torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0, 0.1], dtype=F64)
    penalty = case.make(strength, *case.strengths[1:])
    largest = penalty.strength_max(-target)
    for factor, zero in ((1.001, True), (0.999, False)):
        shrunk = case.make(strength * largest * factor, *case.strengths[1:]).prox(target)
        assert (shrunk[strength > 0].count_nonzero() == 0) == zero


def test_strength_max_of_nothing_is_zero_and_of_nan_no_number_below_it():
    for case in PENALTIES:
        assert case.penalty().strength_max(torch.empty(0)) == 0
        assert not case.penalty().strength_max(torch.tensor([math.nan, 1.0])) < math.inf


# As values


def _through_file(penalty):
    file = io.BytesIO()
    torch.save(penalty.to_dict(), file)
    file.seek(0)
    return from_dict(torch.load(file, weights_only=True))


@every_penalty
@pytest.mark.parametrize("round_trip", [_through_file, lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
@pytest.mark.parametrize("factor", [1.0, torch.tensor(0.5), torch.tensor([0.0, 1.0])])
def test_a_penalty_survives_files_and_copies(case, round_trip, factor):
    penalty = case.penalty(factor)
    again = round_trip(penalty)
    assert again == penalty
    assert hash(again) == hash(penalty)
    assert repr(again) == repr(penalty)


@every_penalty
def test_penalties_compare_by_content_and_do_not_change(case):
    vector = torch.tensor([0.0, 1.0])
    different = [case.penalty(), case.penalty(2.0), case.penalty(vector), case.penalty(vector * 2), case.make, None]
    for i, a in enumerate(different):
        for j, b in enumerate(different):
            assert (a == b) == (i == j)
    assert len({case.penalty(), case.penalty(), case.penalty(2.0)}) == 2
    name = case.penalty().strength_names()[0]
    with pytest.raises(AttributeError):
        setattr(case.penalty(), name, 1.0)
    assert L1(0.5) != L2(0.5)


def test_the_dict_form_is_plain():
    assert ElasticNet(0.5, 1).to_dict() == {"type": "ElasticNet", "l1": 0.5, "l2": 1.0}
    learned = torch.tensor(0.5, requires_grad=True)
    assert not L1(learned).to_dict()["strength"].requires_grad


def test_from_ratio_is_scikit_learns_objective():
    w, alpha, ratio = some_weights(5), 0.8, 0.3
    expected = alpha * ratio * w.abs().sum() + 0.5 * alpha * (1 - ratio) * w.square().sum()
    for penalty in (
        ElasticNet.from_ratio(alpha, ratio),
        ElasticNet.from_ratio(torch.tensor(alpha, dtype=F64), np.float64(ratio)),
    ):
        torch.testing.assert_close(penalty.value(w), expected)
    assert ElasticNet.from_ratio(2, 1) == ElasticNet(2, 0)
    assert ElasticNet.from_ratio(2, 0) == ElasticNet(0, 1)
    for ratio, alone in ((1, L1(2)), (0, L2(1))):
        for step in (0.7, torch.rand(5, dtype=F64)):
            assert torch.equal(ElasticNet.from_ratio(2, ratio).prox(w, step), alone.prox(w, step))
        assert torch.equal(ElasticNet.from_ratio(2, ratio).value(w), alone.value(w))
        assert torch.equal(ElasticNet.from_ratio(2, ratio).grad(w), alone.grad(w))
    assert ElasticNet.from_ratio(1.0, np.float32(0.5)) == ElasticNet(0.5, 0.25)


# Bad input


@every_penalty
@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (-0.1, ValueError, "got -0.1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (torch.tensor(-1.0), ValueError, "got a tensor with the entry -1.0"),
        (torch.tensor([1.0, math.nan]), ValueError, "got a tensor with the entry nan"),
        (torch.tensor([math.inf]), ValueError, "got a tensor with the entry inf"),
        (True, TypeError, "got True"),
        ("0.1", TypeError, "got '0.1'"),
        (None, TypeError, "got None"),
        (0.1j, TypeError, "got 0.1j"),
        (np.ones(2), TypeError, "got array"),
        (torch.tensor([1, 2]), TypeError, "got a tensor of torch.int64"),
        (torch.tensor([1j]), TypeError, "got a tensor of torch.complex64"),
        (torch.ones(2).to_sparse(), TypeError, "got the layout torch.sparse_coo"),
    ],
    ids=str,
)
def test_what_is_no_strength_is_refused_by_name(case, bad, error, said):
    for position, name in enumerate(case.penalty().strength_names()[: len(case.strengths)]):
        strengths = [*case.strengths]
        strengths[position] = bad
        with pytest.raises(error, match=rf"^Expected `{name}` to be a non-negative float or tensor.*{re.escape(said)}"):
            case.make(*strengths)


@pytest.mark.parametrize(("ratio", "error"), [(1.1, ValueError), (-0.1, ValueError), (math.nan, ValueError)])
def test_l1_ratio_outside_zero_and_one_is_refused(ratio, error):
    with pytest.raises(error, match=r"Expected `l1_ratio` to be in \[0, 1\], got"):
        ElasticNet.from_ratio(1.0, ratio)


@pytest.mark.parametrize("ratio", [True, "0.5", None, torch.tensor(0.5)])
def test_what_is_no_l1_ratio_is_refused(ratio):
    with pytest.raises(TypeError, match=r"Expected `l1_ratio` to be a number in \[0, 1\], got"):
        ElasticNet.from_ratio(1.0, ratio)
    with pytest.raises(ValueError, match=r"Expected `alpha` to be a non-negative"):
        ElasticNet.from_ratio(-1.0, 0.5)


@every_penalty
@pytest.mark.parametrize(
    ("w", "said"),
    [
        (torch.tensor([1, 2]), "floating point or complex, got a tensor of torch.int64"),
        (torch.tensor([True]), "got a tensor of torch.bool"),
        (torch.ones(2, 2).to_sparse(), "dense (strided), got the layout torch.sparse_coo"),
        ([1.0, 2.0], "to be a tensor, got list"),
    ],
    ids=["integer", "bool", "sparse", "list"],
)
def test_what_is_no_weight_is_refused(case, w, said):
    penalty = case.penalty()
    for method in (penalty.value, penalty.grad, penalty.prox, penalty.prox_, penalty.strength_max):
        with pytest.raises(TypeError, match=re.escape(said)):
            method(w)
    with pytest.raises(TypeError, match=re.escape(said)):
        penalty.optimality_residual(torch.ones(2), w)


@every_penalty
def test_a_strength_that_does_not_broadcast_is_refused(case):
    w = torch.ones(2, 3)
    for shape in ((2,), (4, 2, 3), (2, 1, 1)):
        penalty = case.penalty(torch.ones(shape))
        for method in (penalty.value, penalty.grad, penalty.prox, penalty.prox_):
            with pytest.raises(ValueError, match=r"broadcast to the weight's shape \(2, 3\), got a tensor of shape"):
                method(w)


@every_penalty
@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        (-1, ValueError, "got -1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (torch.tensor(-1.0), ValueError, "got -1"),
        (torch.ones(2), ValueError, "to broadcast to the weight's shape (2, 3), got the shape (2,)"),
        (torch.ones(1, 2, 3), ValueError, "to broadcast to the weight's shape (2, 3), got the shape (1, 2, 3)"),
        ("1", TypeError, "got '1'"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        (torch.tensor(1j), TypeError, "got a tensor of torch.complex64"),
    ],
    ids=str,
)
def test_what_is_no_step_is_refused(case, step, error, said):
    w = torch.ones(2, 3)
    for method in (case.penalty().prox, case.penalty().prox_):
        with pytest.raises(error, match=rf"^Expected `step` .*{re.escape(said)}"):
            method(w, step)
    assert torch.equal(w, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ({"type": "L7"}, ValueError, "Expected the penalty type to be one of ['Box', 'ElasticNet', 'GroupLasso', 'L0'"),
        ({"strength": 1.0}, ValueError, "got None"),
        ({"type": "L1"}, ValueError, "Expected the fields of L1 to be ['strength'], got []"),
        ({"type": "L1", "l1": 1.0}, ValueError, "got ['l1']"),
        ({"type": "L1", "strength": -1.0}, ValueError, "Expected `strength` to be a non-negative"),
        ("L1", TypeError, "Expected a penalty's dict form, got str"),
    ],
)
def test_what_is_no_dict_form_is_refused(data, error, said):
    with pytest.raises(error, match=re.escape(said)):
        from_dict(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_a_threshold_beyond_the_range_of_the_type_zeroes_what_is_finite(dtype):
    w = torch.tensor([2.0, -3.0, math.inf], dtype=dtype)
    for result in (L1(1e300).prox(w), L1(1e300).prox_(w.clone())):
        assert result[:2].tolist() == [0, 0]
        assert torch.isinf(result[2])


@every_penalty
def test_the_weights_of_a_rule_together_are_each_by_itself_unless_the_penalty_is_joint(case):
    weights = [some_weights(3, 4), some_weights(5, dtype=torch.float32)]
    steps = (0.3, torch.rand(5, dtype=torch.float32))
    penalty = case.penalty()
    expected = [penalty.prox(w, step) for w, step in zip(weights, steps, strict=True)]
    assert not penalty.is_joint
    assert penalty.prox_all_(weights, steps) is None
    assert all(map(torch.equal, weights, expected))
    with pytest.raises(ValueError, match="Expected one step for each of 2 weights, got 1"):
        penalty.prox_all_(weights, steps[:1])
    assert all(map(torch.equal, weights, expected))
