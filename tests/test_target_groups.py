"""A target for the fraction of zeros where groups of weights become zero together."""

import warnings

import pytest
import torch
from torch import nn

import torchreg
from torchreg import L1, GroupLasso, SparseGroupLasso
from torchreg.groups import Member, Shared

OPTIMIZERS = {
    "ProxSGD": lambda groups: torchreg.ProxSGD(groups, lr=0.05, momentum=0.9),
    "ProxAdamW": lambda groups: torchreg.ProxAdamW(groups, lr=0.003),
    "Proximal": lambda groups: torchreg.Proximal(torch.optim.RMSprop(groups, lr=0.001)),
}
UNIT = torch.arange(50)
UNITS = Shared([Member("0.weight", 0, UNIT), Member("0.bias", 0, UNIT), Member("2.weight", 1, UNIT)])
RULES = {
    "rows": {"0.weight": GroupLasso(1e-3, "rows")},
    "columns and rows": {"0.weight": GroupLasso(1e-3, "rows"), "2.weight": GroupLasso(1e-3, "columns")},
    "units": GroupLasso(1e-3, UNITS),
    "sparse": {"0.weight": SparseGroupLasso(1e-3, 1e-3, "rows")},
    "mixed": {"0.weight": GroupLasso(1e-3, "rows"), "2.weight": L1(1e-3)},
}


def _run(build, rules, target, steps=60, seed=0, of="weights"):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 4))
    x = torch.randn(200, 20)
    y = torch.stack([x[:, i] * x[:, i + 1] for i in range(4)], 1)
    optimizer = build(torchreg.Regularizer(model, rules).param_groups())
    aim = torchreg.TargetSparsity(optimizer, target, until=40, of=of)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        aim.step()
    return model, aim


@pytest.mark.pairs
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("target", [0.5, 0.83])
def test_the_target_is_kept_but_for_half_a_group(build, rules, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, aim = _run(build, rules, target)
    assert abs(aim.reached()["all"] - target) <= 0.005 + 0.5 / 50


def test_whole_groups_are_zero():
    model, _ = _run(OPTIMIZERS["ProxSGD"], RULES["units"], 0.6)
    dead = (model[0].weight == 0).all(1)
    assert dead.sum() == 30
    assert torch.equal(dead, model[0].bias == 0)
    assert torch.equal(dead, (model[2].weight == 0).all(0))


def test_a_sample_of_the_weights_gives_the_same_as_all_within_its_error(monkeypatch):
    monkeypatch.setattr(torchreg.target, "SAMPLE", 400)
    _, aim = _run(OPTIMIZERS["ProxAdamW"], RULES["rows"], 0.7)
    assert abs(aim.reached()["all"] - 0.7) < 0.04


@pytest.mark.parametrize("groups", ["rows", "columns", "tensor"])
@pytest.mark.parametrize("step", [0.3, "tensor"])
@pytest.mark.parametrize("l1", [0.0, 0.2])
def test_a_scale_below_the_given_one_keeps_a_weight_and_one_above_zeroes_it(groups, step, l1):
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tau = 0.3 * torch.ones_like(w) if step == 0.3 else 0.2 + torch.rand(5, 4, dtype=torch.float64)
    penalty = SparseGroupLasso(l1, 0.4, groups)
    (scales,) = penalty.zeroing_scales([w], [tau if step == "tensor" else step])
    for i in range(w.numel()):
        for factor, zero in ((1 + 1e-9, True), (1 - 1e-9, False)):
            shrunk = penalty.prox(w, scales.flatten()[i] * factor * tau)
            assert bool(shrunk.flatten()[i] == 0) is zero


@pytest.mark.parametrize(("rows", "columns", "count"), [(50, 20, 400), (64, 64, 512), (30, 7, 60), (1000, 10, 137)])
def test_a_sample_is_spread_evenly_over_rows_and_columns(rows, columns, count):
    index = torchreg.sampling.spread(rows * columns, count, torch.device("cpu"))
    assert len(index.unique()) == count
    in_rows = torch.bincount(index // columns, minlength=rows)
    in_columns = torch.bincount(index % columns, minlength=columns)
    assert in_rows.max() - in_rows.min() <= 2
    assert in_columns.max() - in_columns.min() <= 0.5 * count / columns + 3


@pytest.mark.parametrize("rules", [RULES["columns and rows"], RULES["units"], RULES["sparse"]], ids=str)
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_target_may_be_a_fraction_of_the_groups(build, rules):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, aim = _run(build, rules, 0.62, of="groups")
    assert abs(aim.reached()["all"] - 0.62) <= 0.01
    report = torchreg.group_sparsity(torchreg.Regularizer(model, rules))
    assert report.fraction == pytest.approx(aim.reached()["all"])


@pytest.mark.parametrize("frozen", [True, False])
def test_groups_of_frozen_weights_do_not_count(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 5))
    units = Shared(
        [Member("0.weight", 0, torch.arange(30)), Member("2.weight", 0, 30 + torch.arange(5))],
        parts=[("0", 30), ("2", 5)],
    )
    model[0].requires_grad_(not frozen)
    rules = GroupLasso(1e-3, units) if frozen else {"0.*": None, units: GroupLasso(1e-3, units)}
    optimizer = torchreg.ProxSGD(torchreg.Regularizer(model, rules).param_groups(), lr=0.1)
    aim = torchreg.TargetSparsity(optimizer, 0.5, until=5, of="groups")
    assert aim.reached() == {"all": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # half of five is missed by half a group, which is no reason to warn
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            aim.step()
    assert (model[2].weight == 0).all(1).sum() in (2, 3)


def test_a_target_of_groups_wants_groups():
    w = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="has L1, which has no groups"):
        torchreg.TargetSparsity(torchreg.ProxSGD([w], lr=0.1, penalty=L1(1.0)), 0.5, until=3, of="groups")
    with pytest.raises(ValueError, match="`of` to be 'weights' or 'groups', got 'rows'"):
        torchreg.TargetSparsity(torchreg.ProxSGD([w], lr=0.1, penalty=L1(1.0)), 0.5, until=3, of="rows")
