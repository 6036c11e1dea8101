"""What else differs where several processes train: rounding, fused steps, kinds of strengths, and what is refused."""

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed_cases import GROUPED, SEPARABLE, Model, optimizers, train

import torchreg
from torchreg import L1, GroupLasso, NuclearNorm
from torchreg.sharding import local, whole


def _fsdp(model, **settings):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, **settings)


def _ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def _hybrid(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    return _fsdp(model, mesh=mesh)


def _rounded(wrap, optimizer):
    """bfloat16 weights whose shrinkage is far below half an ulp, after some steps without a gradient."""
    model = Model(["l1"], torch.bfloat16)
    for p in model.parameters():
        p.data.fill_(1.0)
    wrapped = wrap(model)
    reg = torchreg.Regularizer(wrapped, {"shared.weight": GroupLasso(2e-2, "columns"), torch.nn.Linear: L1(1e-2)})
    opt = optimizers(optimizer, reg)
    for group in opt.param_groups:
        group["lr"] = 0.02 if optimizer == "sgd" else 1e-11
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return {name: whole(p.detach()).float().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("wrap", [_ddp, _hybrid, _fsdp], ids=["replicas", "hybrid", "parts"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stochastic_rounding_is_the_same_on_replicas_and_right_on_average(wrap, optimizer):
    ranks = distributed.run(4 if wrap is _hybrid else 2, _rounded, wrap, optimizer)
    for other in ranks[1:]:
        assert all((ranks[0][name] == other[name]).all() for name in other)
    weight = ranks[0]["l1.weight"]
    assert weight.mean() == pytest.approx(1 - 0.02 * 2 * 0.01 * 40 if optimizer == "sgd" else 0.96, abs=0.04)
    assert len(set(weight.flatten().tolist())) > 1
    halves = weight[:3], weight[4:7]
    assert (halves[0] != halves[1]).any()  # parts have random numbers of their own


def _fused(dtype):
    def trained(wrap):
        model = Model(["l1", "each", "elastic", "rows"], dtype)
        wrap(model)
        names = {f"{name}.weight": {**SEPARABLE, **GROUPED}[name] for name in ("l1", "each", "elastic", "rows")}
        opt = torchreg.ProxSGD(torchreg.Regularizer(model, names).param_groups(), lr=0.1, momentum=0.9, fused=True)
        train(model, opt, 10, dtype=dtype)
        counted = opt.step_counts()
        return [whole(p.detach()) for p in model.parameters()], len(counted.counted())

    (alone, known), (many, there) = trained(lambda model: model), trained(_fsdp)
    assert known == there > 0
    return max((a - b).abs().max().item() for a, b in zip(alone, many, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_steps_of_the_parts(dtype):
    from torchreg.kernels import native

    if native.unavailable():
        pytest.skip(native.unavailable())
    assert distributed.run(2, _fused, dtype) == [0, 0]


def _strengths():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w, s = torch.linspace(-1, 1, 15).reshape(5, 3), torch.linspace(0, 1, 15).reshape(5, 3)
    found = []
    for placed in ([Shard(0)], [Shard(1)], [Replicate()]):
        for strength in (
            s,
            s[0],
            s[:, :1],
            torch.tensor(0.5),
            *(distribute_tensor(s, mesh, [p]) for p in (Shard(0), Shard(1), Replicate())),
        ):
            p = torch.nn.Parameter(distribute_tensor(w.clone(), mesh, placed))
            penalty = L1(strength)
            for opt in (
                torchreg.ProxSGD([p], lr=0.1, penalty=penalty),
                torchreg.Proximal(torch.optim.SGD([{"params": [p], "penalty": penalty}], lr=0.1)),
            ):
                with torch.no_grad():
                    p.copy_(distribute_tensor(w.clone(), mesh, placed))
                p.grad = torch.zeros_like(p)
                opt.step()
                assert p.placements == tuple(placed)
                want = L1(whole(strength)).prox(w, 0.1)
                found.append((whole(p.detach()) - want).abs().max().item())
    return max(found)


def test_strengths_of_each_weight_may_be_whole_or_sharded():
    assert max(distributed.run(2, _strengths)) == 0


def _flat(optimizer):
    """FSDP1: the shares of single weights' penalties, and what is refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def trained(wrap):
        model = wrap(Model(["l1"]))
        opt = optimizers(optimizer, torchreg.Regularizer(model, {"l1.weight": L1(2e-2), "shared.weight": L1(1e-2)}))
        train(model, opt, 10)
        with FullyShardedDataParallel.summon_full_params(model) if wrap is flat else torch.no_grad():
            weights = [p.detach().clone() for p in model.parameters()]
            return weights, torchreg.sparsity(model).total.zeros, model, opt

    def flat(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    (alone, zeros, _, _), (many, theirs, model, opt) = trained(lambda model: model), trained(flat)
    assert zeros == theirs
    reg, messages = torchreg.Regularizer(model, L1(1.0)), []
    for refused in (
        lambda: torchreg.Regularizer(model, GroupLasso(1.0, "rows")),
        lambda: torchreg.ProxSGD([{"params": list(model.parameters()), "penalty": GroupLasso(1.0, "rows")}], lr=0.1),
        lambda: torchreg.Regularizer(model, {"l1.weight": SEPARABLE["each"]}),
        lambda: torchreg.TargetSparsity(opt, 0.5, until=3),
        lambda: torchreg.sparsity(model),
        lambda: torchreg.kkt_residual(reg),
        lambda: torchreg.Regularizer(FullyShardedDataParallel(Model([]), device_id=torch.device("cpu")), L1(1.0)),
        reg,
    ):
        with pytest.raises(ValueError, match="FullyShardedDataParallel") as error:
            refused()
        messages.append(str(error.value))
    return max((a - b).abs().max().item() for a, b in zip(alone, many, strict=True)), messages


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_flat_parameters_are_shares_of_single_weights_only(optimizer):
    for worst, messages in distributed.run(2, _flat, optimizer):
        assert worst < 1e-12
        assert all("fully_shard" in message for message in messages)


class _Doubled(GroupLasso):
    """A penalty of a user's own, whose proximal operator nothing is known of."""

    def _shrunk(self, r, step):
        return super()._shrunk(r, 2 * step)


def _own_penalty(groups):
    def trained(wrap):
        model = wrap(Model(["l1"]))
        opt = optimizers("sgd", torchreg.Regularizer(model, _Doubled(1e-2, groups)))
        train(model, opt, 5)
        return [whole(p.detach()) for p in model.parameters()]

    return max((a - b).abs().max().item() for a, b in zip(trained(lambda m: m), trained(_fsdp), strict=True))


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_a_penalty_of_the_user_s_own_sees_whole_weights(groups):
    assert max(distributed.run(2, _own_penalty, groups)) < 1e-14


def _versions(optimizer):
    """What autograd notices: a weight that is changed while it is still needed."""
    model = Model(["l1"])
    _fsdp(model)
    opt = optimizers(
        optimizer, torchreg.Regularizer(model, {"shared.weight": GroupLasso(1e-2, "columns"), "*": L1(0.1)})
    )
    term = torchreg.Regularizer(model, L1(0.1))()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        term.backward()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "rmda"])
def test_a_step_is_seen_by_autograd(optimizer):
    distributed.run(2, _versions, optimizer)


def _refusals():
    model = Model(["l1"])
    reg = torchreg.Regularizer(model, L1(1e-3))
    _fsdp(model)
    messages = []

    def refused(kind, function):
        try:
            function()
        except kind as error:
            messages.append(str(error))
        else:
            messages.append("")

    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    groups = reg.param_groups()
    refused(RuntimeError, torchreg.ProxSGD(groups, lr=0.1, differentiable=True).step)
    nuclear = torchreg.Regularizer(model, NuclearNorm(1e-3)).param_groups()
    refused(TypeError, lambda: torchreg.ProxAdamW(nuclear, lr=0.1))
    opt = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    opt.step()
    state = opt.state[model.l1.weight]
    before = [local(p).clone() for p in model.parameters()]
    state["momentum_buffer"] = whole(state["momentum_buffer"])
    refused(TypeError, opt.step)

    def closure():
        loss = model(torch.ones(1, 6).double()).sum()
        loss.backward()
        return loss

    refused(TypeError, lambda: torchreg.FISTA(reg.param_groups()).step(closure))
    assert all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))
    return messages


def _scaled(wrap):
    """Steps by a GradScaler, of which the second overflows in one process alone."""
    model = Model(["l1", "columns"], torch.float32)
    wrapped = wrap(model)
    rules = {"l1.weight": L1(1e-2), "columns.weight": GroupLasso(1e-2, "columns")}
    opt = torchreg.ProxSGD(torchreg.Regularizer(wrapped, rules).param_groups(), lr=0.1, momentum=0.9)
    scaler, weights = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(3):
        opt.zero_grad()
        loss = wrapped(torch.ones(2, 6)).square().mean()
        scaler.scale(loss).backward()
        if step == 1 and dist.get_rank() == 0:
            local(model.l1.weight.grad).view(-1)[0] = float("inf")
        scaler.step(opt)
        scaler.update()
        weights.append({name: whole(p.detach()) for name, p in model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[1]["l1.weight"], weights[2]["l1.weight"])
    return scaler.get_scale()


def test_an_overflow_in_one_part_skips_the_step_everywhere():
    assert distributed.run(2, _scaled, _fsdp) == [512.0, 512.0]


def test_what_is_refused_says_so():
    for messages in distributed.run(2, _refusals):
        differentiable, nuclear, state, fista = messages
        assert "differentiable" in differentiable
        assert "NuclearNorm" in nuclear
        assert "set_optimizer_state_dict" in state
        assert "FISTA" in fista
