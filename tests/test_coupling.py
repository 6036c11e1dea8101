"""Which channels hang together: small networks whose couplings are known."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchreg
from torchreg.coupling import Attention, coupled_groups

pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _table(couplings):
    """Name → (count, makers, users), each as (tensor, dimension)."""
    return {
        c.name: (c.count, {(m.name, m.dim) for m in c.makers}, {(m.name, m.dim) for m in c.users}) for c in couplings
    }


def _reasons(couplings):
    return {left.name: left.reason for left in couplings.left_alone}


def _rows(*layers):
    return {(f"{layer}.{tensor}", 0) for layer in layers for tensor in ("weight", "bias")}


def _labels(coupling, name):
    (member,) = (m for m in (*coupling.makers, *coupling.users) if m.name == name)
    return member.labels


@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_a_channel_is_a_row_its_norm_and_the_columns_behind_a_flatten(kind):
    conv, norm, d = getattr(nn, f"Conv{kind}"), getattr(nn, f"BatchNorm{kind}"), int(kind[0])
    model = nn.Sequential(
        conv(3, 4, 3), norm(4), nn.ReLU(inplace=True), conv(4, 5, 3), nn.Flatten(), nn.Linear(5 * 2**d, 2)
    )
    found = coupled_groups(model, torch.randn(2, 3, *[6] * d))
    assert _table(found) == {
        "0": (4, _rows("0", "1"), {("3.weight", 1)}),
        "3": (5, _rows("3"), {("5.weight", 1)}),
    }
    assert _reasons(found) == {"5": "the model returns them"}
    assert torch.equal(_labels(found["0"], "1.weight"), torch.arange(4))
    assert torch.equal(_labels(found["3"], "5.weight"), torch.arange(5).repeat_interleave(2**d))
    assert {m.name for m in found["0"].others} == {"1.running_mean", "1.running_var"}


def test_the_rows_of_a_transposed_convolution_are_its_second_dimension():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 3))
    table = _table(coupled_groups(model, torch.randn(1, 1, 8, 8)))
    assert table["0"] == (4, _rows("0"), {("2.weight", 0)})
    assert table["2"] == (6, {("2.weight", 1), ("2.bias", 0)}, {("4.weight", 1)})


class Block(nn.Module):
    def __init__(self, width, out, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, groups=groups), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x):
        return F.relu(self.down(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b = Block(4, 4), Block(4, 8, groups)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))


def test_all_layers_of_a_residual_stream_are_one_coupling():
    table = _table(coupled_groups(ResNet(), torch.randn(2, 3, 8, 8)))
    stream = {("a.conv1.weight", 1), ("b.conv1.weight", 1), ("b.down.weight", 1)}
    assert table == {
        "stem": (4, _rows("stem", "a.conv2", "a.bn2"), stream),
        "a.conv1": (4, _rows("a.conv1", "a.bn1"), {("a.conv2.weight", 1)}),
        "b.conv1": (8, _rows("b.conv1", "b.bn1"), {("b.conv2.weight", 1)}),
        "b.conv2": (8, _rows("b.conv2", "b.bn2", "b.down"), {("head.weight", 1)}),
    }


@pytest.mark.parametrize("groups", [2, 8])
def test_a_grouped_convolution_loses_whole_groups(groups):
    found = coupled_groups(ResNet(groups), torch.randn(2, 3, 8, 8))
    coupling = found["b.conv1"]
    assert coupling.count == groups
    size = 8 // groups
    for name in ("b.conv1.weight", "b.bn1.bias", "b.conv2.weight", "b.bn2.weight", "b.down.bias", "head.weight"):
        assert torch.equal(_labels(coupling, name), torch.arange(groups).repeat_interleave(size)), name
    assert {m.name for m in coupling.users} == {"head.weight"}


def test_more_channels_out_than_in_of_each_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    coupling = coupled_groups(model, torch.randn(1, 3, 6, 6))["0"]
    assert torch.equal(_labels(coupling, "0.weight"), torch.arange(4))
    assert torch.equal(_labels(coupling, "1.weight"), torch.arange(4).repeat_interleave(2))
    assert torch.equal(_labels(coupling, "3.weight"), torch.arange(4).repeat_interleave(2))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.c0, self.b1, self.c1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)
        self.b2, self.c2, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1), nn.Linear(15, 2)

    def forward(self, x):
        a = self.c0(x)
        b = self.c1(F.relu(self.b1(a)))
        c = self.c2(F.relu(self.b2(torch.cat([a, b], 1))))
        return self.head(torch.cat([a, b, c], 1).mean((2, 3)))


def test_a_norm_behind_a_concatenation_belongs_to_several_couplings():
    found = coupled_groups(Dense(), torch.randn(2, 3, 8, 8))
    assert {c.name: c.count for c in found} == {"c0": 4, "c1": 6, "c2": 5}
    none = torch.full((10,), -1)
    assert torch.equal(_labels(found["c0"], "b2.weight"), torch.cat([torch.arange(4), none[:6]]))
    assert torch.equal(_labels(found["c1"], "b2.weight"), torch.cat([none[:4], torch.arange(6)]))
    assert torch.equal(_labels(found["c2"], "head.weight"), torch.cat([none, torch.arange(5)]))


class Branches(nn.Module):
    """The parts of a split, used in another order than they lie in."""

    def __init__(self):
        super().__init__()
        self.both, self.out = nn.Linear(5, 14), nn.Linear(7, 3)

    def forward(self, x):
        a, b, c, d = self.both(x).split([4, 3, 4, 3], dim=-1)
        return self.out(torch.cat([torch.tanh(c * a), F.silu(d) * b], -1))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_gated_units_are_made_by_two_rows(shape):
    found = coupled_groups(Branches(), torch.randn(shape))
    (units,) = found
    assert units.count == 7
    assert _labels(units, "both.weight").tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert _labels(units, "out.weight").tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_attention_heads_and_feed_forward_units_of_torchs_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = coupled_groups(nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 8))
    table = _table(found)
    assert set(table) == {"layers.0.self_attn", "layers.0.linear1", "layers.1.self_attn", "layers.1.linear1"}
    name = "layers.1.self_attn"
    made = {(f"{name}.in_proj_weight", 0), (f"{name}.in_proj_bias", 0)}
    assert table[name] == (2, made, {(f"{name}.out_proj.weight", 1)})
    heads = torch.tensor([0, 1]).repeat_interleave(4)
    assert torch.equal(_labels(found[name], f"{name}.in_proj_weight"), heads.repeat(3))
    assert torch.equal(_labels(found[name], f"{name}.out_proj.weight"), heads)
    assert table["layers.0.linear1"] == (16, _rows("layers.0.linear1"), {("layers.0.linear2.weight", 1)})
    (reason,) = _reasons(found).values()
    assert "norm" in reason


class Cross(nn.Module):
    """Attention from one width to others, without norms."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 6)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        self.out = nn.Linear(8, 2)

    def forward(self, query, memory):
        memory = F.relu(self.b(memory))
        return self.out(self.attention(F.relu(self.a(query)), memory, memory)[0])


