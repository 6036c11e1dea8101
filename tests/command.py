"""Running the command: in this process and as a program, and data to run it on."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from torchreg.cli import main


def run_json(arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([*arguments, "--json"])
    assert status == 0, err.getvalue()
    assert err.getvalue() == ""
    return json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def assert_refused(capsys, arguments, *words):
    """Exit status 2, nothing on stdout, and one line on stderr that holds the words."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"torchreg[ a-z]*: error: [^\n]+\n", captured.err), captured.err
    for word in words:
        assert word in captured.err


def mnist_like(path, **replaced):
    """A learnable problem in Keras's MNIST format."""
    rng = np.random.default_rng(0)
    y_train, y_test = rng.integers(0, 3, 200).astype(np.uint8), rng.integers(0, 3, 60).astype(np.uint8)
    arrays = {"y_train": y_train, "y_test": y_test}
    for part, y in (("x_train", y_train), ("x_test", y_test)):
        x = rng.integers(0, 60, (len(y), 6, 6))
        x[:, 2:4, :] += 60 * y[:, None, None]
        x[:, :, 0] = 0
        arrays[part] = x.astype(np.uint8)
    arrays.update(replaced)
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


def assert_one_line(done, words):
    """A program that ended with status 2, nothing on stdout and one line on stderr."""
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"torchreg[ a-z]*: error: [^\n]+\n", done.stderr), done.stderr
    assert words in done.stderr


def program(*arguments, before=(), stdout=subprocess.PIPE, **options):
    """Run the command as a program, with the words of another command before it."""
    return subprocess.run(
        [*before, sys.executable, "-m", "torchreg", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        **options,
    )
