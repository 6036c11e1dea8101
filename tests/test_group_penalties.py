"""The mathematics of group penalties, against float64 minimisation, autograd, L1 and their own definitions."""

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
from torchreg import L1, ElasticNet, GroupLasso, ProxAdamW, ProxSGD, SparseGroupLasso, TopK
from torchreg.groups import Blocks, Heads, Labels, Slices, as_groups
from torchreg.penalties import from_dict, secular

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
KINDS = ["rows", "columns", "tensor", Blocks(2), Heads(2), Labels(torch.tensor([[0, 0, 1, 2, 1, 2]])), Slices((0, 1))]
PENALTIES = {
    "GroupLasso": lambda **k: GroupLasso(0.6, **k),
    "SparseGroupLasso": lambda **k: SparseGroupLasso(0.3, 0.4, **k),
    "SparseGroupLasso-l2": lambda **k: SparseGroupLasso(0.3, 0.4, l2=0.2, **k),
    "SparseGroupLasso-groups": lambda **k: SparseGroupLasso(0.0, 0.6, **k),
}
every_penalty = pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
both_weights = pytest.mark.parametrize("group_weight", ["sqrt", "none"])
SHAPE = (4, 6)


def some(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else F64, generator=generator)).to(
        dtype
    )


def steps(*shape, seed=1, spread=1.0):
    return torch.exp(spread * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def members(kind, w):
    """The weights of each group, one vector each."""
    cut = as_groups(kind).of(w.shape)
    labels = cut.spread(torch.arange(cut.count)).expand(cut.arranged(w).shape).reshape(w.shape)
    return [w[labels == g] for g in range(cut.count)]


def brute_value(penalty, w):
    """R(w) from its definition."""
    l1, group, l2 = penalty.parts()
    weights = [math.sqrt(len(m)) if penalty.group_weight == "sqrt" else 1.0 for m in members(penalty.groups, w)]
    norms = [m.abs().square().sum().sqrt() for m in members(penalty.groups, w)]
    total = sum(c * n for c, n in zip(weights, norms, strict=True))
    return l1 * w.abs().sum() + group * total + l2 * w.abs().square().sum()


def minimised(penalty, w, step):
    """argmin ½Σ(v − w)²/τ + R(v) by another way: iteratively reweighted least squares.

    Each norm is the minimum over η of ½(‖v‖²/η + η), so that taking turns between v and η minimises a smoothed
    objective, whose smoothing goes to zero.
    """
    tau, v = torch.as_tensor(step, dtype=F64).expand(w.shape), w.clone()
    l1, group, l2 = penalty.parts()
    cut = penalty.groups.of(w.shape)
    sizes = torch.as_tensor(cut.sizes).expand(cut.count).to(F64)
    c = sizes.sqrt() if penalty.group_weight == "sqrt" else torch.ones_like(sizes)
    for smoothing in torch.logspace(-1, -9, 80, dtype=F64):
        for _ in range(8):
            norms = (cut.norms(cut.arranged(v)) ** 2 + smoothing**2).sqrt()
            bend = cut.arranged(l1 / (v.abs() ** 2 + smoothing**2).sqrt()) + cut.spread(group * c / norms)
            v = w / (1 + tau * (bend.reshape(w.shape) + 2 * l2))
    return v


# The proximal operator


@pytest.mark.pairs
@every_penalty
@every_kind
@both_weights
@pytest.mark.parametrize("metric", ["scalar", "diagonal"])
def test_prox_is_the_argmin(make, kind, group_weight, metric):
    penalty, w = make(groups=kind, group_weight=group_weight), some(*SHAPE)
    step = 0.7 if metric == "scalar" else 0.7 * steps(*SHAPE)
    v = penalty.prox(w, step)
    tau = torch.as_tensor(step).expand(SHAPE)

    def objective(v):
        return 0.5 * ((v - w) ** 2 / tau).sum() + brute_value(penalty, v)

    best = minimised(penalty, w, step)
    assert objective(v) <= objective(best) + 1e-12
    torch.testing.assert_close(v, best, rtol=0, atol=1e-6)
    near = v + 1e-4 * torch.randn(20, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert all(objective(v) <= objective(u) for u in near)


@every_penalty
@every_kind
@pytest.mark.parametrize("metric", ["scalar", "diagonal"])
def test_what_prox_takes_away_is_a_subgradient_there(make, kind, metric):
    # Moreau's decomposition: w − prox(w) is step times an element of the subdifferential at prox(w).
    penalty = make(groups=kind)
    alive = zero = 0
    for seed in range(20):
        w = some(*SHAPE, seed=seed)
        size = 0.05 * 1.4**seed
        step = size if metric == "scalar" else size * steps(*SHAPE, seed=seed, spread=2.0)
        v = penalty.prox(w, step)
        assert (penalty.optimality_residual(v, (v - w) / step) <= 1e-11).all()
        zero += sum(int((m == 0).all()) for m in members(kind, v))
        alive += sum(int((m != 0).any()) for m in members(kind, v))
    assert min(zero, alive) > 0


def test_moreau_of_the_group_lasso_is_a_projection_on_balls():
    w, penalty = some(*SHAPE), GroupLasso(0.6, "rows", group_weight="none")
    radius = 0.6 * 0.7
    projected = w * (radius / w.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(penalty.prox(w, 0.7) + projected, w)


@every_penalty
@every_kind
def test_prox_is_firmly_nonexpansive_in_its_metric(make, kind):
    penalty = make(groups=kind)
    for seed in range(20):
        u, v = some(*SHAPE, seed=seed), some(*SHAPE, seed=100 + seed)
        for step in (0.9, steps(*SHAPE, seed=seed)):
            moved = penalty.prox(u, step) - penalty.prox(v, step)
            assert (moved**2 / step).sum() <= (moved * (u - v) / step).sum() + 1e-12


@every_penalty
def test_groups_of_one_weight_are_l1(make):
    penalty = make(groups=Slices((0, 1)))
    l1, group, l2 = penalty.parts()
    plain, w, g = ElasticNet(l1 + group, l2), some(*SHAPE), some(*SHAPE, seed=3)
    w[0] = 0
    for step in (0.7, steps(*SHAPE)):
        torch.testing.assert_close(penalty.prox(w, step), plain.prox(w, step), rtol=1e-12, atol=1e-14)
        assert torch.equal(penalty.prox(w, step) == 0, plain.prox(w, step) == 0)
    torch.testing.assert_close(penalty.value(w), plain.value(w))
    torch.testing.assert_close(penalty.grad(w), plain.grad(w))
    torch.testing.assert_close(penalty.optimality_residual(w, g), plain.optimality_residual(w, g))


def test_without_l1_and_l2_the_sparse_group_lasso_is_the_group_lasso_and_without_groups_elastic_net():
    w, g = some(*SHAPE), some(*SHAPE, seed=3)
    for sparse, plain in (
        (SparseGroupLasso(0.0, 0.6), GroupLasso(0.6)),
        (SparseGroupLasso(0.5, 0.0, l2=0.3), ElasticNet(0.5, 0.3)),
        (SparseGroupLasso(0.5, 0.0), L1(0.5)),
    ):
        for step in (0.7, steps(*SHAPE)):
            torch.testing.assert_close(sparse.prox(w, step), plain.prox(w, step), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sparse.value(w), plain.value(w))
        torch.testing.assert_close(sparse.grad(w), plain.grad(w))
        torch.testing.assert_close(sparse.optimality_residual(w, g), plain.optimality_residual(w, g))
        torch.testing.assert_close(sparse.scaled(sparse.strength_max(g)).value(w) * 0, torch.zeros((), dtype=F64))


@every_penalty
def test_permuting_and_flipping_weights_inside_a_group_commutes_with_prox(make):
    penalty, w, tau = make(groups="rows"), some(*SHAPE), steps(*SHAPE)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    sign = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=F64)
    torch.testing.assert_close(penalty.prox(w[:, order] * sign, 0.7), penalty.prox(w, 0.7)[:, order] * sign)
    torch.testing.assert_close(penalty.prox(w[:, order], tau[:, order]), penalty.prox(w, tau)[:, order])


def test_rotating_a_group_commutes_with_the_prox_of_the_group_lasso():
    q, _ = torch.linalg.qr(some(6, 6, seed=5))
    penalty, w = GroupLasso(0.6, "rows"), some(*SHAPE)
    torch.testing.assert_close(penalty.prox(w @ q, 0.7), penalty.prox(w, 0.7) @ q)
    torch.testing.assert_close(penalty.value(w @ q), penalty.value(w))


@every_penalty
@every_kind
def test_the_groups_do_not_act_on_each_other(make, kind):
    penalty, w, tau = make(groups=kind), some(*SHAPE), steps(*SHAPE)
    for step in (0.7, tau):
        together = members(kind, penalty.prox(w, step))
        others = members(kind, torch.as_tensor(step, dtype=F64).expand(SHAPE))
        for m, t, v in zip(members(kind, w), others, together, strict=True):
            torch.testing.assert_close(make(groups="tensor").prox(m, t if step is tau else step), v)


@every_penalty
@every_kind
def test_steps_that_are_all_the_same_are_one_step(make, kind):
    penalty, w = make(groups=kind), some(*SHAPE)
    for step in (0.05, 0.7, 3.0):
        expected = penalty.prox(w, step)
        for same in (torch.tensor(step), torch.full((6,), step), torch.full(SHAPE, step, dtype=F64)):
            torch.testing.assert_close(penalty.prox(w, same), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 6.0])
@pytest.mark.parametrize("contrast", [0.3, 6.0])
def test_the_secular_equation_is_solved_to_rounding_whatever_the_spread_of_steps(dtype, spread, contrast):
    generator = torch.Generator().manual_seed(6)

    def normal(*shape):
        return torch.randn(shape, dtype=F64, generator=generator)

    w = normal(2000, 8) * torch.exp(contrast * normal(2000, 8))
    a = torch.exp(spread * normal(2000, 8)) * torch.exp(3 * normal(2000, 1))
    edge = (w / a).norm(dim=1, keepdim=True)
    w[:500] *= (1 + 1e-3 * torch.rand(500, 1, dtype=F64, generator=generator)) / edge[:500]  # barely not zero
    w, a = w.to(dtype), a.to(dtype)
    cut = as_groups("rows").of(w.shape)
    v = w.double() * secular.ratios(cut, w.abs(), a).double()
    w, a, eps = w.double(), a.double(), torch.finfo(dtype).eps
    low, high = torch.zeros(2000, 1, dtype=F64), w.norm(dim=1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        beyond = (w / (middle + a)).norm(dim=1, keepdim=True) > 1
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    exact = torch.where((w / a).norm(dim=1, keepdim=True) > 1, w * low / (low + a), 0)
    assert ((v - exact).norm(dim=1) <= 50 * eps * w.norm(dim=1)).all()

    def objective(v):
        return ((v - w) ** 2 / a).sum(1) / 2 + v.norm(dim=1)

    assert (objective(v) <= objective(exact) * (1 + 50 * eps)).all()


def test_the_secular_equation_is_solved_where_newton_alone_would_crawl():
    """A weight that is nearly kept and one that is nearly lost, twelve orders of magnitude apart: 1/√S has a bend."""
    w = torch.tensor([[1.1e-12, 1.0]], dtype=F64)
    a = torch.tensor([[1e-12, 1 + 1e-8]], dtype=F64)
    v = w * secular.ratios(as_groups("rows").of(w.shape), w, a)
    torch.testing.assert_close((v - w) / a, -v / v.norm(), rtol=0, atol=1e-8)


def test_a_threshold_of_zero_keeps_weights_whose_squares_underflow():
    w = torch.full(SHAPE, 1e-30)
    learned = torch.tensor(0.0, requires_grad=True)
    for penalty in (GroupLasso(learned), SparseGroupLasso(0.0, learned, l2=learned)):
        for step in (1.0, torch.ones(SHAPE)):
            assert torch.equal(penalty.prox(w, step), w)


def test_where_a_group_becomes_zero_is_exact_in_a_diagonal_metric():
    w, tau = some(1, 6), steps(1, 6)
    edge = (w / tau).norm().item()  # of λ
    assert GroupLasso(edge * (1 + 1e-9), "rows", "none").prox(w, tau).count_nonzero() == 0
    assert GroupLasso(edge * (1 - 1e-9), "rows", "none").prox(w, tau).count_nonzero() == 6


@every_penalty
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_zero_and_strength_zero_are_the_identity(make, kind, dtype):
    w = some(*SHAPE, dtype=dtype)
    w[1] = 0
    zero = make(groups=kind).scaled(0.0)
    for penalty, step in ((make(groups=kind), 0.0), (zero, 1.0), (make(groups=kind), torch.zeros(SHAPE))):
        assert torch.equal(penalty.prox(w, step), w)
        assert torch.equal(penalty.prox_(w.clone(), step), w)
    assert torch.equal(zero.prox(w, torch.ones(6)), w)
    unmoved = torch.tensor([0.0, 1, 1, 0, 1, 0])
    assert torch.equal(make(groups=kind).prox(w, unmoved)[:, unmoved == 0], w[:, unmoved == 0])


@every_penalty
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_shrunk_away_is_plus_zero(make, kind, dtype):
    w = -0.05 * some(*SHAPE, dtype=dtype)
    w[0], w[1] = -0.0, 0.0
    for step in (1.0, torch.ones(SHAPE), torch.tensor(1.0)):
        for v in (make(groups=kind).prox(w, step), make(groups=kind).prox_(w.clone(), step)):
            parts = torch.view_as_real(v) if dtype.is_complex else v
            assert v.count_nonzero() == 0
            assert not torch.signbit(parts).any()


@every_penalty
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spoils_its_group_alone_and_infinite_weights_stay(make, dtype):
    w = some(4, 6, dtype=dtype).abs().to(dtype) + 1
    w[1, 2], w[2, 3] = math.nan, math.inf
    l1, _, l2 = make().parts()
    for step in (0.1, torch.full(SHAPE, 0.1), 0.1 * steps(*SHAPE)):
        v = make(groups="rows").prox(w, step)
        assert torch.isnan(v[1].real).all()
        assert not torch.isnan(v[[0, 2, 3]].real).any()
        assert v[2, 3] == math.inf
        torch.testing.assert_close(v[2], ElasticNet(l1, l2).prox(w, step)[2])
        assert (v[[0, 3]].abs() < w[[0, 3]].abs()).all()
    assert not make().strength_max(w).isfinite()


@every_penalty
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_count_by_their_modulus(make, dtype):
    w, tau = some(*SHAPE, dtype=dtype), steps(*SHAPE)
    penalty = make(groups="rows")
    for step in (0.7, tau):
        v = penalty.prox(w, step)
        real = penalty.prox(w.abs(), step)
        torch.testing.assert_close(v.abs(), real)
        torch.testing.assert_close(v, w * (real / w.abs()))
    torch.testing.assert_close(penalty.value(w), penalty.value(w.abs()))
    torch.testing.assert_close(penalty.grad(w), w.sgn() * penalty.grad(w.abs()))
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(penalty.value(leaf), leaf)
    torch.testing.assert_close(penalty.grad(w), expected)


@every_penalty
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(make, kind, dtype):
    w, penalty = some(*SHAPE, dtype=dtype), make(groups=kind)
    for step in (0.377, torch.rand(SHAPE)):
        assert torch.equal(penalty.prox(w, step), penalty.prox(w.float(), step).to(dtype))
    assert torch.equal(penalty.grad(w), penalty.grad(w.float()).to(dtype))
    assert torch.equal(penalty.value(w), penalty.value(w.float()))


@every_penalty
@every_kind
def test_layouts_do_not_matter(make, kind):
    w, penalty = some(*SHAPE), make(groups=kind)
    for other in (w.t().contiguous().t(), torch.stack([w, w], -1)[..., 0]):
        for step in (0.7, steps(*SHAPE)):
            torch.testing.assert_close(penalty.prox(other, step), penalty.prox(w, step))
            assert torch.equal(penalty.prox_(other.clone(), step), penalty.prox(other, step))
        torch.testing.assert_close(penalty.value(other), penalty.value(w))
        torch.testing.assert_close(penalty.grad(other), penalty.grad(w))


@every_penalty
def test_empty_weights_are_left_alone(make):
    for shape in ((0, 3), (3, 0), (0,)):
        w = torch.zeros(shape)
        for step in (1.0, torch.ones(shape)):
            assert make().prox(w, step).shape == shape
        assert make().value(w) == 0
        assert make().grad(w).shape == make().optimality_residual(w, w).shape == shape
        assert make().strength_max(w) == 0


# Values, gradients, optimality


@every_penalty
@every_kind
@both_weights
def test_value_is_the_definition_and_grad_its_derivative(make, kind, group_weight):
    penalty, w = make(groups=kind, group_weight=group_weight), some(*SHAPE).requires_grad_()
    torch.testing.assert_close(penalty.value(w), brute_value(penalty, w))
    (expected,) = torch.autograd.grad(penalty.value(w), w)
    torch.testing.assert_close(penalty.grad(w), expected)
    assert torch.autograd.gradcheck(penalty.value, w, fast_mode=True)
    assert torch.autograd.gradcheck(penalty.grad, w, fast_mode=True)


@every_penalty
@every_kind
def test_the_gradient_of_zero_groups_is_zero_and_autograd_agrees(make, kind):
    w = torch.zeros(SHAPE, requires_grad=True)
    (grad,) = torch.autograd.grad(make(groups=kind).value(w), w)
    assert torch.equal(grad, torch.zeros(SHAPE))
    assert torch.equal(make(groups=kind).grad(w), torch.zeros(SHAPE))


@every_penalty
@every_kind
def test_grad_is_a_subgradient_everywhere(make, kind):
    penalty, w = make(groups=kind), some(*SHAPE)
    w[:, 1], w[2] = 0, 0
    g, here = penalty.grad(w), penalty.value(w)
    for seed in range(20):
        v = some(*SHAPE, seed=seed)
        assert penalty.value(v) >= here + (g * (v - w)).sum() - 1e-12


@every_kind
def test_prox_has_derivatives_of_second_order(kind):
    w, tau = (2 * some(2, 6)).requires_grad_(), steps(2, 6).mul(0.2).requires_grad_()
    one = torch.tensor(0.3, dtype=F64, requires_grad=True)
    strengths = [torch.tensor(s, dtype=F64, requires_grad=True) for s in (0.3, 0.4, 0.2)]

    def prox(w, step, l1, group, l2):
        return SparseGroupLasso(l1, group, groups=kind, l2=l2).prox(w, step)

    for step in (one, tau):
        assert torch.autograd.gradcheck(prox, (w, step, *strengths))
        assert torch.autograd.gradgradcheck(prox, (w, step, *strengths))


@every_penalty
@every_kind
def test_optimality_residual_is_the_least_norm_of_gradient_plus_subdifferential(make, kind):
    penalty, g = make(groups=kind), some(*SHAPE, seed=7)
    w = some(*SHAPE, seed=8)
    w[:, 1], w[:2], w[2, 3:] = 0, 0, 0
    residual = penalty.optimality_residual(w, g)
    assert residual.shape == SHAPE
    derivative = -residual.square().sum().sqrt()  # steepest descent: the least slope of f + R over unit directions
    h, objective = 1e-7, lambda v: (g * (v - w)).sum() + penalty.value(v)
    best = (penalty.prox(w - 1e-6 * g, 1e-6) - w) / 1e-6  # minus the least-norm element, where no kink is near
    torch.testing.assert_close(best.abs(), residual, rtol=0, atol=1e-5)
    if derivative < 0:
        assert (objective(w + h * best / best.norm()) - objective(w)) / h == pytest.approx(derivative.item(), abs=1e-5)


@every_penalty
@every_kind
@both_weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_strength_max_is_exact(make, kind, group_weight, dtype):
    target, penalty = some(*SHAPE, dtype=dtype), make(groups=kind, group_weight=group_weight)
    largest = penalty.strength_max(-target)  # of ½‖w − target‖²
    if isinstance(penalty, GroupLasso):
        penalty = GroupLasso(1.0, kind, group_weight)
    assert largest.shape == ()
    for factor, zero in ((1.0001, True), (0.9999, False)):
        assert (penalty.scaled(factor * largest).prox(target).count_nonzero() == 0) == zero


def test_no_strength_is_enough_where_there_is_none():
    assert SparseGroupLasso(0.0, 0.0).strength_max(some(*SHAPE)) == math.inf
    assert SparseGroupLasso(0.0, 0.0, l2=1.0).strength_max(torch.zeros(SHAPE)) == 0


@every_penalty
def test_a_group_within_the_threshold_becomes_zero(make):
    penalty = make(groups="rows")
    for step in (0.7, torch.tensor(0.7)):
        threshold = penalty.threshold(step)
        for factor, zero in ((0.999, True), (1.001, False)):
            assert (penalty.prox(torch.full(SHAPE, float(threshold) * factor), 0.7).count_nonzero() == 0) == zero
    assert GroupLasso(0.5, group_weight="none").threshold(0.5) == 0.25
    assert make().value_of_sums(1.0, 1.0) is None


# As values


def _through_file(penalty):
    file = io.BytesIO()
    torch.save(penalty.to_dict(), file)
    file.seek(0)
    return from_dict(torch.load(file, weights_only=True))


@every_penalty
@every_kind
@pytest.mark.parametrize("round_trip", [_through_file, lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_penalty_survives_files_and_copies(make, kind, round_trip):
    penalty = make(groups=kind)
    again = round_trip(penalty)
    assert again == penalty == penalty.to("cpu")
    assert hash(again) == hash(penalty)
    assert repr(again) == repr(penalty)


def test_penalties_compare_by_content():
    assert GroupLasso(0.5) == GroupLasso(0.5, "out_channels") != GroupLasso(0.5, "columns")
    assert GroupLasso(0.5) != GroupLasso(0.5, group_weight="none")
    assert GroupLasso(0.5).scaled(2.0) == GroupLasso(1.0)
    assert SparseGroupLasso(0.5, 1.0, l2=2.0).scaled(2.0) == SparseGroupLasso(1.0, 2.0, l2=4.0)
    assert repr(GroupLasso(0.5)) == "GroupLasso(strength=0.5, groups='rows', group_weight='sqrt')"


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: GroupLasso(-1.0), ValueError, "Expected `strength` to be a non-negative float or tensor, got -1.0"),
        (lambda: GroupLasso("a"), TypeError, "Expected `strength`"),
        (lambda: GroupLasso(torch.ones(4)), ValueError, "Expected `strength` of GroupLasso to be one number for all"),
        (lambda: SparseGroupLasso(0.1, torch.ones(4, 1)), ValueError, "Expected `group_strength` of SparseGroupLasso"),
        (lambda: SparseGroupLasso(0.1, 0.1, l2=math.nan), ValueError, "Expected `l2`"),
        (lambda: GroupLasso(1.0, "row"), ValueError, "Expected `groups` to be one of 'rows'"),
        (lambda: GroupLasso(1.0, None), TypeError, "Expected `groups` to be a name or a value of torchreg.groups"),
        (lambda: GroupLasso(1.0, group_weight="size"), ValueError, "Expected `group_weight` to be 'sqrt' or 'none'"),
    ],
)
def test_what_is_no_penalty_is_refused(make, error, said):
    with pytest.raises(error, match=re.escape(said)):
        make()


@every_penalty
def test_weights_that_the_groups_do_not_fit_are_refused_everywhere(make):
    penalty, w = make(groups=Blocks(4)), torch.ones(SHAPE)
    methods = (penalty.value, penalty.grad, penalty.prox, penalty.prox_, penalty.strength_max, penalty.check_weight)
    for method in (*methods, lambda w: penalty.optimality_residual(w, w)):
        with pytest.raises(ValueError, match="Expected k=4 of Blocks"):
            method(w)
        with pytest.raises(TypeError, match="floating point or complex, got a tensor"):
            method(w.long())
    with pytest.raises(ValueError, match="one number for all groups"):
        penalty.scaled(torch.ones(6)).value(torch.ones(4, 8))
    with pytest.raises(ValueError, match="Expected `step`"):
        make().prox(w, torch.ones(5))
    with pytest.raises(ValueError, match="Expected `step`"):
        make().prox(w, -1.0)
    assert torch.equal(w, torch.ones(SHAPE))


# In models


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))


