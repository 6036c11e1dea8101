"""What is said of a model that several processes hold: values, gradients, residuals, counts, targets and supports."""

import copy
import warnings
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    JOINT,
    PENALTIES,
    SEPARABLE,
    SHARED,
    Model,
    batch,
    names_for,
    optimizers,
    rules,
    train,
)

import torchreg
from torchreg import L1, GroupLasso
from torchreg.sharding import whole

DIFFERENTIABLE = [name for name, penalty in PENALTIES.items() if penalty.has_gradient]


def _fsdp(model, mesh=None):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh)


def _penalties(names, joint=False):
    chosen = {f"{name}.weight": PENALTIES[name] for name in names} | {SHARED: GroupLasso(1e-2, SHARED)}
    return chosen | ({"joint.*.weight": JOINT} if joint else {})


def _emptied(model):
    """Some exact zeros in every weight, and some zero groups."""
    for i, p in enumerate(model.parameters()):
        p.data[p.data.abs() < 0.1] = 0
        p.data[i % len(p)] = 0
    return model


def _loss(model, seed=0):
    x, _ = batch(seed)
    return model(x).square().mean()


def _terms(before):
    """The loss term's value, all gradients with it, and with the hook, alone and by this process group."""

    def found(wrap):
        model = wrap(_emptied(Model(DIFFERENTIABLE)))
        reg = torchreg.Regularizer(model, _penalties(DIFFERENTIABLE))
        reg.strength_scale = 0.5
        value = reg() if before else None
        loss = _loss(model)
        value = value if before else reg()
        (loss + value).backward()
        result = {name: whole(p.grad) for name, p in model.named_parameters()}
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reg.attach(optimizer)
        _loss(model).backward()
        optimizer.step()
        return value.item(), result, {name: whole(p.detach()) for name, p in model.named_parameters()}

    value, grads, weights = found(lambda model: model)
    many, theirs, moved = found(_fsdp)
    assert abs(value - many) < 1e-12 * value
    worst = {name: (grads[name] - theirs[name]).abs().max().item() for name in grads}
    return worst, {name: (weights[name] - moved[name]).abs().max().item() for name in weights}


@pytest.mark.parametrize("before", [True, False], ids=["before the forward pass", "after it"])
def test_loss_term_and_hook(before):
    for grads, weights in distributed.run(2, _terms, before):
        assert {n: e for n, e in grads.items() if not e < 1e-12} == {}
        assert {n: e for n, e in weights.items() if not e < 1e-12} == {}


def _optimality():
    names = list(PENALTIES)

    def found(wrap):
        model = wrap(_emptied(Model(names)))
        reg = torchreg.Regularizer(model, _penalties(names))
        closure = lambda: _loss(model)  # noqa: E731
        results = {"with all": torchreg.kkt_residual(reg, closure).item()}
        _loss(model).backward()
        for name in [*names, "shared"]:
            one = torchreg.Regularizer(
                model,
                {SHARED: GroupLasso(1e-2, SHARED)}
                if name == "shared"
                else {f"{name}.weight": PENALTIES[name], "*": None},
            )
            for other, p in model.named_parameters():
                p.requires_grad_(other == f"{name}.weight" or (name == "shared" and other in SHARED.names))
            results[f"kkt of {name}"] = torchreg.kkt_residual(one).item()
            for p in model.parameters():
                p.requires_grad_(True)
            results[f"strength of {name}"] = torchreg.strength_max(one, closure)
        return results

    alone, many = found(lambda model: model), found(_fsdp)
    return {name: (alone[name], many[name]) for name in alone}


def test_kkt_residual_and_largest_strength():
    for pairs in distributed.run(2, _optimality):
        for name, (alone, many) in pairs.items():
            assert many == pytest.approx(alone, rel=1e-12, abs=1e-14), name


class _Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append((step, tag, value))

    def add_image(self, tag, image, step, dataformats):
        self.written.append((step, tag, float(image.sum())))


def _monitored():
    names = names_for("sgd")

    def found(wrap):
        model = wrap(_emptied(Model(names)))
        reg = torchreg.Regularizer(model, rules(names))
        opt = optimizers("sgd", reg)
        writer = _Writer() if dist.get_rank() == 0 else None
        monitor = torchreg.SparsityMonitor(reg, writer, every=2, optimizer=opt, images=True)
        for _ in range(2):
            train(model, opt, 2)
            monitor.step(1.0)
            monitor.step(1.0)
        report = torchreg.sparsity(model).to_dict(), torchreg.sparsity(model.state_dict()).to_dict()
        groups = torchreg.group_sparsity(reg).to_dict(), torchreg.group_sparsity(model, "columns").to_dict()
        return writer and writer.written, report, groups

    return found(lambda model: model), found(_fsdp)


