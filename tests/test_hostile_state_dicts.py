"""State dicts from anywhere into optimizers, hooks and schedules: taken, or one clear error and no change."""

import copy
import math
import random

import pytest
import torch
from torch import nn

import torchreg
from torchreg import FISTA, FTRL, L1, RMDA, ElasticNet, GroupLasso, ProxAdamW, Proximal, ProxSGD, Regularizer, schedules

EACH = 40


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 2, sparse=False), nn.Flatten(), nn.Linear(4, 3))


def rules():
    return {"0.weight": ElasticNet(0.1, 0.1), "2.weight": GroupLasso(0.1, "rows")}


def stepped(make, sparse=False):
    net = model()
    net[0].sparse = sparse
    opt = make(Regularizer(net, rules()).param_groups())
    if sparse:
        opt.settle_lookups(net)

    def closure():
        opt.zero_grad()
        loss = net(torch.tensor([[0, 1], [2, 2]])).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    return opt


def schedule(_=None):
    net = model()
    reg = Regularizer(net, rules())
    made = schedules.LinearStrength(reg, until=5)
    made.step()
    return made


def hook(_=None):
    net = model()
    reg = Regularizer(net, rules())
    handle = reg.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    handle.kept = reg, net
    return handle


def target(_=None):
    net = model()
    opt = ProxSGD(Regularizer(net, L1(0.1)).param_groups(), lr=0.1)
    return torchreg.TargetSparsity(opt, 0.5, until=4)


def frozen(_=None):
    net = model()
    net[2].weight.data[0] = 0
    handle = torchreg.freeze_zeros(net)
    handle.kept = net
    return handle


HOLDERS = {
    "ProxSGD": lambda: stepped(lambda groups: ProxSGD(groups, lr=0.1, momentum=0.9)),
    "ProxSGD, sparse": lambda: stepped(lambda groups: ProxSGD(groups, lr=0.1, momentum=0.9), sparse=True),
    "ProxAdamW": lambda: stepped(lambda groups: ProxAdamW(groups, weight_decay=0)),
    "FTRL": lambda: stepped(lambda groups: FTRL(groups)),
    "RMDA": lambda: stepped(lambda groups: RMDA(groups)),
    "FISTA": lambda: stepped(lambda groups: FISTA(groups)),
    "Proximal(Adam)": lambda: stepped(lambda groups: Proximal(torch.optim.Adam(groups))),
    "Proximal(Adagrad)": lambda: stepped(lambda groups: Proximal(torch.optim.Adagrad(groups))),
    "hook": hook,
    "schedule": schedule,
    "target": target,
    "frozen": frozen,
    "regularizer": lambda: Regularizer(model(), rules()),
}
HOSTILE = [None, "x", -1, -1.0, math.nan, math.inf, 1 << 70, [], {}, [None], {"a": 1}, True, b"x", torch.ones(7, 7),
           torch.tensor(math.nan), torch.tensor([1, 2]), torch.ones(2, 3).to_sparse(), object, {"type": "L1"},
           {"type": "L1", "strength": -1.0}, {"type": "os.system", "strength": 1.0}, (1, 2)]  # fmt: skip


def places(tree, path=()):
    """Every key and index of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(state, random_):
    state = copy.deepcopy(state)
    if random_.random() < 0.03:
        return random_.choice(HOSTILE)
    where = random_.choice(list(places(state)))
    holder = state
    for key in where[:-1]:
        holder = holder[key]
    if isinstance(holder, tuple):
        return state
    way = random_.randrange(4)
    if way == 0:
        del holder[where[-1]]
    elif way == 1 and isinstance(holder, dict):
        holder[random_.choice(["extra", "99", "params"])] = random_.choice(HOSTILE)
    else:
        holder[where[-1]] = copy.deepcopy(random_.choice(HOSTILE))
    return state


def same(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_damaged_state_is_taken_or_refused_and_then_changes_nothing(name):
    good = copy.deepcopy(HOLDERS[name]().state_dict())
    refused = 0
    holder = HOLDERS[name]()
    before = copy.deepcopy(holder.state_dict())
    for seed in range(EACH):
        state = damaged(good, random.Random(f"{name}{seed}"))
        problem = None
        try:
            holder.load_state_dict(state)
        except (ValueError, TypeError, RuntimeError) as error:
            problem = str(error)
        if problem is None:
            holder = HOLDERS[name]()
            continue
        refused += 1
        assert same(before, holder.state_dict()), (seed, problem)
        assert name == "regularizer" or (problem and "\n" not in problem), (
            seed,
            problem,
        )  # that is torch's, as of any module
    assert refused > EACH / 5 or name in {"regularizer"}