def test_the_streams_into_and_out_of_an_attention_are_apart():
    table = _table(coupled_groups(Cross(), (torch.randn(4, 2, 3), torch.randn(5, 2, 3))))
    assert table["a"] == (8, _rows("a"), {("attention.q_proj_weight", 1)})
    assert table["b"] == (6, _rows("b"), {("attention.k_proj_weight", 1), ("attention.v_proj_weight", 1)})
    out = {("attention.out_proj.weight", 0), ("attention.out_proj.bias", 0)}
    assert table["attention.out_proj"] == (8, out, {("out.weight", 1)})
    projections = {(f"attention.{part}_proj_weight", 0) for part in "qkv"} | {("attention.in_proj_bias", 0)}
    assert table["attention"] == (2, projections, {("attention.out_proj.weight", 1)})


class Language(nn.Module):
    """Own attention with packed rows, gated units, and an output layer tied to the embedding."""

    def __init__(self, select=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(7, 8))
        self.qkv, self.proj, self.num_heads, self.select = nn.Linear(8, 24), nn.Linear(8, 8), 4, select
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(12, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place
        b, t, _ = x.shape
        if self.select:
            q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (y.view(b, t, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, -1))
        a, gate = self.up(x).chunk(2, dim=-1)
        return self.head(x + self.down(a * F.silu(gate)))


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("described", [False, True])
def test_heads_of_an_attention_of_ones_own(select, described):
    heads = {"": Attention("qkv", "proj")} if described else None
    found = coupled_groups(Language(select), torch.randint(11, (2, 7)), heads=heads)
    heads = next(c for c in found if c.makers[0].name == "qkv.weight")
    assert heads.count == 4
    assert torch.equal(_labels(heads, "qkv.weight"), torch.arange(4).repeat_interleave(2).repeat(3))
    assert torch.equal(_labels(heads, "proj.weight"), torch.arange(4).repeat_interleave(2))


def test_a_tied_weight_is_named_once_and_makes_and_uses():
    table = _table(coupled_groups(Language(), torch.randint(11, (2, 7))))
    made = {("embed.weight", 1), ("place", 1)} | _rows("proj", "down")
    assert table["embed"] == (8, made, {("embed.weight", 1), ("qkv.weight", 1), ("up.weight", 1)})
    assert table["up"] == (12, _rows("up"), {("down.weight", 1)})


class Twins(nn.Module):
    """Two branches whose first layers share their weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(F.relu(self.a(x))) + self.d(torch.tanh(self.b(-x)))


def test_a_tied_weight_ties_what_its_layers_make():
    made = {("a.weight", 0), ("a.bias", 0), ("b.bias", 0)}
    assert _table(coupled_groups(Twins(), torch.randn(5, 3))) == {"a": (6, made, {("c.weight", 1), ("d.weight", 1)})}


def test_a_layer_used_twice_ties_what_it_reads():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(3, 6), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 2))
    table = _table(coupled_groups(model, torch.randn(2, 3)))
    assert table == {"0": (6, _rows("0", "1"), {("1.weight", 1), ("5.weight", 1)})}


@pytest.mark.parametrize(
    ("layer", "count"), [(nn.GroupNorm(4, 8), 4), (nn.GroupNorm(8, 8), 8), (nn.InstanceNorm2d(8, affine=True), 8)]
)
def test_a_group_norm_loses_whole_groups(layer, count):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.ReLU(), nn.Conv2d(8, 2, 3))
    (coupling,) = coupled_groups(model, torch.randn(2, 3, 8, 8))
    assert coupling.count == count
    assert torch.equal(_labels(coupling, "3.weight"), torch.arange(count).repeat_interleave(8 // count))


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.a(x)
        n, _, h, w = y.shape
        return self.c(self.b(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)))


class Gate(nn.Module):
    """One channel that multiplies all others."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y * torch.sigmoid(self.gate(y)))


def test_a_single_channel_that_is_broadcast_is_not_the_first_of_the_others():
    (coupling,) = coupled_groups(Gate(), torch.randn(2, 3, 6, 6))
    assert coupling.count == 8
    assert {m.name for m in coupling.makers} == {"a.weight", "a.bias"}
    assert {m.name for m in coupling.users} == {"gate.weight", "b.weight"}


class Mixer(nn.Module):
    """Mixes over places with a layer as wide as there are channels: torch-pruning takes places for channels."""

    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(F.relu(self.mix(F.relu(self.a(x)).transpose(1, 2)).transpose(1, 2)))


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y - y.mean(-1, keepdim=True))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(x + self.a(x))


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("place", torch.randn(6))

    def forward(self, x):
        return self.b(self.a(x) + self.place)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(3, 6), kind(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.rnn(self.a(x))[0])


