"""Files from anywhere: no crash, no code run, no memory taken for what is not there, and one line for each error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
FEW, MANY, PIECE = 200, 10_000, 1000


def outcome(start, stop):
    """What a process of its own, which may crash, says of these files."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(Path(__file__).with_name("fuzzing.py")), str(start), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=1200)
    assert done.returncode == 0, f"ended with {done.returncode} at {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def test_hostile_and_damaged_files_are_one_line_each():
    assert outcome(0, FEW) == {"files": FEW, "problems": []}


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, MANY, PIECE))
def test_ten_thousand_files_are_one_line_each(start):
    assert outcome(start, start + PIECE) == {"files": PIECE, "problems": []}
