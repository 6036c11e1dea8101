"""How large is a model's file without its zeros? Writes benchmarks/results/sparse-files.json.

Run `python benchmarks/sparse_files.py`. Weights of real networks' shapes get random values, and zeros in random places,
which is the worst case: zeros in whole rows or channels take less. Biases and norm layers have no zeros.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from torchreg.export import load_sparse, save_sparse

ROOT = Path(__file__).parent.parent
SPARSITIES = (0.5, 0.9, 0.95, 0.99, 0.999)


def lenet() -> list[tuple[int, ...]]:
    sizes = (784, 300, 100, 10)
    return [s for i, o in pairwise(sizes) for s in ((o, i), (o,))]


def resnet18() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *2 * [(64,)], (1000, 512), (1000,)]
    before = 64
    for width in (64, 128, 256, 512):
        convolutions = [(width, before, 3, 3), *3 * [(width, width, 3, 3)]]
        if width != before:
            convolutions.append((width, before, 1, 1))
        for convolution in convolutions:
            shapes += [convolution, (width,), (width,)]
        before = width
    return shapes


def bert_layer() -> list[tuple[int, ...]]:
    matrices = [*4 * [(768, 768)], (3072, 768), (768, 3072)]
    return [*matrices, *((rows,) for rows, _ in matrices), *4 * [(768,)]]


NETWORKS = {"LeNet-300-100": lenet, "ResNet-18": resnet18, "a layer of BERT-base": bert_layer}


def weights(shapes: list[tuple[int, ...]], sparsity: float) -> dict[str, Tensor]:
    """Normal values, of which a fraction is zero where there is more than one dimension."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values[torch.rand(shape, generator=generator) < sparsity] = 0
        state[f"layers.{i}.weight"] = values
    return state


def measure(shapes: list[tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Bytes of the dense file, of the same with gzip, and of the sparse file.

    Raises:
        ValueError: if the sparse file doesn't hold the same bits.
    """
    state = weights(shapes, sparsity)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_sparse(state, path)
        loaded = load_sparse(path)
        if any((loaded[name].view(torch.int32) != w.view(torch.int32)).any() for name, w in state.items()):
            raise ValueError("The file doesn't hold what was saved.")
        sparse = os.path.getsize(path)
    content = b"".join(tensor.numpy().tobytes() for tensor in state.values())
    return {"sparsity": sparsity, "dense": len(content), "gzip": len(gzip.compress(content, 6)), "sparse": sparse}


def docs_table(results: dict[str, list[dict[str, float]]]) -> str:
    """The percentages of the dense size, as docs/smaller.md shows them."""
    lines = ["| % of the dense size at | " + " | ".join(f"{100 * s:g} % zeros" for s in SPARSITIES) + " |"]
    lines.append("| --- |" + " --- |" * len(SPARSITIES))
    for name, rows in results.items():
        for label, key in ((f"{name}, `save_sparse`", "sparse"), (f"{name}, gzip", "gzip")):
            lines.append(f"| {label} | " + " | ".join(f"{100 * row[key] / row['dense']:.2f}" for row in rows) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure all, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/sparse-files.json")
    options = parser.parse_args(arguments)
    results = {name: [measure(shapes(), s) for s in SPARSITIES] for name, shapes in NETWORKS.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(docs_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
