"""Training by several processes: the weights of a single one, without needless communication."""

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed_cases import GROUPED, SEPARABLE, SHARED, Model, names_for, optimizers, rules, train
from torch.distributed.tensor import DTensor

import torchreg
from torchreg import L1, GroupLasso, TopK
from torchreg.sharding import is_sharded, whole

OPTIMIZERS = ("sgd", "adamw", "plain_adam", "rmsprop", "adagrad", "rmda")


def _plain(model):
    return model


def _fsdp(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def _hybrid(model):
    """Two replicas, each in two parts."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    return fully_shard(model, mesh=mesh)


def _ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def _trained(optimizer, names, wrap, *, dtype=torch.float64, share=slice(None), steps=50, warm_up=0):
    model = Model(names, dtype)
    wrapped = wrap(model)
    opt = optimizers(optimizer, torchreg.Regularizer(wrapped, rules(names)))
    train(wrapped, opt, steps, share=share, dtype=dtype, warm_up=warm_up)
    kinds = {type(v) for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim}
    assert kinds <= {DTensor if is_sharded(model.free.weight) else torch.Tensor}
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def _compared(optimizer, wraps, dtype=torch.float64, split=False, steps=50, warm_up=0):
    """For each way the largest deviations from a single process, by parameter, and the weights."""
    names = names_for(optimizer)
    share = slice(dist.get_rank(), None, dist.get_world_size()) if split else slice(None)
    first = dist.get_rank() == 0
    single = [_trained(optimizer, names, _plain, dtype=dtype, steps=steps, warm_up=warm_up) if first else None]
    dist.broadcast_object_list(single)
    (alone,), found = single, []
    for wrap in wraps:
        many = _trained(optimizer, names, wrap, dtype=dtype, share=share, steps=steps, warm_up=warm_up)
        worst = {n: (alone[n] - many[n]).abs().max().item() for n in many}
        found.append((worst, {n: w.numpy() for n, w in many.items()}))
    return found


def _at_most(worst, bound, but=()):
    assert {n: e for n, e in worst.items() if not e <= bound and n not in but} == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_by_several_processes_is_that_of_one(optimizer):
    by_rank = distributed.run(2, _compared, optimizer, (_fsdp, _ddp), torch.float64, False, 15)
    for (sharded, weights), (replicated, _) in by_rank:
        _at_most({f"{name}.weight": sharded[f"{name}.weight"] for name in SEPARABLE}, 0)
        _at_most(sharded, 1e-12)
        _at_most(replicated, 0)
        assert sum(int((w == 0).sum()) for w in weights.values()) > 50
    for way in range(2):
        first, second = (rank[way][1] for rank in by_rank)
        assert all((first[n] == second[n]).all() for n in first)


def test_four_processes_some_of_which_hold_nothing_of_a_layer():
    for ((worst, _),) in distributed.run(4, _compared, "adamw", (_fsdp,), torch.float64, False, 10):
        _at_most(worst, 1e-12)


def test_hybrid_sharding_reduces_within_a_replica():
    for ((worst, _),) in distributed.run(4, _compared, "sgd", (_hybrid,), torch.float64, False, 10):
        _at_most(worst, 1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [name if name in ("sgd", "adamw") else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS],
)
def test_shares_of_a_batch_give_the_whole_batch_s_weights_in_float32(optimizer):
    """Weights are some tenths. Steps divided by the gradient's own modulus need a warm-up; see the next test."""
    warm_up = 10 if optimizer in ("adamw", "adagrad") else 0
    for found in distributed.run(2, _compared, optimizer, (_fsdp, _ddp), torch.float32, True, 50, warm_up):
        for worst, _ in found:
            _at_most(worst, 1e-6)


def _adamw_by_halves(halves, warm_up):
    """The weights of torch's own AdamW, whose gradients are the means of those of the halves of a batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Tanh(), torch.nn.Linear(512, 10))
    params = list(model.parameters())
    opt = torch.optim.AdamW(params, lr=1e-3)
    for step in range(50):
        opt.param_groups[0]["lr"] = 1e-3 * (min(1, step / 10) if warm_up else 1)
        x, y = torch.randn(32, 74, generator=torch.Generator().manual_seed(step)).split([64, 10], 1)
        losses = [(model(x[half]) - y[half]).square().mean() for half in halves]
        for p, *grads in zip(params, *(torch.autograd.grad(loss, params) for loss in losses), strict=True):
            p.grad = torch.stack(grads).mean(0)
        opt.step()
    return torch.cat([p.detach().flatten() for p in params])


def test_the_first_steps_of_torchs_own_adamw_magnify_the_rounding_of_gradients():
    """Its first one is lr·g/(|g| + ε): as uncertain as g/|g|, where g is small. A warm-up spares it."""
    whole, halves = (slice(None),), (slice(0, None, 2), slice(1, None, 2))
    cold, warm = (
        (_adamw_by_halves(whole, warm_up) - _adamw_by_halves(halves, warm_up)).abs().max() for warm_up in (False, True)
    )
    assert warm < 1e-6
    assert cold > 4 * warm


def _collectives(penalty, optimizer, steps=3):
    """How many collectives each of the last steps takes."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = Model(["l1", "l2"])
    _fsdp(model)
    opt = optimizers(optimizer, torchreg.Regularizer(model, penalty))
    counts = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with CommDebugMode() as mode:
            opt.step()
        counts.append(mode.get_total_counts())
    return counts


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "rmda"])
def test_penalties_of_single_weights_and_of_rows_take_no_collective(optimizer):
    each = {"l1.weight": SEPARABLE["each"], "l2.weight": GROUPED["rows"], torch.nn.Linear: L1(1e-3)}
    assert distributed.run(2, _collectives, each, optimizer) == [[0, 0, 0]] * 2


