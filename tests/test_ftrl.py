"""FTRL: the published algorithm, its minimisers, and sparse gradients that give the dense computation."""

import copy
import io
import math

import pytest
import torch
from sparse_cases import lookups, sparse_gradient
from torch import nn

from torchreg import FTRL, L0, L1, L2, MCP, ElasticNet, GroupLasso, Regularizer, SparseGroupLasso, groups, kkt_residual

SHAPE = (30, 4)
PENALTIES = [
    None,
    L1(0.05),
    L2(0.1),
    ElasticNet(0.05, 0.1),
    GroupLasso(0.1),
    SparseGroupLasso(0.05, 0.05),
    MCP(0.1, 3.0),
]
penalties = pytest.mark.parametrize("penalty", PENALTIES, ids=str)


def scale_at(t):
    return min(1.0, t / 20)


def reference(w, gradients, penalty, alpha=0.3, beta=1.0, cumulative=True, lr=None):
    """The algorithm in float64, all rows in every step."""
    lr = lr or (lambda t: alpha)
    w = w.double().clone()
    h = torch.full_like(w, beta / lr(0))
    n, z, strength = torch.zeros_like(w), -h * w, 0.0
    for t, (rows, g) in enumerate(gradients):
        grad = torch.zeros_like(w).index_add_(0, rows, g.double())
        sigma = ((n + grad**2).sqrt() - n.sqrt()) / lr(t)
        n, z, h = n + grad**2, z + grad - sigma * w, h + sigma
        strength = strength + scale_at(t) if cumulative else scale_at(t)
        w = -z / h if penalty is None else penalty.prox(-z / h, strength / h)
    return w


def run(w, gradients, penalty, *, each=None, sparse=True, lr=None, **hyper):
    p = nn.Parameter(w.clone())
    opt = FTRL([p], lr=0.3, penalty=penalty, **hyper)
    for t, (rows, values) in enumerate(gradients):
        opt.settle(p, rows)
        opt.param_groups[0]["strength_scale"] = scale_at(t)
        if lr is not None:
            opt.param_groups[0]["lr"] = lr(t)
        p.grad = sparse_gradient(rows, values.to(p.dtype), p.shape)
        p.grad = p.grad if sparse else p.grad.to_dense()
        opt.step()
        opt = (each and each(t, opt)) or opt
        p = opt.param_groups[0]["params"][0]
    opt.flush()
    return p.detach()


