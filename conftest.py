"""Without a GPU the Triton kernels run through Triton's interpreter, which has to be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TRAINERS = ("lightning", "transformers", "accelerate", "skorch")
collect_ignore_glob = [  # no doctests in them, and they need packages that may be missing
    "torchreg/kernels/triton_*kernels.py",
    *(f"torchreg/integrations/{name}.py" for name in TRAINERS),
]
