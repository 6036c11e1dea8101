"""TopK of groups and N:M sparsity, against brute force over all supports, TopK of weights and their own definitions."""

import copy
import io
import itertools
import math
import re

import pytest
import torch
from torch import nn

from torchreg import (
    FISTA,
    NM,
    RMDA,
    ProxAdamW,
    Proximal,
    ProxSGD,
    Regularizer,
    SparsityMonitor,
    TopK,
    group_sparsity,
    kkt_residual,
)
from torchreg.groups import Blocks, Heads, Labels, Member, Shared, Slices, as_groups
from torchreg.penalties import from_dict

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
SHAPE = (4, 8)
KINDS = ["rows", "columns", "tensor", Blocks(2), Heads(2), Labels(torch.tensor([[0, 0, 1, 2, 1, 2, 3, 0]])), "kernels"]
CONSTRAINTS = [
    *(TopK(2, groups=kind) for kind in KINDS),
    TopK(fraction=0.4, groups="columns"),
    TopK(2, scope="rule", groups="rows"),
    NM(),
    NM(1, 2, dim=0),
    NM(3, 8, dim=-1),
    NM(1, 1),
]
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def some(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else F64, generator=generator).to(dtype)


def metric(*shape, seed=1):
    return torch.exp(2 * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def labels(kind, shape):
    """The number of its group at each weight."""
    cut = as_groups(kind).of(shape)
    x = torch.zeros(shape)
    return cut.spread(torch.arange(cut.count)).expand(cut.arranged(x).shape).reshape(shape)


def best(supports, w, step):
    """The least cost ½Σ(v − w)²/τ of any allowed support, and the point there; of equal ones the first."""
    cost = w.abs() ** 2 / (2 * torch.as_tensor(step).expand(w.shape))
    costs = [cost[~support].sum() for support in supports]
    at = min(range(len(costs)), key=costs.__getitem__)
    return costs[at], torch.where(supports[at], w, 0)


# The proximal operator


@every_kind
@pytest.mark.parametrize("k", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("scope", ["tensor", "rule"])
def test_top_k_of_groups_is_the_argmin_over_all_supports_in_a_diagonal_metric(kind, k, scope):
    at = labels(kind, SHAPE)
    there = int(at.max()) + 1
    if math.comb(there, min(k, there)) > 1000:
        k = 1
    supports = [torch.isin(at, torch.tensor(c)) for c in itertools.combinations(range(there), min(k, there))]
    for seed in range(3):
        w = some(*SHAPE, seed=seed)
        for step in (0.7, torch.tensor(0.7), metric(*SHAPE, seed=seed), metric(8, seed=seed)):
            shrunk = TopK(k, scope=scope, groups=kind).prox(w, step)
            _, expected = best(supports, w, step)
            assert torch.equal(shrunk, expected)


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 2, 1), (2, 4, -1), (1, 4, 0), (3, 4, None), (2, 2, 0), (1, 1, 1)])
def test_n_of_m_is_the_argmin_over_all_supports_of_every_block_in_a_diagonal_metric(n, m, dim):
    for seed in range(3):
        w = some(*SHAPE, seed=seed)
        for step in (0.7, torch.tensor([[0.7]]), metric(*SHAPE, seed=seed), metric(4, 1, seed=seed)):
            shrunk = NM(n, m, dim).prox(w, step)
            tau = torch.as_tensor(step, dtype=F64).expand(SHAPE)
            axis = 1 if dim is None else dim
            rows, taus, kept = (x.movedim(axis, -1).reshape(-1, m) for x in (w, tau, shrunk))
            for row, t, v in zip(rows, taus, kept, strict=True):
                supports = [torch.isin(torch.arange(m), torch.tensor(c)) for c in itertools.combinations(range(m), n)]
                assert torch.equal(v, best(supports, row, t)[1])