def table(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@penalties
@pytest.mark.parametrize("cumulative", [True, False])
def test_sparse_gradients_are_the_dense_computation(penalty, cumulative):
    gradients = lookups(30, 80, 3, 4)
    expected = reference(table(), gradients, penalty, cumulative=cumulative)
    for sparse in (True, False):
        close(run(table(), gradients, penalty, sparse=sparse, cumulative=cumulative), expected)
    close(run(table(torch.float32), gradients, penalty, cumulative=cumulative), expected, 1e-5)


def test_a_changing_learning_rate_acts_on_what_comes_after_it():
    gradients = lookups(30, 60, 3, 4)
    rates = [0.3 / (1 + t // 20) for t in range(60)]
    close(
        run(table(), gradients, L1(0.05), lr=lambda t: rates[t]),
        reference(table(), gradients, L1(0.05), lr=lambda t: rates[t]),
    )


def test_it_is_the_published_algorithm_from_zero():
    """Algorithm 1 of McMahan et al. 2013, whose λ₂ is twice ours, coordinate by coordinate."""
    alpha, beta, l1, l2 = 0.5, 1.5, 2.0, 0.3
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(5).double())
    opt = FTRL([p], lr=alpha, beta=beta, cumulative=False, penalty=ElasticNet(l1, l2 / 2))
    z, n, w, zeros = [0.0] * 5, [0.0] * 5, [0.0] * 5, 0
    for _ in range(40):
        g = torch.randn(5, generator=generator).double()
        p.grad = g
        opt.step()
        for i, gi in enumerate(g.tolist()):
            sigma = (math.sqrt(n[i] + gi * gi) - math.sqrt(n[i])) / alpha
            z[i] += gi - sigma * w[i]
            n[i] += gi * gi
            small = abs(z[i]) <= l1
            w[i] = 0.0 if small else -(z[i] - math.copysign(l1, z[i])) / ((beta + math.sqrt(n[i])) / alpha + l2)
        assert p.tolist() == pytest.approx(w, abs=1e-12)
        assert [v == 0 for v in p.tolist()] == [v == 0 for v in w]
        zeros += w.count(0.0)
    assert 20 < zeros < 180


def test_it_reaches_the_minimiser_in_objective_units():
    torch.manual_seed(0)
    x, y = torch.randn(60, 8).double(), torch.randn(60, 1).double()
    model = nn.Linear(8, 1).double()
    reg = Regularizer(model, L1(0.1))
    opt = FTRL(reg.param_groups(), lr=0.5)

    def loss():
        return 0.5 * ((model(x) - y) ** 2).mean()

    for _ in range(1500):
        opt.zero_grad()
        loss().backward()
        opt.step()
    assert kkt_residual(reg, loss) < 3e-3
    assert 0 < (model.weight == 0).sum() < 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_copies_and_checkpoints_go_on_bit_for_bit(how, dtype):
    def again(t, opt):
        if t % 20 != 10:
            return None
        if how == "deepcopy":
            other = copy.deepcopy(opt)
        else:
            file = io.BytesIO()
            torch.save((opt.param_groups[0]["params"][0].detach(), opt.state_dict()), file)
            file.seek(0)
            w, state = torch.load(file, weights_only=True)
            other = FTRL([nn.Parameter(w)], lr=0.1)
            other.load_state_dict(state)
        other.settle(other.param_groups[0]["params"][0], torch.empty(0).long())
        return other

    gradients = lookups(30, 60, 3, 4)
    once = run(table(dtype), gradients, ElasticNet(0.05, 0.02))
    assert torch.equal(run(table(dtype), gradients, ElasticNet(0.05, 0.02), each=again), once)


def test_lookups_are_settled_and_whoever_does_not_settle_is_told():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(20, 3, sparse=True, mode="sum").double()
    dense = copy.deepcopy(model)
    dense.sparse = False
    untold = copy.deepcopy(model)
    optimizers = {m: FTRL(m.parameters(), lr=0.5, penalty=L1(0.3)) for m in (model, dense, untold)}
    optimizers[model].settle_lookups(model)
    for t in range(30):
        rows = torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(t))
        for m in (model, dense, untold):
            optimizers[m].zero_grad()
            (m(rows) - 1).square().sum().backward()
            if m is untold and t == 1:
                with pytest.raises(RuntimeError, match="settle_lookups"):
                    optimizers[m].step()
            elif m is not untold or t == 0:
                optimizers[m].step()
    close(model.state_dict()["weight"], dense.weight.detach())
    assert (dense.weight == 0).any()


def test_a_rate_of_zero_changes_nothing_but_creates_the_state():
    p = nn.Parameter(table())
    opt = FTRL([p], lr=0.0, penalty=L1(0.1))
    p.grad = torch.zeros(SHAPE).double()
    opt.step()
    opt.flush()
    assert torch.equal(p, table())
    assert opt.state[p].keys() == {"linear", "sum", "quadratic", "step", "strength", "settled_strength"}
    gradients = lookups(30, 10, 3, 4)
    opt.param_groups[0]["lr"] = 0.3
    for t, (rows, values) in enumerate(gradients):
        opt.settle(p, rows)
        opt.param_groups[0]["strength_scale"] = scale_at(t)
        p.grad = sparse_gradient(rows, values.double(), SHAPE)
        opt.step()
    opt.flush()
    close(p.detach(), reference(table(), gradients, L1(0.1)))


def test_nan_and_infinity_stay_where_they_are_and_maximize_shrinks():
    w = table()
    w[1, 2], w[2, 0] = math.nan, math.inf
    got = run(w, [(torch.tensor([5]), torch.ones(1, 4))] * 3, L1(0.05))
    assert got.isnan().sum() == 1
    assert got[1, 2].isnan()
    assert got[2, 0] == math.inf
    up = run(table(), [(torch.tensor([5]), torch.ones(1, 4))] * 30, L2(0.5), maximize=True)
    assert up[3].norm() < table()[3].norm()
    assert (up[5] > reference(table(), [(torch.tensor([5]), torch.zeros(1, 4))] * 30, L2(0.5))[5]).all()


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 2)])
def test_shapes(shape):
    p = nn.Parameter(torch.ones(shape).double())
    opt = FTRL([p], lr=1.0, penalty=L1(0.5))
    for _ in range(200):
        p.grad = p.detach() - 2.0
        opt.step()
    opt.flush()
    assert torch.allclose(p, torch.full_like(p, 1.5), atol=1e-2)


