"""The fused step on the CPU: the reference's results, nothing written beside the tensors, and exact counts."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchreg import L1, L2, ElasticNet, GroupLasso, ProxAdamW, ProxSGD, SparseGroupLasso
from torchreg.groups import Blocks, Heads
from torchreg.kernels import SGD, FusedSteps, SGDStep, SGDTensors, native, proximal_step, reference

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=f"no kernel: {native.unavailable()}"),
    pytest.mark.usefixtures("poisoned"),
]

PIECE = native.PIECE_SIZE
STEP_H = (Path(native.__file__).parent / "step.h").read_text(encoding="utf-8")
STRETCH, BLOCK, CHUNK = (int(re.search(rf"{name} = (\d+)", STEP_H)[1]) for name in ("STRETCH", "BLOCK", "CHUNK"))
SMALL = (0, 1, 3, STRETCH - 1, STRETCH, STRETCH + 1)
LARGE = (PIECE - 1, PIECE + 1, 3 * PIECE + 17)

STEP = SGDStep(
    lr=0.1,
    momentum=0.9,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    penalty=L1(0.3),
    prox_step=1.0,
    stochastic_rounding=True,
)
HYPERPARAMETERS = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "dampening": {"dampening": 0.4},
    "nesterov": {"nesterov": True},
    "decay": {"weight_decay": 0.2},
    "decay alone": {"momentum": 0.0, "weight_decay": 0.2, "maximize": True},
    "nesterov, decay, maximize": {"nesterov": True, "weight_decay": 0.2, "maximize": True},
    "tensors": {"lr": torch.tensor(0.1), "prox_step": torch.tensor(0.7), "weight_decay": 0.2},
    "lr of zero": {"lr": 0.0, "prox_step": 0.0},
}
PENALTIES = {
    "none": lambda w: None,
    "L1": lambda w: L1(0.3),
    "L2": lambda w: L2(0.2),
    "ElasticNet": lambda w: ElasticNet(0.3, 0.2),
    "0-d tensors": lambda w: ElasticNet(torch.tensor(0.3), torch.tensor([0.2])),
    "L1 per coordinate": lambda w: L1(spread(w)),
    "L2 per coordinate": lambda w: L2(spread(w)),
    "l1 per coordinate": lambda w: ElasticNet(spread(w), 0.2),
    "l2 per coordinate": lambda w: ElasticNet(0.3, spread(w).double()),
    "both per coordinate": lambda w: ElasticNet(spread(w), spread(w)),
    "beyond the type's range": lambda w: L1(1e300),
    "GroupLasso of rows": lambda w: GroupLasso(0.5),
    "GroupLasso of the tensor": lambda w: GroupLasso(torch.tensor(0.2), "tensor", "none"),
    "GroupLasso of blocks": lambda w: GroupLasso(0.4, Blocks(5), group_weight="sqrt"),
    "GroupLasso of nothing": lambda w: GroupLasso(0.0),
    "GroupLasso beyond the type's range": lambda w: GroupLasso(1e300),
    "SparseGroupLasso": lambda w: SparseGroupLasso(0.1, 0.3, "rows", l2=0.2),
    "SparseGroupLasso of 0-d tensors": lambda w: SparseGroupLasso(*map(torch.tensor, (0.2, 0.1)), l2=torch.tensor(0.3)),
}

dtypes = pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
one_and_two_threads = pytest.mark.parametrize("threads", [1, 2])


@contextlib.contextmanager
def using(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(w: Tensor) -> Tensor:
    """A strength for each coordinate, some of them 0."""
    return torch.linspace(0, 1, w.numel()).reshape(w.shape) * (torch.arange(w.numel()).reshape(w.shape) % 3 != 0)


class Poisoned:
    """Copies of tensors, each with the same strides amid NaN."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.memory, self.gaps, self.tensors = [], [], []
        for t in tensors:
            span = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
            memory = torch.full((span + 37,), torch.nan, dtype=t.dtype)
            self.memory.append(memory)
            if t.numel():
                memory[13 : 13 + span] = t.as_strided((span,), (1,)).clone()
            self.tensors.append(memory.as_strided(t.shape, t.stride(), 13))
            gaps = memory.new_ones(memory.shape, dtype=torch.bool)
            gaps.as_strided(t.shape, t.stride(), 13).fill_(False)
            memory[gaps] = torch.nan
            self.gaps.append(gaps)

    def untouched(self) -> bool:
        """Whether there is still NaN everywhere else."""
        return all(memory[gaps].isnan().all() for memory, gaps in zip(self.memory, self.gaps, strict=True))


