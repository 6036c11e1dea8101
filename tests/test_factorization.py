"""Factors with L2 solve the lasso, go in and out of a model without a trace, and refuse what they can't be."""

import copy
import io
import re

import pytest
import torch
from descent import descend
from torch import nn

import torchreg
from torchreg import L1, L2, ElasticNet, ProxSGD, Regularizer, defactorize, factorize, rules

F64 = torch.float64


def lasso_problem():
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.make_regression(n_samples=60, n_features=12, n_informative=4, noise=5.0, random_state=0)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.as_tensor(x), torch.as_tensor(y)


def sklearn_lasso(x, y, strength):
    from sklearn.linear_model import Lasso

    solved = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    return torch.as_tensor(solved.coef_)


def linear_model(features=12):
    torch.manual_seed(0)
    return nn.Linear(features, 1, bias=False, dtype=F64)


def objective(w, x, y, strength):
    return float((x @ w.flatten() - y).square().mean() / 2 + strength * w.abs().sum())


def fit(model, optimizer, reg, x, y, steps, route="loss"):
    def closure():
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean() / 2
        if route == "loss":
            loss = loss + reg()
        loss.backward()
        return loss

    descend(lambda: optimizer.step(closure), model.parameters(), steps, still=1e-7)


# It is the lasso


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("solver", ["SGD", "LBFGS", "hook", "weight decay", "ProxSGD"])
def test_l2_on_the_factors_is_l1_on_the_weight(solver, strength):
    x, y = lasso_problem()
    expected = sklearn_lasso(x, y, strength)
    model = linear_model()
    reg = factorize(model, L1(strength))
    parameters = list(model.parameters())
    if solver == "LBFGS":
        optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", max_iter=500, tolerance_change=0)
        fit(model, optimizer, reg, x, y, 3)
    elif solver == "weight decay":
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=strength)
        fit(model, optimizer, reg, x, y, 2500, route="none")
    elif solver == "ProxSGD":
        optimizer = ProxSGD(reg.param_groups(), lr=0.05, momentum=0.9)
        fit(model, optimizer, reg, x, y, 2500, route="none")
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        handle = reg.attach(optimizer) if solver == "hook" else None
        fit(model, optimizer, reg, x, y, 2500, route="none" if handle else "loss")
    weight = defactorize(model).weight.detach().flatten()
    best = objective(expected, x, y, strength)
    assert best - 1e-9 < objective(weight, x, y, strength) < best * (1 + 1e-4)
    assert weight[expected == 0].abs().max() < 1e-4 if (expected == 0).any() else True
    torch.testing.assert_close(weight, expected, rtol=0, atol=2e-3)


def test_weights_of_their_own_strengths():
    x, y = lasso_problem()
    strengths = torch.full((1, 12), 0.05, dtype=F64)
    strengths[0, :6] = 0.5
    model, direct = linear_model(), linear_model()
    reg = factorize(model, L1(strengths))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), reg, x, y, 2500)
    prox = ProxSGD(Regularizer(direct, L1(strengths)).param_groups(), lr=0.05, momentum=0.9)
    fit(direct, prox, None, x, y, 2500, route="none")
    torch.testing.assert_close(defactorize(model).weight, direct.weight, rtol=0, atol=2e-3)


def test_once_balanced_the_penalty_is_that_of_the_weight():
    x, y = lasso_problem()
    model = linear_model()
    reg = factorize(model, L1(0.1))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), reg, x, y, 2500)
    assert reg().item() == pytest.approx(0.1 * model.weight.abs().sum().item(), rel=1e-6)


def test_a_threshold_makes_exact_zeros():
    x, y = lasso_problem()
    model = linear_model()
    reg = factorize(model, L1(0.1))
    fit(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), reg, x, y, 2500)
    weight = defactorize(model, threshold=1e-4).weight.detach().flatten()
    assert torch.equal(weight == 0, sklearn_lasso(x, y, 0.1) == 0)
    assert not torch.signbit(weight[weight == 0]).any()


# In and out


@pytest.mark.parametrize(("dtype", "ulps"), [(F64, 1), (torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 1)])
def test_the_way_there_and_back_costs_a_unit_in_the_last_place(dtype, ulps):
    torch.manual_seed(0)
    model = nn.Linear(300, 200).to(dtype)
    with torch.no_grad():
        model.weight[:, ::7] = 0
        model.weight *= torch.logspace(-2, 2, 200, dtype=F64)[:, None].to(dtype)
    before = model.weight.detach().clone()
    factorize(model, L1(0.1))
    there = model.weight.detach()
    assert there.dtype == dtype
    unit = torch.finfo(dtype).eps * before.double().abs()
    assert ((there.double() - before.double()).abs() <= ulps * unit).all()
    assert torch.equal(there == 0, before == 0)
    defactorize(model)
    assert torch.equal(model.weight, there)


def test_a_weight_can_change_its_sign():
    model = linear_model(4)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-4.0, 0.0, 0.25, 1.0]]))
    factorize(model, L1(0.1))
    u, v = (p.detach() for p in model.parametrizations.weight.parameters())
    torch.testing.assert_close(u**2 - v**2, torch.full((1, 4), 5.25 / 4, dtype=F64))