WRONG = {
    "rate": (ValueError, "Invalid learning rate", {"lr": -1.0}),
    "NaN": (ValueError, "Invalid learning rate", {"lr": math.nan}),
    "text": (TypeError, "`lr` to be a number", {"lr": "1"}),
    "beta": (ValueError, "Invalid beta value: 0", {"beta": 0}),
    "scale": (ValueError, "`strength_scale`", {"strength_scale": -1.0}),
    "penalty": (TypeError, "`penalty`", {"penalty": 0.1}),
    "shared": (
        TypeError,
        "several parameters share",
        {"penalty": GroupLasso(0.1, groups.Shared([groups.Member("p", 0, torch.arange(2))]))},
    ),
}


@pytest.mark.parametrize(("kind", "words", "hyper"), WRONG.values(), ids=WRONG)
def test_wrong_hyperparameters_are_refused(kind, words, hyper):
    with pytest.raises(kind, match=words):
        FTRL([nn.Parameter(torch.ones(2, 2))], **hyper)


def test_wrong_parameters_and_gradients_are_refused():
    for dtype in (torch.float16, torch.complex64):
        with pytest.raises(TypeError, match="float32 or float64"):
            FTRL([nn.Parameter(torch.ones(2, dtype=dtype))])
    p = nn.Parameter(torch.ones(4, 3))
    for penalty, words in (
        (GroupLasso(0.1, "columns"), "not the rows"),
        (L1(torch.rand(4, 3)), "differs"),
        (L0(0.1), ""),
    ):
        opt = FTRL([p], penalty=penalty)
        p.grad = torch.ones(4, 3).to_sparse(1)
        if words:
            with pytest.raises(TypeError, match=r"Parameter 0 of group 0 has a sparse gradient: .*" + words):
                opt.step()
            assert torch.equal(p, torch.ones(4, 3))
            assert not opt.state


def damage(state, entries):
    for key, value in entries.items():
        if value is None:
            del state["state"][0][key]
        else:
            state["state"][0][key] = value
    return state


@pytest.mark.parametrize(
    "entries",
    [
        {"sum": None},
        {"linear": torch.ones(3)},
        {"strength": math.nan},
        {"step": "x"},
        {"quadratic": 3},
        {"strength": -1},
    ],
    ids=str,
)
def test_a_wrong_state_is_refused_and_changes_nothing(entries):
    p = nn.Parameter(table())
    opt = FTRL([p], penalty=L1(0.1))
    p.grad = table()
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((ValueError, TypeError)):
        opt.load_state_dict(damage(copy.deepcopy(before), entries))
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(torch.as_tensor(after["state"][0][k]), torch.as_tensor(v)) for k, v in before["state"][0].items()
    )
