"""The Triton kernels against the reference: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy
import math
import weakref

import pytest
import torch
from optimizer_cases import PENALTIES, identical, parameters, set_gradients, snapshot
from test_fused_step import NUMBERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_support import require_triton

from torchreg import L1, ElasticNet, GroupLasso, SparseGroupLasso
from torchreg.kernels import SGD, SGDStep, SGDTensors, fused_form, graphs, reference, triton_step
from torchreg.kernels.fused import FusedSteps
from torchreg.kernels.pieces import LONGEST
from torchreg.kernels.plan import COUNTS, Plan

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's numpy
]


@pytest.fixture(autouse=True)
def _triton() -> None:
    require_triton()


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = (torch.bfloat16, torch.float16)
HYPERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}


def a_step(penalty=None, rounding=True, **changes) -> SGDStep:
    values = {
        "lr": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "penalty": penalty,
        "prox_step": 0.3,
        "stochastic_rounding": rounding,
    }
    return SGDStep(**{**values, **changes})


def given(dtype: torch.dtype, momentum: bool, device: torch.device = DEVICE, seed: int = 0) -> SGDTensors:
    params = [p.detach().to(device) for p in parameters(dtype, seed)]
    grads = [p.grad.to(device) for p in parameters(dtype, seed)]
    grads[0][0, 0], grads[0][1, 1], grads[3][0, 0] = torch.nan, torch.inf, -torch.inf
    buffers = [torch.full_like(p, 0.5) for p in params] if momentum else []
    first = [i % 2 == 0 for i in range(len(params))] if momentum else []
    for buffer, fresh in zip(buffers, first, strict=True):
        if fresh:
            buffer.zero_()
    return SGDTensors(params, grads, buffers, first, seeds=[1000 * i + 7 for i in range(len(params))])


def launch(parts, plan: Plan | None = None, **amp) -> Plan:
    tensors = parts[0][0]
    plan = plan or Plan(DEVICE, tensors.params[0].dtype, triton_step.PIECE_SIZE)
    plan.update(parts)
    triton_step.run("prox_sgd", plan, **amp)
    plan.finish()
    return plan


def assert_equal(a: SGDTensors, b: SGDTensors) -> None:
    for x, y in zip([*a.params, *a.momentum_buffers], [*b.params, *b.momentum_buffers], strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_the_kernel_agrees_with_the_reference(dtype, penalty, hyper):
    step = a_step(penalty.to(DEVICE), **hyper)
    ours, theirs = (given(dtype, "momentum" in hyper) for _ in range(2))
    launch([(ours, step)])
    reference.prox_sgd(theirs, step)
    assert_equal(ours, theirs)
    assert torch.isnan(ours.params[0][0, 0])


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_becomes_nan_zeroes_no_weight_in_silence(make):
    strength = torch.full((), 0.1, device=DEVICE)
    step = a_step(make(strength))
    strength.fill_(torch.nan)
    w = torch.tensor([[1.0, -2.0, 0.0]], device=DEVICE)
    launch([(SGDTensors([w], [torch.full_like(w, 0.5)]), step)])
    assert w.isnan().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_gives_the_references_bits(dtype):
    step = a_step(ElasticNet(0.01, 0.02))
    ours, theirs = (given(dtype, False) for _ in range(2))
    for _ in range(3):
        launch([(ours, step)])
        reference.prox_sgd(theirs, step)
    assert identical(*([p.nan_to_num() for p in t.params] for t in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_sizes_around_blocks_and_pieces_write_nothing_else(dtype, shift):
    """In memory full of NaN, at addresses that threads can read 16 bytes from and others."""
    block, piece = triton_step._BLOCK, triton_step.PIECE_SIZE
    margin = 64
    generator = torch.Generator().manual_seed(0)

    def placed(size: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((size + 2 * margin,), torch.nan, dtype=dtype, device=DEVICE)
        view = memory[margin + shift : margin + shift + size]
        view.copy_(torch.randn(size, generator=generator))
        return memory, view

    sizes = [0, 1, 3, block - 1, block, block + 1, piece - 1, piece, piece + 1, 2 * piece + 17]
    placed_params, placed_buffers = [placed(s) for s in sizes], [placed(s) for s in sizes]
    params, buffers = [v for _, v in placed_params], [v for _, v in placed_buffers]
    grads = [placed(s)[1] for s in sizes]
    ours = SGDTensors(params, grads, buffers, [False] * len(sizes), seeds=list(range(len(sizes))))
    theirs = SGDTensors(snapshot(params), grads, snapshot(buffers), ours.first, seeds=ours.seeds)
    step = a_step(L1(0.3), momentum=0.9)
    launch([(ours, step)])
    reference.prox_sgd(theirs, step)
    assert_equal(ours, theirs)
    for (memory, view), size in zip([*placed_params, *placed_buffers], sizes * 2, strict=True):
        assert int(memory.isnan().sum()) == len(memory) - size
        assert not view.isnan().any()


@pytest.fixture
def capturing(monkeypatch):
    """What is done inside is done as while a CUDA graph is captured; test_cuda_step.py captures some."""

    @contextlib.contextmanager
    def inside():
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "is_captured", lambda: True)
            yield

    return inside


def test_a_captured_step_shares_no_memory_with_other_steps_that_they_could_free_or_fill(capturing):
    ours, others = given(torch.float32, True), given(torch.float32, True, seed=1)
    step = a_step(ElasticNet(torch.rand(()), 0.1), momentum=0.9)
    plan = launch([(ours, step)])
    sent = {name: tensor for name, (_, tensor) in plan.uploads.items()}
    with capturing():
        launch([(ours, step)], plan)
    assert {name: tensor for name, (_, tensor) in plan.uploads.items()} == sent
    assert len(plan.captured) > len(sent)  # from what the graph copies, and where it counts
    read = [weakref.ref(t) for t in plan.captured]
    launch([(others, a_step(L1(0.1)))], plan)
    assert all(there() is not None for there in read)
    assert copy.deepcopy(plan).captured == []


def test_a_captured_step_lays_out_strengths_at_every_replay(capturing):
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default:
                copied.append(args)
            return function(*args, **(kwargs or {}))

    w, copied = torch.ones(4, device=DEVICE), []
    strength, step = torch.full((4,), 0.5, device=DEVICE), None
    tensors, step = SGDTensors([w], [torch.zeros_like(w)]), a_step(L1(strength))
    plan = launch([(tensors, step)])
    with capturing(), Copies():
        plan.update([(tensors, step)], same=True)
    assert [source.data_ptr() for _, source, *_ in copied] == [strength.data_ptr()]
    strength.zero_()
    for args in copied:  # as a replay does
        torch.ops.aten.copy_.default(*args)
    w.fill_(1.0)
    triton_step.run("prox_sgd", plan)
    assert torch.equal(w, torch.ones_like(w))


def test_what_a_captured_step_was_told_outlives_the_steps_after_it():
    kind = (DEVICE, torch.float32)
    fused, kept = FusedSteps(SGD), []
    for captured in (True, False):
        plan = fused._plans[kind] = Plan(*kind, triton_step.PIECE_SIZE)
        plan.captured += [plan.counts] * captured
        kept.append(weakref.ref(plan))
        del plan
        fused.clear()
    assert [there() is not None for there in kept] == [True, False]
    assert copy.deepcopy(fused)._captured == []


def test_one_launch_takes_groups_with_their_own_numbers():
    steps = [a_step(L1(0.3), lr=0.1), a_step(None, lr=0.2, momentum=0.9), a_step(ElasticNet(0.1, 0.2), maximize=True)]
    ours = [given(torch.float32, s.momentum != 0, seed=i) for i, s in enumerate(steps)]
    theirs = [given(torch.float32, s.momentum != 0, seed=i) for i, s in enumerate(steps)]
    plan = launch(list(zip(ours, steps, strict=True)))
    assert len(plan.params) == sum(len(t.params) for t in ours)
    for a, b, step in zip(ours, theirs, steps, strict=True):
        reference.prox_sgd(b, step)
        assert_equal(a, b)


def test_gradients_are_unscaled_and_overflow_changes_nothing():
    step, scale = a_step(L1(0.3), momentum=0.9), torch.tensor(1024.0, device=DEVICE)
    ours, theirs = (given(torch.float32, True) for _ in range(2))
    before = snapshot([*ours.params, *ours.momentum_buffers])
    for g in ours.grads:
        g.mul_(scale)
    plan = launch([(ours, step)], grad_scale=scale, found_inf=torch.ones((), device=DEVICE))
    assert identical([*ours.params, *ours.momentum_buffers], before)
    assert not plan.counts.any()
    launch([(ours, step)], plan, grad_scale=scale, found_inf=torch.zeros((), device=DEVICE))
    reference.prox_sgd(theirs, step)
    assert_equal(ours, theirs)


def test_counts_are_those_of_the_stored_weights():
    for dtype in (torch.float32, torch.bfloat16):
        tensors, step = given(dtype, True), a_step(L1(1.0), momentum=0.9)
        plan, new, revived = None, torch.zeros(6), torch.zeros(6)
        for seed in range(3):
            before = snapshot(tensors.params)
            plan = launch([(tensors, step)], plan)
            set_gradients([torch.nn.Parameter(p) for p in tensors.params], seed)
            after = tensors.params
            pairs = list(zip(before, after, strict=True))
            new += torch.tensor([int(((b != 0) & (a == 0)).sum()) for b, a in pairs])
            revived += torch.tensor([int(((b == 0) & (a != 0)).sum()) for b, a in pairs])
        rows = torch.zeros(6, len(COUNTS), dtype=torch.float64).index_add_(0, plan.owners().cpu(), plan.counts.cpu())
        finite = [torch.nan_to_num(p.double().cpu(), 0, 0, 0) for p in tensors.params]
        expected = {
            "zeros": [int((p == 0).sum()) for p in tensors.params],
            "new": new,
            "revived": revived,
            "l1": [p.abs().sum() for p in finite],
            "l2": [p.square().sum() for p in finite],
        }
        assert new.sum() > 0
        for i, name in enumerate(COUNTS):
            values = torch.as_tensor(expected[name], dtype=torch.float64)
            chosen = slice(None) if i < 3 else slice(1, 3)  # sums are NaN where weights are
            torch.testing.assert_close(rows[chosen, i], values[chosen], rtol=1e-6, atol=1e-6)


def test_tables_are_sent_only_when_they_have_changed():
    tensors = given(torch.float32, True).take([0, 1, 2])  # the others have gradients to be laid out anew
    plan = launch([(tensors, a_step(L1(0.3), momentum=0.9))])
    sent = {name: tensor for name, (_, tensor) in plan.uploads.items()}
    tensors.first = [False] * 3
    launch([(tensors, a_step(L1(0.3), momentum=0.9, lr=0.05))], plan)
    tensors.grads[1] = tensors.grads[1].clone()
    launch([(tensors, a_step(L1(0.3), momentum=0.9, lr=0.05))], plan)
    again = {name: tensor for name, (_, tensor) in plan.uploads.items()}
    assert again["pieces"] is sent["pieces"]
    assert again["table"] is not sent["table"]
    assert again["hypers"] is not sent["hypers"]
    launch([(tensors, a_step(L1(0.3), momentum=0.9, lr=0.05))], plan)
    assert all(plan.uploads[name][1] is tensor for name, tensor in again.items())


def test_numbers_that_live_on_the_device_are_read_there():
    step = a_step(L1(0.3), lr=torch.tensor(0.05), prox_step=torch.tensor(0.2))
    ours, theirs = (given(torch.float32, False) for _ in range(2))
    plan = Plan(DEVICE, torch.float32, triton_step.PIECE_SIZE)
    plan.update([(ours, step)])
    for row, column, value in ((0, 0, step.lr), (0, 4, step.prox_step)):
        plan.hypers[row, column] = torch.nan  # what the host knows of them
        plan.traced.append((row, column, value.to(DEVICE)))
    plan.late["seed"] = [torch.tensor(5, device=DEVICE) if i == 1 else s for i, s in enumerate(ours.seeds)]
    triton_step.run("prox_sgd", plan)
    plan.finish()
    reference.prox_sgd(theirs, a_step(L1(0.3), lr=0.05, prox_step=0.2))
    assert_equal(ours, theirs)


def test_a_number_that_no_longer_lives_on_the_device_is_sent():
    """Of one that does the host knows nothing, and that must not look like what it becomes, be it zero."""
    tensors, column = given(torch.float32, False), SGDStep.HYPERS.index("prox_step")
    plan = Plan(DEVICE, torch.float32, triton_step.PIECE_SIZE)
    plan.update([(tensors, a_step(L1(0.3), lr=0.0, prox_step=0.2))])
    elsewhere = torch.empty((), device="meta")
    plan.hypers[0, column] = Plan(torch.device("meta"), torch.float32, 1)._known(0, column, elsewhere)
    plan.traced.append((0, column, torch.tensor(0.2, device=DEVICE)))
    triton_step.run("prox_sgd", plan)
    before = [p.clone() for p in tensors.params]
    launch([(tensors, a_step(L1(0.3), lr=0.0, prox_step=0.0))], plan)
    for p, w in zip(tensors.params, before, strict=True):
        torch.testing.assert_close(p, w, equal_nan=True)


GROUPED = {
    "GroupLasso": GroupLasso(0.3),
    "GroupLasso of a 0-d tensor": GroupLasso(torch.tensor(0.3), group_weight="none"),
    "SparseGroupLasso": SparseGroupLasso(0.1, 0.2, l2=0.3),
}
grouped = pytest.mark.parametrize("penalty", GROUPED.values(), ids=GROUPED)
ROWS = [(1, 1), (7, 3), (5, 16), (70, 17), (0, 5), (3, 0), (9, 1000), (2, 3000), (2, 2, 24), (30, 8)]


def in_rows(dtype: torch.dtype, momentum: bool, shapes=ROWS) -> SGDTensors:
    """In memory full of NaN; the last row of one is zero, and NaN and infinity are in some."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[Tensor]:
        memory = [torch.full((math.prod(shape) + 32,), torch.nan, dtype=dtype) for shape in shapes]
        views = [m[16 : 16 + math.prod(s)].view(s) for m, s in zip(memory, shapes, strict=True)]
        return [v.copy_(torch.randn(v.shape, generator=generator)).to(DEVICE) for v in views]

    params, grads, buffers = tensors(), tensors(), tensors() if momentum else []
    if shapes is ROWS:
        params[3][-1], grads[3][-1] = 0, 0
        grads[1][0, 0], grads[1][1, 1], grads[1][2, 2] = torch.nan, torch.inf, -torch.inf
    first = [i % 2 == 0 for i in range(len(params))] if momentum else []
    for buffer, fresh in zip(buffers, first, strict=True):
        if fresh:
            buffer.zero_()
    return SGDTensors(params, grads, buffers, first, seeds=[1000 * i + 7 for i in range(len(params))])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@grouped
