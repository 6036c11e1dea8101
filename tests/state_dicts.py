"""State dicts with all kinds of bits, and what a sparse file says of them."""

import json
import math

import numpy as np
import torch

from torchreg.export import container, sparse_file


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].is_contiguous()
        assert torch.equal(raw(got[name]), raw(tensor)), name


def random_bits(dtype, shape, density, seed=0):
    """A tensor of all kinds of bit patterns, NaN payloads among them, of which about ``density`` are not zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 256, (math.prod(shape), dtype.itemsize), dtype=np.uint8)
    if dtype == torch.bool:
        bits[:] = 1
    bits[rng.random(len(bits)) >= density] = 0
    return torch.from_numpy(bits).reshape(-1).view(dtype).reshape(shape)


def codings(path):
    with open(path, "rb") as file:
        records = json.loads(container.read_header(file).metadata[sparse_file.RECORDS])["tensors"]
    return {name: record.get("coding", "tied") for name, record in records.items()}
