"""torch.compile takes a whole step as one graph, and changing numbers in tensors does not recompile it."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import OPTIMIZERS, optimizers, parameters, set_gradients, snapshot
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from torchreg import L1, ElasticNet


def train(case, dtypes: list[torch.dtype], compiled: bool, **kwargs) -> tuple[list[Tensor], list[int]]:
    torch._dynamo.reset()
    params = [p for dtype in dtypes for p in parameters(dtype)]
    lr, scale = torch.tensor(0.1), torch.tensor(1.0)
    opt = case(params, lr=lr, strength_scale=scale, **kwargs)
    counter = CompileCounter()
    step = type(opt).step  # without the profiler's and autograd's wrappers, where torch itself breaks the graph
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    step = torch.compile(step, backend=counter, fullgraph=True) if compiled else step
    frames = []
    for i in range(5):
        set_gradients(params, i)
        lr.fill_(0.1 / (i + 1))
        scale.fill_(1 + 0.1 * i)
        with torch.no_grad():
            step(opt)
        frames.append(counter.frame_count)
    return snapshot(params), frames


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("case", "foreach"),
    [
        pytest.param(case, foreach, id=f"{'foreach' if foreach else 'loop'}-{name}")
        for name, case in OPTIMIZERS.items()
        for foreach in (False, True)
        if case.tensor_lr_foreach or not foreach  # torch's own refuses a learning rate that is a tensor there
    ],
)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.bfloat16]], ids=["float32", "mixed"])
@pytest.mark.parametrize(
    "penalty",
    [None, L1(0.3), pytest.param(ElasticNet(torch.tensor([0.0, 0.1, 0.6]), 0.2), marks=pytest.mark.slow)],
    ids=["none", "L1", "per coordinate"],
)
def test_one_graph_that_outlives_changes_of_lr_and_strength(case, foreach, dtypes, penalty):
    kwargs = {"foreach": foreach, "penalty": penalty, **case.usual}
    expected, _ = train(case, dtypes, compiled=False, **kwargs)
    got, frames = train(case, dtypes, compiled=True, **kwargs)
    for a, b in zip(expected, got, strict=True):
        half = a.dtype == torch.bfloat16
        ulp = 2**-6 if half else 1e-6 * case.precision  # of 2 to 4: torch's own bfloat16 sums differ by that much
        torch.testing.assert_close(a, b, atol=ulp, rtol=1e-6)
    assert frames == [1, 2, 2, 2, 2]  # the first step, which fills the momentum buffers, and all others


@optimizers
def test_step_compiles_as_users_call_it(case):
    params, others = parameters(), parameters()
    opt, other = (case(ps, penalty=L1(0.3), **case.usual, lr=torch.tensor(0.1)) for ps in (params, others))
    torch._dynamo.reset()
    step = torch.compile(lambda: opt.step(), backend="eager")
    for i in range(3):
        for ps in (params, others):
            set_gradients(ps, i)
        step()
        other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b)
