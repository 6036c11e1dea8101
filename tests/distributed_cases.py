"""A model with a penalty of every kind, its data, and the optimizers, for tests with several processes."""

import torch
from torch import nn

import torchreg
from torchreg import L0, L1, L2, MCP, NM, SCAD, Box, ElasticNet, GroupLasso, LHalf, LogSum, NonNegative, TopK
from torchreg.groups import Blocks, Heads, Labels, Member, Shared

SEPARABLE = {
    "l1": L1(2e-2),
    "l2": L2(1e-2),
    "elastic": ElasticNet(1e-2, 1e-2),
    "each": L1(torch.linspace(0, 4e-2, 42, dtype=torch.float64).reshape(7, 6)),
    "columnwise": L1(torch.linspace(0, 4e-2, 6, dtype=torch.float64)),
    "mcp": MCP(2e-2, 3.0),
    "scad": SCAD(2e-2, 3.7),
    "logsum": LogSum(1e-2, 0.1),
    "lhalf": LHalf(5e-3),
    "l0": L0(1e-3),
    "nonnegative": NonNegative(),
    "box": Box(-0.1, 0.2),
}
SHARED = Shared(
    [
        Member("shared.weight", 0, torch.tensor([0, 1, 2, 3, 4, 5, -1])),
        Member("shared.bias", 0, torch.tensor([0, 1, 2, 3, 4, 5, -1])),
        Member("after.weight", 1, torch.tensor([3, 3, 4, 4, 5, 5])),
    ]
)
GROUPED = {
    "rows": GroupLasso(1e-2, "rows"),
    "columns": GroupLasso(1e-2, "columns"),
    "whole": GroupLasso(1e-2, "tensor", group_weight="none"),
    "sparse": torchreg.SparseGroupLasso(5e-3, 5e-3, "columns", l2=1e-3),
    "blocks": GroupLasso(1e-2, Blocks(7, 0)),
    "smallblocks": GroupLasso(1e-2, Blocks(3)),
    "heads": GroupLasso(1e-2, Heads(3, dim=1)),
    "labels": GroupLasso(1e-2, Labels(torch.arange(42).reshape(7, 6) % 5)),
    "rowlabels": GroupLasso(1e-2, Labels(torch.tensor([0, 0, 1, 1, 2, 2, 3])[:, None])),
}
WHOLE = {
    "topk": TopK(20),
    "topkcolumns": TopK(3, groups="columns"),
    "nm": NM(1, 3),
    "nmrows": NM(2, 7, dim=0),
    "nuclear": torchreg.NuclearNorm(2e-2),
}
JOINT = TopK(fraction=0.4, scope="rule")
PENALTIES = {**SEPARABLE, **GROUPED, **WHOLE}


class Model(nn.Module):
    """Layers in parallel, all of the same input, one for each penalty: 7 rows, which are not to be divided evenly."""

    def __init__(self, names, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        for name in names:
            self.add_module(name, nn.Linear(6, 7))
        self.shared, self.after = nn.Linear(6, 7), nn.Linear(6, 3)
        self.joint = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 1)])  # one row: empty elsewhere
        self.free = nn.Linear(6, 1)
        self.to(dtype)

    def forward(self, x):
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return torch.cat([layer(x) for layer in layers], 1)


def rules(names):
    """A penalty for each layer, by its name."""
    own = {f"{name}.weight": PENALTIES[name] for name in names}
    return {**own, SHARED: GroupLasso(1e-2, SHARED), "joint.*.weight": JOINT}


def optimizers(name, reg, **settings):
    """A proximal optimizer by name."""
    groups = reg.param_groups()
    if name == "sgd":
        return torchreg.ProxSGD(groups, lr=0.2, momentum=0.5, **settings)
    if name == "adamw":
        return torchreg.ProxAdamW(groups, lr=1e-2, weight_decay=1e-2, **settings)
    if name == "plain_adam":
        return torchreg.ProxAdamW(groups, lr=1e-2, metric="identity", **settings)
    if name == "rmda":
        return torchreg.RMDA(groups, lr=0.05, momentum=0.0)
    inner = {"rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}[name]
    return torchreg.Proximal(inner(groups, lr=1e-2))


def names_for(optimizer):
    """The layers whose penalties an optimizer takes."""
    in_metric = optimizer in ("adamw", "rmsprop", "adagrad")
    return [name for name in PENALTIES if not (in_metric and name == "nuclear")]


def batch(step, dtype=torch.float64, width=None):
    """Inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=dtype)
    return x, torch.randn(8, width, generator=generator, dtype=dtype) if width else None


def train(model, optimizer, steps, *, start=0, share=slice(None), dtype=torch.float64, warm_up=0):
    """Steps of least squares on the share of each batch that is this process's.

    ``warm_up`` is the number of steps in which the learning rate grows, from 0 in the first.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(start, start + steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, step / warm_up) if warm_up else rate
        x, _ = batch(step, dtype)
        out = model(x[share])
        width = out.shape[1]
        _, y = batch(step, dtype, width)
        loss = ((out - y[share]) ** 2).mean(0).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
