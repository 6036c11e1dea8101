"""Penalties on what hangs together in a model: zero groups are channels that can be taken out."""

import pytest
import torch
from torch import nn

import torchreg
from torchreg import GroupLasso

pytest.importorskip("torch_pruning", reason="needs torch-pruning")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.outer, self.outer_norm = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def _trained(users, build=lambda groups: torchreg.ProxSGD(groups, lr=0.05, momentum=0.9), names=()):
    torch.manual_seed(0)
    model = Residual()
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > 0).long() + (x[:, 0, 4:].mean((1, 2)) > 0).long()
    couplings = torchreg.coupled_groups(model, x[:2])
    reg = torchreg.Regularizer(model, GroupLasso(8e-3, couplings.groups(*names, users=users)))
    optimizer = build(reg.param_groups())
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, couplings, reg


@pytest.mark.parametrize(
    "build",
    [
        lambda groups: torchreg.ProxSGD(groups, lr=0.05, momentum=0.9),
        lambda groups: torchreg.ProxAdamW(groups, lr=0.01),
    ],
    ids=["ProxSGD", "ProxAdamW"],
)
def test_zero_groups_are_channels_that_change_no_output_when_they_are_gone(build):
    model, couplings, _ = _trained(users=False, build=build)
    model.eval()
    tensors = dict(model.named_parameters())
    zero = {c.name: c.zero_channels(tensors, c.makers) for c in couplings}
    assert 0 < zero["inner"].sum() < 12
    x = torch.randn(5, 1, 8, 8)
    before = model(x)
    with torch.no_grad():
        for c in couplings:
            for m in c.users:
                tensors[m.name].index_fill_(m.dim, m.slices(zero[c.name]), torch.nan)
                tensors[m.name].nan_to_num_(nan=123.0)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_users_may_belong_to_their_channels():
    model, couplings, reg = _trained(users=True, names=["inner"])
    assert {name for name, _, _ in reg.penalized()} == {
        "inner.weight",
        "inner_norm.weight",
        "inner_norm.bias",
        "outer.weight",
    }
    dead = couplings["inner"].zero_channels(dict(model.named_parameters()), couplings["inner"].makers)
    assert 0 < dead.sum() < 12
    assert torch.equal(dead, (model.outer.weight == 0).flatten(2).all(2).all(0))


def test_groups_that_overlap_are_refused_by_name():
    model = Residual()
    couplings = torchreg.coupled_groups(model, torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"'stem' and 'inner' both hold weights of '\w+\.weight', and groups that"):
        couplings.groups(users=True)
    with pytest.raises(ValueError, match="matches none of the couplings stem, inner"):
        couplings.groups("nowhere")


def test_a_tensor_that_several_couplings_share_is_one_member():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 6)
            self.norm, self.c = nn.BatchNorm1d(11), nn.Linear(11, 2)

        def forward(self, x):
            return self.c(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())

    model = Dense()
    couplings = torchreg.coupled_groups(model, torch.randn(3, 4))
    groups = couplings.groups()
    assert groups.parts == (("a", 5), ("b", 6))
    norm = next(m for m in groups.members if m.name == "norm.weight")
    assert norm.labels.tolist() == list(range(11))
    assert torchreg.Regularizer(model, GroupLasso(1.0, groups))().item() > 0
