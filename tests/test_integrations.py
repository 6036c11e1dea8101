"""What all trainers share: penalties get into an optimizer that was built without them, or nothing is changed."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from torchreg import L1, GroupLasso, NuclearNorm, ProxAdamW, Proximal, Regularizer, TargetSparsity
from torchreg.integrations import Regularization
from torchreg.integrations.required import required
from torchreg.integrations.routes import made_proximal
from torchreg.integrations.writers import MetricsWriter, writer_of
from torchreg.schedules import WarmupStrength


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), lr=0.1, **options)


def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


# Groups


def test_groups_are_divided_by_penalty_and_keep_their_settings():
    net = network()
    groups = [{"params": list(net[0].named_parameters()), "lr": 0.3}, {"params": list(net[2].named_parameters())}]
    reg = Regularizer(net, {"0.weight": L1(0.5), "2.weight": GroupLasso(0.1, "rows")})
    optimizer = made_proximal(torch.optim.SGD(groups, lr=0.1, momentum=0.5), reg)
    assert isinstance(optimizer, Proximal)
    found = [(g["param_names"], g["lr"], g["penalty"], g["momentum"]) for g in optimizer.param_groups]
    assert found == [
        (["weight"], 0.3, L1(0.5), 0.5),
        (["bias"], 0.3, None, 0.5),
        (["weight"], 0.1, GroupLasso(0.1, "rows"), 0.5),
        (["bias"], 0.1, None, 0.5),
    ]
    assert all(g["strength_scale"] is reg.strength_scale for g in optimizer.param_groups)


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.5**t, lambda t: 1 / (1 + t)]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.2, 0.4], total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.2], [0.3, 0.4], step_size_up=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_learning_rate_schedulers_follow_divided_groups(kind):
    def built():
        net = network()
        groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[2].parameters(), "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return net, optimizer, SCHEDULERS[kind](optimizer)

    net, optimizer, scheduler = built()
    _, plain, expected = built()
    optimizer = made_proximal(optimizer, Regularizer(net, L1(0.1)), [scheduler])
    assert len(optimizer.param_groups) == 4
    for _ in range(7):
        for o, s in ((optimizer, scheduler), (plain, expected)):
            o.step()
            s.step()
        rates = [group["lr"] for group in plain.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == [rates[0]] * 2 + [rates[1]] * 2
        assert scheduler.get_last_lr() == [rates[0]] * 2 + [rates[1]] * 2


def test_reduced_on_a_plateau():
    net = network()
    optimizer = sgd(net)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.05])
    optimizer = made_proximal(optimizer, Regularizer(net, L1(0.1)), [scheduler])
    for _ in range(3):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_what_can_not_be_divided_is_left_as_it_was():
    net = network()
    optimizer = sgd(net)
    groups = copy.copy(optimizer.param_groups)
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(ValueError, match="learning rate scheduler"):
        made_proximal(optimizer, Regularizer(net, L1(0.1)))
    rprop = torch.optim.Rprop(net.parameters())
    with pytest.raises(TypeError, match="metric"):
        made_proximal(rprop, Regularizer(net, L1(0.1)))
    adam = ProxAdamW(net.parameters())
    with pytest.raises(TypeError, match="NuclearNorm"):
        Regularization(NuclearNorm(0.1), route="proximal").attach(net, [adam])
    for o in (optimizer, rprop, adam):
        assert len(o.param_groups) == 1
        assert o.param_groups[0].get("penalty") is None
        assert len(o.param_groups[0]["params"]) == 4
    assert groups == optimizer.param_groups


# Attaching


@pytest.mark.parametrize("route", ["hook", "proximal"])
def test_schedules_move_with_the_optimizers_steps_alone(route):
    net = network()
    regularization = Regularization(L1(0.1), route=route, schedule=lambda holder: [WarmupStrength(holder, until=4)])
    (optimizer,) = regularization.attach(net, [sgd(net)])
    for count in range(3):
        assert regularization.schedules[0].last_epoch == regularization.steps == count
        step(net, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert regularization.steps == 3, "a step without gradients is none"
    regularization.detach()
    regularization.detach()
    step(net, optimizer)
    assert regularization.steps == 3


def test_several_optimizers_share_the_strength():
    net = network()
    parts = [torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2)]
    before = [net[i].weight.detach().clone() for i in (0, 2)]
    regularization = Regularization(L1(0.5))
    assert regularization.attach(net, parts) == parts
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in parts:
        optimizer.step()
    for i, old in zip((0, 2), before, strict=True):
        assert torch.allclose(net[i].weight, old - 0.05 * old.sign())
    assert regularization.steps == 1


def test_it_can_be_attached_again_and_starts_anew():
    net = network()
    regularization = Regularization(L1(0.1), route="proximal", schedule=lambda o: TargetSparsity(o, 0.5, until=3))
    for _ in range(2):
        (optimizer,) = regularization.attach(net, [sgd(net)])
        with pytest.raises(RuntimeError, match="attached already"):
            regularization.attach(net, [sgd(net)])
        for _ in range(4):
            step(net, optimizer)
        assert regularization.steps == 4
        regularization.detach()
        assert regularization.state_dict()["steps"] == 4
    assert not optimizer._prox_pre_hooks


def test_a_failed_attach_leaves_no_hook():
    net = network()
    optimizer = sgd(net)
    regularization = Regularization(L1(0.1), schedule=lambda reg: 3)
    with pytest.raises(TypeError, match="got int"):
        regularization.attach(net, [optimizer])
    assert not regularization.attached
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="holds a penalised parameter"):
        Regularization(L1(0.1)).attach(net, [sgd(network())])
    with pytest.raises(TypeError, match="got int"):
        Regularization(L1(0.1)).attach(net, [3])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_is_not_attached_and_goes_on_when_it_is(copied):
    net = network()
    regularization = Regularization({"*.weight": L1(0.1)}, schedule=lambda_free)
    (optimizer,) = regularization.attach(net, [sgd(net)])
    step(net, optimizer)
    copy_ = copied(regularization)
    assert not copy_.attached
    assert regularization.attached
    copy_.attach(net, [sgd(net)])
    assert copy_.steps == 1
    assert copy_.schedules[0].last_epoch == 1


def lambda_free(holder):
    return WarmupStrength(holder, until=9)


@pytest.mark.parametrize("broken", ["steps", "schedules", "penalties", "monitor"])
def test_a_broken_state_changes_nothing(broken):
    net = network()
    regularization = Regularization(L1(0.1), schedule=lambda_free)
    (optimizer,) = regularization.attach(net, [sgd(net)])
    step(net, optimizer)
    state = regularization.state_dict()
    step(net, optimizer)
    before = regularization.state_dict()
    wrong = {"steps": -1, "schedules": [{"last_epoch": "x"}], "penalties": {"strength_scale": 1.0}, "monitor": {}}
    state[broken] = wrong[broken]
    with pytest.raises((ValueError, TypeError)):
        regularization.load_state_dict(state)
    assert str(regularization.state_dict()) == str(before)
    fresh = Regularization(L1(0.1), schedule=lambda_free)
    fresh.load_state_dict(state)
    with pytest.raises((ValueError, TypeError)):
        fresh.attach(net, [sgd(net)])
    assert not fresh.attached


# Writers and packages


def test_of_several_writers_one_that_fails_keeps_the_others_going():
    lines = []

    class Broken:
        def add_scalar(self, tag, value, step):
            raise OSError("no space")

    writer = writer_of([Broken(), MetricsWriter(lambda metrics, step: lines.append((step, metrics)))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for at in (1, 2):
            writer.add_scalar("a", 1.0 * at, at)
            writer.add_scalar("b", 2.0, at)
            writer.end_log(at)
            writer.end_log(at)
    assert lines == [(1, {"a": 1.0, "b": 2.0}), (2, {"a": 2.0, "b": 2.0})]
    assert len(caught) == 1
    assert not hasattr(writer, "add_image")
    assert writer_of([]) is None


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    with pytest.raises(ImportError, match=r"needs no_such_trainer: pip install 'torchreg-sparse\[skorch\]'"):
        required("no_such_trainer.callbacks", "skorch")
    assert required("no_such_trainer", "skorch", "json").__name__ == "json"
    for module, package in (("lightning", "lightning"), ("transformers", "transformers"), ("accelerate", "accelerate")):
        for name in [name for name in sys.modules if name.split(".")[0] in (package, "pytorch_lightning")]:
            monkeypatch.delitem(sys.modules, name)
        for name in (package, "pytorch_lightning"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"torchreg.integrations.{module}", raising=False)
        with pytest.raises(ImportError, match=rf"torchreg\.integrations\.{module} needs {package}: pip install"):
            __import__(f"torchreg.integrations.{module}")
