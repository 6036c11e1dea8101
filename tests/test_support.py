"""Frozen zeros stay +0.0 under every optimizer, leave no trace when thawed, and survive checkpoints."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import torchreg
from torchreg import FISTA, L1, RMDA, ElasticNet, ProxAdamW, Proximal, ProxSGD, Regularizer, freeze_zeros, support, thaw

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.1),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "ProxSGD": lambda params: ProxSGD(params, lr=0.1, momentum=0.9),
    "ProxSGD L1": lambda params: ProxSGD(params, lr=0.1, momentum=0.9, penalty=L1(0.01)),
    "ProxAdamW": lambda params: ProxAdamW(params, lr=0.05, penalty=L1(0.01)),
    "Proximal": lambda params: Proximal(torch.optim.RMSprop([{"params": params, "penalty": L1(0.01)}], lr=0.01)),
    "RMDA": lambda params: RMDA(params, lr=0.1, penalty=L1(0.01)),
    "ProxSGD eager": lambda params: ProxSGD(params, lr=0.1, momentum=0.9, penalty=L1(0.01), fused=False),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    for p in list(support._frozen.keys()):
        thaw(p)
    assert len(support._frozen) == 0


def sparse_linear(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(6, 4, dtype=dtype)
    with torch.no_grad():
        model.weight[model.weight.abs() < 0.2] = 0
    return model


def train(model, optimizer, steps=5, seed=0):
    for k in range(steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed + k)).to(model.weight.dtype)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def assert_zero(tensor, zeros):
    assert torch.equal(tensor[zeros], torch.zeros_like(tensor[zeros]))
    assert not torch.signbit(tensor[zeros]).any()


def moments(optimizer, p):
    state = optimizer.state[p].items()
    return {k: v for k, v in state if isinstance(v, torch.Tensor) and v.shape == p.shape and k != "step_size"}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Zeros stay zeros


@every_optimizer
def test_zeros_stay_positive_zero_and_the_rest_learns(make):
    model = sparse_linear()
    zeros, before = model.weight == 0, model.weight.detach().clone()
    freeze_zeros(model)
    optimizer = make(model.parameters())
    for k in range(6):
        train(model, optimizer, 1, seed=k)
        assert_zero(model.weight.detach(), zeros)
    assert (model.weight != before)[~zeros].all()
    assert zeros.any()
    for name, moment in moments(optimizer, model.weight).items():
        assert not moment[zeros].any(), name


@every_optimizer
@pytest.mark.parametrize("by_hand", [False, True], ids=["momentum from before", "gradients by hand"])
def test_nothing_leaks_when_thawed(make, by_hand):
    """Neither momentum from before the freezing, nor gradients that no backward pass has put there."""
    model = sparse_linear()
    zeros = model.weight == 0
    optimizer = make(model.parameters())
    train(model, optimizer)
    with torch.no_grad():
        model.weight[zeros] = 0
    with freeze_zeros(model):
        for _ in range(3):
            if by_hand:
                model.weight.grad = torch.ones(4, 6)
                optimizer.step()
            else:
                train(model, optimizer, 1)
            assert_zero(model.weight.detach(), zeros)
    for name, moment in moments(optimizer, model.weight).items():
        assert not moment[zeros].any(), name
    model.weight.grad = torch.zeros(4, 6)
    optimizer.step()
    assert_zero(model.weight.detach(), zeros)


@every_optimizer
def test_a_thawed_weight_learns_again(make):
    model = sparse_linear()
    zeros = model.weight == 0
    optimizer = make(model.parameters())
    handle = freeze_zeros(model)
    train(model, optimizer)
    handle.remove()
    handle.remove()
    train(model, optimizer, 8)
    assert torch.isfinite(model.weight).all()
    assert (model.weight[zeros] != 0).any()


def test_the_refit_is_least_squares_on_the_support():
    torch.manual_seed(0)
    x, truth = torch.randn(60, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    truth[:3] = torch.tensor([2.0, -1.0, 0.5])
    y = x @ truth + 0.1 * torch.randn(60, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def fit(optimizer, steps=600):
        for _ in range(steps):
            optimizer.zero_grad()
            ((x @ w - y).square().mean() / 2).backward()
            optimizer.step()

    fit(ProxSGD([w], lr=0.1, momentum=0.5, penalty=L1(0.2)))
    chosen = w.detach() != 0
    assert chosen.tolist() == [True] * 3 + [False] * 5
    with freeze_zeros(w):
        fit(torch.optim.SGD([w], lr=0.1, momentum=0.9))
    expected = torch.linalg.lstsq(x[:, chosen], y).solution
    torch.testing.assert_close(w.detach()[chosen], expected, rtol=1e-9, atol=0)
    assert_zero(w.detach(), ~chosen)


def test_negative_zeros_become_positive_at_once():
    w = nn.Parameter(torch.tensor([-0.0, 1.0]))
    freeze_zeros(w)
    assert not torch.signbit(w[0])


def test_nan_gradients_at_zeros_stay_out():
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    freeze_zeros(w)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for gradient in ([torch.nan, 1.0], [torch.inf, 1.0], [1.0, torch.nan]):
        w.grad = torch.tensor(gradient)
        optimizer.step()
    assert w[0] == 0
    assert w[1].isnan()  # but a diverging weight shows it


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_other_precisions(dtype):
    model = sparse_linear(dtype)
    zeros = model.weight == 0
    reg = Regularizer(model, ElasticNet(1e-3, 1e-3))
    optimizer = ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    freeze_zeros(optimizer)
    for _ in range(3):
        model.weight.grad, model.bias.grad = torch.randn_like(model.weight), torch.randn_like(model.bias)
        optimizer.step()
    assert_zero(model.weight.detach(), zeros)


def test_a_hook_beside_it_and_a_skipped_step():
    model = sparse_linear()
    zeros = model.weight == 0
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Regularizer(model, ElasticNet(0.1, 0.1)).attach(sgd), freeze_zeros(model):
        train(model, sgd)
        sgd.step()
    assert_zero(model.weight.detach(), zeros)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"), lambda p: FISTA(p, penalty=L1(1e-4))],
    ids=["LBFGS", "FISTA"],
)
def test_solvers_of_many_evaluations_stay_on_the_support(make):
    model = sparse_linear(torch.float64)
    zeros, before = model.weight == 0, model.weight.detach().clone()
    freeze_zeros(model)
    train(model, make(model.parameters()), 3)
    assert_zero(model.weight.detach(), zeros)
    assert (model.weight != before)[~zeros].all()


def test_clipping_sees_the_restricted_gradient():
    model = sparse_linear()
    zeros = model.weight == 0
    freeze_zeros(model)
    for _ in range(2):  # accumulated
        (model(torch.ones(6)) - 1).square().sum().backward()
    assert_zero(model.weight.grad, zeros)
    assert model.weight.grad[~zeros].all()
    by_hand = torch.cat([model.weight.grad[~zeros], model.bias.grad]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), by_hand)


def test_a_gradient_that_is_there_already_is_masked():
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    w.grad = torch.ones(2)
    freeze_zeros(w)
    assert w.grad.tolist() == [0.0, 1.0]


def test_a_compiled_step():
    model = sparse_linear()
    zeros = model.weight == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    freeze_zeros(model)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    for _ in range(2):
        model.weight.grad = torch.ones(4, 6)
        step()
    assert_zero(model.weight.detach(), zeros)
    assert not optimizer.state[model.weight]["exp_avg"][zeros].any()


def test_another_scalar_parameters_step_counter_goes_on():
    w = nn.Parameter(torch.tensor(0.0))
    with pytest.warns(UserWarning, match="all zeros"):
        freeze_zeros(w)
    optimizer = torch.optim.Adam([w], lr=0.1)
    for _ in range(3):
        w.grad = torch.tensor(1.0)
        optimizer.step()
    assert w == 0
    assert optimizer.state[w]["step"] == 3


def test_the_monitor_counts_no_revived_weight():
    model = sparse_linear()
    reg = Regularizer(model, L1(1e-4))
    optimizer = ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    freeze_zeros(model)
    before = torchreg.sparsity(reg).fraction
    train(model, optimizer)
    assert torchreg.sparsity(reg).fraction >= before > 0


# What is frozen


def test_of_a_model_the_weights_but_no_biases():
    model = nn.Sequential(sparse_linear(), nn.BatchNorm1d(4), nn.Embedding(3, 2, padding_idx=0))
    nn.init.zeros_(model[0].bias)
    assert list(freeze_zeros(model).support()) == ["0.weight"]


def test_of_a_model_what_is_selected():
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    with freeze_zeros(model, "0.*") as handle:
        assert list(handle.support()) == ["0.weight", "0.bias"]
    with freeze_zeros(model, select=(model[1].weight,)) as handle:
        assert list(handle.support()) == ["1.weight"]


def test_of_a_regularizer_and_its_optimizer_what_is_penalised():
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    reg = Regularizer(model, {"1.*": L1(0.1)})
    with freeze_zeros(reg) as handle:
        assert list(handle.support()) == ["1.weight", "1.bias"]
    with freeze_zeros(ProxSGD(reg.param_groups(), lr=0.1)) as handle:
        assert list(handle.support()) == ["group0.0", "group0.1"]


def test_of_a_plain_optimizer_what_is_no_vector():
    model = sparse_linear()
    with freeze_zeros(torch.optim.SGD(model.named_parameters(), lr=0.1)) as handle:
        assert list(handle.support()) == ["weight"]


def test_of_parameters_all_that_are_given():
    model = sparse_linear()
    with freeze_zeros([model.bias, model.weight, model.bias]) as handle:
        assert [mask.shape for mask in handle.support().values()] == [(4,), (4, 6)]


def test_the_support_is_where_weights_are():
    model = sparse_linear()
    assert torch.equal(freeze_zeros(model).support()["weight"], model.weight != 0)


def test_tied_weights_are_frozen_once():
    model = nn.Sequential(sparse_linear(), nn.Linear(6, 4))
    model[1].weight = model[0].weight
    assert list(freeze_zeros(model).support()) == ["0.weight"]


def test_parameters_frozen_for_gradients_stay_zero_when_they_learn_again():
    model = sparse_linear()
    zeros = model.weight == 0
    model.weight.requires_grad_(False)
    freeze_zeros(model)
    model.weight.requires_grad_(True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert_zero(model.weight.detach(), zeros)


# Thawing


@pytest.mark.parametrize("of", [lambda m, o, r: m, lambda m, o, r: o, lambda m, o, r: r, lambda m, o, r: m.weight])
def test_thaw_undoes_it_by_any_name(of):
    model = sparse_linear()
    reg = Regularizer(model, L1(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = freeze_zeros(model)
    source = of(model, optimizer, reg)
    thaw(source)
    thaw(source)
    assert handle.support() == {}
    assert "thawed" in repr(handle)
    zeros = model.weight == 0
    train(model, optimizer)
    assert (model.weight[zeros] != 0).all()


def test_an_old_handle_does_not_thaw_a_new_freezing():
    model = sparse_linear()
    old = freeze_zeros(model)
    thaw(model)
    new = freeze_zeros(model)
    old.remove()
    assert list(new.support()) == ["weight"]


def test_copies_are_not_frozen():
    model = sparse_linear()
    freeze_zeros(model)
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (other, torch.load(file, weights_only=False)):
        zeros = twin.weight == 0
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
        assert (twin.weight[zeros] != 0).all()


def test_a_dropped_model_is_forgotten():
    model = sparse_linear()
    freeze_zeros(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weight = weakref.ref(model.weight)
    del model
    gc.collect()
    assert weight() is None
    assert len(support._frozen) == 0


def test_thawing_takes_the_hook_of_all_optimizers_away():
    handle = freeze_zeros(sparse_linear().weight)
    one, two = sparse_linear(), sparse_linear()
    freeze_zeros(one)
    freeze_zeros(two)
    assert len(_global_optimizer_post_hooks) == 1
    handle.remove()
    thaw(one)
    assert len(_global_optimizer_post_hooks) == 1
    thaw(two)
    assert not _global_optimizer_post_hooks


# Checkpoints


def test_a_support_survives_a_checkpoint():
    model = sparse_linear()
    handle = freeze_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    state = through_file([model.state_dict(), optimizer.state_dict(), handle.state_dict()])
    again = nn.Linear(6, 4)
    again.load_state_dict(state[0])
    with torch.no_grad():  # one that became zero by itself
        again.weight[model.weight != 0] *= torch.arange(int((model.weight != 0).sum())) > 0
    resumed = torch.optim.AdamW(again.parameters(), lr=0.1)
    resumed.load_state_dict(state[1])
    other = freeze_zeros(again)
    assert not torch.equal(other.support()["weight"], handle.support()["weight"])
    other.load_state_dict(state[2])
    assert torch.equal(other.support()["weight"], handle.support()["weight"])
    again.load_state_dict(state[0])
    train(model, optimizer, 3, seed=9)
    train(again, resumed, 3, seed=9)
    assert torch.equal(model.weight, again.weight)


def test_freezing_after_loading_gives_the_same_support():
    model = sparse_linear()
    handle = freeze_zeros(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    again = nn.Linear(6, 4)
    again.load_state_dict(through_file(model.state_dict()))
    assert torch.equal(freeze_zeros(again).support()["weight"], handle.support()["weight"])


@pytest.mark.parametrize("shape", [(3, 5), (8,), (1,), (2, 3, 4), (0, 3), ()])
def test_a_state_is_a_bit_for_each_weight(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape) * (torch.rand(shape) > 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors of one weight
        handle = freeze_zeros(w)
    state = through_file(handle.state_dict())
    assert state["zeros"]["0"].numel() == -(-w.numel() // 8)
    expected = handle.support()["0"]
    with torch.no_grad():
        w.zero_()
    handle._held()["0"][1].zeros = torch.ones(shape, dtype=torch.bool)
    handle.load_state_dict(state)
    assert torch.equal(handle.support()["0"], expected)


def test_loading_zeroes_what_the_saved_support_lacks():
    model = sparse_linear()
    state = freeze_zeros(model).state_dict()
    zeros = model.weight == 0
    again = nn.Linear(6, 4)
    with pytest.warns(UserWarning, match="nothing to freeze"):
        handle = freeze_zeros(again)
    handle.load_state_dict(state)
    assert_zero(again.weight.detach(), zeros)


def test_a_foreign_state_is_refused_and_changes_nothing():
    model = sparse_linear()
    handle = freeze_zeros(model)
    before = handle.support()["weight"]
    good = handle.state_dict()
    for bad, message in [
        ({}, "keys 'zeros' and 'shapes'"),
        (None, "keys 'zeros' and 'shapes'"),
        ({"zeros": {"other": good["zeros"]["weight"]}, "shapes": {"other": [4, 6]}}, "'other', 'weight'"),
        ({"zeros": good["zeros"], "shapes": {"weight": [6, 4]}}, r"shape \(6, 4\), its parameter has \(4, 6\)"),
        ({"zeros": {"weight": torch.zeros(2, dtype=torch.uint8)}, "shapes": {"weight": [4, 6]}}, "'weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            handle.load_state_dict(bad)
    assert torch.equal(handle.support()["weight"], before)


# Bad input


def test_freezing_twice_is_refused_and_changes_nothing():
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    freeze_zeros(model, "1.weight")
    with pytest.raises(ValueError, match=r"'1.weight' is frozen already.*thaw"):
        freeze_zeros(model)
    thaw(model)
    freeze_zeros(model)


def test_an_all_zero_tensor_is_warned_about():
    model = nn.Sequential(sparse_linear(), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=r"Freezing '1.weight': all zeros"):
        freeze_zeros(model)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "got int"),
        ("model", TypeError, "got str"),
        (nn.Linear, TypeError, "got Linear"),
        ([1.0], TypeError, "got float at position 0"),
        (torch.ones(2, requires_grad=True) * 2, TypeError, "Expected parameters"),
        (nn.Linear(2, 2, device="meta"), ValueError, "meta device"),
        (nn.LazyLinear(2), ValueError, "not initialised"),
        (nn.BatchNorm1d(2), ValueError, "matches none"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1), ValueError, "no parameter to freeze"),
    ],
)
def test_other_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        freeze_zeros(source)


def test_a_selector_needs_a_module():
    with pytest.raises(ValueError, match="only with a module"):
        freeze_zeros(sparse_linear().weight, "weight")