def test_rules_table_value_and_residual_speak_of_groups():
    model = conv_net()
    reg = torchreg.Regularizer(
        model, {nn.Conv2d: GroupLasso(1e-3, "out_channels"), "4.weight": SparseGroupLasso(1e-4, 1e-3, Blocks(4))}
    )
    assert "GroupLasso strength=0.001, groups=out_channels" in str(reg)
    assert "groups=Blocks(k=4, dim=-1)" in str(reg)
    expected = sum(
        1e-3 * math.sqrt(m.weight[0].numel()) * m.weight.flatten(1).norm(dim=1).sum() for m in (model[0], model[2])
    )
    expected = expected + 1e-4 * model[4].weight.abs().sum() + 2e-3 * model[4].weight.reshape(-1, 4).norm(dim=1).sum()
    torch.testing.assert_close(reg(), expected)
    reg().backward()
    autograd = torch.autograd.grad(expected, [model[0].weight, model[4].weight])
    torch.testing.assert_close(model[0].weight.grad, autograd[0])
    torch.testing.assert_close(model[4].weight.grad, autograd[1])

    def closure():
        return model(torch.ones(1, 3, 8, 8)).sum()

    residual = torchreg.kkt_residual(reg, closure)
    grads = torch.autograd.grad(closure() + expected.detach() * 0, list(model.parameters()))
    assert residual >= max(grads[i].abs().max() for i in (1, 3, 5)) * (1 - 1e-6)  # the biases are left alone
    assert torchreg.strength_max(reg, closure) > 0