def drawn(sizes, dtype, seed=0) -> list[Tensor]:
    """Normal numbers, a third of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [(t * (torch.arange(t.numel()).reshape(t.shape) % 3 != 1)).to(dtype) for t in tensors]


def assert_agrees(weights, step, grads=None, momentum=None, steps=3, threads=1):
    """The fused step and the reference, side by side; every other parameter is at its first step."""
    with torch.no_grad():
        grads = drawn([w.shape for w in weights], weights[0].dtype, 1) if grads is None else grads
        buffers = [torch.randn_like(w) for w in weights] if momentum is None else momentum
        first = [i % 2 == 0 for i in range(len(weights))]
        buffers = [torch.zeros_like(m) if fresh else m for m, fresh in zip(buffers, first, strict=True)]
        guarded = [Poisoned(weights), Poisoned(grads), Poisoned(buffers if step.momentum else [])]
        w, g, m = (p.tensors for p in guarded)
        expected = [t.clone() for t in w], [t.clone() for t in g], [t.clone() for t in m]
        fused = FusedSteps(SGD)
        for _ in range(steps):
            with using(threads):
                proximal_step(SGD, [(SGDTensors(w, g, m, first if m else []), step)], [(True, None)], fused)
            reference.prox_sgd(SGDTensors(*expected, first if m else []), step)
            first = [False] * len(first)
        for got, wanted in zip((w, g, m), expected, strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True)
        assert all(p.untouched() for p in guarded)
        if step.penalty is not None and step.lr:
            assert not any((t.signbit() & (t == 0)).any() for t in w)


# Against the reference


@dtypes
@pytest.mark.parametrize("hyper", HYPERPARAMETERS.values(), ids=HYPERPARAMETERS)
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_hyperparameters_and_penalties_act_as_in_the_reference(hyper, penalty, dtype):
    for w in drawn([(7, 5), (STRETCH + 2,)], dtype):  # blocks of five fit into both
        assert_agrees([w, w.clone()], SGDStep(**{**vars(STEP), "penalty": penalty(w), **hyper}))


@dtypes
@one_and_two_threads
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True, "weight_decay": 0.2}], ids=["momentum", "nesterov"])
def test_sizes_around_blocks_and_pieces_agree(hyper, dtype, threads):
    step = SGDStep(**{**vars(STEP), "penalty": ElasticNet(0.3, 0.2), **hyper})
    assert_agrees(drawn([(), *SMALL, *LARGE], dtype), step, steps=2, threads=threads)


@dtypes
@one_and_two_threads
def test_strengths_of_each_coordinate_reach_over_pieces(dtype, threads):
    for strength in map(spread, ((w := drawn([(3, PIECE // 2 + 5)], dtype)[0]), w[:1], w[:, :1])):
        assert_agrees(
            [w, w.clone()], SGDStep(**{**vars(STEP), "penalty": ElasticNet(strength, 0.2)}), steps=2, threads=threads
        )


GROUPED = {
    "GroupLasso": lambda groups: GroupLasso(0.3, groups),
    "SparseGroupLasso": lambda groups: SparseGroupLasso(0.1, 0.2, groups, l2=0.2),
}
grouped = pytest.mark.parametrize("penalty", GROUPED.values(), ids=GROUPED)
RUNS = (
    1,
    2,
    3,
    31,
    33,
    63,
    64,
    65,
    100,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    CHUNK - BLOCK // 2 + 5,
    CHUNK,
    CHUNK + 1,
    CHUNK + BLOCK + 5,
    PIECE + 3,
)


@pytest.mark.pairs
@dtypes
@grouped
@one_and_two_threads
def test_groups_of_all_sizes_agree(penalty, dtype, threads):
    weights = drawn([(max(3, 5000 // run), run) for run in RUNS], dtype)
    for hyper in ({}, {"nesterov": True, "weight_decay": 0.2}):
        step = SGDStep(**{**vars(STEP), "penalty": penalty("rows"), **hyper})
        assert_agrees(weights, step, steps=2, threads=threads)


@grouped
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_huge_and_tiny_groups_keep_their_digits(penalty, momentum):
    """Where squares leave the range of the type, which the reference's norms do not survive: one in float64 is."""
    for dtype, scales in ((torch.float32, (1e-30, 1e-21, 1e25)), (torch.float64, (1e-200, 1e-160, 1e200))):
        for run, scale in itertools.product((3, 200, 5000), scales):
            (w,) = drawn([(4, run)], dtype)
            step = SGDStep(**{**vars(STEP), "penalty": penalty("rows").scaled(scale), "momentum": momentum})
            ours, theirs = (w * scale).clone(), w.double()
            zero, fused = torch.zeros_like(w), FusedSteps(SGD)
            buffers = [torch.zeros_like(w)] if momentum else []
            proximal_step(
                SGD, [(SGDTensors([ours], [zero], buffers, [False] * len(buffers)), step)], [(True, None)], fused
            )
            # prox of the scaled penalty at the scaled weight; the l2 part scales with the strength, not with the weight
            parts = penalty("rows").parts()
            expected = SparseGroupLasso(parts[0], parts[1], "rows", l2=parts[2] * scale).prox(theirs, step.prox_step)
            torch.testing.assert_close(ours.double() / scale, expected, rtol=1e-5, atol=1e-6)


