"""What zeros buy: smaller models, files that leave the zeros out, and sparse layers."""

from torchreg.compacted.attention import CompactAttention
from torchreg.compacted.selection import SelectedLinear
from torchreg.coupling.heads import Attention
from torchreg.export.compact_report import CompactReport, Shrunk
from torchreg.export.compaction import Compacted, compact
from torchreg.export.size_now import CompactedSize
from torchreg.export.sparse_file import load_sparse, save_sparse
from torchreg.export.sparse_layers import Converted, LayerChoice, SparseLinear, to_semi_structured, to_sparse_csr

__all__ = [
    "Attention",
    "CompactAttention",
    "CompactReport",
    "Compacted",
    "CompactedSize",
    "Converted",
    "LayerChoice",
    "SelectedLinear",
    "Shrunk",
    "SparseLinear",
    "compact",
    "load_sparse",
    "save_sparse",
    "to_semi_structured",
    "to_sparse_csr",
]
