"""Rows without a gradient are shrunk by the closed form of the steps they missed: the dense computation, lazily."""

import copy
import io
import math
import pickle

import pytest
import torch
from sparse_cases import adam, lookups, sgd, sparse_gradient
from torch import nn

import torchreg
from torchreg import FTRL, L1, L2, MCP, ElasticNet, GroupLasso, ProxAdamW, ProxSGD, Regularizer, SparseGroupLasso

SHAPE = (50, 4)
PENALTIES = {
    "none": None,
    "L1": L1(0.05),
    "L2": L2(0.1),
    "ElasticNet": ElasticNet(0.05, 0.1),
    "GroupLasso": GroupLasso(0.05, "rows"),
    "GroupLasso unweighted": GroupLasso(0.1, "rows", group_weight="none"),
}
penalties = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


def lr_at(t):
    """Half a cosine, over and over, and nothing at all at its end."""
    return 0.05 * (1 + math.cos((t % 97) / 30)) / 2


def scale_at(t):
    return min(1.0, t / 50) * (0.3 if t > 120 else 1.0)


def table(dtype=torch.float64, seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(optimizer, w, gradients, penalty, *, coalesced=False, each=None, **hyper):
    """The steps with lr_at and scale_at, every row settled before it is looked up."""
    p = nn.Parameter(w.clone())
    opt = optimizer([p], lr=0.1, penalty=penalty, **hyper)
    for t, (rows, values) in enumerate(gradients):
        opt.settle(p, rows)
        opt.param_groups[0].update(lr=lr_at(t), strength_scale=scale_at(t))
        p.grad = sparse_gradient(rows, values.to(p.dtype), p.shape, coalesced)
        opt.step()
        if each is not None:
            opt = each(t, opt, p) or opt
            p = opt.param_groups[0]["params"][0]
    opt.flush()
    return p.detach()


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@penalties
@pytest.mark.parametrize(
    "hyper",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}, {"maximize": True}],
    ids=["plain", "momentum", "nesterov and decay", "maximize"],
)
def test_sgd_is_the_dense_computation(penalty, hyper):
    gradients = lookups(50, 130, 3, 4)  # the strength falls at 120
    got = run(ProxSGD, table(), gradients, penalty, **hyper)
    expected = sgd(table(), gradients, penalty, lr_at, scale_at, **hyper)
    close(got, expected)
    assert torch.equal(got == 0, expected == 0)
    if penalty is not None and penalty.strengths().keys() != {"strength"}:
        assert (got == 0).any()


@pytest.mark.parametrize("penalty", [None, L1(0.05), L2(0.02), ElasticNet(0.05, 0.02)], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"amsgrad": True, "betas": (0.5, 0.9)}, {"eps": 1e-2}], ids=str)
def test_adam_is_the_dense_computation_of_rows_as_parameters(penalty, hyper):
    gradients = lookups(50, 130, 3, 4)
    got = run(ProxAdamW, table(), gradients, penalty, weight_decay=0, **hyper)
    expected = adam(table(), gradients, penalty, lr_at, scale_at, **hyper)
    second_order = penalty is not None and "l2" in str(penalty).lower()
    close(got, expected, 1e-6 if second_order else 1e-12)
    assert torch.equal(got == 0, expected == 0)


@penalties
def test_adam_in_no_metric_shrinks_all_rows_alike(penalty):
    gradients = lookups(50, 60, 3, 4)
    got = run(ProxAdamW, table(), gradients, penalty, weight_decay=0, metric="identity")
    close(got, adam(table(), gradients, penalty, lr_at, scale_at, identity=True))


def test_equal_steps_have_an_exact_closed_form_in_adams_metric():
    gradients = [(rows, 100 * g) for rows, g in lookups(50, 60, 3, 4)] + [
        (torch.empty(0).long(), torch.empty(0, 4))
    ] * 200
    p = nn.Parameter(table())
    opt = ProxAdamW([p], lr=0.5, weight_decay=0, penalty=ElasticNet(0.5, 40.0))
    for rows, values in gradients:
        opt.settle(p, rows)
        p.grad = sparse_gradient(rows, values.double(), SHAPE)
        opt.step()
    opt.flush()
    close(p.detach(), adam(table(), gradients, ElasticNet(0.5, 40.0), lambda t: 0.5, lambda t: 1.0))


