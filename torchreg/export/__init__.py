"""What zeros buy: files that leave them out."""

from torchreg.export.sparse_file import load_sparse, save_sparse

__all__ = ["load_sparse", "save_sparse"]