@pytest.mark.parametrize("kind", ["columns", Heads(3)], ids=str)
def test_a_rule_that_does_not_fit_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"Parameter '0\.(bias|weight)': Expected"):
        torchreg.Regularizer(conv_net(), {"0.*": GroupLasso(1e-3, kind)})


@pytest.mark.parametrize("make", [ProxSGD, ProxAdamW])
def test_training_empties_channels_and_resumes_bit_for_bit(make):
    def started():
        model = conv_net()
        penalty = GroupLasso(0.3, Labels(torch.arange(8).reshape(8, 1, 1, 1)))
        return model, make(torchreg.Regularizer(model, {"0.weight": penalty}).param_groups(), lr=0.02)

    def train(model, opt, n):
        for _ in range(n):
            opt.zero_grad()
            model(torch.ones(1, 3, 8, 8)).square().sum().backward()
            opt.step()

    model, opt = started()
    train(model, opt, 20)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    train(model, opt, 20)
    again, resumed = started()
    state, opt_state = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    resumed.load_state_dict(opt_state)
    train(again, resumed, 20)
    assert torch.equal(again[0].weight, model[0].weight)
    zero = (model[0].weight == 0).flatten(1)
    assert zero.all(1).any()
    assert torch.equal(zero.all(1), zero.any(1))


