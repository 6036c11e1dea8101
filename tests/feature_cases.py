"""Each feature in a small training: what tests of loops, trainers and several processes compare with a plain loop."""

import copy
import functools
import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import torchreg
from torchreg import L1, RMDA, GroupLasso, ProxAdamW, Proximal, ProxSGD, TargetSparsity
from torchreg.sharding import whole as gathered

PENALTIES = {"L1": L1(2e-2), "GroupLasso": GroupLasso(2e-2, "rows")}
STEPS = 6


def no_term():
    return 0.0


class Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append((step, tag, value))


class Part:
    """A feature in a training: its optimizer, its part of the loss, what it does after a step, what it ends with.

    ``kept`` is what a checkpoint has to hold beside the weights and the optimizer.
    """

    def __init__(self, optimizer, term=no_term, after_step=lambda: None, found=list, kept=()):
        self.optimizer, self.term, self.after_step, self.found, self.kept = optimizer, term, after_step, found, kept


def loss_term(reg):
    return Part(torch.optim.SGD(reg.model.parameters(), lr=0.1, momentum=0.9), term=reg)


def hook(reg):
    optimizer = torch.optim.SGD(reg.model.parameters(), lr=0.1, momentum=0.9)
    return Part(optimizer, kept=[reg.attach(optimizer)])


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
    return Part(optimizer, after_step=target.step, found=lambda: [float(reg.strength_scale)], kept=[target])


def sparsity_monitor(reg):
    optimizer = ProxSGD(reg.param_groups(), lr=0.1)
    alone = not dist.is_initialized() or dist.get_rank() == 0
    writer = Writer() if alone else None
    monitor = torchreg.SparsityMonitor(reg, writer, every=1, optimizer=optimizer)

    def found():
        monitor.close()
        return [value for _, _, value in writer.written] if alone else []

    return Part(optimizer, after_step=monitor.step, found=found, kept=[monitor])


def freeze_zeros(reg):
    return Part(torch.optim.Adam(reg.model.parameters(), lr=0.1), kept=[torchreg.freeze_zeros(reg)])


def compacted(reg):
    """Of a model that was compacted before."""
    assert reg.model[0].out_features == 4
    return hook(reg)


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
    "compact": compacted,
}
features = pytest.mark.parametrize("feature", FEATURES)
penalties = pytest.mark.parametrize("penalty", PENALTIES)
ways = pytest.mark.parametrize(
    ("penalty", "feature"),
    [*(("L1", feature) for feature in FEATURES), ("GroupLasso", "ProxSGD")],
    ids=lambda name: name,
)
"""Each feature once, and groups."""
of_trainers = pytest.mark.parametrize(
    ("penalty", "feature"),
    [
        *(("L1", name) for name in ("loss term", "ProxSGD", "ProxAdamW", "RMDA", "freeze_zeros", "compact")),
        ("GroupLasso", "ProxSGD"),
    ],
    ids=lambda name: name,
)
"""What a trainer knows nothing of; the others are tested with its callback."""


def network(feature="", dtype=torch.float64):
    """The model to train: for ``freeze_zeros`` and ``compact`` one with zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        if feature == "freeze_zeros":
            for layer in (model[0], model[2]):
                layer.weight[::2] = 0
        if feature == "compact":
            pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")
            model[0].weight[::2] = model[0].bias[::2, None] = 0
            model = torchreg.export.compact(model, torch.randn(2, 6, dtype=dtype), seconds=0).model
    return model.requires_grad_(True)


def batch(step, device="cpu"):
    """Inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(8, width, generator=generator, dtype=torch.float64).to(device) for width in (6, 3))


def data_loss(model, x, y):
    return (model(x) - y).square().mean()


def whole(part, model, x, y):
    """A step of the plain loop."""
    (data_loss(model, x, y) + part.term()).backward()
    part.optimizer.step()


def regularized(feature, penalty, model, wrapped=None):
    """The feature in the training of a model that may be wrapped."""
    reg = torchreg.Regularizer(wrapped or model, PENALTIES[penalty])
    reg.model = model
    return FEATURES[feature](reg)


def trained(
    feature,
    penalty,
    step=whole,
    wrap=lambda model: model,
    skipped=None,
    model=None,
    device="cpu",
    steps=range(STEPS),
    before=lambda model, part: None,
    after=lambda model, part: None,
):
    """The weights after some steps, and what the feature ends with.

    Args:
        step: takes one.
        wrap: what is around the model.
        skipped: a step that is not taken.
        model: what `network` would return, made elsewhere.
        before, after: called before the first step and after the last.
    """
    model = (copy.deepcopy(model) if model is not None else network(feature)).to(device)
    wrapped = wrap(model)
    part = regularized(feature, penalty, model, wrapped)
    before(model, part)
    for i in steps:
        x, y = batch(i, device)
        part.optimizer.zero_grad()
        if i == skipped:
            continue
        if step(part, wrapped, x, y) is not False:
            part.after_step()
    after(model, part)
    return [gathered(p.detach()).cpu().clone() for p in model.parameters()], part.found()


def in_a_trainer(penalty, feature, train):
    """The weights after ``train(model, part, data)``, which is another's loop over all batches in their order."""
    model = network(feature)
    part = regularized(feature, penalty, model)
    x, y = zip(*map(batch, range(STEPS)), strict=True)
    train(model, part, TensorDataset(torch.cat(x), torch.cat(y)))
    return [p.detach().clone() for p in model.parameters()], []


def assert_same(one, other, tolerance=1e-9):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(a == 0, b == 0)
    assert one[1] == pytest.approx(other[1], rel=max(1e-6, tolerance), abs=tolerance)


@functools.cache
def small():
    """A compacted model for other processes, which then need not import what compacts; None where that is missing."""
    return network("compact") if importlib.util.find_spec("torch_pruning") else None