@pytest.mark.parametrize(("optimizer", "hyper"), [(ProxSGD, {}), (ProxAdamW, {"weight_decay": 0})])
@pytest.mark.parametrize("coalesced", [False, True])
def test_gradients_may_be_coalesced_or_not_and_flushing_changes_nothing(optimizer, hyper, coalesced):
    gradients = lookups(50, 60, 5, 4, duplicates=not coalesced)
    plain = run(optimizer, table(), gradients, ElasticNet(0.05, 0.02), **hyper)
    flushed = run(
        *(optimizer, table(), gradients, ElasticNet(0.05, 0.02)),
        coalesced=coalesced,
        each=lambda t, opt, p: opt.flush() if t % 3 else opt.settle(p, torch.tensor([[0, 1], [1, 0]])),
        **hyper,
    )
    close(flushed, plain, 1e-6 if optimizer is ProxAdamW else 1e-12)


def test_a_long_decay_does_not_wear_out():
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.5, penalty=ElasticNet(1e-3, 0.2))
    nothing = torch.empty(0, dtype=torch.long)
    for t in range(1000):  # e^-180 would be no number any more, nor would its inverse
        rows = torch.tensor([3]) if t % 50 == 49 else nothing
        opt.settle(p, rows)
        p.grad = sparse_gradient(rows, -torch.ones(len(rows), 4).double(), SHAPE)
        opt.step()
    expected = sgd(
        table(),
        [(torch.tensor([3]) if t % 50 == 49 else nothing, -torch.ones(int(t % 50 == 49), 4)) for t in range(1000)],
        *(ElasticNet(1e-3, 0.2), lambda t: 0.5, lambda t: 1.0),
    )
    opt.flush()
    close(p.detach(), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [(L1(0.05), L1(0.2)), (L1(0.05), GroupLasso(0.1)), (None, L2(0.1)), (ElasticNet(0.1, 0.1), None)],
    ids=str,
)
def test_a_new_penalty_takes_over_from_its_step_on(before, after):
    gradients = lookups(50, 120, 3, 4)

    def change(t, opt, p):
        if t == 60:
            opt.param_groups[0]["penalty"] = after

    got = run(ProxSGD, table(), gradients, before, each=change)
    half = sgd(table(), gradients[:61], before, lr_at, scale_at)
    close(got, sgd(half, gradients[61:], after, lambda t: lr_at(t + 61), lambda t: scale_at(t + 61)))


@pytest.mark.parametrize(("optimizer", "hyper"), [(ProxSGD, {"momentum": 0.9}), (ProxAdamW, {"weight_decay": 0})])
def test_dense_gradients_in_between_touch_all_rows(optimizer, hyper):
    gradients = [(rows, g.double()) for rows, g in lookups(50, 60, 3, 4)]
    gradients[20] = gradients[45] = (torch.arange(50), table(seed=1))
    p = nn.Parameter(table())
    opt = optimizer([p], lr=0.1, penalty=L1(0.05), **hyper)
    for t, (rows, values) in enumerate(gradients):
        opt.settle(p, rows)
        p.grad = values.clone() if t in (20, 45) else sparse_gradient(rows, values, SHAPE)
        opt.step()
    opt.flush()
    reference = sgd if optimizer is ProxSGD else adam
    extra = {"momentum": 0.9} if optimizer is ProxSGD else {}
    close(p.detach(), reference(table(), gradients, L1(0.05), lambda t: 0.1, lambda t: 1.0, **extra))