@pytest.mark.parametrize("m", [2, 4, 8, 9, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_of_every_block_exactly_n_survive_also_of_equal_weights(m, dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(1, 4, (30, 5 * m), generator=generator) * (1 - 2 * torch.randint(2, (30, 5 * m)))
    w = w.to(dtype)
    for n in (1, m // 2, m):
        for step in (1.0, torch.full(w.shape, 0.5)):
            kept = (NM(n, m).prox(w, step) != 0).reshape(-1, m)
            assert (kept.sum(1) == n).all()
            order = torch.argsort(w.abs().reshape(-1, m), dim=1, descending=True, stable=True)
            assert kept.gather(1, order[:, :n]).all()


def test_of_equal_groups_the_first_are_kept():
    w = torch.tensor([3.0, 4.0]).expand(6, 2).clone()
    for step in (1.0, torch.full((6, 2), 0.3)):
        assert (TopK(2, groups="rows").prox(w, step) != 0).all(1).tolist() == [True, True, False, False, False, False]
    w[4] *= 2
    assert (TopK(2, groups="rows").prox(w) != 0).all(1).tolist() == [True, False, False, False, True, False]


@pytest.mark.parametrize("k", [0, 1, 5, 32])
def test_groups_of_one_weight_are_weights(k):
    single = [Slices((0, 1)), Labels(torch.arange(32).reshape(SHAPE)), Blocks(1)]
    w, g = some(*SHAPE), some(*SHAPE, seed=3)
    w[0, :3] = 0
    for groups in single:
        grouped, plain = TopK(k, groups=groups), TopK(k)
        for step in (0.7, metric(*SHAPE)):
            v = plain.prox(w, step)
            assert torch.equal(grouped.prox(w, step), v)
            assert torch.equal(grouped.optimality_residual(v, g), plain.optimality_residual(v, g))
        assert grouped.value(w) == plain.value(w)
        assert grouped.strength_max(g) == plain.strength_max(g)


def test_one_block_of_all_weights_is_top_k_and_full_blocks_are_the_identity():
    w, g = some(1, 12), some(1, 12, seed=3)
    for step in (0.7, metric(1, 12)):
        for n in (1, 5, 12):
            v = TopK(n).prox(w, step)
            assert torch.equal(NM(n, 12).prox(w, step), v)
            assert torch.equal(NM(n, 12).optimality_residual(v, g), TopK(n).optimality_residual(v, g))
        for n in (1, 2, 4):
            assert torch.equal(NM(n, n).prox(w, step), w)
            assert NM(n, n).value(w) == 0
            assert torch.equal(NM(n, n).optimality_residual(w, g), g.abs())


def test_the_groups_of_a_rule_are_ranked_together():
    weights = [some(3, 4), some(5, 2, seed=1), some(2, 3, 2, 2, seed=2, dtype=torch.float32)]
    for steps in ([0.3] * 3, [0.1, 1.0, 0.4], [metric(*w.shape) for w in weights]):
        each = [
            (w.abs() ** 2 / torch.as_tensor(t).expand(w.shape)).to(F64).flatten(1).sum(1)
            for w, t in zip(weights, steps, strict=True)
        ]
        least = torch.cat(each).sort(descending=True).values[3]
        expected = [w * (e >= least).reshape(-1, *[1] * (w.ndim - 1)).to(w) for w, e in zip(weights, each, strict=True)]
        for k, constraint in ((4, TopK(4, scope="rule", groups="rows")), (4, TopK(None, 0.4, "rule", "rows"))):
            moved = [w.clone() for w in weights]
            constraint.prox_all_(moved, steps)
            assert all(map(torch.equal, moved, expected))
            assert constraint.value_all(moved) == 0
            assert constraint.value_all(weights) == math.inf
            assert sum(int((w != 0).flatten(1).any(1).sum()) for w in moved) == k
            residuals = constraint.residual_all(moved, weights)
            for w, old, r in zip(moved, weights, residuals, strict=True):
                alive = (w != 0).flatten(1).any(1).reshape(-1, *[1] * (w.ndim - 1))
                assert torch.equal(r, torch.where(alive, old, 0).abs())
    moved = [w.clone() for w in weights]
    TopK(1, groups="rows").prox_all_(moved, [1.0] * 3)
    assert [int((w != 0).flatten(1).any(1).sum()) for w in moved] == [1, 1, 1]
    weights[1][0, 0] = math.nan
    assert torch.isnan(TopK(1, scope="rule", groups="rows").value_all(weights))


def test_groups_are_ranked_where_squares_leave_the_range():
    for size in (1e-30, 1e25):
        w = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.5]]) * size
        assert (TopK(1, groups="rows").prox(w) != 0).any(1).tolist() == [False, False, True]
        assert (TopK(2, groups="rows").prox(w) != 0).any(1).tolist() == [False, True, True]
        assert (TopK(1, groups=Labels(torch.tensor([[0], [1], [2]]))).prox(w) != 0).any(1).tolist()[2]


@every_constraint
def test_a_weight_whose_step_is_zero_is_kept(constraint):
    w, step = some(*SHAPE), metric(*SHAPE)
    step[1, 2], step[3] = 0, 0
    for shrunk in (constraint.prox(w, step), constraint.prox_(w.clone(), step)):
        assert torch.equal(shrunk[step == 0], w[step == 0])


def test_what_can_not_be_zeroed_comes_first():
    w = torch.tensor([[0.1, 0.2], [5.0, 6.0], [4.0, 4.0]])
    step = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert (TopK(1, groups="rows").prox(w, step) != 0).tolist() == [[True, True], [False, False], [False, False]]
    assert (TopK(2, groups="rows").prox(w, step) != 0).all(1).tolist() == [True, True, False]
    assert NM(1, 2).prox(torch.tensor([[0.1, 5.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [[pytest.approx(0.1), 0]]


@every_constraint
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_zero_changes_nothing(constraint, dtype):
    w = some(*SHAPE, dtype=dtype)
    for step in (0, 0.0, torch.tensor(0.0), torch.zeros(SHAPE), torch.zeros(8)):
        assert torch.equal(constraint.prox(w, step), w)
        assert torch.equal(constraint.prox_(w.clone(), step), w)
        assert constraint.prox(w, step).data_ptr() != w.data_ptr()
        weights = [w.clone()]
        constraint.prox_all_(weights, [step])
        assert torch.equal(weights[0], w)
    assert torch.equal(constraint.prox(w, torch.full(SHAPE, 1e-12)), constraint.prox(w))


@every_constraint
@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_nan_is_kept_and_zeros_are_positive(constraint, dtype):
    w = some(*SHAPE, dtype=dtype)
    w[0] = -0.0
    w[2, 1], w[3, 4] = math.nan, math.inf
    for step in (1.0, torch.ones(SHAPE)):
        for v in (constraint.prox(w, step), constraint.prox_(w.clone(), step)):
            assert torch.equal(torch.isnan(v), torch.isnan(w))
            assert v[3, 4] == math.inf
            assert not torch.signbit(v[v == 0]).any()
            assert v.dtype == dtype
    assert torch.isnan(constraint.value(w))
    assert torch.isnan(constraint.optimality_residual(w, w)[2, 1])


def test_nan_counts_as_infinite():
    w = torch.tensor([[1.0, math.nan, 2.0, 3.0], [9.0, 9.0, 9.0, 9.0], [8.0, math.nan, 7.0, 6.0]])
    kept = NM(2, 4).prox(w) != 0
    assert kept.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    kept = TopK(1, groups="rows").prox(w) != 0
    assert kept.tolist() == [[True] * 4, [False] * 4, [False, True, False, False]]


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_prox_in_place_equals_prox_in_every_layout(constraint, dtype):
    base = some(8, 8, 2, dtype=dtype)
    layouts = [base[:4, :, 0], base[:, :4, 1].t(), base.permute(2, 1, 0)[0, ::2], some(*SHAPE, dtype=dtype)]
    for w in layouts:
        assert w.shape == SHAPE
        for step in (0.7, torch.tensor(0.7), torch.full((8,), 0.3), metric(*SHAPE)):
            expected, target = constraint.prox(w, step), copy.deepcopy(w)
            assert torch.equal(expected, constraint.prox(w.contiguous(), step))
            assert constraint.prox_(target, step) is target
            assert torch.equal(target, expected)
            assert constraint.value(target) == 0
            assert torch.equal(constraint.prox(target, step), target)
            assert constraint.grad(w).shape == w.shape


def test_empty_weights_are_left_alone():
    for constraint in (TopK(2, groups="rows"), TopK(2, groups=Slices((0, 1))), NM(), NM(1, 3, dim=0)):
        for shape in ((0, 4), (3, 0), (0, 0)):
            w = torch.zeros(shape)
            for step in (1.0, torch.ones(shape)):
                assert constraint.prox(w, step).shape == constraint.prox_(w.clone(), step).shape == shape
            assert constraint.value(w) == 0
            assert constraint.optimality_residual(w, w).shape == shape
    constraint = TopK(1, scope="rule", groups="rows")
    weights = [torch.zeros(0, 4), torch.ones(3, 2), torch.zeros(2, 0)]
    constraint.prox_all_(weights, [1.0] * 3)
    assert int(weights[1].count_nonzero()) == 2


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_on_the_host(constraint, dtype):
    """Tensors on the meta device have nothing to be read."""
    constraint = constraint.to("meta")
    with torch.device("meta"):
        w, steps = torch.empty(SHAPE, dtype=dtype), (torch.empty(()), torch.empty(SHAPE), torch.empty(1, 1))
    for step in (0.5, *steps):
        assert constraint.prox(w, step).is_meta
        constraint.prox_(w, step)
        constraint.prox_all_([w, w], [step, step])
    for result in (constraint.value(w), constraint.optimality_residual(w, w), constraint.strength_max(w)):
        assert result.is_meta
    assert constraint.value_all([w, w]).is_meta


@every_constraint
def test_the_prox_compiles_to_one_graph(constraint):
    torch.compiler.reset()
    w, steps = some(*SHAPE), metric(*SHAPE)
    compiled = torch.compile(constraint.prox, backend="eager", fullgraph=True)
    for step in (0.5, steps):
        assert torch.equal(compiled(w, step), constraint.prox(w, step))


# Groups that several tensors share

UNIT = torch.arange(6)
UNITS = Shared([Member("0.weight", 0, UNIT), Member("0.bias", 0, UNIT), Member("2.weight", 1, UNIT)])


def shared_weights(seed=0, dtype=F64):
    weights = [some(6, 4, seed=seed), some(6, seed=seed + 1), some(3, 6, seed=seed + 2)]
    for w, dim in zip(weights, (0, 0, 1), strict=True):
        w.select(dim, 2).zero_()
    return [w.to(dtype) for w in weights]


def as_rows(weights):
    """The same as one matrix, a row for each unit."""
    incoming, bias, outgoing = weights
    return torch.cat([incoming, bias[:, None], outgoing.T], 1)


@pytest.mark.parametrize("k", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_groups_are_the_rows_of_one_matrix(k, dtype):
    shared, rows = TopK(k, groups=UNITS), TopK(k, groups="rows")
    grads = shared_weights(seed=7, dtype=dtype)
    metrics = [metric(*w.shape).to(dtype) for w in grads]
    for steps in ([0.7] * 3, [0.7, 0.2, 1.5], [torch.tensor(0.7)] * 3, metrics):
        weights = shared_weights(dtype=dtype)
        full = [torch.as_tensor(t, dtype=dtype).expand(w.shape) for t, w in zip(steps, weights, strict=True)]
        expected = rows.prox(as_rows(weights), as_rows(full))
        shared.prox_all_(weights, steps)
        assert torch.equal(as_rows(weights), expected)
        assert shared.value_all(weights) == 0
        residual = as_rows(shared.residual_all(weights, grads))
        assert torch.equal(residual, rows.optimality_residual(expected, as_rows(grads)))
    assert shared.value_all(shared_weights()) == rows.value(as_rows(shared_weights()))
    assert shared.strengths_max(grads) == [rows.strength_max(as_rows(grads))]
    assert shared.strengths_max([0 * g for g in grads]) == [0]
    assert (shared.count(UNITS.total), shared.is_joint, shared.members()) == (k, True, UNITS.names)


def test_what_is_in_no_group_is_kept_and_not_counted():
    some_slices = Shared([Member("a", 0, torch.tensor([0, -1, 1, 2])), Member("b", 0, torch.tensor([2, 1, -1, 0]))])
    weights = [torch.tensor([3.0, 9.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.1, 0.0])]
    for k, expected in ((0, [[0, 9, 0, 0], [0, 0, 0.1, 0]]), (1, [[3, 9, 0, 0], [0, 0, 0.1, 0]])):
        moved = [w.clone() for w in weights]
        constraint = TopK(k, groups=some_slices)
        constraint.prox_all_(moved, [1.0, 1.0])
        assert [w.tolist() for w in moved] == [expected[0], pytest.approx(expected[1])]
        assert constraint.value_all(moved) == 0
        assert constraint.value_all(weights) == math.inf
        residuals = constraint.residual_all(moved, [torch.ones(4)] * 2)
        alone = torch.tensor(expected[0]) != 0
        assert torch.equal(residuals[0], alone.float())
        assert residuals[1].tolist() == [0, 0, 1, 1 if k else 0]


def test_of_the_parts_of_shared_groups_each_keeps_its_own_unless_they_are_ranked_together():
    first, last = torch.tensor([0, 1, 2, -1, -1]), torch.tensor([3, 4, -1])
    parts = Shared([Member("a", 0, first), Member("b", 0, last)], parts=(("x", 3), ("y", 2)))
    weights, g = (
        [torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])],
        [torch.ones(5), torch.ones(3)],
    )
    for constraint, expected in (
        (TopK(1, groups=parts), [[0, 0, 7, 8, 9], [0, 2, 3]]),
        (TopK(fraction=0.5, groups=parts), [[0, 6, 7, 8, 9], [0, 2, 3]]),
        (TopK(2, groups=parts, scope="rule"), [[0, 6, 7, 8, 9], [0, 0, 3]]),
        (TopK(fraction=0.8, groups=parts, scope="rule"), [[5, 6, 7, 8, 9], [0, 2, 3]]),
    ):
        moved = [w.clone() for w in weights]
        constraint.prox_all_(moved, [1.0, 1.0])
        assert [w.tolist() for w in moved] == expected
        assert (constraint.value_all(moved), constraint.value_all(weights)) == (0, math.inf)
        assert [r.tolist() for r in constraint.residual_all(moved, g)] == [[float(x != 0) for x in e] for e in expected]
    over, short = [torch.tensor([5.0, 6, 0, 0, 0]), torch.tensor([0.0, 0, 0])], TopK(1, groups=parts)
    assert [r.tolist() for r in short.residual_all(over, g)] == [[math.inf] * 3 + [1, 1], [1, 1, 1]]
    assert short.value_all(over) == math.inf


@pytest.mark.parametrize("make", [ProxSGD, ProxAdamW])
def test_units_that_a_model_shares_are_kept_or_removed_whole_and_training_resumes(make):
    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        reg = Regularizer(model, TopK(2, groups=UNITS))
        return model, reg, make(reg.param_groups(), lr=0.05)

    def train(model, opt, n):
        for _ in range(n):
            opt.zero_grad()
            model(torch.eye(4)).square().sum().backward()
            opt.step()

    model, reg, opt = started()
    assert [name for name, _, _ in reg.penalized()] == ["0.weight", "0.bias", "2.weight"]
    train(model, opt, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    train(model, opt, 5)
    again, _, resumed = started()
    state, opt_state = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    resumed.load_state_dict(opt_state)
    train(again, resumed, 5)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    rows = as_rows([model[0].weight, model[0].bias, model[2].weight])
    assert (rows != 0).any(1).sum() == 2
    assert torch.equal(rows.count_nonzero(1), 8 * (rows != 0).any(1))
    with torch.no_grad():
        assert reg() == 0
    assert [(e.count, e.alive) for e in group_sparsity(reg).entries] == [(6, 2)]
    assert torch.isfinite(kkt_residual(reg, lambda: model(torch.eye(4)).square().sum()))


def test_a_frozen_member_is_left_out_and_one_alone_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight.requires_grad_(False)
    reg = Regularizer(model, TopK(2, groups=UNITS))
    opt = ProxSGD(reg.param_groups(), lr=0.05)
    model(torch.eye(4)).square().sum().backward()
    opt.step()
    kept = model[0].weight.count_nonzero(1) > 0
    assert kept.sum() == 2
    assert torch.equal(model[0].bias != 0, kept)
    assert model[2].weight.count_nonzero() == 18
    w = torch.ones(6, 4)
    for method in (TopK(2, groups=UNITS).prox, TopK(2, groups=UNITS).value):
        with pytest.raises(ValueError, match="must be given together, got 1"):
            method(w)
    assert torch.equal(w, torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"Expected parameter '0\.weight' to have 6 slices"):
        Regularizer(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(6, 3)), TopK(2, groups=UNITS))


# 2:4 in hardware's terms


def test_the_input_dimension_is_that_of_linear_layers_and_convolutions():
    for layer, dim in ((nn.Linear(8, 6), 1), (nn.Conv1d(8, 6, 4), 1), (nn.Conv2d(8, 6, 4), 1), (nn.Conv3d(8, 6, 4), 1)):
        w = layer.weight.detach()
        v = NM(2, 4).prox(w)
        assert (v.movedim(dim, -1).reshape(-1, 4).count_nonzero(1) == 2).all()
        assert torch.equal(v, NM(2, 4, dim).prox(w))
    assert NM(1, 2).prox(torch.tensor([3.0, 4.0, 1.0, 1.0])).tolist() == [0, 4, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_packs_a_two_of_four_weight_without_loss(dtype):
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    w = some(64, 128).to(dtype)
    v = NM(2, 4).prox(w)
    again = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(v))
    assert torch.equal(again, v)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(w)), w)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's semi-structured kernels need CUDA")
def test_a_two_of_four_layer_runs_in_torchs_semi_structured_kernels():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("semi-structured kernels need compute capability 8.0")
    w = NM(2, 4).prox(some(128, 128).to("cuda", torch.float16))
    packed = torch.sparse.to_sparse_semi_structured(w)
    x = some(128, 128, seed=1).to("cuda", torch.float16)
    torch.testing.assert_close(nn.functional.linear(x, packed), nn.functional.linear(x, w), rtol=1e-2, atol=1e-2)


# Optimality


def test_the_residual_of_groups():
    grad = torch.tensor([[1.0, -2.0], [3.0, 0.5], [4.0, 5.0]])
    w = torch.tensor([[0.0, 0.0], [7.0, 0.0], [0.0, 0.0]])
    assert TopK(1, groups="rows").optimality_residual(w, grad).tolist() == [[0, 0], [3, 0.5], [0, 0]]
    assert torch.equal(TopK(2, groups="rows").optimality_residual(w, grad), grad.abs())
    w[0, 0] = 1
    assert TopK(1, groups="rows").optimality_residual(w, grad).isinf().all()
    assert TopK(1, groups="rows").value(w) == math.inf
    assert TopK(2, groups="rows").value(w) == 0


def test_the_residual_of_blocks():
    grad = torch.tensor([[1.0, -2.0, 3.0, 4.0]]).expand(3, 4)
    w = torch.tensor([[0.0, 5.0, 6.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 5.0, 6.0, 7.0]])
    residual = NM(2, 4).optimality_residual(w, grad)
    assert residual.tolist() == [[0, 2, 3, 0], [1, 2, 3, 4], [math.inf] * 4]
    assert NM(2, 4).value(w) == math.inf
    assert NM(2, 4).value(w[:2]) == 0
    assert NM(2, 4).strength_max(grad) == math.inf
    assert NM(2, 4).strength_max(0 * grad) == 0
    assert NM(2, 4).threshold(0.5) == 0


# Problems and routes


def regression(tasks=3, features=8, samples=60):
    x = some(samples, features)
    truth = some(tasks, features, seed=1) * torch.tensor([3, 0.1, 2, 0.2, 0.1, 4, 0.3, 2], dtype=F64)
    return x, x @ truth.T + 0.1 * some(samples, tasks, seed=2)


OPTIMIZERS = {
    "ProxSGD": (lambda groups: ProxSGD(groups, lr=0.01, momentum=0.9), False),
    "ProxAdamW": (lambda groups: ProxAdamW(groups, lr=0.1, weight_decay=0), True),
    "RMSprop": (lambda groups: Proximal(torch.optim.RMSprop(groups, lr=0.05)), True),
    "RMDA": (lambda groups: RMDA(groups, lr=0.1, momentum=0.0), False),
}


def solve(penalty, make, cool, steps=800, layers=1):
    x, y = regression()
    model = nn.ModuleList(nn.Linear(8 // layers, 3, bias=False, dtype=F64) for _ in range(layers))
    for layer in model:
        nn.init.zeros_(layer.weight)
    reg = Regularizer(model, penalty)
    optimizer = make(reg.param_groups())

    def closure():
        optimizer.zero_grad()
        parts = x.chunk(layers, dim=1)
        output = sum(layer(part) for layer, part in zip(model, parts, strict=True))
        loss = 0.5 * (output - y).square().sum() / len(x)
        loss.backward()
        return loss

    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=2.0 if cool else 0.0)
    for _ in range(steps):
        closure()
        optimizer.step()
        schedule.step()
    return [layer.weight.detach() for layer in model], reg, closure


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("constraint", "layers"),
    [(TopK(4, groups="columns"), 1), (NM(2, 4), 1), (TopK(4, scope="rule", groups="columns"), 2)],
    ids=["TopK", "NM", "TopK of a rule"],
)
def test_every_optimizer_refits_on_its_support(name, constraint, layers):
    weights, reg, closure = solve(constraint, *OPTIMIZERS[name], layers=layers)
    w = torch.cat(weights, dim=1)
    if isinstance(constraint, TopK):
        assert (w != 0).any(0).sum() == (w != 0).all(0).sum() == 4
    else:
        assert (w.reshape(-1, 4).count_nonzero(1) == 2).all()
    if name == "RMDA":  # averages all gradients: it keeps its support, and nears the fit on it slowly
        return
    assert kkt_residual(reg, closure) < 1e-6
    x, y = regression()
    for task in range(3):
        chosen = w[task] != 0
        refit = torch.linalg.lstsq(x[:, chosen], y[:, task : task + 1]).solution.squeeze()
        torch.testing.assert_close(w[task, chosen], refit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("constraint", [TopK(4, groups="columns"), NM(2, 4)], ids=repr)
def test_fista_refits_on_its_support(constraint):
    x, y = regression()
    w = nn.Parameter(torch.zeros(3, 8, dtype=F64))
    opt = FISTA([w], penalty=constraint, tolerance_kkt=1e-9)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (x @ w.T - y).square().sum() / len(x)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.converged
    assert constraint.value(w) == 0


@pytest.mark.parametrize("make", [ProxSGD, ProxAdamW])
@pytest.mark.parametrize(
    "constraint", [TopK(2, scope="rule", groups=Labels(torch.arange(4).reshape(4, 1))), NM(2, 4)], ids=str
)
def test_training_resumes_bit_for_bit(make, constraint):
    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4))
        return model, make(Regularizer(model, {"*.weight": constraint}).param_groups(), lr=0.05)

    def train(model, opt, n):
        for _ in range(n):
            opt.zero_grad()
            model(torch.eye(8)).square().sum().backward()
            opt.step()

    model, opt = started()
    train(model, opt, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    train(model, opt, 5)
    again, resumed = started()
    resumed.param_groups[0]["penalty"] = None
    state, opt_state = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    resumed.load_state_dict(opt_state)
    assert resumed.param_groups[0]["penalty"] == constraint
    train(again, resumed, 5)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert constraint.value_all([model[0].weight, model[2].weight]) == 0


@pytest.mark.parametrize("constraint", [TopK(1, groups="rows"), NM()], ids=repr)
def test_the_monitor_logs_and_a_target_and_gradient_routes_refuse(constraint):
    logged = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            logged[tag] = value

    model = nn.Linear(8, 4)
    reg = Regularizer(model, constraint)
    opt = ProxSGD(reg.param_groups(), lr=0.1)
    monitor = SparsityMonitor(reg, Writer(), every=1, optimizer=opt)
    model(torch.ones(1, 8)).sum().backward()
    opt.step()
    monitor.step()
    monitor.close()
    assert logged["loss/penalty"] == 0
    with pytest.raises(ValueError, match="has no gradient"):
        reg()
    with pytest.raises(ValueError, match="has no gradient"):
        reg.attach(torch.optim.SGD(model.parameters(), lr=0.1))


# As values


@every_constraint
def test_a_constraint_is_a_value(constraint):
    file = io.BytesIO()
    torch.save(constraint.to_dict(), file)
    file.seek(0)
    for again in (from_dict(torch.load(file, weights_only=True)), copy.deepcopy(constraint), constraint.to("cpu")):
        assert again == constraint
        assert hash(again) == hash(constraint)
    assert constraint.scaled(0.5) == constraint
    assert constraint.strengths() == {}
    assert TopK(2, groups="rows") == TopK(2, groups="out_channels") != TopK(2)
    assert NM() == NM(2, 4) != NM(2, 4, 1)


@pytest.mark.parametrize(
    ("penalty", "shown"),
    [(TopK(3, groups="rows"), "TopK k=3, groups=rows"), (NM(), "NM"), (NM(1, 2, 0), "NM n=1, m=2, dim=0")],
)
def test_the_table_shows_the_fields(penalty, shown):
    row = next(line for line in str(Regularizer(nn.Linear(4, 8), penalty)).splitlines() if "default" in line)
    assert row.split("default")[1].strip() == shown


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: TopK(2, groups="row"), ValueError, "Expected `groups` to be one of 'rows'"),
        (lambda: TopK(2, groups=3), TypeError, "Expected `groups` to be a name or a value of torchreg.groups, got int"),
        (lambda: NM(0, 4), ValueError, "Expected 1 ≤ `n` ≤ `m`, got n=0 and m=4."),
        (lambda: NM(5, 4), ValueError, "Expected 1 ≤ `n` ≤ `m`, got n=5 and m=4."),
        (lambda: NM(2.0, 4), TypeError, "Expected `n` to be an integer, got 2.0."),
        (lambda: NM(True, 4), TypeError, "Expected `n` to be an integer, got True."),
        (lambda: NM(2, None), TypeError, "Expected `m` to be an integer, got None."),
        (lambda: NM(2, 4, "in"), TypeError, "Expected `dim` to be an integer or None, got 'in'."),
    ],
)
def test_what_is_no_constraint_is_refused(make, error, said):
    with pytest.raises(error, match=re.escape(said)):
        make()


