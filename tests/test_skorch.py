"""In skorch's nets a callback gives the weights of the plain loop, also resumed, and is searched like any parameter."""

import copy
import pickle

import pytest
import torch
from example import percent, printed
from feature_cases import assert_same as assert_features_same
from feature_cases import data_loss, in_a_trainer, of_trainers
from feature_cases import trained as trained_plainly
from torch import nn

from torchreg import L1, Proximal, Regularizer, TargetSparsity, sparsity
from torchreg.schedules import WarmupStrength

skorch = pytest.importorskip("skorch", reason="needs skorch")

from torchreg.integrations.skorch import RegularizationCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = {"*.weight": L1(0.03)}


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def net(callback, epochs=3, **options):
    callbacks = [("regularization", callback), *options.pop("callbacks", [])]
    settings = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.SGD, "optimizer__momentum": 0.9, "lr": 0.1}
    settings = {**settings, "batch_size": 4, "train_split": None, "verbose": 0, "iterator_train__shuffle": False}
    return skorch.NeuralNetClassifier(module, max_epochs=epochs, callbacks=callbacks, **{**settings, **options})


def plain(route, schedule=None, epochs=3):
    """The loop that skorch replaces."""
    model = module()
    reg = Regularizer(model, RULES)
    optimizer = torch.optim.SGD(model.parameters() if route == "hook" else reg.param_groups(), lr=0.1, momentum=0.9)
    if route == "hook":
        reg.attach(optimizer)
    else:
        optimizer = Proximal(optimizer)
    moves = schedule(reg if route == "hook" else optimizer) if schedule else None
    x, y = data()
    for _ in range(epochs):
        for i in range(0, len(x), 4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 4]), y[i : i + 4]).backward()
            optimizer.step()
            if moves:
                moves.step()
    return model


def assert_same(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def warmup(holder):
    return WarmupStrength(holder, until=11)


def target(optimizer):
    return TargetSparsity(optimizer, 0.6, until=15)


CASES = pytest.mark.parametrize(("route", "schedule"), [("hook", warmup), ("proximal", target), ("proximal", None)])


@CASES
def test_a_fit_gives_the_weights_of_the_plain_loop(route, schedule):
    fitted = net(RegularizationCallback(RULES, route, schedule)).fit(*data())
    expected = plain(route, schedule)
    assert_same(fitted.module_, expected)
    assert fitted.regularization_.steps == 18
    assert fitted.history[-1, "sparsity"] == sparsity(Regularizer(expected, RULES)).fraction
    fitted.fit(*data())
    assert_same(fitted.module_, expected)


@of_trainers
def test_what_needs_no_more_than_the_net_gives_the_weights_of_the_plain_loop(penalty, feature):
    def train(model, part, data):
        class Net(skorch.NeuralNetRegressor):
            def get_loss(self, y_pred, y_true, X=None, training=False):
                return data_loss(lambda _: y_pred, None, y_true) + part.term()

        settings = {"batch_size": 8, "max_epochs": 1, "train_split": None, "verbose": 0}
        Net(model, optimizer=lambda params, lr: part.optimizer, **settings).fit(*data.tensors)

    assert_features_same(in_a_trainer(penalty, feature, train), trained_plainly(feature, penalty))


@CASES
@pytest.mark.parametrize("how", ["checkpoint", "by hand"])
def test_a_resumed_fit_ends_with_the_same_weights(route, schedule, how, tmp_path):
    from skorch.callbacks import Checkpoint, LoadInitState

    def checkpoint():
        return Checkpoint(monitor=None, dirname=str(tmp_path), f_regularization="regularization.pt")

    net(RegularizationCallback(RULES, route, schedule), 1, callbacks=[checkpoint()]).fit(*data())
    torch.load(tmp_path / "regularization.pt", weights_only=True)
    callback = RegularizationCallback(RULES, route, schedule)
    if how == "checkpoint":
        resumed = net(callback, 2, callbacks=[LoadInitState(checkpoint())]).fit(*data())
    else:
        resumed = net(callback, 2).initialize()
        callback.attach(resumed)
        resumed.load_params(checkpoint=checkpoint())
        resumed.partial_fit(*data())
    assert_same(resumed.module_, plain(route, schedule))
    assert resumed.regularization_.steps == 18


@CASES
@pytest.mark.parametrize("copied", [lambda net: pickle.loads(pickle.dumps(net)), copy.deepcopy, lambda net: net])
def test_a_partial_fit_goes_on_also_of_a_copy(copied, route, schedule):
    half = net(RegularizationCallback(RULES, route, schedule), 2).fit(*data())
    whole = copied(half).partial_fit(*data(), epochs=1)
    assert_same(whole.module_, plain(route, schedule))
    assert_same(copied(whole).partial_fit(*data(), epochs=1).module_, plain(route, schedule, 4))


def test_a_second_callback_is_refused():
    second = ("another", RegularizationCallback({"*.bias": L1(0.1)}))
    with pytest.raises(ValueError, match="one, as a mapping"):
        net(RegularizationCallback(RULES), callbacks=[second]).fit(*data())


def test_the_strength_is_a_parameter_of_a_grid_search():
    from sklearn.model_selection import GridSearchCV

    grid = {"callbacks__regularization__rules": [L1(1e-4), L1(10.0)]}
    x, y = data()
    search = GridSearchCV(net(RegularizationCallback(L1(0.1), "proximal")), grid, cv=2).fit(x.numpy(), y.numpy())
    best = search.best_estimator_
    assert search.best_params_["callbacks__regularization__rules"].strength == 1e-4
    assert best.regularization_.regularizer.assignments[0].penalty.strength == 1e-4


def test_the_writer_gets_the_numbers_and_the_loss():
    tags = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            tags.setdefault(tag, []).append(step)

    net(RegularizationCallback(RULES, every=5, writer=Writer())).fit(*data())
    assert tags["loss/data"] == tags["sparsity/total"] == [5, 10, 15, 18]


def test_the_example(monkeypatch, capsys):
    out = printed("skorch_digits.py", "--epochs", 4, monkeypatch=monkeypatch, capsys=capsys)
    assert percent("test accuracy", out) > 88
    assert percent("zeros", out) > 1
    assert out.count("accuracy") == 4
