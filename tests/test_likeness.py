"""What of many tensors is asked in C++ at once, and that all goes on where torch can't be asked so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from torchreg import L1, ProxSGD, Regularizer
from torchreg.kernels import likeness, selection
from torchreg.kernels.likeness import Likeness


class Named(Tensor):
    pass


def tensors() -> list[Tensor]:
    return [torch.zeros(4, 6), nn.Parameter(torch.zeros(4, 4)), torch.zeros(3, dtype=torch.float64)]


OTHERS = {
    "size": torch.zeros(4, 5),
    "elements in another shape": torch.zeros(6, 4),
    "strides": torch.zeros(6, 4).t(),
    "dtype": torch.zeros(4, 6, dtype=torch.int32),
    "device": torch.zeros(4, 6, device="meta"),
    "layout": torch.zeros(4, 6).to_sparse(),
    "negated when read": torch._neg_view(torch.zeros(4, 6)),
    "class": torch.zeros(4, 6).as_subclass(Named),
    "parameter": nn.Parameter(torch.zeros(4, 6)),
}


def test_tensors_are_alike_wherever_they_lie_and_whatever_is_in_them():
    assert Likeness(tensors()).holds([t + 1 if not t.requires_grad else t for t in tensors()])
    with torch.no_grad():
        assert Likeness(tensors()).holds(tensors())
    assert Likeness([]).holds([])


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_one_that_differs_is_noticed(other):
    assert not Likeness(tensors()).holds([other, *tensors()[1:]])


def test_one_more_or_less_is_noticed():
    known = Likeness(tensors())
    assert not known.holds(tensors()[:-1])
    assert not known.holds([*tensors(), torch.zeros(1)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_a_copy_can_not_tell(copied):
    assert not copied(Likeness(tensors())).holds(tensors())


@pytest.mark.skipif(bool(selection.unavailable(torch.device("cpu"))), reason="needs the compiled kernel")
def test_where_torch_can_not_be_asked_steps_and_terms_are_the_same(monkeypatch):
    def trained() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(40, 50, 5, 5, generator=generator) for _ in range(2)]
        model = nn.ParameterList([weights[0], weights[1].to(memory_format=torch.channels_last)])
        reg = Regularizer(model, {"*": L1(0.01)})
        opt = ProxSGD(model.parameters(), lr=0.1, momentum=0.9, penalty=L1(0.1), fused=True)
        for step in range(6):
            opt.zero_grad(set_to_none=step % 2 == 0)
            with torch.autocast("cpu", enabled=step > 3):
                (reg() + sum(w.square().sum() for w in model)).backward()
            opt.step()
        return [p.detach() for p in model]

    ours = trained()
    monkeypatch.setattr(likeness, "_guards", lambda tensors: None)
    for a, b in zip(ours, trained(), strict=True):
        assert torch.equal(a, b)