@pytest.mark.parametrize(
    ("constraint", "shape", "said"),
    [
        (NM(), (4, 6), "Expected m=4 of 2:4 sparsity to divide the size 6 of dimension 1 of the weight's shape (4, 6)"),
        (NM(1, 3, -1), (3, 4), "Expected m=3 of 1:3 sparsity to divide the size 4 of dimension 1"),
        (NM(dim=2), (4, 4), "Expected a weight with a dimension 2 for 2:4 sparsity, got (4, 4)."),
        (NM(), (), "Expected a weight with a dimension for 2:4 sparsity, got ()."),
        (TopK(1, groups=Blocks(3)), (4, 4), "Expected k=3 of Blocks"),
        (TopK(1, groups="columns"), (4,), "Expected a weight with a dimension 1 for the groups columns"),
    ],
)
def test_weights_that_do_not_fit_are_refused_everywhere_by_name(constraint, shape, said):
    w = torch.ones(shape)
    methods = (constraint.value, constraint.grad, constraint.prox, constraint.prox_, constraint.strength_max)
    for method in (*methods, constraint.check_weight, lambda w: constraint.prox_all_([w], [1.0])):
        with pytest.raises(ValueError, match=re.escape(said)):
            method(w)
        with pytest.raises(TypeError, match="floating point or complex, got a tensor"):
            method(w.long())
    layer = nn.Module()
    layer.weight = nn.Parameter(w)
    with pytest.raises(ValueError, match=re.escape(f"Parameter 'weight': {said}")):
        Regularizer(layer, {"weight": constraint})
    with pytest.raises(ValueError, match=re.escape(f"Parameter 0 of group 0: {said}")):
        ProxSGD([layer.weight], lr=0.1, penalty=constraint)
    assert torch.equal(w, torch.ones(shape))


@every_constraint
def test_what_is_no_step_is_refused(constraint):
    w = torch.ones(SHAPE)
    for step in (-1, math.nan, math.inf, torch.ones(5)):
        for method in (constraint.prox, constraint.prox_):
            with pytest.raises(ValueError, match="Expected `step`"):
                method(w, step)
    assert torch.equal(w, torch.ones(SHAPE))