def through_state_dict(optimizer, hyper):
    def again(t, opt, p):
        if t % 40 != 20:
            return None
        file = io.BytesIO()
        torch.save({"w": p.detach(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = optimizer([nn.Parameter(saved["w"])], lr=0.7, **hyper)
        other.load_state_dict(saved["opt"])
        other.settle(other.param_groups[0]["params"][0], torch.empty(0).long())  # rows are settled here
        return other

    return again


def through(copied):
    def again(t, opt, p):
        return copied(opt) if t % 40 == 20 else None

    return again


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [(ProxSGD, {"momentum": 0.9}), (ProxAdamW, {"weight_decay": 0}), (ProxAdamW, {"weight_decay": 0, "amsgrad": True})],
)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies_and_checkpoints_go_on_bit_for_bit(optimizer, hyper, how, dtype):
    each = {
        "state_dict": through_state_dict(optimizer, hyper),
        "deepcopy": through(copy.deepcopy),
        "pickle": through(lambda opt: pickle.loads(pickle.dumps(opt))),
    }[how]
    gradients = lookups(50, 70, 3, 4)
    once = run(optimizer, table(dtype), gradients, ElasticNet(0.05, 0.02), **hyper)
    assert torch.equal(run(optimizer, table(dtype), gradients, ElasticNet(0.05, 0.02), each=each, **hyper), once)


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(40, 4, sparse=True, padding_idx=0)
        self.words = nn.EmbeddingBag(30, 4, mode="mean", sparse=True)
        self.head = nn.Linear(8, 1)

    def forward(self, items, words, offsets):
        return self.head(torch.cat([self.items(items), self.words(input=words, offsets=offsets)], 1))


def batches(count):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        items, words = (torch.randint(0, size, (n,), generator=generator) for size, n in ((40, 4), (30, 9)))
        yield items, words, torch.tensor([0, 2, 4, 4]), torch.randn(4, 1, generator=generator).double()


def trained(sparse, steps=40, optimizer=ProxSGD, **hyper):
    torch.manual_seed(0)
    model = Recommender().double()
    model.items.sparse = model.words.sparse = sparse
    reg = Regularizer(model, {"items*": L1(0.02), "words*": GroupLasso(0.15), "head.weight": L2(0.01)})
    opt = optimizer(reg.param_groups(), lr=0.1, **hyper)
    if sparse:
        opt.settle_lookups(model)
    for items, words, offsets, y in batches(steps):
        opt.zero_grad()
        ((model(items, words, offsets) - y) ** 2).mean().backward()
        opt.step()
    return model, opt, reg


def test_a_model_whose_lookups_settle_is_the_dense_one():
    model, opt, _ = trained(sparse=True)
    dense, _, _ = trained(sparse=False)
    got, expected = model.state_dict(), dense.state_dict()  # settles
    assert (got["items.weight"] == 0).any()
    assert (got["words.weight"] == 0).all(1).any()
    for name in expected:
        close(got[name], expected[name])
    assert model.items.weight.grad.layout is torch.sparse_coo
    before = model.words.weight.detach().clone()
    opt.flush()
    assert torch.equal(model.words.weight, before)


def test_whatever_reads_weights_settles_them():
    dense, _, reference = trained(sparse=False)
    readers = {
        "sparsity of the model": lambda m, o, r: torchreg.sparsity(m).total.l1_norm,
        "sparsity of the optimizer": lambda m, o, r: torchreg.sparsity(o).total.l1_norm,
        "groups": lambda m, o, r: str(torchreg.group_sparsity(m, "rows")),
        "penalty": lambda m, o, r: r().item(),
        "norm": lambda m, o, r: m.state_dict()["items.weight"].norm().item(),
        "monitor": lambda m, o, r: torchreg.SparsityMonitor(m, None).log().total.l1_norm,
        "averages": lambda m, o, r: torchreg.reprox(Recommender().double(), m).total.zeros,
        "frozen": lambda m, o, r: torchreg.freeze_zeros(m.items.weight).remove() or m.items.weight.abs().sum().item(),
    }
    for name, read in readers.items():
        model, opt, reg = trained(sparse=True)
        expected = read(dense, opt if "optimizer" not in name else trained(sparse=False)[1], reference)
        got = read(model, opt, reg)
        assert got == (pytest.approx(expected, rel=1e-9) if not isinstance(got, str) else expected), name


def test_a_loss_term_makes_a_sparse_gradient_dense():
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        lookup = nn.Embedding(6, 2, sparse=sparse, dtype=torch.float64)
        reg = Regularizer(lookup, {"weight": L1(0.1)})
        opt = torch.optim.SGD(lookup.parameters(), lr=0.1)
        for row in range(3):
            opt.zero_grad()
            (lookup(torch.tensor([row])).square().sum() + reg()).backward()
            opt.step()
        found.append(lookup.weight.detach())
    assert torch.equal(*found)


def test_what_is_compacted_or_saved_is_settled(tmp_path):
    pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")
    from torchreg.export import CompactedSize, compact, load_sparse, save_sparse

    def model():
        torch.manual_seed(0)
        lookup = nn.Embedding(30, 4, sparse=True, dtype=torch.float64)
        made = nn.Sequential(lookup, nn.Linear(4, 2, dtype=torch.float64))
        opt = ProxSGD([lookup.weight], lr=1.0, penalty=L1(0.05))
        opt.settle_lookups(made).remove()  # its hook would settle all when a state dict is made
        for _ in range(200):
            opt.zero_grad()
            rows = torch.tensor([1, 2])
            opt.settle(lookup.weight, rows)
            (lookup(rows)[:, 0] - 1).square().sum().backward()
            opt.step()
        return made, opt

    rows = torch.arange(30)[None]
    (made, _alive), (fresh, _alive_too) = model(), model()
    assert (made[0].weight[5] != 0).all(), "a row that was never looked up waits"
    assert CompactedSize(made, rows)()["parameters"] == 30 + 4
    small = compact(fresh, rows, seconds=0).model
    assert small[0].weight.shape == (30, 1)
    torch.testing.assert_close(small(rows), made(rows))
    again, _alive = model()
    save_sparse(again, tmp_path / "file")
    assert int((load_sparse(tmp_path / "file")["0.weight"] != 0).sum()) == 2


def test_the_kkt_residual_is_of_settled_weights_and_takes_sparse_gradients():
    model, _, reg = trained(sparse=True)
    dense, _, reference = trained(sparse=False)
    data = list(batches(3))

    def loss(m):
        return sum(((m(*batch) - y) ** 2).mean() for *batch, y in data)

    expected = torchreg.kkt_residual(reference, lambda: loss(dense)).item()
    assert torchreg.kkt_residual(reg, lambda: loss(model)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("watched", [True, False])
def test_the_order_in_which_a_checkpoint_is_written_does_not_matter(first, watched):
    """Also where each part is written before the other one is asked for, as two files are."""
    model, opt, _ = trained(sparse=True)
    if not watched:
        for handle in list(opt._watched):
            handle.remove()
    parts = {}
    for part in (first, {"model": "optimizer", "optimizer": "model"}[first]):
        parts[part] = copy.deepcopy(model.state_dict() if part == "model" else opt.state_dict())
    other, again, _ = trained(sparse=True, steps=1)
    other.load_state_dict(parts["model"])
    again.load_state_dict(parts["optimizer"])
    opt.flush()
    again.flush()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_model_has_missed_nothing():
    model, _, _ = trained(sparse=True, steps=10)
    fresh = Recommender().double().state_dict()
    model.load_state_dict(fresh)
    assert torch.equal(model.state_dict()["items.weight"], fresh["items.weight"])


@pytest.mark.parametrize("optimizer", [ProxSGD, FTRL])
@pytest.mark.parametrize("settles", [False, True])
def test_a_table_read_by_a_tied_layer_is_settled_or_the_step_says_so(settles, optimizer):
    """The layer reads all rows, of which the hooks know nothing; its gradient is dense."""
    torch.manual_seed(0)
    lookup = nn.Embedding(20, 4, sparse=True, dtype=torch.float64)
    plain = copy.deepcopy(lookup)
    plain.sparse = False
    opt = optimizer([lookup.weight], lr=0.1, penalty=L1(0.01))
    dense = optimizer([plain.weight], lr=0.1, penalty=L1(0.01))
    opt.settle_lookups(lookup)
    for t in range(6):
        if t == 4 and settles:
            opt.settle(lookup.weight)
        for module, each in ((plain, dense), (lookup, opt)):
            each.zero_grad()
            seen = module(torch.tensor([0, 3 * t]))
            ((seen @ module.weight.T if t == 4 else seen) - 1).square().mean().backward()
            if t == 4 and module is lookup and not settles:
                before = lookup.weight.detach().clone()
                with pytest.raises(RuntimeError, match=r"settle\(parameter, rows\).*tied layer"):
                    each.step()
                assert torch.equal(before, lookup.weight)
                return
            each.step()
    opt.flush()
    torch.testing.assert_close(lookup.weight, plain.weight)


def test_a_gradient_that_was_made_dense_needs_no_more_settling():
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.05))
    other = copy.deepcopy(opt)
    (q,) = other.param_groups[0]["params"]
    for t in range(5):
        rows = torch.tensor([t, 2 * t + 1])
        for param, optimizer in ((p, opt), (q, other)):
            optimizer.settle(param, rows)
            param.grad = sparse_gradient(rows, torch.ones(2, 4).double(), param.shape, False)
            if t == 3 and param is q:
                param.grad = param.grad.to_dense()
            optimizer.step()
    opt.flush()
    other.flush()
    torch.testing.assert_close(p, q)


def test_removed_hooks_and_copies_settle_nothing_and_the_step_says_so():
    model, opt, _ = trained(sparse=True, steps=20)
    twin_model, twin = copy.deepcopy((model, opt))
    pickle.loads(pickle.dumps(model))
    items, words, offsets, y = next(iter(batches(1)))
    ((twin_model(items, words, offsets) - y) ** 2).mean().backward()
    before = [p.detach().clone() for p in twin_model.parameters()]
    with pytest.raises(RuntimeError, match=r"group 0.*looked up that had missed steps.*settle_lookups"):
        twin.step()
    assert all(map(torch.equal, before, twin_model.parameters()))
    with twin.settle_lookups(twin_model) as handle:
        handle.remove()
        handle.remove()
    twin.settle_lookups(twin_model)
    twin.zero_grad()
    opt.zero_grad()
    for m, o in ((model, opt), (twin_model, twin)):
        ((m(items, words, offsets) - y) ** 2).mean().backward()
        o.step()
        o.flush()
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))


