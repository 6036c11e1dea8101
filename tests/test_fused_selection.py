"""Which implementation a step takes on the CPU, why not the fused one, and that copies and forks keep it."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch
from optimizer_cases import identical, snapshot
from torch import nn
from torch._dynamo.testing import CompileCounter

from torchreg import L1, ElasticNet, GroupLasso, ProxAdamW, ProxSGD
from torchreg.groups import Labels
from torchreg.kernels import native, selection, toolchain

LARGE, SMALL = selection.SMALLEST, 100

needs_kernel = pytest.mark.skipif(native.unavailable() is not None, reason=f"no kernel: {native.unavailable()}")


def weights(*sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def set_gradients(opt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def stepped(params, steps=2, **kwargs):
    opt = ProxSGD(params, **{"lr": 0.1, "momentum": 0.9, **kwargs})
    for seed in range(steps):
        set_gradients(opt, seed)
        opt.step()
    return opt


def fused(opt):
    """The ids of the parameters that the last step fused."""
    counts = opt.step_counts()
    return set() if counts is None else {id(p) for p in counts.counted()}


def ids(params):
    return {id(p) for p in params}


@pytest.fixture
def forgotten():
    """Nothing remembered of the toolchain, before and after."""
    caches = native.unavailable, toolchain.library
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# Unasked


@needs_kernel
@pytest.mark.parametrize(
    ("sizes", "kwargs", "expected"),
    [
        ([LARGE], {"penalty": L1(0.1)}, True),
        ([LARGE // 2] * 2, {"penalty": L1(0.1)}, True),
        ([LARGE - 1], {"penalty": L1(0.1)}, False),
        ([SMALL], {"penalty": L1(0.1)}, False),
        ([SMALL], {"penalty": L1(0.1), "fused": True}, True),
        ([SMALL], {"fused": True}, True),
        ([(LARGE // 8, 8)], {"penalty": GroupLasso(0.1)}, True),
        ([(LARGE // 8, 8)], {"penalty": GroupLasso(0.1, "columns")}, False),
        ([LARGE], {}, False),
        ([LARGE], {"penalty": L1(0.1), "fused": False}, False),
        ([LARGE], {"penalty": L1(0.1), "foreach": False}, False),
        ([LARGE], {"penalty": L1(0.1), "foreach": True}, False),
        ([LARGE], {"penalty": L1(0.1), "differentiable": True}, False),
    ],
    ids=str,
)
def test_large_penalised_models_are_fused_unless_told_otherwise(sizes, kwargs, expected):
    params = weights(*sizes)
    if kwargs.get("differentiable"):
        params = [p.requires_grad_(False) for p in params]
    assert fused(stepped(params, **kwargs)) == (ids(params) if expected else set())


def test_what_is_on_a_gpu_is_fused_whatever_there_is_on_the_cpu():
    small, large = torch.zeros(1), torch.zeros(LARGE)
    there = torch.zeros(1, device="meta")  # stands for a GPU, on which any number of weights pays
    for parameters in ([there], [there, small], [there, large]):
        assert selection.pays(there.device, parameters)
        assert selection.pays(small.device, parameters) == any(p is large for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True}, {"dampening": 0.3}, {"weight_decay": 0.1}], ids=str)
def test_without_a_penalty_the_step_is_torch_sgd_to_the_last_bit(hyper, dtype):
    ours, theirs = weights(LARGE, SMALL, dtype=dtype), weights(LARGE, SMALL, dtype=dtype)
    stepped(ours, 3, **hyper)
    opt = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False, **hyper)
    for seed in range(3):
        set_gradients(opt, seed)
        opt.step()
    assert identical(snapshot(ours), snapshot(theirs))


@needs_kernel
def test_groups_without_a_penalty_go_along():
    a, b, c = weights(LARGE), weights(SMALL), weights(SMALL)
    groups = [{"params": a, "penalty": L1(0.1)}, {"params": b}, {"params": c, "fused": False}]
    assert fused(stepped(groups)) == ids(a + b)
    assert fused(stepped([{"params": weights(SMALL), "penalty": L1(0.1)}, {"params": a}])) != set()


@needs_kernel
def test_what_has_no_fused_form_is_stepped_beside_it():
    def mixed():
        plain = weights(LARGE, SMALL) + weights(SMALL, dtype=torch.float64)
        return plain, weights(SMALL, dtype=torch.bfloat16) + weights(SMALL, dtype=torch.complex64)

    (plain, other), (plain_too, other_too) = mixed(), mixed()
    opt = stepped([*other, *plain], penalty=ElasticNet(0.1, 0.2))
    stepped([*other_too, *plain_too], penalty=ElasticNet(0.1, 0.2), fused=False, foreach=False)
    assert fused(opt) == ids(plain)
    for a, b in zip(plain + other, plain_too + other_too, strict=True):
        torch.testing.assert_close(a, b)


# Asked for, and refused with the reason


class _Custom(L1.__mro__[2]):
    """A penalty that no kernel knows."""

    type_name = "Custom"

    def value(self, w):
        return w.abs().sum()

    def grad(self, w):
        return torch.sgn(w)

    def prox(self, w, step=1.0):
        return torch.nn.functional.softshrink(w, step) + 0

    def optimality_residual(self, w, grad):
        raise NotImplementedError

    def strength_max(self, grad):
        raise NotImplementedError

    def threshold(self, step):
        return step


class _Halved(GroupLasso):
    """Group lasso with another proximal operator."""

    def prox(self, w, step=1.0):
        return super().prox(w, step) / 2


def columns(n):
    """A weight of shape (n, n) whose columns are not neighbours in memory."""
    return nn.Parameter(torch.ones(n, n))


class _Tagged(torch.Tensor):
    """A tensor subclass."""


UNFIT = {
    "complex": (lambda: weights(3, dtype=torch.complex64)[0], L1(0.1), "torch.complex64"),
    "float16": (lambda: weights(3, dtype=torch.float16)[0], L1(0.1), "torch.float16"),
    "bfloat16": (lambda: weights(3, dtype=torch.bfloat16)[0], None, "for float32, float64"),
    "meta": (lambda: nn.Parameter(torch.empty(3, device="meta")), L1(0.1), "none for meta"),
    "subclass": (lambda: nn.Parameter(torch.ones(3).as_subclass(_Tagged)), L1(0.1), "_Tagged"),
    "negated": (lambda: nn.Parameter(torch._neg_view(torch.ones(3))), L1(0.1), "negated"),
    "custom penalty": (lambda: weights(3)[0], _Custom(), "Custom has no fused form"),
    "custom groups": (lambda: weights(3)[0], _Halved(0.1), "_Halved has no fused form"),
    "groups across memory": (lambda: columns(3), GroupLasso(0.1, "columns"), r"its groups \(columns\) do not lie in"),
    "labels": (lambda: weights(3)[0], GroupLasso(0.1, Labels(torch.tensor([0, 1, 0]))), r"its groups \(2 labels\)"),
}
unfit = pytest.mark.parametrize(("make", "penalty", "reason"), UNFIT.values(), ids=UNFIT)


@unfit
def test_what_cannot_be_fused_is_refused_with_the_reason(make, penalty, reason):
    opt = ProxSGD(weights(3), lr=0.1)
    before = len(opt.param_groups)
    with pytest.raises(RuntimeError, match=r"`fused=True` can't be had.*\(3,.*" + reason):
        opt.add_param_group({"params": [make()], "penalty": penalty, "fused": True})
    assert len(opt.param_groups) == before


@unfit
def test_unasked_it_takes_the_eager_form(make, penalty, reason):
    p, large = make(), weights(LARGE)
    opt = ProxSGD([{"params": [p], "penalty": penalty}, {"params": large, "penalty": L1(0.1)}], lr=0.1, momentum=0.9)
    p.grad, large[0].grad = torch.full_like(p, 2), torch.ones_like(large[0])
    before = p.detach().clone()
    opt.step()
    assert fused(opt) <= ids(large)
    assert p.is_meta or not torch.equal(p, before)


@needs_kernel
def test_what_becomes_unfit_later_is_refused_at_the_step_and_changes_nothing():
    a, b = weights(3, 3)
    opt = stepped([a, b], penalty=L1(0.1), fused=True)
    b.data = b.data.half()
    set_gradients(opt)
    before = snapshot([a, b])
    with pytest.raises(RuntimeError, match=r"`fused=True` can't be had.*float16"):
        opt.step()
    assert identical(snapshot([a, b]), before)


@pytest.mark.parametrize("how", ["switch", "no compiler"])
def test_without_a_kernel_it_is_refused_when_asked_for_and_eager_when_not(how, forgotten, monkeypatch, tmp_path):
    expected = snapshot(stepped(weights(LARGE), penalty=L1(0.1), foreach=False).param_groups[0]["params"])
    if how == "switch":
        monkeypatch.setenv(toolchain.SWITCH, "0")
        reason = "switched off by TORCHREG_NATIVE=0"
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv(toolchain.SWITCH, raising=False)
        reason = "no C compiler"
    with pytest.raises(RuntimeError, match=f"`fused=True` can't be had.*{reason}"):
        ProxSGD(weights(3), lr=0.1, penalty=L1(0.1), fused=True)
    params = weights(LARGE)
    opt = stepped(params, penalty=L1(0.1))
    assert fused(opt) == set()
    torch.testing.assert_close(snapshot(params), expected)


# Copies, checkpoints, torch.compile


@needs_kernel
@pytest.mark.parametrize("make", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(make):
    opt = stepped(weights(SMALL), penalty=L1(0.1), fused=True)
    twin = make(opt)
    assert fused(opt) == ids(opt.param_groups[0]["params"])
    assert twin.step_counts() is None
    for o in (opt, twin):
        set_gradients(o, 7)
        o.step()
    (a,), (b,) = (o.param_groups[0]["params"] for o in (opt, twin))
    assert identical(snapshot([a]), snapshot([b]))
    assert (fused(opt), fused(twin)) == ({id(a)}, {id(b)})
    counts = make(opt.step_counts())
    assert identical(counts.take_counts(), opt.step_counts().take_counts())


@needs_kernel
@pytest.mark.parametrize("cls", [ProxSGD, ProxAdamW])
@pytest.mark.parametrize("resized", ["parameter", "gradient", "state", "state in place"])
def test_what_is_of_another_size_than_its_parameter_is_refused_and_changes_nothing(cls, resized):
    params = weights(SMALL, 10 * SMALL)
    opt = cls(params, **({"momentum": 0.9} if cls is ProxSGD else {}), lr=0.1, penalty=L1(0.1), fused=True)
    for seed in range(2):
        set_gradients(opt, seed)
        opt.step()
    key = "momentum_buffer" if cls is ProxSGD else "exp_avg_sq"
    if resized == "parameter":
        params[1].data, params[1].grad = torch.ones(11 * SMALL), None
    elif resized == "state":
        opt.state[params[1]][key] = torch.ones(2 * SMALL)
    elif resized == "state in place":
        opt.state[params[1]][key].data = torch.ones(2 * SMALL)
    set_gradients(opt)
    if resized == "gradient":
        params[1].grad.data = torch.ones(2 * SMALL)
    before, state = snapshot(params), copy.deepcopy(opt.state_dict())
    what = "gradient" if resized == "gradient" else "state"
    with pytest.raises(
        ValueError, match=rf"The {what} of a parameter of shape \(1[01]00,\) has the shape \((1000|200),"
    ):
        opt.step()
    assert identical(snapshot(params), before)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"])


@needs_kernel
def test_a_state_on_another_device_is_refused_and_changes_nothing():
    params = weights(SMALL, 10 * SMALL)
    opt = ProxSGD(params, momentum=0.9, lr=0.1, penalty=L1(0.1), fused=True)
    for seed in range(2):
        set_gradients(opt, seed)
        opt.step()
    opt.state[params[1]]["momentum_buffer"] = torch.ones(10 * SMALL, device="meta")
    before = snapshot(params)
    with pytest.raises(ValueError, match="The state of a parameter on cpu is on meta: move one of them"):
        opt.step()
    assert identical(snapshot(params), before)


def _transposed(t):
    return t.t().contiguous().t()


@needs_kernel
@pytest.mark.parametrize("cls", [ProxSGD, ProxAdamW])
def test_buffers_that_one_group_loses_as_another_gains_them_are_not_taken_for_each_other(cls):
    name, on, off = ("momentum", 0.9, 0.0) if cls is ProxSGD else ("amsgrad", True, False)
    key = "momentum_buffer" if cls is ProxSGD else "max_exp_avg_sq"
    ends = []
    for fused in (True, False):
        params = [nn.Parameter(torch.ones(30, 30)) for _ in range(2)]
        opt = cls([{"params": [p], name: on} for p in params], lr=0.1, penalty=L1(0.1), fused=fused)
        for step in range(8):
            for p in params:
                p.grad = torch.arange(900.0).view(30, 30) * (1 + step)
            opt.param_groups[0][name] = on if step < 1 or step > 4 else off
            opt.param_groups[1][name] = on if step <= 4 else off
            opt.step()
            if step == 0:
                for p in params:
                    opt.state[p][key] = _transposed(opt.state[p][key])
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends)


@needs_kernel
def test_a_buffer_of_another_size_is_refused_where_another_group_just_lost_its_own():
    params = weights(SMALL, 2 * SMALL)
    groups = [{"params": [p], "momentum": momentum} for p, momentum in zip(params, (0.0, 0.9), strict=True)]
    opt = ProxSGD(groups, lr=0.1, penalty=L1(0.1), fused=True)
    for seed in range(3):
        set_gradients(opt, seed)
        opt.step()
    opt.state[params[0]]["momentum_buffer"] = torch.zeros_like(params[1])
    opt.param_groups[0]["momentum"], opt.param_groups[1]["momentum"] = 0.9, 0.0
    with pytest.raises(ValueError, match="The state of a parameter"):
        opt.step()


@needs_kernel
@pytest.mark.parametrize("turned", ["buffer", "parameter"])
def test_what_comes_to_lie_otherwise_at_its_address_is_seen_to(turned):
    ends = []
    for fused in (None, False):
        opt = ProxSGD([p := nn.Parameter(torch.ones(300, 300))], momentum=0.9, lr=0.1, penalty=L1(0.1), fused=fused)
        for step in range(6):
            assert fused is False or step == 0 or turned == "parameter" or opt.step_counts() is not None
            p.grad = torch.arange(90000.0).view(300, 300) / 100
            opt.step()
            if step == 2 and turned == "buffer":
                opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].t()
            elif step == 2:
                p.data = torch._neg_view(p.data)
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends)


@needs_kernel
def test_gradients_that_come_to_lie_otherwise_between_steps_are_seen_to():
    ends = []
    for fused in (True, False):
        opt = ProxSGD([p := nn.Parameter(torch.ones(30, 20))], momentum=0.9, lr=0.1, penalty=L1(0.1), fused=fused)
        ends.append(p)
        for step in range(6):
            g = torch.arange(600.0).view(30, 20)
            p.grad = g if step < 2 else g.view(20, 30).t() if step < 4 else torch._neg_view(g)
            opt.step()
    torch.testing.assert_close(*ends)


@needs_kernel
@pytest.mark.parametrize(("saved", "mine"), [(True, False), (False, True), (None, True), (True, None)])
def test_a_checkpoint_brings_the_state_and_leaves_the_choice(saved, mine):
    source = stepped(weights(SMALL), penalty=L1(0.1), fused=saved)
    params = [nn.Parameter(p.detach().clone()) for p in source.param_groups[0]["params"]]
    opt = stepped(weights(SMALL), penalty=L1(0.3), fused=mine)
    opt.param_groups[0]["params"][0].data = params[0].data
    opt.load_state_dict(copy.deepcopy(source.state_dict()))
    assert opt.param_groups[0]["fused"] is mine
    assert opt.step_counts() is None
    for o in (source, opt):
        set_gradients(o, 7)
        o.step()
    assert bool(fused(opt)) is bool(mine)
    torch.testing.assert_close(opt.param_groups[0]["params"][0], source.param_groups[0]["params"][0])


def test_a_compiled_step_of_large_tensors_is_one_graph():
    torch._dynamo.reset()
    ours, theirs = weights(LARGE, SMALL), weights(LARGE, SMALL)
    kwargs = {"lr": torch.tensor(0.1), "momentum": 0.9, "penalty": L1(0.1)}
    opt, eager = ProxSGD(ours, **kwargs), ProxSGD(theirs, foreach=False, **kwargs)
    step = ProxSGD.step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(4):
        for o in (opt, eager):
            set_gradients(o, seed)
        with torch.no_grad():
            compiled(opt)
        eager.step()
    assert counter.frame_count == 2  # the first step, which fills the momentum buffers, and all others
    torch.testing.assert_close(snapshot(ours), snapshot(theirs))


@needs_kernel
def test_counts_are_never_those_of_an_earlier_step():
    torch._dynamo.reset()
    opt = stepped(weights(LARGE), penalty=L1(0.1))
    assert opt.step_counts() is not None
    torch.compile(lambda: opt.step(), backend="eager")()
    assert opt.step_counts() is None


# Forks


@needs_kernel
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_steps_without_hanging():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours, theirs = weights(3 * native.PIECE_SIZE), weights(3 * native.PIECE_SIZE)
        opts = [stepped(params, penalty=L1(0.1), fused=True) for params in (ours, theirs)]
        ours[0].data.share_memory_()
        for opt in opts:
            set_gradients(opt, 7)
        child = multiprocessing.get_context("fork").Process(target=opts[0].step)
        child.start()
        child.join(60)
        hanging = child.is_alive()
        if hanging:
            child.kill()
        assert not hanging
        assert child.exitcode == 0
        opts[1].step()
        assert identical(snapshot(ours), snapshot(theirs))
    finally:
        torch.set_num_threads(before)


def test_a_parameter_listed_twice_is_stepped_twice_in_turn():
    results = []
    for form in ({"foreach": False}, {"fused": True}):
        p = nn.Parameter(torch.ones(1 << 17, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        with pytest.warns(UserWarning, match="duplicate"):
            opt = ProxSGD([p, p], lr=0.1, momentum=0.9, **form)
        for _ in range(2):
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)