@grouped
def test_groups_with_nan_and_infinity_are_those_of_the_reference(penalty):
    for run in (3, 100, BLOCK, BLOCK + 7, CHUNK + BLOCK):
        (w,) = drawn([(5, run)], torch.float32)
        w[0, 1], w[1, 0], w[2, run - 1] = torch.nan, torch.inf, -torch.inf
        w[3] = 0
        assert_agrees([w, w.clone()], SGDStep(**{**vars(STEP), "penalty": penalty("rows")}))


LIE_IN_MEMORY = {
    "rows": ("rows", lambda w: w),
    "rows of channels_last": ("rows", lambda w: w.to(memory_format=torch.channels_last)),
    "kernels": ("kernels", lambda w: w),
    "heads": (Heads(3), lambda w: w),
    "heads in a packed weight": (Heads(1, packed=3), lambda w: w),
    "columns of a transposed weight": ("columns", lambda w: w.transpose(0, 1)),
    "columns, one row": ("columns", lambda w: w[:1]),
    "rows left out": ("rows", lambda w: w[::2]),
    "no rows": ("rows", lambda w: w[:0]),
    "empty rows": ("rows", lambda w: w[:, :0]),
    "blocks along a dimension of one": (Blocks(1, dim=1), lambda w: w[:, :1]),
}


@grouped
@pytest.mark.parametrize(("groups", "view"), LIE_IN_MEMORY.values(), ids=LIE_IN_MEMORY)
def test_layouts_with_groups_agree(groups, view, penalty):
    (w,) = drawn([(6, 4, 5, 3)], torch.float32)
    step = SGDStep(**{**vars(STEP), "penalty": penalty(groups)})
    elsewhere = torch.randn(view(w).shape[::-1]).permute(3, 2, 1, 0)
    assert_agrees([view(w)] * 2, step)
    assert_agrees([view(w)] * 2, step, grads=[elsewhere] * 2, momentum=[elsewhere] * 2)


def layouts() -> dict[str, Tensor]:
    (w,) = drawn([(6, 4, 5, 3)], torch.float32)
    return {
        "contiguous": w,
        "channels_last": w.to(memory_format=torch.channels_last),
        "permuted": w.permute(3, 1, 0, 2),
        "rows left out": w[::2],
        "columns left out": w[..., ::2],
        "a transposed slice": w[1:5, :, 2].transpose(0, 2),
        "one channel": w[:, :1].to(memory_format=torch.channels_last),
        "empty": w[:, :0].transpose(0, 3),
    }


@pytest.mark.parametrize("strength", [0.3, spread], ids=["number", "per coordinate"])
@pytest.mark.parametrize("layout", layouts())
def test_layouts_agree(layout, strength):
    w = layouts()[layout]
    penalty = L1(strength if isinstance(strength, float) else strength(w))
    step = SGDStep(**{**vars(STEP), "penalty": penalty})
    contiguous = torch.randn(w.shape)
    elsewhere = torch.randn(w.shape[::-1]).permute(*reversed(range(w.ndim)))
    assert_agrees([w, w], step)
    assert_agrees([w, w], step, grads=[contiguous, elsewhere], momentum=[elsewhere, contiguous])
    assert_agrees([w, w], step, grads=[torch.tensor(0.3).expand(w.shape)] * 2)


