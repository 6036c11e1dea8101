"""The fused AdamW steps against torch's Adam and a proximal operator: C on the CPU, Triton through its interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from optimizer_cases import PENALTIES, parameters, set_gradients, snapshot
from test_fused_step import (
    NUMBERS,
    RUNS,
    Poisoned,
    brute_force,
    drawn,
    dtypes,
    grouped,
    one_and_two_threads,
    spread,
    using,
)
from torch import nn
from triton_support import require_triton

from torchreg import L1, L2, ElasticNet, GroupLasso, ProxAdamW, SparseGroupLasso
from torchreg.kernels import ADAM, AdamStep, AdamTensors, native, triton_step
from torchreg.kernels.plan import Plan

pytestmark = pytest.mark.usefixtures("poisoned")

HYPERS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    "identity": {"identity": True, "weight_decay": 0.1},
    "all": {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "eps": 1e-2},
}
HALF = (torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

hypers = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)


def a_step(penalty=None, **changes) -> AdamStep:
    values = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "amsgrad": False,
        "maximize": False,
        "penalty": penalty,
        "prox_step": 0.05,
        "identity": False,
        "stochastic_rounding": True,
    }
    return AdamStep(**{**values, **changes})


def tensors(params, grads, step: AdamStep, steps_done: int = 3) -> AdamTensors:
    """With moments of a training that is under way."""
    generator = torch.Generator().manual_seed(5)

    def like(p):
        return torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    m, v = [like(p) for p in params], [like(p).square_() for p in params]
    x = [like(p).square_() for p in params] if step.amsgrad else []
    counters = [torch.tensor(float(steps_done + i)) for i in range(len(params))]
    return AdamTensors(params, grads, m, v, x, counters, seeds=[1000 * i + 7 for i in range(len(params))])


def copied(t: AdamTensors) -> AdamTensors:
    return AdamTensors(
        **{
            f.name: [e.clone() if isinstance(e, torch.Tensor) else e for e in getattr(t, f.name)]
            for f in dataclasses.fields(t)
        }
    )


def assert_equal(a: AdamTensors, b: AdamTensors) -> None:
    for name, theirs in vars(b).items():
        torch.testing.assert_close(getattr(a, name), theirs, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def run(name: str, ours: AdamTensors, step: AdamStep, plan: Plan | None = None) -> Plan:
    piece = native.PIECE_SIZE if name == "native" else triton_step.PIECE_SIZE
    plan = plan or Plan(ours.params[0].device, ours.params[0].dtype, piece, AdamStep)
    ours.advance()
    plan.update([(ours, step)])
    (native if name == "native" else triton_step).run("prox_adam", plan)
    plan.finish()
    return plan


def require(name: str, dtype: torch.dtype) -> None:
    if name == "triton":
        require_triton()
    elif dtype not in native.DTYPES:
        pytest.skip("the compiled step is for float32 and float64")
    elif native.unavailable() is not None:
        pytest.skip(native.unavailable())


kernels = pytest.mark.parametrize("name", ["native", "triton"])


@pytest.mark.pairs(name="triton")
@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
@hypers
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
def test_a_kernel_agrees_with_torch_and_a_proximal_operator(name, dtype, penalty, hyper):
    require(name, dtype)
    device = DEVICE if name == "triton" else torch.device("cpu")
    step = a_step(penalty.to(device) if penalty else None, **hyper)
    given = parameters(dtype)
    params, grads = ([t.detach().to(device) for t in ts] for ts in (given, [p.grad for p in given]))
    grads[0][0, 0], grads[0][1, 1], grads[3][0, 0] = torch.nan, torch.inf, -torch.inf
    ours = tensors(params, grads, step)
    theirs = copied(ours)
    wide = step if penalty else dataclasses.replace(step, penalty=L1(0.0), stochastic_rounding=False)
    for _ in range(1 if dtype in HALF else 3):  # whose roundings of the moments add up
        run(name, ours, step)
        ADAM.eager(theirs, wide, False)
    assert_equal(ours, theirs)
    assert torch.isnan(ours.params[0][0, 0])
    assert not any((p.signbit() & (p == 0)).any() for p in ours.params) or penalty is None


@kernels
@pytest.mark.parametrize("identity", [False, True], ids=["adaptive", "identity"])
@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_becomes_nan_zeroes_no_weight_in_silence(make, identity, name):
    require(name, torch.float32)
    strength = torch.full((), 0.1, device=DEVICE if name == "triton" else None)
    step = a_step(make(strength), identity=identity)
    strength.fill_(torch.nan)
    w = torch.tensor([[1.0, -2.0, 0.0]], device=strength.device)
    ours = tensors([w], [torch.full_like(w, 0.5)], step)
    run(name, ours, step)
    assert w.isnan().all()


@pytest.mark.pairs
@one_and_two_threads
@hypers
@pytest.mark.parametrize("penalty", [L1(0.3), ElasticNet(0.3, 0.2), None], ids=str)
def test_large_tensors_in_several_pieces_touch_no_other_memory(hyper, threads, penalty):
    require("native", torch.float32)
    step = a_step(penalty, **hyper)
    sizes = [1, native.PIECE_SIZE - 1, native.PIECE_SIZE, 2 * native.PIECE_SIZE + 1025]
    start = tensors(drawn(sizes, torch.float32), drawn(sizes, torch.float32, 1), step)
    guarded = [Poisoned(entries) for entries in (start.params, start.grads, *start.buffers().values())]
    p, g, m, v, x = (group.tensors for group in guarded)
    ours, theirs = AdamTensors(p, g, m, v, x, start.state_steps), copied(start)
    for _ in range(2):
        with using(threads):
            run("native", ours, step)
        ADAM.eager(theirs, step, False)
    theirs.seeds = []
    assert_equal(ours, theirs)
    assert all(group.untouched() for group in guarded)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@grouped
@pytest.mark.parametrize("name", ["plain", "identity", "all"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_groups_in_triton_agree(name, penalty, dtype):
    require("triton", dtype)
    step, shapes = (
        a_step(penalty("rows").scaled(20), **HYPERS[name]),
        [(9, 1), (6, 3), (70, 17), (0, 5), (9, 1000), (2, 3000)],
    )
    params, grads = drawn(shapes, dtype), drawn(shapes, dtype, 1)
    params[1][0, 0], params[1][1, 1], grads[1][2, 2] = torch.nan, torch.inf, -torch.inf
    ours = tensors([p.to(DEVICE) for p in params], [g.to(DEVICE) for g in grads], step)
    theirs = copied(ours)
    plan = run("triton", ours, step)
    ADAM.eager(theirs, step, False)
    assert_equal(ours, theirs)
    zero = [[(p == 0).all(1).tolist() for p in t.params] for t in (ours, theirs)]
    assert zero[0] == zero[1]
    assert any(map(any, zero[0]))
    zeros = torch.zeros(len(shapes), dtype=torch.float64).index_add_(0, plan.owners().cpu(), plan.counts[:, 0].cpu())
    assert zeros.tolist() == [int((p == 0).sum()) for p in ours.params]


@pytest.mark.pairs
@one_and_two_threads
@dtypes
@grouped
def test_groups_of_all_sizes_agree(penalty, dtype, threads):
    require("native", dtype)
    identity = {"identity": True, "decoupled_weight_decay": True}
    for hyper in (HYPERS["plain"], HYPERS["all"], HYPERS["identity"], {**HYPERS["all"], **identity}):
        step, shapes = a_step(penalty("rows"), **hyper), [(max(3, 2000 // run), run) for run in RUNS]
        start = tensors(drawn(shapes, dtype), drawn(shapes, dtype, 1), step)
        start.seeds = []
        ours, theirs = copied(start), start
        for _ in range(2):
            with using(threads):
                run("native", ours, step)
            ADAM.eager(theirs, step, False)
        assert_equal(ours, theirs)
        zero = [[(p == 0).all(1).tolist() for p in t.params] for t in (ours, theirs)]
        assert zero[0] == zero[1]
        assert any(map(any, zero[0]))
        assert not all(map(all, zero[0]))


@grouped
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_huge_and_tiny_groups_keep_their_digits(penalty, scale):
    """Where squares leave the range of float32, which the reference's norms do not survive: one in float64 is."""
    require("native", torch.float32)
    for run_length in (3, 200, 5000):
        (w, g) = drawn([(4, run_length)] * 2, torch.float32)
        step = a_step(penalty("rows"), lr=0.0)
        wide = tensors([w.double()], [g.double()], step)
        narrow = [[(t * scale).float() for t in wide.params], [t.float() for t in wide.grads]]
        moments = [[t.float() for t in ts] for ts in (wide.exp_avgs, wide.exp_avg_sqs)]
        ours = AdamTensors(*narrow, *moments, [], [t.clone() for t in wide.state_steps])
        run("native", ours, a_step(penalty("rows").scaled(scale), lr=0.0))
        l1, norm, l2 = penalty("rows").parts()  # norms scale as weights do, squares do not
        ADAM.eager(wide, a_step(SparseGroupLasso(l1, norm, "rows", l2=l2 * scale), lr=0.0), False)
        torch.testing.assert_close(ours.params[0].double() / scale, wide.params[0], rtol=1e-4, atol=1e-5)


