"""How far from optimal, and from which strength on everything is zero; the model is left as it was."""

import copy
import math
import re

import pytest
import torch
from descent import descend
from penalty_table import every_penalty
from torch import nn

import torchreg
from torchreg import L1, L2, ElasticNet, ProxSGD, Regularizer, kkt_residual, strength_max

F64 = torch.float64


def regression(n=30, p=6):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, k, dtype=F64, generator=generator) for k in (p, 1))
    return x, y + 2 * x[:, :1]


def problem():
    """A linear model without intercept, and the closure of its squared error."""
    torch.manual_seed(0)
    x, y = regression()
    model = nn.Linear(6, 1, bias=False, dtype=F64)
    return model, lambda: 0.5 * (model(x) - y).square().mean()


def network():
    """A network with everything that a closure could disturb, and its closure."""
    torch.manual_seed(0)
    x, y = regression()
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).to(F64)
    return model, lambda: 0.5 * (model(x) - y).square().mean()


def minimise(model, closure, penalty, steps=2000):
    optimizer = ProxSGD(Regularizer(model, penalty).param_groups(), lr=0.3)

    def step():
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    descend(step, model.parameters(), steps)


def snapshot(model):
    return copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()], dict(model.named_buffers())


def assert_unchanged(model, before):
    state, grads, buffers = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


# The KKT residual


@every_penalty
def test_the_residual_is_zero_at_the_optimum_and_not_beside_it(case):
    model, closure = problem()
    minimise(model, closure, case.penalty(0.3))
    reg = Regularizer(model, case.penalty(0.3))
    assert kkt_residual(reg, closure) < 1e-12
    with torch.no_grad():
        model.weight[0, 0] += 0.1
    assert kkt_residual(reg, closure) > 1e-2


def test_the_residual_is_the_largest_violation_over_all_parameters():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.0]]))
    reg = Regularizer(model, {"0.weight": L1(0.5)})
    model[0].weight.grad = torch.tensor([[-0.25, 0.6]])
    assert kkt_residual(reg).item() == pytest.approx(0.25)
    reg.strength_scale = 0.5
    assert kkt_residual(reg).item() == pytest.approx(0.35)
    model[1].bias.grad = torch.tensor([-3.0])
    assert kkt_residual(reg).item() == 3
    model[1].bias.requires_grad_(False)
    assert kkt_residual(reg).item() == pytest.approx(0.35)
    model[0].weight.grad[0, 0] = math.nan
    assert kkt_residual(reg).isnan()


@pytest.mark.parametrize("route", ["prox", "hook", "loss term"])
def test_the_residual_is_the_same_on_every_route(route):
    model, closure = problem()
    reg = Regularizer(model, L2(0.2))
    make, params = (ProxSGD, reg.param_groups()) if route == "prox" else (torch.optim.SGD, model.parameters())
    optimizer = make(params, lr=0.3)
    if route == "hook":
        reg.attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        loss = closure()
        (loss + reg() if route == "loss term" else loss).backward()
        optimizer.step()
    assert kkt_residual(reg, closure) < 1e-12
    if route != "loss term":
        assert kkt_residual(reg) < 1e-12  # .grad holds the data's gradient also after the step


def test_gradients_from_grad_and_from_a_closure_agree():
    model, closure = network()
    reg = Regularizer(model, ElasticNet(0.1, 0.2))

    def with_backward():
        loss = closure()
        loss.backward()
        return loss

    expected = kkt_residual(reg, closure)
    assert all(p.grad is None for p in model.parameters())
    assert kkt_residual(reg, with_backward) == expected
    assert kkt_residual(reg, lambda: with_backward() and None) == expected
    assert kkt_residual(reg, lambda: closure().reshape(1)) == expected
    assert all(p.grad is None for p in model.parameters())
    closure().backward()
    assert kkt_residual(reg) == expected