@pytest.mark.parametrize("optimizer", ["sgd", "plain_adam", "rmda"])
def test_groups_that_cross_processes_take_one_collective_for_all_rules_of_a_step(optimizer):
    crossing = {
        "l1.weight": GroupLasso(1e-3, "columns"),
        SHARED: GroupLasso(1e-3, SHARED),
        "joint.*.weight": torchreg.SparseGroupLasso(1e-3, 1e-3, "tensor"),
        torch.nn.Linear: L1(1e-3),
    }
    assert distributed.run(2, _collectives, crossing, optimizer) == [[1, 1, 1]] * 2


def _hooked(penalty):
    from torch.distributed.tensor.debug import CommDebugMode

    model = Model(["l1", "l2"])
    _fsdp(model)
    reg = torchreg.Regularizer(model, penalty)
    opt = torch.optim.SGD(reg.param_groups(), lr=0.1)
    reg.attach(opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with CommDebugMode() as mode:
        opt.step()
    return mode.get_total_counts()


def test_the_hook_takes_no_more():
    crossing = {"l1.weight": GroupLasso(1e-3, "columns"), SHARED: GroupLasso(1e-3, SHARED), torch.nn.Linear: L1(1e-3)}
    assert distributed.run(2, _hooked, crossing) == [1, 1]
    assert distributed.run(2, _hooked, {torch.nn.Linear: L1(1e-3)}) == [0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_groups_in_a_metric_take_a_bounded_number_of_collectives(optimizer):
    crossing = {"l1.weight": GroupLasso(1e-3, "columns"), SHARED: GroupLasso(1e-3, SHARED)}
    for counts in distributed.run(2, _collectives, crossing, optimizer):
        assert max(counts) <= 19


def _two_dimensional(penalty, optimizer):
    """Tensor parallel layers, fully sharded: the deviation from a single process, and the placements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def network():
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7), torch.nn.Linear(7, 1)
        return torch.nn.Sequential(*layers).double()

    def trained(model):
        opt = optimizers(optimizer, torchreg.Regularizer(model, penalty))
        for step in range(20):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            opt.zero_grad()
            (model(x) - 1).square().mean().backward()
            opt.step()
        return {name: whole(p.detach()) for name, p in model.named_parameters()}

    alone = trained(network())
    model = network()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    many = trained(fully_shard(model, mesh=mesh["dp"]))
    return {n: (alone[n] - many[n]).abs().max().item() for n in alone}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_tensor_parallel_and_sharded_layers(optimizer):
    penalty = {
        "0.weight": GroupLasso(5e-3, "columns"),
        "2.weight": torchreg.SparseGroupLasso(1e-3, 5e-3, "rows"),
        "3.weight": TopK(3),
        "0.bias": L1(torch.linspace(0, 0.1, 8, dtype=torch.float64)),
        torch.nn.Linear: L1(1e-3),
    }
    for worst in distributed.run(4, _two_dimensional, penalty, optimizer):
        _at_most(worst, 1e-10)


def _sequence_parallel():
    """Layers whose gradients arrive as sums that are still to be taken."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a, self.b = torch.nn.LayerNorm(8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)

        def forward(self, x):
            return self.b(torch.relu(self.a(self.norm(x))))

    def trained(model):
        rules = {"norm.weight": L1(0.05), "a.weight": GroupLasso(0.01, "columns"), "*.weight": L1(0.01)}
        opt = torchreg.ProxSGD(torchreg.Regularizer(model, rules).param_groups(), lr=0.1, momentum=0.9)
        for step in range(10):
            opt.zero_grad()
            model(torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            placed = {placement for p in model.parameters() for placement in getattr(p.grad, "placements", ())}
            opt.step()
        return {name: whole(p.detach()) for name, p in model.named_parameters()}, any(p.is_partial() for p in placed)

    (alone, _), model = trained(Network()), Network()
    plan = {
        "norm": SequenceParallel(),
        "a": ColwiseParallel(input_layouts=Shard(1)),
        "b": RowwiseParallel(output_layouts=Replicate()),
    }
    many, partial = trained(parallelize_module(model, init_device_mesh("cpu", (2,)), plan))
    assert partial
    return {name: (alone[name] - many[name]).abs().max().item() for name in alone}


def test_gradients_that_are_still_to_be_summed():
    for worst in distributed.run(2, _sequence_parallel):
        _at_most(worst, 1e-6)
