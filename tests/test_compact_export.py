"""A compacted model goes through torch.export and ONNX Runtime."""

import pytest
import torch
from test_compact import ResNet, _halved, _image
from torch import nn

from torchreg.export import compact

pytest.importorskip("torch_pruning", reason="needs the extra 'pruning'")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _exported_models():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 1)
    inputs = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        inputs[0].weight[:, 4:] = 0
    return {
        "resnet": (ResNet(groups=4), _image()),
        "transformer": (encoder, torch.randn(3, 5, 8)),
        "inputs": (inputs, torch.randn(3, 20)),
    }


@pytest.mark.parametrize("name", ["resnet", "transformer", "inputs"])
def test_a_compacted_model_goes_through_torch_export(name):
    model, example = _exported_models()[name]
    small = compact(_halved(model, example), example, seconds=0).model.eval()
    program = torch.export.export(small, (example,))
    torch.testing.assert_close(program.module()(example), small(example))


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_a_compacted_model_goes_through_onnx_runtime(name, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    model, example = _exported_models()[name]
    small = compact(_halved(model, example), example, seconds=0).model.eval()
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (example,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), small(example), rtol=1e-4, atol=1e-5)