def test_a_target_for_a_strength_that_zeroes_nothing_is_refused():
    w = nn.Parameter(torch.ones(4))
    for penalty in (GroupLasso(0.0), SparseGroupLasso(0.0, 0.0, l2=1.0), TopK(2, groups="rows")):
        with pytest.raises(ValueError, match=r"does not zero weights|has a penalty with a strength to move"):
            torchreg.TargetSparsity(ProxSGD([w], lr=0.1, penalty=penalty), 0.5, until=10)


def test_the_monitor_logs_the_penalty_of_groups():
    logged = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            logged[tag] = value

    model = conv_net()
    reg = torchreg.Regularizer(model, {nn.Conv2d: GroupLasso(1e-3, "out_channels")})
    opt = ProxSGD(reg.param_groups(), lr=0.1)
    monitor = torchreg.SparsityMonitor(reg, Writer(), every=1, optimizer=opt)
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    opt.step()
    monitor.step()
    monitor.close()
    assert logged["loss/penalty"] == pytest.approx(reg().item(), rel=1e-5)
    assert logged["threshold/group0"] == pytest.approx(1e-4)


@pytest.mark.parametrize("make", [lambda: GroupLasso(0.3), lambda: SparseGroupLasso(0.1, 0.3, Blocks(2), l2=0.1)])
def test_prox_compiles_to_one_graph(make):
    w, tau, penalty = some(*SHAPE), steps(*SHAPE), make()
    compiled = torch.compile(lambda w, t: penalty.prox(w, t), backend="eager", fullgraph=True)
    for step in (torch.tensor(0.7, dtype=F64), tau):
        torch.testing.assert_close(compiled(w, step), penalty.prox(w, step))


