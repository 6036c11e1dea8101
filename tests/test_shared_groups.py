"""Groups that several parameters share."""

import copy
import io

import pytest
import torch
from descent import descend
from torch import nn

import torchreg
from torchreg import L1, GroupLasso, SparseGroupLasso, TopK, penalties
from torchreg.groups import Member, Shared
from torchreg.rules import WEIGHTS

UNIT = torch.arange(6)
UNITS = Shared([Member("0.weight", 0, UNIT), Member("0.bias", 0, UNIT), Member("2.weight", 1, UNIT)])
PENALTIES = {
    "GroupLasso": lambda groups: GroupLasso(0.3, groups),
    "GroupLasso-none": lambda groups: GroupLasso(0.6, groups, group_weight="none"),
    "SparseGroupLasso": lambda groups: SparseGroupLasso(0.1, 0.3, groups),
    "SparseGroupLasso-l2": lambda groups: SparseGroupLasso(0.1, 0.3, groups, l2=0.2),
}
make = pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)


def _weights(dtype=torch.float64, seed=0):
    """Six units with four inputs and three outputs; one of them is zero, and one small."""
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 4), (6,), (3, 6))]
    for w, dim in zip(weights, (0, 0, 1), strict=True):
        w.select(dim, 2).zero_()
        w.select(dim, 4).mul_(0.1)
    return [w.to(dtype) for w in weights]


def _rows(weights):
    """The same as one matrix, a row for each unit."""
    incoming, bias, outgoing = weights
    return torch.cat([incoming, bias[:, None], outgoing.T], 1)


def _apart(rows):
    return [rows[:, :4], rows[:, 4], rows[:, 5:].T]


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@make
def test_shared_groups_are_the_rows_of_one_matrix(make):
    shared, rows = make(UNITS), make("rows")
    weights, grads = _weights(), _weights(seed=1)
    assert torch.allclose(shared.value_all(weights), rows.value(_rows(weights)), rtol=1e-12)
    assert torch.allclose(_rows(shared.grad_all(weights)), rows.grad(_rows(weights)), rtol=1e-12)
    assert torch.allclose(
        _rows(shared.residual_all(weights, grads)), rows.optimality_residual(_rows(weights), _rows(grads)), rtol=1e-12
    )
    (strength,) = shared.strengths_max(grads)
    assert torch.allclose(strength, rows.strength_max(_rows(grads)), rtol=1e-12)


