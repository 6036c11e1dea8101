"""Export a model, and compare what comes out: by torch.export, and by ONNX Runtime where that is installed."""

import importlib.util

import torch


def check_exports(model, x, folder):
    """Print how far the outputs of the exported model are from the model's."""
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        difference = (exported.module()(x) - expected).abs().max().item()
        print(f"torch.export: outputs differ by at most {difference:.1e}")

        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            print(f"ONNX: skipped, because {', '.join(missing)} is not installed")
            return
        import onnxruntime

        path = folder / "small.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        difference = (torch.from_numpy(got) - expected).abs().max().item()
        print(f"ONNX Runtime: outputs differ by at most {difference:.1e}")
