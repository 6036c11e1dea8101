"""Linear layers in torch's sparse forms."""

import io
import re
import types

import pytest
import torch
from torch import nn

from torchreg import NM, export
from torchreg.export import SparseLinear, sparse_layers, to_semi_structured, to_sparse_csr
from torchreg.export.surgery import replaced


def _sparse(layer, zeros=0.95, seed=0):
    with torch.no_grad():
        keep = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) > zeros
        layer.weight.mul_(keep)
    return layer


@pytest.fixture
def always_faster(monkeypatch):
    """Timing decides nothing here."""
    monkeypatch.setattr(sparse_layers, "_gain", lambda dense, sparse: 2.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (5,), (2, 3, 5), (0, 5)])
def test_a_sparse_layer_computes_what_the_dense_one_does(bias, dtype, shape):
    dense = _sparse(nn.Linear(5, 4, bias=bias, dtype=dtype), 0.5)
    layer, x = SparseLinear.of(dense), torch.randn(shape, dtype=dtype)
    assert layer(x).shape == dense(x).shape
    assert torch.allclose(layer(x), dense(x), rtol=1e-5, atol=1e-6)
    assert layer.values.numel() == torch.count_nonzero(dense.weight)


def test_a_sparse_layer_is_saved_and_loaded():
    layer = SparseLinear.of(_sparse(nn.Linear(6, 3)))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = SparseLinear.of(_sparse(nn.Linear(6, 3), seed=0))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), other(x))