@pytest.mark.parametrize("name", ["plain", "dampening", "nesterov"])
def test_groups_agree_with_the_reference(dtype, penalty, name):
    hyper = HYPERS[name]
    step = a_step(penalty, **hyper)
    ours, theirs = (in_rows(dtype, "momentum" in hyper) for _ in range(2))
    plan = launch([(ours, step)])
    reference.prox_sgd(theirs, step)
    assert_equal(ours, theirs)
    assert ours.params[1][:2].isnan().any()
    assert not any((p.signbit() & (p == 0)).any() for p in ours.params)
    zeros = torch.zeros(len(ROWS), dtype=torch.float64).index_add_(0, plan.owners().cpu(), plan.counts[:, 0].cpu())
    assert zeros.tolist() == [int((p == 0).sum()) for p in ours.params]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_groups_are_rounded_to_the_references_bits(dtype):
    step = a_step(SparseGroupLasso(0.01, 0.01, l2=0.02))
    ours, theirs = (in_rows(dtype, False, [(4, 16), (3, 100)]) for _ in range(2))
    launch([(ours, step)])
    reference.prox_sgd(theirs, step)
    assert identical(ours.params, theirs.params)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float32, (1e-25, 1e25)), (torch.float64, (1e-170, 1e170))])
def test_huge_and_tiny_groups_keep_their_digits(dtype, scales):
    for scale in scales:
        start = in_rows(dtype, False, [(3, 40)])
        before = start.params[0].double() * 1.0
        start.params[0].mul_(scale)
        start.grads[0].zero_()
        launch([(start, a_step(GroupLasso(0.5 * scale)))])
        expected = GroupLasso(0.5).prox(before, 0.3)
        torch.testing.assert_close(start.params[0].double() / scale, expected, rtol=1e-5, atol=1e-6)