def test_a_closures_backward_that_reaches_only_other_parameters_counts():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    reg = Regularizer(model, {"idle.weight": L1(0.1)})

    def closure():
        loss = model["used"](torch.ones(1, 2)).exp().sum()
        loss.backward()
        return loss

    assert kkt_residual(reg, closure) == model["used"](torch.ones(1, 2)).exp()
    with pytest.raises(ValueError, match="The closure's loss does not depend on the penalised parameters"):
        strength_max(reg, closure)


def test_the_residual_of_sparse_gradients_half_precision_and_complex_weights():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 2, sparse=True),
            "low": nn.Linear(2, 2, bias=False, dtype=torch.bfloat16),
            "phase": nn.Linear(2, 2, bias=False, dtype=torch.complex64),
        }
    )
    reg = Regularizer(model, L1(0.5))

    def closure():
        outputs = [model["embed"](torch.tensor([1, 1])), model["low"].weight.float(), model["phase"].weight.abs()]
        return sum(2 * output.sum() for output in outputs)

    residual = kkt_residual(reg, closure)
    assert residual.dtype == torch.float32
    assert residual == 4


def test_residual_without_gradients_is_an_error():
    model, _ = problem()
    reg = Regularizer(model, L1(0.1))
    for closure in (None, lambda: torch.tensor(1.0), lambda: torch.ones((), requires_grad=True)):
        with pytest.raises(
            ValueError, match=r"No parameter has a gradient: call backward\(\) on the data's loss first"
        ):
            kkt_residual(reg, closure)


@pytest.mark.parametrize("returned", [None, 1.0, torch.ones(2)], ids=str)
@pytest.mark.parametrize("function", [kkt_residual, strength_max])
def test_a_closure_without_a_loss_is_an_error(function, returned):
    model, _ = problem()
    with pytest.raises(ValueError, match="Expected the closure to return the loss, a tensor of one element"):
        function(Regularizer(model, L1(0.1)), lambda: returned)


# The model is left as it was


