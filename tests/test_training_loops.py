"""Whatever the loop does with its gradients, each feature gives the weights and logs of a plain loop."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import torchreg
from torchreg import L1, RMDA, GroupLasso, ProxAdamW, Proximal, ProxSGD, TargetSparsity

PENALTIES = {"L1": L1(2e-2), "GroupLasso": GroupLasso(2e-2, "rows")}
STEPS = 6
OVERFLOWING = 3


def no_term():
    return 0.0


class Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append(value)


class Part:
    """A feature in a training: its optimizer, its part of the loss, what it does after a step, what it ends with."""

    def __init__(self, optimizer, term=no_term, after_step=lambda: None, found=list):
        self.optimizer, self.term, self.after_step, self.found = optimizer, term, after_step, found


def loss_term(reg):
    return Part(torch.optim.SGD(reg.model.parameters(), lr=0.1, momentum=0.9), term=reg)


def hook(reg):
    optimizer = torch.optim.SGD(reg.model.parameters(), lr=0.1, momentum=0.9)
    reg.attach(optimizer)
    return Part(optimizer)


def prox_sgd(reg):
    return Part(ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9))


def prox_adamw(reg):
    return Part(ProxAdamW(reg.param_groups(), lr=1e-2, weight_decay=0))


def proximal(reg):
    return Part(Proximal(torch.optim.RMSprop(reg.param_groups(), lr=1e-2)))


def rmda(reg):
    return Part(RMDA(reg.param_groups(), lr=0.1, momentum=0.5))


def target_sparsity(reg):
    optimizer = ProxSGD(reg.param_groups(), lr=0.1)
    target = TargetSparsity(optimizer, 0.5, until=4)
    return Part(optimizer, after_step=target.step, found=lambda: [float(reg.strength_scale)])


def sparsity_monitor(reg):
    optimizer = ProxSGD(reg.param_groups(), lr=0.1)
    alone = not dist.is_initialized() or dist.get_rank() == 0
    writer = Writer() if alone else None
    monitor = torchreg.SparsityMonitor(reg, writer, every=1, optimizer=optimizer)
    return Part(optimizer, after_step=monitor.step, found=lambda: [monitor.close(), writer.written][1] if alone else [])


def freeze_zeros(reg):
    with torch.no_grad():
        for _, p, _ in reg.penalized():
            p[::2] = 0
    torchreg.freeze_zeros(reg)
    return Part(torch.optim.Adam(reg.model.parameters(), lr=0.1))


FEATURES = {
    "loss term": loss_term,
    "hook": hook,
    "ProxSGD": prox_sgd,
    "ProxAdamW": prox_adamw,
    "Proximal": proximal,
    "RMDA": rmda,
    "TargetSparsity": target_sparsity,
    "SparsityMonitor": sparsity_monitor,
    "freeze_zeros": freeze_zeros,
}
features = pytest.mark.parametrize("feature", FEATURES)
penalties = pytest.mark.parametrize("penalty", PENALTIES)


def data_loss(model, x, y):
    return (model(x) - y).square().mean()


def whole(part, model, x, y):
    (data_loss(model, x, y) + part.term()).backward()
    part.optimizer.step()


def accumulated(part, model, x, y):
    for i in range(4):
        ((data_loss(model, x[i::4], y[i::4]) + part.term()) / 4).backward()
    part.optimizer.step()


def own_share(part, model, x, y):
    share = slice(dist.get_rank(), None, dist.get_world_size())
    whole(part, model, x[share], y[share])


def trained(feature, penalty, step=whole, wrap=lambda model: model, skipped=None):
    """The weights after some steps, and what the feature ends with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    wrapped = wrap(model)
    reg = torchreg.Regularizer(wrapped, PENALTIES[penalty])
    reg.model = model
    part = FEATURES[feature](reg)
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (6, 3))
        part.optimizer.zero_grad()
        if i == skipped:
            continue
        if step(part, wrapped, x, y) is not False:
            part.after_step()
    return [p.detach().clone() for p in model.parameters()], part.found()


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert torch.equal(a == 0, b == 0)
    assert one[1] == pytest.approx(other[1], rel=1e-6, abs=1e-9)


@features
@penalties
def test_accumulated_gradients_take_the_step_of_the_whole_batch(feature, penalty):
    assert_same(trained(feature, penalty, accumulated), trained(feature, penalty))


@features
@penalties
def test_a_grad_scaler_changes_nothing_and_skips_what_overflows(feature, penalty):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    count = iter(range(STEPS))

    def scaled(part, model, x, y):
        overflows = next(count) == OVERFLOWING
        loss = data_loss(model, x, y) + part.term()
        scaler.scale(loss * math.inf if overflows else loss).backward()
        scaler.step(part.optimizer)
        scaler.update()
        return not overflows

    assert_same(trained(feature, penalty, scaled), trained(feature, penalty, skipped=OVERFLOWING))


@features
@penalties
def test_a_compiled_model_trains_alike(feature, penalty):
    torch.compiler.reset()

    def compiled(model):
        return torch.compile(model, backend="eager")

    assert_same(trained(feature, penalty, wrap=compiled), trained(feature, penalty))


def _replicated():
    ways = [(feature, penalty) for feature in FEATURES for penalty in PENALTIES]
    return {way: trained(*way, step=own_share, wrap=nn.parallel.DistributedDataParallel) for way in ways}


@pytest.fixture(scope="module")
def replicas():
    import distributed

    return distributed.run(2, _replicated)


@features
@penalties
def test_replicas_by_ddp_train_as_one_process_with_all_data(feature, penalty, replicas):
    first, second = (replica[feature, penalty] for replica in replicas)
    assert_same(first, trained(feature, penalty))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
