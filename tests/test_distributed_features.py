"""Each feature under several processes: on meshes of two dimensions, and from distributed checkpoints."""

import distributed
import pytest
import torch
import torch.distributed as dist
from feature_cases import FEATURES, STEPS, assert_same, small, trained, ways

HALFWAY = STEPS // 2
KEPT = ("loss term", "hook", "TargetSparsity", "SparsityMonitor", "freeze_zeros", "compact")


def _fsdp(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model) if dist.get_world_size() > 1 else model


def _sharded(compacted):
    return trained("compact", "L1", wrap=_fsdp, model=compacted)


def test_a_compacted_model_is_trained_in_parts():
    pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")
    for got in distributed.run(2, _sharded, small()):
        assert_same(got, trained("compact", "L1"))


def _two_dimensional(compacted):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def wrap(model):
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["dp"])

    chosen = [(feature, "L1") for feature in FEATURES if compacted or feature != "compact"]
    models = {"compact": compacted}
    return {
        (penalty, feature): trained(feature, penalty, wrap=wrap, model=models.get(feature))
        for feature, penalty in [*chosen, ("ProxSGD", "GroupLasso")]
    }


@pytest.fixture(scope="module")
def two_dimensional():
    return distributed.run(4, _two_dimensional, small())


@ways
def test_tensor_parallel_and_sharded_layers_train_as_one_process(penalty, feature, two_dimensional):
    expected = trained(feature, penalty)
    for rank, got in enumerate(two_dimensional):
        weights, ends = got[penalty, feature]
        assert_same((weights, ends if rank == 0 or ends else expected[1]), expected)


def _states(model, part):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, part.optimizer)}
    return states | {str(i): keeper.state_dict() for i, keeper in enumerate(part.kept)}


def _saved(path, compacted):
    import torch.distributed.checkpoint as dcp

    for feature in KEPT if compacted else KEPT[:-1]:
        trained(
            feature,
            "L1",
            wrap=_fsdp,
            model=compacted if feature == "compact" else None,
            steps=range(HALFWAY),
            after=lambda model, part, at=f"{path}/{feature}": dcp.save(_states(model, part), checkpoint_id=at),
        )


def _resumed(path, compacted):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    def load(model, part):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        states = _states(model, part)
        dcp.load(states, checkpoint_id=f"{path}/{feature}")
        set_model_state_dict(model, states["model"])
        set_optimizer_state_dict(model, part.optimizer, states["optim"])
        for i, keeper in enumerate(part.kept):
            keeper.load_state_dict(states[str(i)])

    found = {}
    for feature in KEPT if compacted else KEPT[:-1]:
        model = compacted if feature == "compact" else None
        found[feature] = trained(feature, "L1", wrap=_fsdp, model=model, steps=range(HALFWAY, STEPS), before=load)
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("checkpoints"))
    distributed.run(2, _saved, path, small())
    return [*distributed.run(4, _resumed, path, small()), *distributed.run(1, _resumed, path, small())]


@pytest.mark.parametrize("feature", KEPT)
def test_four_processes_and_one_go_on_where_two_have_saved(feature, resumed):
    weights, ends = trained(feature, "L1")
    for found in resumed:
        got, later = found[feature]
        assert_same((got, later), (weights, ends[len(ends) - len(later) :]))