@grouped
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_groups_with_nan_and_infinity_are_those_of_the_reference(penalty):
    require("native", torch.float32)
    for run_length in (3, 100, 5000):
        params, grads = drawn([(5, run_length)], torch.float32), drawn([(5, run_length)], torch.float32, 1)
        params[0][0, 1], params[0][1, 0], params[0][2, -1], grads[0][3, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
        ours = tensors(params, grads, step := a_step(penalty("rows")))
        theirs = copied(ours)
        run("native", ours, step)
        ADAM.eager(theirs, step, False)
        assert_equal(ours, theirs)


@pytest.mark.parametrize("strength", [1e30, torch.tensor([1e30, 0.0, 1e-30])], ids=["number", "tensor"])
def test_a_threshold_beyond_the_type_zeroes_finite_weights_and_keeps_the_others(strength):
    """ε = 1e-8 and no gradient: the step is lr/ε."""
    params = [torch.tensor([3e38, -1.0, torch.inf]), torch.tensor([-torch.inf, torch.nan, 0.0])]
    step = a_step(L1(strength), prox_step=1e30)
    zeros = [torch.zeros(3) for _ in range(2)]
    moments = ([torch.zeros(3) for _ in range(2)] for _ in range(2))
    ours = AdamTensors(params, zeros, *moments, [], [torch.zeros(()) for _ in range(2)])
    require("native", torch.float32)
    run("native", ours, step)
    assert ours.params[0][0] == 0
    assert ours.params[1][0] == -torch.inf
    assert ours.params[1][1].isnan()


def groups() -> list[dict]:
    def weights(*sizes, dtype=torch.float32):
        return [nn.Parameter(t) for t in drawn(sizes, dtype)]

    return [
        {"params": weights((30, 40), (0, 3)), "penalty": L1(0.2)},
        {"params": weights((50,), (7, 3), dtype=torch.float64), "penalty": None, "amsgrad": True},
        {"params": [*weights((20, 5)), *weights((20, 5), dtype=torch.float64)], "penalty": ElasticNet(0.1, 0.3)},
        {"params": weights((5, 4)), "penalty": L2(spread(torch.zeros(5, 4))), "lr": 0.3, "strength_scale": 0.5},
        {"params": weights((300, 40)), "penalty": L1(0.2), "metric": "identity"},
        {"params": weights((30, 40), (2, 3000), (0, 3)), "penalty": GroupLasso(0.05)},
        {"params": weights((30, 9), (5, 0)), "penalty": SparseGroupLasso(0.2, 0.1, l2=0.3), "metric": "identity"},
    ]


def test_groups_go_together_and_count_what_they_leave():
    require("native", torch.float32)
    start = groups()
    copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in start]
    fused, plain = ProxAdamW(start, lr=0.1, fused=True), ProxAdamW(copies, lr=0.1, foreach=False)
    ours, theirs = ([p for g in opt.param_groups for p in g["params"]] for opt in (fused, plain))
    late = 3  # has no gradient at first, and so another step count than the others
    for step in range(4):
        before = dict(zip(ours, snapshot(ours), strict=True))
        for params, opt in ((ours, fused), (theirs, plain)):
            set_gradients(params, step)
            if step < 2:
                params[late].grad = None
            opt.step()
        torch.testing.assert_close(ours, theirs)
        counts = fused.step_counts()
        rows = torch.cat(counts.take_counts())
        for p, row in zip(counts.counted(), rows, strict=True):
            torch.testing.assert_close(row, brute_force(before[p], p.detach()), rtol=1e-6, atol=0)
    assert plain.step_counts() is None
