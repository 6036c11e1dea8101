"""Without a GPU the Triton kernels run through Triton's interpreter, which has to be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["torchreg/kernels/triton_kernels.py"]  # no doctests in it, and it needs Triton