@pytest.mark.parametrize(
    ("model", "shape", "name", "word"),
    [
        (Averaged(), (4, 3), "a", "mean"),
        (Residual(), (4, 6), "a", "input"),
        (WithBuffer(), (4, 3), "a", "'place'"),
        (Recurrent(nn.LSTM), (5, 4, 3), "a", "recurrent"),
        (Recurrent(nn.GRU), (5, 4, 3), "a", "recurrent"),
        (nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (4, 3), "0", "layer norm '1'"),
        (nn.Sequential(nn.Linear(3, 6), nn.Softmax(-1), nn.Linear(6, 2)), (4, 3), "0", "affects the others"),
        (nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(1, 6), nn.Conv1d(6, 2, 1)), (4, 3, 5), "0", "only one"),
        (nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)), (4, 3), "0", "only one"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 6)), nn.Linear(6, 2)), (4, 3), "0", "param"),
        (Shuffled(), (2, 3, 6, 6), "a", ""),
        (Mixer(), (4, 6, 3), "a", ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_can_not_be_removed_is_left_alone_with_a_reason(model, shape, name, word):
    found = coupled_groups(model, torch.randn(shape))
    assert not [c for c in found if c.name == name]
    assert word in _reasons(found)[name]


def test_long_chains_of_operations_are_no_obstacle():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            for _ in range(1500):
                y = y * 1.0
            return self.b(y)

    assert [c.count for c in coupled_groups(Long(), torch.randn(2, 3))] == [4]


def test_zero_makers_do_not_make_a_sigmoid_zero():
    model = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 2))
    assert [c.vanishes for c in coupled_groups(model, torch.randn(4, 3))] == [False, True]


