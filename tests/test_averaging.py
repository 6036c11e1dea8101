"""Averaged weights get the pattern of the weights that they average, and reports say which weights they are of."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchreg import L1, NM, GroupLasso, NuclearNorm, ProxSGD, Regularizer, SparsityMonitor, reprox, sparsity


def trained(penalty, steps=60, decay=0.9):
    """A model trained by proximal steps, its regularizer, and the average over the steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    reg = Regularizer(net, penalty)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    opt = ProxSGD(reg.param_groups(), lr=0.2)
    x = torch.randn(64, 12, dtype=torch.float64)
    y = x[:, :4].argmax(1)
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        average.update_parameters(net)
    return net, reg, average


@pytest.mark.parametrize("penalty", [L1(0.01), GroupLasso(0.03, "rows"), NM(2, 4)], ids=lambda p: p.type_name)
def test_an_average_gets_the_zeros_of_the_weights_and_keeps_the_rest(penalty):
    net, reg, average = trained(penalty)
    before = copy.deepcopy(average.module)
    assert sparsity(average).total.zeros < sparsity(reg).total.zeros
    report = reprox(average, reg)
    assert report.weights == "averaged"
    assert report.total.zeros == sparsity(reg).total.zeros
    for mine, old, w in zip(average.module.parameters(), before.parameters(), net.parameters(), strict=True):
        penalised = any(w is a.parameter for a in reg.assignments if a.penalty is not None)
        expected = torch.where(w == 0, 0.0, old) if penalised else old
        assert torch.equal(mine, expected)
    once = copy.deepcopy(average.state_dict())
    reprox(average, reg)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in once.items())


def test_nuclear_norms_average_gets_the_rank():
    net, reg, average = trained(NuclearNorm(0.03), steps=150)
    ranks = [torch.linalg.matrix_rank(net[i].weight).item() for i in (0, 2)]
    assert min(ranks) < 4
    assert torch.linalg.matrix_rank(average.module[0].weight) > ranks[0]
    before = average.module[0].weight.detach().clone()
    reprox(average, reg)
    assert [torch.linalg.matrix_rank(average.module[i].weight).item() for i in (0, 2)] == ranks
    u, s, vh = torch.linalg.svd(before)
    nearest = (u[:, : ranks[0]] * s[: ranks[0]]) @ vh[: ranks[0]]
    assert torch.allclose(average.module[0].weight, nearest, atol=1e-12)


def test_a_soft_threshold_of_the_average_would_not_do():
    """What the docstring says of it: it shrinks what survives, and does nothing at a small learning rate."""
    net, _, average = trained(L1(0.01))
    w = average.module[0].weight.detach()
    again = L1(0.01).prox(w, 1e-6)
    assert (again == 0).sum() < (net[0].weight == 0).sum()
    assert ((again - w)[again != 0] != 0).all()


@pytest.mark.parametrize("wrap", ["model", "state dicts", "module in module", "compiled names"])
def test_models_and_state_dicts_are_matched_by_name(wrap):
    net, reg, average = trained(L1(0.01))
    zeros = sparsity(reg).total.zeros
    if wrap == "model":
        reprox(average, net)
    elif wrap == "state dicts":
        state = average.state_dict()
        reprox(state, net.state_dict())
        average.load_state_dict(state)
    elif wrap == "module in module":
        reprox(average.module, average_of(net))
    else:
        reprox({f"_orig_mod.{name}": w for name, w in average.module.state_dict().items()}, reg)
    assert sparsity({"0": average.module[0].weight, "2": average.module[2].weight}).total.zeros == zeros


def average_of(net):
    average = AveragedModel(net)
    average.update_parameters(net)
    return average


def test_what_does_not_fit_is_refused_and_changes_nothing():
    net, reg, average = trained(L1(0.01))
    before = copy.deepcopy(average.state_dict())
    state = {name: w for name, w in average.module.state_dict().items() if name != "2.weight"}
    with pytest.raises(ValueError, match=r"no averaged weight for '2\.weight'"):
        reprox(state, reg)
    with pytest.raises(ValueError, match="shape"):
        reprox({**state, "2.weight": torch.ones(3)}, reg)
    for averaged, current in ((average, 3), (3, net), (reg, net), ({"w": 1}, net)):
        with pytest.raises(TypeError, match="module or a state dict"):
            reprox(averaged, current)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("of", ["regularizer", "module"])
def test_all_averages_of_a_tied_weight_get_its_zeros(of):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    current = Tied()
    with torch.no_grad():
        current.a.weight[1] = 0
    average = {"a.weight": torch.ones(3, 3), "b.weight": torch.full((3, 3), 2.0)}
    report = reprox(average, Regularizer(current, L1(0.1)) if of == "regularizer" else current)
    assert [t.zeros for t in report.tensors] == [3, 3]
    assert all((w == 0).nonzero()[:, 0].unique().tolist() == [1] for w in average.values())
    assert len(reprox(Tied(), current).tensors) == 1


def test_nan_stays_nan_and_zeros_are_positive():
    averaged = {"w": torch.tensor([float("nan"), -1.0, float("nan"), float("inf")])}
    reprox(averaged, {"w": torch.tensor([0.0, -0.0, 1.0, 1.0])})
    assert averaged["w"][:2].tolist() == [0.0, 0.0]
    assert not averaged["w"].signbit()[:2].any()
    assert averaged["w"][2].isnan()
    assert averaged["w"][3].isinf()


def test_reports_and_tags_say_which_weights_they_are_of():
    net, reg, average = trained(L1(0.01), steps=3)
    assert sparsity(average).weights == sparsity(average).to_dict()["weights"] == "averaged"
    assert str(sparsity(average)).startswith("averaged weights\n")
    assert sparsity(net).weights == ""
    tags = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            tags[tag] = value

    for source, name in ((net, None), (average, None), (average.module, "averaged"), (reg, "last")):
        tags.clear()
        report = SparsityMonitor(source, Writer(), weights=name).log()
        label = name or ("averaged" if source is average else "")
        assert report.weights == label
        assert all(tag.startswith(f"{label}/") == bool(label) for tag in tags)
        assert tags[f"{label}/sparsity/total" if label else "sparsity/total"] == report.fraction