@make
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_their_prox_is_that_of_the_rows_also_in_a_diagonal_metric(make, dtype):
    metric = [0.2 + w.double().abs() for w in _weights(seed=2)]
    for steps in ([0.7, 0.7, 0.7], [0.7, 0.2, 1.5], metric, [torch.tensor(0.7)] * 3):
        weights = _weights(dtype)
        full = [torch.as_tensor(s, dtype=torch.float64).expand(w.shape) for s, w in zip(steps, weights, strict=True)]
        expected = make("rows").prox(_rows(weights).double(), _rows(full))
        make(UNITS).prox_all_(weights, steps)
        assert [w.dtype for w in weights] == [dtype] * 3
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert torch.allclose(_rows(weights).double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(_rows(weights)[[2, 4]] == 0, expected[[2, 4]] == 0)
        assert not any(torch.signbit(w[w == 0]).any() for w in weights)


def test_slices_in_no_group_are_left_to_the_other_parts():
    groups = Shared([Member("a", 0, torch.tensor([1, -1, 0, 1])), Member("b", 0, torch.tensor([0, -1]))])
    a, b = torch.tensor([0.1, 0.2, 3.0, 0.1]), torch.tensor([4.0, 0.3])
    for weights, kept in ((copy.deepcopy([a, b]), 0.2), (copy.deepcopy([a, b]), 0.1)):
        l1 = 0.2 - kept
        SparseGroupLasso(l1, 1.0, groups, group_weight="none").prox_all_(weights, [1.0, 1.0])
        assert weights[0][[0, 3]].tolist() == [0, 0]
        assert weights[0][1].item() == pytest.approx(kept)
        assert weights[1][1].item() == pytest.approx(0.3 - l1)
    assert GroupLasso(1.0, groups, group_weight="none").strengths_max([a, b])[0].item() == pytest.approx(5.0)
    assert GroupLasso(1.0, groups).value_all([a, b]).item() == pytest.approx(2**0.5 * (5 + 0.02**0.5))


def test_the_sizes_of_groups_count_all_their_weights():
    cut = UNITS.of_all([w.shape for w in _weights()])
    assert cut.sizes.tolist() == [4 + 1 + 3] * 6


def test_a_bare_penalty_selects_what_shares_its_groups():
    reg = torchreg.Regularizer(_model(), GroupLasso(1e-2, UNITS))
    assert [name for name, _, _ in reg.penalized()] == ["0.weight", "0.bias", "2.weight"]
    reg = torchreg.Regularizer(_model(), {UNITS: GroupLasso(1e-2, UNITS), "2.bias": L1(1e-3)})
    assert [penalty.type_name for _, _, penalty in reg.penalized()] == ["GroupLasso"] * 3 + ["L1"]


def test_what_an_earlier_rule_takes_is_left_out_of_its_groups():
    model = _model()
    reg = torchreg.Regularizer(model, {"*.bias": None, UNITS: GroupLasso(1.0, UNITS)})
    expected = torch.cat([model[0].weight, model[2].weight.T], 1).norm(dim=1).sum() * 7**0.5
    assert torch.allclose(reg(), expected)


def _two_layers():
    """The units of two layers as groups in parts, of which an earlier rule takes the first layer's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    members = [Member("0.weight", 0, UNIT), Member("2.weight", 0, 6 + UNIT[:5]), Member("2.bias", 0, 6 + UNIT[:5])]
    return model, Shared(members, parts=[("0", 6), ("2", 5)])


def test_a_group_whose_members_all_go_elsewhere_is_none():
    model, units = _two_layers()
    reg = torchreg.Regularizer(model, {"0.*": None, units: GroupLasso(0.1, units)})
    (entry,) = torchreg.group_sparsity(reg).entries
    assert (entry.name, entry.count, entry.alive) == ("2", 5, 5)
    rows = torch.cat([model[2].weight, model[2].bias[:, None]], 1)
    assert torch.allclose(reg(), 0.1 * 7**0.5 * rows.norm(dim=1).sum())
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert penalties.from_dict(state["param_groups"][0]["penalty"]) == optimizer.param_groups[0]["penalty"]


@pytest.mark.parametrize("scope", ["tensor", "rule"])
def test_a_fraction_is_of_the_groups_that_are_left(scope):
    model, units = _two_layers()
    reg = torchreg.Regularizer(model, {"0.*": None, units: TopK(fraction=0.4, groups=units, scope=scope)})
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1)
    model(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    assert torchreg.group_sparsity(reg).total.alive == 2


def test_parameters_that_share_groups_empty_at_one_strength():
    model, units = _two_layers()
    x = torch.randn(8, 4, dtype=torch.float64)

    def loss():
        return model(x).square().mean()

    def apart(strength):
        return torchreg.Regularizer(model, {units: GroupLasso(strength, units), "4.weight": L1(strength)})

    strengths = torchreg.strength_max(apart(0.1), loss, per_parameter=True)
    assert list(strengths) == ["0.weight", "2.weight", "2.bias", "4.weight"]
    assert strengths["2.weight"] == strengths["2.bias"]
    assert strengths["0.weight"] != strengths["2.weight"]
    strength = strengths["2.bias"]
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    grads = torch.autograd.grad(loss(), [model[2].weight, model[2].bias])
    for factor, alive in ((1 + 1e-9, False), (1 - 1e-9, True)):  # where 0 is a minimum, its prox step stays there
        rule = GroupLasso(strength * factor, units.bound(["2.weight", "2.bias"]))
        moved = [-g for g in grads]
        rule.prox_all_(moved, [1.0, 1.0])
        assert any(bool(w.any()) for w in moved) == alive


def test_the_order_of_members_does_not_matter():
    model = _model()
    turned = Shared(UNITS.members[::-1])
    assert torch.equal(
        torchreg.Regularizer(model, GroupLasso(1.0, UNITS))(), torchreg.Regularizer(model, GroupLasso(1.0, turned))()
    )


def test_a_frozen_member_is_left_out():
    model = _model()
    model[0].bias.requires_grad_(False)
    reg = torchreg.Regularizer(model, GroupLasso(50.0, UNITS))
    expected = torch.cat([model[0].weight, model[2].weight.T], 1).norm(dim=1).sum() * 50 * 7**0.5
    assert torch.allclose(reg(), expected)
    before = model[0].bias.clone()
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=1.0)
    model(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].bias, before)
    assert not model[0].weight.any()
    assert not model[2].weight.any()


@make
def test_the_loss_term_and_the_hook_add_the_same_gradient(make):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).double()
    by_term, by_hook = _model(), _model()
    reg = torchreg.Regularizer(by_term, make(UNITS))
    optimizer = torch.optim.SGD(by_term.parameters(), lr=0.1)
    (by_term(x).square().mean() + reg()).backward()
    optimizer.step()
    other = torch.optim.SGD(by_hook.parameters(), lr=0.1)
    torchreg.Regularizer(by_hook, make(UNITS)).attach(other)
    by_hook(x).square().mean().backward()
    data = [p.grad.clone() for p in by_hook.parameters()]
    other.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(by_hook.parameters(), data, strict=True))
    for p, q in zip(by_term.parameters(), by_hook.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12)


OPTIMIZERS = {
    "ProxSGD": lambda groups: torchreg.ProxSGD(groups, lr=0.05, momentum=0.9),
    "ProxAdamW": lambda groups: torchreg.ProxAdamW(groups, lr=0.05, weight_decay=0.0),
    "Proximal": lambda groups: torchreg.Proximal(torch.optim.SGD(groups, lr=0.05, momentum=0.9)),
    "FISTA": lambda groups: torchreg.FISTA(groups),
}


@pytest.mark.parametrize("make", [PENALTIES["GroupLasso"], PENALTIES["SparseGroupLasso-l2"]], ids=["group", "sparse"])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_reach_the_minimum_of_the_problem_with_rows(make, build):
    """min ‖A(W | b | Uᵀ) − Y‖²/2n by its parts, and as one matrix by proximal gradient."""
    g = torch.Generator().manual_seed(4)
    a, y = (torch.randn(40, n, generator=g, dtype=torch.float64) for n in (6, 8))
    y[:, :4] += 3 * a[:, :1]
    smooth = torch.linalg.eigvalsh(a.T @ a / 40)[-1].item()
    rows, penalty = torch.zeros(6, 8, dtype=torch.float64), make("rows")
    for _ in range(500):
        rows = penalty.prox(rows - a.T @ (a @ rows - y) / 40 / smooth, 1 / smooth)
    model = _model()
    parts = [model[0].weight, model[0].bias, model[2].weight]
    reg = torchreg.Regularizer(model, make(UNITS))

    def loss():
        optimizer.zero_grad()
        value = (a @ _rows(parts) - y).square().sum() / 80
        value.backward()
        return value

    optimizer = build(reg.param_groups())
    with torch.no_grad():
        model[2].bias.zero_()
    adam = isinstance(optimizer, torchreg.ProxAdamW)
    for steps in (1,) if isinstance(optimizer, torchreg.FISTA) else (600, 300, 300):
        descend(lambda: optimizer.step(loss), parts, steps, still=0 if adam else 1e-14)
        if adam:
            for group in optimizer.param_groups:
                group["lr"] /= 10
    found = _rows(parts)
    assert torch.equal((found == 0).all(1), (rows == 0).all(1))
    assert (rows == 0).all(1).any()
    assert torch.allclose(found, rows, atol=1e-5)
    assert torchreg.kkt_residual(reg, loss) < 1e-5


def test_checkpoints_carry_the_groups():
    def build():
        model = _model()
        return model, torchreg.ProxSGD(torchreg.Regularizer(model, GroupLasso(0.1, UNITS)).param_groups(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 4).double()).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = build()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (other, resumed)):
        step(m, o)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert resumed.param_groups[0]["penalty"] == GroupLasso(0.1, UNITS)


def test_the_dict_form_leads_back():
    groups = Shared([Member("a", 1, torch.tensor([1, -1, 0])), Member("b", 0, torch.arange(2))], parts=[("x", 2)])
    penalty = SparseGroupLasso(0.1, 0.2, groups)
    assert penalties.from_dict(penalty.to_dict()) == penalty
    assert hash(penalties.from_dict(penalty.to_dict())) == hash(penalty)
    assert penalties.from_dict(penalty.to_dict()) != SparseGroupLasso(0.1, 0.2, UNITS)


def test_a_handle_saves_and_loads_them():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = torchreg.Regularizer(model, GroupLasso(0.1, UNITS)).attach(optimizer)
    state = handle.state_dict()
    handle.load_state_dict(state)
    assert handle.regularizer.assignments[0].penalty == GroupLasso(0.1, UNITS)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"'0.bias' is a member twice"):
        Shared([Member("0.bias", 0, torch.arange(6)), Member("0.bias", 0, torch.arange(6))])
    with pytest.raises(ValueError, match="at least one parameter"):
        Shared([])
    with pytest.raises(ValueError, match="Group 1 of 3 has no slice"):
        Shared([Member("a", 0, torch.tensor([0, 2]))])
    with pytest.raises(ValueError, match="to have 6 groups together, got 7"):
        Shared([Member("a", 0, UNIT)], parts=[("x", 6), ("y", 1)])
    for parts in ([("x",)], [6], ["ab", "c"]):
        with pytest.raises(TypeError, match="pairs of a name and a number of groups"):
            Shared([Member("a", 0, UNIT)], parts=parts)
    with pytest.raises(ValueError, match="label -2"):
        Member("a", 0, torch.tensor([0, -2]))
    with pytest.raises(TypeError, match="int64 vector"):
        Member("a", 0, torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"shared by 'nowhere', which is no parameter"):
        torchreg.Regularizer(_model(), GroupLasso(1.0, Shared([*UNITS.members, Member("nowhere", 0, torch.arange(6))])))
    with pytest.raises(ValueError, match=r"'0.weight' to have 5 slices along dimension 0"):
        torchreg.Regularizer(_model(), GroupLasso(1.0, Shared([Member("0.weight", 0, torch.arange(5))])))
    with pytest.raises(ValueError, match=r"'2.bias' has no part in groups shared by"):
        torchreg.Regularizer(_model(), {"*": GroupLasso(1.0, UNITS)})
    with pytest.raises(ValueError, match="shared by the 3 parameters"):
        GroupLasso(1.0, UNITS).prox(torch.ones(6, 4))
    with pytest.raises(ValueError, match="shared by the 3 parameters"):
        torchreg.ProxSGD([{"params": [nn.Parameter(torch.ones(6, 4))], "penalty": GroupLasso(1.0, UNITS)}], lr=0.1)


def test_other_weights_may_have_other_penalties():
    model = _model()
    reg = torchreg.Regularizer(model, [(Shared(UNITS.members[:2]), GroupLasso(0.1, UNITS)), (WEIGHTS, L1(0.2))])
    assert [penalty.type_name for _, _, penalty in reg.penalized()] == ["GroupLasso", "GroupLasso", "L1"]


@pytest.mark.parametrize("k", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("metric", [False, True])
def test_at_most_k_shared_groups_are_kept(k, metric):
    steps = [0.2 + w.abs() for w in _weights(seed=2)] if metric else [0.7] * 3
    full = [torch.as_tensor(s, dtype=torch.float64).expand(w.shape) for s, w in zip(steps, _weights(), strict=True)]
    weights, rows = _weights(), _rows(_weights())
    penalty = TopK(k, groups=UNITS)
    penalty.prox_all_(weights, steps)
    expected = TopK(k, groups="rows").prox(rows, _rows(full) if metric else 0.7)
    assert torch.equal(_rows(weights), expected)
    assert penalty.value_all(weights) == 0
    assert penalty.value_all(_weights()) == (torch.inf if k < 5 else 0)
    grads = _weights(seed=1)
    found = penalty.residual_all(weights, grads)
    assert torch.equal(_rows(found), TopK(k, groups="rows").optimality_residual(expected, _rows(grads)))


def test_a_bare_constraint_on_shared_groups_selects_them():
    model = _model()
    optimizer = torchreg.ProxSGD(torchreg.Regularizer(model, TopK(2, groups=UNITS)).param_groups(), lr=0.1)
    model(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    alive = _rows([model[0].weight, model[0].bias, model[2].weight]).any(1)
    assert alive.sum() == 2
    assert model[2].bias.all()