def test_a_gradient_that_is_a_negated_view_is_read_as_such():
    w = nn.Parameter(torch.ones(()))
    w.grad = torch._neg_view(torch.ones(()))
    ProxSGD([w], lr=0.5, penalty=L1(0.2), fused=True).step()
    torch.testing.assert_close(w.detach(), torch.tensor(1.4))


def test_nan_and_infinity_stay_where_they_are():
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0])
    finite = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf])
    for penalty in (L1(0.3), ElasticNet(0.3, 0.2), L2(0.2), ElasticNet(torch.full((5,), 0.3), 0.2)):
        for hyper in HYPERPARAMETERS.values():
            step = SGDStep(**{**vars(STEP), "penalty": penalty, **hyper})
            assert_agrees([values, values.clone()], step, grads=[finite, torch.zeros(5)], momentum=[torch.ones(5)] * 2)


@pytest.mark.parametrize(
    ("cls", "metric"), [(ProxSGD, {}), (ProxAdamW, {}), (ProxAdamW, {"metric": "identity"})], ids=str
)
def test_a_strength_that_becomes_nan_zeroes_no_weight_in_silence(cls, metric):
    """The constructor has checked it; who writes into the tensor later has not."""
    results = []
    for form in ({"fused": True}, {"fused": False, "foreach": False}):
        strength = torch.full((5,), 0.1)
        w = nn.Parameter(torch.tensor([1.0, -1.0, torch.inf, 0.0, 1.0]))
        opt = cls([w], lr=0.1, penalty=L1(strength), **metric, **form)
        strength[:4] = torch.nan
        w.grad = torch.full((5,), 0.5)
        opt.step()
        results.append(w.detach())
    ours, theirs = results
    assert ours[:4].isnan().all()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


NUMBERS = {
    "L1": L1,
    "ElasticNet's l1": lambda t: ElasticNet(t, 0.1),
    "ElasticNet's l2": lambda t: ElasticNet(0.1, t),
    "L2": L2,
    "GroupLasso": GroupLasso,
    "SparseGroupLasso's l1": lambda t: SparseGroupLasso(t, 0.1),
}
"""Penalties with a strength that is a tensor of one element, into which NaN is written after the check."""


@pytest.mark.parametrize(
    ("cls", "metric"), [(ProxSGD, {}), (ProxAdamW, {}), (ProxAdamW, {"metric": "identity"})], ids=str
)
@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_becomes_nan_zeroes_no_weight_in_silence(make, cls, metric):
    strength = torch.full((), 0.1)
    w = nn.Parameter(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]))
    w.grad = torch.full_like(w, 0.5)
    opt = cls([w], lr=0.1, penalty=make(strength), fused=True, **metric)
    strength.fill_(torch.nan)
    opt.step()
    assert w.isnan().all()


def pair(groups, **kwargs):
    """The same groups twice: of a fused optimizer and of the plain loop."""
    copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]
    fused = ProxSGD(groups, **{"lr": 0.1, "momentum": 0.9, "fused": True, **kwargs})
    return fused, ProxSGD(copies, **{"lr": 0.1, "momentum": 0.9, "fused": False, "foreach": False, **kwargs})


def step_both(optimizers, seed):
    for opt in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()


def assert_same_weights(optimizers):
    for ours, theirs in zip(*(opt.param_groups for opt in optimizers), strict=True):
        torch.testing.assert_close(ours["params"], theirs["params"], rtol=1e-5, atol=1e-6)  # a dtype may have changed


def several_groups():
    def weights(*sizes, dtype=torch.float32):
        return [nn.Parameter(t) for t in drawn(sizes, dtype)]

    return [
        {"params": weights((30, 40), (0, 3)), "penalty": L1(0.2)},
        {"params": weights((50,), (7, 3), dtype=torch.float64), "penalty": None, "momentum": 0.0},
        {"params": [*weights((20, 5)), *weights((20, 5), dtype=torch.float64)], "penalty": ElasticNet(0.1, 0.3)},
        {"params": weights((5, 4)), "penalty": L2(spread(torch.zeros(5, 4))), "lr": 0.3, "strength_scale": 0.5},
        {"params": weights((30, 9), (7, 6000), (5, 0)), "penalty": GroupLasso(0.2)},
        {"params": weights((50, 200), dtype=torch.float64), "penalty": SparseGroupLasso(0.2, 0.1, "tensor", l2=0.3)},
    ]


