"""The penalty's value and gradients in one pass: against the eager forms, and chosen only where they are the same."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from optimizer_cases import parameters
from torch import Tensor, nn
from triton_support import require_triton

from torchreg import L1, L2, ElasticNet, Regularizer, kernels
from torchreg.kernels import likeness, native_penalty, penalties, selection, toolchain, triton_penalty
from torchreg.kernels.penalty_table import PenaltyTable
from torchreg.penalties.tiles import is_dense

pytestmark = [
    pytest.mark.skipif(native_penalty.unavailable() is not None, reason="needs a C compiler"),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's numpy
]

PENALTIES = {
    "L1": L1(0.3),
    "L2": L2(0.4),
    "ElasticNet": ElasticNet(0.3, 0.4),
    "nothing": L1(0.0),
    "0-d tensor": L1(torch.tensor(0.3)),
}
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class BySign:
    """The CPU form that notes the signs of weights along with the value, and adds gradients by them."""

    DTYPES = (torch.float32,)
    PIECE_SIZE = native_penalty.PIECE_SIZE

    @staticmethod
    def room(table: PenaltyTable) -> Tensor | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_penalty, "_BY_SIGN", -1)
            signs = native_penalty.room(table)
        return signs if signs is None else signs.fill_(-1)

    @classmethod
    def value(cls, table: PenaltyTable) -> float:
        return native_penalty.value(table, cls.room(table))

    @classmethod
    def gradient(cls, table: PenaltyTable, factor: float) -> None:
        signs = cls.room(table)
        native_penalty.value(table, signs)
        native_penalty.gradient(table, factor, signs)


FORMS = {
    "native": (native_penalty, torch.device("cpu")),
    "by sign": (BySign, torch.device("cpu")),
    "triton": (triton_penalty, GPU),
}
DTYPES = [(form, dtype) for form, (module, _) in FORMS.items() for dtype in module.DTYPES]

every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
every_dtype = pytest.mark.parametrize(("form", "dtype"), DTYPES, ids=[f"{form}-{dtype}" for form, dtype in DTYPES])


def needs_triton(form: str) -> None:
    if form == "triton":
        require_triton()


def numbers(penalty) -> tuple[float, float]:
    return tuple(float(part) for part in penalty.parts())


def value(form: str, weights: list[Tensor], penalty) -> float:
    table = PenaltyTable.of(weights, [numbers(penalty)] * len(weights))
    return float(FORMS[form][0].value(table))


def gradients(form: str, weights, outs, penalty, factor, grads=()) -> list[Tensor]:
    table = PenaltyTable.of(weights, [numbers(penalty)] * len(weights))
    FORMS[form][0].gradient(table.writing(grads or [None] * len(outs), outs), factor)
    return outs


def eager(weights, penalty, factor, grads=()) -> list[Tensor]:
    """The specification; half types are computed in float32 and rounded once."""
    wide = [w.detach().float() if w.dtype in (torch.bfloat16, torch.float16) else w.detach() for w in weights]
    slopes = [penalty.grad(w) * factor for w in wide]
    sums = [s + g for s, g in zip(slopes, grads, strict=True)] if grads else slopes
    return [s.to(w.dtype) for s, w in zip(sums, weights, strict=True)]


def given(form: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    device = FORMS[form][1]
    params = [p for p in parameters(dtype) if is_dense(p)]
    weights = [p.detach().to(device) for p in params]
    return weights, [torch.empty_like(w).copy_(p.grad) for w, p in zip(weights, params, strict=True)]


@every_dtype
@every_penalty
def test_the_value_is_the_sum_of_the_penalties(form, dtype, penalty):
    needs_triton(form)
    weights, _ = given(form, dtype)
    expected = sum(float(penalty.value(w.double())) for w in weights)
    assert value(form, weights, penalty) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)
    for special in (torch.inf, -torch.inf, torch.nan):
        weights[1][1] = special
        torch.testing.assert_close(
            torch.tensor(value(form, weights, penalty)),
            torch.tensor(sum(float(penalty.value(w.double())) for w in weights)),
            equal_nan=True,
        )


@pytest.mark.pairs
@every_dtype
@every_penalty
@pytest.mark.parametrize(
    "factor", [0.7, -2.0, torch.tensor(0.7), torch.nan], ids=["number", "negative", "tensor", "nan"]
)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_the_gradient_is_the_penalties(form, dtype, penalty, factor, added):
    needs_triton(form)
    weights, grads = given(form, dtype)
    weights[1].copy_(torch.tensor([torch.nan, torch.inf, 0.0]))
    weights[0][0].copy_(torch.tensor([-torch.inf, -0.0, 1e-30]))
    beside = grads if added else []
    outs = [torch.full_like(w, torch.nan) for w in weights]
    factor = factor.to(GPU) if isinstance(factor, Tensor) and form == "triton" else factor
    gradients(form, weights, outs, penalty, factor, beside)
    for out, expected in zip(outs, eager(weights, penalty, factor, beside), strict=True):
        torch.testing.assert_close(out, expected, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("streamed", [False, True], ids=["cached, AMD's fetching", "streamed, Intel's"])
def test_sizes_around_blocks_and_pieces_touch_nothing_else(form, dtype, shift, streamed, monkeypatch):
    """In memory full of NaN: what is read from it shows in a result, and what is written to it is missing."""
    needs_triton(form)
    if form == "triton" and (streamed or dtype in (torch.float64, torch.float16)):
        pytest.skip("writing around the cache is the CPU form's, and these dtypes run the same code")
    fetches = (native_penalty._FAR,) * 2 if streamed else (native_penalty._NEAR, native_penalty._NEVER)
    monkeypatch.setattr(native_penalty, "_STREAMED", 0 if streamed else 1 << 60)
    monkeypatch.setattr(native_penalty, "_fetches", lambda: fetches)
    module, device = FORMS[form]
    margin, generator = 64, torch.Generator().manual_seed(0)

    def placed(size: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((size + 2 * margin,), torch.nan, dtype=dtype, device=device)
        view = memory[margin + shift : margin + shift + size]
        return memory, view.copy_(torch.randn(size, generator=generator))

    block = {"native": 256, "by sign": 512, "triton": triton_penalty._BLOCK}[form]
    piece = module.PIECE_SIZE
    sizes = [1, 3, 31, 33, block - 1, block, block + 1, piece - 1, piece + 1, 2 * piece + block + 17]
    weights, grads = ([placed(size)[1] for size in sizes] for _ in range(2))
    memories = [placed(size) for size in sizes]
    outs = [view.fill_(torch.nan) for _, view in memories]
    penalty = L1(0.3) if form == "by sign" else ElasticNet(0.3, 0.4)
    expected = sum(float(penalty.value(w.double())) for w in weights)
    assert value(form, weights, penalty) == pytest.approx(expected, rel=1e-6)
    for beside in ([], grads):
        gradients(form, weights, outs, penalty, 0.7, beside)
        for (memory, out), theirs in zip(memories, eager(weights, penalty, 0.7, beside), strict=True):
            torch.testing.assert_close(out, theirs)
            assert int(memory.isnan().sum()) == 2 * margin


@pytest.mark.parametrize("form", ["native", "by sign"])
def test_an_empty_table_is_worth_nothing(form):
    weights = [torch.zeros(0), torch.zeros(3, 0)]
    assert value(form, weights, L1(1.0)) == 0.0
    gradients(form, weights, [torch.zeros(0), torch.zeros(3, 0)], L1(1.0), 1.0)


def test_signs_are_noted_where_they_are_all_that_a_gradient_needs():
    weights = [torch.randn(1024), torch.randn(5)]
    assert BySign.room(PenaltyTable.of(weights, [(0.5, 0.0), (0.2, 0.0)])).numel() * 16 == 1024
    assert BySign.room(PenaltyTable.of(weights, [(0.5, 0.0), (0.2, 0.1)])) is None
    assert BySign.room(PenaltyTable.of(weights, [(0.5, 0.0), (0.0, 0.0)])) is None  # 0 * inf
    assert BySign.room(PenaltyTable.of([weights[0].double()], [(0.5, 0.0)])) is None
    assert native_penalty.room(PenaltyTable.of(weights, [(0.5, 0.0)] * 2)) is None  # in the cache all the same


def test_gradients_by_sign_are_of_the_weights_when_they_were_looked_at():
    w, outs = torch.randn(2048), [torch.zeros(2048)]
    table = PenaltyTable.of([w], [(0.5, 0.0)])
    signs, expected = BySign.room(table), 0.5 * w.sign()
    native_penalty.value(table, signs)
    w.neg_()
    native_penalty.gradient(table.writing([None], outs), 1.0, signs)
    assert torch.equal(outs[0], expected)


def test_each_tensor_has_its_own_strengths():
    weights = [torch.full((40,), 2.0), torch.full((300,), -3.0)]
    outs = [torch.empty_like(w) for w in weights]
    table = PenaltyTable.of(weights, [(0.5, 0.0), (0.0, 0.25)])
    assert native_penalty.value(table) == 0.5 * 80 + 0.25 * 2700
    native_penalty.gradient(table.writing([None, None], outs), 2.0)
    assert bool((outs[0] == 1.0).all())
    assert bool((outs[1] == -3.0).all())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_bit(count):
    weights = [torch.randn(700_000), torch.randn(5), torch.randn(300_000)]
    penalty, before = ElasticNet(0.3, 0.4), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = value("native", weights, penalty)
        slopes = gradients("native", weights, [torch.empty_like(w) for w in weights], penalty, 0.7)
        torch.set_num_threads(count)
        assert value("native", weights, penalty) == expected
        again = gradients("native", weights, [torch.empty_like(w) for w in weights], penalty, 0.7)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, again, slopes))


def test_the_value_of_many_weights_is_accurate_to_float32():
    w = torch.rand(3_000_001) + 0.1
    exact = float(ElasticNet(0.3, 0.4).value(w.double()))
    assert value("native", [w], ElasticNet(0.3, 0.4)) == pytest.approx(exact, rel=1e-12)
    assert value("native", [w * 1e25], L2(1e-30)) == pytest.approx(float(L2(1e-30).value(w.double() * 1e25)), rel=1e-6)


# The choice


class Spy:
    """Counts the calls of the compiled forms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values = self.gradients = 0
        run_value, run_gradient = native_penalty.value, native_penalty.gradient

        def counted_value(*args):
            self.values += 1
            return run_value(*args)

        def counted_gradient(*args):
            self.gradients += 1
            run_gradient(*args)

        monkeypatch.setattr(native_penalty, "value", counted_value)
        monkeypatch.setattr(native_penalty, "gradient", counted_gradient)

    def taken(self) -> tuple[int, int]:
        counts = self.values, self.gradients
        self.values = self.gradients = 0
        return counts


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