@every_penalty
@every_kind
def test_nothing_is_read_on_the_host_beside_a_device(make, kind):
    w, tau = torch.empty(SHAPE, device="meta"), torch.empty(SHAPE, device="meta")  # which holds nothing to be read
    penalty = make(groups=kind).to("meta").scaled(torch.ones((), device="meta"))
    for step in (0.7, torch.empty((), device="meta"), tau):
        assert penalty.prox(w, step).shape == penalty.prox_(w, step).shape == SHAPE
    assert penalty.grad(w).shape == penalty.optimality_residual(w, w).shape == SHAPE
    assert penalty.value(w).shape == torch.as_tensor(penalty.threshold(tau[0, 0])).shape == ()


@every_penalty
@every_kind
def test_prox_and_value_can_be_vectorised_over_a_batch(make, kind):
    penalty, batch = make(groups=kind), some(3, *SHAPE)
    tau = steps(3, *SHAPE)
    for method, args in ((penalty.value, ()), (penalty.grad, ()), (lambda w, t: penalty.prox(w, t), (tau,))):
        together = torch.func.vmap(method)(batch, *args)
        for i in range(3):
            torch.testing.assert_close(together[i], method(batch[i], *(a[i] for a in args)))


@pytest.mark.parametrize("build", [ProxSGD, ProxAdamW])
def test_hyperparameters_may_be_numpys_numbers(build):
    found = []
    for lr, strength in ((np.float64(0.1), np.float32(0.5)), (0.1, 0.5)):
        w = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        w.grad = torch.ones(4, 3)
        build([w], lr=lr, penalty=GroupLasso(strength, "rows")).step()
        found.append(w.detach())
    assert torch.equal(*found)
    assert torch.equal(GroupLasso(0.5).prox(w, np.float64(0.3)), GroupLasso(0.5).prox(w, 0.3))
