"""The Triton kernels compile for a GPU, which needs none, and read 16 bytes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import DTYPES, GROUPED, PENALTIES, STEPS
from triton_support import require_triton

# Tensors that a kernel reads: weights, gradients, momentum or two moments; weights; weights and gradients.
READ = dict(zip((*STEPS, *GROUPED, *PENALTIES), (3, 4, 3, 4, 1, 2), strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list]:
    require_triton()
    script = Path(__file__).with_name("compile_kernels.py")
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, script], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", READ)
def test_the_kernel_compiles_for_a_gpu_and_reads_16_bytes_at_once(kernel, compiled):
    assert len(compiled[kernel]) == len(DTYPES)
    for wide, built in compiled[kernel]:
        assert wide >= READ[kernel]
        assert built