LARGE = 260  # squared it is more than selection.SMALLEST


def a_model(**dtypes: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    dtypes = dtypes or {"single_": torch.float32}
    return nn.ModuleDict({name: nn.Linear(LARGE, LARGE, dtype=dtype) for name, dtype in dtypes.items()})


MIXED = {
    "single_": torch.float32,
    "double_": torch.float64,
    "half_": torch.bfloat16,
    "complex_": torch.complex64,
    "other_": torch.float32,
}


def both(monkeypatch, function):
    """What a function returns with the compiled forms, and without them."""
    ours = function()
    with monkeypatch.context() as patch:
        patch.setattr(native_penalty, "unavailable", lambda: "switched off")
        return ours, function()


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_the_loss_term_of_a_large_model_is_taken_in_one_pass_per_dtype(factor, monkeypatch, spy):
    model = a_model(**MIXED)
    rules = {"other_.*": L2(0.2), "*.bias": L1(torch.rand(LARGE)), "*": ElasticNet(0.3, 0.1)}
    reg = Regularizer(model, rules)
    reg.strength_scale = 0.5

    def term():
        model.zero_grad()
        loss = reg()
        (factor * loss).backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    ours, theirs = both(monkeypatch, term)
    assert spy.taken() == (2, 2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)  # most of the terms are rounded to float32
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b)


