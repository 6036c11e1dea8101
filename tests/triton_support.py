"""Whether Triton's kernels can be run here: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch


def require_triton() -> None:
    """Skip a test, with the reason, where they can't."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    import triton

    numbers = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]
    if not torch.cuda.is_available() and numbers[0] < (3, 7) and numbers[1] >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with numpy {np.__version__}")