def test_groups_of_several_penalties_and_dtypes_go_together():
    both = pair(several_groups())
    for step in range(4):
        step_both(both, step)
    assert_same_weights(both)


def test_what_changes_between_steps_is_noticed():
    strength, scale = spread(torch.zeros(4, 3, 5, 6)), torch.tensor(1.0)
    groups = [{"params": [nn.Parameter(torch.randn(4, 3, 5, 6)) for _ in range(2)], "penalty": L1(strength)}]
    both = pair(groups, strength_scale=scale)
    changes = {
        "strengths": lambda opt, group: None if opt is both[1] else strength.mul_(3),
        "scale": lambda opt, group: scale.fill_(0.5),
        "lr": lambda opt, group: group.update(lr=0.05),
        "memory format": lambda opt, group: [_set(p, torch.channels_last) for p in group["params"]],
        "memory format of one": lambda opt, group: _set(group["params"][0], torch.contiguous_format),
        "penalty": lambda opt, group: group.update(penalty=ElasticNet(strength / 2, strength)),
        "another penalty of this kind": lambda opt, group: group.update(penalty=ElasticNet(0.1, 0.2)),
        "groups": lambda opt, group: group.update(penalty=GroupLasso(0.1, "tensor")),
        "other groups": lambda opt, group: group.update(penalty=GroupLasso(0.1, "rows")),
        "their strength": lambda opt, group: group.update(penalty=GroupLasso(0.2, "rows", "none")),
        "memory format with groups": lambda opt, group: [_set(p, torch.channels_last) for p in group["params"]],
        "groups across memory": lambda opt, group: group.update(fused=None, penalty=GroupLasso(0.2, "kernels")),
        "no groups": lambda opt, group: group.update(penalty=L1(0.1)),
        "dtype": lambda opt, group: [setattr(p, "data", p.double()) for p in group["params"]],
        "frozen": lambda opt, group: group["params"].pop(),
    }
    step_both(both, 0)
    for seed, change in enumerate(changes.values(), 1):
        for opt in both:
            change(opt, opt.param_groups[0])
            for p in opt.state:
                if p.dtype != opt.state[p]["momentum_buffer"].dtype:
                    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].to(p.dtype)
        step_both(both, seed)
        assert_same_weights(both)


def _set(p, memory_format):
    p.data = p.data.to(memory_format=memory_format)


VIEWS = {
    "fewer rows": lambda t: t[:2],
    "transposed": lambda t: t.t(),
    "another dtype": lambda t: t.view(torch.float64 if t.dtype == torch.float32 else torch.float32),
    "a slice": lambda t: t[:, ::2],
}


@dtypes
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_weight_that_becomes_a_view_of_its_memory_is_stepped_as_such(view, dtype):
    both = pair([{"params": [nn.Parameter(t) for t in drawn([(4, 6), (3, 2)], dtype)], "penalty": L1(0.1)}])
    step_both(both, 0)
    for opt in both:
        p = opt.param_groups[0]["params"][0]
        old = p.data
        p.data = view(old).copy_(torch.linspace(-1, 1, view(old).numel()).reshape(view(old).shape))
        opt.state[p]["momentum_buffer"] = torch.ones_like(p)
        p.grad = None
    step_both(both, 1)
    assert_same_weights(both)


def test_strengths_made_in_inference_mode_are_read():
    with torch.inference_mode():
        strength = torch.tensor([0.0, 1.0])
    w = nn.Parameter(torch.ones(2))
    opt = ProxSGD([w], lr=0.1, penalty=L1(strength), fused=True)
    for _ in range(2):
        w.grad = torch.zeros(2)
        opt.step()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 0.8]))


# Counts


def brute_force(before, after):
    columns = [
        (after == 0).sum(),
        ((after == 0) & (before != 0)).sum(),
        ((after != 0) & (before == 0)).sum(),
        after.double().abs().sum(),
        after.double().square().sum(),
    ]
    return torch.stack([c.double() for c in columns])


