"""Whatever the loop does with its gradients, each feature gives the weights and logs of a plain loop."""

import math

import pytest
import torch
import torch.distributed as dist
from feature_cases import (
    FEATURES,
    PENALTIES,
    STEPS,
    assert_same,
    batch,
    data_loss,
    features,
    network,
    penalties,
    small,
    trained,
    ways,
    whole,
)
from torch import nn

import torchreg
from torchreg import L1, SparsityMonitor

OVERFLOWING = 3


def accumulated(part, model, x, y):
    for i in range(4):
        ((data_loss(model, x[i::4], y[i::4]) + part.term()) / 4).backward()
    part.optimizer.step()


def own_share(part, model, x, y):
    share = slice(dist.get_rank(), None, dist.get_world_size())
    whole(part, model, x[share], y[share])


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


@pytest.mark.parametrize("feature", ["hook", "Proximal", "RMDA", "TargetSparsity", "SparsityMonitor", "compact"])
def test_a_compiled_step_is_the_plain_one(feature):
    torch.compiler.reset()
    taken = []

    def compiled(part, model, x, y):
        (data_loss(model, x, y) + part.term()).backward()
        if not taken:
            taken.append(torch.compile(lambda: part.optimizer.step(), backend="eager"))
        taken[0]()

    few = range(2)
    assert_same(trained(feature, "L1", compiled, steps=few), trained(feature, "L1", steps=few), 1e-6)


@ways
def test_a_model_in_training_is_exported_as_it_is(feature, penalty):
    def check(model, part):
        x, y = batch(0)
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
        before = [p.detach().clone() for p in model.parameters()]
        whole(part, model, x, y)  # which goes on
        assert not all(map(torch.equal, before, model.parameters()))

    trained(feature, penalty, after=check)


def test_a_monitor_of_bfloat16_weights_logs_what_it_would_of_the_same_numbers_in_float32():
    written = {}

    class Writer:
        def __init__(self, log):
            self.log = log

        def add_scalar(self, tag, value, step):
            self.log[tag, step] = value

    model = network("freeze_zeros", torch.bfloat16)
    for kind in (torch.bfloat16, torch.float32):
        reg = torchreg.Regularizer(model.to(kind), L1(2e-2))
        monitor = SparsityMonitor(reg, Writer(written.setdefault(kind, {})), every=1)
        monitor.step(1.0)
    assert written[torch.bfloat16] == pytest.approx(written[torch.float32], rel=1e-6)
    assert written[torch.bfloat16]["sparsity/total", 1] > 0.4


def test_a_bfloat16_model_is_compacted_with_the_same_outputs():
    compact = pytest.importorskip("torchreg.export").compact
    pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")
    model, x = network(dtype=torch.bfloat16), torch.randn(5, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight[::2] = model[0].bias[::2, None] = 0
    small = compact(model, x, seconds=0).model
    assert small[0].weight.shape == (4, 6)
    assert small[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ways
def test_a_gpu_gives_the_weights_of_the_cpu(feature, penalty):
    assert_same(trained(feature, penalty, device="cuda"), trained(feature, penalty))


def _replicated(compacted):
    wrap = nn.parallel.DistributedDataParallel
    models = {"compact": compacted}
    ways = [(feature, penalty) for feature in FEATURES for penalty in PENALTIES if compacted or feature != "compact"]
    return {way: trained(*way, step=own_share, wrap=wrap, model=models.get(way[0])) for way in ways}


@pytest.fixture(scope="module")
def replicas():
    import distributed

    return distributed.run(2, _replicated, small())


@features
@penalties
def test_replicas_by_ddp_train_as_one_process_with_all_data(feature, penalty, replicas):
    expected = trained(feature, penalty)
    first, second = (replica[feature, penalty] for replica in replicas)
    assert_same(first, expected)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