def test_the_models_own_zeros_hide_nothing():
    model = Averaged()
    nn.init.zeros_(model.b.weight)
    assert "mean" in _reasons(coupled_groups(model, torch.randn(4, 3)))["a"]


def test_ignored_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    found = coupled_groups(model, torch.randn(4, 3), ignore=["0"])
    assert [c.name for c in found] == ["1"]
    assert _reasons(found)["0"] == "'0' is ignored"


def test_tracing_leaves_the_model_as_it_is():
    model = ResNet().train()
    model.a.eval()
    model.head.weight.requires_grad_(False)
    model.stem.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    identities = [id(p) for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():  # tracing needs gradients, and takes them
        coupled_groups(model, x)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != "head.weight")
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert identities == [id(p) for p in model.parameters()]
    assert x.grad is None
    assert not x.requires_grad


def test_frozen_models_and_keyword_arguments():
    model = Cross().requires_grad_(False)
    inputs = {"memory": torch.randn(5, 2, 3), "query": torch.randn(4, 2, 3)}
    assert set(_table(coupled_groups(model, inputs))) == {"a", "b", "attention", "attention.out_proj"}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = ResNet().to(dtype)
    assert len(coupled_groups(model, torch.randn(2, 3, 8, 8, dtype=dtype))) == 4


def test_the_table_names_what_is_coupled_and_what_is_not():
    text = str(coupled_groups(ResNet(), torch.randn(2, 3, 8, 8)))
    assert "stem" in text
    assert "head.weight" in text
    assert "the model returns them" in text
    with pytest.raises(KeyError, match="No coupling 'x' among 4: stem"):
        coupled_groups(ResNet(), torch.randn(2, 3, 8, 8))["x"]


class Branching(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such branch")


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (object(), torch.zeros(1), TypeError, "nn.Module"),
        (nn.Linear(3, 2), 5, TypeError, "`example_input` .* got int"),
        (nn.Linear(3, 2), (), TypeError, "without a tensor"),
        (nn.Linear(3, 2), {1: torch.zeros(1)}, TypeError, "keys"),
        (nn.Linear(3, 2), torch.zeros(2, 4), ValueError, "can't be traced: .*example it raised RuntimeError.*mat1"),
        (Branching(), torch.zeros(2), ValueError, "no such branch"),
        (nn.ReLU(), torch.zeros(2, dtype=torch.int64), ValueError, "no output of it depends on a parameter"),
        (nn.LazyLinear(3), torch.zeros(2, 3), ValueError, "not initialised"),
    ],
)
def test_what_can_not_be_traced_is_one_clear_error(model, example, error, message):
    with pytest.raises(error, match=message):
        coupled_groups(model, example)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ignore": "0"}, TypeError, "list of names"),
        ({"ignore": ["x*"]}, ValueError, "'x\\*' in `ignore` matches none"),
        ({"heads": {"": "num_heads"}}, TypeError, "Attention"),
        ({"heads": {"x": Attention("qkv", "proj")}}, ValueError, "'x' in `heads` matches none"),
        ({"heads": {"": Attention("q", "proj")}}, ValueError, "'q' .* linear layer"),
        ({"heads": {"": Attention("qkv", "proj", "heads")}}, ValueError, "attribute 'heads'"),
        ({"heads": {"": Attention(("qkv", "qkv"), "proj")}}, ValueError, "one or three"),
        ({"heads": {"": Attention(("up", "up", "up"), "down")}}, ValueError, "parts in the"),
    ],
)
def test_names_that_fit_nothing_are_refused(options, error, message):
    model = Language()
    model.num_heads = 5 if "up" in str(options) else 4
    with pytest.raises(error, match=message):
        coupled_groups(model, torch.randint(11, (2, 7)), **options)


def test_a_missing_torch_pruning_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"torchreg-sparse\[pruning\]"):
        torchreg.coupled_groups(nn.Linear(3, 2), torch.zeros(1, 3))