@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0])
def test_a_weight_of_equal_entries_can_change_its_sign(fill):
    model = linear_model(4)
    nn.init.constant_(model.weight, fill)
    factorize(model, L1(1e-3))
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), fill, dtype=F64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for wanted in (-2.0, 2.0):
        for _ in range(200):
            optimizer.zero_grad()
            (model.weight - wanted).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), wanted, dtype=F64), rtol=1e-3, atol=0)


def test_afterwards_the_model_is_as_before():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    names, kinds = [n for n, _ in model.named_parameters()], [type(m) for m in model]
    reg = factorize(model, L1(0.1))
    assert "0.parametrizations.weight.original1" in dict(model.named_parameters())
    assert defactorize(model) is model
    assert sorted(n for n, _ in model.named_parameters()) == sorted(names)
    assert [type(m) for m in model] == kinds
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.is_leaf
    assert model[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="no longer in the model"):
        reg()


def test_other_layers_run_as_before():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dtype=F64)
    x = torch.randn(5, 3, 8, dtype=F64)
    before = attention(x, x, x)[0]
    factorize(attention, L1(0.1))
    torch.testing.assert_close(attention(x, x, x)[0], before)
    with torch.no_grad():
        torch.testing.assert_close(attention.eval()(x, x, x)[0], before)


def test_checkpoints_copies_and_frozen_weights():
    model = linear_model()
    factorize(model, L1(0.1))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = nn.Linear(12, 1, bias=False, dtype=F64)
    factorize(again, L1(0.1))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.weight, model.weight)
    twin = copy.deepcopy(model)
    assert torch.equal(defactorize(twin).weight, model.weight)
    for p in model.parameters():
        p.requires_grad_(False)
    defactorize(model)
    assert isinstance(model.weight, nn.Parameter)
    assert not model.weight.requires_grad


def test_a_shared_layer_is_factorized_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    factorize(model, L1(0.1))
    assert len(list(model.parameters())) == 3
    defactorize(model)


# The rules


def test_rules_choose_and_name_the_factors():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    reg = factorize(model, {"2.*": None, "1.weight": L1(0.3), re.compile("weight"): L1(0.1)})
    assert [(name, penalty) for name, _, penalty in reg.penalized()] == [
        ("0.parametrizations.weight.original0", L2(0.05)),
        ("0.parametrizations.weight.original1", L2(0.05)),
    ]
    assert [group.get("name") for group in reg.param_groups()] == ["re 'weight'", None]
    assert not hasattr(model[1], "parametrizations")
    assert "re 'weight'" in str(reg)


def test_a_schedule_moves_the_factors_strength():
    model = linear_model()
    reg = factorize(model, {"weight": L1(0.1)})
    optimizer = ProxSGD(reg.param_groups(), lr=0.1)
    torchreg.schedules.LinearStrength(optimizer, until=2, start=0.5, groups="weight")
    assert reg.strength_scale == 0.5


def test_the_default_selection_goes_on_refusing_originals():
    model = linear_model()
    factorize(model, L1(0.1))
    for bare in (L1(0.1), {rules.WEIGHTS: L1(0.1)}):
        with pytest.raises(ValueError, match="original of a parametrization"):
            Regularizer(model, bare)
    with pytest.raises(ValueError, match="original of a parametrization"):
        factorize(model, L1(0.1))
    other = linear_model()
    nn.utils.parametrizations.weight_norm(other)
    with pytest.raises(ValueError, match="original of a parametrization"):
        Regularizer(other, {"*original1": L1(0.1)})


# Bad input


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def frozen():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (linear_model, L2(0.1), ValueError, "to give L1, got L2 for 'weight'"),
        (linear_model, ElasticNet(0.1, 0.1), ValueError, "got ElasticNet"),
        (linear_model, {"wieght": L1(0.1)}, ValueError, "closest: 'weight'"),
        (linear_model, "weight", TypeError, "rules"),
        (linear_model, {"weight": None}, ValueError, "select no trainable weight"),
        (frozen, L1(0.1), ValueError, "select no trainable weight"),
        (tied, L1(0.1), ValueError, "'0.weight' is tied"),
        (lambda: nn.LSTM(3, 2), L1(0.1), ValueError, "recurrent"),
        (lambda: 3, L1(0.1), TypeError, "nn.Module"),
    ],
)
def test_what_cannot_be_factorized_is_refused(make, given, error, message):
    with pytest.raises(error, match=message):
        factorize(make(), given)


def test_a_refusal_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 2))
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="recurrent"):
        factorize(model, L1(0.1))
    assert [n for n, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    ("threshold", "error"), [(-1.0, ValueError), (float("nan"), ValueError), ("0", TypeError), (True, TypeError)]
)
def test_a_bad_threshold_is_refused(threshold, error):
    model = linear_model()
    factorize(model, L1(0.1))
    with pytest.raises(error, match="`threshold`"):
        defactorize(model, threshold)
    defactorize(model)


def test_what_is_not_factorized_is_refused():
    with pytest.raises(ValueError, match="No weight"):
        defactorize(linear_model())
    with pytest.raises(TypeError, match=r"nn\.Module"):
        defactorize(3)
    model = nn.Sequential(linear_model(), linear_model())
    factorize(model, L1(0.1))
    nn.utils.parametrizations.spectral_norm(model[1])
    with pytest.raises(ValueError, match=r"'1.weight' has another parametrization"):
        defactorize(model)
    assert hasattr(model[0], "parametrizations")