@one_and_two_threads
def test_counts_are_those_of_brute_force_after_each_step(threads):
    large = [nn.Parameter(t) for t in drawn([2 * PIECE + 100], torch.float32)]
    opt = ProxSGD([*several_groups(), {"params": large}], lr=0.1, momentum=0.9, penalty=L1(0.5), fused=True)
    params = [p for group in opt.param_groups for p in group["params"]]
    for step in range(3):
        before = {p: p.detach().clone() for p in params}
        with using(threads):
            step_both([opt], step)
        counts = opt.step_counts()
        assert sorted(map(id, counts.counted())) == sorted(map(id, params))
        rows = torch.cat(counts.take_counts())
        assert rows.dtype == torch.float64
        expected = torch.stack([brute_force(before[p], p.detach()) for p in counts.counted()])
        assert torch.equal(rows[:, :3], expected[:, :3])
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=0)


def test_newly_zero_and_revived_add_up_until_they_are_taken():
    (w,) = (nn.Parameter(t) for t in drawn([5000], torch.float32))
    opt = ProxSGD([w], lr=0.1, penalty=L1(0.5), fused=True)
    changes = 0
    for step in range(4):
        before = w.detach().clone()
        step_both([opt], step)
        changes = changes + brute_force(before, w.detach())[1:3]
    (row,) = torch.cat(opt.step_counts().take_counts())
    assert torch.equal(row[1:3], changes)
    assert row[0] == (w == 0).sum()
    (again,) = torch.cat(opt.step_counts().take_counts())
    assert again[1:3].tolist() == [0, 0]
    assert torch.equal(again[[0, 3, 4]], row[[0, 3, 4]])


def test_nan_is_no_zero_and_reaches_the_sums():
    w = nn.Parameter(torch.tensor([torch.nan, 0.0, 0.0, 1.0, 0.001]))
    w.grad = torch.tensor([0.0, torch.nan, 0.0, 0.0, 0.0])
    opt = ProxSGD([w], lr=0.1, penalty=L1(0.5), fused=True)
    opt.step()
    (row,) = torch.cat(opt.step_counts().take_counts())
    assert row[:3].tolist() == [2, 1, 1]
    assert row[3:].isnan().all()


@pytest.mark.parametrize("value", [1e-30, 1e-25, 1e-3, 1e19, 1e30, 3e38])
def test_sums_of_tiny_and_huge_weights_keep_their_digits(value):
    w = nn.Parameter(torch.full((3000,), value))
    w.grad = torch.zeros(3000)
    opt = ProxSGD([w], lr=0.1, penalty=L1(0.0), fused=True)
    opt.step()
    (row,) = torch.cat(opt.step_counts().take_counts())
    torch.testing.assert_close(row, brute_force(w.detach(), w.detach()), rtol=1e-5, atol=0)


def test_only_parameters_with_a_gradient_are_counted():
    a, b = (nn.Parameter(torch.randn(5)) for _ in range(2))
    opt = ProxSGD([a, b], lr=0.1, penalty=L1(0.5), fused=True)
    assert opt.step_counts() is None
    for p, q in itertools.permutations([a, b]):
        p.grad, q.grad = torch.zeros(5), None
        opt.step()
        assert [id(x) for x in opt.step_counts().counted()] == [id(p)]
        assert len(torch.cat(opt.step_counts().take_counts())) == 1
    a.grad = b.grad = None
    opt.step()
    assert opt.step_counts().counted() == []
    assert len(opt.step_counts().take_changes()) == 1  # of the steps before
    assert opt.step_counts() is None


def test_changes_of_parameters_that_are_no_more_are_forgotten():
    opt = ProxSGD([nn.Parameter(torch.randn(5))], lr=0.1, penalty=L1(0.5), fused=True)
    for _ in range(500):
        opt.param_groups[0]["params"] = [nn.Parameter(torch.randn(5))]
        opt.param_groups[0]["params"][0].grad = torch.zeros(5)
        opt.step()
    (plan,) = opt._fused._plans.values()
    assert len(plan.changes._sums) < 200


# Autograd


def test_autograd_sees_that_weights_and_momentum_were_overwritten():
    w = nn.Parameter(torch.randn(5))
    opt = ProxSGD([w], lr=0.1, momentum=0.9, penalty=L1(0.5), fused=True)
    w.grad = torch.ones(5)
    loss = w.square().sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    buffer = opt.state[w]["momentum_buffer"]
    version = buffer._version
    opt.step()
    assert buffer._version > version