def test_layers_are_replaced_where_that_was_measured_to_be_faster(monkeypatch):
    gains = iter([1.5, 0.7])
    monkeypatch.setattr(sparse_layers, "_gain", lambda dense, sparse: next(gains))
    model = nn.Sequential(_sparse(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(5, 8)
    converted = to_sparse_csr(model, x)
    assert isinstance(converted.model[0], SparseLinear)
    assert type(converted.model[2]) is nn.Linear
    assert [(c.converted, c.gain) for c in converted.layers] == [(True, 1.5), (False, 0.7)]
    assert converted.layers[1].reason == "dense is as fast"
    assert converted.count == 1
    assert torch.allclose(converted.model(x), model(x), atol=1e-6)
    assert model.training
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert "0       6×8     sparse" in str(converted)


def test_the_gain_is_a_ratio_of_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sparse_layers.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def call():
            now[0] += seconds

        return call

    assert sparse_layers._gain(takes(3e-3), takes(1e-3)) == pytest.approx(3)
    assert sparse_layers._gain(takes(1e-6), takes(4e-6)) == pytest.approx(0.25)


@pytest.mark.usefixtures("always_faster")
def test_layers_that_others_read_or_nothing_reaches_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # in eval mode it calls no layer
            self.extra, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.extra(self.encoder(x))

    model, x = Model(), torch.randn(2, 5, 8)
    converted = to_sparse_csr(model, x)
    assert {c.name: c.reason for c in converted.layers} == {
        "encoder.linear1": "its owner reads it",
        "encoder.linear2": "its owner reads it",
        "extra": "",
        "unused": "the example does not reach it",
    }
    assert torch.allclose(converted.model(x), model.eval()(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_a_model_that_is_a_layer_becomes_one():
    assert isinstance(to_sparse_csr(nn.Linear(4, 2), torch.randn(3, 4)).model, SparseLinear)


@pytest.mark.usefixtures("always_faster")
def test_a_layer_whose_owner_reads_its_weight_is_put_back():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) + x @ self.layer.weight.view(16)[:4].clone()[:, None]

    model = Owner()
    converted = to_sparse_csr(model, torch.randn(3, 4))
    assert converted.layers[0].reason == "its owner reads it"
    assert type(converted.model.layer) is nn.Linear
    x = torch.randn(3, 4)
    assert torch.equal(converted.model(x), model(x))


@pytest.mark.usefixtures("always_faster")
def test_tied_weights_and_shared_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, i):
            return self.head(self.b(self.a(self.embed(i))))

    converted = to_sparse_csr(Tied(), torch.tensor([1, 2, 3]))
    assert {c.name: c.reason for c in converted.layers} == {"head": "its weight is also embed.weight", "a": ""}
    assert converted.model.a is converted.model.b
    assert isinstance(converted.model.a, SparseLinear)


def test_examples_may_be_tuples_and_dicts(always_faster):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, shift):
            return {"y": self.layer(x) + shift, "n": 3}

    x, shift = torch.randn(3, 4), torch.randn(3, 2)
    assert to_sparse_csr(Two(), (x, shift)).count == 1
    assert to_sparse_csr(Two(), {"x": x, "shift": shift}).count == 1


class _Head(nn.Module):
    """What is returned beside the logits: a mask, masked logits and classes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y, y > 0, y.masked_fill(torch.tensor([True, False, False]), -torch.inf), y.argmax(-1)


@pytest.mark.usefixtures("always_faster")
def test_outputs_may_be_masks_or_infinite_or_nan():
    model, x = _Head(), torch.randn(5, 4)
    assert to_sparse_csr(model, x).count == 1
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.nan
    assert to_sparse_csr(model, x).count == 1


@pytest.mark.usefixtures("always_faster")
def test_infinite_outputs_hide_no_difference(monkeypatch):
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda layer, x: forward(layer, x) + 1)
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[0] = torch.inf
    with pytest.raises(ValueError, match="outputs of the model change"):
        to_sparse_csr(model, torch.randn(5, 4))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"`model` to be an nn\.Module, got Tensor"):
        to_sparse_csr(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"`model` to be an nn\.Module, got Tensor"):
        to_semi_structured(torch.ones(2))
    with pytest.raises(ValueError, match="`gain` to be a positive number, got 0"):
        to_sparse_csr(nn.Linear(2, 2), torch.ones(2), gain=0)
    with pytest.raises(ValueError, match=r"fails on the example: RuntimeError: .*mat1 and mat2"):
        to_sparse_csr(nn.Linear(2, 2), torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"fails on the example: RuntimeError: .*mat1 and mat2"):
        to_semi_structured(nn.Linear(2, 2), torch.ones(5, 3))
    with pytest.raises(ValueError, match="on the CPU, got 'weight' on meta"):
        to_sparse_csr(nn.Linear(2, 2, device="meta"), torch.ones(5, 3))


def test_semi_structured_layers_say_why_they_stay_dense():
    converted = to_semi_structured(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), torch.ones(2, 64))
    assert [c.reason for c in converted.layers] == ["it is on the cpu: the kernels need CUDA"] * 2
    assert converted.count == 0


def test_a_semi_structured_layer_of_another_size_says_which_would_do():
    """By torch's own check, of what looks like a matrix on a GPU."""
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUTLASS as kernels

    sizes = {"is_cuda": True, "dim": lambda: 2, "is_contiguous": lambda: True, "dtype": torch.float16}
    matrix = types.SimpleNamespace(**sizes, shape=torch.Size((3, 64)))
    with pytest.raises(RuntimeError) as refused:
        kernels._validate_device_dim_dtype_shape(matrix)
    assert re.fullmatch(r"its sizes are no multiples of \d+ and \d+", sparse_layers._misfit(str(refused.value)))
    assert sparse_layers._misfit("of another kind\nand more") == "of another kind"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's semi-structured kernels need CUDA")
def test_semi_structured_layers_compute_the_same_on_a_gpu():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sparse tensor cores")
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).cuda().half()
    with torch.no_grad():
        model[0].weight.copy_(NM(2, 4).prox(model[0].weight))
    x = torch.randn(128, 256, device="cuda", dtype=torch.float16)
    converted = to_semi_structured(model, x)
    assert [c.converted for c in converted.layers] == [True, False]
    assert converted.layers[1].reason == "it is not 2:4 sparse"


def test_the_names_are_public():
    assert {"SparseLinear", "to_sparse_csr", "to_semi_structured", "Converted"} <= set(export.__all__)


def test_a_layer_is_replaced_wherever_it_is_registered():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "again": layer, "inner": nn.Sequential(layer)})
    assert replaced(model, layer, other) is model
    assert model["first"] is model["again"] is model["inner"][0] is other
    assert replaced(layer, layer, other) is other
