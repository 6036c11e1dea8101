"""What zeros buy: files that leave them out, and sparse layers."""

from torchreg.export.sparse_file import load_sparse, save_sparse
from torchreg.export.sparse_layers import Converted, LayerChoice, SparseLinear, to_semi_structured, to_sparse_csr

__all__ = [
    "Converted",
    "LayerChoice",
    "SparseLinear",
    "load_sparse",
    "save_sparse",
    "to_semi_structured",
    "to_sparse_csr",
]