def test_groups_and_single_weights_go_together_unscaled_and_guarded():
    penalties = [L1(0.3), GroupLasso(0.3), None]
    steps = [a_step(penalty, lr=0.1 * (i + 1), momentum=0.9) for i, penalty in enumerate(penalties)]
    ours, theirs = ([in_rows(torch.float32, True, ROWS[i : i + 6]) for i in range(3)] for _ in range(2))
    scale, before = torch.tensor(8.0, device=DEVICE), [snapshot(t.params) for t in ours]
    for g in (g for t in ours for g in t.grads):
        g.mul_(scale)
    plan = launch(list(zip(ours, steps, strict=True)), grad_scale=scale, found_inf=torch.ones((), device=DEVICE))
    assert all(identical(t.params, b) for t, b in zip(ours, before, strict=True))
    assert not plan.counts.any()
    launch(list(zip(ours, steps, strict=True)), plan, grad_scale=scale, found_inf=torch.zeros((), device=DEVICE))
    for a, b, step in zip(ours, theirs, steps, strict=True):
        reference.prox_sgd(b, step)
        assert_equal(a, b)


def test_groups_too_long_for_a_program_are_refused():
    p = torch.empty(2, LONGEST + 1, device="meta")
    assert f"its groups have {LONGEST + 1} weights" in fused_form.obstacle(p, GroupLasso(0.1), metric=False)
    assert fused_form.obstacle(p[:, 1:].clone(), GroupLasso(0.1), metric=False) is None
