"""Compaction: what is removed, what is refused, and that outputs stay."""

import copy
import io

import pytest
import torch
from test_coupling import Averaged, Block, Cross, Dense, Language, Recurrent, ResNet, Shuffled, Twins
from torch import nn
from torch.nn import functional as F

from torchreg.compacted.attention import CompactAttention
from torchreg.coupling import Attention, coupled_groups
from torchreg.export import compact

pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")
HALF = slice(None, None, 2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _image(size=8, batch=2):
    return torch.randn(batch, 3, size, size)


def _lively(model):
    """Norms with statistics and shifts of their own, as after training."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@torch.no_grad()
def _zero(model, members, channels, coupling):
    tensors = dict(model.named_parameters())
    gone = torch.zeros(coupling.count, dtype=torch.bool)
    gone[channels] = True
    for member in members:
        tensors[member.name].index_fill_(member.dim, member.slices(gone), 0)


def _halved(model, example, part="makers", **options):
    """The model with every other channel of each coupling zero in its makers or users."""
    model = _lively(model)
    for coupling in coupled_groups(model, example, **options):
        if coupling.vanishes or part == "users":
            _zero(model, getattr(coupling, part), HALF, coupling)
    return model


def _call(model, example):
    with torch.no_grad():
        model = copy.deepcopy(model).eval()
        output = model(*example) if isinstance(example, tuple) else model(example)
    return output["logits"] if isinstance(output, dict) else output


def _same(small, model, *examples):
    for example in examples:
        torch.testing.assert_close(_call(small, example), _call(model, example), rtol=1e-4, atol=1e-5)


def _convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.PReLU(6),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def _transposed():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3, groups=3),
        nn.ReLU(), nn.Conv2d(6, 2, 3),
    )  # fmt: skip


def _depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def _normed(groups):
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), nn.ReLU(), nn.Conv2d(8, 2, 3))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.out, self.last = nn.Linear(5, 16), nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.both(x).chunk(2, dim=-1)
        return self.last(F.glu(self.out(torch.tanh(b * a)), dim=-1))


class Excited(nn.Module):
    """Channels scaled by what all of them say (Hu et al., CVPR 2018), depthwise convolutions, a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.bn1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.narrow, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.hardswish(self.bn2(self.depth(F.relu6(self.bn1(self.wide(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(F.adaptive_avg_pool2d(x + self.narrow(y), 1).flatten(1))


class UNet(nn.Module):
    """Skips by concatenation, transposed convolutions and pixels made from channels."""

    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(10, 8, 3, padding=1)
        self.pixels, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = F.relu(self.down(x))
        y = F.relu(self.up(F.relu(self.mid(F.max_pool2d(a, 2)))))
        y = F.relu(self.join(torch.cat([y, a], 1)))
        return self.out(F.relu(F.pixel_shuffle(self.pixels(y), 2)))


class Tokens(nn.Module):
    """A class token, positions, gains of layers, and all tokens flattened in the end."""

    def __init__(self):
        super().__init__()
        self.patch, self.gain = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.rand(8))
        self.first, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        x = x + self.gain * self.down(F.gelu(self.up(x)))
        return {"logits": self.head(x.flatten(1)), "aside": None}


NETWORKS = [
    (Excited, _image()),
    (UNet, _image()),
    (Tokens, _image()),
    (_convolutional, _image()),
    (_transposed, _image()),
    (_depthwise, _image()),
    (ResNet, _image()),
    (lambda: ResNet(groups=4), _image()),
    (lambda: ResNet(groups=8), _image()),
    (Dense, _image()),
    (Gated, torch.randn(2, 3, 5)),
    (_normed(4), _image()),
    (_normed(8), _image()),
    (Cross, (torch.randn(4, 2, 3), torch.randn(5, 2, 3))),
    (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 2), torch.randn(3, 5, 8)),
    (lambda: nn.Transformer(8, 4, 1, 1, 16), (torch.randn(5, 3, 8), torch.randn(4, 3, 8))),
    (lambda: nn.Transformer(8, 2, 1, 1, 16, norm_first=True, bias=False), (torch.randn(5, 3, 8), torch.randn(4, 3, 8))),
]
every_network = pytest.mark.parametrize(("make", "example"), NETWORKS)


@every_network
@pytest.mark.parametrize("part", ["makers", "users"])
def test_half_of_the_channels_go_and_the_outputs_stay(make, example, part):
    model = _halved(make(), example, part)
    small, report = (result := compact(model, example, seconds=0)).model, result.report
    assert report.couplings
    for shrunk in report.couplings:
        assert shrunk.after == shrunk.before // 2, shrunk.name
    assert report.parameters[1] < 0.8 * report.parameters[0]
    assert report.flops[1] < 0.8 * report.flops[0]
    assert report.error < 1e-9
    assert report.checked_in == "float64"
    assert report.parameters[1] == sum(p.numel() for p in small.parameters())
    other = tuple(2 * t for t in example) if isinstance(example, tuple) else 2 * example
    _same(small, model, example, other)
    again = compact(small, example, seconds=0).report
    assert again.parameters[0] == again.parameters[1]


@every_network
def test_without_zeros_nothing_changes(make, example):
    model = _lively(make())
    small, report = (result := compact(model, example, seconds=0)).model, result.report
    assert report.parameters[0] == report.parameters[1]
    assert report.flops[0] == report.flops[1]
    assert str(small) == str(model)
    for a, b in zip(small.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_a_compacted_model_can_be_compacted_again():
    model = nn.Sequential(nn.Linear(20, 8), nn.TransformerEncoderLayer(8, 8, 16, batch_first=True), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[:, 4:] = 0
    example = torch.randn(3, 5, 20)
    once = compact(_halved(model, example), example, seconds=0).model
    assert once[1].self_attn.kept == (1, 3, 5, 7)
    twice = compact(_halved(once, example), example, seconds=0).model
    assert twice[1].self_attn.kept == (3, 7)
    assert twice[1].self_attn.original_heads == 8
    assert twice[1].linear1.out_features == 4
    _same(twice, once, example)
    stacked = nn.Sequential(once[0], nn.ReLU(), nn.Linear(8, 2))
    small = compact(_halved(stacked, example), example, seconds=0).model
    assert (small[0].in_features, small[0].out_features, small[2].in_features) == (20, 4, 4)
    _same(small, stacked, example)


def test_inference_mode_does_not_matter():
    with torch.inference_mode():
        model, tokens = Language(), torch.randint(11, (2, 7))
        assert compact(model, tokens, seconds=0).report.parameters[0] > 0


def test_the_model_given_is_not_changed():
    model = _halved(ResNet(), _image()).train()
    model.head.bias.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    example, state = _image(), torch.get_rng_state()
    small = compact(model, example, seconds=0.01).model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert modes == [m.training for m in model.modules()]
    assert small.training
    assert not small.head.bias.requires_grad
    assert small.a.conv1.weight.requires_grad


def test_layers_know_their_new_sizes():
    small = compact(_halved(ResNet(groups=4), _image()), _image(), seconds=0).model
    assert (small.stem.out_channels, small.a.conv1.in_channels, small.b.bn1.num_features) == (2, 2, 4)
    assert (small.b.conv2.in_channels, small.b.conv2.out_channels, small.b.conv2.groups) == (4, 4, 2)
    assert small.head.in_features == 4
    assert small.b.bn1.running_mean.shape == (4,)
    small.train()(_image()).sum().backward()  # it can be trained on
    small = compact(_halved(_normed(4)(), _image()), _image(), seconds=0).model
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)


def test_a_norm_without_scale_and_shift_makes_a_channel_zero():
    model = _lively(ResNet())
    with torch.no_grad():
        model.a.bn1.weight[:3] = 0
        model.a.bn1.bias[:3] = 0
    report = compact(model, _image(), seconds=0).report
    assert {s.name: s.after for s in report.couplings} == {"stem": 4, "a.conv1": 1, "b.conv1": 8, "b.conv2": 8}


def test_constants_that_zero_padding_surrounds_stay_unless_the_activation_makes_them_zero():
    model = _lively(ResNet())
    with torch.no_grad():
        model.a.conv1.weight[:3] = 0
        model.a.conv1.bias[:3] = 0
        model.a.bn1.running_mean.zero_()
        model.a.bn1.bias[:3] = torch.tensor([1.0, -1.0, 2.0])
    small, report = (result := compact(model, _image(), seconds=0)).model, result.report
    assert {s.name: s.constant for s in report.couplings} == {"stem": 0, "a.conv1": 2, "b.conv1": 0, "b.conv2": 0}
    assert small.a.conv1.out_channels == 3
    assert "constant" in str(report)
    _same(small, model, _image())
    assert compact(model, _image(), fold=False, seconds=0).model.a.conv1.out_channels == 4


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
@pytest.mark.parametrize("bias", [False, True])
def test_constants_become_biases(activation, bias):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation(),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=bias), activation(), nn.Conv2d(6, 4, 3, bias=bias),
        nn.Flatten(), activation(), nn.Linear(144, 5, bias=bias), activation(), nn.Linear(5, 2, bias=bias),
    )  # fmt: skip
    _lively(model)
    with torch.no_grad():
        for layer in (0, 3, 5, 8):
            model[layer].weight[::2] = 0
    before = copy.deepcopy(model.state_dict())
    small, report = (result := compact(model, _image(), seconds=0)).model, result.report
    assert [s.after for s in report.couplings] == [4, 3, 2, 2]
    assert sum(s.constant for s in report.couplings) == 0
    assert report.error < 1e-6
    _same(small, model, _image())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_what_only_constants_feed_is_a_constant():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[2].weight[:2, 4:] = 0  # two units read nothing else
    small = compact(model, torch.randn(7, 3), seconds=0).model
    assert [tuple(layer.weight.shape) for layer in small[::2]] == [(2, 3), (3, 2), (4, 3)]
    _same(small, model, torch.randn(7, 3))


def test_a_constant_that_the_input_scales_stays():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, gain):
            return self.b(F.relu(self.a(x)) * gain)

    model, example = Gain(), (torch.randn(4, 3), torch.rand(4, 1))
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.a.bias[:3] = torch.tensor([1.0, 2.0, -1.0])
    small, report = (result := compact(model, example, seconds=0)).model, result.report
    assert [(s.after, s.constant) for s in report.couplings] == [(5, 2)]
    _same(small, model, example)


def test_tied_weights_stay_tied():
    model = _halved(Twins(), torch.randn(5, 3))
    small = compact(model, torch.randn(5, 3), seconds=0).model
    assert small.a.weight is small.b.weight
    assert (small.a.out_features, small.b.out_features, small.d.in_features) == (3, 3, 3)
    _same(small, model, torch.randn(5, 3))


def test_units_that_feed_only_removed_ones_go_too():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        model[4].weight[:, 1:] = 0  # units 1 to 4 of the second layer are not used
        model[2].weight[0, 2:] = 0  # the one that is reads units 0 and 1 of the first
    small = compact(model, torch.randn(7, 3), seconds=0).model
    assert [tuple(layer.weight.shape) for layer in small[::2]] == [(2, 3), (1, 2), (4, 1)]
    _same(small, model, torch.randn(7, 3))


def test_a_dead_layer_keeps_one_channel():
    model = _lively(ResNet())
    for p in model.a.parameters():
        nn.init.zeros_(p)
    small, report = (result := compact(model, _image(), seconds=0)).model, result.report
    assert small.a.conv1.weight.shape == (1, 4, 3, 3)
    assert sum(s.constant for s in report.couplings) == 0
    _same(small, model, _image())


def test_gates_that_are_zero_take_the_units_they_gate_along():
    model = Gated()
    with torch.no_grad():
        model.both.weight[10:13] = 0  # tanh(b·a) is zero where b is
        model.both.bias[10:13] = 0
    report = compact(model, torch.randn(4, 5), seconds=0).report
    assert [(s.before, s.after) for s in report.couplings] == [(8, 5), (6, 6)]


@pytest.mark.parametrize("fold", [False, True])
def test_zeros_before_a_sigmoid_are_constants(fold):
    model = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[0] = model[0].bias[0] = 0
        model[2].weight[:, 1:3] = 0
    small, report = (result := compact(model, torch.randn(4, 3), fold=fold, seconds=0)).model, result.report
    assert [(s.before, s.after) for s in report.couplings] == [(6, 3 if fold else 4)]
    _same(small, model, torch.randn(4, 3))


@pytest.mark.parametrize("model", [Averaged(), Recurrent(nn.LSTM), Shuffled()], ids=lambda m: type(m).__name__)
def test_what_can_not_be_removed_stays_and_is_named(model):
    example = _image() if isinstance(model, Shuffled) else torch.randn(5, 4, 3)
    for p in model.a.parameters():
        with torch.no_grad():
            p[::2] = 0
    small, report = (result := compact(model, example, select_inputs=False, seconds=0)).model, result.report
    assert "a" in {left.name for left in report.left_alone}
    assert small.a.weight.shape == model.a.weight.shape
    _same(small, model, example)


def test_single_channels_of_a_group_stay():
    model = _lively(ResNet(groups=2))
    coupling = coupled_groups(model, _image())["b.conv1"]
    with torch.no_grad():
        for member in coupling.makers:
            dict(model.named_parameters())[member.name].index_fill_(0, torch.tensor([0, 1, 4]), 0)
    report = compact(model, _image(), seconds=0).report
    assert report.parameters[0] == report.parameters[1]


class Noisy(nn.Module):
    """Draws random numbers in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(torch.sigmoid(self.b(F.relu(self.a(x)))) + torch.randn(4))


def test_random_numbers_are_the_same_for_both_models():
    model = _halved(Noisy(), torch.randn(5, 3))
    assert compact(model, torch.randn(5, 3), seconds=0).model.a.out_features == 4


def test_ignored_modules_stay_with_all_that_they_hold():
    model = _halved(ResNet(), _image())
    report = compact(model, _image(), ignore=["a"], seconds=0).report
    assert {s.name for s in report.couplings} == {"b.conv1", "b.conv2"}


def test_ignored_layers_stay():
    model = _halved(ResNet(), _image())
    report = compact(model, _image(), ignore=["a.conv1"], seconds=0).report
    assert {s.name for s in report.couplings} == {"stem", "b.conv1", "b.conv2"}
    assert {left.name: left.reason for left in report.left_alone}["a.conv1"] == "'a.conv1' is ignored"


# --- attention


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both", "float", "per head", "unbatched"])
def test_compact_attention_is_torchs_attention(batch_first, need_weights, masks):
    full = nn.MultiheadAttention(12, 4, batch_first=batch_first).eval()
    with torch.no_grad():
        full.out_proj.weight[:, 3:6] = full.out_proj.weight[:, 9:] = 0
    dead = torch.tensor([False, True, False, True])
    cut = copy.deepcopy(full)
    rows = (~dead).repeat_interleave(3)
    cut.in_proj_weight = nn.Parameter(full.in_proj_weight.detach()[rows.repeat(3)])
    cut.in_proj_bias = nn.Parameter(full.in_proj_bias.detach()[rows.repeat(3)])
    cut.out_proj.weight = nn.Parameter(full.out_proj.weight.detach()[:, rows])
    small = CompactAttention(cut, [0, 2])
    x = torch.randn(5, 12) if masks == "unbatched" else torch.randn(2, 5, 12) if batch_first else torch.randn(5, 2, 12)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options = {
        "none": {},
        "unbatched": {"key_padding_mask": padding[1]},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "both": {"key_padding_mask": padding, "attn_mask": causal},
        "float": {"attn_mask": torch.randn(5, 5)},
        "per head": {"attn_mask": torch.randn(8, 5, 5)},
    }[masks]
    with torch.no_grad():
        y, weights = small(x, x, x, need_weights=need_weights, average_attn_weights=False, **options)
        expected, all_weights = full(x, x, x, need_weights=need_weights, average_attn_weights=False, **options)
    torch.testing.assert_close(y, expected)
    if need_weights:
        torch.testing.assert_close(weights, all_weights[..., [0, 2], :, :])
    else:
        assert weights is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_channel_that_is_read_by_nan_stays_with_a_word_on_why(bad):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[HALF], model[0].bias[HALF] = 0, 0
        model[2].weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"outputs: '2\.weight' holds NaN or infinite numbers.*ignore=\['0'\]"):
        compact(model, torch.randn(2, 6), seconds=0)


def test_heads_with_zero_values_go():
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    with torch.no_grad():
        for i in (0, 3):  # value rows of two heads of the first layer
            model.layers[0].self_attn.in_proj_weight[16 + 2 * i : 18 + 2 * i] = 0
            model.layers[0].self_attn.in_proj_bias[16 + 2 * i : 18 + 2 * i] = 0
    small = compact(model, torch.randn(3, 5, 8), seconds=0).model
    attention = small.layers[0].self_attn
    assert isinstance(attention, CompactAttention)
    assert attention.kept == (1, 2)
    assert type(small.layers[1].self_attn) is nn.MultiheadAttention
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        got, expected = (m.eval()(x, src_key_padding_mask=padding) for m in (small, model))
    torch.testing.assert_close(got[~padding], expected[~padding])


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("select", [False, True])
def test_heads_of_a_described_attention_go_and_others_are_named(described, select):
    tokens = torch.randint(11, (2, 7))
    heads = {"": Attention("qkv", "proj")} if described else None
    model = _halved(Language(select), tokens, heads={"": Attention("qkv", "proj")})
    if described:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Language, "forward", _forward_by_heads)
            small, report = (result := compact(model, tokens, heads=heads, seconds=0)).model, result.report
            assert small.num_heads == 2
            assert small.qkv.out_features == 12
            _same(small, model, tokens)
    else:
        small, report = (result := compact(model, tokens, seconds=0)).model, result.report
        assert small.num_heads == 4
        reasons = [left.reason for left in report.left_alone]
        assert any("describe the module in `heads`" in reason for reason in reasons)
        _same(small, model, tokens)
    assert small.head.weight is small.embed.weight
    assert small.embed.embedding_dim == 4
    assert small.up.out_features == 12


def _forward_by_heads(self, tokens):
    """As `Language.forward`, without the width of the stream written into the heads' sizes."""
    x = self.embed(tokens) + self.place
    b, t, _ = x.shape
    q, k, v = (y.view(b, t, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
    x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1))
    a, gate = self.up(x).chunk(2, dim=-1)
    return self.head(x + self.down(a * F.silu(gate)))


def test_attention_with_extra_keys_is_left_alone():
    report = compact(Wrapped(nn.MultiheadAttention(8, 4, add_bias_kv=True)), torch.randn(5, 2, 8), seconds=0).report
    assert "bias_k" in {left.name: left.reason for left in report.left_alone}["attention"]


class Wrapped(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        with torch.no_grad():
            attention.out_proj.weight[:, :4] = 0

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_heads_whose_weights_are_returned_stay():
    class Looking(Wrapped):
        def forward(self, x):
            y, weights = self.attention(x, x, x)
            return y + weights[..., 0].mean()

    report = compact(Looking(nn.MultiheadAttention(8, 4)), torch.randn(5, 2, 8), seconds=0).report
    assert report.parameters[0] == report.parameters[1]
    assert "attention" in {left.name for left in report.left_alone}


# --- inputs


def test_a_linear_layer_stops_reading_unused_inputs():
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[:, 4:] = 0
    small, report = (result := compact(model, torch.randn(3, 20), seconds=0)).model, result.report
    assert small[0].weight.shape == (16, 4)
    assert [(s.name, s.before, s.after) for s in report.inputs] == [("0", 20, 4)]
    assert set(small.state_dict()) == {*model.state_dict(), "0.inputs"}
    _same(small, model, torch.randn(3, 20), torch.randn(5, 20))
    assert compact(model, torch.randn(3, 20), select_inputs=False, seconds=0).model[0].weight.shape == (16, 20)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    small.load_state_dict(torch.load(buffer, weights_only=True))


def test_layers_that_a_fused_kernel_reads_keep_their_columns():
    model = nn.Sequential(nn.Linear(20, 8), nn.TransformerEncoderLayer(8, 4, 16, batch_first=True))
    with torch.no_grad():
        model[0].weight[:, 4:] = 0
        model[1].linear1.weight[:, :6] = 0
    example = torch.randn(2, 5, 20)
    small = compact(model, example, seconds=0).model
    assert small[0].weight.shape == (8, 4)
    assert small[1].linear1.weight.shape == (16, 8)
    _same(small, model, example)


# --- checks


class Scaled(nn.Module):
    """Divides by how many units there are: no weights show that."""

    def __init__(self, fails=False):
        super().__init__()
        self.a, self.b, self.c, self.fails = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), fails

    def forward(self, x):
        y = F.relu(self.a(x))
        if self.fails and y.shape[-1] != 6:
            raise RuntimeError("six units\nor none")
        return self.c(F.relu(self.b(y / (1 if self.fails else y.shape[-1]))))


def test_outputs_that_would_change_are_an_error_that_names_the_coupling():
    model = _halved(Scaled(), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"Removing 3 of the 6 channels of 'a' would change .* ignore=\['a'\]"):
        compact(model, torch.randn(4, 3), seconds=0)
    small = compact(model, torch.randn(4, 3), ignore=["a"], seconds=0).model
    assert (small.a.out_features, small.b.out_features) == (6, 2)


def test_code_that_fails_without_channels_keeps_them():
    model = _halved(Scaled(fails=True), torch.randn(4, 3))
    small, report = (result := compact(model, torch.randn(4, 3), seconds=0)).model, result.report
    assert (small.a.out_features, small.b.out_features) == (6, 2)
    assert {s.name for s in report.couplings} == {"b"}
    assert [left.reason for left in report.left_alone if left.name == "a"] == [
        "the model's code fails without them: RuntimeError: six units"
    ]


def test_a_type_in_the_code_keeps_the_check_in_that_type():
    class Typed(Scaled):
        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x.float())))))

    model = _halved(Typed(), torch.randn(4, 3))
    report = compact(model, torch.randn(4, 3), seconds=0).report
    assert report.checked_in == "float32"
    assert report.error < 1e-5


def test_the_report_says_what_was_saved():
    model = _halved(ResNet(), _image())
    report = compact(model, _image(), seconds=0.01).report
    assert all(seconds > 0 for seconds in report.latency)
    text = str(report)
    for word in ("parameters", "FLOPs", "latency", "a.conv1", "the model returns them", "float64"):
        assert word in text
    assert report.to_dict()["parameters"] == report.parameters
    names = {layer for s in report.couplings for layer in s.layers}
    assert {"a.conv1", "a.bn1", "a.conv2"} <= names


@pytest.mark.parametrize("seconds", [-1, float("nan"), "long"])
def test_seconds_are_checked(seconds):
    with pytest.raises(ValueError, match="`seconds`"):
        compact(nn.Linear(3, 2), torch.randn(1, 3), seconds=seconds)


def test_a_block_can_stand_alone():
    model = _halved(Block(4, 8), torch.randn(2, 4, 8, 8))
    small = compact(model, torch.randn(2, 4, 8, 8), seconds=0).model
    assert (small.conv1.out_channels, small.conv2.out_channels) == (4, 8)
