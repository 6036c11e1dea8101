"""Checkpoints by torch.distributed.checkpoint: other numbers of processes go on where one has stopped."""

import itertools

import distributed
import pytest
import torch.distributed as dist
from distributed_cases import Model, names_for, optimizers, rules, train

import torchreg
from torchreg.sharding import whole

LEFT = {"topk", "topkcolumns", "nuclear"}  # slow, and of no other state
FEW = ("l1", "each", "mcp", "rows", "labels", "nm")  # of each kind, for the other optimizers than SGD


def _fsdp(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model) if dist.get_world_size() > 1 else model


def _prepared(optimizer, seed):
    names = [name for name in names_for(optimizer) if name not in LEFT] if optimizer == "sgd" else FEW
    model = _fsdp(Model(names))
    for p in model.parameters():
        torchreg.sharding.local(p.data).add_(seed)
    reg = torchreg.Regularizer(model, rules(names))
    return model, reg, optimizers(optimizer, reg)


def _states(model, opt, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt, options=options)}


def _weights(model):
    return {name: whole(p.detach()).numpy() for name, p in model.named_parameters()}


def _saved(path, optimizer, flat):
    """What the weights become of which a checkpoint is written on the way."""
    import torch.distributed.checkpoint as dcp

    model, reg, opt = _prepared(optimizer, 0)
    reg.strength_scale = 0.5
    train(model, opt, 4)
    dcp.save(_states(model, opt, flat), checkpoint_id=path)
    train(model, opt, 4, start=4)
    return _weights(model)


def _resumed(path, optimizer, flat, again=None):
    """What the weights become from the checkpoint on; ``again`` is where another one is written first."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model, reg, opt = _prepared(optimizer, 1)
    states = _states(model, opt, flat)
    dcp.load(states, checkpoint_id=path)
    set_model_state_dict(model, states["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, opt, states["optim"], options=options)
    assert float(reg.strength_scale) == 0.5
    if again is not None:
        dcp.save(_states(model, opt, flat), checkpoint_id=again)
    train(model, opt, 4, start=4)
    return _weights(model)


@pytest.mark.parametrize(
    ("optimizer", "flat"),
    [
        *itertools.product(["sgd", "adamw"], [False, True]),
        *[("rmsprop", False), ("rmda", True)],
        *[pytest.param(name, flat, marks=pytest.mark.slow) for name, flat in (("rmsprop", True), ("rmda", False))],
    ],
)
def test_two_processes_save_and_four_and_one_go_on(tmp_path, optimizer, flat):
    first, second = str(tmp_path / "of two"), str(tmp_path / "of four")
    want = distributed.run(2, _saved, first, optimizer, flat)[0]
    four = distributed.run(4, _resumed, first, optimizer, flat, second)
    for path in (first, second):
        for got in [*four, *distributed.run(1, _resumed, path, optimizer, flat)]:
            assert {n: abs(want[n] - got[n]).max() for n in want if not abs(want[n] - got[n]).max() < 1e-12} == {}


def _warmed_up(optimizer):
    """`get_optimizer_state_dict` takes a step with zero gradients and lr = 0 to create a state that there is not."""
    model, _, opt = _prepared(optimizer, 0)
    schedule = torchreg.TargetSparsity(opt, {"l1.weight": 0.5}, until=4)
    before, scale = _weights(model), schedule.state_dict()
    _states(model, opt, False)
    after = _weights(model)
    same = all((before[name] == after[name]).all() for name in before)
    now = schedule.state_dict()
    return (
        same,
        scale["last_epoch"] == now["last_epoch"],
        list(map(float, scale["scales"])),
        list(map(float, now["scales"])),
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_the_warm_up_step_changes_neither_weights_nor_schedules(optimizer):
    for same, counted, before, after in distributed.run(2, _warmed_up, optimizer):
        assert same
        assert counted
        assert before == after