class Renewing(nn.Module):
    """A layer that puts new tensors in place of its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, dtype=F64))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


@pytest.mark.parametrize("how", ["returns", "calls backward", "raises"])
@pytest.mark.parametrize("grads", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize(
    "function", [kkt_residual, strength_max, lambda *a: strength_max(*a, per_parameter=True)], ids=["kkt", "max", "per"]
)
def test_weights_gradients_and_buffers_are_left_as_they_were(function, grads, how):
    model, closure = network()
    model.append(Renewing())
    if grads:
        closure().backward()
    before = snapshot(model)
    values = [None if g is None else g.clone() for g in before[1]]

    def disturbing():
        loss = closure()
        if how == "calls backward":
            loss.backward()
        if how == "raises":
            raise KeyboardInterrupt
        return loss

    if how == "raises":
        with pytest.raises(KeyboardInterrupt):
            function(Regularizer(model, L1(0.1)), disturbing)
    else:
        with torch.no_grad():
            function(Regularizer(model, L1(0.1)), disturbing)
    assert_unchanged(model, before)
    assert all(g is None or torch.equal(g, v) for g, v in zip(before[1], values, strict=True))


# The largest useful strength


@pytest.mark.parametrize("make", [L1, lambda s: ElasticNet(s, 0.3)], ids=["L1", "ElasticNet"])
def test_the_lasso_is_empty_just_above_strength_max_and_not_just_below(make):
    for factor, empty in ((1.001, True), (0.999, False)):
        model, closure = problem()
        largest = strength_max(Regularizer(model, make(123.0)), closure)
        assert isinstance(largest, float)
        minimise(model, closure, make(factor * largest))
        assert (model.weight.count_nonzero() == 0) == empty


def test_strength_max_is_the_gradients_largest_modulus_at_zero():
    x, y = regression()
    model, closure = problem()
    expected = (x.T @ y / len(y)).abs().max().item()
    assert strength_max(Regularizer(model, L1(0.1)), closure) == pytest.approx(expected, rel=1e-12)
    assert strength_max(Regularizer(model, L1(0.0)), closure) == pytest.approx(expected, rel=1e-12)
    assert strength_max(Regularizer(model, L2(0.1)), closure) == math.inf


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_strength_max_is_beside_the_strength_scale(scale):
    model, closure = problem()
    reg = Regularizer(model, L1(0.1))
    reg.strength_scale = scale
    largest = strength_max(reg, closure)
    assert strength_max(reg, closure, per_parameter=True) == {"weight": largest}
    nn.init.zeros_(model.weight)
    for factor, optimal in ((1.001, True), (0.999, False)):
        again = Regularizer(model, L1(factor * largest))
        again.strength_scale = scale
        assert (kkt_residual(again, closure) == 0) == optimal


def test_no_strength_is_enough_at_scale_zero_but_where_the_gradient_is_zero():
    model = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "idle": nn.Linear(1, 1, bias=False)})
    reg = Regularizer(model, L1(0.1))
    reg.strength_scale = 0.0

    def closure():
        return 3 * model["used"].weight.sum() + 0 * model["idle"].weight.sum()

    assert strength_max(reg, closure) == math.inf
    assert strength_max(reg, closure, per_parameter=True) == {"used.weight": math.inf, "idle.weight": 0}


def test_strength_max_of_a_tensor_strength_is_its_factor_with_the_rest_as_it_is():
    x, y = regression()
    strength = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.0], dtype=F64)
    free = torch.linalg.lstsq(x[:, :1], y).solution  # the unpenalised coefficient, fitted alone
    for factor, empty in ((1.001, True), (0.999, False)):
        model, closure = problem()
        with torch.no_grad():
            model.weight[0, 0] = free.item()
        largest = strength_max(Regularizer(model, L1(strength)), closure)
        minimise(model, closure, L1(strength * (factor * largest)))
        assert (model.weight[0, 1:].count_nonzero() == 0) == empty
        assert model.weight[0, 0] != 0


def test_several_rules_need_the_largest_of_their_strengths():
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})

    def closure():
        return 2 * model["a"].weight.sum() - 5 * model["b"].weight.sum()

    rules = {"a.weight": L1(0.1), "b.weight": L1(7.0)}
    assert strength_max(Regularizer(model, rules), closure) == 5
    assert strength_max(Regularizer(model, rules), closure, per_parameter=True) == {"a.weight": 2, "b.weight": 5}
    rules["b.weight"] = L2(0.1)
    assert strength_max(Regularizer(model, rules), closure) == math.inf
    assert strength_max(Regularizer(model, {"a.weight": L1(0.1)}), closure) == 2


def test_per_parameter_zeroes_one_layer_at_a_time():
    model, closure = network()
    reg = Regularizer(model, L1(0.1))
    assert strength_max(reg, closure) < 1e-12  # zero layers pass no gradient
    by_name = strength_max(reg, closure, per_parameter=True)
    assert list(by_name) == ["0.weight", "3.weight"]
    for name, weight in (("0.weight", model[0].weight), ("3.weight", model[3].weight)):
        old = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        (grad,) = torch.autograd.grad(closure(), weight)
        with torch.no_grad():
            weight.copy_(old)
        assert by_name[name] == pytest.approx(grad.abs().max().item(), rel=1e-9, abs=1e-12)


def test_per_parameter_is_zero_for_what_the_loss_does_not_use():
    model = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "idle": nn.Linear(1, 1, bias=False)})
    reg = Regularizer(model, L1(0.1))
    assert strength_max(reg, lambda: 3 * model["used"].weight.sum(), per_parameter=True) == {
        "used.weight": 3.0,
        "idle.weight": 0.0,
    }
    with pytest.raises(ValueError, match="does not depend on the penalised parameters"):
        strength_max(Regularizer(model, {"idle.weight": L1(0.1)}), lambda: 3 * model["used"].weight.sum())


def test_nothing_trainable_to_penalise_is_an_error():
    model, closure = problem()
    reg = Regularizer(model, L1(0.1))
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape("The regularizer penalises no trainable parameter.")):
        torchreg.strength_max(reg, closure)
