"""Without a GPU the Triton kernels run through Triton's interpreter, which has to be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = ["torchreg/kernels/triton_*kernels.py"]  # no doctests in them, and they need Triton