def test_reports_and_logs_count_whole_tensors():
    for rank, (alone, many) in enumerate(distributed.run(2, _monitored)):
        assert _close(many[1], alone[1])
        assert many[2] == alone[2]
        assert (many[0] is None) == (rank > 0)
        if rank == 0:
            assert [entry[:2] for entry in many[0]] == [entry[:2] for entry in alone[0]]
            assert [entry[2] for entry in many[0]] == pytest.approx([entry[2] for entry in alone[0]], rel=1e-9)


def _close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == (pytest.approx(b, rel=1e-9) if isinstance(a, float) else b)


def _targeted(optimizer, of, penalty, sample):
    import torchreg.target

    with mock.patch.object(torchreg.target, "SAMPLE", sample):  # the process is used again
        return _reached(optimizer, of, penalty)


def _reached(optimizer, of, penalty):
    def found(wrap):
        model = wrap(Model(["l1", "l2"]))
        opt = optimizers(optimizer, torchreg.Regularizer(model, penalty))
        target = torchreg.TargetSparsity(opt, 0.6, until=10, of=of)
        scales = []
        for _ in range(15):
            train(model, opt, 1)
            target.step()
            scales.append(float(opt.param_groups[0]["strength_scale"]))
        return target.reached()["all"], scales

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found(lambda model: model), found(_fsdp)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("kind", ["weights", "groups", "weights of groups", "a sample"])
def test_a_target_is_met_by_one_threshold(optimizer, kind):
    elementwise = {"l1.weight": SEPARABLE["each"], torch.nn.Linear: L1(1e-3)}
    grouped = {torch.nn.Linear: GroupLasso(1e-2, "columns")}
    penalty = grouped if "groups" in kind else elementwise
    args = optimizer, "groups" if kind == "groups" else "weights", penalty, 60 if kind == "a sample" else 1 << 16
    ranks = distributed.run(2, _targeted, *args)
    assert ranks[0][1] == ranks[1][1]  # bit for bit
    (alone, scales), (many, theirs) = ranks[0]
    if kind == "a sample":
        assert many == pytest.approx(0.6, abs=0.15)
    else:
        assert many == alone
        assert theirs == pytest.approx(scales, rel=1e-9)


def _frozen():
    def found(wrap):
        model = wrap(_emptied(Model(["l1", "columns"])))
        opt = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
        train(model, opt, 1)
        for p in model.parameters():
            torchreg.sharding.local(p.data).mul_(torchreg.sharding.local(p.data).abs() > 0.2)
        handle = torchreg.freeze_zeros(model)
        zeros = {name: whole(p.detach()) == 0 for name, p in model.named_parameters() if "weight" in name}
        train(model, opt, 3)
        now = {name: whole(p.detach()) for name, p in model.named_parameters()}
        assert all((now[name][zero] == 0).all() for name, zero in zeros.items())
        assert any(zero.any() for zero in zeros.values())
        state = copy.deepcopy(handle.state_dict())
        handle.load_state_dict(state)
        return now, state, {name: whole(free) for name, free in handle.support().items()}

    (now, state, free), (theirs, saved, support) = found(lambda model: model), found(_fsdp)
    assert all(torch.equal(state["zeros"][name], saved["zeros"][name]) for name in state["zeros"])
    assert all(torch.equal(free[name], support[name]) for name in free)
    return max((now[name] - theirs[name]).abs().max().item() for name in now)


def test_frozen_zeros_stay_zero_and_are_saved_whole():
    assert max(distributed.run(2, _frozen)) < 1e-12


def _on_a_part_of_the_processes():
    """A DTensor on a mesh that this process may not belong to."""
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    w = torch.linspace(-1, 1, 12).reshape(3, 4)
    p = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(1)]))
    opt = torchreg.ProxSGD([{"params": [p], "penalty": GroupLasso(0.1, "rows")}], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step()
    moved = [w.clone()]
    plain = torchreg.ProxSGD([{"params": moved, "penalty": GroupLasso(0.1, "rows")}], lr=0.1, momentum=0.9)
    for _ in range(3):
        moved[0].grad = torch.zeros_like(w)
        plain.step()
    return (torchreg.sharding.layout(p).part(moved[0]) - p.to_local()).abs().sum().item()


def test_processes_outside_the_mesh_hold_nothing():
    assert max(distributed.run(3, _on_a_part_of_the_processes)) < 1e-6