def test_a_group_that_is_added_later_has_missed_nothing():
    first, second = nn.Parameter(table()), nn.Parameter(table(seed=1))
    opt = ProxSGD([first], lr=0.1, penalty=L1(0.1))
    for t in range(10):
        if t == 5:
            opt.add_param_group({"params": [second], "penalty": L2(0.1)})
        for p in (first, second):
            p.grad = sparse_gradient(torch.empty(0).long(), torch.empty(0, 4).double(), SHAPE)
        opt.step()
    opt.flush()
    nothing = [(torch.empty(0).long(), torch.empty(0, 4))]
    close(first.detach(), sgd(table(), nothing * 10, L1(0.1), lambda t: 0.1, lambda t: 1.0))
    close(second.detach(), sgd(table(seed=1), nothing * 5, L2(0.1), lambda t: 0.1, lambda t: 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("optimizer", "hyper"), [(ProxSGD, {}), (ProxAdamW, {"weight_decay": 0})])
def test_half_precision_is_computed_in_float32_and_agrees_between_replicas(optimizer, hyper, dtype):
    gradients = lookups(50, 60, 3, 4)
    got = run(optimizer, table(dtype), gradients, L1(0.05), **hyper)
    assert torch.equal(got, run(optimizer, table(dtype), gradients, L1(0.05), **hyper))
    expected = (sgd if optimizer is ProxSGD else adam)(table(dtype), gradients, L1(0.05), lr_at, scale_at)
    assert (got.double() - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize(("optimizer", "hyper"), [(ProxSGD, {}), (ProxAdamW, {"weight_decay": 0})])
def test_nan_and_infinity_stay_in_their_row(optimizer, hyper):
    w = table()
    w[1, 2], w[2, 0] = math.nan, math.inf
    gradients = [(rows[rows > 5], g[rows > 5]) for rows, g in lookups(50, 60, 3, 4)]
    gradients.append((torch.tensor([7]), torch.full((1, 4), math.nan)))
    got = run(optimizer, w, gradients, L1(0.05), **hyper)
    assert got[1].isnan().tolist() == [False, False, True, False]
    assert got[2, 0] == math.inf
    assert got[7].isnan().all()
    assert got.isnan().sum() == 5


def test_a_step_that_found_inf_skips_misses_nothing():
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    p.grad = sparse_gradient(torch.tensor([1]), 8 * torch.ones(1, 4).double(), SHAPE)
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    opt.flush()
    assert torch.equal(p, table())
    opt.found_inf, opt.grad_scale = torch.tensor(0.0), torch.tensor(8.0)
    opt.step()
    opt.flush()
    gradients = [(torch.tensor([1]), torch.ones(1, 4))]
    close(p.detach(), sgd(table(), gradients, L1(0.1), lambda t: 0.1, lambda t: 1.0))


@pytest.mark.parametrize("rows", [0, 1])
def test_small_tables(rows):
    p = nn.Parameter(torch.ones(rows, 3))
    opt = ProxSGD([p], lr=0.1, penalty=L1(1.0))
    for _ in range(3):
        p.grad = torch.sparse_coo_tensor(
            torch.zeros(1, rows).long(), torch.ones(rows, 3), p.shape, check_invariants=True
        )
        opt.step()
        opt.flush()
    assert torch.allclose(p, torch.full_like(p, 0.4))


def test_vectors_and_rows_of_several_dimensions():
    for shape in ((6,), (6, 2, 3)):
        p = nn.Parameter(torch.ones(shape).double())
        opt = ProxAdamW([p], lr=0.1, weight_decay=0, penalty=ElasticNet(0.1, 0.1))
        for row in (0, 1, 0, 4):
            opt.settle(p, torch.tensor(row))
            p.grad = sparse_gradient(torch.tensor([row]), torch.ones(1, *shape[1:]).double(), shape)
            opt.step()
        opt.flush()
        assert (p.flatten(1) if p.ndim > 1 else p)[0].unique().numel() == 1
        assert torch.equal(p[2], torch.ones(shape[1:]))  # Adam knows no metric before a row's first gradient
        assert 0 < p[1].max() < 1


REFUSED = {
    "complex": (TypeError, "complex", {"dtype": torch.complex64}, {"penalty": None}),
    "MCP": (TypeError, "MCP .*closed form", {}, {"penalty": MCP(0.1, 3.0)}),
    "sparse groups": (TypeError, "SparseGroupLasso .*closed form", {}, {"penalty": SparseGroupLasso(0.1, 0.1)}),
    "columns": (TypeError, "groups are not the rows", {}, {"penalty": GroupLasso(0.1, "columns")}),
    "one for each": (TypeError, "differs between weights", {}, {"penalty": L1(torch.rand(SHAPE))}),
    "dampening": (ValueError, "`dampening` must be 0", {}, {"momentum": 0.9, "dampening": 0.1}),
    "decay": (ValueError, "lr·weight_decay must be below 1", {}, {"lr": 2.0, "weight_decay": 0.5}),
    "fused": (RuntimeError, "`fused=True` can't be had", {}, {"fused": True}),
    "differentiable": (RuntimeError, "`differentiable=True`", {}, {"differentiable": True}),
    "capturable": (RuntimeError, "`capturable=True`", {}, {"capturable": True}),
    "two dimensions": (TypeError, "2 sparse dimensions", {"sparse_dim": 2}, {}),
}


@pytest.mark.parametrize(("kind", "words", "made", "hyper"), REFUSED.values(), ids=REFUSED)
def test_what_rows_cannot_have_is_refused_before_anything_changes(kind, words, made, hyper):
    p, other = nn.Parameter(table(made.get("dtype", torch.float32))), nn.Parameter(torch.ones(2))
    groups = [{"params": [other], "penalty": None, "fused": None}, {"params": [p]}]
    try:
        opt = ProxSGD(groups, **{"lr": 0.01, "penalty": L1(0.1), **hyper})
    except RuntimeError:
        pytest.skip("no fused steps here")
    p.grad, other.grad = p.detach().to_sparse(made.get("sparse_dim", 1)), torch.ones(2)
    before = [p.detach().clone(), other.detach().clone()]
    with pytest.raises(kind, match=r"Parameter 0 of group 1 has a sparse gradient: .*" + words):
        opt.step()
    assert all(map(torch.equal, before, (p, other)))
    assert not opt.state


def test_adam_refuses_what_its_metric_has_no_closed_form_for():
    p = nn.Parameter(table(torch.float32))
    p.grad = p.detach().to_sparse(1)
    for hyper, words in (({"penalty": GroupLasso(0.1)}, "Adam's metric"), ({"weight_decay": 0.1}, "an L2 penalty")):
        opt = ProxAdamW([p], **{"weight_decay": 0, **hyper})
        with pytest.raises((TypeError, ValueError), match=words):
            opt.step()
        assert not opt.state


def test_a_controller_of_strengths_is_refused():
    model = nn.Embedding(6, 2, sparse=True)
    opt = ProxSGD([{"params": [model.weight], "penalty": L1(0.1)}], lr=0.1)
    torchreg.TargetSparsity(opt, 0.5, until=10)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="TargetSparsity"):
        opt.step()


def test_settling_what_is_not_there_is_refused():
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    with pytest.raises(ValueError, match="parameter of this optimizer"):
        opt.settle(torch.ones(2))
    with pytest.raises(TypeError, match=r"int64 or int32, got torch\.float32"):
        opt.settle(p, torch.ones(2))
    with pytest.raises(TypeError, match=r"int64 or int32, got list"):
        opt.settle(p, [1])
    with pytest.raises(ValueError, match="None of the 0 embeddings"):
        opt.settle_lookups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="None of the 1 embeddings"):
        opt.settle_lookups(nn.Embedding(3, 2, _weight=nn.Parameter(torch.ones(3, 2))))
    with pytest.raises(TypeError, match="Expected `module`"):
        opt.settle_lookups(p)
    p.grad = sparse_gradient(torch.tensor([1]), torch.ones(1, 4).double(), SHAPE)
    opt.step()
    with pytest.raises(IndexError):
        opt.settle(p, torch.tensor([50]))


WRONG = {
    "no tensor": ("settled", 3, "'settled' to be a tensor with 50 rows"),
    "other rows": ("settled", torch.ones(3, 2), "'settled' to be a tensor with 50 rows"),
    "no totals": ("missed", None, "'missed' to be 2 finite numbers"),
    "few totals": ("missed", [1.0], "'missed' to be 2 finite numbers"),
    "NaN": ("missed", [1.0, math.nan], "'missed' to be 2 finite numbers"),
    "negative": ("missed_of", [-1.0, 0.0, 0.0], "'missed_of' to be three strengths"),
    "words": ("missed_of", "abc", "'missed_of' to be three strengths"),
}


@pytest.mark.parametrize(("key", "value", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_state_is_refused_and_changes_nothing(key, value, words):
    p = nn.Parameter(table())
    opt = ProxSGD([p], lr=0.1, penalty=L1(0.1))
    p.grad = sparse_gradient(torch.tensor([1]), torch.ones(1, 4).double(), SHAPE)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    state["state"][0][key] = value
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"][0]["missed"] == after["state"][0]["missed"]
    assert torch.equal(before["state"][0]["settled"], after["state"][0]["settled"])