def graded(model: nn.Module) -> list[Tensor]:
    """The gradients of its parameters: numbers from a generator."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
    return [p.grad for p in model.parameters()]


def test_a_gradient_that_is_there_is_added_to_in_one_pass_and_stays_the_same_tensor(monkeypatch, spy):
    model = a_model(**MIXED)
    reg = Regularizer(model, {"other_.*": L2(0.2), "*": ElasticNet(0.3, 0.1)})

    def sums():
        grads = graded(model)
        versions = [g._version for g in grads]
        (0.7 * reg()).backward()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert all(g._version > version for g, version in zip(grads, versions, strict=True))
        return grads

    outs = []
    monkeypatch.setattr(
        PenaltyTable, "writing", lambda *args, of=PenaltyTable.writing: outs.append(args[1:]) or of(*args)
    )
    ours, theirs = both(monkeypatch, sums)
    assert spy.taken() == (2, 2)
    assert all(g is out for grads, written in outs for g, out in zip(grads, written, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def _hooked(p: nn.Parameter, seen: list[Tensor]) -> None:
    p.register_hook(lambda grad: seen.append(grad.clone()))


def _hooked_afterwards(p: nn.Parameter, seen: list[Tensor]) -> None:
    p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))


@pytest.mark.parametrize("hook", [_hooked, _hooked_afterwards])
def test_hooks_see_the_gradients_of_the_loss_term(hook, monkeypatch):
    def seen():
        model, saw = a_model(), []
        grads = graded(model)
        hook(model["single_"].weight, saw)
        Regularizer(model, L1(0.3))().backward()
        return [*saw, *grads]

    ours, theirs = both(monkeypatch, seen)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_asked_for_are_returned_and_no_others_change(monkeypatch):
    def asked():
        model = a_model(one=torch.float32, two=torch.float32)
        grads = graded(model)
        reg = Regularizer(model, L1(0.3))
        returned = torch.autograd.grad(reg(), model["one"].weight)
        torch.autograd.backward(reg(), inputs=[model["two"].weight])
        recorded = torch.autograd.grad(reg(), model["one"].weight, create_graph=True)
        reg().backward(create_graph=True)
        return [g.detach() for g in (*returned, *recorded, *(p.grad for p in model.parameters()), *grads)]

    with pytest.warns(UserWarning, match="create_graph"):
        ours, theirs = both(monkeypatch, asked)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("of", [lambda g: g, lambda g: g.detach()], ids=["itself", "detached"])
def test_a_gradient_that_another_term_reads_keeps_its_value_until_then(of, spy):
    model = a_model()
    grads = [g.clone() for g in graded(model)]
    others = sum((of(p.grad) * p).sum() for p in model.parameters())
    (others + Regularizer(model, L1(0.3))()).backward()
    assert spy.taken() == (1, 1)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, 2 * g + (0.3 * p.detach().sign() if p.ndim > 1 else 0))


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_detection_sees_nan_in_gradients(spy):
    model = a_model()
    graded(model)
    model["single_"].weight.data[0, 0] = math.nan
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"PenaltyTermBackward.*nan"):
        Regularizer(model, L2(0.3))().backward()
    assert spy.taken() == (1, 1)


@pytest.mark.parametrize("asked", ["in C++", "one by one"])
def test_a_sum_does_not_hold_for_weights_that_have_changed_where_they_are(asked, monkeypatch):
    if asked == "one by one":
        monkeypatch.setattr(likeness, "_guards", lambda tensors: None)
    memory = torch.ones(LARGE, 2 * LARGE)
    w = memory[: LARGE // 2].view(LARGE, LARGE)
    known, l1 = penalties.PenaltySum([penalty := L1(0.3)], [w]), L1(0.3)
    assert known.holds([penalty], [w.detach()])
    assert not known.holds([l1], [w])
    for other in (
        w[: LARGE // 2],
        w.t()[:, : LARGE // 2],
        w.view(torch.int32),
        torch._neg_view(w),
        memory[:, ::2],
        w.clone(),
    ):
        assert not known.holds([penalty], [other])


@pytest.mark.parametrize("kind", ["other layout", "sparse", "needs a gradient", "data moved"])
def test_unusual_gradients_and_weights_are_left_to_autograd(kind, monkeypatch):
    def sums():
        w = nn.Parameter(torch.randn(LARGE, LARGE, generator=torch.Generator().manual_seed(0)))
        model = nn.Module()
        model.weight = w
        w.grad = torch.ones(LARGE, LARGE)
        if kind == "other layout":
            w.grad = torch.ones(LARGE, 2 * LARGE)[:, ::2]
        elif kind == "sparse":
            w.grad = torch.sparse_coo_tensor([[1], [2]], [3.0], (LARGE, LARGE))
        elif kind == "needs a gradient":
            w.grad = torch.ones(LARGE, LARGE, requires_grad=True)
        term = Regularizer(model, {w: L1(0.3)})()
        if kind == "data moved":
            w.data = w.data.clone()
        term.backward()
        return w.grad.detach().to_dense()

    torch.testing.assert_close(*both(monkeypatch, sums))


def test_the_value_has_the_eager_forms_dtype(monkeypatch):
    for names in (["single_"], ["double_"], ["half_", "single_"], ["single_", "double_"], ["single_", "complex_"]):
        reg = Regularizer(a_model(**{name: MIXED[name] for name in names}), L1(0.1))
        ours, theirs = both(monkeypatch, reg)
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_hook_on_a_large_model_is_one_pass_per_dtype(maximize, monkeypatch, spy):
    def step():
        model = a_model(**{name: MIXED[name] for name in ("single_", "double_", "other_")})
        Regularizer(model, {"*.weight": ElasticNet(0.3, 0.1), "*.bias": L1(0.2)}).attach(
            optimizer := torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)
        )
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), grads, strict=True))
        return list(model.parameters())

    ours, theirs = both(monkeypatch, step)
    assert spy.taken() == (0, 2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["native", "triton"])
def test_one_pass_adds_gradients_of_which_one_is_laid_out_otherwise(form, monkeypatch):
    needs_triton(form)
    if form == "triton":
        monkeypatch.setattr(native_penalty, "gradient", lambda table, *args: triton_penalty.gradient(table, args[0]))
    weights = [torch.randn(LARGE, LARGE) for _ in range(3)]
    grads = [torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE).t(), torch.randn(LARGE, 2 * LARGE)[:, ::2]]
    sums = penalties.PenaltySum([L1(0.1)] * 3, weights).added(weights, grads, 0.5)
    for total, w, g in zip(sums, weights, grads, strict=True):
        torch.testing.assert_close(total, g + 0.05 * w.sign())


def test_gradients_laid_out_otherwise_are_added_all_the_same(monkeypatch, spy):
    w = torch.randn(8, LARGE, 3, LARGE).to(memory_format=torch.channels_last)
    grads = [torch.randn(w.shape).to(memory_format=torch.channels_last), torch.randn(w.shape)]
    weights = [w, w.contiguous(memory_format=torch.channels_last)]
    ours, theirs = both(monkeypatch, lambda: penalties.PenaltySum([L1(0.1)] * 2, weights).added(weights, grads, 0.5))
    assert spy.taken() == (0, 1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride() == w.stride()


class _OwnValue(L1):
    def value(self, w):
        return super().value(w) + 1


class Wrapped(Tensor):
    pass


UNFIT = {
    "strengths per coordinate": lambda w: (L1(torch.rand(LARGE)), w),
    "a value of its own": lambda w: (_OwnValue(0.1), w),
    "half precision": lambda w: (L1(0.1), w.bfloat16()),
    "complex": lambda w: (L1(0.1), torch.complex(w, w)),
    "few": lambda w: (L1(0.1), w[:2]),
    "not dense": lambda w: (L1(0.1), w.repeat(1, 2)[:, ::2]),
    "expanded": lambda w: (L1(0.1), w[:1].expand(LARGE, LARGE)),
    "negated when read": lambda w: (L1(0.1), torch._neg_view(w)),
    "a subclass": lambda w: (L1(0.1), w.as_subclass(Wrapped)),
    "recorded": lambda w: (L1(0.1), w.requires_grad_()),
}


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
def test_what_kernels_do_not_know_goes_to_the_penalty(make, spy):
    penalty, w = make(torch.randn(LARGE, LARGE))
    torch.testing.assert_close(penalties.PenaltySum([penalty], [w]).value([w]), penalty.value(w))
    expected = (0.5 * penalty.grad(w.float() if w.dtype == torch.bfloat16 else w)).to(w.dtype)
    (ours,) = penalties.PenaltySum([penalty], [w]).gradients([w], 0.5, [None])
    torch.testing.assert_close(ours, expected)
    assert spy.taken() == (0, 0)


def test_the_switch_and_transforms_leave_the_eager_form(monkeypatch, spy):
    w = torch.randn(LARGE, LARGE)
    torch.func.grad(lambda x: penalties.PenaltySum([L1(0.1)], [x]).value([x]))(w)
    torch.func.vmap(lambda x: penalties.PenaltySum([L1(0.1)], [x]).value([x]))(w.expand(2, LARGE, LARGE))
    assert spy.taken() == (0, 0)
    for cached in (native_penalty.unavailable, native_penalty._library, toolchain.library):
        cached.cache_clear()
    monkeypatch.setenv(toolchain.SWITCH, "0")
    try:
        torch.testing.assert_close(penalties.PenaltySum([L1(0.1)], [w]).value([w]), L1(0.1).value(w))
        assert native_penalty.unavailable() == "switched off by TORCHREG_NATIVE=0"
    finally:
        monkeypatch.undo()
        native_penalty.unavailable.cache_clear()


def test_a_compiled_loss_has_no_compiled_c_in_it(spy):
    torch.compiler.reset()
    reg = Regularizer(a_model(), L1(0.1))
    compiled = torch.compile(lambda: reg() * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled().detach(), 2 * reg().detach())
    assert spy.taken() == (1, 0)


# What is kept between calls


def _strength(model, reg):
    reg.assignments[0].penalty.strength.fill_(0.7)


def _penalty(model, reg):
    reg.assignments[0].penalty = ElasticNet(0.1, 0.2)


def _data(model, reg):
    model["single_"].weight.data = torch.randn(LARGE, LARGE)


def _values(model, reg):
    model["single_"].weight.data.neg_()


def _parameter(model, reg):
    model["single_"].weight = nn.Parameter(torch.randn(LARGE, LARGE))


def _dtype(model, reg):
    model.double()


def _size(model, reg):
    model["single_"].weight.data = model["single_"].weight.data[: LARGE - 1]


def _layout(model, reg):
    model["single_"].weight.data = model["single_"].weight.data.t()


def _frozen(model, reg):
    model["single_"].weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_strength, _penalty, _data, _values, _parameter, _dtype, _size, _layout, _frozen])
def test_a_loss_term_follows_every_change_since_the_last(change, monkeypatch, spy):
    model = nn.ModuleDict({name: nn.Linear(LARGE, LARGE, bias=False) for name in ("single_", "other_")})
    reg = Regularizer(model, L1(torch.tensor(0.3)))
    reg().backward()
    model.zero_grad()
    change(model, reg)

    def term():
        loss = reg()
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        return [loss.detach(), *grads]

    ours, theirs = both(monkeypatch, term)
    assert spy.taken() == (2, 2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("change", [_strength, _penalty, _data, _values, _parameter, _dtype, _size, _layout, _frozen])
def test_the_hook_follows_every_change_since_the_last_step(change, monkeypatch, spy):
    model = nn.ModuleDict({name: nn.Linear(LARGE, LARGE, bias=False) for name in ("single_", "other_")})
    reg = Regularizer(model, L1(torch.tensor(0.3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    change(model, reg)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    start = [p.detach().clone() for p in model.parameters()]

    def again():
        for p, w in zip(model.parameters(), start, strict=True):
            p.data.copy_(w)
        step()
        return [p.detach().clone() for p in model.parameters()]

    ours, theirs = both(monkeypatch, again)
    assert spy.taken() == (0, 2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_hook_looks_at_unchanged_param_groups_once(monkeypatch):
    made = []
    monkeypatch.setattr(kernels, "PenaltySum", lambda *args: made.append(args) or penalties.PenaltySum(*args))
    model = nn.ModuleDict({name: nn.Linear(LARGE, LARGE) for name in ("single_", "other_")})
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    Regularizer(model, L1(0.3)).attach(optimizer)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(made) == 2  # for the groups of weights: those of biases have no penalty


def _reshaped(w):
    w.data = torch.zeros(2 * LARGE, LARGE)


def _widened(w):
    w.data = w.data.double()


@pytest.mark.parametrize("route", ["loss term", "hook"])
@pytest.mark.parametrize("looked", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("change", [_reshaped, _widened])
def test_gradients_that_do_not_fit_their_weights_are_refused_as_they_are_without_kernels(
    route, looked, change, monkeypatch
):
    def outcome():
        model = nn.Linear(2 * LARGE, LARGE, bias=False)
        w = model.weight
        nn.init.ones_(w)
        reg, optimizer = Regularizer(model, L1(0.3)), torch.optim.SGD(model.parameters(), lr=0.1)
        if route == "hook":
            reg.attach(optimizer)
        call = optimizer.step if route == "hook" else lambda: reg().backward()
        w.grad = torch.arange(2.0 * LARGE * LARGE).view(LARGE, 2 * LARGE)
        if looked:
            call()
        change(w)
        try:
            call()
        except RuntimeError as error:
            return type(error), w.detach(), w.grad
        return None, w.detach(), w.grad

    (error, *ours), (theirs_error, *theirs) = both(monkeypatch, outcome)
    assert error == theirs_error == (RuntimeError if change is _reshaped else error)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:Using backward. with create_graph")
def test_a_recorded_factor_of_frozen_weights_gets_its_gradient():
    w, factor = nn.Parameter(torch.ones(LARGE, LARGE)), torch.tensor(2.0, requires_grad=True)
    loss = Regularizer(nn.ParameterList([w]), {"*": L1(0.5)})() * factor
    w.requires_grad_(False)
    loss.backward(create_graph=True)
    assert factor.grad.item() == pytest.approx(0.5 * LARGE * LARGE)


class _NoGradient(L1):
    has_gradient = False


def test_a_penalty_without_gradient_is_refused_also_after_its_value_was_asked_for():
    reg = Regularizer(a_model(), _NoGradient(0.3))
    with torch.no_grad():
        reg()
    with pytest.raises(ValueError, match="has no gradient"):
        reg()


def test_signs_are_noted_of_more_weights_than_two_mebibytes():
    def room(count):
        return native_penalty.room(PenaltyTable.of([torch.zeros(count)], [(0.3, 0.0)]))

    assert room(1 << 19) is None
    assert room((1 << 19) + 512).numel() * 16 == (1 << 19) + 512


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_regularizer_in_use_is_of_its_own_model(copied):
    model = a_model()
    reg = Regularizer(model, L1(0.5))
    reg().backward()
    other, own = copied((model, reg))
    with torch.no_grad():
        other["single_"].weight.mul_(3)
    torch.testing.assert_close(own(), 3 * reg())


def test_the_signs_of_two_terms_are_kept_apart_until_their_backward_passes(monkeypatch, spy):
    monkeypatch.setattr(native_penalty, "_BY_SIGN", -1)
    model = nn.Linear(512, LARGE, bias=False)  # of the last weights of others no sign is noted
    weight = model.weight
    reg = Regularizer(model, L1(0.5))
    slope = 0.5 * weight.detach().sign()
    first = reg()
    weight.data.neg_()  # no version tells of it
    second = reg()
    for loss, expected in ((first, slope), (second, -slope), (first, slope)):
        assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    second.backward()
    weight.data.neg_()
    third = reg()
    assert torch.equal(torch.autograd.grad(first, weight)[0], slope)
    assert torch.equal(torch.autograd.grad(third, weight)[0], slope)
    assert torch.equal(weight.grad, -slope)
    assert spy.taken() == (3, 6)


# Autograd


def test_the_loss_term_is_differentiable_twice_through_the_eager_form(spy):
    model = a_model()
    weight = model["single_"].weight
    (slope,) = torch.autograd.grad(Regularizer(model, ElasticNet(0.3, 0.1))(), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    torch.testing.assert_close(curvature, torch.full_like(weight, 0.2))
    assert spy.taken() == (1, 0)


def test_weights_that_changed_before_the_backward_pass_are_noticed(spy):
    model = a_model()
    loss = Regularizer(model, L1(0.1))()
    assert spy.taken() == (1, 0)
    with torch.no_grad():
        model["single_"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_backward_pass_makes_new_gradients(spy):
    model = a_model()
    weight = model["single_"].weight
    loss = Regularizer(model, L1(0.1))()
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert spy.taken() == (1, 2)
    assert torch.equal(first, second)
    assert len({t.data_ptr() for t in (first, second, weight)}) == 3
    assert not first.requires_grad
    assert first._version == 0


def test_weights_in_the_model_s_place_may_need_no_gradient(spy):
    model = nn.ModuleDict({name: nn.Linear(LARGE, LARGE, bias=False) for name in ("a", "b")})
    given = {"a.weight": torch.randn(LARGE, LARGE), "b.weight": torch.randn(LARGE, LARGE, requires_grad=True)}

    class Term(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.reg = model, Regularizer(model, L1(0.5))

        def forward(self):
            return self.reg()

    loss = torch.func.functional_call(Term(), {f"model.{name}": w for name, w in given.items()})
    loss.backward()
    assert spy.taken() == (1, 1)
    assert torch.equal(given["b.weight"].grad, 0.5 * given["b.weight"].detach().sign())


def test_a_weight_used_in_both_terms_gets_both_gradients(spy):
    model = a_model()
    weight = model["single_"].weight
    (weight.sum() + Regularizer(model, L1(0.1))()).backward()
    assert spy.taken() == (1, 1)
    torch.testing.assert_close(weight.grad, 1 + 0.1 * weight.detach().sign())


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_same_without_a_stall_and_in_a_graph(dtype):
    model = a_model(only=dtype).cuda()
    weight = model["only"].weight
    reg = Regularizer(model, ElasticNet(0.3, 0.1)).cuda()
    reg.strength_scale = 0.5

    def gradient():
        return torch.autograd.grad(reg(), weight)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        alone = gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = weight.detach().float() if dtype == torch.bfloat16 else weight.detach()
    torch.testing.assert_close(alone, (0.5 * ElasticNet(0.3, 0.1).grad(wide)).to(dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    with torch.no_grad():
        weight.neg_()
    reg.strength_scale = 0.25
    graph.replay()
    torch.testing.assert_close(captured, -0.5 * alone)


def test_a_large_model_is_one_that_pays():
    assert LARGE * LARGE >= selection.SMALLEST
